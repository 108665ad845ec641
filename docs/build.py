"""Makes the reference pages from the plug-ins' own declarations.

    python docs/build.py           write pages anew; runs that are there are kept
    python docs/build.py --run     and make the missing runs, on SmolLM2
    python docs/build.py --run-all and make all runs anew: some minutes
    python docs/build.py --check   say which pages are out of date, and exit 1 if any is

A page has the plug-in's docstrings (with the formula and the paper), its options, and a run.
"""

import ast
import inspect
import itertools
import re
import shlex
import sys
import textwrap
from pathlib import Path

import gptk
import gptk.testing
from gptk.cli.plugins import _USES as COMMANDS
from gptk.hooks import hookspecs
from gptk.options import Options, option_help
from gptk.plugins.creating import create
from gptk.plugins.kinds import KINDS as PLUGIN_KINDS
from gptk.plugins.registry import provided, summary

DOCS = Path(__file__).parent
KINDS = {
    "sampler": "Samplers",
    "processor": "Logits processors",
    "drafter": "Drafters",
    "scorer": "Scorers",
}
FOLDERS = {kind: f"{kind}s" for kind in KINDS}
STORY = "Once upon a time there was a"
LIST = "Apples, pears, apples, pears, apples,"
FACT = "The capital of France is"
# What shows a plug-in best: the prompt and, for processors, the sampler. The rest has STORY.
PROMPTS = {
    ("sampler", "beam"): FACT,
    ("sampler", "dola"): "The three largest cities of Germany are",
    ("sampler", "contrastive"): "The three largest cities of Germany are",
    ("processor", "bad-words"): "My favourite colours are",
    ("processor", "cfg"): "A short poem about the sea:\n",
    ("processor", "choice"): "Is Paris the capital of France? Answer:",
    ("processor", "dry"): LIST,
    ("processor", "frequency-penalty"): LIST,
    ("processor", "grammar"): "Is Paris the capital of France? Answer: ",
    ("processor", "json-schema"): "Tom is 34 years old. As JSON: ",
    ("processor", "no-repeat-ngram"): LIST,
    ("processor", "presence-penalty"): LIST,
    ("processor", "regex"): "Call me at ",
    ("processor", "repetition-penalty"): LIST,
    ("processor", "sequence-bias"): "My favourite colours are",
    ("drafter", "lookup"): LIST,
    ("drafter", "model"): FACT,
}
GREEDY = {
    *("bad-words", "cfg", "choice", "dry", "forced-tokens", "frequency-penalty", "grammar"),
    *("json-schema", "length-decay", "logit-bias", "min-new-tokens", "no-repeat-ngram"),
    *("presence-penalty", "regex", "repetition-penalty", "sequence-bias", "suppress-tokens"),
}
NEW_TOKENS = 32
RUN = "## A run"


def main(arguments):
    again = "--run-all" in arguments
    pages = dict(made("--run" in arguments or again, again))
    wrong = [path for path, text in pages.items() if read(path) != text]
    gone = [
        path
        for folder in FOLDERS.values()
        for path in (DOCS / folder).glob("*.md")
        if path not in pages
    ]
    if "--check" in arguments:
        for path in wrong + gone:
            print(f"{path.relative_to(DOCS.parent)} is out of date: python docs/build.py --run")
        return bool(wrong or gone)
    for path in wrong:
        path.parent.mkdir(exist_ok=True)
        path.write_text(pages[path], encoding="utf-8")
    for path in gone:
        path.unlink()
    return 0


