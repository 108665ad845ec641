"""`gptk generate`: continue prompts and print the text as it comes."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import click

from gptk.cli import warn_of_failures
from gptk.cli.command import DecodingCommand
from gptk.cli.output import note, quiet
from gptk.cli.shared import (
    check_single_process,
    kv_memory_option,
    model_option,
    precision_options,
    print_result,
    read_prompt,
    tokenizer_option,
)
from gptk.cli.streams import is_text
from gptk.errors import DecodingError, OptionError, OutOfMemory, counted
from gptk.spec import unescape

if TYPE_CHECKING:
    from gptk.decoding.stream import Stream
    from gptk.hooks.observing import DecodingObserver
    from gptk.hooks.results import Generation
    from gptk.language_model import LanguageModel
    from gptk.model.quantization import Quantize
    from gptk.records.call import Call


@click.command("generate", cls=DecodingCommand)
@click.argument("prompt", required=False)
@model_option
@tokenizer_option
@click.option(
    "--sampler",
    metavar="SPEC",
    help="For example beam:4; `gptk plugins` lists them. Default: greedy, or multinomial with a "
    "processor that is meant for sampling, such as temperature or top-p.",
)
@click.option(
    "--processor",
    "processors",
    metavar="SPEC",
    multiple=True,
    help="A logits processor, for example repetition-penalty:penalty=1.1. Repeat for several; "
    "they work in the order given.",
)
@click.option(
    "--draft",
    metavar="MODEL|SPEC",
    help="What guesses tokens ahead, for the same text sooner: a smaller model of the same "
    "vocabulary, or lookup:ngram=3,tokens=8.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--n",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Results for each prompt.",
)
@click.option("--seed", type=int, help="A whole number of 64 bits. Default: a new one each time.")
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help=r"Text that ends the continuation; \n and \t mean what they do in C. Repeatable.",
)
@precision_options
@kv_memory_option
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0),
    help="A limit on the time of decoding; what is there then is the result.",
)
@click.option(
    "--overflow",
    type=click.Choice(["stop", "slide"]),
    default="stop",
    show_default=True,
    help="When the model's window is full: stop, or slide it along.",
)
@click.option(
    "--prompts-file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="Many prompts: a text on each line, or JSON lines with a prompt or messages, and "
    "settings.",
)
@click.option(
    "--out",
    metavar="RESULTS.jsonl",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --prompts-file: write a record of each prompt as soon as it is done. The same "
    "command goes on where an earlier one stopped.",
)
@click.option(
    "--chat", is_flag=True, help="PROMPT is a message: the model's chat template makes the prompt."
)
@click.option("--system", metavar="TEXT", help="With --chat: the system message before it.")
@click.option(
    "--chat-template",
    type=click.File("r", encoding="utf-8-sig"),
    help="With --chat: a jinja2 template instead of the model's own.",
)
@click.option(
    "--observer",
    "observers",
    metavar="SPEC",
    multiple=True,
    help="A plug-in that sees every step. Repeatable.",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False),
    help="Write every step to a file, as JSON lines; short for --observer trace:path=FILE.",
)
@click.option(
    "--top-logprobs",
    type=click.IntRange(min=0),
    default=0,
    metavar="K",
    help="With --json or --out: the K likeliest tokens of each step, before and after the "
    "processors.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="A record of each prompt, on a line: the result, and all that `gptk repeat` needs.",
)
@click.option("--no-stream", is_flag=True, help="Print the text at the end, not as it comes.")
def command(
    prompt: str | None,
    model: str | None,
    tokenizer: str | None,
    device: str,
    dtype: str,
    quantize: "Quantize",
    prompts_file: str | None,
    out: Path | None,
    chat: bool,
    system: str | None,
    chat_template: IO[str] | None,
    as_json: bool,
    no_stream: bool,
    stop: Sequence[str],
    observers: Sequence[str],
    trace: str | None,
    **settings: Any,
) -> None:
    """Continue PROMPT.

    Without PROMPT it is read from standard input if that is piped, one trailing newline taken
    off; else generation starts from the model's BOS or end-of-text token. With --prompts-file the
    prompts of a file are continued, each as if it were alone.

    The text goes to standard output; a closing line with tokens, tokens/s and the finish reason
    goes to standard error.
    """
    has_top = bool(settings["top_logprobs"])
    _check_options(prompt, prompts_file, as_json=as_json, out=out, trace=trace, has_top=has_top)
    text = None if prompts_file is not None else read_prompt(prompt)
    _check_chat(text, chat=chat, system=system, has_template=chat_template is not None)
    used = {"processor": settings["processors"], "drafter": settings["draft"]}
    used |= {"decoding-observer": observers or trace, "tokenizer": tokenizer}
    warn_of_failures(["sampler", "loader", *(kind for kind, value in used.items() if value)])
    from gptk.records.call import Call

    settings["stop"] = [unescape(text) for text in stop]
    settings["observers"] = [*observers, *([] if trace is None else [_trace_observer(trace)])]
    # Mistakes are told before the model is loaded.
    call = Call(settings, chat=chat, system=system, template=_read_template(chat_template))
    how = {"device": device, "dtype": dtype, "quantize": quantize, "tokenizer": tokenizer}
    load = partial(_load, model, **how)
    about: dict[str, Any] = {"tokenizer": tokenizer, "seed_given": settings["seed"] is not None}
    if text is None:
        assert prompts_file is not None
        from gptk.cli.many import generate_many

        generate_many(prompts_file, out, call, load, as_json=as_json, **about)
    else:
        _generate(text, call, load(), as_json=as_json, at_the_end=as_json or no_stream, **about)


def _load(model: str | None, **how: Any) -> "LanguageModel":
    from gptk.language_model import load

    return load(model, **how)


def _generate(
    text: str,
    call: "Call",
    lm: "LanguageModel",
    *,
    as_json: bool,
    at_the_end: bool,
    tokenizer: str | None,
    seed_given: bool,
) -> None:
    """Continue a single prompt. tokenizer: the spec of the one that was given."""
    from gptk.records.prompts_file import GivenPrompt
    from gptk.records.writing import Recorder

    request = call.request(GivenPrompt(prompt=text), lm)

    def record(result: "Generation") -> dict[str, Any]:
        recorder = Recorder(lm, tokenizer=tokenizer, template=call.template)
        return call.record(recorder, request.id, result)

    with lm.stream(request.prompt, **call.settings()) as stream:
        _print_stream(
            stream,
            repr(text),
            call.checked.max_new_tokens,
            record if as_json else None,
            at_the_end=at_the_end,
            seed_given=seed_given,
        )


def _check_options(
    prompt: str | None,
    prompts_file: str | None,
    *,
    as_json: bool,
    out: Path | None,
    trace: str | None,
    has_top: bool,
) -> None:
    """Raise click.UsageError for options that do not go together."""
    if has_top and not (as_json or out):
        raise click.UsageError("--top-logprobs works with --json or --out")
    if prompts_file is None and out is not None:
        raise click.UsageError("--out works with --prompts-file")
    if prompts_file is None:
        check_single_process("gptk generate PROMPT")
        return
    if prompt is not None:
        raise click.UsageError("give PROMPT or --prompts-file, not both")
    if out is not None and as_json:
        raise click.UsageError("--out writes records already; leave --json out")
    if trace is not None:
        raise click.UsageError("--trace writes the steps of a single PROMPT")


def _check_chat(text: str | None, *, chat: bool, system: str | None, has_template: bool) -> None:
    """Raise click.UsageError for options of a chat that do not go together.

    text: PROMPT; None with a file of prompts.
    """
    if not chat and (system is not None or has_template):
        raise click.UsageError("--system and --chat-template work with --chat")
    if chat and text == "":
        raise click.UsageError("--chat needs a message")
    if system is not None and not is_text(system):
        raise click.UsageError("--system is not UTF-8 text")


def _print_stream(
    stream: "Stream",
    title: str | None,
    steps: int,
    record: "Callable[[Generation], dict[str, Any]] | None",
    *,
    at_the_end: bool,
    seed_given: bool,
) -> None:
    """Run a stream to its end and print the results, even if Ctrl-C or an error ends it.

    title: names several results. steps: the most there can be. record: makes the record to print
    instead of the texts. Exits with 130 after Ctrl-C. Raises the error that ended it.
    """
    print_pieces = stream.live and not at_the_end
    start = time.perf_counter()
    ended_by: KeyboardInterrupt | DecodingError | OutOfMemory | None = None
    try:
        for piece in _with_progress(stream, steps):
            if print_pieces and piece:
                click.echo(piece, nl=False)
                sys.stdout.flush()
    except (KeyboardInterrupt, DecodingError, OutOfMemory) as error:
        ended_by = error
        try:
            rest = stream.interrupt()
        except DecodingError:  # there are no results yet
            _end(ended_by)
        if print_pieces:
            click.echo(rest, nl=False)
    seconds = time.perf_counter() - start
    if print_pieces:
        click.echo()
    elif record is not None:
        click.echo(json.dumps(record(stream.result)))
    else:
        print_result(title if stream.result.alternatives else None, stream.result)
    _print_closing_line(stream, seconds, seed_given=seed_given)
    if ended_by is not None:
        _end(ended_by)


def _end(error: KeyboardInterrupt | DecodingError | OutOfMemory) -> NoReturn:
    """Exit with 130 after Ctrl-C; otherwise raise the error."""
    if isinstance(error, KeyboardInterrupt):
        sys.exit(130)
    raise error from None


def _trace_observer(path: str) -> "DecodingObserver":
    """The first observer that writes a trace to a file. Raises OptionError if there is none."""
    from gptk.hooks.observing import DecodingObserver
    from gptk.plugins.asking import ask
    from gptk.plugins.registry import provided

    for plugin in provided("decoding-observer").values():
        observer: DecodingObserver | None = ask(plugin, "to_file", path, answer=DecodingObserver)
        if observer is not None:
            return observer
    raise OptionError("no decoding observer that writes a trace is installed")


def _read_template(file: IO[str] | None) -> str | None:
    """A chat template, checked. Raises click.UsageError or PromptError."""
    if file is None:
        return None
    from gptk.text.chat import check_template

    try:
        template = file.read()
    except UnicodeDecodeError:
        raise click.UsageError(f"{file.name} is not a UTF-8 text file") from None
    if not template.strip():
        raise click.UsageError(f"{file.name} has no chat template: it is empty")
    check_template(template)
    return template


def _with_progress(stream: "Stream", steps: int) -> Any:
    """The stream's pieces; on a terminal with a progress bar unless they have text."""
    if stream.live or quiet() or not sys.stderr.isatty():
        yield from stream
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(stream, "Searching", total=steps, console=Console(stderr=True), transient=True)


def _print_closing_line(stream: "Stream", seconds: float, *, seed_given: bool) -> None:
    generations = [stream.result, *stream.result.alternatives]
    tokens = sum(len(g.tokens) for g in generations)
    reasons = ", ".join(sorted({g.finish_reason for g in generations}))
    line = f"{counted(tokens, 'token')}, {tokens / seconds:.1f} tokens/s, finish reason: {reasons}"
    if any(g.complete is False for g in generations):
        line += ", incomplete"
    if stream.acceptance is not None:
        right, guessed = stream.acceptance.accepted, stream.acceptance.guessed
        share = f" ({right / guessed:.0%})" if guessed else ""
        line += f", {right} of {guessed} guesses accepted{share}"
    if stream.draws and not seed_given:
        line += f", seed: {generations[0].seed}"
    note(line)
