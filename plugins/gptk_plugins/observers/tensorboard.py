"""TensorBoard events of a training run: train/NAME, evaluation/NAME, and samples as text."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from pydantic import Field

import gptk

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_GROUPS = {"step": "train", "evaluation": "evaluation"}
_NOT_SHOWN = {"kind", "step", "prompt", "text", "skipped"}


class TensorBoard(gptk.TrainingObserver):
    """Writes TensorBoard events: `tensorboard --logdir RUN` shows them."""

    name = "tensorboard"
    positional = "path"

    path: str | None = Field(
        None, description="where the events go; by default tensorboard in the run directory"
    )

    def start(self, run: Path | None) -> gptk.TrainingListener:
        if self.path is not None:
            folder = Path(self.path)
        elif run is not None:
            folder = run / "tensorboard"
        else:
            raise gptk.OptionError(
                "observer tensorboard: the run has no directory; give tensorboard:path=…"
            )
        try:
            import torch.utils.tensorboard  # noqa: F401 - fails here, not at the first record
        except ImportError:
            raise gptk.PluginError(
                "observer tensorboard needs a package: pip install 'gptk-decoding[tensorboard]'"
            ) from None
        return _Events(folder)


class _Events(gptk.TrainingListener):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def record(self, record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        writer = self._open(step)
        if record["kind"] == "sample":
            text = f"{record['prompt']}{record['text']}"
            # TensorBoard renders Markdown, which shows indented lines as they are.
            writer.add_text("sample", indent(text, "    ", lambda _: True), step)
        else:
            group = _GROUPS.get(record["kind"], record["kind"])
            for name, value in record.items():
                if name not in _NOT_SHOWN and isinstance(value, int | float):
                    writer.add_scalar(f"{group}/{name}", value, step)
        writer.flush()  # otherwise a killed run would lose up to two minutes of events

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> "SummaryWriter":
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # A resumed run discards the events recorded after its checkpoint.
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        return self._writer
