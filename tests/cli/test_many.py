"""`gptk generate --prompts-file`: many prompts, each as alone; results in a file that a stopped
run is gone on with."""

import hashlib
import json
import os
import signal

import pytest

import gptk
from gptk.decoding.stream import Stream
from gptk.plugins.registry import provided
from gptk.records.prompts_file import PromptsFile
from gptk.records.results_file import ResultsFile
from gptk.system.interrupts import Interrupts
from gptk.testing import tiny_lm
from program import failing
from program import gptk as run_gptk

LM = tiny_lm()
FEW = ("--max-new-tokens", 4)
SAMPLED = (*FEW, "--sampler", "multinomial", "--seed", 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    LM.save(path)
    return path


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo words\none\nfour\nfive\n")
    return path


@pytest.fixture
def generate(model, prompts, tmp_path):
    """`generate(*args)`: the program with the prompts above, which writes to r.jsonl."""

    def run(*args, file=prompts, out=tmp_path / "r.jsonl", **settings):
        return run_gptk(
            "generate", "--model", model, "--prompts-file", file, "--out", out, *args, **settings
        )

    return run


def records(path):
    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_order(path):
    found = sorted(records(path), key=lambda record: record["index"])
    assert [record["index"] for record in found] == list(range(len(found)))
    return found


def comparable(value):
    """Records that are equal but for log-probabilities, which by 1e-4 at most depend on what is
    decoded beside a prompt, compare equal."""
    if isinstance(value, dict):
        return {
            name: pytest.approx(found, abs=1e-4)
            if name in ("token_logprobs", "score")
            else comparable(found)
            for name, found in value.items()
        }
    return [comparable(item) for item in value] if isinstance(value, list) else value


# --- Results ----------------------------------------------------------------------------------


def test_each_prompt_gets_what_it_gets_alone(generate, tmp_path):
    out = generate(*SAMPLED)
    assert (out.returncode, out.stdout) == (0, ""), out.stderr
    assert out.stderr.startswith("5 prompts, ")
    texts = ["one", "two words", "one", "four", "five"]
    for index, record in enumerate(in_order(tmp_path / "r.jsonl")):
        alone = LM.generate(
            texts[index], ordinal=index, sampler="multinomial", seed=5, max_new_tokens=4
        )
        assert (record["prompt"], record["error"]) == (texts[index], None)
        assert {name: record[name] for name in alone.to_dict()} == comparable(alone.to_dict())
    again = run_gptk("repeat", tmp_path / "r.jsonl")
    assert again.stdout.endswith("5 of 5 results are equal\n")


def test_results_are_printed_in_order(model, prompts):
    args = ("generate", "--model", model, "--prompts-file", prompts, *SAMPLED)
    as_text, as_json = run_gptk(*args), run_gptk(*args, "--json")
    lines = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 4]
    assert as_text.stdout == "".join(
        f"--- {line['prompt']!r} [1] score {line['score']:.4f}\n{line['text']}\n" for line in lines
    )


