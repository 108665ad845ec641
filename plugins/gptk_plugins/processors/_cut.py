"""Taking out all logits below a bound, for each row; and where those from a bound on are."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor


def keep_from(logits: Tensor, least: Tensor) -> Tensor:
    """Logits of at least `least` as they are, -inf for the others. least: (rows, 1)."""
    if len(logits) == 1 and logits.device.type == "cpu":
        # One pass instead of three: 0.02 ms instead of 0.08 for 49,152 logits. What is greater
        # than the next lower number is at least the bound.
        below = torch.nextafter(least, torch.full_like(least, -torch.inf))
        return F.threshold(logits, below.item(), -torch.inf)
    return torch.where(logits < least, -torch.inf, logits)


def keep_only(logits: Tensor, kept: npt.NDArray[np.intp]) -> Tensor:
    """One row's logits, (1, vocab) on a CPU, at the places kept, and -inf elsewhere."""
    some = torch.full_like(logits, -torch.inf)
    some.numpy()[0, kept] = logits.numpy()[0, kept]
    return some


def places(values: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Row and token of each value of at least `least`, row by row. values: (rows, vocab)."""
    if values.device.type == "cpu":  # numpy finds them in a third of the time
        flat = torch.from_numpy(np.flatnonzero(values.numpy() >= np.float32(least)))
        return flat // values.shape[1], flat % values.shape[1]
    row, token = (values >= least).nonzero(as_tuple=True)
    return row, token
