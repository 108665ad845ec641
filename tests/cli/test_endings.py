"""How the program ends: whatever happens is one line, and an exit code; never a traceback."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import click
import pytest

import gptk
from gptk.cli import cli
from gptk.testing import tiny_lm
from program import GPTK, without_notice
from program import gptk as run_gptk

PROGRAM = shlex.join(GPTK)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    tiny_lm().save(path)
    return path


def shell(command, **env):
    """A command line in a shell of its own: (exit code, standard output, standard error)."""
    out = subprocess.run(
        ["bash", "-c", command], capture_output=True, check=False, env=os.environ | env, timeout=120
    )
    return out.returncode, out.stdout, out.stderr.decode()


# --- Standard streams -------------------------------------------------------------------------

CLOSED = "gptk: standard output is closed\n"
FULL = "gptk: standard output cannot be written: No space left on device\n"
NOT_OPEN = "gptk: standard output cannot be written: Bad file descriptor\n"


@pytest.mark.parametrize(
    ("redirection", "code", "line"),
    [
        (">&-", 1, CLOSED),
        (">/dev/full", 1, FULL),
        ("1</dev/null", 1, NOT_OPEN),
        (">&- 2>&-", 1, ""),
        (">/dev/full 2>&-", 1, ""),
        ("<&- 2>&-", 0, ""),
    ],
)
def test_output_that_cannot_be_written_is_told(redirection, code, line):
    returned, _, err = shell(f"{PROGRAM} --help {redirection}")
    assert (returned, err) == (code, line)


COMMANDS = [
    "generate abc --max-new-tokens 3",
    "generate abc --max-new-tokens 3 --json",
    "compare abc --sampler greedy --max-new-tokens 3",
]


@pytest.mark.parametrize(
    "command", [COMMANDS[0], *(pytest.param(c, marks=pytest.mark.slow) for c in COMMANDS[1:])]
)
def test_a_result_that_cannot_be_written_is_told(model, command):
    code, _, err = shell(f"{PROGRAM} {command} --model {model} >/dev/full")
    assert (code, without_notice(err)) == (1, FULL)


def test_output_keeps_the_descriptors_of_other_files(model, tmp_path):
    """With standard error closed, a file that is opened must not get its messages."""
    trace = tmp_path / "trace.jsonl"
    how = f"--model {model} --max-new-tokens 3 --trace {trace}"
    code, out, _ = shell(f"{PROGRAM} generate abc {how} 2>&- <&-")
    assert code == 0
    assert out.strip()
    assert all(json.loads(line) for line in trace.read_text().splitlines())


# --- Encodings --------------------------------------------------------------------------------

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}


def test_in_a_locale_without_an_encoding_text_is_utf_8(model):
    args = f"--model {model} --max-new-tokens 3 --n 2 --sampler multinomial --seed 1"
    code, out, err = shell(f"{PROGRAM} generate 'né \u6f22' {args}", **ASCII)
    assert code == 0, err
    assert "--- 'né \u6f22' [1] score" in out.decode()


@pytest.mark.slow
def test_any_text_is_printed_in_any_locale(model, tmp_path):
    (tmp_path / "é.txt").write_text("né \u6f22\n")
    args = f"--model {model} --max-new-tokens 3 --json"
    in_utf_8 = shell(f"{PROGRAM} generate 'né \u6f22' {args}")[1]
    for command in (
        f"{PROGRAM} generate 'né \u6f22' {args}",
        f"printf 'né \u6f22' | {PROGRAM} generate {args}",
        f"{PROGRAM} generate --prompts-file {tmp_path}/é.txt {args}",
    ):
        code, out, err = shell(command, **ASCII)
        assert code == 0, err
        assert json.loads(out)["prompt_tokens"] == json.loads(in_utf_8)["prompt_tokens"]
    code, out, err = shell(
        f"{PROGRAM} generate 'né \u6f22' --model {model} --n 2 --sampler multinomial",
        PYTHONIOENCODING="latin-1",
    )
    assert code == 0, err
    assert b"--- 'n\xe9 \\u6f22' [1] score" in out
    assert shell(f"{PROGRAM} compare 'né' --model {model} --sampler greedy", **ASCII)[0] == 0
    code, _, err = shell(f"{PROGRAM} generate a --model {model} --trace {tmp_path}/ü.txt", **ASCII)
    assert code == 1
    assert "cannot be written in the encoding ascii; set PYTHONUTF8=1" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("generate", "\udcff"), "PROMPT is not UTF-8 text"),
        (("generate", "a", "--chat", "--system", "\udcff"), "--system is not UTF-8 text"),
        (("compare", "a\udcff", "--sampler", "greedy"), "PROMPT is not UTF-8 text"),
        (("generate", "a", "--stop", "\udcff"), "half of a surrogate pair"),
    ],
)
def test_arguments_that_are_no_text_are_refused(args, words):
    out = run_gptk(*args)
    assert out.returncode == 2
    assert words in out.stderr
    assert "internal error" not in out.stderr


def test_half_of_a_surrogate_pair_is_no_prompt():
    with pytest.raises(gptk.PromptError, match="surrogate pair at character 2"):
        tiny_lm().generate("a\ud800")


# --- Errors -----------------------------------------------------------------------------------


@pytest.fixture
def failing_command(monkeypatch):
    """`failing_command(error)`: what the program says if a command raises the error."""

    def run(error, *options):
        @click.command("info")
        def command():
            raise error

        monkeypatch.setattr("gptk.cli.info.command", command)
        out = run_gptk(*options, "info")
        assert out.stdout == ""
        return out.returncode, out.stderr

    return run


NO_MEMORY = "gptk: there is not enough memory; take a smaller model or --quantize int8, or ask for"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), f"{NO_MEMORY} fewer results and prompts at a time (MemoryError)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), NO_MEMORY),
        (OSError(12, "Cannot allocate memory"), NO_MEMORY),
        (PermissionError(13, "Permission denied", "x.txt"), "gptk: x.txt: Permission denied"),
        (OSError(5, "Input/output error"), "gptk: Input/output error"),
        (gptk.OutOfMemory("a model needs more"), "gptk: a model needs more"),
        (
            ZeroDivisionError("division by zero\nand more"),
            "gptk: internal error: ZeroDivisionError: division by zero (this is a fault in gptk; "
            "`gptk --debug …` shows where, please report it)",
        ),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(failing_command, error, line):
    code, err = failing_command(error)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert err.startswith(line)


def test_debug_shows_where_an_internal_error_is(failing_command):
    code, err = failing_command(ZeroDivisionError("x"), "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "in command" in err


def test_every_command_of_the_help_exists():
    for name in cli.list_commands(click.Context(cli)):
        assert cli.get_command(click.Context(cli), name) is not None


# --- Ctrl-C -----------------------------------------------------------------------------------


def interrupted_after(seconds, *args):
    """Send Ctrl-C to the program: (exit code, standard error)."""
    process = subprocess.Popen(
        [*GPTK, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # In a job that a shell runs in the background SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err.decode()


@pytest.mark.slow
@pytest.mark.parametrize("tenths", range(5, 30, 2))
def test_ctrl_c_at_any_time_exits_with_130_and_without_a_traceback(tenths):
    code, err = interrupted_after(tenths / 10, "generate", "x", "--max-new-tokens", "2000")
    assert code in (130, -signal.SIGINT)  # the latter while Python ends: shells say 130, too
    assert "Traceback" not in err


def program(code):
    """Run Python code: (exit code, standard error)."""
    out = subprocess.run(
        [sys.executable, "-c", "import os, signal, sys, time\n" + code],
        capture_output=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    return out.returncode, out.stderr


def test_ctrl_c_during_imports_exits_with_130():
    code = (
        "sys.argv = ['gptk', 'info']\n"
        "import gptk.cli, gptk.plugins.registry\n"
        "gptk.plugins.registry.failures = lambda kinds: os.kill(os.getpid(), signal.SIGINT)\n"
        "gptk.cli.main()\n"
    )
    assert program(code) == (130, b"")


INTERRUPTED = """
import gptk_command, gptk.cli
class Interrupted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
"""


def test_ctrl_c_in_a_destructor_is_not_lost():
    code = (
        "def work():\n"
        "    Interrupted()\n"
        "    time.sleep(60)\n"
        "gptk.cli.main = work\n"
        "gptk_command.main()\n"
    )
    assert program(INTERRUPTED + code) == (130, b"")


def test_ctrl_c_while_python_ends_says_nothing():
    code = (
        "import atexit\n"
        "atexit.register(Interrupted)\n"
        "gptk.cli.main = lambda: sys.exit(0)\n"
        "gptk_command.main()\n"
    )
    assert program(INTERRUPTED + code) == (-signal.SIGINT, b"")
