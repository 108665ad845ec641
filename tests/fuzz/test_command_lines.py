"""Command lines, settings in Python, and records: each is refused in one line, or runs."""

import atexit
import contextlib
import functools
import json
import os
import random
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from attacking import mutated_json, mutated_text

# A toy model in a folder of its own: the current folder is emptied before each input.
FOLDER = Path(tempfile.gettempdir(), f"gptk-fuzz-{os.getpid()}")
MODEL = FOLDER / "model"

SPECS = {
    "sampler": [
        *("greedy", "multinomial", "top-p:p=0.9", "top-k:k=5", "beam:width=3", "mirostat"),
        *("diverse-beam:width=4,beam_groups=2", "stochastic-beam:width=3", "typical", "min-p"),
        *('best-of-n:n=3,sampler="top-p:p=0.5"', "contrastive:k=3,alpha=0.5", "beam-sample"),
        *("dola:layers=high", "beam:width=2,early_stopping=never,length_penalty=-1"),
    ],
    "processor": [
        *("temperature:temperature=0.7", "repetition-penalty:penalty=1.2", "min-p:p=0.1"),
        *("bad-words:words='[\"ab\"]'", "cfg:scale=1.5,negative=x", "dry:multiplier=0.8"),
        *("no-repeat-ngram:size=2", "suppress-tokens:tokens=[1, 2]", "xtc", "top-h"),
        *("min-new-tokens:n=3", 'logit-bias:bias={"3": 2.5}', "watermark:key=3"),
        *("sequence-bias:biases=[[[3, 4], 2.5]]", "forced-tokens:tokens=[5, 7],at=1"),
        *("length-decay:after=1,factor=1.5", "eta", "epsilon", "typical", "top-n-sigma"),
    ],
    "draft": ["lookup", "lookup:ngram=2,tokens=3", str(MODEL), f"model:source={MODEL},tokens=2"],
}
NUMBERS = ["0", "1", "2", "3", "7", "-1", "1e3", "0.5", "", "9" * 30, "9" * 5000, "nan", "x", "1_0"]
TEXTS = ["abc", "", "né \u6f22", "\n", "x" * 95, "x" * 3000, "\udcff", "\0", "--", "-1", "\u202e"]
OPTIONS: dict[str, dict[str, list[str]]] = {
    "generate": {
        "--max-new-tokens": ["1", "3", "200"], "--n": ["1", "3", "70"], "--seed": ["1", "-5"],
        "--stop": [*TEXTS, r"\n", r"\\", "a" * 2000], "--overflow": ["stop", "slide", "wrap"],
        "--top-logprobs": ["0", "3", "300"], "--quantize": ["int8", "int4"], "--json": [],
        "--dtype": ["float32", "bfloat16", "float64"], "--device": ["cpu", "cuda:9", "meta", ""],
        "--tokenizer": ["bytes", "gpt3", "none.json"], "--chat": [], "--system": TEXTS,
        "--no-stream": [], "--trace": ["t.jsonl", "no/t.jsonl", "."], "--model": [str(MODEL)],
        "--observer": ["trace:path=x", "trace"], "--prompts-file": ["p.txt", "none.txt", "p.jsonl"],
        "--out": ["out.jsonl", "no/out.jsonl", ".", "p.txt", "r.jsonl"],
        "--chat-template": ["c.jinja"], "--sampler": SPECS["sampler"],
        "--processor": SPECS["processor"], "--draft": SPECS["draft"],
    },
    "compare": {
        "--sampler": SPECS["sampler"], "--processor": SPECS["processor"], "--n": ["1", "3"],
        "--max-new-tokens": ["1", "5"], "--seed": ["0", "3"], "--json": [],
        "--plot": ["p.png", "p.svg", "p.txt", "no/p.png"],
        "--prompts-file": ["p.txt", "none.txt", "p.jsonl"],
        "--out": ["out.jsonl", "no/out.jsonl", ".", "p.txt", "r.jsonl", "t.csv", "p.svg"],
        "--seeds": ["1", "2"], "--csv": ["t.csv", ".", "no/t.csv"],
        "--metric": ["distinct:3", "mean-logprob", "distinct:0", "no"],
        "--model": [str(MODEL)], "--dtype": ["float32", "bfloat16"],
    },
    "eval": {
        "--data": ["p.txt", "none.txt", ".", "builtin:no"], "--stride": ["1", "5", "96", "97"],
        "--batch-size": ["1", "3"], "--max-tokens": ["2", "50"], "--json": [],
        "--model": [str(MODEL)], "--tokenizer": ["bytes"],
    },
    "info": {"": [str(MODEL), "none", "", "gguf:path=x", "huggingface:path=.", "\0"]},
    "plugins": {
        "": ["show", "beam", "top-k", "nothing", "new", "list"],
        "--kind": ["sampler", "processor", "x"], "--out": ["p", "."],
    },
    "plot": {"": ["run", ".", "none"], "--out": ["p.png", "p.txt", "no/p.svg"]},
    "repeat": {"": ["r.jsonl", "none", "p.txt"], "--model": [str(MODEL)], "--device": ["cpu"]},
}  # fmt: skip
NEEDED = {
    "generate": ["--model", str(MODEL), "--max-new-tokens", "4"],
    "compare": ["--model", str(MODEL), "--sampler", "greedy", "--max-new-tokens", "3"],
    "eval": ["--model", str(MODEL), "--data", "p.txt"],
}


