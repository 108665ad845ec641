"""What the program says on standard error: lines that begin with `gptk:`, more or fewer of them."""

import json
import logging
import os
import shutil
import subprocess
import warnings

import pytest

import gptk as toolkit
from gptk.system.notices import tell_once
from gptk.testing import tiny_gpt
from program import GPTK, failing
from program import gptk as run


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A command that loads a model and generates."""
    path = tmp_path_factory.mktemp("output") / "model"
    toolkit.LanguageModel(tiny_gpt(), toolkit.load_tokenizer("bytes")).save(path)
    return ["generate", "abc", "--model", str(path), "--max-new-tokens", "3", "--seed", "0"]


def is_said(out, text):
    return any(line.startswith("gptk: ") and text in line for line in out.stderr.splitlines())


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
@pytest.mark.parametrize("after", [False, True])
def test_verbose_says_what_is_loaded_from_where(flag, after, words):
    out = run(*words, flag) if after else run(flag, *words)
    assert out.returncode == 0, out.stderr
    assert is_said(out, f"loaded {words[3]}")
    assert is_said(out, "on cpu, float32, weights ")
    assert "finish reason" in out.stderr


def test_without_a_flag_only_the_closing_line_is_said(words):
    (line,) = run(*words).stderr.splitlines()
    assert "finish reason" in line


@pytest.mark.parametrize(("new", "tokens"), [(1, "1 token,"), (2, "2 tokens,")])
def test_the_closing_line_counts_tokens(words, new, tokens):
    words = [str(new) if word == "3" else word for word in words]
    (line,) = run(*words).stderr.splitlines()
    assert line.startswith(tokens)


@pytest.mark.parametrize("after", [False, True])
def test_quiet_says_nothing_but_errors(after, words):
    quiet = run(*words, "--quiet") if after else run("--quiet", *words)
    assert quiet.returncode == 0
    assert quiet.stderr == ""
    assert quiet.stdout == run(*words).stdout
    assert "no sampler" in failing(*words, "--quiet", "--sampler", "nonsense", code=2)


def test_a_command_in_a_group_takes_them_too():
    assert run("plugins", "show", "greedy", "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("tokenize", "a", "b\n\x1b[31m\x07"), "unexpected extra argument (b \\x1b[31m\\x07)"),
        (("eval", "--model", "a\r\nb\x1b", "--model", "c\u202e"), "a b\\x1b and --model c\\u202e"),
    ],
)
def test_control_characters_of_arguments_do_not_reach_the_terminal(args, line):
    assert line in failing(*args, code=2)


def test_control_characters_of_a_model_s_files_do_not_reach_the_terminal(words, tmp_path):
    path = tmp_path / "model\x9b"
    shutil.copytree(words[3], path)
    about = json.loads((path / "gptk.json").read_text())
    about["tokenizer"]["name"] = "a\x1b]0;title\x07"
    (path / "gptk.json").write_text(json.dumps(about))
    lines = run("info", path).stdout.split("\n")
    assert f"source: {tmp_path}/model\\x9b" in lines
    assert "tokenizer: a\\x1b]0;title\\x07, 257 tokens" in lines


def test_one_excludes_the_other(words):
    assert "--verbose or --quiet, not both" in failing("-v", *words, "--quiet", code=2)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(("flags", "told"), [((), True), (("--quiet",), False)])
def test_warnings_of_plugins_come_through_the_same_door(flags, told, tmp_path, words):
    plugin = tmp_path / "warns.py"
    plugin.write_text(
        "import warnings, gptk\n"
        "from gptk import PluginWarning\n"
        "@gptk.hookimpl\n"
        "def gptk_samplers():\n"
        "    warnings.warn('a plug-in\\nhas a worry', PluginWarning)\n"
        "    return []\n"
    )
    out = run("--plugin", plugin, *flags, *words)
    assert out.returncode == 0, out.stderr
    assert is_said(out, "a plug-in has a worry") is told


def test_the_library_shows_nothing_and_leaves_logging_as_it_was(words, caplog, capfd):
    logger = logging.getLogger("gptk")
    handlers, level, shows = list(logger.handlers), logger.level, warnings.showwarning
    assert all(isinstance(handler, logging.NullHandler) for handler in handlers)
    run(*words, "-v")
    assert (list(logger.handlers), logger.level, warnings.showwarning) == (handlers, level, shows)
    toolkit.load(words[3], device="cpu").generate("a", max_new_tokens=1)
    assert capfd.readouterr().err == ""
    with caplog.at_level(logging.INFO, logger="gptk"):
        toolkit.load(words[3], device="cpu")
    assert any("loaded" in record.getMessage() for record in caplog.records)


@pytest.fixture
def untold(monkeypatch):
    """As in a process that has told no notice yet."""
    monkeypatch.setattr("gptk.system.notices._told", set())


@pytest.mark.usefixtures("untold")
def test_a_notice_is_told_once(caplog):
    log = logging.getLogger("gptk.tests")
    for _ in range(3):
        tell_once(log, "a notice of this test")
    assert [record.getMessage() for record in caplog.records] == ["a notice of this test"]


@pytest.mark.usefixtures("untold")
def test_reading_without_a_cache_says_that_it_is_slow(caplog):
    lm = toolkit.LanguageModel(tiny_gpt())
    for _ in range(2):
        lm.generate([1, 2], max_new_tokens=2, use_cache=False)
    notices = [record.getMessage() for record in caplog.records]
    assert sum("use_cache=False" in notice for notice in notices) == 1


def test_a_machine_without_kernels_says_why_and_what_to_do(words, tmp_path):
    environment = os.environ | {"CXX": "/nonexistent", "GPTK_CACHE": str(tmp_path)}
    environment.pop("GPTK_KERNELS", None)
    out = subprocess.run(
        [*GPTK, *words], env=environment, capture_output=True, text=True, check=True
    )
    notice, closing = out.stderr.splitlines()
    assert notice.startswith("gptk: gptk's kernels do not run here: ")
    assert "/nonexistent" in notice
    assert "finish reason" in closing
