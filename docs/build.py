"""Makes the reference pages from the plug-ins' declarations.

    python docs/build.py           write the pages; example runs in the present pages are kept
    python docs/build.py --run     also make missing example runs, on SmolLM2
    python docs/build.py --run-all also make all example runs again: some minutes
    python docs/build.py --check   print which pages are out of date, and exit 1 if any is

A page has the plug-in's docstrings (with the formula and the paper), its options, and an example
run. The pages of hooks and contracts, and the Python API, are made from docstrings, too.
"""

import ast
import functools
import inspect
import itertools
import re
import shlex
import sys
import textwrap
from pathlib import Path

import gptk
import gptk.testing
from gptk.cli.plugins import USES as COMMANDS
from gptk.hooks import hookspecs
from gptk.options import Options, option_help
from gptk.plugins.creating import create, short_form
from gptk.plugins.kinds import KINDS as PLUGIN_KINDS
from gptk.plugins.registry import provided, summary
from gptk.spec import UNNAMED, format_spec, parse_spec

DOCS = Path(__file__).parent
KINDS = {
    "sampler": "Samplers",
    "processor": "Logits processors",
    "drafter": "Drafters",
    "scorer": "Scorers",
    "metric": "Metrics",
}
FOLDERS = {kind: f"{kind}s" for kind in KINDS}
STORY = "Once upon a time there was a"
LIST = "Apples, pears, apples, pears, apples,"
FACT = "The capital of France is"
# The prompts of example runs, for plug-ins that STORY does not show well.
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
# Processors whose example runs use greedy search instead of multinomial sampling.
GREEDY = {
    *("bad-words", "cfg", "choice", "dry", "forced-tokens", "frequency-penalty", "grammar"),
    *("json-schema", "length-decay", "logit-bias", "min-new-tokens", "no-repeat-ngram"),
    *("presence-penalty", "regex", "repetition-penalty", "sequence-bias", "suppress-tokens"),
}
NEW_TOKENS = 32
RUN = "## A run"


def main(arguments):
    again = "--run-all" in arguments
    pages = dict(all_pages("--run" in arguments or again, again))
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


def all_pages(run, again):
    """The path and the text of each page. run: make missing example runs; again: make all."""
    lm = gptk.load("smollm2", device="cpu", dtype="float32") if run else None
    index = ["# Reference", "", "Made from the plug-ins' declarations by `docs/build.py`."]
    for kind, title in KINDS.items():
        index += ["", f"## {title}", "", "| name | what it does |", "| --- | --- |"]
        for plugin in provided(kind).values():
            if not plugin.distribution.startswith("gptk-decoding "):
                continue
            path = DOCS / FOLDERS[kind] / f"{plugin.name}.md"
            index.append(f"| [{plugin.name}]({path.relative_to(DOCS)}) | {summary(plugin.item)} |")
            yield path, page(kind, plugin, lm, again)
    yield DOCS / "reference.md", "\n".join(index) + "\n"
    yield DOCS / "combinations.md", combinations()
    yield DOCS / "hooks.md", hooks()
    yield DOCS / "contracts.md", contracts()
    yield DOCS / "api.md", api()


