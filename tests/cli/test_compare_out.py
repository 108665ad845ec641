"""`gptk compare --out`: results in a file that a stopped comparison is gone on with."""

import csv
import json
import os
import signal
from dataclasses import replace

import pytest
from test_many import comparable

import gptk
from gptk.measure.comparison import check_metrics, compare
from gptk.measure.strategies import check_samplers
from gptk.records.comparing import ComparisonRuns
from gptk.records.prompts_file import PromptsFile
from gptk.records.results_file import ResultsFile
from gptk.testing import tiny_lm
from program import failing
from program import gptk as run_gptk

LM = tiny_lm()
SAMPLERS = ("top-k:5 + min-p:0.01", "beam:2")
PROMPTS = ["one", "two words", "three"]
RUNS = 3 * 2 + 3  # beams draw nothing: one seed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    LM.save(path)
    return path


@pytest.fixture
def by_file(model, tmp_path):
    """`by_file(*args)`: compare two samplers on three prompts, with the results in r.jsonl."""
    (tmp_path / "prompts.txt").write_text("one\n\ntwo words\nthree\n")

    def run(*args, samplers=SAMPLERS, **options):
        named = [word for sampler in samplers for word in ("--sampler", sampler)]
        options = {
            "model": model, "prompts-file": tmp_path / "prompts.txt", "n": 2, "seeds": 2,
            "max-new-tokens": 4, "out": tmp_path / "r.jsonl", **options,
        }  # fmt: skip
        for name, value in options.items():
            named += [] if value is None else [f"--{name}", value]
        return run_gptk("compare", *named, *args)

    return run


def lines_of(path):
    content = path.read_bytes()
    assert content.endswith(b"\n")
    return content.splitlines(keepends=True)


