"""Errors that end a run, explained: which settings to change, which checkpoint to resume from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gptk.errors import OutOfMemory, PluginError, TrainingError
from gptk.system.memory import is_out_of_memory


@contextmanager
def explaining_preparation(run: Path | None) -> Iterator[None]:
    """Raise TrainingError if memory does not hold a model and its optimizer's state, or if a file
    of the run cannot be read or written."""
    try:
        yield
    except BrokenPipeError:  # nobody reads the output any more: the program handles that
        raise
    except (OSError, MemoryError, RuntimeError, OutOfMemory) as error:
        if is_out_of_memory(error):
            raise TrainingError(
                "out of memory for the model; take a smaller one (width, n_layers) or another "
                "device"
            ) from None
        if not isinstance(error, OSError):
            raise
        raise TrainingError(str(error) if run is None else f"{run}: {error}") from None


@contextmanager
def explaining_failures(device: torch.device, last_good: Callable[[], str]) -> Iterator[None]:
    """Raise TrainingError or PluginError for errors that end training.

    last_good: names the checkpoint to resume from.
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads the output any more: the program handles that
        raise
    except OSError as error:
        raise TrainingError(f"{error}; {last_good()}") from None
    except PluginError as error:
        raise PluginError(f"{error}; {last_good()}") from error
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise TrainingError(
                f"out of memory on {device}: lower batch_size (and raise accumulate) or "
                f"context_length; {last_good()}"
            ) from None
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(f"compile=true does not work here: {reason}") from None
