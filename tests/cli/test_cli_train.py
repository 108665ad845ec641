"""`gptk train`, run as a user runs it."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import tomllib
from unittest import mock

import pytest

from gptk.options import option_help
from gptk.training.config import HEADINGS, TrainConfig, read_config
from gptk.training.names import ALIASES
from program import GPTK, failing, gptk
from training_runs import SMALL, value_of, wait_for


def sets(**changes):
    """Small settings as options of the command line."""
    settings = {**SMALL, **changes}
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and what the program said."""
    path = tmp_path_factory.mktemp("runs") / "first run"
    out = gptk("train", "--out", path, *sets())
    assert out.returncode == 0, out.stderr
    return path, out


def test_it_tells_counts_first_then_evaluations_and_what_to_do_next(run):
    path, out = run
    lines = out.stdout.splitlines()
    assert re.fullmatch(r"model: [\d,]+ parameters, vocabulary 257, window 16", lines[0])
    assert lines[1] == "training: 419,505 tokens, 6,554 batches of 4 by 16"
    assert lines[2] == "validation: 46,612 tokens, 729 batches of 4 by 16"
    assert lines[3].startswith("20 steps of 64 tokens, 0.00 epochs; device cpu, float32")
    assert lines[4].startswith("step 0: train loss 5.")
    assert sum(line.startswith("step ") for line in lines) == 3
    assert lines[-1].endswith(f"gptk generate --model '{path}'")
    assert all(line.isprintable() for line in lines)
    assert "\r" not in out.stderr
    assert "\x1b" not in out.stderr


def test_the_run_generates_plots_and_is_evaluated(run, tmp_path):
    path, _ = run
    assert gptk("generate", "The", "--model", path, "--max-new-tokens", 5).returncode == 0
    assert gptk("info", path).stdout.startswith(f"source: {path}")
    plot = gptk("plot", path, "--out", tmp_path / "losses.svg")
    assert plot.returncode == 0, plot.stderr
    assert (tmp_path / "losses.svg").stat().st_size > 1000
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.")
    out = gptk("eval", "--model", path, "--data", tmp_path / "text.txt")
    assert "perplexity" in out.stdout


def test_a_run_goes_on_with_more_steps(run):
    path, _ = run
    out = gptk("train", "--resume", path, "--set", "steps=22")
    assert "going on after step 20" in out.stdout
    assert out.stdout.splitlines()[-2].startswith("step 22:") or "step 22" in out.stdout


def test_epochs_and_a_text_of_its_own_to_validate_on(tmp_path):
    (tmp_path / "train.txt").write_text("abcdefgh" * 100)
    (tmp_path / "validation.txt").write_text("hgfedcba" * 10)
    settings = sets(data=tmp_path / "train.txt", validation_data=tmp_path / "validation.txt")
    settings[settings.index("steps=20")] = "epochs=1.5"
    out = gptk("train", "--out", tmp_path / "run", *settings)
    lines = out.stdout.splitlines()
    assert lines[1] == "training: 800 tokens, 12 batches of 4 by 16"
    assert lines[2] == "validation: 80 tokens, 1 batches of 4 by 16"
    assert lines[3].startswith("18 steps of 64 tokens, 1.50 epochs")


def test_on_a_cpu_it_keeps_freed_memory(tmp_path):
    with mock.patch("gptk.system.memory.keep_freed_memory") as keep:
        gptk("train", "--out", tmp_path / "run", *sets(steps=1))
    keep.assert_called_once_with()


def test_show_config_is_a_file_that_says_the_same(tmp_path):
    out = gptk("train", "--show-config", *sets(lr=0.01))
    path = tmp_path / "config.toml"
    path.write_text(out.stdout)
    assert read_config(path) == read_config(None, [s for s in sets(lr=0.01) if s != "--set"])
    for name in TrainConfig.model_fields:
        assert re.search(rf"^(# )?{name} =", out.stdout, re.MULTILINE), name


