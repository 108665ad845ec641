"""Plug-in files with faults: each is refused, or blamed by name, in one line."""

import random
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

from gptk.scaffold import SCAFFOLDS, TEMPLATES, write_package

VALUES = [
    *("None", "0", "-1", "1.5", "True", "''", "'x'", "[]", "[1, 2]", "{}", "()", "...", "object()"),
    *("float('nan')", "float('inf')", "int", "gptk", "lambda *a, **k: None", "torch.zeros(0)"),
    *("torch.zeros(1)", "torch.zeros(3, 5)", "torch.full((2,), 10**9)", "torch.ones(2).half()"),
    *("torch.ones(2, dtype=torch.int64)", "torch.zeros(2, device='meta')", "numpy.zeros(3)"),
    *("logits[:1]", "logits.half()", "logits.double()", "logits.numpy()", "logits * torch.nan"),
    *("logits.tolist()", "-logits", "logits[0]", "logits.expand(3, *logits.shape)", "self"),
    *("type(self)", "(i for i in range(3))", "Exception('made')", "run", "rows", "tokens.float()"),
]
STATEMENTS = [
    *("raise KeyError('oh')", "raise Exception", "import sys; sys.exit()", "raise BaseException"),
    *("assert False", "1 / 0", "return", "yield", "print('loud')", "del self", "raise ValueError"),
    *("logits.zero_()", "rows.lengths.clear()", "rows.lengths = None", "self.seen = 1"),
    *("raise gptk.OptionError('bad')", "raise StopIteration", "self = None"),
    *("rows.extend(rows.tokens[:, :1])", "raise RecursionError", "return await None"),
    "raise type('Odd', (Exception,), {'__str__': lambda s: 1 / 0})",
]
LINES = [
    *("name = 'other'", "name = None", "name = 3", "name: str = 'x'", "name = 'greedy'"),
    *("strength = 1.0", "strength: float", "strength: 'Nowhere' = 1", "kind = 'sampler'"),
    *("def __init__(self): ...", "def __init__(self, **o): self.o = o", "example = 3"),
    *("def __new__(cls, **o): return object()", "model_config = {'frozen': False}", "random = 7"),
    *("def __getattribute__(self, name): raise KeyError(name)", "def __eq__(self, o): return o"),
    *("def max_rows(self, n): return None", "def max_rows(self, n): return -3"),
    *("def start(self, run): return 3", "def start(self): ...", "async def start(self, run): ..."),
    *("def rank(self, score, length): return None", "def pick(self, results, n): return [None]"),
    *("def refuses_draft(self): return 3", "def hidden_layers(self, config): return [99]"),
    *("def processors(self): return [None]", "groups = 0", "competing = True", "competing = 'x'"),
    *("def is_complete(self, tokens, rows): return rows", "def spec(self): ...", "title = None"),
    *("def is_done(self, *a): return 1 / 0", "def __repr__(self): raise ValueError('repr')"),
    "def __hash__(self): raise TypeError('hash')",
]


def mutated(rng: random.Random, source: str) -> str:
    """A plug-in's source with one to three faults that people make, or might."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        lines = source.split("\n")
        kind = rng.randrange(9)
        places = [i for i, line in enumerate(lines) if line.strip()]
        place = rng.choice(places)
        line, indent = lines[place], re.match(r" *", lines[place])[0]
        inside = [i for i in places if lines[i].startswith(" " * 8)]
        members = [i for i in places if re.match(r" {4}(name|example|def )", lines[i])]
        if kind == 0:
            source = re.sub(r"return .*", lambda _: f"return {rng.choice(VALUES)}", source, count=1)
        elif kind == 1:
            returns = [i for i in places if "return " in lines[i] or " = " in lines[i]]
            place = rng.choice(returns)
            begin = re.match(r".*?(return | = )", lines[place])[0]
            lines[place] = begin + rng.choice(VALUES)
            source = "\n".join(lines)
        elif kind == 2:
            del lines[place]
            source = "\n".join(lines)
        elif kind == 3 and inside:
            place = rng.choice(inside)
            indent = re.match(r" *", lines[place])[0]
            lines.insert(place, indent + rng.choice(STATEMENTS))
            source = "\n".join(lines)
        elif kind == 4 and members:
            lines.insert(rng.choice(members), f"    {rng.choice(LINES)}")
            source = "\n".join(lines)
        elif kind == 5:
            name = rng.choice(re.findall(r"\b[a-z_]{3,}\b", source))
            other = rng.choice(["", name + "x", name[:-1], name.upper(), "None", "x.y", "rows"])
            source = re.sub(rf"\b{name}\b", other, source, count=rng.choice([1, 0]))
        elif kind == 6:
            other = rng.choice(["", "self", "self, *rest", "self, x", "self, input_ids, scores"])
            source = re.sub(r"\(self, [^)]*\)", f"({other})", source, count=rng.choice([1, 0]))
        elif kind == 7:
            lines.insert(place, indent + rng.choice(STATEMENTS))
            source = "\n".join(lines)
        else:
            lines[place] = line.replace("def ", rng.choice(["async def ", "def x_", "class "]))
            source = "\n".join(lines)
    return f"import numpy\nimport torch\n{source}"


FINE = """
import gptk

