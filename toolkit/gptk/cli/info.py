"""`gptk info`: configuration, size and tokenizer of a model."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptk.cli import warn_of_failures
from gptk.cli.command import Command
from gptk.cli.output import tell

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from gptk.hooks.weights import Checkpoint
    from gptk.model.config import GPTConfig
    from gptk.model.quantization import Quantize
    from gptk.model.segments import Segments


@click.command("info", cls=Command)
@click.argument("model", required=False)
def command(model: str | None) -> None:
    """Show configuration, size and tokenizer of MODEL (default: as for `gptk generate`)."""
    warn_of_failures(["loader"])
    from gptk import kernels
    from gptk.errors import TokenizerError
    from gptk.model.levels import Levels
    from gptk.model.segments import Segments
    from gptk.weights.loading import default_source, load_checkpoint

    checkpoint = load_checkpoint(default_source() if model is None else model, stored=True)
    tell(f"source: {checkpoint.source}")
    for key, value in (checkpoint.notes or {}).items():
        tell(f"{key}: {value}")
    parameters = 0
    stored: Counter[str] = Counter()
    segments: dict[str, Segments] = {}
    for name, tensor in checkpoint.state.items():
        parameters += tensor.shape.numel()
        if isinstance(tensor, Levels):
            segments[name] = Segments.of(tensor)
            for part in tensor.segments:
                stored[f"{part.bits} bits"] += part.nbytes
        else:
            stored[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    if "in the file" not in (checkpoint.notes or {}):
        click.echo(f"in the file: {_sizes(stored)}")
    click.echo(f"parameters: {parameters:,}")
    _tell_of_memory(checkpoint, parameters, segments)
    _tell_of_expanded_matrices(segments)
    _tell_of_kept_weights(checkpoint)
    click.echo(f"kernels: {kernels.described()}")
    for field in dataclasses.fields(checkpoint.config) if checkpoint.config else ():
        value = getattr(checkpoint.config, field.name)
        shown = f"{len(value)} divisors" if isinstance(value, tuple) else value
        click.echo(f"{field.name}: {shown}")
    if checkpoint.tokenizer is None:
        click.echo("tokenizer: none; name one with --tokenizer")
        return
    try:
        tokenizer = checkpoint.tokenizer()
    except TokenizerError as error:
        click.echo(f"tokenizer: {error}")
        return
    encoding = tokenizer.encoding
    tell(f"tokenizer: {encoding.name}, {encoding.n_vocab:,} tokens")
    for label, tokens in (("bos", (tokenizer.bos,)), ("eos", tokenizer.eos)):
        for token in tokens:
            if token is not None:
                click.echo(f"{label}: {token} {tokenizer.decode([token])!r}")


def _tell_of_expanded_matrices(segments: "Mapping[str, Segments]") -> None:
    """The quantized matrices that are expanded by default, and that --quantize none is for."""
    import torch

    from gptk.model.quantization import keeps_levels

    expanded = [
        f"{name} ({' and '.join(dict.fromkeys(format.name for format, _ in stored))})"
        for name, stored in segments.items()
        if not keeps_levels(stored, torch.device("cpu"), torch.float32)
    ]
    if expanded:
        more = f" and {len(expanded) - 3} more" if len(expanded) > 3 else ""
        click.echo(f"not kept as stored, without options: {', '.join(expanded[:3])}{more}")


def _tell_of_memory(
    checkpoint: "Checkpoint", parameters: int, segments: "Mapping[str, Segments]"
) -> None:
    from gptk.system.devices import DTYPES

    click.echo("in memory, on a CPU:")
    expanded = ["--quantize none", "--quantize none --dtype bfloat16"] if segments else []
    rounded = ["--quantize int8", "--quantize int4"] if checkpoint.config else []
    for options in ("", "--dtype bfloat16", *expanded, *rounded):
        words = options.split()
        chosen = dict(zip(words[::2], words[1::2], strict=True))
        dtype = DTYPES[chosen.get("--dtype", "float32")]
        quantize: Any = chosen.get("--quantize", "auto")
        if checkpoint.config is None:
            sizes = Counter({str(dtype).removeprefix("torch."): parameters * dtype.itemsize})
        else:
            sizes = bytes_in_memory(checkpoint.config, segments, quantize, dtype)
        click.echo(f"  {options or 'without options'}: {_sizes(sizes)}")


def _tell_of_kept_weights(checkpoint: "Checkpoint") -> None:
    from gptk.weights.kept import Source, kept_folder, kept_sizes

    sizes, source = kept_sizes(), Source.of(Path(checkpoint.path or checkpoint.source))
    if source is not None and source.kept in sizes:
        tell(f"packed weights: kept in {source.kept}")
    if sizes:
        total = sum(sizes.values()) / 2**20
        files = "1 file" if len(sizes) == 1 else f"{len(sizes)} files"
        tell(f"all packed weights: {files}, {total:,.1f} MiB, in {kept_folder()}; may be removed")


def bytes_in_memory(
    config: "GPTConfig",
    segments: "Mapping[str, Segments]",
    quantize: "Quantize",
    dtype: "torch.dtype",
) -> "Counter[str]":
    """The bytes of a model's weights by kind after loading, as `gptk.GPT.bytes_by_kind` has them.

    segments: of the matrices that the file has quantized, by name. quantize: see
    gptk.model.quantization.Quantize.
    """
    import torch

    from gptk import kernels
    from gptk.model.linear import Linear
    from gptk.model.quantization import bytes_of
    from gptk.system.devices import has_fast_products
    from gptk.weights.empty import empty_gpt
    from gptk.weights.kinds import embedding_kind, matrix_kind

    model, plain, cpu = empty_gpt(config), str(dtype).removeprefix("torch."), torch.device("cpu")
    packs_plain = dtype == torch.bfloat16 and has_fast_products(dtype) and not kernels.available()
    sizes: Counter[str] = Counter()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind, tied, stored = plain, module is model.head and config.tied_head, None
            if name == "weight" and (isinstance(module, Linear) or module is model.embed):
                stored = segments.get("embed.weight" if tied else f"{path}.weight")
                asked = parameter.shape[1], stored, quantize, cpu, dtype
                of_embedding = embedding_kind(*asked) or plain
                kind = of_embedding if module is model.embed else matrix_kind(*asked) or plain
                # A tied head is the embedding itself, unless it has a packed copy for kernels.
                if tied and kind == of_embedding and not (kind == plain and packs_plain):
                    continue
            sizes[kind] += bytes_of(parameter.shape, kind, stored if quantize == "auto" else None)
    return sizes


def _sizes(sizes: "Counter[str]") -> str:
    return ", ".join(f"{size / 2**20:,.1f} MiB {kind}" for kind, size in sorted(sizes.items()))
