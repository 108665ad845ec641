"""`gptk generate --prompts-file … --out …` and `gptk compare --out …` ended at any moment: the same
command goes on, and has each result once in the end, with the bytes that it has if nobody disturbs
it, except for the seconds that a result took."""

import json
import os
import random
import signal
import time
from collections import Counter

import pytest
import torch

from gptk import load_tokenizer
from gptk.testing import markov_lm
from killed_program import ForkedProgram

KILLS = int(os.environ.get("GPTK_TEST_KILLS", "60"))
SAMPLERS = ("--sampler", "multinomial", "--sampler", "top-k:5 + min-p:0.01")
COMMANDS = {
    "generate": ("--sampler", "multinomial", "--seed", 5),
    "compare": (*SAMPLERS, "--seeds", 2, "--n", 1),  # four results for each prompt
}
CODES = {  # negative: the signal itself has ended the process, before it decoded or afterwards
    signal.SIGINT: {130, -signal.SIGINT},
    signal.SIGTERM: {143, -signal.SIGTERM},
    signal.SIGKILL: {-signal.SIGKILL},
}


@pytest.fixture
def command(tmp_path):
    """`command(name, results)`: a command line without --out.

    The model's next token depends on the last one alone, so that its logits are the same bits
    whatever is decoded beside a prompt.
    """
    table = torch.rand(257, 257, generator=torch.Generator().manual_seed(0))
    markov_lm(table, load_tokenizer("bytes")).save(tmp_path / "model")

    def args(name, results):
        count = results // (4 if name == "compare" else 1)
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("".join(f"prompt {number}\n" for number in range(count)))
        model = ("--model", tmp_path / "model", "--prompts-file", prompts)
        return (name, *model, "--max-new-tokens", 8, *COMMANDS[name])

    return args


@pytest.mark.parametrize(
    ("name", "results", "least"),
    [
        ("compare", 40, 2),
        pytest.param("generate", 200, KILLS, marks=pytest.mark.slow),
        pytest.param("compare", 200, KILLS, marks=pytest.mark.slow),
    ],
)
def test_a_command_ended_at_random_moments_ends_with_the_same_results(
    command, tmp_path, name, results, least
):
    """Signals come at a random time, from the start of the process to its end; some come twice.
    After some of the kills the last bytes of the file are lost, as after a power failure. A command
    that was ended is run again until all prompts have results; then another one begins.
    GPTK_TEST_KILLS: how many kills, instead of 60."""
    chance, kills, done = random.Random(0), Counter(), 0
    stderr, straight = tmp_path / "stderr", tmp_path / "straight.jsonl"
    with ForkedProgram() as program:
        for _ in range(2):  # the first process may compile the kernels
            straight.unlink(missing_ok=True)
            start = time.monotonic()
            line = command_line(command(name, results), straight)
            assert program.run(line, stderr) == (0, 0), stderr.read_text()
            seconds = time.monotonic() - start
        wanted = results_of(straight)
        assert [index for index, _ in wanted] == list(range(results))
        while kills.total() < least:
            out = tmp_path / f"{done}.jsonl"
            line = command_line(command(name, results), out)
            while (kill := killed(program, chance, seconds, line, out, stderr)) is not None:
                kills[kill] += 1
            assert results_of(out) == wanted
            if name == "compare":
                table = out.with_suffix(".csv").read_bytes()
                assert table == straight.with_suffix(".csv").read_bytes()
            done += 1
    print(f"{kills.total()} kills in {done} commands of {seconds:.1f} s: {dict(kills)}")


def command_line(args, out):
    table = ("--csv", out.with_suffix(".csv")) if args[0] == "compare" else ()
    return [*args, "--out", out, *table]


def results_of(path):
    """The records in order, each with its number, as text without the seconds that it took."""
    found = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        (record["comparison"] or {}).pop("seconds", None)
        found.append((record["index"], json.dumps(record)))
    return sorted(found)


def killed(program, chance, seconds, command, out, stderr):
    """Run a command and send it a signal: which one, and when it came; None if it ended before."""
    before = out.read_bytes() if out.exists() else b""
    number, moment = chance.choice([*CODES]), chance.uniform(0, seconds)
    signals = [(moment, number)]
    if chance.random() < 0.3:
        signals.append((moment + chance.uniform(0, 0.02), number))
    stderr.write_text("")
    code, sent = program.run(command, stderr, signals)
    said, content = stderr.read_text(), out.read_bytes() if out.exists() else b""
    check_intact(before, content)
    assert "Traceback" not in said, said
    if code == 0:
        return None
    assert sent, (code, said)
    assert code in CODES[number], (code, number, said)
    if number == signal.SIGKILL and content and chance.random() < 0.3:
        os.truncate(out, len(content) - chance.randint(1, min(2000, len(content))))
    return f"{number.name} {'while' if len(content) > len(before) else 'not while'} decoding"


def check_intact(before, content):
    """Lines that were whole are still there, those after them are whole, and none is there twice.

    A process that ended before it wrote leaves an incomplete last line as it is.
    """
    assert content.startswith(before[: before.rfind(b"\n") + 1])
    assert content == before or content.endswith(b"\n") or not content
    lines = content.splitlines()
    assert len(set(lines)) == len(lines)
