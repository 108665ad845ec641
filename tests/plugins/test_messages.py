"""What the authors and users of plug-ins get wrong is told in one line that says what to do."""

import os
import sys

import numpy as np
import pytest

import gptk
from gptk import plugins
from gptk.testing import tiny_lm

LM = tiny_lm()
HEAD = "import gptk\nimport numpy as np\nimport torch\n"


def line_of(error):
    assert "\n" not in str(error)
    return str(error)


SAMPLER = "class Mine(gptk.Sampler):\n    name = 'mine'\n"
PROCESSOR = "class Mine(gptk.LogitsProcessor):\n    name = 'mine'\n"
START = ", and keep what a run must remember in an object that start() returns"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            SAMPLER + "    def __init__(self, t=1.0):\n        self.t = t\n",
            "Mine defines __init__(), but gptk makes a plug-in of its options alone; declare "
            f"options as fields, `strength: float = 1.0`{START}",
        ),
        (
            "class Mine(gptk.Scorer):\n    name = 'mine'\n    def __init__(self): ...\n",
            "declare options as fields, `strength: float = 1.0`",
        ),
        (
            PROCESSOR + "    def __call__(self, input_ids, scores):\n        return scores\n",
            "Mine.__call__() takes self, input_ids, scores, as transformers' processors do; gptk's "
            "take logits, rows. gptk.adapters.transformers.from_transformers takes",
        ),
        (
            SAMPLER + "    strength = 1.0\n",
            "strength of Mine has no type; declare an option with one, as in "
            "`strength: float = 1.0`, and what is none as `ClassVar`",
        ),
        (SAMPLER + "    words = []\n", "words of Mine has no type"),
        (SAMPLER + "    async def step(self, logits, rows): ...\n", "Mine.step() is async, and"),
        (SAMPLER + "    async def start(self, run):\n        yield 1\n", "Mine.start() is async"),
        (SAMPLER + "    random: bool = True\n", "write `random = …` without a type"),
        (SAMPLER + "    start: int = 3\n", "declares `start` as an option, which Sampler has"),
        (SAMPLER + "    spec: str = ''\n", "declares `spec` as an option, which Plugin has"),
    ],
)
def test_a_class_that_cannot_be_is_told_where_it_is_defined(source, message):
    with pytest.raises(gptk.PluginError) as caught:
        exec(HEAD + source, {})
    assert message in line_of(caught.value)


def test_a_subclass_may_declare_its_bases_options_anew():
    class Slower(gptk.LRScheduler):
        name = "slower"
        warmup: int = 5

    class Slowest(Slower):
        name = "slowest"
        warmup: int = 9

    assert Slowest().warmup == 9


def made(body):
    """An instance of the class Mine whose method has the body."""
    module = {"__name__": "a_module"}
    exec(HEAD + body, module)
    return module["Mine"]()


def sampler(returns):
    text = f"{SAMPLER}    random = True\n    def step(self, logits, rows):\n        {returns}\n"
    return {"sampler": made(text)}


def processor(returns):
    text = f"{PROCESSOR}    def __call__(self, logits, rows):\n        {returns}\n"
    return {"processors": [made(text)], "sampler": "multinomial"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            sampler("return gptk.Choice.one_each(logits[:1].argmax(-1), logits, rows)"),
            "ValueError: 1 token for 2 rows; there must be one for each, (rows,)",
        ),
        (
            sampler("t = torch.zeros(1); return gptk.Choice(t.long(), t, t)"),
            "sampler mine chose 1 token for 2 rows; only competing rows may be dropped or forked",
        ),
        (
            sampler("return gptk.Choice.one_each(logits.argmax(-1)[:, None], logits, rows)"),
            "ValueError: tokens of shape (2, 1) for 2 rows",
        ),
        (
            sampler("return gptk.Choice.one_each(logits.argmax(-1).tolist(), logits, rows)"),
            "TypeError: the tokens are [",
        ),
        (
            sampler("return gptk.Choice.one_each(logits.argmax(-1).numpy(), logits, rows)"),
            "they must be a tensor",
        ),
        (
            sampler("return gptk.Choice.one_each(logits.amax(-1), logits, rows)"),
            "TypeError: the tokens are of type torch.float32; they must be whole numbers",
        ),
        (sampler("logits.argmax(-1)"), "sampler mine returned None; it must return a gptk.Choice"),
        (sampler("return logits.numpy()"), "sampler mine returned array("),
        (sampler("return gptk.Choice"), "sampler mine returned <class "),
        (sampler("raise SystemExit"), "failed in Mine.step, line 8 of a_module: SystemExit"),
        (processor("logits * 2"), "processor mine returned None; it must return logits of shape"),
        (processor("return logits.numpy()"), "processor mine returned array("),
        (processor("return logits.tolist()"), "processor mine returned [["),
        (processor("return logits[:1]"), "returned shape (1, 257) and type torch.float32 on"),
        (processor("return logits.double()"), "and type torch.float64 on cpu; it must return"),
        (processor("return logits.half()"), "and type torch.float16 on cpu; it must return"),
        (processor("return logits.to('meta')"), "on meta; it must return"),
        (processor("return logits * torch.nan"), "processor mine gave logits that are not numbers"),
    ],
)  # fmt: skip
def test_what_a_method_returns_is_told(settings, message):
    with pytest.raises(gptk.GptkError) as caught:
        LM.generate("a", n=2, **settings, max_new_tokens=3)
    assert message in line_of(caught.value)


