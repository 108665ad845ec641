"""Records of results: what they hold, and that `gptk repeat` finds what differs."""

import hashlib
import json
import os

import pytest

import gptk
from gptk.plugins.registry import provided
from gptk.records.reading import Result
from gptk.records.repeating import compare_results
from gptk.records.writing import full_spec
from gptk.testing import tiny_lm
from program import failing
from program import gptk as run_gptk
from toys import PROCESSOR_OPTIONS

FEW = ("--max-new-tokens", 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    tiny_lm().save(path)
    return path


@pytest.fixture
def recorded(model, tmp_path):
    """`recorded(command, *args)`: the file with the records that a command writes."""

    def record(command, *args, stdin=""):
        out = run_gptk(command, "--model", model, "--json", *args, stdin=stdin)
        assert out.returncode == 0, out.stderr
        path = tmp_path / "records.jsonl"
        path.write_text(out.stdout)
        return path

    return record


def edited(path, change):
    """The file with each record changed."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- What a record holds ----------------------------------------------------------------------


def test_a_record_has_every_setting_the_model_s_hash_and_the_versions(recorded, model):
    path = recorded("generate", "abc", "--sampler", "beam", *FEW)
    record = json.loads(path.read_text())
    assert record["settings"] == {
        "sampler": "beam:width=4,length_penalty=1.0,early_stopping=false",
        "processors": [], "max_new_tokens": 6, "n": 1, "seed": record["seed"], "stop": [],
        "draft": None, "overflow": "stop", "max_seconds": None, "ignore_eos": False,
        "use_cache": True, "top_logprobs": 0, "observers": [], "ordinal": 0,
    }  # fmt: skip
    weights = (model / "model.safetensors").read_bytes()
    assert {
        "name": "model.safetensors",
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    } in record["model"]["files"]
    assert record["load"] == {
        "model": str(model), "tokenizer": None, "device": "cpu", "dtype": "float32",
        "quantize": record["model"]["quantize"],
    }  # fmt: skip
    assert record["model"]["config"]["n_layers"] == 2
    assert len(record["model"]["tokenizer"]["sha256"]) == 64
    assert record["environment"]["gptk"] == gptk.__version__
    assert {"torch", "python", "kernels", "threads", "processor"} <= set(record["environment"])
    assert set(record["plugins"]) == {"sampler beam", "loader gptk"}


def test_plugins_that_others_wrap_or_bring_are_recorded(recorded):
    path = recorded("generate", "abc", "--sampler", 'best-of-n:n=2,sampler="top-p:p=0.9"', *FEW)
    plugins = json.loads(path.read_text())["plugins"]
    assert {"sampler best-of-n", "sampler top-p", "scorer mean-logprob"} <= set(plugins)
    assert all(value.startswith("gptk-decoding ") for value in plugins.values())


@pytest.mark.parametrize("kind", ["sampler", "processor", "drafter", "scorer"])
def test_a_full_spec_makes_an_equal_plugin(kind):
    base = {"sampler": gptk.Sampler, "processor": gptk.LogitsProcessor}
    base |= {"drafter": gptk.Drafter, "scorer": gptk.Scorer}
    for name, plugin in provided(kind).items():
        for options in {PROCESSOR_OPTIONS.get(name, plugin.item.example), plugin.item.example}:
            spec = f"{name}:{options}" if options else name
            made = gptk.plugins.create(kind, spec, base[kind])
            again = gptk.plugins.create(kind, full_spec(made), base[kind])
            assert again == made
            assert set(type(made).model_fields) == set(again.model_dump())


def test_a_hash_is_left_out_where_the_file_has_changed_since(tmp_path):
    tiny_lm().save(tmp_path / "m")
    lm = gptk.load(tmp_path / "m")
    names = {file["name"]: file["sha256"] for file in lm.to_dict()["files"]}
    assert all(names.values())
    path = tmp_path / "m" / "model.safetensors"
    os.utime(path, ns=(0, 0))
    assert {f["name"] for f in lm.to_dict()["files"] if f["sha256"] is None} == {path.name}
    path.unlink()
    assert {f["name"] for f in lm.to_dict()["files"] if f["sha256"] is None} == {path.name}


def test_the_files_of_a_run_s_checkpoint_are_those_of_its_model(tmp_path):
    """Not the optimizer's tensors: they are large, and do not change its results."""
    (tmp_path / "text.txt").write_text("abcdefgh" * 100)
    config = gptk.TrainConfig(
        data=[str(tmp_path / "text.txt")], steps=1, n_layers=1, n_heads=1, width=8, batch_size=2,
        context_length=8, eval_batches=1, sample_tokens=0, device="cpu", dtype="float32",
    )  # fmt: skip
    gptk.Trainer.start(config, tmp_path / "run").train()
    names = {file["name"] for file in gptk.load(tmp_path / "run").to_dict()["files"]}
    assert names == {"gptk.json", "model.safetensors", "tokenizer.tiktoken"}


def test_smollm2_s_hash_is_that_of_its_file(smollm2_path):
    lm = gptk.load("smollm2")
    (file,) = lm.to_dict()["files"]
    assert file["sha256"] == hashlib.sha256(smollm2_path.read_bytes()).hexdigest()


def test_a_model_made_in_python_has_no_files():
    assert tiny_lm().to_dict()["files"] == []
    json.dumps(tiny_lm().to_dict())


# --- Files that plug-ins read ------------------------------------------------------------------


def test_a_record_has_the_hashes_of_what_plugins_read(recorded, tmp_path):
    """Of a draft model, a schema, a grammar, and a plug-in that is a file itself."""
    tiny_lm(seed=1).save(tmp_path / "draft")
    (tmp_path / "schema.json").write_text('{"type": "boolean"}')
    path = recorded("generate", "abc", "--draft", f"model:{tmp_path / 'draft'}",
                    "--processor", f"json-schema:{tmp_path / 'schema.json'}", *FEW)  # fmt: skip
    files = json.loads(path.read_text())["files"]
    read = [tmp_path / "schema.json", *sorted((tmp_path / "draft").iterdir())]
    plugins = ["processor json-schema", *["drafter model"] * (len(read) - 1)]
    assert files == [
        {
            "plugin": plugin,
            "name": file.name,
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for plugin, file in zip(plugins, read, strict=True)
    ]
    out = run_gptk("repeat", path)
    assert (out.returncode, len(out.stdout.splitlines())) == (0, 2), out.stdout


CHANGES = {
    "a schema": ("--processor", "json-schema:{}", '{"type": "boolean"}', '{"type": "null"}'),
    "a grammar": ("--processor", "grammar:{}", 'start: "true"', 'start: "false"'),
}


@pytest.mark.parametrize("command", ["generate", "compare"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_has_changed_is_told_by_name(recorded, tmp_path, name, command):
    option, spec, before, after = CHANGES[name]
    file = tmp_path / "constraint.txt"
    file.write_text(before)
    sampler = ("--sampler", "greedy") if command == "compare" else ()
    path = recorded(command, "abc", *sampler, option, spec.format(file), *FEW)
    file.write_text(after)
    out = run_gptk("repeat", path)
    plugin = spec.partition(":")[0]
    was, now = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in (before, after))
    assert out.stdout.splitlines()[0] == (
        f"environment: constraint.txt of processor {plugin}: SHA-256 {now}, was {was}"
    )
    assert out.returncode == 1


def test_a_draft_that_has_changed_is_told_and_does_not_change_the_result(recorded, tmp_path):
    tiny_lm(seed=1).save(tmp_path / "draft")
    path = recorded("generate", "abc", "--draft", f"model:{tmp_path / 'draft'}", *FEW)
    tiny_lm(seed=2).save(tmp_path / "draft")
    out = run_gptk("repeat", path)
    assert out.returncode == 0
    (line, *_) = out.stdout.splitlines()
    assert line.startswith("environment: model.safetensors of drafter model: SHA-256 ")


PLUGIN = """
import torch
import gptk
class FromFile(gptk.Sampler):
    "A third party's sampler, which begins with a token from a file."
    name = "from-file"
    path: str
    def step(self, logits, rows):
        return gptk.Choice.one_each(torch.full((len(rows),), {token}), logits, rows)
    def files_read(self):
        return {answer}
@gptk.hookimpl
def gptk_samplers():
    return [FromFile]
"""


@pytest.fixture
def code(tmp_path):
    """The file of a plug-in, which is taken out afterwards."""
    path = tmp_path / "mine.py"
    yield path
    gptk.plugins.unregister(gptk.plugins.register_file(path))


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_plugin_of_a_third_party_says_what_it_reads(recorded, tmp_path, code, command):
    """And of a plug-in that is a single file, its own file is recorded."""
    words = tmp_path / "words.txt"
    answer = "[gptk.plugins.ReadFile.of(self.path)]"
    code.write_text(PLUGIN.format(token=65, answer=answer))
    words.write_text("a")
    options = ("--plugin", code, "--sampler", f"from-file:path={words}")
    path = recorded(command, "abc", *options, *FEW)
    files = json.loads(path.read_text())["files"]
    assert [(file["plugin"], file["name"]) for file in files] == [
        ("sampler from-file", "words.txt"),
        ("sampler from-file", "mine.py"),
    ]
    words.write_text("b")
    code.write_text(PLUGIN.format(token=66, answer=answer))
    out = run_gptk("repeat", path, "--plugin", code)
    assert not out.stderr, out.stderr
    told = [line.split(": SHA")[0] for line in out.stdout.splitlines() if "SHA" in line]
    assert told == [
        f"environment: {name} of sampler from-file" for name in ("words.txt", "mine.py")
    ]


@pytest.mark.parametrize("answer", ["None", "'words.txt'", "[self.path]", "1 / 0"])
def test_a_wrong_answer_of_a_plugin_names_it(model, code, answer):
    code.write_text(PLUGIN.format(token=65, answer=answer))
    args = ("generate", "--model", model, "abc", "--json", "--plugin", code)
    out = run_gptk(*args, "--sampler", "from-file:path=x", *FEW)
    assert out.returncode == 1
    assert "sampler from-file of " in out.stderr
    assert "files_read" in out.stderr


# --- Repeating --------------------------------------------------------------------------------


CALLS = {
    "greedy": ("abc",),
    "beams": ("abc", "--sampler", "beam:width=3", "--n", 2),
    "samples": ("abc", "--sampler", "top-p:p=0.9", "--n", 3),
    "a draft": ("abab", "--sampler", "multinomial", "--draft", "lookup:ngram=1"),
    "stop strings": ("abc", "--stop", "x", "--stop", r"\n"),
    "processors": ("abc", "--processor", "dry:multiplier=0.8", "--processor", "min-p:p=0.1"),
    "a constraint": ("abc", "--processor", 'regex:pattern="[a-c]{2,4} é, x"', "--seed", 5),
    "likeliest tokens": ("abc", "--top-logprobs", 3),
    "a full window": ("x" * 94,),
    "a sliding window": ("x" * 94, "--overflow", "slide"),
    "quantized": ("abc", "--quantize", "int8"),
    "another tokenizer": ("abc", "--tokenizer", "bytes"),
    "a prompt beyond ASCII": ("né \u6f22 \U0001f600",),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_run_repeated_is_equal(recorded, name):
    out = run_gptk("repeat", recorded("generate", *CALLS[name], *FEW))
    *results, last = out.stdout.splitlines()
    assert (out.returncode, out.stderr) == (0, ""), out.stdout
    assert last == f"{len(results)} of {len(results)} results are equal"
    assert all(": equal; " in line and "within 0" in line for line in results)


def test_a_chat_repeated_is_equal(recorded, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    path = recorded("generate", "hello", "--chat", "--system", "be brief", "--chat-template",
                    tmp_path / "t.jinja", *FEW)  # fmt: skip
    (tmp_path / "t.jinja").unlink()
    record = json.loads(path.read_text())
    assert [m["content"] for m in record["messages"]] == ["be brief", "hello"]
    assert bytes(record["prompt_tokens"]) == b"<be brief><hello>"
    assert run_gptk("repeat", path).returncode == 0


@pytest.mark.parametrize("kept", [slice(None), slice(2, 3), slice(1, 4), slice(0, 1)])
def test_prompts_of_a_file_are_repeated_all_or_some_of_them(recorded, tmp_path, kept):
    """Also equal prompts, whose random numbers depend on their places."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo words\none\none\n")
    path = recorded("generate", "--prompts-file", prompts, "--sampler", "multinomial", *FEW)
    lines = path.read_text().splitlines()
    assert len({json.loads(line)["text"] for line in lines}) == 4
    path.write_text("\n".join(lines[kept]))
    out = run_gptk("repeat", path)
    assert out.returncode == 0, out.stdout
    assert len(out.stdout.splitlines()) == len(lines[kept]) + 1


def test_a_comparison_repeated_is_equal(recorded):
    path = recorded("compare", "abc", "--sampler", "greedy", "--sampler", "top-k:k=5", "--n", 2,
                    "--processor", "temperature:temperature=1.5", *FEW)  # fmt: skip
    out = run_gptk("repeat", path)
    assert (out.returncode, len(out.stdout.splitlines())) == (0, 4), out.stdout
    path.write_text(json.dumps(json.loads(path.read_text()), indent=2))  # laid out by somebody
    assert run_gptk("repeat", path).stdout == out.stdout


def test_a_comparison_by_several_seeds_is_repeated_and_says_which_differs(recorded):
    sampler = "top-k:k=5 + min-p:0.1"
    path = recorded("compare", "abc", "--sampler", sampler, "--seeds", 2, "--n", 1, *FEW)
    out = run_gptk("repeat", path)
    assert (out.returncode, len(out.stdout.splitlines())) == (0, 3), out.stdout

    def change(record):
        record["samplers"][0]["measured"][1]["generations"][0]["tokens"][0] ^= 1

    (line,) = [
        line for line in run_gptk("repeat", edited(path, change)).stdout.splitlines()
        if "token 1 is" in line
    ]  # fmt: skip
    assert line.startswith(f"{sampler}, prompt 1, seed 1: ")


def test_other_tokens_are_told_with_both_log_probabilities(recorded):
    path = recorded("generate", "abc", *FEW)
    record = json.loads(path.read_text())

    def change(record):
        record["tokens"][3] = 65
        record["token_texts"][3] = "A"
        record["token_logprobs"][3] = -2.5
        record["token_logprobs"][1] += 0.25

    out = run_gptk("repeat", edited(path, change))
    assert out.returncode == 1
    now = f"{record['token_texts'][3]!r} (id {record['tokens'][3]}, log-probability "
    assert out.stdout.splitlines() == [
        f"prompt 1: DIFFERENT: token 4 is {now}{record['token_logprobs'][3]:.6f}), was 'A' (id 65, "
        "log-probability -2.500000); 3 equal tokens, log-probabilities within 0.25",
        "0 of 1 results are equal",
    ]


def test_other_log_probabilities_of_equal_tokens_do_not_count(recorded):
    """What is decoded beside a prompt changes their last digits."""

    def change(record):
        record["token_logprobs"][1] += 1e-4
        record["score"] += 1e-4

    out = run_gptk("repeat", edited(recorded("generate", "abc", *FEW), change))
    assert out.returncode == 0
    assert out.stdout == (
        "prompt 1: equal; 6 equal tokens, log-probabilities within 0.0001\n"
        "1 of 1 results are equal\n"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["settings"].update(seed=99), "token 1 is"),
        (lambda r: r.update(tokens=r["tokens"][:-1]), "token 6 is"),
        (lambda r: r.update(tokens=[*r["tokens"], 1]), "token 7 is the end, was ? (id 1"),
        (lambda r: r.update(finish_reason="eos"), "the finish reason is length, was eos"),
        (lambda r: r.update(text="\0" + r["text"]), "the text differs from character 1 on"),
        (lambda r: r.update(prompt="abd"), "the prompt has other tokens from token 3 on"),
        (lambda r: r.update(alternatives=[]), "there are 2 results, were 1"),
    ],
)
def test_what_differs_is_told(recorded, change, words):
    args = ("abc", "--sampler", "multinomial", "--n", 2, "--seed", 3)
    out = run_gptk("repeat", edited(recorded("generate", *args, *FEW), change))
    assert out.returncode == 1
    assert words in out.stdout


def test_another_environment_is_told_and_need_not_change_the_result(recorded, model, tmp_path):
    path = recorded("generate", "abc", *FEW)

    def change(record):
        record["environment"] |= {"torch": "1.0", "gptk": "0.0"}
        record["model"]["files"][1]["sha256"] = "f" * 64
        record["model"]["dtype"] = "bfloat16"
        record["environment"]["x\x1b[2J"] = "y\n\x07"  # not for the terminal

    out = run_gptk("repeat", edited(path, change))
    assert out.returncode == 0
    lines = out.stdout.split("\n")[:-1]
    assert all(line.isprintable() for line in lines)
    assert "environment: x\\x1b[2J: None, was y \\x07" in lines
    assert f"environment: gptk: {gptk.__version__}, was 0.0" in lines
    assert any(line.startswith("environment: torch: ") for line in lines)
    assert "environment: model.dtype: float32, was bfloat16" in lines
    assert any(line.startswith("environment: model.safetensors: SHA-256 ") for line in lines)
    assert len(lines) == 5 + 2


def test_the_model_may_be_in_another_place(recorded, model, tmp_path):
    moved = tmp_path / "moved"
    path = edited(recorded("generate", "abc", *FEW), lambda r: r["load"].update(model="/no/such"))
    assert "/no/such" in failing("repeat", path, code=1)
    moved.symlink_to(model)
    out = run_gptk("repeat", path, "--model", moved)
    assert (out.returncode, len(out.stdout.splitlines())) == (0, 2)


def test_another_model_is_told(recorded, tmp_path):
    path = recorded("generate", "abc", *FEW)
    tiny_lm(seed=1).save(tmp_path / "other")
    out = run_gptk("repeat", path, "--model", tmp_path / "other")
    assert out.returncode == 1
    assert "environment: model.safetensors: SHA-256" in out.stdout


def test_an_interrupted_result_is_compared_as_far_as_it_goes():
    done = tiny_lm().generate("abc", max_new_tokens=6)
    cut = done.to_dict() | {
        "tokens": done.tokens[:3], "text": "", "finish_reason": "interrupted",
    }  # fmt: skip
    was = Result.parse(cut, "here")
    assert compare_results("x", was, done).difference is None
    assert compare_results("x", was, done).compared == 3
    other = Result.parse(cut | {"tokens": [*done.tokens[:2], 1]}, "here")
    assert "token 3 is" in compare_results("x", other, done).difference


@pytest.mark.parametrize("sampler", ["greedy", "multinomial", "beam:2"])
def test_a_result_that_a_time_limit_ended_is_repeated_without_it(recorded, sampler):
    path = recorded("generate", "abc", "--sampler", sampler, *FEW)

    def end_by_time(record):  # as a slower machine would have ended it
        record["settings"] |= {"max_seconds": 0.0, "max_new_tokens": 10**9}
        record["finish_reason"] = "time"

    tokens = len(json.loads(path.read_text())["tokens"])
    out = run_gptk("repeat", edited(path, end_by_time))
    assert out.returncode == 0, out.stdout
    assert f"{tokens} equal tokens" in out.stdout


def test_a_dead_end_is_repeated(recorded, model, tmp_path):
    args = ("generate", "a", "--model", model, "--processor", "bad-words:words='[\"b\"]'",
            "--processor", "regex:pattern=aab", "--json")  # fmt: skip
    path = tmp_path / "dead.jsonl"
    path.write_text(run_gptk(*args).stdout)
    out = run_gptk("repeat", path)
    assert out.returncode == 0, out.stdout
    assert "2 equal tokens" in out.stdout


def test_a_repetition_writes_no_trace(recorded, tmp_path):
    trace = tmp_path / "trace.jsonl"
    path = recorded("generate", "abc", "--trace", trace, *FEW)
    assert json.loads(path.read_text())["settings"]["observers"] == [f"trace:path={trace}"]
    trace.unlink()
    assert run_gptk("repeat", path).returncode == 0
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(version=2), "line 1 has another version than 1"),
        (lambda r: r.update(record="poem"), "is no record of gptk generate or"),
        (lambda r: r.pop("settings"), "line 1 has no settings"),
        (lambda r: r["settings"].update(n="2"), "settings.n is '2'; it must be a whole number"),
        (lambda r: r["settings"].update(colour="red"), "settings.colour is 'red'"),
        (lambda r: r["settings"].update(max_new_tokens=0), "max_new_tokens is 0; it must be 1"),
        (lambda r: r["settings"].update(sampler="bean"), "did you mean beam"),
        (lambda r: r["load"].update(dtype="int3"), "int3"),
        (lambda r: r["load"].update(device="abacus"), "no device 'abacus'"),
    ],
)
def test_a_record_that_cannot_be_repeated_is_refused_in_one_line(recorded, change, words):
    out = run_gptk("repeat", edited(recorded("generate", "abc", *FEW), change))
    assert out.returncode in (1, 2)
    (line,) = out.stderr.splitlines()
    assert words in line
    assert "internal error" not in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no record"),
        ("[1]", "holds no JSON object"),
        ('{"record": "generation"', "not valid JSON"),
        ('{"text": "old"}', "no record of gptk generate or"),
    ],
)
def test_a_file_without_records_is_refused(tmp_path, text, words):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    assert words in failing("repeat", path, code=1)
    assert "there is no such file" in failing("repeat", tmp_path / "none", code=1)


def test_a_comparison_with_prompts_that_have_no_results_is_refused(recorded):
    """Else a record would have any number of prompts decoded, to compare them with nothing."""
    path = recorded("compare", "abc", "--sampler", "greedy", *FEW)
    edited(path, lambda record: record.update(prompts=record["prompts"] * 1000))
    line = failing("repeat", path, code=1)
    assert "the record has 1,000 prompts, and results of greedy for others" in line
