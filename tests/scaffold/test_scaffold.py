"""`gptk plugins new`, which writes plug-in packages, and `gptk --plugin`, which takes in a file."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gptk
from environments import fresh_environment
from gptk import distribution, plugins
from gptk.scaffold import LONGEST_NAME, SCAFFOLDS, write_package
from gptk.testing import tiny_gpt, tiny_lm
from program import failing
from program import gptk as run_gptk
from toys import GPT2_LIKE

KINDS = pytest.mark.parametrize("kind", SCAFFOLDS)
LONG = "a-name-as-long-as-any-name-may-ever-be-4"
TINY_RUN = {
    "n_layers": 1,
    "n_heads": 2,
    "width": 16,
    "context_length": 8,
    "batch_size": 2,
    "steps": 2,
    "eval_every": 2,
    "eval_batches": 1,
    "sample_tokens": 0,
    "device": "cpu",
    "dtype": "float32",
}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Größe ist nicht alles, sagte der Zwerg. " * 40, encoding="utf-8")
    return path


@pytest.fixture
def taken_in(forgotten):
    """Registers a file, until the test ends."""
    return plugins.register_file


def source(folder):
    (path,) = (folder / "src").glob("*/__init__.py")
    return path


def own_test(folder):
    (path,) = (folder / "tests").glob("test_*.py")
    return path


def ruff(*args):
    command = [sys.executable, "-m", "ruff", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


class TestThePackage:
    """What `gptk plugins new` writes."""

    def test_it_is_complete(self, tmp_path):
        folder = write_package("runner-up", "sampler", tmp_path / "package")
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert files == {
            ".gitignore",
            "LICENSE",
            "README.md",
            "pyproject.toml",
            "src/gptk_runner_up/__init__.py",
            "tests/test_runner_up.py",
        }
        assert list(tmp_path.iterdir()) == [folder]

    @KINDS
    def test_its_files_say_what_they_should(self, kind, tmp_path):
        folder = write_package("runner-up", kind, tmp_path / "package")
        project = tomllib.loads((folder / "pyproject.toml").read_text())
        assert project["build-system"]["build-backend"] == "hatchling.build"
        assert project["project"]["name"] == "gptk-runner-up"
        assert project["project"]["dependencies"] == [f"gptk-decoding>={gptk.__version__}"]
        assert project["project"]["optional-dependencies"] == {"test": ["gptk-decoding[testing]"]}
        assert project["project"]["entry-points"] == {"gptk": {"runner-up": "gptk_runner_up"}}
        code = source(folder).read_text()
        assert ast.get_docstring(ast.parse(code))
        assert "GPTK_API = 1\n" in code
        test = own_test(folder).read_text()
        if kind == "command":
            assert "def runner_up(" in code
        else:
            assert "class RunnerUp(gptk." in code
            assert "    make = RunnerUp\n" in test
        assert "(RunnerUp)" not in code
        assert "def test_" in test
        readme = (folder / "README.md").read_text()
        for needed in (
            "pip install gptk-runner-up",
            distribution.page("tutorial"),
            f"{distribution.page('hooks')}#gptk_",
        ):
            assert needed in readme
        assert (distribution.page("contracts") in readme) == (kind != "command")
        assert "Copyright (c) 20" in (folder / "LICENSE").read_text()
        assert not re.search(r"\$\w", code + test + readme)

    @KINDS
    def test_ruff_finds_nothing_to_change(self, kind, tmp_path):
        for name in ("x", LONG):
            write_package(name, kind, tmp_path / name)
        assert len(LONG) == LONGEST_NAME
        checked = ruff("check", "--no-cache", "--extend-select", "I,N,UP", tmp_path)
        assert checked.returncode == 0, checked.stdout
        formatted = ruff("format", "--no-cache", "--diff", tmp_path)
        assert formatted.returncode == 0, formatted.stdout

    def test_a_sampler_generates(self, tmp_path, taken_in):
        module = taken_in(source(write_package("runner-up", "sampler", tmp_path / "p")))
        lm = tiny_lm()
        out = lm.generate("abc", sampler="runner-up:temperature=2", seed=3, max_new_tokens=5)
        assert out == lm.generate(
            "abc", sampler=module.RunnerUp(temperature=2), seed=3, max_new_tokens=5
        )
        assert len(out.tokens) == 5

    def test_a_processor_processes(self, tmp_path, taken_in):
        taken_in(source(write_package("runner-up", "processor", tmp_path / "p")))
        lm = tiny_lm()
        chosen = {"sampler": "multinomial", "max_new_tokens": 12, "seed": 1}
        plain = lm.generate("abc", **chosen)
        assert lm.generate("abc", processors=["runner-up:a=1e-9"], **chosen) == plain
        assert lm.generate("abc", processors=["runner-up:a=1"], **chosen) != plain

    @pytest.mark.parametrize("kind", ["scheduler", "regularizer", "tokenizer"])
    def test_training_takes_it(self, kind, tmp_path, taken_in, data):
        taken_in(source(write_package("runner-up", kind, tmp_path / "p")))
        key = "regularizers" if kind == "regularizer" else kind
        named = ["runner-up"] if kind == "regularizer" else "runner-up"
        config = gptk.TrainConfig(**TINY_RUN, data=[str(data)], **{key: named})
        trainer = gptk.Trainer.start(config, tmp_path / "run")
        trainer.train()
        assert trainer.step_count == 2

    def test_a_loader_loads_what_its_test_writes(self, tmp_path, taken_in):
        folder = write_package("runner-up", "loader", tmp_path / "p")
        taken_in(source(folder))
        model = tiny_gpt(GPT2_LIKE)
        config = json.dumps(dataclasses.asdict(GPT2_LIKE))
        state = {name: p.detach() for name, p in model.named_parameters()}
        path = str(tmp_path / "model.runner-up")
        save_file(state, path, metadata={"config": config})
        loaded = gptk.load(path, tokenizer="bytes")
        ids = torch.tensor([[3, 1, 4]])
        assert torch.equal(loaded.model(ids), model(ids))
        save_file(state | {"more": torch.ones(1)}, path, metadata={"config": config})
        with pytest.raises(gptk.SourceError, match="more"):
            gptk.load(path)
        del state["norm.weight"]
        save_file(state, path, metadata={"config": config})
        with pytest.raises(gptk.SourceError, match=r"norm\.weight is missing"):
            gptk.load(path)

    def test_a_tokenizer_encodes_and_decodes(self, tmp_path, taken_in):
        taken_in(source(write_package("runner-up", "tokenizer", tmp_path / "p")))
        tokenizer = gptk.load_tokenizer("runner-up:alphabet=ß€")
        ids = tokenizer.encode("1 € für Spaß<|endoftext|>")
        assert ids[2] == 257
        assert ids[-1] == tokenizer.eos[0] == 258
        assert tokenizer.decode(ids) == "1 € für Spaß<|endoftext|>"


class TestTheCommand:
    """`gptk plugins new` itself."""

    def test_it_says_how_to_go_on(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        out = run_gptk("plugins", "new", "runner-up", "--kind", "sampler")
        assert out.returncode == 0, out.stderr
        for line in (
            "cd gptk-runner-up",
            "pip install -e '.[test]'",
            "pytest",
            'gptk generate "Once upon a time" --sampler runner-up:temperature=0.8',
        ):
            assert f"  {line}\n" in out.stdout
        assert (tmp_path / "gptk-runner-up" / "pyproject.toml").is_file()

    @pytest.mark.parametrize(
        ("typed", "name", "module", "cls"),
        [
            ("x", "x", "gptk_x", "X"),
            ("top.2_of-3", "top.2-of-3", "gptk_top_2_of_3", "Top2Of3"),
            ("LogitLens", "LogitLens", "gptk_logitlens", "LogitLens"),
        ],
    )
    def test_names_of_other_forms(self, typed, name, module, cls, tmp_path, taken_in):
        folder = write_package(typed, "scheduler", tmp_path / "p")
        assert source(folder).parent.name == module
        plugin = getattr(taken_in(source(folder)), cls)
        assert plugins.create("scheduler", name, gptk.LRScheduler) == plugin()

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("", "cannot be a plug-in's name"),
            ("two, words", "letters, digits, dots and hyphens: 'two-words'"),
            ("gptk-", "cannot be a plug-in's name"),
            ("../up", "cannot be a plug-in's name"),
            ("up-", "letters, digits, dots and hyphens: 'up'"),
            ("größe", "cannot be a plug-in's name"),
            ("___", "cannot be a plug-in's name"),
            ("gptk-greedy", "there is a sampler greedy already"),
            ("x" * 41, "has 41 characters; use 40 at most"),
            ("none", "would be a class None, which its module uses already"),
            ("2nd", "would be a class 2nd, which is no name in Python"),
            ("tensor", "would be a class Tensor, which its module uses already"),
            ("sampler-contract", "would be a class SamplerContract, which its module"),
            ("greedy", f"there is a sampler greedy already, in gptk-decoding {gptk.__version__}"),
            ("plugins", "there is a module gptk_plugins already"),
            ("test-me", "would be TestMe, a test's name"),
        ],
    )
    def test_a_name_that_cannot_be_used(self, name, message, tmp_path):
        line = failing("plugins", "new", name, "--kind", "sampler", "--out", tmp_path / "p", code=2)
        assert message in line
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("typed", "name"),
        [
            ("gptk-foo", "foo"),
            ("gptk_foo", "foo"),
            ("my_sampler", "my-sampler"),
            ("my sampler", "my-sampler"),
            ("my-gptk-sampler", "my-gptk-sampler"),
            ("gptkish", "gptkish"),
        ],
    )
    def test_a_name_is_taken_however_it_is_typed(self, typed, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        out = run_gptk("plugins", "new", typed, "--kind", "scorer")
        assert out.stdout.startswith(f"gptk-{name}: a package with the scorer {name}. Go on with")
        (folder,) = tmp_path.iterdir()
        assert folder.name == f"gptk-{name}"
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        assert project["name"] == f"gptk-{name}"
        assert f'name = "{name}"' in source(folder).read_text()

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("list", "would be a function list, which its module uses already"),
            ("if", "would be a function if, which its module uses already"),
            ("click", "would be a function click, which its module uses already"),
            ("3d", "would be a function 3d, which is no name in Python"),
        ],
    )
    def test_a_command_that_cannot_be_a_function(self, name, message, tmp_path):
        line = failing("plugins", "new", name, "--kind", "command", "--out", tmp_path / "p", code=2)
        assert message in line

    def test_a_name_may_be_taken_by_another_kind(self, tmp_path):
        assert write_package("greedy", "processor", tmp_path / "p").is_dir()

    def test_other_kinds_and_none_are_refused(self):
        assert "sampler" in failing("plugins", "new", "x", "--kind", "samplers", code=2)
        assert "--kind" in failing("plugins", "new", "x", code=2)

    def test_a_folder_that_is_there_is_left_alone(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        for path in list(tmp_path.iterdir()):
            line = failing("plugins", "new", "x", "--kind", "sampler", "--out", path, code=1)
            assert f"{path} exists already" in line
        assert {path.name for path in tmp_path.iterdir()} == {"empty", "dangling"}

    def test_a_folder_that_cannot_be(self, tmp_path):
        (tmp_path / "file").touch()
        for parent in ("nowhere", "file"):
            out = tmp_path / parent / "p"
            line = failing("plugins", "new", "x", "--kind", "sampler", "--out", out, code=1)
            assert f"no folder {tmp_path / parent}" in line

    def test_nothing_half_written_is_left(self, tmp_path, monkeypatch):
        written = []

        def disk_full(self, text, **_):
            written.append(self)
            if len(written) == 3:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", disk_full)
        with pytest.raises(gptk.PluginError, match="p cannot be written: No space left"):
            write_package("x", "sampler", tmp_path / "p")
        assert list(tmp_path.iterdir()) == []

    def test_templates_are_neither_tests_nor_modules(self):
        folder = Path(gptk.scaffold.__file__).parent
        names = {path.name for path in folder.rglob("*") if path.is_file()}
        assert {name for name in names if name.endswith(".py")} == {"__init__.py"}


COLDEST = """
import click
import gptk