class Mine(gptk.Sampler):
    """Greedy."""

    name = "mine"

    def step(self, logits, rows):
        return gptk.Choice.one_each(logits.argmax(-1), logits, rows)


def transformers_processor():
    from transformers import TemperatureLogitsWarper

    return TemperatureLogitsWarper(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": Mine}, "Mine is a class; a sampler is an instance, Mine()"),
        ({"sampler": 3}, "a sampler is a spec string or a Sampler, not 3"),
        (
            {"processors": [Mine()]},
            "a processor is a spec string or a LogitsProcessor, and sampler mine is a sampler",
        ),
        (
            {"processors": [transformers_processor()]},
            "; gptk.adapters.transformers.from_transformers takes transformers' processors",
        ),
        ({"sampler": np.zeros((3, 3))}, "a sampler is a spec string or a Sampler, not array([["),
    ],
)
def test_what_is_given_for_a_plugin_is_told(settings, message):
    with pytest.raises(gptk.OptionError) as caught:
        LM.generate("a", **settings, max_new_tokens=1)
    assert message in line_of(caught.value)


ROWS = ["lengths", "prompt_lengths", "prompts", "streams", "scores", "logprobs", "groups"]
ROWS += ["eos", "tokenizer", "model"]


@pytest.mark.parametrize("name", ROWS)
def test_a_plugin_that_assigns_what_the_rows_have_is_named_and_no_other(name):
    class Mine(gptk.LogitsProcessor):
        name = "mine"

        def __call__(self, logits, rows):
            setattr(rows, name, None)
            return logits

    for sampler in ("multinomial", "beam", "contrastive"):
        with pytest.raises(gptk.PluginError) as caught:
            LM.generate("abab", sampler=sampler, processors=[Mine()], max_new_tokens=2)
        assert "processor mine of module" in line_of(caught.value)
        assert f"property '{name}' of 'Rows' object has no setter" in line_of(caught.value)


def test_a_class_that_the_instance_comes_of_can_be_set_nothing():
    with pytest.raises(gptk.PluginError) as caught:
        Mine().seen = 3
    assert line_of(caught.value) == (
        "sampler mine cannot be changed (by setting seen): it may serve several calls at once. "
        f"Options are given when it is made{START}"
    )


class TestWhoseFaultItIs:
    """A built-in plug-in that fails is a fault of gptk; interrupts and lack of memory are none."""

    def failing(self, monkeypatch, error):
        item = plugins.find("sampler", "greedy").item
        name = "advance" if "advance" in vars(item) else "step"

        # Its code is in the built-in's module.
        code = compile("def fail(*_):\n    raise error\n", "greedy.py", "exec")
        module = dict(vars(sys.modules[item.__module__]), error=error)
        exec(code, module)
        monkeypatch.setattr(item, name, module["fail"])

    def test_a_built_in_is_to_be_reported(self, monkeypatch):
        self.failing(monkeypatch, KeyError("oh"))
        with pytest.raises(gptk.InternalError) as caught:
            LM.generate("a", sampler="greedy", max_new_tokens=1)
        said = line_of(caught.value)
        assert said.startswith(f"sampler greedy of {gptk.distribution.NAME} ")
        assert said.endswith("KeyError: 'oh'; this is a fault of gptk itself, please report it")

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit()])
    def test_an_interrupt_passes(self, error, monkeypatch):
        self.failing(monkeypatch, error)
        with pytest.raises(type(error)):
            LM.generate("a", sampler="greedy", max_new_tokens=1)

    def test_lack_of_memory_passes(self, monkeypatch):
        self.failing(monkeypatch, MemoryError())
        with pytest.raises((MemoryError, gptk.GptkError)) as caught:
            LM.generate("a", sampler="greedy", max_new_tokens=1)
        assert not isinstance(caught.value, gptk.PluginError | gptk.InternalError)
        assert "fault" not in str(caught.value)