def test_lines_in_json_have_ids_settings_and_ordinals_of_their_own(model, generate, tmp_path):
    file = tmp_path / "lines"
    lines = [
        {"prompt": "abc", "id": "first"},
        {"prompt": [1, 2, 3], "id": 7, "settings": {"sampler": "beam:2", "n": 2}},
        {"prompt": "abc", "ordinal": 0, "settings": {"max_new_tokens": 2, "seed": 5}},
        {"prompt": "abc", "settings": {"processors": ["top-p:0.9"]}, "messages": None},
        {"prompt": "", "settings": None},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert generate(*FEW, "--seed", 5, file=file).returncode == 0
    found = in_order(tmp_path / "r.jsonl")
    assert [record["id"] for record in found] == ["first", 7, None, None, None]
    settings = {"max_new_tokens": 4, "seed": 5}
    wanted = [
        LM.generate("abc", **settings),
        LM.generate([1, 2, 3], **settings, sampler="beam:2", n=2, ordinal=1),
        LM.generate("abc", max_new_tokens=2, seed=5),
        LM.generate("abc", **settings, processors=["top-p:0.9"], ordinal=3),
        LM.generate("", **settings, ordinal=4),
    ]
    for record, result in zip(found, wanted, strict=True):
        assert record["tokens"] == result.tokens
        assert record["settings"]["ordinal"] == result.ordinal
        assert len(record["alternatives"]) == len(result.alternatives)
    assert found[3]["settings"]["sampler"] == "multinomial:temperature=1.0"
    assert found[1]["own_settings"] == {"sampler": "beam:2", "n": 2}
    assert "5 of 5" not in generate(*FEW, file=file).stderr  # nothing is left to do
    assert run_gptk("repeat", tmp_path / "r.jsonl").stdout.endswith("6 of 6 results are equal\n")


def test_messages_become_prompts_by_the_chat_template(generate, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    file = tmp_path / "chats.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"prompt": "Hello"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    out = generate(*FEW, "--chat", "--chat-template", tmp_path / "t.jinja", file=file)
    assert out.returncode == 0, out.stderr
    found = in_order(tmp_path / "r.jsonl")
    assert [bytes(record["prompt_tokens"]) for record in found] == [b"<Hi><Ho>", b"<Hello>"]
    assert found[1]["messages"] == [{"role": "user", "content": "Hello"}]
    assert run_gptk("repeat", tmp_path / "r.jsonl").returncode == 0
    line = failing_many(generate, "--chat", "--system", "S", file=file)
    assert "line 1: --system is for prompts" in line


def failing_many(generate, *args, code=1, **settings):
    out = generate(*args, **settings)
    assert (out.returncode, out.stdout) == (code, "")
    (line,) = out.stderr.splitlines()
    assert "internal error" not in line
    return line


# --- Lines that are wrong ---------------------------------------------------------------------

WRONG: list = [
    ('{"prompt": "a", "colour": 1}', "there is no field 'colour'; fields: id, messages", 1),
    ('{"id": 1}', "a line has either a prompt or messages", 1),
    ('{"prompt": "a", "messages": []}', "a line has either a prompt or messages", 1),
    ('{"prompt": 5}', "prompt is 5; it must be a text or a list of token ids", 1),
    ('{"prompt": [true]}', "prompt is [True]; it must be", 1),
    ('{"prompt": "a", "id": 1.5}', "id is 1.5; it must be a text or a whole number", 1),
    ('{"prompt": "a", "ordinal": -1}', "ordinal is -1; it must be a whole number, 0 or more", 1),
    ('{"prompt": "a", "settings": 3}', "settings is 3; it must be an object", 1),
    ('{"prompt": "a", "settings": {"n": 0}}', "n is 0; it must be 1 or more", 2),
    (
        '{"prompt": "a", "settings": {"sampler": "bean"}}',
        "no sampler is called 'bean'; did you mean beam?",
        2,
    ),
    ('{"prompt": "a", "settings": {"colour": 1}}', "there is no setting colour", 2),
    (
        '{"prompt": "a", "settings": {"observers": ["trace:x"]}}',
        "a prompt's settings cannot have observers: they",
        2,
    ),
    (
        '{"prompt": "a", "settings": {"ordinal": 1}}',
        "a prompt's settings cannot have ordinal: it",
        2,
    ),
    ('{"prompt": "a", "prompt": "b"}', "the line is not valid JSON", 1),
    ('{"prompt": "a"', "the line is not valid JSON", 1),
    ("[1]", "the line holds no JSON object", 1),
    (b'{"prompt": "\xff"}', "byte 13 is not UTF-8 text", 1),
]


@pytest.mark.parametrize(("line", "words", "code"), WRONG)
def test_a_wrong_line_is_told_with_its_number_before_the_model_is_loaded(
    tmp_path, line, words, code
):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n\n' + (line if isinstance(line, bytes) else line.encode()))
    args = ("generate", "--prompts-file", file, "--model", "no/such/model")
    assert f"p.jsonl, line 3: {words}" in failing(*args, code=code)


def test_a_wrong_line_further_on_becomes_an_error_and_the_others_go_on(
    generate, tmp_path, monkeypatch
):
    monkeypatch.setattr("gptk.cli.many._CHECKED_FIRST", 2)
    monkeypatch.setattr("gptk.records.call._MOST_FAILED", 3)
    file = tmp_path / "p.jsonl"
    wrong = [line if isinstance(line, bytes) else line.encode() for line, _, _ in WRONG]
    good = [b'{"prompt": "a%d"}' % number for number in range(20)]
    lines = [*good[:2], *wrong[:9], good[2], *wrong[9:], *good[3:], b'{"prompt": []}']
    file.write_bytes(b"\n".join(lines))
    out = generate(*FEW, file=file)
    assert out.returncode == 1
    assert out.stderr.startswith(f"{len(lines)} prompts, {len(wrong) + 1} with an error, ")
    found = in_order(tmp_path / "r.jsonl")
    assert len(found) == len(lines)
    for record, line in zip(found, lines, strict=True):
        assert (record["error"] is None) == (line in good), line
        assert ("text" in record) == (line in good)
    told = {record["error"]["message"] for record in found if record["error"]}
    for number, (_, words, _) in enumerate(WRONG, 3):
        assert any(f"line {number + (number > 11)}: {words}" in message for message in told)
    assert found[-1]["error"]["kind"] == "PromptError"
    before = (tmp_path / "r.jsonl").read_bytes()
    assert generate(*FEW, file=file).returncode == 1  # nothing is decoded again
    assert (tmp_path / "r.jsonl").read_bytes() == before
    assert run_gptk("repeat", tmp_path / "r.jsonl").stdout.endswith("20 of 20 results are equal\n")
    printed = run_gptk("generate", "--model", file.parent / "none", "--prompts-file", file)
    assert printed.returncode == 1


def test_a_fault_of_gptk_is_the_error_of_its_prompt_and_the_others_go_on(
    generate, tmp_path, monkeypatch
):
    run = Stream.run

    def run_or_fail(self):
        return run(self) if self.settings.ordinal != 1 else 1 / 0

    monkeypatch.setattr(Stream, "run", run_or_fail)
    assert generate(*FEW).returncode == 1
    found = in_order(tmp_path / "r.jsonl")
    assert [record["error"] is None for record in found] == [True, False, True, True, True]
    assert found[1]["error"]["kind"] == "InternalError"
    assert "line 3: internal error: ZeroDivisionError: div" in found[1]["error"]["message"]


def test_errors_are_told_in_order_where_results_are_printed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("gptk.cli.many._CHECKED_FIRST", 1)
    monkeypatch.setattr("gptk.records.call._MOST_FAILED", 2)
    file = tmp_path / "p.jsonl"
    lines = [json.dumps({"prompt": "a"} if number % 4 == 0 else {}) for number in range(13)]
    file.write_text("\n".join(lines))
    args = ("generate", "--model", model, "--prompts-file", file, *FEW)
    out = run_gptk(*args, "--json")
    assert out.returncode == 1
    printed = [json.loads(line) for line in out.stdout.splitlines()]
    assert [record["index"] for record in printed] == list(range(13))
    out = run_gptk(*args)
    assert out.stdout.count("--- 'a' [1]") == 4
    assert len(out.stderr.splitlines()) == 9 + 1
    assert f"gptk: {file}, line 2: a line has either" in out.stderr


def test_the_closing_line_counts_prompts_and_tokens(generate, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("abc\n")
    closing = generate("--max-new-tokens", 1, file=file).stderr.splitlines()[-1]
    assert closing.startswith("1 prompt, 1 new token, ")
    again = generate("--max-new-tokens", 1, file=file).stderr.splitlines()
    assert again[0].endswith("has 1 result; going on")


def test_a_prompt_too_long_is_its_error(generate, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("x" * 200 + "\nabc\n")
    assert generate(*FEW, file=file).returncode == 1
    long, short = in_order(tmp_path / "r.jsonl")
    assert "line 1: the prompt has 200 tokens" in long["error"]["message"]
    assert len(short["tokens"]) == 4


# --- Going on ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_ends_the_command_elsewhere_has_its_code(generate, monkeypatch, number, code):
    def decode(*args):
        with Interrupts(at_once=True):
            os.kill(os.getpid(), number)

    monkeypatch.setattr("gptk.cli.many.decode", decode)
    assert generate(*FEW).returncode == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_same_command_goes_on_where_it_was_stopped(
    generate, tmp_path, monkeypatch, number, code
):
    args = (*FEW, "--sampler", "multinomial")  # without a seed: it is kept in the file
    write = ResultsFile.write

    def write_and_stop(self, record):
        write(self, record)
        if self.done % 2 == 0:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ResultsFile, "write", write_and_stop)
    for done in (2, 4):
        out = generate(*args)
        assert out.returncode == code
        last = out.stderr.splitlines()[-1]
        assert (
            last == f"stopped: {done} of 5 prompts are done; the same command goes on with the rest"
        )
        assert len(records(tmp_path / "r.jsonl")) == done
    out = generate(*args)
    assert out.returncode == 0
    found = in_order(tmp_path / "r.jsonl")
    assert len({record["seed"] for record in found}) == 1
    for record in found:
        alone = LM.generate(
            record["prompt"], ordinal=record["index"], sampler="multinomial",
            seed=record["seed"], max_new_tokens=4,
        )  # fmt: skip
        assert record["text"] == alone.text


@pytest.mark.parametrize("kept", [0, 1, 30, 500, -1])
def test_an_incomplete_last_line_is_cut_off(generate, tmp_path, kept):
    path = tmp_path / "r.jsonl"
    assert generate(*SAMPLED).returncode == 0
    whole = in_order(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for before in (lines[:2], []):
        path.write_bytes(b"".join(before) + lines[2][:kept])
        assert generate(*SAMPLED).returncode == 0
        assert in_order(path) == comparable(whole)


def test_results_that_were_taken_out_are_made_again(generate, tmp_path):
    path = tmp_path / "r.jsonl"
    generate(*SAMPLED)
    whole, lines = in_order(path), path.read_text().splitlines(keepends=True)
    path.write_text(lines[4] + lines[1])
    generate(*SAMPLED)
    assert in_order(path) == comparable(whole)
    assert path.read_text().startswith(lines[4] + lines[1])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((*FEW, "--sampler", "multinomial", "--seed", 6), "seed was 5 and is 6"),
        (("--max-new-tokens", 9, *SAMPLED[2:]), "max_new_tokens was 4 and is 9"),
        ((*SAMPLED, "--stop", "x"), "stop was [] and is ['x']"),
        ((*FEW, "--seed", 5), "sampler was 'multinomial:temperature=1.0' and is 'greedy'"),
        ((*SAMPLED, "--processor", "top-k:3"), "processors was [] and is ['top-k:k=3']"),
        ((*SAMPLED, "--chat", "--chat-template", "t"), "other --chat, --system or --chat-templ"),
        ((*SAMPLED, "--dtype", "bfloat16"), "another model (model.dtype: bfloat16, was float32)"),
        ((*SAMPLED, "--quantize", "int8"), "another model (model.quantize: int8, was auto)"),
    ],
)
def test_results_of_other_settings_are_refused(generate, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("{{ messages[0].content }}")
    generate(*SAMPLED)
    before = (tmp_path / "r.jsonl").read_bytes()
    assert words in failing_many(generate, *args)
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_results_of_another_model_or_file_are_refused(generate, prompts, tmp_path):
    generate(*SAMPLED)
    before = (tmp_path / "r.jsonl").read_bytes()
    tiny_lm(seed=1).save(tmp_path / "other")
    out = run_gptk(
        "generate", "--model", tmp_path / "other", "--prompts-file", prompts,
        "--out", tmp_path / "r.jsonl", *SAMPLED,
    )  # fmt: skip
    assert (out.returncode, "another model (model.safetensors: SHA-256" in out.stderr) == (1, True)
    prompts.write_text("one\n")
    line = failing_many(generate, *SAMPLED)
    assert "has results for another prompts file (SHA-256 " in line
    assert (tmp_path / "r.jsonl").read_bytes() == before


@pytest.mark.parametrize("given", ["for all", "for a line"])
def test_results_with_another_file_of_a_plugin_are_refused(generate, tmp_path, monkeypatch, given):
    """Before the model is loaded, as the file is read already."""
    schema, file = tmp_path / "schema.json", tmp_path / "p.jsonl"
    schema.write_text('{"type": "boolean"}')
    spec = f"json-schema:{schema}"
    own = {} if given == "for all" else {"settings": {"processors": [spec]}}
    file.write_text(json.dumps({"prompt": "a", **own}) + '\n{"prompt": "b"}\n')
    args = ("--processor", spec) if given == "for all" else ()
    assert generate(*args, *FEW, file=file).returncode == 0
    first, second = in_order(tmp_path / "r.jsonl")
    assert [f["name"] for f in first["files"]] == ["schema.json"]
    assert [f["name"] for f in second["files"]] == (["schema.json"] if given == "for all" else [])
    before = (tmp_path / "r.jsonl").read_bytes()
    assert generate(*args, *FEW, file=file).returncode == 0
    schema.write_text('{"type": "null"}')
    monkeypatch.setattr("gptk.cli.generate._load", pytest.fail)
    line = failing_many(generate, *args, *FEW, file=file)
    assert "r.jsonl has results with other files (schema.json of processor json-schema: " in line
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_results_with_a_file_that_is_read_late_are_refused_when_it_is_read(generate, tmp_path):
    """A draft is loaded when the first prompt is decoded."""
    tiny_lm(seed=1).save(tmp_path / "draft")
    args = (*FEW, "--draft", f"model:{tmp_path / 'draft'}")
    assert generate(*args).returncode == 0
    path = tmp_path / "r.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    names = {file.name for file in (tmp_path / "draft").iterdir()}
    for line in lines:
        assert {file["name"] for file in json.loads(line)["files"]} == names
    tiny_lm(seed=2).save(tmp_path / "draft")
    path.write_text("".join(lines[:2]))
    out = generate(*args)
    assert out.returncode == 1
    note, line = out.stderr.splitlines()
    assert note.endswith("r.jsonl has 2 results; going on")
    assert "results with other files (model.safetensors of drafter model: SHA-256 " in line
    assert path.read_text() == "".join(lines[:2])


def test_each_record_has_the_files_of_the_plugins_that_made_it(generate, tmp_path, monkeypatch):
    """Also where more prompts are under way than plug-ins are remembered."""
    monkeypatch.setattr("gptk.records.call._REMEMBERED", 1)
    lines, hashes = [], []
    for number in range(4):
        schema = tmp_path / f"{number}.json"
        schema.write_text(json.dumps({"const": number}))
        hashes.append(hashlib.sha256(schema.read_bytes()).hexdigest())
        lines.append({"prompt": "a", "settings": {"processors": [f"json-schema:{schema}"]}})
    lines.append({"prompt": "x" * 200})
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert generate(*FEW, file=file).returncode == 1
    *found, failed = in_order(tmp_path / "r.jsonl")
    assert [[f["sha256"] for f in record["files"]] for record in found] == [[h] for h in hashes]
    assert failed["files"] == []
    (tmp_path / "2.json").write_text('{"const": 7}')
    out = run_gptk("repeat", tmp_path / "r.jsonl")
    told = [line for line in out.stdout.splitlines() if line.startswith("environment: ")]
    assert len(told) == 1
    assert told[0].startswith("environment: 2.json of processor json-schema: SHA-256 ")
    assert out.stdout.endswith("3 of 4 results are equal\n")


def test_a_plugin_that_does_not_say_what_it_has_read_is_the_error_of_its_prompt(
    generate, tmp_path, monkeypatch
):
    monkeypatch.setattr(provided("processor")["top-k"].item, "files_read", lambda self: 1 / 0)
    file = tmp_path / "p.jsonl"
    lines = [{"prompt": "a", "settings": {"processors": ["top-k:3"], "seed": 1}}, {"prompt": "b"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert generate(*FEW, file=file).returncode == 1
    first, second = in_order(tmp_path / "r.jsonl")
    assert first["error"]["message"].startswith("processor top-k of gptk-decoding ")
    assert first["files"] == []
    assert second["error"] is None
    before = (tmp_path / "r.jsonl").read_bytes()
    assert generate(*FEW, file=file).returncode == 1  # nothing is left to do
    assert (tmp_path / "r.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"my diary\nwas here\n", "something else than results"),
        (b"my diary", "something else than results"),
        (b'{"record": "generation", "version": 1, x}\n', "a damaged line 1"),
        (b'{"record": "generation", "version": 1}\n', "a line 1 without a model"),
        (b'{"record": "generation", "version": 1, "model": {}}\n', "another prompts file"),
    ],
)
def test_a_file_of_something_else_is_not_touched(generate, tmp_path, content, words):
    (tmp_path / "r.jsonl").write_bytes(content)
    assert words in failing_many(generate, *FEW)
    assert (tmp_path / "r.jsonl").read_bytes() == content


def test_one_process_at_a_time_writes(generate, tmp_path):
    with ResultsFile(tmp_path / "r.jsonl"):
        assert "is in use" in failing_many(generate, *FEW)
    assert generate(*FEW).returncode == 0


def test_a_disk_that_is_full_is_told(generate, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptk.records.results_file.os.write", full)
    line = failing_many(generate, *FEW)
    assert line == f"gptk: {tmp_path / 'r.jsonl'}: No space left on device"


# --- Options ----------------------------------------------------------------------------------


def test_what_does_not_go_together_is_told(model, prompts, tmp_path):
    many = ("generate", "--model", model, "--prompts-file", prompts)
    assert "works with --prompts-file" in failing("generate", "x", "--out", "r.jsonl", code=2)
    assert "leave --json out" in failing(*many, "--out", "r.jsonl", "--json", code=2)
    assert "a single PROMPT" in failing(*many, "--trace", "t.jsonl", code=2)
    assert "not both" in failing(*many, "abc", code=2)
    assert "the same file" in failing(*many, "--out", prompts, code=2)
    assert "r.jsonl cannot be written" in failing(*many, "--out", tmp_path / "no/r.jsonl", code=1)
    assert "is a directory" in failing(*many, "--out", tmp_path, code=2)
    assert "has no prompts" in failing("generate", "--prompts-file", "/dev/null", code=1)
    reader, writer = os.pipe()
    os.write(writer, b"one\n")
    pipe = ("generate", "--prompts-file", f"/dev/fd/{reader}", "--out", tmp_path / "r")
    assert "--out reads the prompts again" in failing(*pipe, code=2)
    os.close(reader)
    os.close(writer)


def test_progress_is_told(generate, monkeypatch):
    monkeypatch.setattr("gptk.cli.progress._PLAIN_EVERY", 0)
    first, *_, before_last, last = generate(*FEW).stderr.splitlines()
    assert first.startswith("1 of 5 prompts, ")
    assert first.endswith(" left")
    assert before_last.startswith("5 of 5 prompts, ")
    assert before_last.endswith("tokens/s, 0:00 left")
    assert last.startswith("5 prompts, 20 new tokens, ")


# --- Several processes ------------------------------------------------------------------------


def as_rank(rank, count):
    return {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}


def test_each_process_of_torchrun_takes_its_share(generate, tmp_path):
    """And a prompt gets the same whatever its share is."""
    assert generate(*SAMPLED, out=tmp_path / "all.jsonl").returncode == 0
    shared = []
    for rank in (0, 1):
        out = generate(*SAMPLED, env=as_rank(rank, 2))
        assert out.returncode == 0, out.stderr
        mine = records(tmp_path / f"r.{rank}-of-2.jsonl")
        assert {record["index"] % 2 for record in mine} == {rank}
        shared += mine
    assert not (tmp_path / "r.jsonl").exists()
    key = lambda record: record["index"]  # noqa: E731
    assert sorted(shared, key=key) == comparable(in_order(tmp_path / "all.jsonl"))


@pytest.mark.parametrize(
    "args",
    [
        ("compare", "abc", "--sampler", "greedy"),
        ("compare", "abc", "--sampler", "greedy", "--out", "out.jsonl"),
        ("eval", "--data", "text.txt"),
        ("repeat", "out.jsonl"),
        ("generate", "abc"),
    ],
    ids=["compare", "compare-out", "eval", "repeat", "generate"],
)
def test_commands_that_share_no_work_refuse_several_processes(args):
    for rank in (0, 1):
        line = failing(*args, env=as_rank(rank, 2), code=2)
        assert f"gptk {args[0]}" in line
        assert "does not share its work" in line
        assert "2 processes; run it without torchrun" in line


def test_processes_share_a_seed(generate):
    line = failing_many(generate, "--sampler", "multinomial", env=as_rank(0, 2), code=2)
    assert "give --seed" in line
    assert "RANK='2', WORLD_SIZE='2'" in failing_many(generate, env=as_rank(2, 2), code=2)
    assert "RANK='x'" in failing_many(generate, env=as_rank("x", 2), code=2)


# --- Reading prompts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"one\r\ntwo\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\n\n \n two", ["one", " two"]),
        (b"\xef\xbb\xbf\nx", ["x"]),
        (b'{"prompt": 1\n{"prompt": "a"}\n', ['{"prompt": 1', '{"prompt": "a"}']),
        (b'"text"\n', ['"text"']),
        (b"\n\xef\xbb\xbf", ["\ufeff"]),
    ],
)
def test_lines_are_prompts(tmp_path, content, texts):
    (tmp_path / "p").write_bytes(content)
    with PromptsFile(str(tmp_path / "p")) as file:
        for _ in range(2):
            assert [given.prompt for given in file.prompts()] == texts
        assert [given.index for given in file.prompts()] == list(range(len(texts)))
        assert file.count == len(texts)


def test_a_name_or_the_first_line_says_that_lines_are_json(tmp_path):
    for name, content in (("p.jsonl", 'x\n{"prompt": "a"}'), ("p", '{"prompt": "b"}\nx')):
        (tmp_path / name).write_text(content)
        with PromptsFile(str(tmp_path / name)) as file:
            kinds = [given.error is None for given in file.prompts()]
        assert kinds == ([False, True] if name == "p.jsonl" else [True, False])


def test_lines_longer_than_any_prompt_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gptk.records.prompts_file._MAX_LINE", 10)
    (tmp_path / "p").write_text("short\n" + "x" * 35 + "\nshort too\n" + "y" * 10 + "\n")
    with PromptsFile(str(tmp_path / "p")) as file:
        found = list(file.prompts())
    assert [given.prompt for given in found] == ["short", None, "short too", "y" * 10]
    assert "more than 10 bytes" in str(found[1].error)


def test_a_pipe_is_read_as_its_lines_come(tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b"one\n")
    with PromptsFile(f"/dev/fd/{reader}") as file:
        prompts = file.prompts()
        assert [given.prompt for given in file.first(100)] == ["one"]
        assert next(prompts).prompt == "one"
        os.write(writer, b"two\n")
        assert next(prompts).prompt == "two"
        os.close(writer)
        assert next(prompts, None) is None
    os.close(reader)


def test_a_file_that_changes_while_it_is_read_is_told(prompts):
    with PromptsFile(str(prompts)) as file:
        read = file.prompts()
        next(read)
        with prompts.open("a") as more:
            more.write("six\n")
        with pytest.raises(gptk.DataError, match="has changed while it was read"):
            list(read)
