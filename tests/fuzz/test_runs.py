"""Runs, checkpoints, token files and settings that were damaged or made to do harm."""

import contextlib
import functools
import hashlib
import json
import random
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import click
from attacking import mutated_bytes, mutated_json, mutated_text

import gptk
from gptk.cli import cli
from gptk.data.token_files import prepare_tokens
from gptk.plots.runs import plot_runs
from gptk.runs.directory import open_records
from gptk.training.config import TrainConfig, read_config
from gptk.training.names import ALIASES, ELSEWHERE
from gptk.training.trainer import Trainer
from toys import byte_tokenizer
from training_runs import config, value_of

TEXT = "abc\nélan defghij " * 100


@functools.cache
def original_run() -> Path:
    """A small run with everything that a run may have, made once in each process."""
    folder = Path(tempfile.mkdtemp(prefix="gptk-fuzz-"))
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    settings = config(
        data=[str(folder / "text.txt")],
        n_layers=1,
        width=16,
        steps=4,
        eval_every=2,
        eval_batches=1,
        regularizers=["weight-decay", "ema:decay=0.5"],
    )
    with in_small_machine(folder / "tokens"):
        Trainer.start(settings, folder / "run").train()
        trainer = Trainer.resume(folder / "run", ["steps=5"])
        trainer.shard = True  # one process has the only shard
        trainer.step()
        trainer.save()
        trainer.close()
    return folder