FILE = """
import gptk

class First(gptk.Sampler):
    "Greedy."
    name = "{name}"

    def step(self, logits, rows):
        return gptk.Choice.one_each(logits.argmax(-1), logits, rows)

@gptk.hookimpl
def gptk_samplers():
    return [First]
"""


@pytest.fixture
def register_file():
    """Registers files until the test ends."""
    registered = []

    def register(path):
        registered.append(plugins.register_file(path))
        return registered[-1]

    yield register
    for module in registered:
        plugins.unregister(module)
        sys.modules.pop(module.__name__, None)


class TestAFile:
    """register_file, with a file that is broken, mended, moved, or none."""

    def test_one_that_is_broken_and_mended(self, tmp_path, register_file):
        path = tmp_path / "x.py"
        path.write_text(FILE.format(name="first"))
        first = register_file(path)
        for broken in ("import nowhere\n", "class\n", "x = 1\n", FILE.format(name="greedy")):
            path.write_text(broken)
            with pytest.raises(gptk.PluginError, match=r"x\.py"):
                register_file(path)
            assert plugins.find("sampler", "first").item is first.First
            assert sys.modules[first.__name__] is first
            assert plugins.failures() == []
        path.write_text(FILE.format(name="second"))
        second = register_file(path)
        assert plugins.find("sampler", "second").item is second.First
        assert "first" not in plugins.provided("sampler")

    def test_the_same_file_twice_by_other_paths(self, tmp_path, register_file, monkeypatch):
        (tmp_path / "folder").mkdir()
        (tmp_path / "x.py").write_text(FILE.format(name="first"))
        monkeypatch.chdir(tmp_path)
        names = {register_file(p).__name__ for p in ("x.py", "./x.py", "folder/../x.py")}
        names |= {register_file(tmp_path / "x.py").__name__}
        assert names == {"gptk_file_x"}
        assert plugins.failures() == []

    def test_a_relative_path_after_the_folder_has_changed(
        self, tmp_path, register_file, monkeypatch
    ):
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "x.py").write_text(FILE.format(name=name))
            monkeypatch.chdir(tmp_path / name)
            register_file("x.py")
        assert {"one", "two"} <= set(plugins.provided("sampler"))

    def test_one_name_from_two_files(self, tmp_path, register_file):
        for file in ("x.py", "y.py"):
            (tmp_path / file).write_text(FILE.format(name="first"))
        register_file(tmp_path / "x.py")
        with pytest.raises(gptk.PluginError) as caught:
            register_file(tmp_path / "y.py")
        said = line_of(caught.value)
        assert "two samplers are called 'first': one from " in said
        assert f"{tmp_path}/x.py, one from {tmp_path}/y.py; rename or uninstall one" in said
        assert "first" in plugins.provided("sampler")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"\xff\xfe\0", "x.py: SyntaxError: invalid or missing encoding declaration"),
            (b"\n\n\n# caf\xe9\n", "x.py: byte 8 is not utf-8"),
            (b"\0" * 9, "x.py"),
            (b"x = " + b"(" * 100_000, "x.py"),
            (b"#" * (2 << 20), "x.py has more than 1,048,576 bytes"),
            (b"raise BaseException('gone')\n", "x.py, line 1: BaseException: gone"),
            (b"import sys\nsys.exit()\n", "x.py, line 2: SystemExit"),
            (b"raise GeneratorExit\n", "x.py, line 1: GeneratorExit"),
            (b"import gptk\ngptk.hookimpl(3)\n", "x.py, line 2: AttributeError"),
        ],
        ids=range(9),
    )
    def test_what_is_wrong_with_its_content_is_told(self, content, message, tmp_path):
        (tmp_path / "x.py").write_bytes(content)
        with pytest.raises(gptk.PluginError) as caught:
            plugins.register_file(tmp_path / "x.py")
        assert message in line_of(caught.value)
        assert "gptk_file_x" not in sys.modules

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
    def test_a_fifo_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "x.py")
        with pytest.raises(gptk.PluginError, match=r"x\.py is a FIFO, not a file"):
            plugins.register_file(tmp_path / "x.py")

    def test_what_it_prints_does_not_get_among_results(self, tmp_path, register_file, capsys):
        (tmp_path / "x.py").write_text("print('loud')\n" + FILE.format(name="first"))
        register_file(tmp_path / "x.py")
        assert capsys.readouterr() == ("", "loud\n")

    def test_the_users_interrupt_passes(self, tmp_path):
        (tmp_path / "x.py").write_text("raise KeyboardInterrupt\n")
        with pytest.raises(KeyboardInterrupt):
            plugins.register_file(tmp_path / "x.py")
        assert "gptk_file_x" not in sys.modules
