"""PyTorch's own schedulers: `torch:scheduler=StepLR,options='{"step_size": 30}'`.

A torch scheduler computes each step's rate from the last one. Here it runs on an optimizer of its
own with a learning rate of 1, and all rates are recorded, so that any step can be asked for: the
first call for step n runs n scheduler steps of about 2 µs. Rates in its options (`max_lr`,
`eta_min`) are shares of the peak rate. Momentum, which some of them also change, stays as it is.
"""

import difflib
import functools
import warnings
from array import array
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, JsonValue
from torch.optim import lr_scheduler

import gptk

LOOK_AHEAD = 10_000
"""Steps run by the first call, so that most errors show before training."""

_NEEDS_A_FUNCTION = (
    "needs a function, which a spec cannot hold; write it as factor() of a gptk.LRScheduler"
)
_UNUSABLE = {
    "LRScheduler": "is the base class of torch's schedulers",
    "LambdaLR": _NEEDS_A_FUNCTION,
    "MultiplicativeLR": _NEEDS_A_FUNCTION,
    "ReduceLROnPlateau": "follows a loss, and a learning rate here is a function of the step",
}
_USABLE = sorted(set(lr_scheduler.__all__) - set(_UNUSABLE))


class Torch(gptk.LRScheduler):
    """Any scheduler of torch.optim.lr_scheduler that is a function of the step.

    Its options are written as JSON, torch:scheduler=StepLR,options='{"step_size": 30}'.
    SequentialLR and ChainedScheduler take {"schedulers": [{"scheduler": "LinearLR"}, ...]}.

    Raises UnknownNameError for a class that torch does not have, and OptionError for options
    that torch refuses, or with which a rate is not between 0 and 1.
    """

    name = "torch"
    example = "scheduler=LinearLR"
    positional = "scheduler"

    scheduler: str = Field(description="a class of torch.optim.lr_scheduler, such as StepLR")
    options: dict[str, JsonValue] = Field({}, description="its options, as JSON")

    def model_post_init(self, _context: Any) -> None:
        self._replay.factor(1)  # torch finds some errors only at the first step

    def factor(self, step: int, total_steps: int) -> float:
        return self._replay.factor(step, ahead=min(total_steps - 1, LOOK_AHEAD))

    @functools.cached_property
    def _replay(self) -> "_Replay":
        return _Replay(self.scheduler, self.options)


class _Replay:
    """A torch scheduler on a learning rate of 1, and the rates that it has computed."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name = name
        # With momentum, because torch's cyclic schedulers refuse optimizers without it.
        self._optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
        self._factors = array("d")
        with warnings.catch_warnings(action="ignore"):
            self._scheduler = _make(name, options, self._optimizer)
        self._record()

    def factor(self, step: int, ahead: int = 0) -> float:
        with warnings.catch_warnings(action="ignore"):  # of a missing optimizer.step()
            while len(self._factors) <= max(step, ahead):
                try:
                    self._scheduler.step()
                except Exception as error:  # torch does not document which
                    raise _refused(self._name, error, f" at step {len(self._factors)}") from None
                self._record()
        return self._factors[step]

    def _record(self) -> None:
        rate = float(self._optimizer.param_groups[0]["lr"])
        if not -1e-6 <= rate <= 1 + 1e-6:  # with a tolerance for rounding
            raise gptk.OptionError(
                f"scheduler torch: {self._name} with these options gives {rate:g} at step "
                f"{len(self._factors)}; a share of the peak rate is from 0 to 1, and so are rates "
                "in options"
            )
        self._factors.append(min(max(rate, 0.0), 1.0))


def _make(name: str, options: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    if name in _UNUSABLE:
        raise gptk.OptionError(f"scheduler torch: {name} {_UNUSABLE[name]}")
    if name not in _USABLE:
        near = difflib.get_close_matches(name, _USABLE)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise gptk.UnknownNameError(
            f"torch has no scheduler {name!r}; {hint}schedulers: {', '.join(_USABLE)}"
        )
    options = dict(options)
    try:
        if "schedulers" in options:
            options["schedulers"] = [
                _make(part["scheduler"], part.get("options", {}), optimizer)
                for part in options["schedulers"]
            ]
        return getattr(lr_scheduler, name)(optimizer=optimizer, **options)
    except gptk.GptkError:
        raise
    except Exception as error:  # torch does not document which
        raise _refused(name, error) from None


def _refused(name: str, error: Exception, when: str = "") -> gptk.OptionError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return gptk.OptionError(f"scheduler torch: torch's {name} refuses its options{when}: {reason}")