@pytest.mark.parametrize(
    "words",
    [
        "text.txt --steps 2",
        "--data text.txt --max-steps 2",
        "--set data=text.txt --set max_iters=2",
        "text.txt c.toml",
        "c.toml --dataset text.txt",
    ],
)
def test_texts_and_settings_are_given_as_people_type_them(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("abcdefgh" * 100)
    (tmp_path / "c.toml").write_text("steps = 2\n")
    small = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 2 --eval-iters 1"
    out = gptk("train", *words.split(), *small.split(), "--sample-tokens=0", "--out=run")
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[1] == "training: 720 tokens, 22 batches of 2 by 16"
    settings = read_config(tmp_path / "run/config.toml")
    assert (settings.data, settings.steps) == (["text.txt"], 2)
    assert (settings.n_layers, settings.width, settings.context_length) == (1, 16, 16)


def shown_config(*words):
    out = gptk("train", *words, "--show-config")
    assert out.returncode == 0, out.stderr
    return TrainConfig(**tomllib.loads(out.stdout))


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_each_setting_is_an_option_also_by_its_other_names(name):
    value = value_of(name)
    for option in (name, *ALIASES.get(name, ())):
        option = option.replace("_", "-")
        if isinstance(value, bool):
            words = [f"--{option}" if value else f"--no-{option}"]
        elif isinstance(value, list):
            words = [f"--{option}", value[0], f"--{option}", "second"]
        else:
            words = [f"--{option}", value if isinstance(value, str) else json.dumps(value)]
        config = shown_config(*words)
        want = [value[0], "second"] if isinstance(value, list) else value
        assert config == TrainConfig(**{name: want})


def test_switches_go_both_ways():
    assert shown_config("--qkv-bias").qkv_bias is True
    assert shown_config("--no-qkv-bias").qkv_bias is False
    assert shown_config("--no-shuffle", "--tied-head").shuffle is False


def test_texts_add_up_however_they_are_given():
    config = shown_config("a.txt", "b.txt", "--data", "c.txt", "--set", "data=d.txt")
    assert sorted(config.data) == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert config.data[:2] == ["a.txt", "b.txt"]


def test_a_list_is_given_by_its_key_repeated():
    config = read_config(None, ["data=a.txt", "data=b.txt", 'regularizers=["l1", "ema"]'])
    assert config.data == ["a.txt", "b.txt"]
    assert config.regularizers == ["l1", "ema"]


class TestBadInput:
    """Each is one line that says what is wrong and what is allowed."""

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            ("learningrate=1", "has no option 'learningrate'; did you mean lr"),
            ("batchsize=1", "did you mean batch_size?"),
            ("lr=fast", "lr=fast is not allowed; lr is number > 0"),
            ("steps=0", "steps=0 is not allowed; steps is integer > 0"),
            ("lr", "expected key=value"),
            ("scheduler=cosin", "no scheduler is called 'cosin'; did you mean cosine"),
            ("regularizers=drop-out:p=2", "no regularizer is called 'drop-out'"),
            ("regularizers=dropout:p=2", "p=2 is not allowed"),
            ("sample_sampler=bean", "did you mean beam?"),
            ("observers=tensorbord", "did you mean tensorboard?"),
            ("n_heads=3", "width=32 does not divide into n_heads=3 heads"),
            ("data=missing.txt", "missing.txt"),
            ("data=builtin:docs", "builtin:docs"),
            ("device=cuda:7", "no device 'cuda:7'"),
            ("tokenizer=gpt3", "gpt3"),
            ("model=missing.gguf", "missing.gguf"),
            ("betas=[1,2]", "betas"),
            ("betas=[0.9]", "betas=[0.9] is not allowed; betas is array of 2 or more, of 2 at"),
            ("data=", "a source of data is empty"),
            ("data=[]", "data=[] is not allowed; data is array of 1 or more"),
            ("width=100000000000", "it must be a whole number from 1 to 2,147,483,647"),
            ("n_layers=1000000000", "out of memory for the model; take a smaller one"),
            ("epochs=2", "give steps or epochs, not both"),
        ],
    )
    def test_a_setting(self, change, line, tmp_path):
        name = change.partition("=")[0]
        settings = {key: value for key, value in SMALL.items() if key != name or name == "lr"}
        given = [f"--set={key}={value}" for key, value in settings.items()]
        command = ["train", "--out", tmp_path / "run", *given, "--set", change]
        out = gptk(*command)
        assert out.returncode in (1, 2)
        (said,) = out.stderr.splitlines()
        assert said.startswith("gptk: ")
        assert line in said
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            ("--lr 1 --lr 2", "lr is given twice, as lr=1 and as lr=2"),
            ("--lr 1 --learning-rate 2", "lr is given twice, as lr=1 and as lr=2"),
            ("--lr 1 --set max_lr=2", "lr is given twice, as lr=1 and as max_lr=2"),
            ("--set lr=1 --set lr=1", "lr is given twice"),
            ("--compile --no-compile", "compile is given twice"),
            ("--keep 1 --save-total-limit 2", "keep is given twice"),
            ("--lr fast", "lr=fast is not allowed; lr is number > 0"),
            ("--n-layer 0", "n_layers=0 is not allowed"),
            ("--dropout 0.1", 'write regularizers=["dropout:p=0.1", …]'),
            ("--warmup-steps 7", "write scheduler=warmup-cosine:warmup=7"),
            ("--output-dir x", "--out"),
            ("--lrr 1", "No such option '--lrr'"),
            ("a.toml b.toml", "two configuration files are given, a.toml and b.toml"),
            ("missing.txt", "missing.txt is not there"),
            ("--resume runs/x text.txt", "leave out CONFIG, DATA and --out"),
            ("--epochs 1 --steps 2", "give steps or epochs, not both"),
        ],
    )
    def test_a_command_line(self, words, line, tmp_path):
        out = gptk("train", "--out", tmp_path / "run", *words.split())
        if "--resume" in words:
            out = gptk("train", *words.split())
        assert out.returncode in (1, 2)
        (said,) = out.stderr.splitlines()
        assert said.startswith("gptk: ")
        assert line in said
        assert not (tmp_path / "run").exists()

    def test_too_little_text(self, tmp_path):
        (tmp_path / "short.txt").write_text("Too short.")
        line = failing(
            "train", "--out", tmp_path / "run", *sets(data=tmp_path / "short.txt"), code=1
        )
        assert "training data has 9 tokens" in line
        assert "train_ratio" in line

    def test_a_file_that_is_not_there_or_no_toml(self, tmp_path):
        assert "no such configuration file" in failing("train", tmp_path / "no.toml", code=2)
        (tmp_path / "bad.toml").write_text("lr = = 3")
        assert "cannot be read as TOML" in failing("train", tmp_path / "bad.toml", code=2)

    def test_a_run_that_is_there(self, run):
        assert "holds a run already" in failing("train", "--out", run[0], *sets(), code=1)

    def test_a_file_where_the_run_should_be(self, tmp_path):
        (tmp_path / "run").touch()
        line = failing("train", "--out", tmp_path / "run", *sets(), code=1)
        assert line.endswith("run is a file; a run needs a directory")

    def test_no_run_to_resume(self, tmp_path):
        assert "is not a training run" in failing("train", "--resume", tmp_path, code=1)


