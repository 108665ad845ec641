"""Makes the reference pages from the plug-ins' own declarations.

    python docs/build.py           write pages anew; runs that are there are kept
    python docs/build.py --run     and make the missing runs, on SmolLM2
    python docs/build.py --run-all and make all runs anew: some minutes
    python docs/build.py --check   say which pages are out of date, and exit 1 if any is

A page has the plug-in's docstrings (with the formula and the paper), its options, and a run.
"""

import inspect
import shlex
import sys
from pathlib import Path

import gptk
from gptk.plugins import create, option_help, provided, summary

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

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
