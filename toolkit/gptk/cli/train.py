"""`gptk train`: train a new model, a loaded one, or go on with an interrupted run."""

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptk.cli import warn_of_failures
from gptk.hooks.training import TrainingListener

if TYPE_CHECKING:
    from gptk.training.trainer import Trainer


@click.command("train")
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option(
    "--set",
    "changes",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a setting, for example lr=3e-4. A list is given by its key repeated, or as JSON. "
    "Repeatable.",
)
@click.option(
    "--show-config", is_flag=True, help="Print all settings with what they mean, and end."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The run directory. Default: runs/ and the time.",
)
@click.option("--keep", type=click.IntRange(min=1), help="The same as --set keep=N.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Go on where a run's last checkpoint left off; --set may change settings.",
)
@click.option(
    "--shard",
    is_flag=True,
    help="With torchrun: each process holds its part of the weights (FSDP2), not a copy (DDP).",
)
def command(
    config: Path | None,
    changes: Sequence[str],
    show_config: bool,
    out: Path | None,
    keep: int | None,
    resume: Path | None,
    shard: bool,
) -> None:
    """Train a GPT by the settings in CONFIG, a TOML file.

    Without any setting, a small byte-level model learns from Python's documentation, in a
    minute or two. Settings, metrics, checkpoints, samples and plots go to the run directory; Ctrl-C
    finishes the step and saves. For several processes: torchrun --nproc-per-node N -m gptk train …
    """
    if keep is not None:
        changes = [*changes, f"keep={keep}"]
    if resume is not None and (config or out):
        raise click.UsageError("--resume takes the settings of its run; leave out CONFIG and --out")
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
        self._live = sys.stderr.isatty()
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
            f"lr {record['lr']:.2e}  {speed:,.0f} tokens/s  {_duration(left)} left"
        )
        now = time.monotonic()
        if self._live:
            self._clear()
            sys.stderr.write(text)
            sys.stderr.flush()
            self._shown = len(text)
        elif now >= self._next_plain:
            click.echo(text, err=True)
            self._next_plain = now + 10

    def _line(self, text: str) -> None:
        self._clear()
        click.echo(text)

    def _clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._shown = 0


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
