"""`gptk eval`: loss, perplexity and bits per byte of a text."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from gptk.cli import warn_of_failures
from gptk.cli.command import Command
from gptk.cli.shared import (
    check_single_process,
    model_option,
    precision_options,
    progress_bar,
    tokenizer_option,
)

if TYPE_CHECKING:
    from gptk.measure.evaluation import Evaluation
    from gptk.model.quantization import Quantize


@click.command("eval", cls=Command)
@model_option
@click.option(
    "--data",
    "sources",
    metavar="DATA",
    multiple=True,
    required=True,
    help="A text file, a folder, or builtin:python-docs. Repeat for several.",
)
@tokenizer_option
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Tokens from one window to the next, at most the model's window. Default: half of it.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Windows at a time. Default: as many as hold 8,192 tokens, at least one.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    help="Evaluate only so many tokens, from the beginning.",
)
@precision_options
@click.option("--json", "as_json", is_flag=True, help="A JSON object.")
def command(
    model: str | None,
    sources: Sequence[str],
    tokenizer: str | None,
    stride: int | None,
    batch_size: int | None,
    max_tokens: int | None,
    device: str,
    dtype: str,
    quantize: "Quantize",
    as_json: bool,
) -> None:
    """Score a text of any length, each token once, by a sliding window.

    Each window is as long as the model allows; tokens that two windows share are context in the
    second. A smaller stride gives more context, a lower loss and more work: compare figures at
    equal window and stride. Bits per byte compare between tokenizers, too.
    """
    warn_of_failures()
    check_single_process("gptk eval")
    from gptk.data.sources import find_sources
    from gptk.data.token_files import prepare_tokens
    from gptk.language_model import load
    from gptk.measure.evaluation import evaluations

    find_sources(sources)  # report mistakes before the model is loaded
    lm = load(model, device=device, dtype=dtype, quantize=quantize, tokenizer=tokenizer)
    tokens = prepare_tokens(sources, lm.tokenizer).tokens[:max_tokens]
    start = time.perf_counter()
    result, is_interrupted = None, False
    with progress_bar("Evaluating") as progress:
        try:
            for result, all_tokens in evaluations(lm, tokens, stride=stride, batch_size=batch_size):
                if progress is not None:
                    progress(result.tokens, all_tokens)
        except KeyboardInterrupt:
            is_interrupted = True
    if result is not None:
        speed = result.tokens / (time.perf_counter() - start)
        if as_json:
            values = dataclasses.asdict(result) | {"tokens_per_second": speed}
            if math.isinf(result.perplexity):  # JSON has no infinity
                values["perplexity"] = None
            click.echo(json.dumps(values))
        else:
            _print(result, speed)
    if is_interrupted:
        scored = 0 if result is None else result.tokens
        click.echo(f"interrupted: {scored:,} of {len(tokens) - 1:,} tokens scored", err=True)
        sys.exit(130)


def _print(result: "Evaluation", speed: float) -> None:
    bits = "unknown" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
    for label, value in (
        ("loss", f"{result.loss:.4f} nats/token"),
        ("perplexity", f"{result.perplexity:.4f}"),
        ("bits per byte", bits),
        ("tokens", f"{result.tokens:,}"),
        ("bytes", f"{result.bytes:,}"),
        ("window", f"{result.context_length:,}"),
        ("stride", f"{result.stride:,}"),
        ("speed", f"{speed:,.1f} tokens/s"),
    ):
        click.echo(f"{label:<13}  {value}")
