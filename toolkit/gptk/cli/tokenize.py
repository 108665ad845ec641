"""`gptk tokenize`: the tokens of a text, or the text of tokens."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptk.cli import warn_of_failures
from gptk.cli.command import Command
from gptk.cli.shared import model_option, tokenizer_option
from gptk.errors import PromptError, TokenizerError

if TYPE_CHECKING:
    from gptk.text.tokenizer import Tokenizer


@click.command("tokenize", cls=Command)
@click.argument("text", required=False)
@click.option(
    "--file",
    "path",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The text in this file, as a whole.",
)
@model_option
@tokenizer_option
@click.option("--ids", "only_ids", is_flag=True, help="Only the ids, on one line.")
@click.option("--count", is_flag=True, help="Only the number of tokens.")
@click.option(
    "--json", "as_json", is_flag=True, help="A JSON object: ids, tokens as texts, byte offsets."
)
@click.option(
    "--decode",
    "listed",
    metavar="IDS",
    help="The other way: the text of these ids; - reads them from standard input.",
)
@click.option(
    "--chat", is_flag=True, help="TEXT is a message: the model's chat template makes the prompt."
)
@click.option("--system", metavar="TEXT", help="With --chat: the system message before it.")
def command(
    text: str | None,
    path: Path | None,
    model: str | None,
    tokenizer: str | None,
    only_ids: bool,
    count: bool,
    as_json: bool,
    listed: str | None,
    chat: bool,
    system: str | None,
) -> None:
    """Show the tokens of TEXT: a line for each, with its id and its text.

    A token that is no whole character is shown as its bytes. Without TEXT it is read from standard
    input, one trailing newline taken off. Only the tokenizer is loaded, not the weights; a BOS that
    the tokenizer puts in front of each text is shown, too.

    Byte offsets (--json) are those of each token's start and end in the tokens' bytes joined, which
    are the text's in UTF-8 unless the tokenizer adds BOS, normalizes the text, or lacks bytes.
    """
    _check_usage(text, path, [only_ids, count, as_json], listed, chat, system)
    if tokenizer is not None and model is not None:
        raise click.UsageError("give --model or --tokenizer, not both")
    if listed is not None:
        ids = _read_ids(listed)
        click.echo(_decoded(_load(model, tokenizer), ids))
        return
    given = _read_text(text, path)
    loaded = _load(model, tokenizer)
    if chat:
        from gptk.text.chat import conversation, encode_chat

        ids = encode_chat(loaded, conversation(given, system))
    else:
        ids = loaded.encode(given)
    if count:
        click.echo(str(len(ids)))
    elif only_ids:
        click.echo(" ".join(map(str, ids)))
    elif as_json:
        click.echo(json.dumps(_object(loaded, ids)))
    else:
        width = len(str(max(ids, default=0)))
        for token in ids:
            click.echo(f"{token:>{width}}  {_shown(loaded.token_bytes(token))}")


def _check_usage(
    text: str | None,
    path: Path | None,
    forms: Sequence[bool],
    listed: str | None,
    chat: bool,
    system: str | None,
) -> None:
    if sum(forms) > 1:
        raise click.UsageError("give one of --ids, --count and --json")
    if text is not None and path is not None:
        raise click.UsageError("give TEXT or --file, not both")
    if system is not None and not chat:
        raise click.UsageError("--system works with --chat")
    if listed is not None and (text is not None or path is not None or chat or any(forms)):
        raise click.UsageError("--decode works alone, with --model or --tokenizer")


def _load(model: str | None, tokenizer: str | None) -> "Tokenizer":
    warn_of_failures(["tokenizer"])
    from gptk.weights.tokenizers import load_model_tokenizer, load_tokenizer

    return load_model_tokenizer(model) if tokenizer is None else load_tokenizer(tokenizer)


def _read_text(text: str | None, path: Path | None) -> str:
    if text is not None:
        return text
    if path is not None:
        from gptk.system.metadata import open_regular

        with open_regular(path, PromptError) as file:
            return _utf8(file.read(), str(path))
    return _utf8(_standard_input(), "standard input").removesuffix("\n")


def _standard_input() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError("give TEXT, --file FILE, or a text on standard input")
    if hasattr(sys.stdin, "buffer"):
        return sys.stdin.buffer.read()
    return sys.stdin.read().encode()


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{where} is not UTF-8 at byte {error.start:,}") from None


def _read_ids(listed: str) -> list[int]:
    if listed == "-":
        listed = _utf8(_standard_input(), "standard input")
    words = re.findall(r"[^\s,\[\]]+", listed)
    wrong = next((word for word in words if not re.fullmatch(r"[0-9]{1,9}", word)), None)
    if wrong is not None or not words:
        raise click.UsageError(
            f"--decode takes ids, such as '464 3139'; {wrong[:30]!r} is none"
            if wrong
            else "--decode takes ids, such as '464 3139'; there is none"
        )
    return [int(word) for word in words]


def _decoded(tokenizer: "Tokenizer", ids: Sequence[int]) -> str:
    for token in ids:
        try:
            tokenizer.encoding.decode_single_token_bytes(token)
        except KeyError:
            highest = tokenizer.encoding.max_token_value
            raise TokenizerError(
                f"no token has the id {token}; the tokenizer's ids are among 0 to {highest}"
            ) from None
    return tokenizer.decode(ids)


def _object(tokenizer: "Tokenizer", ids: Sequence[int]) -> dict[str, object]:
    pieces = [tokenizer.token_bytes(token) for token in ids]
    ends, offsets = 0, []
    for piece in pieces:
        offsets.append([ends, ends + len(piece)])
        ends += len(piece)
    texts = [piece.decode("utf-8", "replace") for piece in pieces]
    return {"ids": list(ids), "tokens": texts, "offsets": offsets}


def _shown(piece: bytes) -> str:
    try:
        return repr(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(piece)