def made(run, again):
    """All pages, path and text."""
    lm = gptk.load("smollm2", device="cpu", dtype="float32") if run else None
    index = ["# Reference", "", "Made from the plug-ins' declarations by `docs/build.py`."]
    for kind, title in KINDS.items():
        index += ["", f"## {title}", "", "| name | what it does |", "| --- | --- |"]
        for one in provided(kind).values():
            if not one.distribution.startswith("gptk "):
                continue
            path = DOCS / FOLDERS[kind] / f"{one.name}.md"
            index.append(f"| [{one.name}]({path.relative_to(DOCS)}) | {summary(one.item)} |")
            yield path, page(kind, one, lm, again)
    yield DOCS / "reference.md", "\n".join(index) + "\n"
    yield DOCS / "combinations.md", combinations()
    yield DOCS / "hooks.md", hooks()
    yield DOCS / "contracts.md", contracts()
    yield DOCS / "api.md", api()


def read(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


def page(kind, one, lm, again):
    """A page in Markdown. Without a model to make a run, or unless again, the old one is kept."""
    item, spec = one.item, example(one)
    lines = [f"# {one.name}", "", f"{kind.capitalize()}. {summary(item)}", ""]
    lines += [inspect.getmodule(item).__doc__.strip(), "", "## Options", ""]
    rows = option_help(item)
    if rows:
        lines += ["| option | allowed | default | what it does |", "| --- | --- | --- | --- |"]
        cells = [[cell.replace("|", r"\|").replace("\n", r"\n") for cell in row] for row in rows]
        lines += [f"| `{name}` | {' | '.join(rest)} |" for name, *rest in cells]
    else:
        lines += ["None."]
    if kind == "scorer":
        return "\n".join([*lines, "", f"Used by best-of-n: `best-of-n:scorer={one.name}`.", ""])
    settings = arguments(kind, one.name, spec)
    prompt = PROMPTS.get((kind, one.name), STORY)
    command = " ".join(
        ["gptk generate", shlex.quote(prompt)]
        + [f"--{flag} {shlex.quote(value)}" for flag, value in settings]
        + [f"--max-new-tokens {NEW_TOKENS} --seed 0"]
    ).replace("\n", r"\n")
    lines += ["", RUN, "", "On SmolLM2-135M-Instruct, float32:", "", f"    {command}", ""]
    text = "\n".join(lines) + "\n"
    old = read(DOCS / FOLDERS[kind] / f"{one.name}.md")
    kept = old.partition(f"    {command}\n\n")[2]
    if lm is None or (kept and not again):
        return text + kept
    return text + result(lm, prompt, settings)


def result(lm, prompt, settings):
    out = lm.generate(prompt, **keywords(settings), max_new_tokens=NEW_TOKENS, seed=0)
    text = "\n".join(f"    {line}".rstrip() for line in (prompt + out.text).splitlines())
    note = f"{len(out.tokens)} tokens, score {out.score:.2f}, finish reason: {out.finish_reason}."
    return f"{text}\n\n{note}\n"


def example(one):
    return f"{one.name}:{one.item.example}" if one.item.example else one.name


def arguments(kind, name, spec):
    """Flags and values of the command that shows a plug-in."""
    if kind == "sampler":
        return [("sampler", spec)]
    if kind == "drafter":
        return [("draft", spec)]
    return [("sampler", "greedy" if name in GREEDY else "multinomial"), ("processor", spec)]


def keywords(settings):
    flags = dict(settings)
    if "processor" in flags:
        flags["processors"] = [flags.pop("processor")]
    return flags


def combinations():
    """What goes with what, from the samplers themselves."""
    lines = [COMBINATIONS_HEAD]
    lines += ["| sampler | results of a prompt | a draft |", "| --- | --- | --- |"]
    for one in provided("sampler").values():
        sampler = create("sampler", example(one), gptk.Sampler)
        results = "any number, drawn"
        try:
            sampler.max_rows(1000)
        except gptk.OptionError:
            most = sampler.max_rows(1)
            results = "one" if most == 1 else f"up to as many as it has rows, here {most}"
        reason = sampler.refuses_draft()
        draft = f"refused: {reason}" if reason else "the same tokens as without"
        lines.append(f"| [{one.name}](samplers/{one.name}.md) | {results} | {draft} |")
    return "\n".join([*lines, "", COMBINATIONS_TAIL])


COMBINATIONS_HEAD = """\
# What combines, and how exactly

Every sampler runs with every logits processor and every constraint, in batches of prompts of any
lengths, with and without the KV cache, and with a sliding window. `tests/test_matrix.py` runs
samplers × processors and constraints × drafts × batches. What holds in each case:

| with | what is exact |
| --- | --- |
| logits processors | Scores and `token_logprobs` are log-probabilities after all processors, \
the sampler's own included, and equal those of a teacher-forced pass over the text. |
| constraints | Every text is the beginning of a valid one, every text that ends by EOS is \
valid; `complete` says whether the text is valid as it stands. |
| a draft | The very tokens that come without a draft: greedy, and drawn ones for the same seed. |
| a batch | A prompt gives the same text alone and anywhere in a batch, for float32. |
| no KV cache | The same text, slowly. |
| `--overflow slide` | The model sees the last window of tokens, at positions from zero, with \
any sampler; past the window a draft guesses no more. |

Floating-point sums depend in their last bits on the shape of a batch, of a draft's guesses, and on
the cache; a text changes only where two tokens were as close as that. In float32 that is rare, in
bfloat16 less so.

## Samplers
"""
COMBINATIONS_TAIL = """\
`stochastic-beam` ranks by perturbed log-probabilities, its score; the sum of `token_logprobs` is
the log-probability. `best-of-n` ranks by its scorer. Beam searches with processors rank by
renormalized log-probabilities, in transformers by what the processors leave.

Processors work in the order in which they are named, so two that each leave something may leave
nothing together, such as `top-k` before a constraint. Then decoding ends with an error that names
the one that took out the last token. Named the other way round, the constraint comes first.

## Why it works

A strategy knows neither the others nor the model, but a session with rows that are extended,
selected (reordered, forked, dropped) and rewound. Whatever remembers a row follows the session: the
KV cache, a grammar's state, the counts of a penalty, mirostat's estimate, a draft's own session.
So when beams are reordered, their grammars are, too, and when guesses are dropped, so are their
counts.

A drawn token is a function of the row's stream, the position, and the logits. No step uses up
random numbers of another: not a neighbour's, not a dropped guess's. Hence a draft changes how many
passes the model makes and nothing else.
"""


def hooks():
    """The page of all hooks: each with its base class, what to override, and how to name it."""
    head = inspect.getdoc(hookspecs).partition("\n")[2].strip()
    head = as_fence(head, "python")
    lines = [HOOKS_HEAD.format(version=hookspecs.API_VERSION, head=head)]
    lines += ["| hook | for | base class |", "| --- | --- | --- |"]
    for kind in PLUGIN_KINDS.values():
        anchor = f"[`{kind.hook}`](#{kind.hook})"
        lines.append(f"| {anchor} | {kind.plural} | `{base_name(kind)}` |")
    for name, kind in PLUGIN_KINDS.items():
        lines += ["", *hook(name, kind)]
    return "\n".join(lines) + "\n"


def hook(name, kind):
    base = kind.base
    lines = [f"## {kind.hook}", "", inspect.getdoc(getattr(hookspecs, kind.hook)), ""]
    lines += [f"Returns a list of subclasses of `{base_name(kind)}`."]
    if name == "command":
        lines[-1] = "Returns a list of click commands: `@click.command()` makes one of a function."
    elif issubclass(base, Options):
        lines += ["", as_fence(inspect.getdoc(base)), "", *overridables(base)]
        for other in STATES.get(name, ()):
            lines += ["", f"**`gptk.{other.__name__}`**: {summary(other)}"]
            lines += ["", *overridables(other)]
    lines += ["", "Named:", "", f"- on the command line: `{COMMANDS[name].format('NAME')}`"]
    if name in FROM_PYTHON:
        lines += [f"- in Python: `{FROM_PYTHON[name]}`"]
    contract = f"{name.capitalize()}Contract"
    if contract in gptk.testing.__all__:
        lines += ["", f"Tested by `gptk.testing.{contract}`: [its promises](contracts.md)."]
    own = [one for one in provided(name).values() if one.distribution.startswith("gptk ")]
    return [*lines, "", f"Built in: {', '.join(map(linked, own))}."] if own else lines


def overridables(base):
    """A table of a class's methods and attributes, those first that must be given."""
    rows = []
    for attribute, value in list(vars(base).items()):
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if attribute in INHERITED:
            continue
        if inspect.isfunction(function):
            shape = signature(attribute, value, function)
            needed = "NotImplementedError" in inspect.getsource(function)
            if attribute.startswith("_") and not needed:
                continue
            rows.append((not needed, shape, first_sentence(function)))
        elif attribute in getattr(base, "__annotations__", {}) and attribute != "kind":
            said = attribute_docstrings(base).get(attribute, "")
            rows.append((True, f"`{attribute} = {value!r}`", said))
    lines = ["| to override | what it does |", "| --- | --- |"]
    for optional, shape, said in sorted(rows, key=lambda row: row[0]):
        lines.append(f"| {shape}{'' if optional else ' (needed)'} | {cell(said)} |")
    return lines if rows else []


def signature(name, value, function):
    """A method as a class would define it, without types."""
    if isinstance(value, property):
        return f"`{name}` (property)"
    parameters = [
        str(one.replace(annotation=one.empty))
        for one in inspect.signature(function).parameters.values()
    ]
    kind = " (class method)" if isinstance(value, classmethod) else ""
    return f"`{name}({', '.join(parameters)})`{kind}"


def attribute_docstrings(base):
    """The strings that stand below a class's attributes, their first sentences."""
    body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
    return {
        one.target.id: sentence(inspect.cleandoc(below.value.value))
        for one, below in itertools.pairwise(body)
        if isinstance(one, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


def first_sentence(function):
    return sentence(inspect.getdoc(function) or "")


def sentence(text):
    """The first paragraph, in a line."""
    return " ".join(text.partition("\n\n")[0].split())


def cell(text):
    return text.replace("|", r"\|")


def as_fence(text, language="py"):
    """A docstring with its indented code in fences. The tests run those of `python`."""
    lines, code = [], []
    for line in [*text.splitlines(), "", "end"]:
        if line.startswith("    ") or (code and not line):
            code.append(line)
            continue
        if code:
            block = textwrap.dedent("\n".join(code)).strip()
            block = re.sub(r"\n\n(?=class |def |@)", "\n\n\n", block)  # as ruff has it in files
            lines += [f"```{language}", block, "```", ""]
            code = []
        lines.append(line)
    return "\n".join(lines[:-1]).strip()


def base_name(kind):
    base = kind.base
    return f"gptk.{base.__name__}" if hasattr(gptk, base.__name__) else "click.Command"


def linked(one):
    folder = FOLDERS.get(one.kind)
    return f"[{one.name}]({folder}/{one.name}.md)" if folder else f"`{one.name}`"


INHERITED = {"model_config", "model_post_init"}
STATES = {
    "processor": [gptk.Follower],
    "drafter": [gptk.Draft],
    "decoding-observer": [gptk.DecodingListener],
    "training-observer": [gptk.TrainingListener],
}
"""What `start` of a kind returns."""
FROM_PYTHON = {
    "sampler": 'lm.generate(prompt, sampler="NAME")',
    "processor": 'lm.generate(prompt, processors=["NAME"])',
    "drafter": 'lm.generate(prompt, draft="NAME")',
    "scorer": 'lm.generate(prompt, sampler="best-of-n:scorer=NAME")',
    "decoding-observer": 'lm.generate(prompt, observers=["NAME"])',
    "scheduler": 'gptk.TrainConfig(scheduler="NAME")',
    "regularizer": 'gptk.TrainConfig(regularizers=["NAME"])',
    "training-observer": 'gptk.TrainConfig(observers=["NAME"])',
    "loader": 'gptk.load("NAME:path=FILE")',
    "tokenizer": 'gptk.load_tokenizer("NAME")',
}
HOOKS_HEAD = """\
# Hooks

Made from `toolkit/gptk/hooks/hookspecs.py` and the base classes by `docs/build.py`. [The
tutorial](tutorial.md) goes through one of them from the first line to a published package.

{head}

With this module named in your `pyproject.toml`, `gptk` finds what it provides by name:

```toml
[project.entry-points.gptk]
my-plugin = "my_plugin"
```

`gptk --plugin my_plugin.py …` takes in a single file instead, for this call only, and
`gptk.plugins.register(module)` a module in Python.

**The version of the hooks** is {version}. `GPTK_API = {version}` says which a plug-in was built
for; a gptk with another one refuses it in a sentence. A module without that line is taken.

**A class** has a `name` of letters, digits, dots and hyphens, and typed options: pydantic fields
with bounds, a default and a one-line `description`. The first line of its docstring is what
`gptk plugins` shows; `example = "key=value"` is what it suggests. Two distributions that give one
kind the same name are an error that names both. Instances never change and may serve several calls
at once: what is to be remembered goes into the object that `start` returns.

**What goes wrong** is told in a line that names the distribution, its version and the hook, and all
other plug-ins go on: a module that fails to import, or has no hook that is marked; a hook of a name
that there is not, with the nearest one; a class without a name; and, when it is at work, code that
raises an error, a method that is not there, and a value of another type than the table below says.
An observer that fails hears no more, and the run goes on.

**A name with options** is a spec string, `NAME:key=value,key=value`, on the command line, in Python
and in configuration files alike; in Python an instance of the class does as well.

Below, *(needed)* marks what a class must define; all the rest has a default.
"""


def contracts():
    """The page of the promises, from the contracts' docstrings."""
    lines = [CONTRACTS_HEAD]
    promised = {}
    for contract in map(vars(gptk.testing).get, gptk.testing.__all__):
        if not inspect.isclass(contract) or not issubclass(contract, gptk.testing.PluginContract):
            continue
        lines += ["", f"## {contract.__name__}", "", summary(contract)]
        base = contract.__bases__[0]
        if base is not object:
            lines[-1] += f" And all of [{base.__name__}](#{base.__name__.lower()})."
        if rows := to_set(contract):
            lines += ["", "| to set or override | what it is |", "| --- | --- |", *rows]
        own = [name for name in vars(contract) if name.startswith("test_")]
        lines += ["", "| promise | |", "| --- | --- |"]
        for name in own:
            words = name.removeprefix("test_").replace("_", " ")
            promised.setdefault(words, []).append((contract, getattr(contract, name)))
            said = cell(first_sentence(getattr(contract, name)))
            lines.append(f"| [{words}](#{words.replace(' ', '-')}) | {said} |")
    lines += ["", "## The promises"]
    for words in sorted(promised):
        lines += ["", f"### {words}"]
        for contract, function in promised[words]:
            lines += ["", f"**{contract.__name__}.** {inspect.getdoc(function)}"]
    return "\n".join(lines) + "\n"


def to_set(contract):
    """What a test class may set or override, in rows of a table."""
    rows = []
    said = attribute_docstrings(contract)
    for name in getattr(contract, "__annotations__", {}):
        value = vars(contract).get(name)
        given = name in vars(contract) and isinstance(value, int | str | None)
        rows.append(f"| `{name}{f' = {value!r}' if given else ''}` | {cell(said.get(name, ''))} |")
    for name, value in vars(contract).items():
        function = getattr(value, "fget", value)
        if inspect.isfunction(function) and not name.startswith(("_", "test_", "make")):
            rows.append(
                f"| {signature(name, value, function)} | {cell(first_sentence(function))} |"
            )
    return rows


CONTRACTS_HEAD = """\
# Contracts

Made from `gptk.testing` by `docs/build.py`. What gptk relies on in a plug-in is written down as
tests, the contracts; every built-in plug-in keeps them, and yours shows that it does by

```py
from gptk.testing import SamplerContract

from my_package import MySampler


class TestMySampler(SamplerContract):
    make = MySampler
```

`pytest` then runs each promise below on examples that Hypothesis makes. A failure names the
promise, with the smallest example that was found, and leads here. `pip install 'gptk[testing]'`
installs what it needs; with it come three fixtures for tests of your own:

| fixture | what it is |
| --- | --- |
| `gptk_lm` | a tiny random model, always the same, with bytes as tokens |
| `gptk_markov` | a function: from a matrix of transition probabilities to a model that has just \
these |
| `gptk_smollm2` | SmolLM2-135M-Instruct; without it the test is skipped |

How hard a promise is tried follows Hypothesis' profile: `max_examples` of 1,000 tries ten times as
many examples as usual."""


def api():
    """The page of the public names, which the site fills in from their docstrings."""
    listed = [name for names in API.values() for name in names.split()]
    public = {*gptk.__all__, *(f"testing.{name}" for name in gptk.testing.__all__)}
    unlisted = public - set(listed) - {"__version__"}
    assert not unlisted, f"no part of the API page has {unlisted}: see API in {__file__}"
    lines = [API_HEAD]
    for title, names in API.items():
        lines += ["", f"## {title}"]
        for name in names.split():
            lines += ["", f"::: gptk.{name}"]
            if name in MEMBERS:
                lines += ["    options:", f"      members: [{MEMBERS[name]}]"]
            elif name.endswith("Contract"):  # its promises have a page
                lines += ["    options:", '      filters: ["!^_", "!^test_"]']
    return "\n".join(lines) + "\n"


API_HEAD = """\
# Python API

The public names: `import gptk`, then `gptk.NAME`. What is not here may change without notice. The
site fills this page in from the docstrings; `help(gptk.load)` shows the same."""
API = {
    "Language model": """load LanguageModel Settings Stream Generation Score Acceptance
        FinishReason StopCondition load_tokenizer Tokenizer compare Comparison evaluate
        Evaluation""",
    "Models": """load_checkpoint build_model default_source GPT GPTConfig CausalModel
        ModelConfig compile_step Levels""",
    "Decoding": """Run Decoding Choice DecodeSession Rows Follower RandomStream KVCache
        vocabulary""",
    "Plug-ins": """hookimpl Plugin plugins PluginWarning Sampler LogitsProcessor Drafter Draft
        Scorer DecodingObserver DecodingListener DecodingStep LRScheduler Regularizer gradient_norm
        TrainingObserver TrainingListener WeightLoader Checkpoint Tensors WeightWriter
        TokenizerLoader""",
    "Testing plug-ins": """testing.PluginContract testing.ProcessorContract
        testing.TruncationContract testing.SamplerContract testing.DrafterContract
        testing.ScorerContract testing.SchedulerContract testing.RegularizerContract
        testing.LoaderContract testing.WriterContract testing.TokenizerContract
        testing.BrokenPromise testing.tiny_lm testing.tiny_gpt testing.markov_lm
        testing.prompts testing.batches testing.logits""",
    "Training": "Trainer TrainConfig prepare_tokens TokenFile Windows best_checkpoint",
    "Adapters": """adapters.transformers.from_transformers
        adapters.transformers.from_stopping_criteria adapters.transformers.to_transformers
        adapters.llama_cpp.to_llama_cpp""",
    "Errors": """GptkError DataError DecodingError DeviceError IncompatibleError OptionError
        PluginError PromptError SourceError SpecError TokenizerError TrainingError
        UnknownNameError""",
}
MEMBERS = {
    "vocabulary": "top, keep_from, last_key, logprobs_of, entropy, mean",
    "plugins": "register, unregister, provided, Provided, failures, create, find, option_help",
}
"""What is shown of a module; the rest is for gptk itself."""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
