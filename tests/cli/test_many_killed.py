"""`gptk generate --prompts-file … --out …` ended at any moment: the same command goes on, and has
each result once in the end, with the bytes that it has if nobody disturbs it."""

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
PROMPTS = 200
CODES = {  # negative: the signal itself has ended the process, before it decoded or afterwards
    signal.SIGINT: {130, -signal.SIGINT},
    signal.SIGTERM: {143, -signal.SIGTERM},
    signal.SIGKILL: {-signal.SIGKILL},
}


@pytest.fixture
def command(tmp_path):
    """The command line without --out.

    The model's next token depends on the last one alone, so that its logits are the same bits
    whatever is decoded beside a prompt.
    """
    table = torch.rand(257, 257, generator=torch.Generator().manual_seed(0))
    markov_lm(table, load_tokenizer("bytes")).save(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"prompt {number}\n" for number in range(PROMPTS)))
    options = ("--max-new-tokens", 8, "--sampler", "multinomial", "--seed", 5)
    return ("generate", "--model", tmp_path / "model", "--prompts-file", prompts, *options)


@pytest.mark.slow
def test_a_command_ended_at_random_moments_ends_with_the_same_results(command, tmp_path):
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
            assert program.run([*command, "--out", straight], stderr) == (0, 0), stderr.read_text()
            seconds = time.monotonic() - start
        wanted = sorted(straight.read_bytes().splitlines())
        assert sorted(json.loads(line)["index"] for line in wanted) == list(range(PROMPTS))
        while kills.total() < KILLS:
            out = tmp_path / f"{done}.jsonl"
            run = (program, chance, seconds, [*command, "--out", out], out, stderr)
            while (kill := killed(*run)) is not None:
                kills[kill] += 1
            assert sorted(out.read_bytes().splitlines()) == wanted
            done += 1
    print(f"{kills.total()} kills in {done} commands of {seconds:.1f} s: {dict(kills)}")


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