class Mine(gptk.Sampler):
    name = "mine"

    def step(self, logits, rows):
        return gptk.Choice.one_each(logits.argmax(-1), logits, rows)

@gptk.hookimpl
def gptk_samplers():
    return [Mine]
"""


def make(rng: random.Random) -> tuple[str, str]:
    """The kind of a plug-in, and its source."""
    kind = rng.choice(sorted(set(SCAFFOLDS)))
    template = (TEMPLATES / kind / "plugin.py.template").read_text(encoding="utf-8")
    filled = template.replace("$$", "$")
    for name, value in (("api", "1"), ("name", "mine"), ("cls", "Mine"), ("function", "mine")):
        filled = filled.replace(f"${name}", value).replace(f"${{{name}}}", value)
    return kind, mutated(rng, filled)


def run(plugin: tuple[str, str]) -> None:
    import gptk
    from gptk import plugins
    from gptk.testing import tiny_lm

    kind, source = plugin
    file = Path(tempfile.mkdtemp()) / "mine.py"
    file.write_text(source, encoding="utf-8", errors="surrogatepass")
    before = set(plugins.manager().get_plugins())
    lm = tiny_lm()
    settings = {
        "sampler": {"sampler": "mine"},
        "processor": {"processors": ["mine"], "sampler": "multinomial"},
        "constraint": {"processors": ["mine"], "sampler": "beam:width=2"},
        "drafter": {"draft": "mine"},
        "scorer": {"sampler": "best-of-n:n=2,scorer=mine"},
        "decoding-observer": {"observers": ["mine"]},
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plugins.register_file(file)
            if kind in settings:
                lm.generate_batch(["abab", "c"], max_new_tokens=4, seed=0, **settings[kind])
            elif kind == "metric":
                gptk.compare(lm, ["abab", "c"], ["greedy"], max_new_tokens=4, metrics=["mine"])
            elif kind == "tokenizer":
                gptk.load_tokenizer("mine").encode("größer")
            elif kind in ("loader", "writer"):
                gptk.load("nowhere.mine")
            plugins.failures()
    except gptk.GptkError as error:
        # Whose fault it is must be said.
        if "mine" not in str(error).lower() and not isinstance(error, gptk.OptionError):
            raise AssertionError(f"the plug-in is not named: {error}") from error
    finally:
        for added in set(plugins.manager().get_plugins()) - before:
            plugins.unregister(added)
        for name in [name for name in sys.modules if name.startswith("gptk_file_")]:
            del sys.modules[name]
        shutil.rmtree(file.parent)


def test_plugin_files(attack):
    # Kernels are compiled, and plug-ins found, before an input's time begins.
    run(("sampler", FINE))
    attack(make, run, plugin_errors=True)


def test_the_sources_work_before_they_are_mutated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in SCAFFOLDS:
        rng = random.Random(0)
        monkeypatch.setattr("test_plugin_files.mutated", lambda _, source: source)
        monkeypatch.setattr(rng, "choice", lambda _, kind=kind: kind)
        made_kind, source = make(rng)
        folder = write_package("mine", kind, tmp_path / kind)
        (path,) = (folder / "src").glob("*/__init__.py")
        assert (made_kind, source) == (kind, path.read_text(encoding="utf-8"))
        run((kind, source))
