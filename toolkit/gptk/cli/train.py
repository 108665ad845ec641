"""`gptk train`: train a new model, a loaded one, or go on with an interrupted run."""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptk.cli import warn_of_failures
from gptk.cli.command import Command
from gptk.cli.output import note, quiet
from gptk.cli.shared import duration
from gptk.hooks.training import TrainingListener

if TYPE_CHECKING:
    from gptk.training.trainer import Trainer


class _Setting(click.Option):
    """A setting of TrainConfig as an option, also under its names in other trainers.

    Values are noted as `name=value`, as --set has them; the configuration checks them all together.
    """

    def __init__(self, names: Sequence[str], *, metavar: str = "", help: str = "") -> None:
        self.is_switch = metavar == _SWITCH
        options = [f"--{name.replace('_', '-')}" for name in names]
        self._shown = f"--[no-]{options[0][2:]}" if self.is_switch else f"{options[0]} {metavar}"
        if self.is_switch:
            options += [f"--no-{option[2:]}" for option in options]
        # `multiple`, so that giving a setting twice is noticed.
        super().__init__(
            [names[0], *options],
            multiple=True,
            help=help,
            hidden=not help,
            expose_value=False,
            callback=_note_setting,
        )

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        if not self.is_switch:
            super().add_to_parser(parser, ctx)
            return
        # click's own switches do not combine with `multiple`.
        for value in ("true", "false"):
            options = [o for o in self.opts if o.startswith("--no-") == (value == "false")]
            parser.add_option(
                obj=self, opts=options, dest=self.name, action="append_const", const=value
            )

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        return None if self.hidden else (self._shown, self.help or "")


_SWITCH = "true|false"
_SETTINGS = "gptk.settings"


def _note_setting(ctx: click.Context, setting: click.Parameter, values: Sequence[str]) -> None:
    ctx.meta.setdefault(_SETTINGS, []).extend(f"{setting.name}={value}" for value in values)


def _settings() -> Iterator[_Setting]:
    """An option for each setting; hidden ones for what has to be said in another way."""
    from gptk.options import option_help
    from gptk.training.config import TrainConfig
    from gptk.training.names import ALIASES, ELSEWHERE

    for name, allowed, _, description in option_help(TrainConfig):
        kind, _, bounds = allowed.removesuffix(" or null").partition(" ")
        metavar = _METAVARS.get(kind) or allowed.removesuffix(" or null").replace(" or ", "|")
        default = TrainConfig.model_fields[name].default
        if isinstance(default, list):
            description += ". Repeatable"
            default = " ".join(default)
        elif isinstance(default, tuple | bool):
            default = json.dumps(default)
        extra = [bounds if kind in ("integer", "number") else ""]
        extra += [] if default in (None, "") else [f"default {default}"]
        about = "; ".join(filter(None, extra))
        yield _Setting(
            (name, *ALIASES.get(name, ())),
            metavar=metavar,
            help=description + (f"  [{about}]" if about else ""),
        )
    for name in ELSEWHERE:
        yield _Setting((name,))


_METAVARS = {"integer": "INTEGER", "number": "NUMBER", "string": "TEXT", "array": "TEXT"}
"""How the types of settings are shown; others are shown as the values that are allowed."""


