"""`gptk info`: configuration, size and tokenizer of a model."""

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

import click

from gptk.cli import warn_of_failures

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptk.hooks.weights import Checkpoint


@click.command("info")
@click.argument("model", required=False)
def command(model: str | None) -> None:
    """Show configuration, size and tokenizer of MODEL (default: as for `gptk generate`)."""
    warn_of_failures(["loader"])
    from gptk import kernels
    from gptk.errors import TokenizerError
    from gptk.model.levels import Levels
    from gptk.weights.loading import default_source, load_checkpoint

    checkpoint = load_checkpoint(default_source() if model is None else model, stored=True)
    click.echo(f"source: {checkpoint.source}")
    for key, value in (checkpoint.notes or {}).items():
        click.echo(f"{key}: {value}")
    parameters = 0
    stored: Counter[str] = Counter()
    bits: dict[str, int] = {}
    for name, tensor in checkpoint.state.items():
        parameters += tensor.shape.numel()
        if isinstance(tensor, Levels):
            bits[name] = tensor.bits
            stored[f"{tensor.bits} bits"] += tensor.nbytes
        else:
            stored[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    if "in the file" not in (checkpoint.notes or {}):
        click.echo(f"in the file: {_sizes(stored)}")
    click.echo(f"parameters: {parameters:,}")
    click.echo("in memory, on a CPU:")
    for option in ("--dtype float32", "--dtype bfloat16", "--quantize int8", "--quantize int4"):
        click.echo(f"  {option}: {_sizes(bytes_in_memory(checkpoint, option.split()[1], {}))}")
    if bits:
        click.echo(f"  --quantize stored: {_sizes(bytes_in_memory(checkpoint, 'bfloat16', bits))}")
    reason = kernels.why_not()
    click.echo(f"kernels: {'gptk and PyTorch' if reason is None else f'PyTorch ({reason})'}")
    for field in dataclasses.fields(checkpoint.config):
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
    click.echo(f"tokenizer: {encoding.name}, {encoding.n_vocab:,} tokens")
    for label, tokens in (("bos", (tokenizer.bos,)), ("eos", tokenizer.eos)):
        for token in tokens:
            if token is not None:
                click.echo(f"{label}: {token} {encoding.decode([token])!r}")


def bytes_in_memory(
    checkpoint: "Checkpoint", precision: str, bits: "Mapping[str, int]"
) -> "Counter[str]":
    """The bytes of a model's weights by kind, as `gptk.GPT.bytes_by_kind` gives them after loading.

    precision: float32, bfloat16, int8 or int4. bits: the bits of the matrices that stay quantized
    as stored, by name.
    """
    from gptk import kernels
    from gptk.model.levels import GROUP
    from gptk.model.linear import Linear
    from gptk.model.quantization import bytes_of
    from gptk.weights.empty import empty_gpt

    model = empty_gpt(checkpoint.config)
    sizes: Counter[str] = Counter()
    plain = "float32" if precision == "float32" else "bfloat16"
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind, shape = plain, parameter.shape
            tied = module is model.head and checkpoint.config.tied_head
            if isinstance(module, Linear) and name == "weight":
                stored_bits = bits.get("embed.weight" if tied else f"{path}.weight")
                if stored_bits is not None:
                    kind = f"int{stored_bits}"
                elif precision.startswith("int") and shape[1] % GROUP == 0:
                    kind = precision
            # A tied head is the embedding itself, unless PyTorch's kernel has a packed copy of it.
            if tied and (kind == "float32" or (kind == plain and kernels.available())):
                continue
            groups = kind == "int8" and bool(bits)
            sizes[kind] += bytes_of(shape, kind, by_groups=groups)
    return sizes


def _sizes(sizes: "Counter[str]") -> str:
    return ", ".join(f"{size / 2**20:,.1f} MiB {kind}" for kind, size in sorted(sizes.items()))
