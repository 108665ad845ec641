"""`gptk lm-eval`: the command of lm-evaluation-harness, which then knows gptk's models.

Versions of lm-eval that have plug-ins find the models by themselves.
"""

import sys

import click


class _Unparsed(click.Command):
    """A command whose words are all another program's, also -v and --help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = args
        return args


@click.command("lm-eval", cls=_Unparsed)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Run lm-evaluation-harness: `--model gptk --model_args pretrained=… --tasks …`."""
    from gptk.adapters import lm_eval  # noqa: F401 - registers the model

    # lm-eval itself is looked for after the adapter, which says how to install it.
    from lm_eval.__main__ import cli_evaluate  # isort: skip

    sys.argv = ["lm-eval", *ctx.args]
    cli_evaluate()
