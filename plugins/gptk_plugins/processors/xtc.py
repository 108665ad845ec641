"""XTC, "exclude top choices" (Weidmann 2024): not the obvious token, but one good enough.

With a probability, drawn for each row and step: of the tokens with p(v) ≥ threshold only the least
likely stays, and all tokens below the threshold. As in llama.cpp, and unlike
text-generation-webui, end of text and line breaks are tokens as any other.
"""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

import gptk


class XTC(gptk.LogitsProcessor):
    """Takes out the most likely tokens where a less likely one is still good enough."""

    name = "xtc"
    example = "probability=0.5,threshold=0.1"

    probability: float = Field(0.5, ge=0, le=1, description="how often it is done")
    threshold: float = Field(
        0.1, gt=0, le=1, description="what is good enough; above 0.5 nothing is taken out"
    )

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        chosen = rows.uniform(draw=1) < self.probability
        if not bool(chosen.any()):
            return logits
        # The few tokens that are good enough, row by row; the vocabulary is gone over but once.
        row, token = _places(logits.softmax(dim=-1), self.threshold)
        scores = logits[row, token]
        # Infinite where no token is good enough. Ties stay.
        least = logits.new_full((len(logits),), torch.inf).scatter_reduce(0, row, scores, "amin")
        out = (scores > least[row]) & chosen[row]
        return logits.index_put((row[out], token[out]), logits.new_tensor(-torch.inf))


def _places(values: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Row and token of each value of at least `least`, row by row. values: (rows, vocab)."""
    if values.is_cpu:  # numpy finds them in a third of the time
        flat = torch.from_numpy(np.flatnonzero(values.numpy() >= np.float32(least)))
        return flat // values.shape[1], flat % values.shape[1]
    row, token = (values >= least).nonzero(as_tuple=True)
    return row, token
