"""`gptk info`: what a model is made of."""

import dataclasses
from collections import Counter

import click

from gptk.cli import warn_of_failures


@click.command("info")
@click.argument("model", required=False)
def command(model: str | None) -> None:
    """Show configuration, size and tokenizer of MODEL (default: as for `gptk generate`)."""
    warn_of_failures(["loader"])
    from gptk.errors import TokenizerError
    from gptk.quantization import Levels
    from gptk.weights import default_source, load_checkpoint

    checkpoint = load_checkpoint(model or default_source(), stored=True)
    click.echo(f"source: {checkpoint.source}")
    for key, value in (checkpoint.notes or {}).items():
        click.echo(f"{key}: {value}")
    parameters = 0
    expanded: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for tensor in checkpoint.state.values():
        parameters += tensor.shape.numel()
        if isinstance(tensor, Levels):
            expanded["float32"] += 4 * tensor.shape.numel()
            kept[f"{tensor.bits} bits"] += tensor.nbytes
        else:
            kind = str(tensor.dtype).removeprefix("torch.")
            expanded[kind] += tensor.nbytes
            kept[kind] += tensor.nbytes
    click.echo(f"parameters: {parameters:,}")
    click.echo(f"loaded as: {_sizes(expanded)}")
    if kept != expanded:
        click.echo(f"with --quantize stored: {_sizes(kept)}")
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


def _sizes(sizes: "Counter[str]") -> str:
    return ", ".join(f"{size / 2**20:,.1f} MiB {kind}" for kind, size in sorted(sizes.items()))