def read(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


def page(kind, plugin, lm, again):
    """A plug-in's page in Markdown.

    The example run of the present page is kept if there is no model (lm), and unless again.
    """
    item, spec = plugin.item, example(plugin)
    lines = [f"# {plugin.name}", "", f"{kind.capitalize()}. {summary(item)}", ""]
    lines += [inspect.getmodule(item).__doc__.strip(), "", "## Options", ""]
    rows = option_help(item)
    if rows:
        lines += ["| option | allowed | default | what it does |", "| --- | --- | --- | --- |"]
        cells = [[cell.replace("|", r"\|").replace("\n", r"\n") for cell in row] for row in rows]
        for name, allowed, default, said in cells:
            allowed = re.sub("([<>≤≥]) ", "\\1\N{NO-BREAK SPACE}", allowed)
            default = default if default == "required" else f"`{default}`"
            lines.append(f"| `{name}` | {allowed} | {default} | {said} |")
    else:
        lines += ["None."]
    lines += ["", *ways_to_name(item)]
    if kind == "scorer":
        return "\n".join([*lines, "", f"Used by best-of-n: `best-of-n:scorer={plugin.name}`.", ""])
    if kind == "metric":
        return "\n".join([*lines, "", f"Used by `gptk compare --metric {plugin.name}`.", ""])
    settings = arguments(kind, plugin.name, spec)
    prompt = PROMPTS.get((kind, plugin.name), STORY)
    command = " ".join(
        ["gptk generate", shlex.quote(prompt)]
        + [f"--{flag} {shlex.quote(value)}" for flag, value in settings]
        + [f"--max-new-tokens {NEW_TOKENS} --seed 0"]
    ).replace("\n", r"\n")
    lines += ["", RUN, "", "On SmolLM2-135M-Instruct:", "", f"```sh\n{command}\n```", ""]
    text = "\n".join(lines) + "\n"
    old = read(DOCS / FOLDERS[kind] / f"{plugin.name}.md")
    kept = old.partition(f"```sh\n{command}\n```\n\n")[2]
    if lm is None or (kept and not again):
        return text + kept
    return text + result(lm, prompt, settings)


def ways_to_name(item):
    """The short form of a plug-in's spec, and where its class is imported from."""
    lines = [f"In Python: `from {home(item)} import {item.__name__}`."]
    if short := short_form(item):
        long = format_spec(item.name, {item.positional: parse_spec(short)[1][UNNAMED]})
        lines = [f"`{short}` is short for `{long}`. {lines[0]}"]
    return lines


def home(item):
    """The package that a built-in class is imported from."""
    return item.__module__.rpartition(".")[0]


def result(lm, prompt, settings):
    out = lm.generate(prompt, **keywords(settings), max_new_tokens=NEW_TOKENS, seed=0)
    text = "\n".join(line.rstrip() for line in (prompt + out.text).splitlines())
    count = f"{len(out.tokens)} token{'' if len(out.tokens) == 1 else 's'}"
    note = f"{count}, score {out.score:.2f}, finish reason: {out.finish_reason}."
    return f"````text\n{text}\n````\n\n{note}\n"


def example(plugin):
    """The spec string of the example run."""
    return f"{plugin.name}:{plugin.item.example}" if plugin.item.example else plugin.name


def arguments(kind, name, spec):
    """Flags and values of a plug-in's example command."""
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
    """The page of which strategies combine, with a table made from the samplers."""
    lines = [COMBINATIONS_HEAD]
    lines += ["| sampler | results of a prompt | a draft |", "| --- | --- | --- |"]
    for plugin in provided("sampler").values():
        sampler = create("sampler", example(plugin), gptk.Sampler)
        results = "any number, drawn"
        try:
            sampler.max_rows(1000)
        except gptk.OptionError:
            most = sampler.max_rows(1)
            results = "one" if most == 1 else f"up to as many as it has rows, here {most}"
        reason = sampler.refuses_draft()
        draft = f"refused: {reason}" if reason else "the same tokens as without"
        lines.append(f"| [{plugin.name}](samplers/{plugin.name}.md) | {results} | {draft} |")
    return "\n".join([*lines, "", COMBINATIONS_TAIL])


COMBINATIONS_HEAD = """\
# What combines, and how exactly

Every sampler runs with every logits processor and every constraint, in batches of prompts of any
lengths, with and without the KV cache, and with a sliding window. `tests/decoding/test_matrix.py`
runs samplers × processors and constraints × drafts × batches. What holds in each case:

| with | what is exact |
| --- | --- |
| logits processors | Scores and `token_logprobs` are log-probabilities after all processors, \
the sampler's own included, and equal those of a teacher-forced pass over the text. |
| constraints | Every text is a prefix of a valid text, and every text that ends by EOS is valid; \
`complete` says whether a text is valid itself. |
| a draft | Exactly the tokens that come without a draft, in sampling with the same seed, too. |
| a batch | A prompt gives the same text alone, with its `ordinal`, and in any batch: in every \
precision with gptk's kernels, elsewhere in float32. |
| no KV cache | The same text, slowly. |
| `--overflow slide` | The model sees the last window of tokens, at positions from zero, with \
any sampler; once the window is full a draft guesses no more. |

With a KV cache on a CPU that runs gptk's [kernels](installing.md#kernels), the logits of a text
are the same to the last bit in any batch, with any number of guesses, in every precision. The
model's heads must have 32, 64, 96 or 128 numbers, and its other widths must be multiples of 16, as
is usual. Elsewhere, and without a cache, last bits depend on the batch; a text changes only where
two tokens were that close. In float32 that is rare, in bfloat16 less so.

## Samplers
"""
COMBINATIONS_TAIL = """\
`stochastic-beam` ranks by perturbed log-probabilities, which are its `score`; the log-probability
is the sum of `token_logprobs`. `best-of-n` ranks by its scorer. Beam searches rank by
log-probabilities that are renormalized after processors; in transformers they are not.

Processors are applied in the order in which they are named. Two processors that each leave some
tokens may together mask all of them, such as `top-k` before a constraint: then decoding ends with
an error that names the processor that masked the last token. Name the constraint first instead.

## Why it works

A strategy does not know the other strategies or the model. It only uses a session with rows, which
it extends, selects (reorders, forks, drops) and rewinds. Whatever has state for each row follows
the session: the KV cache, a grammar's state, the counts of a penalty, mirostat's estimate, the
session of a draft model. So when beams are reordered, their grammar states are, too, and when
guesses are dropped, so are their counts.

A drawn token is a function of the row's random stream, the position, and the logits. No draw uses
up random numbers of another draw, whether for another row or for a rejected guess. Hence a draft
changes the number of the model's passes and nothing else.
"""


def hooks():
    """The page of all hooks: for each its base class, what to override, and how to name it."""
    head = inspect.getdoc(hookspecs).partition("\n")[2].strip()
    head = as_fence(head, "python")
    lines = [HOOKS_HEAD.format(version=hookspecs.API_VERSION, head=head)]
    lines += ["| hook | what it provides | base class |", "| --- | --- | --- |"]
    for kind in PLUGIN_KINDS.values():
        anchor = f"[`{kind.hook}`](#{kind.hook})"
        purpose = first_sentence(getattr(hookspecs, kind.hook)).rstrip(".")
        lines.append(f"| {anchor} | {cell(purpose)} | `{base_name(kind)}` |")
    for name, kind in PLUGIN_KINDS.items():
        lines += ["", *hook(name, kind)]
    return "\n".join(lines) + "\n"


def hook(name, kind):
    base = kind.base
    lines = [f"## {kind.hook}", "", f"Returns a list of subclasses of `{base_name(kind)}`."]
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
    contract = f"{name.title().replace('-', '')}Contract"
    if contract in gptk.testing.__all__:
        lines += ["", f"Tested by `gptk.testing.{contract}`: [its promises](contracts.md)."]
    built_in = [p for p in provided(name).values() if p.distribution.startswith("gptk-decoding ")]
    return [*lines, "", f"Built in: {', '.join(map(linked, built_in))}."] if built_in else lines


def overridables(base):
    """A table of a class's methods and attributes; those that must be defined come first."""
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
        str(parameter.replace(annotation=parameter.empty))
        for parameter in inspect.signature(function).parameters.values()
    ]
    kind = " (class method)" if isinstance(value, classmethod) else ""
    return f"`{name}({', '.join(parameters)})`{kind}"


