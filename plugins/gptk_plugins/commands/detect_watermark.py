"""`gptk detect-watermark`: whether a text carries the watermark of the processor `watermark`."""

import dataclasses
import json
import sys
from typing import IO, TYPE_CHECKING

import click

if TYPE_CHECKING:
    import gptk


@click.command("detect-watermark")
@click.argument("text", required=False)
@click.option(
    "--file",
    type=click.File("r", encoding="utf-8-sig"),
    help="A text file instead of TEXT.",
)
@click.option(
    "--spec",
    default="watermark",
    show_default=True,
    metavar="SPEC",
    help="The processor that the text was generated with, with all its options.",
)
@click.option(
    "--model",
    metavar="MODEL",
    help="The model of the text, for its tokenizer and the size of its vocabulary: smollm2, "
    "a path, a hub id, or a loader spec. Default: $GPTK_MODEL, else SmolLM2 where installed.",
)
@click.option(
    "--tokenizer",
    metavar="SPEC",
    help="Instead of the model's own, or without a model: gpt2, bytes, a file, …",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=1),
    help="The model's, if no model is named and it differs from the tokenizer's.",
)
@click.option(
    "--z-threshold",
    type=float,
    default=3.0,
    show_default=True,
    help="The least z that counts as watermarked, in standard deviations above chance.",
)
@click.option("--ignore-repeated-ngrams", is_flag=True, help="Count repeated sequences once.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object.")
def command(
    text: str | None,
    file: IO[str] | None,
    spec: str,
    model: str | None,
    tokenizer: str | None,
    vocab_size: int | None,
    z_threshold: float,
    ignore_repeated_ngrams: bool,
    as_json: bool,
) -> None:
    """Tell whether TEXT carries the watermark of the processor `watermark`.

    Without TEXT it is read from standard input, without one trailing newline. Give the text
    without its prompt, whose tokens are not watermarked. With a bias of 2, about 50 tokens are
    enough.
    """
    import gptk
    from gptk_plugins.processors.watermark import Watermark

    text = _read(text, file)
    watermark = gptk.plugins.create("processor", spec, gptk.LogitsProcessor)
    if not isinstance(watermark, Watermark):
        raise click.UsageError(f"--spec is {spec!r}; it must be the processor watermark")
    text_tokenizer, size = _tokenizer(model, tokenizer)
    found = watermark.detect(
        text_tokenizer.encode(text),
        vocab_size or size,
        bos=text_tokenizer.bos,
        ignore_repeated_ngrams=ignore_repeated_ngrams,
        z_threshold=z_threshold,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found)))
        return
    click.echo(
        f"{'watermarked' if found.prediction else 'not watermarked'}: {found.green_tokens:,} of "
        f"{found.tokens_scored:,} tokens are green ({found.green_fraction:.1%}, by chance "
        f"{watermark.greenlist_ratio:.1%}), z = {found.z_score:.2f}, p = {found.p_value:.2g}"
    )


def _read(text: str | None, file: IO[str] | None) -> str:
    if text is not None and file is not None:
        raise click.UsageError("give TEXT or --file, not both")
    try:
        if text is None:
            # Files and programs end their output with a line break that is not part of the text.
            text = (file or sys.stdin).read().removesuffix("\n")
    except UnicodeDecodeError:
        raise click.UsageError("the text is not UTF-8") from None
    return text


def _tokenizer(model: str | None, tokenizer: str | None) -> "tuple[gptk.Tokenizer, int]":
    """The tokenizer, and the size of the model's vocabulary (without a model: the tokenizer's)."""
    import gptk

    loaded = gptk.load_tokenizer(tokenizer) if tokenizer is not None else None
    if loaded is not None and model is None:
        return loaded, loaded.encoding.n_vocab
    checkpoint = gptk.load_checkpoint(model or gptk.default_source())
    if loaded is None and checkpoint.tokenizer is not None:
        loaded = checkpoint.tokenizer()
    if loaded is None:
        raise gptk.TokenizerError(
            "the model comes without a tokenizer; name one, such as --tokenizer gpt2"
        )
    return loaded, checkpoint.gpt_config.vocab_size