class Coldest(gptk.Sampler):
    "Always the least likely token."
    name = "coldest"

    def step(self, logits, rows):
        return gptk.Choice.one_each(logits.argmin(dim=-1), logits, rows)

@gptk.hookimpl
def gptk_samplers():
    return [Coldest]

@click.command("hello")
def hello():
    "Say hello."
    click.echo("hello from a file")

@gptk.hookimpl
def gptk_commands():
    return [hello]
"""


@pytest.fixture
def coldest(tmp_path):
    path = tmp_path / "coldest.py"
    path.write_text(COLDEST)
    return path


@pytest.mark.usefixtures("forgotten")
class TestAFile:
    """`gptk --plugin FILE.py COMMAND`."""

    def test_it_serves_the_command_that_it_is_given_to(self, coldest, tmp_path):
        tiny_lm().save(tmp_path / "model")
        out = run_gptk(
            "--plugin", coldest, "generate", "abc", "--model", tmp_path / "model",
            "--sampler", "coldest", "--max-new-tokens", 3, "--json",
        )  # fmt: skip
        assert out.returncode == 0, out.stderr
        assert json.loads(out.stdout)["settings"]["sampler"] == "coldest"

    def test_plugins_lists_it_with_its_file(self, coldest):
        listed = run_gptk("--plugin", coldest, "plugins")
        (row,) = [line for line in listed.stdout.splitlines() if " coldest " in line]
        assert str(coldest) in row.replace("\n", "")
        shown = run_gptk("--plugin", coldest, "plugins", "show", "coldest")
        assert "Always the least likely token." in shown.stdout

    def test_it_may_follow_any_command(self, coldest, tmp_path):
        assert " coldest " in run_gptk("plugins", "--plugin", coldest).stdout
        shown = run_gptk("plugins", "show", "coldest", "--plugin", coldest, "--debug")
        assert "Always the least likely token." in shown.stdout
        words = (
            "detect-watermark",
            "some text",
            "--tokenizer",
            "bytes",
            f"--plugin={coldest}",
            "--debug",
        )
        assert "not watermarked" in run_gptk(*words).stdout
        for command in ("tokenize", "repeat", "generate", "train", "plot", "detect-watermark"):
            line = failing(command, "x", "--plugin", "none.py", code=1)
            assert line == "gptk: none.py: there is no such file"

    def test_its_options_under_other_names_may_follow_it(self, coldest, tmp_path):
        tiny_lm().save(tmp_path / "model")
        coldest.write_text(COLDEST.replace(
            'name = "coldest"', 'name = "coldest"\n    other_names = {"do_freeze": ""}'
        ))  # fmt: skip
        words = ("--do-freeze", "abc", "--model", tmp_path / "model", "--json", "--max-tokens", 2)
        out = run_gptk("generate", "--plugin", coldest, *words)
        assert out.returncode == 0, out.stderr
        assert json.loads(out.stdout)["settings"]["sampler"] == "coldest"

    def test_an_option_of_a_command_that_has_the_same_name_stays_the_commands(self, coldest):
        coldest.write_text(COLDEST.replace(
            'def hello():', '@click.option("--debug", default="")\ndef hello(debug):'
        ).replace('"hello from a file"', 'debug'))  # fmt: skip
        assert run_gptk("--plugin", coldest, "hello", "--debug", "me").stdout == "me\n"

    def test_it_may_add_a_command(self, coldest):
        assert run_gptk("--plugin", coldest, "hello").stdout == "hello from a file\n"

    def test_its_command_that_fails_is_named(self, coldest):
        coldest.write_text(COLDEST.replace('click.echo("hello from a file")', "return 1 / 0"))
        line = failing("--plugin", coldest, "hello", code=1)
        assert (
            line == f"gptk: command hello of {coldest} failed: ZeroDivisionError: division by zero"
        )

    def test_several_files(self, coldest, tmp_path):
        other = tmp_path / "other" / "coldest.py"  # the same file name
        other.parent.mkdir()
        other.write_text(COLDEST.replace("coldest", "hottest").replace('"hello"', '"hi"'))
        out = run_gptk("--plugin", coldest, "--plugin", other, "hi")
        assert out.stdout == "hello from a file\n", out.stderr
        assert "hottest" in plugins.provided("sampler")
        assert "coldest" in plugins.provided("sampler")

    def test_no_file_is_loaded_unless_it_is_asked_for(self, coldest, monkeypatch):
        code = (
            "import sys; sys.argv = ['gptk', '--plugin', 'coldest.py', '--help']\n"
            "from gptk.cli import main\n"
            "try:\n    main()\n"
            "except SystemExit as end:\n"
            "    assert end.code == 0 and not {'torch', 'gptk.plugins'} & set(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=coldest.parent)
        monkeypatch.chdir(coldest.parent)
        assert "no sampler is called 'coldest'" in failing(
            "generate", "a", "--sampler", "coldest", code=2
        )

    def test_python_m_gptk_takes_files_too(self, coldest):
        out = subprocess.run(
            [sys.executable, "-m", "gptk", "--plugin", "coldest.py", "hello"],
            capture_output=True, text=True, cwd=coldest.parent, check=False,
        )  # fmt: skip
        assert out.stdout == "hello from a file\n", out.stderr
        assert list(coldest.parent.iterdir()) == [coldest]  # no __pycache__

    def test_a_file_that_is_taken_in_again_is_read_again(self, coldest, taken_in):
        first = taken_in(coldest)
        coldest.write_text(COLDEST.replace("Always", "Almost always"))
        second = taken_in(coldest)
        assert second.__name__ == first.__name__ == "gptk_file_coldest"
        assert "Almost" in plugins.summary(plugins.find("sampler", "coldest").item)

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            ("none.py", None, "none.py: there is no such file"),
            ("text.txt", "", "text.txt is not a .py file"),
            ("folder.py", ..., "folder.py is a directory"),
            ("x.py", "import gptk\n\nname\n", "x.py, line 3: NameError: name 'name' is not"),
            ("x.py", "def f():\n  g()\n\nf()\n", "x.py, line 2: NameError: name 'g' is not"),
            ("x.py", "import gptk\nclass X\n", "x.py, line 2: SyntaxError: expected ':'"),
            ("x.py", "\nimport nowhere.at_all\n", "x.py, line 2: ModuleNotFoundError: No module"),
            ("x.py", "\n\nexit(3)\n", "x.py, line 3: SystemExit: 3"),
            ("x.py", "import gptk\nraise gptk.GptkError\n", "x.py, line 2: GptkError"),
            ("x.py", "GPTK_API = 2\nimport gptk\n@gptk.hookimpl\ndef gptk_samplers(): ...\n",
             "x.py: it was built for version 2 of gptk's hooks"),
            ("x.py", "", "x.py: it has no hook, so gptk finds nothing in it; add a function "
             "gptk_samplers() that returns a list of its classes, with @gptk.hookimpl above it"),
            ("x.py", "import gptk\nclass Mine(gptk.LRScheduler):\n    name = 'mine'\n",
             "add a function gptk_lr_schedulers() that returns [Mine], with @gptk.hookimpl"),
            ("x.py", "def gptk_scorers():\n    return []\n",
             "x.py: it has no hook of gptk's: gptk_scorers is not marked as a hook; write "
             "@gptk.hookimpl above it"),
            ("x.py", "import gptk\n@gptk.hookimpl\ndef gptk_sampler():\n    return []\n",
             "x.py: it has no hook of gptk's: there is no hook gptk_sampler; did you mean"),
            ("x.py", "GPTK_API = '1'\nimport gptk\n@gptk.hookimpl\ndef gptk_samplers(): ...\n",
             "x.py: GPTK_API is '1'; it must be the version of gptk's hooks that the plug-in was "
             "built for, a whole number such as 1"),
            ("x.py", COLDEST.replace('"coldest"', '"greedy"'),
             "two samplers are called 'greedy': one from gptk-decoding "),
            ("x.py", "import gptk\n@gptk.hookimpl\ndef gptk_samplers():\n    return 1 / 0\n",
             "hook gptk_samplers of x.py: ZeroDivisionError"),
            ("x.py", COLDEST.replace('"hello"', '"train"'), "gptk has a command train of its own"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_with_a_file_is_told(self, file, text, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        if text is ...:
            Path(file).mkdir()
        elif text is not None:
            Path(file).write_text(text)
        line = failing("--plugin", file, "plugins", code=1)
        assert message in line
        assert plugins.failures() == []
        assert not any(name.startswith("gptk_file_x") for name in sys.modules)

    def test_one_that_fails_at_work_is_named_with_its_line(self, coldest, tmp_path):
        tiny_lm().save(tmp_path / "model")
        coldest.write_text(COLDEST.replace("argmin(dim=-1)", "argmin(dim=7)"))
        out = run_gptk(
            "--plugin", coldest, "generate", "abc", "--model", tmp_path / "model",
            "--sampler", "coldest",
        )  # fmt: skip
        assert out.returncode == 1
        line = out.stderr.splitlines()[-1]
        assert f"sampler coldest of {coldest} (hook gptk_samplers) failed in" in line
        assert "line 10 of gptk_file_coldest: IndexError" in line


def use(kind, environment, folder, data):
    """Use the installed plug-in by its name, from the command line; returns what that says."""
    tiny = [f"{key}={json.dumps(value)}" for key, value in TINY_RUN.items()] + [f"data={data}"]
    settings = [part for line in tiny for part in ("--set", line.replace('"', ""))]
    model = folder / "model"
    in_training = {"regularizer": "regularizers", "training-observer": "observers"}
    if kind in ("scheduler", "regularizer", "tokenizer", "training-observer"):
        key = in_training.get(kind, kind)
        run = ["--out", folder / "run", *settings, "--set", f"{key}=runner-up"]
        run += ["--set", "log_every=1"]
        environment.run("gptk", "train", *run)
        if kind == "training-observer":
            assert (folder / "run" / "losses.csv").read_text().startswith("1,")
        return (folder / "run" / "config.toml").read_text()
    tiny_lm().save(model)
    how = ["--model", model, "--sampler", "multinomial"]
    if kind == "command":
        out = environment.run("gptk", "runner-up", "abc", "--model", model, "--top", 3)
        assert len(out.stdout.splitlines()) == 3
        return environment.run("gptk", "runner-up", "--help").stdout
    if kind == "metric":
        out = environment.run(
            "gptk", "compare", "abc", *how, "--metric", "runner-up", "--max-new-tokens", 3, "--json"
        )
        assert 0 <= json.loads(out.stdout)["samplers"][0]["metrics"]["runner-up"] <= 3
        return out.stdout
    if kind == "writer":
        gptk.LanguageModel(tiny_gpt(GPT2_LIKE)).save(folder / "bare")
        environment.run("gptk", "convert", folder / "bare", folder / "out", "--to", "runner-up")
        how = ["--model", folder / "out", "--tokenizer", "bytes"]
    elif kind == "loader":
        model = folder / "model.runner-up"
        config = json.dumps(dataclasses.asdict(GPT2_LIKE))
        state = {name: p.detach() for name, p in tiny_gpt(GPT2_LIKE).named_parameters()}
        save_file(state, model, metadata={"config": config})
        how = ["--tokenizer", "bytes", "--model", f"runner-up:path={model}"]
    elif kind == "scorer":
        how = ["--model", model, "--sampler", "best-of-n:n=2,scorer=runner-up"]
    elif kind == "sampler":
        how = ["--model", model, "--sampler", "runner-up"]
    elif kind == "decoding-observer":
        how += ["--observer", "runner-up"]
    elif kind == "drafter":
        how += ["--draft", "runner-up"]
    elif kind == "constraint":
        how += ["--processor", "runner-up:characters=abc"]
    else:
        how += [f"--{kind}", "runner-up"]
    out = environment.run("gptk", "generate", "abc", *how, "--max-new-tokens", 3, "--json")
    assert len(json.loads(out.stdout)["tokens"]) <= 3
    if kind == "decoding-observer":
        assert "mean entropy" in out.stderr
    return out.stdout


@pytest.mark.slow
@KINDS
def test_a_new_package_installs_passes_its_tests_and_works(kind, tmp_path, data):
    environment = fresh_environment(tmp_path / "environment")
    folder = tmp_path / "package"
    environment.run("gptk", "plugins", "new", "runner-up", "--kind", kind, "--out", folder)
    environment.install(f"{folder}[test]", editable=True)
    tested = environment.run("pytest", "-p", "no:cacheprovider", cwd=folder)
    assert " passed" in tested.stdout
    assert not {" failed", " warning"} & {
        f" {word.strip(',')}" for word in tested.stdout.splitlines()[-1].split()
    }
    listed = environment.run("gptk", "plugins")
    listed_as = "processor" if kind == "constraint" else kind
    assert [listed_as, "runner-up", "gptk-runner-up", "0.1.0"] in [
        line.split()[:4] for line in listed.stdout.splitlines()
    ]
    assert listed.stderr == ""
    said = use(kind, environment, tmp_path, data)
    assert "runner-up" in said or kind in ("loader", "writer", "decoding-observer", "drafter")


@pytest.mark.slow
def test_the_wheel_has_the_templates(tmp_path):
    root = Path(__file__).parents[2]
    environment = fresh_environment(tmp_path / "environment")
    wheels = tmp_path / "wheels"
    environment.run(
        "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
        "--wheel-dir", wheels, root,
    )  # fmt: skip
    with zipfile.ZipFile(*wheels.iterdir()) as wheel:
        packed = {name for name in wheel.namelist() if name.endswith(".template")}
    toolkit = root / "toolkit"
    assert packed == {str(path.relative_to(toolkit)) for path in toolkit.rglob("*.template")}
    assert len(packed) == 4 + 3 * len(SCAFFOLDS)