def attribute_docstrings(base):
    """The first paragraphs of the strings below a class's attributes, by attribute."""
    body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
    return {
        statement.target.id: sentence(inspect.cleandoc(below.value.value))
        for statement, below in itertools.pairwise(body)
        if isinstance(statement, ast.AnnAssign)
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


def linked(plugin):
    folder = FOLDERS.get(plugin.kind)
    return f"[{plugin.name}]({folder}/{plugin.name}.md)" if folder else f"`{plugin.name}`"


INHERITED = {"model_config", "model_post_init"}
STATES = {
    "processor": [gptk.Follower],
    "drafter": [gptk.Draft],
    "decoding-observer": [gptk.DecodingListener],
    "training-observer": [gptk.TrainingListener],
}
"""What `start` of a plug-in returns, by kind."""
FROM_PYTHON = {
    "sampler": 'lm.generate(prompt, sampler="NAME")',
    "processor": 'lm.generate(prompt, processors=["NAME"])',
    "drafter": 'lm.generate(prompt, draft="NAME")',
    "scorer": 'lm.generate(prompt, sampler="best-of-n:scorer=NAME")',
    "metric": 'gptk.compare(lm, prompts, samplers, metrics=["NAME"])',
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
tutorial](tutorial.md) uses one hook, from the first line to a published package.

{head}

`gptk plugins new NAME --kind KIND` writes a package with a working plug-in of any kind, to begin
with. In it an entry point in `pyproject.toml` names the module; then `gptk` finds what it provides
by name:

```toml
[project.entry-points.gptk]
my-plugin = "my_plugin"
```

`gptk --plugin my_plugin.py …` loads a single file instead, for one call, and
`gptk.plugins.register(module)` a module in Python.

**The version of the hooks** is {version}. `GPTK_API = {version}` says for which version a plug-in
was built; a gptk with another version refuses it with a message. A module without that line is
accepted.

**A class** has a `name` of letters, digits, dots and hyphens, and typed options: pydantic fields
with bounds, a default and a one-line `description`. `gptk plugins` shows the first line of its
docstring, `gptk plugins show` a command with the options of `example = "key=value"`. If two
distributions use the same name for one kind, an error names both. A class defines no `__init__`.
Instances never change and may serve several calls at once: state belongs into the object that
`start` returns.

**A decoding run** is given to samplers, drafters and decoding observers as a
[`gptk.Run`](api.md), which has what plug-ins may use: the session with its rows, the processors,
the tokenizer, what the sampler's `start` returned (`run.state`), and `run.commit(choice)`.

**Failures** are reported in a line that names the distribution, its version and the hook, and all
other plug-ins keep working. When plug-ins are loaded, these are a module that fails to import or
has no marked hook, an unknown hook (with the nearest name), and a class without a name; later, code
that raises an error, a missing method, and a value of another type than the table below says. An
observer that fails is called no more, and the run goes on. What a plug-in prints while it is loaded
goes to standard error.

**A name with options** is a spec string, `NAME:key=value,key=value`, on the command line, in Python
and in configuration files; in Python an instance of the class works, too. The option that the class
names as `positional = "key"` may come first without its name, as in `beam:4`: give that to the
option that your users would expect there. A value with a comma or a space is quoted, and so is a
first value that begins like `key=`. In quotes `\\n`, `\\t`, `\\r`, `\\0`, `\\\\`, `\\"` and `\\'`
are escapes; any other backslash stays, as in `regex:"\\d+, \\w"`.

Below, *(needed)* marks what a class must define; everything else has a default.
"""


def contracts():
    """The page of all contracts and their promises, from the contracts' docstrings."""
    lines = [CONTRACTS_HEAD]
    promised = {}
    for contract in map(vars(gptk.testing).get, gptk.testing.__all__):
        if not inspect.isclass(contract) or not contract.__name__.endswith("Contract"):
            continue
        lines += ["", f"## {contract.__name__}", "", summary(contract)]
        base = contract.__bases__[0]
        if base is not object:
            lines[-1] += f" Includes [{base.__name__}](#{base.__name__.lower()})."
        if rows := to_set(contract):
            lines += ["", "| to set or override | what it is |", "| --- | --- |", *rows]
        lines += ["", "| promise | |", "| --- | --- |"]
        for name in vars(contract):
            if not name.startswith("test_"):
                continue
            words = name.removeprefix("test_").replace("_", " ")
            promised.setdefault(words, []).append((contract, getattr(contract, name)))
            promise = cell(first_sentence(getattr(contract, name)))
            lines.append(f"| [{words}](#{words.replace(' ', '-')}) | {promise} |")
    lines += ["", "## The promises"]
    for words in sorted(promised):
        lines += ["", f"### {words}"]
        for contract, function in promised[words]:
            lines += ["", f"**{contract.__name__}.** {inspect.getdoc(function)}"]
    return "\n".join(lines) + "\n"


def to_set(contract):
    """What a test class may set or override, in rows of a table."""
    rows = []
    docstrings = attribute_docstrings(contract)
    for name in getattr(contract, "__annotations__", {}):
        if name.startswith("_"):
            continue
        value = vars(contract).get(name)
        simple = name in vars(contract) and isinstance(value, int | str | None)
        default = f" = {value!r}" if simple else ""
        rows.append(f"| `{name}{default}` | {cell(docstrings.get(name, ''))} |")
    for name, value in vars(contract).items():
        value = property(value.func) if isinstance(value, functools.cached_property) else value
        function = getattr(value, "fget", value)
        if inspect.isfunction(function) and not name.startswith(("_", "test_", "make")):
            rows.append(
                f"| {signature(name, value, function)} | {cell(first_sentence(function))} |"
            )
    return rows


CONTRACTS_HEAD = """\
# Contracts

Made from `gptk.testing` by `docs/build.py`. Contracts are tests of what gptk relies on in plug-ins
and models. All built-in plug-ins pass them. To test yours, write

```py
from gptk.testing import SamplerContract

from my_package import MySampler


class TestMySampler(SamplerContract):
    make = MySampler
```

`pytest` then checks each promise below, first on examples built by hand for what plug-ins most
often get wrong (ties, all tokens but one masked, a single row and many, rows that fork and lose
tokens), then on examples that Hypothesis draws, the same ones in each run. A failure names the
promise, says what broke it, and links to this page. All examples of a promise use one instance, as
in use, so that state kept on it is noticed.

The promises of a contract are in an order, and a later one rests on the earlier ones: if several
are broken, only the first is named, and the others are skipped until it is kept. A promise that
cannot be tried on a plug-in is skipped with the reason, such as a draft where the sampler refuses
drafts.

`pip install 'gptk-decoding[testing]'` installs what this needs. There are three fixtures for your
tests:

| fixture | what it is |
| --- | --- |
| `gptk_lm` | a tiny random model, always the same, with bytes as tokens |
| `gptk_markov` | a function that makes a model with a given matrix of transition probabilities |
| `gptk_smollm2` | SmolLM2-135M-Instruct; without it the test is skipped |

The number of drawn examples follows Hypothesis' profile: with `max_examples` of 1,000 it is ten
times the usual number. Hypothesis looks for a smaller example for two seconds."""


def api():
    """The page of the public names; the site replaces each `:::` by the name's docstring."""
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
    lines += ["", "## Built-in plug-ins", "", BUILT_INS]
    lines += ["| kind | name | class | package |", "| --- | --- | --- | --- |"]
    for kind, plugin in built_ins():
        item = plugin.item
        name = linked(plugin)
        lines.append(f"| {kind} | {name} | `{item.__name__}` | `{home(item)}` |")
    return "\n".join(lines) + "\n"


def built_ins():
    """The kind and the plug-in of every class that comes with gptk."""
    for kind in PLUGIN_KINDS:
        for plugin in provided(kind).values():
            if kind != "command" and plugin.distribution.startswith("gptk-decoding "):
                yield kind, plugin


BUILT_INS = """\
Each class is imported from the package of its kind, and made with its options:

```python
from gptk_plugins.constraints import Regex
from gptk_plugins.samplers import Beam

sampler, processors = Beam(width=4), [Regex(pattern=r"\\d+")]
```
"""


API_HEAD = """\
# Python API

The public names: `import gptk`, then `gptk.NAME`. Names that are not on this page may change
without notice. The site fills this page with the docstrings; `help(gptk.load)` shows the same."""
API = {
    "Language model": """load LanguageModel Settings Stream Generation TopTokens RankedToken
        StreamedToken Request Response Score ContinuationScore Acceptance
        FinishReason StopCondition check_settings CheckedSettings translate_settings Translation
        load_tokenizer Tokenizer render_chat compare Comparison evaluate Evaluation""",
    "Tokenizers": "ByteLevelBPE PipelineEncoding SplitPattern SPLIT_PATTERNS GPT2_ALPHABET",
    "Models": """load_checkpoint build_model default_source GPT GPTConfig CausalModel
        TransformersModel ModelConfig Levels set_kv_memory""",
    "Decoding": """Run Decoding Limits Choice DecodeSession Rows Follower RandomStream KVCache
        vocabulary""",
    "Plug-ins": """hookimpl Plugin plugins distribution PluginWarning Sampler LogitsProcessor
        Drafter Draft Scorer Metric DecodingObserver DecodingListener DecodingStep LRScheduler
        Regularizer gradient_norm TrainingObserver TrainingListener WeightLoader Checkpoint Tensors
        WeightWriter TokenizerLoader""",
    "Testing plug-ins": """testing.PluginContract testing.ProcessorContract
        testing.TruncationContract testing.SamplerContract testing.DrafterContract
        testing.ScorerContract testing.MetricContract testing.DecodingObserverContract
        testing.SchedulerContract testing.RegularizerContract testing.TrainingObserverContract
        testing.LoaderContract testing.WriterContract testing.TokenizerContract
        testing.ModelContract testing.BrokenPromise testing.tiny_lm testing.tiny_gpt
        testing.markov_lm testing.prompts testing.batches testing.logits""",
    "Training": """Trainer TrainConfig prepare_tokens TokenFile Windows best_checkpoint
        check_run_file
        keep_freed_memory""",
    "Adapters": """adapters.transformers.from_transformers
        adapters.transformers.from_stopping_criteria adapters.transformers.to_transformers
        adapters.llama_cpp.to_llama_cpp adapters.ray.generation_stage
        adapters.lm_eval.GptkLM""",
    "Errors": """GptkError DataError DecodingError DeviceError IncompatibleError InternalError
        OptionError
        OutOfMemory PluginError PromptError SourceError SpecError TokenizerError TrainingError
        UnknownNameError""",
}
MEMBERS = {
    "vocabulary": "top, keep_from, last_key, logprobs_of, entropy, mean",
    "distribution": "NAME, DOCS, install_command, page",
    "plugins": "register, unregister, provided, Provided, failures, create, find, option_help, "
    "read_json, parse_json, read_text, open_regular, Fields, shown, suggest, is_out_of_memory",
}
"""The names of a module that are shown; its other names are for gptk itself."""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