def untimed(value):
    """A record without what depends on time, its log-probabilities to 1e-4."""
    if isinstance(value, dict):
        left_out = ("seconds", "tokens_per_second")
        return {name: untimed(part) for name, part in value.items() if name not in left_out}
    if isinstance(value, list):
        return [untimed(part) for part in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


def in_order(path):
    records = [json.loads(line) for line in lines_of(path)]
    found = sorted(records, key=lambda record: record["index"])
    assert [record["index"] for record in found] == list(range(len(found)))
    return found


# --- Results ----------------------------------------------------------------------------------


def test_the_comparison_is_that_without_a_file(by_file, tmp_path):
    out = by_file("--json", "--csv", tmp_path / "with.csv")
    assert out.returncode == 0, out.stderr
    made = json.loads(out.stdout)
    straight = by_file("--json", "--csv", tmp_path / "without.csv", out=None)
    assert untimed(made) == untimed(json.loads(straight.stdout))
    assert [s["tokens_per_second"] > 0 for s in made["samplers"]] == [True, True]
    tables = [[*csv.reader((tmp_path / f"{n}.csv").open())] for n in ("with", "without")]
    assert len(tables[0]) == 1 + RUNS
    for row, other in zip(*tables, strict=True):
        assert row[:7] == other[:7]
        assert [numbers(cell) for cell in row[7:]] == [numbers(cell) for cell in other[7:]]


def numbers(cell):
    try:
        return pytest.approx(float(cell), abs=1e-4)
    except ValueError:
        return cell


def test_each_record_is_of_a_prompt_a_sampler_and_a_seed_and_repeats_it(by_file, tmp_path):
    assert by_file().returncode == 0
    found = in_order(tmp_path / "r.jsonl")
    runs = [(SAMPLERS[0], seed, prompt) for seed in (0, 1) for prompt in range(3)]
    runs += [(SAMPLERS[1], 0, prompt) for prompt in range(3)]
    assert len(found) == len(runs) == RUNS
    for record, (sampler, seed, prompt) in zip(found, runs, strict=True):
        about = record["comparison"]
        assert (about["sampler"], about["prompt"]) == (sampler, prompt)
        assert about["seconds"] > 0
        name, *processors = sampler.split(" + ")
        alone = LM.generate(
            PROMPTS[prompt], sampler=name, processors=processors, n=2, seed=seed, ordinal=prompt,
            max_new_tokens=4,
        ).to_dict()  # fmt: skip
        assert {name: record[name] for name in alone} == comparable(alone)
    again = run_gptk("repeat", tmp_path / "r.jsonl").stdout.splitlines()
    assert again[-1] == f"{2 * RUNS} of {2 * RUNS} results are equal"
    assert "top-k:5 + min-p:0.01, prompt 2, seed 1, result 2: equal" in "".join(again)


def test_lines_in_json_have_ids_messages_and_settings(by_file, tmp_path):
    """With a file of results and without."""
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer = replace(LM.tokenizer, chat_template=template)
    gptk.LanguageModel(LM.model, tokenizer).save(tmp_path / "chat")
    lines = [
        {"prompt": "abc", "id": "first", "settings": {"max_new_tokens": 2, "top_logprobs": 2}},
        {"prompt": [1, 2, 3], "id": 7, "ordinal": 5},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": "x", "settings": {"processors": ["top-k:3"], "stop": "zz"}},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    options = {"model": tmp_path / "chat", "prompts-file": file}
    with_file = by_file("--json", "--csv", tmp_path / "t.csv", **options)
    assert with_file.returncode == 0, with_file.stderr
    made = json.loads(with_file.stdout)
    without = by_file("--json", **options, out=None)
    assert untimed(made) == untimed(json.loads(without.stdout))
    beams = made["samplers"][1]["measured"]
    assert [(each["prompt"], each["seed"]) for each in beams] == [
        (prompt, seed) for seed in (0, 1) for prompt in range(4)  # a processor may draw
    ]  # fmt: skip
    wanted = [
        ("abc", {"max_new_tokens": 2, "top_logprobs": 2}),
        ([1, 2, 3], {"ordinal": 5}),
        ("<Hi>", {}),
        ("x", {"processors": ["top-k:3"], "stop": "zz"}),
    ]
    for each in beams:
        prompt, own = wanted[each["prompt"]]
        settings = {"max_new_tokens": 4, "ordinal": each["prompt"], **own}
        best = LM.generate(prompt, sampler="beam:2", n=2, seed=each["seed"], **settings)
        alone = [gptk.Generation.to_dict(r) for r in (best, *best.alternatives)]
        alone[0]["alternatives"] = []
        assert each["generations"] == untimed(alone)
    top_k = made["samplers"][0]["measured"][3]["generations"][0]
    processors = ["top-k:3", "min-p:0.01"]  # the prompt's, then the sampler's
    settings = {"processors": processors, "n": 2, "max_new_tokens": 4, "stop": "zz", "ordinal": 3}
    assert top_k["tokens"] == LM.generate("x", sampler="top-k:5", seed=0, **settings).tokens
    rows = [*csv.DictReader((tmp_path / "t.csv").open())]
    assert [(row["index"], row["id"]) for row in rows[:4]] == [
        ("0", "first"), ("1", "7"), ("2", ""), ("3", ""),
    ]  # fmt: skip
    assert rows[2]["prompt"] == '[{"role": "user", "content": "Hi"}]'
    for output in (with_file.stdout, (tmp_path / "r.jsonl").read_text()):
        (tmp_path / "again.jsonl").write_text(output)
        repeated = run_gptk("repeat", tmp_path / "again.jsonl")
        assert repeated.returncode == 0, repeated.stdout


@pytest.mark.parametrize(
    ("line", "words", "code"),
    [
        ({"prompt": "a", "settings": {"sampler": "greedy"}}, "cannot have sampler: samplers", 2),
        ({"prompt": "a", "settings": {"n": 2}}, "cannot have n: it is the same", 2),
        ({"prompt": "a", "settings": {"seed": 2}}, "cannot have seed: seeds are", 2),
        ({"prompt": "a", "settings": {"overflow": "slide"}}, "cannot have overflow: a text", 2),
        ({"prompt": "a", "settings": {"observers": ["trace:x"]}}, "cannot have observers", 2),
        ({"prompt": "a", "settings": {"colour": 2}}, "there is no setting colour", 2),
        ({"prompt": "a", "settings": {"processors": ["top-n"]}}, "no processor is called", 2),
        ({"id": 3}, "a line has either a prompt or messages", 1),
    ],
)
@pytest.mark.parametrize("out", [(), ("--out", "r.jsonl")])
def test_a_wrong_line_is_told_before_the_model_is_loaded(
    tmp_path, monkeypatch, line, words, code, out
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n' + json.dumps(line))
    args = ("compare", "--prompts-file", file, "--model", "no/such/model", "--sampler", "top-p")
    told = failing(*args, *out, code=code)
    assert "p.jsonl, line 2: " in told
    assert words in told
    assert not (tmp_path / "r.jsonl").exists()


def test_a_prompt_that_fails_is_left_out_of_all_figures(by_file, tmp_path):
    """And the others are compared as if it were not there, except for the places of prompts."""
    file = tmp_path / "p.txt"
    file.write_text(f"one\n{'x' * 200}\nthree\n")
    out = by_file("--json", "--csv", tmp_path / "t.csv", **{"prompts-file": file})
    assert out.returncode == 1
    last = out.stderr.splitlines()[-2]
    assert last.startswith("gptk: 1 of 3 prompts are left out, as they have failed; the first: ")
    assert "p.txt, line 2 with top-k:5 + min-p:0.01: the prompt has 200 tokens" in last
    made = json.loads(out.stdout)
    assert [(prompt["prompt"], prompt["index"]) for prompt in made["prompts"]] == [
        ("one", 0), ("three", 2),
    ]  # fmt: skip
    requests = [gptk.Request("one"), gptk.Request("three", ordinal=2)]
    straight = compare(LM, requests, SAMPLERS, n=2, max_new_tokens=4, seeds=2)
    for each, wanted in zip(made["samplers"], straight, strict=True):
        assert each["metrics"] == pytest.approx(wanted.metrics, abs=1e-4)
        assert untimed(each["measured"]) == untimed(wanted.to_dict()["measured"])
    rows = [*csv.DictReader((tmp_path / "t.csv").open())]
    assert {row["index"] for row in rows} == {"0", "2"}
    (tmp_path / "made.json").write_text(out.stdout)
    assert run_gptk("repeat", tmp_path / "made.json").returncode == 0
    before = (tmp_path / "r.jsonl").read_bytes()
    again = by_file("--json", **{"prompts-file": file})
    assert (again.returncode, again.stdout) == (1, out.stdout)
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_where_all_prompts_fail_nothing_is_compared(by_file, tmp_path):
    (tmp_path / "p.txt").write_text("x" * 200)
    out = by_file(**{"prompts-file": tmp_path / "p.txt"})
    assert (out.returncode, out.stdout) == (1, "")
    assert "nothing can be compared: " in out.stderr
    assert "line 1 with top-k:5 + min-p:0.01: the prompt has 200 tokens" in out.stderr


# --- Going on ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_same_command_goes_on_where_it_was_stopped(
    by_file, tmp_path, monkeypatch, number, code
):
    straight = by_file("--json")
    os.rename(tmp_path / "r.jsonl", tmp_path / "straight.jsonl")
    write = ResultsFile.write

    def write_and_stop(self, record):
        write(self, record)
        if self.done % 4 == 0:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(ResultsFile, "write", write_and_stop)
        for done in (4, 8):
            out = by_file("--json")
            assert (out.returncode, out.stdout) == (code, "")
            assert out.stderr.splitlines()[-1] == (
                f"stopped: {done} of {RUNS} runs are done; the same command goes on with the rest"
            )
            assert len(lines_of(tmp_path / "r.jsonl")) == done
    out = by_file("--json")
    assert out.returncode == 0
    assert out.stderr.splitlines()[0].endswith("r.jsonl has 8 results; going on")
    assert untimed(json.loads(out.stdout)) == untimed(json.loads(straight.stdout))
    assert untimed(in_order(tmp_path / "r.jsonl")) == untimed(in_order(tmp_path / "straight.jsonl"))
    before = (tmp_path / "r.jsonl").read_bytes()
    again = by_file("--json")  # nothing is left to do, and the speed is that of the file
    assert again.stdout == out.stdout
    assert (tmp_path / "r.jsonl").read_bytes() == before


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_a_file_cut_at_any_byte_is_gone_on_with_its_whole_lines(
    by_file, tmp_path, monkeypatch, step
):
    """The program then sees the same as if it had been cut at the end of a line."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and of no use here
    assert by_file().returncode == 0
    path, cut = tmp_path / "r.jsonl", tmp_path / "cut.jsonl"
    content = b"".join(lines_of(path)[:3])
    with PromptsFile(str(tmp_path / "prompts.txt")) as prompts:
        runs = ComparisonRuns(
            list(prompts.prompts()), check_samplers(SAMPLERS, 2), metrics=check_metrics([]),
            processors=[], n=2, max_new_tokens=4, seed=0, seeds=2, sha256=prompts.sha256,
        )  # fmt: skip
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    near = {size for end in ends for size in (end - 1, end, end + 1)}
    for size in sorted({*range(0, len(content), step), *near} - {len(content) + 1}):
        whole = [end for end in ends if end <= size]
        cut.write_bytes(content[:size])
        with ResultsFile(cut) as results:
            results.read(len(runs), runs.difference)
            assert results.done == len(whole)
        assert cut.read_bytes() == content[: max(whole, default=0)]


@pytest.mark.parametrize("lines", [0, 1, 4, 6, RUNS - 1])
@pytest.mark.parametrize("rest", [0, 1, 600, -1])
def test_a_cut_file_ends_as_it_was(by_file, tmp_path, lines, rest):
    whole = by_file("--csv", tmp_path / "whole.csv")
    path = tmp_path / "r.jsonl"
    records, content = in_order(path), lines_of(path)
    path.write_bytes(b"".join(content[:lines]) + content[lines][:rest])
    again = by_file("--csv", tmp_path / "again.csv")
    assert (whole.returncode, again.returncode) == (0, 0)
    assert untimed(in_order(path)) == untimed(records)
    assert lines_of(path)[:lines] == content[:lines]
    assert without_speed(again.stdout) == without_speed(whole.stdout)
    rows = [[*csv.reader((tmp_path / f"{n}.csv").open())] for n in ("whole", "again")]
    for row, other in zip(*rows, strict=True):
        assert [numbers(cell) for cell in row] == [numbers(cell) for cell in other]


def without_speed(table):
    head, *rows = table.splitlines()
    column = head.split().index("tokens/s") - len(head.split())
    assert column == -2
    return [head, *(" ".join(w for w in row.split() if w.count(".") != 1) for row in rows)]


def test_one_process_at_a_time_writes(by_file, tmp_path):
    with ResultsFile(tmp_path / "r.jsonl"):
        out = by_file()
    assert (out.returncode, out.stdout) == (1, "")
    assert "r.jsonl is in use: another process writes results to it" in out.stderr


# --- Files of something else ------------------------------------------------------------------

BEAM = "beam:width={},length_penalty=1.0,early_stopping=false"
OTHERS = {
    "seed": ((), {"seed": 4}, "seed was 0 and is 4"),
    "seeds": ((), {"seeds": 3}, "seeds was 2 and is 3"),
    "order": (
        (), {"samplers": SAMPLERS[::-1]},
        "samplers: number 1 was 'top-k:temperature=1.0,k=5 + min-p:p=0.01' and is 'beam:width=2",
    ),
    "sampler": (
        (), {"samplers": (SAMPLERS[0], "beam:3")},
        f"samplers: number 2 was '{BEAM.format(2)}' and is '{BEAM.format(3)}'",
    ),
    "more samplers": (("--sampler", "greedy"), {}, "samplers: number 3 was none and is 'greedy'"),
    "processor": (("--processor", "top-k:5"), {}, "processors: number 1 was none and is 'top-k:"),
    "metric": (("--metric", "distinct:3"), {}, "metrics: number 6 was none and is 'distinct:n=3'"),
    "n": ((), {"n": 1}, "n was 2 and is 1"),
    "length": ((), {"max-new-tokens": 5}, "max_new_tokens was 4 and is 5"),
    "dtype": (("--dtype", "bfloat16"), {}, "another model (model.dtype: bfloat16, was float32)"),
    "prompt": (("abc",), {"prompts-file": None}, "for another prompts file (SHA-256 "),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_results_of_another_comparison_are_refused_and_not_changed(by_file, tmp_path, name):
    args, options, words = OTHERS[name]
    assert by_file().returncode == 0
    before = (tmp_path / "r.jsonl").read_bytes()
    out = by_file(*args, **options)
    assert (out.returncode, out.stdout) == (1, "")
    (line,) = out.stderr.splitlines()
    assert words in line, line
    assert line.endswith("; name another file, or remove it")
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_results_of_other_prompts_are_refused(by_file, model, tmp_path):
    assert by_file().returncode == 0
    (tmp_path / "prompts.txt").write_text("one\ntwo words\nthree")
    out = by_file()
    assert "r.jsonl has results for another prompts file (SHA-256 " in out.stderr
    args = ("--model", model, "--sampler", "greedy", "--out", tmp_path / "p.jsonl")
    assert run_gptk("compare", "abc", *args).returncode == 0
    words = "p.jsonl has results of another comparison: prompt was 'abc' and is 'abd'; name another"
    assert words in failing("compare", "abd", *args, code=1)
    assert run_gptk("compare", "abc", *args).returncode == 0


def test_results_of_generate_and_of_compare_are_told_apart(by_file, model, tmp_path):
    generate = (
        "generate", "--model", model, "--prompts-file", tmp_path / "prompts.txt",
        "--out", tmp_path / "r.jsonl",
    )  # fmt: skip
    assert by_file().returncode == 0
    assert "r.jsonl has results of gptk compare; name another" in failing(*generate, code=1)
    (tmp_path / "r.jsonl").unlink()
    assert run_gptk(*generate).returncode == 0
    out = by_file()
    assert out.returncode == 1
    assert "r.jsonl has results of gptk generate; name another" in out.stderr


def test_results_with_another_file_of_a_processor_are_refused(by_file, tmp_path):
    """Two samplers may each have a processor of the same kind with a file of its own."""
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "s.json").write_text(json.dumps({"const": value}))
    samplers = [f"greedy + json-schema:{tmp_path / name / 's.json'}" for name in ("a", "b")]
    out = by_file("--json", samplers=samplers)
    assert out.returncode == 0, out.stderr
    assert len(json.loads(out.stdout)["files"]) == 2
    (tmp_path / "out.json").write_text(out.stdout)
    assert "environment" not in run_gptk("repeat", tmp_path / "out.json").stdout
    assert by_file(samplers=samplers).returncode == 0
    (tmp_path / "b" / "s.json").write_text('{"const": 3}')
    out = by_file(samplers=samplers)
    assert out.returncode == 1
    assert "r.jsonl has results with other files (s.json of processor json-schema: " in out.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(tokens=[2**31]), "line 2 has a token that is not in the model's vocab"),
        (lambda r: r["prompt_tokens"].append(-1), "line 2 has a token that is not in the model's"),
        (lambda r: r.update(tokens=[1] * 200), "line 2 has 200 tokens after "),
        (lambda r: r.update(prompt_tokens=[]), "line 2 has 4 tokens after 0 of a prompt"),
        (lambda r: r["comparison"].update(seconds=-1), "line 2: comparison.seconds"),
        (lambda r: r.pop("text"), "line 2 has no text"),
        (lambda r: r.update(index=-1), "has a result of a prompt -1 of 9"),
        (lambda r: r["own_settings"].update(seed=7), "settings"),
    ],
)
def test_a_damaged_record_is_one_line(by_file, tmp_path, change, words):
    """Token ids beyond the vocabulary were found by fuzzing: the model cannot score them."""
    assert by_file().returncode == 0
    path = tmp_path / "r.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    record = json.loads(lines[1])
    change(record)
    path.write_text("".join([lines[0], json.dumps(record) + "\n", *lines[2:]]))
    out = by_file()
    assert (out.returncode, out.stdout) == (1, "")
    assert words in out.stderr.splitlines()[-1]
    assert "internal error" not in out.stderr


def test_what_does_not_go_together_is_told(by_file, model, tmp_path):
    table = tmp_path / "t.csv"
    out = by_file("--csv", tmp_path / "r.jsonl")
    assert (out.returncode, out.stderr.splitlines()[-1]) == (
        2, "gptk: --out and --csv are the same file",
    )  # fmt: skip
    args = ("compare", "--model", model, "--sampler", "greedy")
    same = ("--prompts-file", tmp_path / "prompts.txt", "--out", tmp_path / "prompts.txt")
    assert "the same file" in failing(*args, *same, code=2)
    no = ("x", "--out", tmp_path / "no" / "r.jsonl")
    assert "r.jsonl cannot be written" in failing(*args, *no, code=1)
    assert "is a directory" in failing(*args, "x", "--out", tmp_path, code=2)
    reader, writer = os.pipe()
    os.write(writer, b"one\n")
    pipe = ("--prompts-file", f"/dev/fd/{reader}", "--out", tmp_path / "r")
    os.close(writer)
    assert "--out reads the prompts again" in failing(*args, *pipe, code=2)
    os.close(reader)
    assert not table.exists()


def test_progress_is_told_in_runs(by_file, monkeypatch):
    monkeypatch.setattr("gptk.cli.progress._PLAIN_EVERY", 0)
    first, *_, last = by_file().stderr.splitlines()
    assert first.startswith(f"1 of {RUNS} runs, ")
    assert first.endswith(" left")
    assert last.startswith(f"{RUNS} runs, ")