@pytest.mark.parametrize("terminal", [False, True], ids=["piped", "terminal"])
def test_ctrl_c_saves_and_says_how_to_go_on(terminal, tmp_path):
    run = tmp_path / "run"
    command = [*GPTK, "train", "--out", run, *sets(steps=100_000, sample_tokens=0)]
    reader, writer = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [*map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(writer)
    wait_for(run / "checkpoints/step-00000010")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said = b""
    while select.select([reader], [], [], 30)[0]:
        try:
            part = os.read(reader, 65536)
        except OSError:  # a terminal whose other end has gone
            break
        if not part:
            break
        said += part
    os.close(reader)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"go on with: gptk train --resume {run}" in out
    assert ("\x1b[2K" in said.decode()) == terminal
    assert re.search(
        r"step \d+,?\d*/100,000  loss \d\.\d{4}  lr .* tokens/s  .* left", said.decode()
    )
    assert gptk("train", "--resume", run, "--set", "steps=1").returncode == 0


def test_a_closed_pipe_ends_quietly(tmp_path):
    process = subprocess.Popen(
        [*map(str, [*GPTK, "train", "--out", tmp_path / "run", *sets(steps=2000)])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) in (0, 1)  # click's own way is 1
    assert "gptk:" not in err
    assert "Traceback" not in err


def test_help_names_what_there_is():
    out = gptk("train", "--help").stdout
    for word in ("--resume", "--show-config", "--set", "--keep", "--shard", "torchrun"):
        assert word in out
    options, *groups = [out.index(f"\n{heading}:\n") for heading in ("Options", *HEADINGS.values())]
    assert options < groups[0]
    assert groups == sorted(groups)
    for name, allowed, _, _ in option_help(TrainConfig):
        option = name.replace("_", "-")
        bool_or_not = f"--[no-]{option}" if allowed.startswith("true") else f"--{option} "
        assert out.count(f"\n  {bool_or_not}") == 1, name
    assert "--learning-rate" not in out[options:]
    assert max(map(len, out.splitlines())) <= 80


def test_help_and_settings_need_no_torch():
    code = (
        "import sys, gptk.cli.train\n"
        "try: gptk.cli.train.command(['--help'])\n"
        "except SystemExit: assert not {'torch', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_in_a_locale_without_utf8_it_trains_on_any_text(tmp_path):
    (tmp_path / "text.txt").write_text("naïve — 漢字 🙂\n" * 100, encoding="utf-8")
    (tmp_path / "naïve.txt").write_text("abc" * 100)
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "CXX": "/nonexistent"}

    def run(*words):
        return subprocess.run(
            [*GPTK, "train", *words, *sets(steps=2, sample_sampler="multinomial"), "--out", "run"],
            env=os.environ | environment,
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )

    out = run("naïve.txt")  # config.toml could not hold what the name is in this locale
    assert (out.returncode, out.stderr.count(b"\n")) == (2, 1)
    assert b"PYTHONUTF8=1" in out.stderr
    out = run("text.txt")
    assert out.returncode == 0, out.stderr
    assert b"best validation loss" in out.stdout