@functools.cache
def toy() -> Any:
    """The toy model, saved for the command lines; removed when the process ends."""
    from gptk.testing import tiny_lm

    lm = tiny_lm()
    FOLDER.mkdir()
    atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
    lm.save(MODEL)
    return lm


def test_command_lines(attack):
    """Commands with random options, and values that are right, odd or mutated."""

    def make(rng: random.Random) -> list[str]:
        command = rng.choice(["generate"] * 5 + ["compare"] * 3 + list(OPTIONS))
        args = [] if rng.random() < 0.03 else list(NEEDED.get(command, []))
        if rng.random() < 0.8:
            args.insert(0, rng.choice(TEXTS))
        options = OPTIONS[command]
        for name in rng.choices(list(options), k=rng.choice([0, 1, 2, 3, 5])):
            value = rng.choice(options[name] or [""])
            if rng.random() < 0.2:
                value = mutated_text(rng, value)
            elif rng.random() < 0.1:
                value = rng.choice([*NUMBERS, *TEXTS])
            args += [name] * bool(name) + [value] * bool(options[name])
        if rng.random() < 0.05:
            args.insert(rng.randrange(len(args) + 1), mutated_text(rng, "--json"))
        if "slide" in args:  # which goes on as long as it is told
            args += ["--max-new-tokens", "4"]
        # The system lets neither into an argument.
        return [command, *(arg.replace("\0", "").replace("\ud800", "\udc80") for arg in args)]

    def run(args: list[str]) -> object:
        from gptk.cli import cli

        Path("p.txt").write_text("one two three\nfour\n" * 3)
        Path("c.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        Path("r.jsonl").write_text(json.dumps(record()))
        Path("p.jsonl").write_text('{"prompt": "a", "settings": {"n": 2}}\n{"prompt": [1]}\n')
        with contextlib.suppress(SystemExit):  # 130, or 1 of `repeat`
            return cli.main(args, prog_name="gptk", standalone_mode=False)

    toy()
    attack(make, run)


VALUES: dict[str, list[Any]] = {
    "sampler": [*SPECS["sampler"], 3, None, ["greedy"], object()],
    "processors": [[spec] for spec in SPECS["processor"]] + [*SPECS["processor"], 7, [7], {}, None],
    "max_new_tokens": [1, 5, torch.tensor(3), True, 10**6, 10**30, 10**5000],
    "n": [1, 3, 60, 10**9, 10**5000, True],
    "seed": [0, -1, 10**18, 2**63, -(10**30), 10**5000, torch.tensor(4), None],
    "stop": ["x", ["a", "b"], [], [3], lambda tokens: len(tokens) > 5, [lambda tokens: 1 / 0, "x"]],
    "draft": [*SPECS["draft"], 3, [], None],
    "overflow": ["stop", "slide", ["stop"], {}, None],
    "max_seconds": [0, 0.1, 1e308, 10**400, float("inf"), -0.0, b"1", None],
    "ignore_eos": [True, False, torch.tensor(True), "no", None],
    "use_cache": [True, False, 0, None],
    "observers": [[], ["trace:path=x"], "trace", [3], None, lambda: None],
    "top_logprobs": [0, 2, 300, 10**12, True],
    "temperature": [0.7],
}
ODD = [
    None,
    -1,
    0.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    {},
    object(),
    b"x",
    10**40,
    1j,
    ...,
    [[]],
]
PROMPTS: list[Any] = [
    *("abc", "", "x" * 95, "x" * 200, "\ud800", "né \u6f22", [1, 2], [], [-1], [300], [1.5], ["a"]),
    *(
        None,
        5,
        torch.tensor([1, 2]),
        torch.tensor([[1]]),
        torch.tensor(3),
        (1, 2),
        b"abc",
        range(3),
    ),
    *([10**30], [True], {1: 2}, [[1], [2]], iter([1, 2])),
]


def test_settings(attack):
    """Settings of LanguageModel.generate of wrong types, and with wrong values."""

    def make(rng: random.Random) -> dict[str, Any]:
        settings: dict[str, Any] = {"max_new_tokens": 4}
        for name in rng.choices(list(VALUES), k=rng.choice([1, 2, 3, 4])):
            value = rng.choice(VALUES[name] if rng.random() < 0.8 else ODD)
            if isinstance(value, str) and rng.random() < 0.2:
                value = mutated_text(rng, value)
            settings[name] = value
        prompt = rng.choice(PROMPTS) if rng.random() < 0.3 else "abc"
        return {"prompt": prompt, "how": rng.choice(["one", "batch", "stream"]), **settings}

    def run(arguments: dict[str, Any]) -> object:
        settings = dict(arguments)
        prompt, how, lm = settings.pop("prompt"), settings.pop("how"), toy()
        if settings.get("overflow") == "slide":  # which goes on as long as it is told
            settings["max_new_tokens"] = 5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if how == "stream":
                    with lm.stream(prompt, **settings) as stream:
                        return list(stream.tokens())
                batch = [prompt] if how == "one" else [prompt, "x", prompt]
                return [result.to_dict() for result in lm.generate_batch(batch, **settings)]
            except ZeroDivisionError:  # of the caller's own stop condition
                return None

    toy()
    attack(make, run)


# Of the call that makes the record, which results files are gone on with, too.
CALL = {
    "sampler": "top-p", "n": 2, "seed": 1, "max_new_tokens": 4, "stop": ["zz"],
    "processors": ["min-p:p=0.1"],
}  # fmt: skip


@functools.cache
def record() -> Any:
    """The record of a run on the toy model, as `generate --json` writes it."""
    from gptk import load
    from gptk.records.call import Call
    from gptk.records.prompts_file import GivenPrompt
    from gptk.records.writing import Recorder

    toy()
    lm = load(str(MODEL))
    call = Call(CALL)
    ((given, result),) = call.results(lm, [GivenPrompt(prompt="abc")], ordered=True)
    return call.record(Recorder(lm), given, result)


@functools.cache
def comparison() -> Any:
    """The record of a comparison on the toy model."""
    from gptk import load
    from gptk.measure.comparison import compare
    from gptk.records.prompts_file import GivenPrompt
    from gptk.records.writing import Compared, comparison_record, used_in

    toy()
    lm, settings = (
        load(str(MODEL)),
        {"n": 2, "max_new_tokens": 3, "seed": 0, "seeds": 2, "metrics": ()},
    )
    prompts = [
        GivenPrompt(prompt="ab"),
        GivenPrompt(index=1, prompt="c", settings={"stop": "z", "processors": ["top-k:3"]}),
    ]
    requests = [given.request() for given in prompts]
    compared = compare(lm, requests, ["greedy", "top-k:k=4 + min-p"], **settings)
    made = Compared(lm, compared, prompts, [], lambda: used_in(compared, [], lm))
    return comparison_record(made, processors=[], tokenizer=None, **settings)


def test_records(attack):
    """Mutated records, which `gptk repeat` reads and runs."""

    def make(rng: random.Random) -> str:
        lines = []
        for _ in range(rng.choice([1, 1, 2])):
            base = comparison() if rng.random() < 0.3 else record()
            # What is read is mutated more often than the rest.
            kept = {name: base[name] for name in base if name not in ("model", "environment")}
            text = mutated_json(rng, kept if rng.random() < 0.8 else base)
            if text.startswith("{") and "model" not in text.split('"load"')[0]:
                text = text.replace("{", '{"model": {}, "environment": {}, ', 1)
            lines.append(text)
        return "\n".join(lines)

    def run(text: str) -> object:
        from gptk.records.reading import read_records
        from gptk.records.repeating import Models, repeat

        Path("r.jsonl").write_text(text, encoding="utf-8", errors="surrogatepass")
        return [
            list(repetitions) for _, repetitions in repeat(read_records(Path("r.jsonl")), Models())
        ]

    record(), comparison()
    attack(make, run)


LINES = [
    {"prompt": "abc", "id": "a", "settings": {"sampler": "beam:width=2", "n": 2, "stop": ["z"]}},
    {"prompt": [1, 2, 3], "id": 4, "ordinal": 3, "settings": {"processors": ["min-p:p=0.1"]}},
    {"messages": [{"role": "user", "content": "x"}], "settings": {"seed": 3, "ignore_eos": True}},
    {"prompt": "", "settings": {"max_new_tokens": 1, "overflow": "slide", "top_logprobs": 2}},
]


def test_prompts_files(attack):
    """Lines with mutated objects, of which some may be wrong and the others still go on."""

    def make(rng: random.Random) -> str:
        lines = [mutated_json(rng, rng.choice(LINES)) for _ in range(rng.choice([1, 2, 3]))]
        return "\n".join([json.dumps(LINES[0]), *lines])

    def run(text: str) -> object:
        from gptk.records.call import Call
        from gptk.records.prompts_file import PromptsFile

        Path("p.jsonl").write_text(text, encoding="utf-8", errors="surrogatepass")
        call = Call({"max_new_tokens": 2}, template="{{ messages[0].content }}")
        with PromptsFile("p.jsonl") as file:
            ended = list(call.results(toy(), file.prompts(), ordered=True))
            assert [asked.given.index for asked, _ in ended] == list(range(file.count or 0))
            return ended

    toy()
    attack(make, run)


FILES = [
    {"plugin": "processor json-schema", "name": "s.json", "bytes": 3, "sha256": "a" * 64},
    {"plugin": "drafter model", "name": "m.gguf", "bytes": 5, "sha256": None},
]
FILES_ONLY = {"record": "generation", "version": 1, "index": 2, "model": {}, "files": FILES}


def test_results_files(attack):
    """Mutated records in a file that is to be gone on with."""

    def make(rng: random.Random) -> str:
        whole = record() | {"prompts_file": {"name": "p.jsonl", "sha256": "b" * 64}}
        if rng.random() < 0.3:
            whole["files"] = FILES
        lines = [json.dumps(whole), mutated_json(rng, whole if rng.random() < 0.7 else FILES_ONLY)]
        rng.shuffle(lines)
        return "\n".join(lines) + "\n" * rng.choice([0, 1])

    def run(text: str) -> object:
        from gptk.records.call import Call
        from gptk.records.results_file import ResultsFile

        Path("o.jsonl").write_text(text, encoding="utf-8", errors="surrogatepass")
        call = Call(CALL)
        with ResultsFile("o.jsonl") as results:
            results.seed()
            results.read(8, lambda record: None)
            return results.read(8, lambda record: call.difference(record, "b" * 64))

    record()
    attack(make, run)


@functools.cache
def runs() -> Any:
    """A comparison on the toy model, and the records of its results."""
    from gptk.measure.comparison import check_metrics
    from gptk.measure.strategies import check_samplers
    from gptk.records.comparing import ComparisonRuns
    from gptk.records.prompts_file import GivenPrompt
    from gptk.records.writing import Recorder

    made = ComparisonRuns(
        [GivenPrompt(prompt="ab"), GivenPrompt(index=1, prompt="c", settings={"top_logprobs": 1})],
        check_samplers(["greedy", "top-k:k=4 + min-p"], 2), metrics=check_metrics([]),
        processors=[], n=2, max_new_tokens=2, seed=0, seeds=2,
    )  # fmt: skip
    recorder = Recorder(toy())
    ended = made.results(toy(), (), lambda: None)
    return made, [made.record(recorder, asked, result, 0.5) for asked, result in ended]


def test_results_of_comparisons(attack):
    """A mutated record among those in a file that a comparison is made of."""

    def make(rng: random.Random) -> str:
        _, whole = runs()
        mutated = rng.randrange(len(whole))
        lines = [
            mutated_json(rng, record) if number == mutated else json.dumps(record)
            for number, record in enumerate(whole)
        ]
        return "\n".join(lines) + "\n"

    def run(text: str) -> object:
        from gptk.records.results_file import ResultsFile

        made, _ = runs()
        Path("o.jsonl").write_text(text, encoding="utf-8", errors="surrogatepass")
        with ResultsFile("o.jsonl") as results:
            results.read(len(made), made.difference)
            return results.done < len(made) or made.compared(results.results(), toy())

    runs()
    attack(make, run)
