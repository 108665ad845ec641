"""`gptk convert`: from any format that gptk reads to one that it writes."""

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptk.cli import warn_of_failures
from gptk.cli.command import Command

if TYPE_CHECKING:
    import torch

    from gptk.hooks.weights import Checkpoint
    from gptk.text.tokenizer import Tokenizer


@click.command("convert", cls=Command)
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "format_",
    metavar="FORMAT",
    required=True,
    help="huggingface, gptk, or another weight writer; `gptk plugins` lists them.",
)
@click.option(
    "--dtype",
    type=click.Choice(["stored", "float32", "bfloat16", "float16"]),
    default="stored",
    show_default=True,
    help="stored: the smallest type that holds the stored weights exactly.",
)
@click.option(
    "--tokenizer",
    metavar="SPEC",
    help="Instead of the model's own: gpt2, bytes, a file, … or none to write no tokenizer.",
)
def command(source: str, target: Path, format_: str, dtype: str, tokenizer: str | None) -> None:
    """Write the model SOURCE, anything that `gptk generate --model` takes, to the directory TARGET.

    TARGET is written completely or not at all. An existing TARGET is overwritten only if it is a
    directory of that format with no other files.
    """
    warn_of_failures()
    from gptk.hooks.weights import WeightWriter
    from gptk.plugins.creating import create
    from gptk.system.files import write_directory
    from gptk.weights.building import build_model
    from gptk.weights.loading import load_checkpoint

    writer = create("writer", format_, WeightWriter)
    _check_target(target, writer.name)
    checkpoint = load_checkpoint(source)
    written_tokenizer = _tokenizer(checkpoint, tokenizer)
    model = build_model(checkpoint, "cpu", _dtype(checkpoint, dtype))
    write_directory(
        target,
        lambda folder: writer.write(folder, model, written_tokenizer),
        what=f"{writer.name} model",
    )
    files = [path for path in target.rglob("*") if path.is_file()]
    click.echo(
        f"{target}: {writer.name}, {sum(p.numel() for p in model.parameters()):,} parameters "
        f"in {str(model.dtype).removeprefix('torch.')}, "
        f"{'without' if written_tokenizer is None else 'with'} tokenizer, {len(files)} files, "
        f"{sum(path.stat().st_size for path in files):,} bytes"
    )


def _check_target(target: Path, format_: str) -> None:
    """Raises SourceError if the target may not be overwritten, before the model is read."""
    from gptk.errors import SourceError
    from gptk.plugins.registry import provided

    is_folder = os.path.isdir(target)
    try:
        if not os.path.lexists(target) or (is_folder and not any(target.iterdir())):
            return
    except OSError as error:
        raise SourceError(f"{target} cannot be written: {error.strerror}") from None
    loader = provided("loader").get(format_)
    if not is_folder or (loader and not loader.item.matches(str(target))):
        raise SourceError(f"{target} exists and is no {format_} model; it is not overwritten")


def _tokenizer(checkpoint: "Checkpoint", spec: str | None) -> "Tokenizer | None":
    from gptk.errors import TokenizerError
    from gptk.weights.tokenizers import load_tokenizer

    if spec == "none":
        return None
    if spec is None:
        return checkpoint.tokenizer() if checkpoint.tokenizer else None
    named = load_tokenizer(spec)
    highest, vocab_size = named.encoding.max_token_value, checkpoint.gpt_config.vocab_size
    if highest >= vocab_size:
        raise TokenizerError(
            f"the tokenizer {spec} has tokens up to {highest:,}, the model up to {vocab_size - 1:,}"
        )
    return named


def _dtype(checkpoint: "Checkpoint", name: str) -> "torch.dtype":
    """A dtype by name; `stored` is one that holds all stored weights, float32 at most."""
    import torch

    from gptk.system.devices import DTYPES

    if name in DTYPES:
        return DTYPES[name]
    stored = {tensor.dtype for tensor in checkpoint.state.values()}
    dtype = functools.reduce(torch.promote_types, stored)
    return dtype if dtype in DTYPES.values() else torch.float32