def with_checksums(folder: Path) -> None:
    """Make the checksums of a checkpoint fit, as somebody who means harm would."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    sums = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in names
        if name != "checksums.json"
    }
    (folder / "checksums.json").write_text(json.dumps(sums))


def refused(*functions) -> None:
    """Call each; what gptk refuses on purpose does not keep the others from being called."""
    first = None
    for function in functions:
        try:
            function()
        except (gptk.GptkError, click.ClickException) as error:
            first = first or error
    if first is not None:
        raise first


def mutated(rng: random.Random, path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        return mutated_json(rng, json.loads(data)).encode(errors="surrogatepass")
    if path.suffix == ".jsonl" and rng.random() < 0.7:
        lines = data.splitlines()
        place = rng.randrange(len(lines))
        lines[place] = mutated_json(rng, json.loads(lines[place])).encode(errors="surrogatepass")
        return b"\n".join([*lines, b""])
    if path.suffix == ".safetensors" and rng.random() < 0.7:
        return mutated_header(rng, data)
    if path.suffix in (".toml", ".jsonl", ".txt") and rng.random() < 0.7:
        text = data.decode()
        if path.suffix == ".toml" and rng.random() < 0.7:
            return mutated_toml(rng, text).encode(errors="surrogatepass")
        return mutated_text(rng, text).encode(errors="surrogatepass")
    return mutated_bytes(rng, data)


def mutated_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, whose stated length fits."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header and rng.random() < 0.5:
        about = json.loads(header["__metadata__"].get("gptk", "{}"))
        header["__metadata__"]["gptk"] = mutated_json(rng, about)
        changed = json.dumps(header)
    else:
        changed = mutated_json(rng, header)
    text = changed.encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def mutated_toml(rng: random.Random, text: str) -> str:
    """config.toml with another value, or another name, in one to three lines."""
    lines = text.splitlines()
    places = [place for place, line in enumerate(lines) if " = " in line and line[0] != "#"]
    for place in rng.choices(places, k=rng.choice([1, 1, 2, 3])):
        name, _, value = lines[place].partition(" = ")
        kind = rng.randrange(4)
        if kind == 0:
            value = odd_value(rng)
        elif kind == 1:
            value = mutated_text(rng, value)
        elif kind == 2:
            name = rng.choice([*ALIASES.get(name, ()), name, *ELSEWHERE, name + "_"])
        else:
            name = rng.choice([*TrainConfig.model_fields])
        lines[place] = f"{name} = {value}"
    return "\n".join(lines)


def odd_value(rng: random.Random) -> str:
    return rng.choice(
        [
            *('""', '"x"', "0", "-1", "1e999", "nan", "inf", "true", "[]", "{}", "[[1]]", "null"),
            *("1979-05-27", "9" * 400, "9" * 5000, "1" + "0" * 18, '"\\ud800"', "'''", "[" * 1000),
            *("0.5", "1e-300", "1e300", '["x"]', '"/dev/zero"', '"../.."', "0x7fffffffffffffff"),
            *(
                '"linear:warmup=' + "9" * 400 + '"',
                '"torch:scheduler=LRScheduler"',
                '"beam:width=9"',
            ),
        ]
    )


def run_with_a_file_mutated(attack, names, call) -> None:
    """names: the files of the run to mutate, as patterns. call: gets the run."""

    def make(rng: random.Random) -> tuple[str, bytes, bool, str]:
        run = original_run() / "run"
        found = sorted(path for name in names for path in run.glob(name))
        path = rng.choice(found)
        other = rng.choice([*["", "", "", "", "", "", "", ""], "fifo", "folder", "link", "gone"])
        return str(path.relative_to(run)), mutated(rng, path), rng.random() < 0.7, other

    def attacked(arguments: tuple[str, bytes, bool, str]) -> None:
        import os

        name, data, sums, other = arguments
        run = Path("run").absolute()
        shutil.copytree(original_run() / "run", run)
        path = run / name
        path.unlink()
        if other == "fifo":
            os.mkfifo(path)
        elif other == "folder":
            path.mkdir()
        elif other == "link":
            path.symlink_to("/dev/zero")
        elif not other:
            path.write_bytes(data)
        checkpoint = next((p for p in path.parents if p.parent.name == "checkpoints"), None)
        if checkpoint is not None and sums and not other and path.name != "checksums.json":
            with_checksums(checkpoint)
        with in_small_machine():
            call(run)

    attack(make, attacked)


@contextlib.contextmanager
def in_small_machine(tokens: Path | None = None):
    """A machine with 200 MB, so that settings that ask for more are refused, without a compiler.

    tokens: the folder of the token files.
    """
    tokens = tokens or Path("tokens").absolute()
    with (
        mock.patch("gptk.training.preparation.physical_memory", return_value=2e8),
        mock.patch("gptk.data.token_files._default_cache", return_value=tokens),
        mock.patch("gptk.kernels.checks.enabled", False),
    ):
        yield


def resume(run: Path) -> None:
    trainer = Trainer.resume(run, warn=lambda _: None)
    try:
        if trainer.step_windows <= 64:
            trainer.step()
            trainer.evaluate() if trainer.config.eval_batches < 100 else None
            trainer.save()
    finally:
        trainer.close()


def generate(run: Path) -> None:
    gptk.load(str(run)).generate("abc", max_new_tokens=2)


def evaluate(run: Path) -> None:
    command("eval", "--model", str(run), "--data", str(original_run() / "text.txt"))


def command(*words: str) -> None:
    cli.main([*words], prog_name="gptk", standalone_mode=False)


def test_resuming_a_run_with_a_damaged_file(attack):
    names = ["config.toml", "checkpoints/*/*.json", "checkpoints/*/*.safetensors"]
    names += ["checkpoints/*/shards/*", "checkpoints/*/tokenizer.tiktoken", "metrics.jsonl"]
    run_with_a_file_mutated(attack, names, resume)


def test_a_model_of_a_run_with_a_damaged_file(attack):
    names = ["checkpoints/*/averaged/*", "checkpoints/*/*"]

    def use(run: Path) -> None:
        refused(lambda: generate(run), lambda: evaluate(run))

    run_with_a_file_mutated(attack, [f"{name}.*" for name in names], use)


def test_the_records_of_a_run(attack):
    def use(run: Path) -> None:
        refused(
            lambda: plot_runs([run], Path("plot.svg")),
            lambda: [file.close() for file in open_records(run, 5)],
            lambda: command("train", "--resume", str(run), "--steps", "5", "--sample-tokens", "1"),
        )

    run_with_a_file_mutated(attack, ["metrics.jsonl", "config.toml", "samples.txt"], use)


def test_files_of_tokens(attack):
    def make(rng: random.Random) -> tuple[str, bytes]:
        path = rng.choice(sorted((original_run() / "tokens").iterdir()))
        return path.name, mutated(rng, path)

    def attacked(arguments: tuple[str, bytes]) -> None:
        name, data = arguments
        cache = Path("tokens").absolute()
        shutil.copytree(original_run() / "tokens", cache)
        (cache / name).write_bytes(data)
        tokenizer = byte_tokenizer()
        tokens = prepare_tokens([str(original_run() / "text.txt")], tokenizer, cache=cache)
        assert tokens.tokens.tolist() == tokenizer.encode(TEXT)
        assert tokens.n_bytes == len(TEXT.encode())

    attack(make, attacked)


def test_texts(attack):
    def make(rng: random.Random) -> bytes:
        return mutated_bytes(rng, mutated_text(rng, TEXT * 3).encode(errors="surrogatepass"))

    def attacked(data: bytes) -> None:
        Path("text.txt").write_bytes(data)
        tokens = prepare_tokens(["text.txt"], byte_tokenizer(), cache=Path("tokens").absolute())
        text = data.decode().removeprefix("\ufeff")
        assert tokens.tokens.tolist() == byte_tokenizer().encode(text)

    attack(make, attacked)


def test_configuration_files(attack):
    text = TrainConfig(steps=3, patience=2, stride=4).to_toml()

    def make(rng: random.Random) -> bytes:
        changed = mutated_toml(rng, text) if rng.random() < 0.8 else mutated_text(rng, text)
        return changed.encode(errors="surrogatepass")

    def attacked(data: bytes) -> None:
        Path("config.toml").write_bytes(data)
        settings = read_config(Path("config.toml"))
        Path("again.toml").write_text(settings.to_toml(comments=True), encoding="utf-8")
        assert read_config(Path("again.toml")) == settings
        with in_small_machine():
            start(settings)

    attack(make, attacked)


def start(settings: TrainConfig) -> None:
    trainer = Trainer.start(settings, "run")
    trainer.describe()
    trainer.close()


def test_command_lines_of_train(attack):
    names = [*TrainConfig.model_fields, *ELSEWHERE]
    names += [alias for aliases in ALIASES.values() for alias in aliases]

    def make(rng: random.Random) -> list[str]:
        words = []
        for name in rng.choices(names, k=rng.choice([1, 1, 2, 3])):
            if name in TrainConfig.model_fields and rng.random() < 0.5:
                value = str(value_of(name))
            else:
                value = odd_value(rng).strip('"')
            value = mutated_text(rng, value) if rng.random() < 0.3 else value
            option = f"--{name.replace('_', '-')}"
            form = rng.randrange(4)
            words += [
                [option, value],
                [f"{option}={value}"],
                ["--set", f"{name}={value}"],
                [option],
            ][form]
        if rng.random() < 0.3:
            words.append(mutated_text(rng, rng.choice(["--set", "--lr=1", "text.txt", "c.toml"])))
        return [word.replace("\0", "") for word in words]

    def attacked(words: list[str]) -> None:
        refused(lambda: command("train", "--show-config", *words))
        small = ["--out", "run", "--device", "cpu", "--eval-batches", "1", "--sample-tokens", "1"]
        with in_small_machine(), mock.patch("gptk.training.trainer.Trainer.train") as train:
            train.return_value = "finished"
            command("train", *words, *small)

    attack(make, attacked)
