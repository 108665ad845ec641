r"""XTC, "exclude top choices" (Weidmann 2024): masks the most likely tokens but one.

A token $v$ is masked if

$$p(v) > p(w) \ge \text{threshold}$$

for another token $w$. This happens with a probability, drawn for each row and step. As in
llama.cpp, and unlike text-generation-webui, end of text and line breaks are tokens as any other.
"""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

import gptk


class XTC(gptk.LogitsProcessor):
    """Masks the most likely tokens if a less likely one still reaches a threshold."""

    name = "xtc"
    for_sampling = True
    example = "probability=0.5,threshold=0.1"
    positional = "probability"
    other_names = {"xtc_probability": "probability", "xtc_threshold": "threshold"}

    probability: float = Field(0.5, ge=0, le=1, description="probability of masking at a step")
    threshold: float = Field(
        0.1,
        gt=0,
        le=1,
        description="probability of a top choice; above 0.5 nothing is masked",
    )

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        chosen = rows.uniform(draw=1) < self.probability
        if not bool(chosen.any()):
            return logits
        # The few tokens that reach the threshold, found in one pass over the vocabulary.
        row, token = _at_least(logits.softmax(dim=-1), self.threshold)
        scores = logits[row, token]
        # Infinite for rows without such a token. Ties stay.
        least = logits.new_full((len(logits),), torch.inf).scatter_reduce(0, row, scores, "amin")
        masked = (scores > least[row]) & chosen[row]
        return logits.index_put((row[masked], token[masked]), logits.new_tensor(-torch.inf))


def _at_least(values: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Row and token of each value that is at least `least`, in order. values: (rows, vocab)."""
    if values.is_cpu:  # numpy finds them in a third of the time
        flat = torch.from_numpy(np.flatnonzero(values.numpy() >= np.float32(least)))
        return flat // values.shape[1], flat % values.shape[1]
    row, token = (values >= least).nonzero(as_tuple=True)
    return row, token