class _TrainCommand(Command):
    """Shows the settings in groups, after the other options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from gptk.training.config import HEADINGS

        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if isinstance(option, _Setting):
                if option.name in HEADINGS:
                    groups[heading := HEADINGS[option.name]] = []
            elif isinstance(option, click.Option):
                heading = "Options"
            else:
                continue
            if record is not None:
                groups[heading].append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=26)


@click.command("train", cls=_TrainCommand)
@click.argument("sources", metavar="[CONFIG.toml] [DATA]...", nargs=-1)
@click.option(
    "--set",
    "changes",
    metavar="NAME=VALUE",
    multiple=True,
    help="A setting, as the options below; null is none, and a list may be JSON. Repeatable.",
)
@click.option(
    "--show-config", is_flag=True, help="Print all settings with what they mean, and end."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The run directory. Default: runs/ and the time.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Go on where a run's last checkpoint left off; settings given are changed.",
)
@click.option(
    "--shard",
    is_flag=True,
    help="With torchrun: each process holds its part of the weights (FSDP2), not a copy (DDP).",
)
@click.pass_context
def command(
    context: click.Context,
    sources: Sequence[str],
    changes: Sequence[str],
    show_config: bool,
    out: Path | None,
    resume: Path | None,
    shard: bool,
) -> None:
    """Train a GPT on DATA (text files or folders), by the settings in CONFIG.toml.

    Both may be left out: then a small byte-level model learns from Python's documentation, in a
    minute or two. Settings, metrics, checkpoints, samples and plots go to the run directory; Ctrl-C
    finishes the step and saves. For several processes: torchrun --nproc-per-node N -m gptk train …

    Settings may be given by their names in other trainers, such as --learning-rate or --max-steps.
    """
    config, data = _divide(sources)
    if resume is not None and (sources or out):
        raise click.UsageError(
            "--resume takes the settings of its run; leave out CONFIG, DATA and --out"
        )
    changes = [*(f"data={name}" for name in data), *context.meta.get(_SETTINGS, ()), *changes]
    from gptk.training.config import read_config

    if show_config:
        path = config if resume is None else resume / "config.toml"
        click.echo(read_config(path, changes).to_toml(comments=True), nl=False)
        return
    warn_of_failures()
    settings = None if resume is not None else read_config(config, changes)
    from gptk.system.memory import keep_freed_memory
    from gptk.training.trainer import Trainer

    progress = _Progress()
    if settings is None:
        assert resume is not None
        trainer = Trainer.resume(resume, changes, shard=shard, listeners=[progress])
    else:
        # With the process id, since two runs may be started in the same second.
        run = out or Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{os.getpid()}"
        trainer = Trainer.start(settings, run, shard=shard, listeners=[progress])
    if trainer.model.device.type == "cpu":
        keep_freed_memory()
    try:
        ending = _train(trainer, progress)
    finally:
        trainer.processes.leave()
    if ending == "interrupted":
        sys.exit(130)


command.params.extend(_settings())


def _divide(sources: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The configuration file among the sources, if any, and the names of texts."""
    files = [name for name in sources if name.lower().endswith(".toml")]
    if len(files) > 1:
        raise click.UsageError(f"two configuration files are given, {files[0]} and {files[1]}")
    return Path(files[0]) if files else None, [name for name in sources if name not in files]


def _train(trainer: "Trainer", progress: "_Progress") -> str:
    main = trainer.processes.main
    progress.total_steps = trainer.total_steps
    if main:
        for line in trainer.describe():
            click.echo(line)
        if trainer.step_count:
            click.echo(f"going on after step {trainer.step_count:,}")
    ending = trainer.train()
    if not main:
        return ending
    assert trainer.run is not None
    run = shlex.quote(str(trainer.run))
    if ending == "interrupted":
        click.echo(f"stopped after step {trainer.step_count:,}; go on with: ", nl=False)
        click.echo(f"gptk train --resume {run}")
        return ending
    if ending == "patience":
        click.echo(
            f"stopped: {trainer.config.patience} evaluations without a better validation loss"
        )
    if trainer.best_step is not None:
        click.echo(
            f"best validation loss {trainer.best_loss:.4f} at step {trainer.best_step:,}; "
            f"try it with: gptk generate --model {run}"
        )
    return ending


class _Progress(TrainingListener):
    """A live line on a terminal; elsewhere plain lines: evaluations, samples, a few steps."""

    total_steps = 0

    def __init__(self) -> None:
        self._live = sys.stderr.isatty() and not quiet()
        self._shown = 0
        self._next_plain = 0.0

    def record(self, record: Mapping[str, Any]) -> None:
        kind = record["kind"]
        if kind == "step":
            self._step(record)
        elif kind == "evaluation":
            average = record.get("averaged_validation_loss")
            self._line(
                f"step {record['step']:,}: train loss {record['train_loss']:.4f}, validation loss "
                f"{record['validation_loss']:.4f}"
                + (f", averaged {average:.4f}" if average is not None else "")
                + f", {record['tokens']:,} tokens seen"
            )
        elif kind == "sample":
            text = " ".join((record["prompt"] + record["text"]).split())
            # An untrained model writes control characters, too.
            self._line("  " + "".join(c if c.isprintable() else "\ufffd" for c in text))

    def close(self) -> None:
        self._clear()

    def _step(self, record: Mapping[str, Any]) -> None:
        if record.get("skipped"):
            self._line(f"step {record['step']:,}: skipped, loss {record['loss']}")
            return
        speed = record["tokens_per_second"]
        tokens_per_step = record["tokens"] / record["step"]
        left = (self.total_steps - record["step"]) * tokens_per_step / max(speed, 1e-9)
        text = (
            f"step {record['step']:,}/{self.total_steps:,}  loss {record['loss']:.4f}  "
            f"lr {record['lr']:.2e}  {speed:,.0f} tokens/s  {duration(left)} left"
        )
        now = time.monotonic()
        if self._live:
            self._clear()
            sys.stderr.write(text)
            sys.stderr.flush()
            self._shown = len(text)
        elif now >= self._next_plain:
            note(text)
            self._next_plain = now + 10

    def _line(self, text: str) -> None:
        self._clear()
        click.echo(text)

    def _clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._shown = 0
