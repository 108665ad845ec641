r"""Stochastic beam search (Kool et al. 2019): samples of whole sequences, without replacement.

Every sequence has a Gumbel-perturbed log-probability $G = \log p + \operatorname{Gumbel}(0)$, and
the sequences with the `width` largest $G$ are a sample without replacement. They are found
top-down: the $G$ of a partial sequence is the largest among the sequences that begin with it, so
the $G$ of its children are drawn conditioned on their maximum being the parent's $G_p$,

$$G = -\log\left(e^{-G_p} - e^{-Z} + e^{-\tilde G}\right)$$

$$\tilde G = \log p + \operatorname{Gumbel}(0), \qquad Z = \max_v \tilde G$$

and only the `width` largest go on. The score of a result is its $G$; its log-probability is the sum
of `token_logprobs`.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.samplers._beam_candidates import (
    best_of_each_prompt,
    candidates_per_beam,
    choice_of,
)


class StochasticBeam(gptk.Sampler):
    """Draws `width` different sequences from the model's distribution, without replacement."""

    name = "stochastic-beam"
    example = "width=4"
    positional = "width"
    random = True
    competing = True

    width: int = Field(4, ge=1, description="how many sequences to draw")

    def max_rows(self, n: int) -> int:
        if n > self.width:
            raise gptk.OptionError(
                f"n={n} results are more than the {self.width} sequences drawn; "
                f"ask for at most {self.width}, or give {self.name}:width={n}"
            )
        return self.width

    def step(self, logits: Tensor, rows: gptk.Rows) -> gptk.Choice:
        # A row without new tokens has no G yet: that of the empty sequence, with log p = 0.
        is_new = torch.tensor(rows.lengths) == torch.tensor(rows.prompt_lengths)
        first = -(-rows.uniform(draw=1).clamp(min=2.0**-54).log()).log()
        parent = torch.where(is_new.to(logits.device), first.to(logits.dtype), rows.scores)[:, None]

        logprobs = logits.log_softmax(dim=-1)
        noise = -rows.exponential(logits.shape[-1], apart=True).log()
        # In float64: in float32, differences of nearly equal numbers would lose their digits.
        drawn = (rows.logprobs[:, None] + logprobs).double() + noise.double()
        largest = drawn.amax(dim=-1, keepdim=True)
        # The formula above, written so that nothing overflows (the paper's appendix B.3).
        v = parent - drawn + torch.log1p(-(drawn - largest).exp())
        scores = parent - v.relu() - torch.log1p((-v.abs()).exp())

        count = self.width * candidates_per_beam(rows)
        top = scores.topk(min(count, logits.shape[-1]), dim=-1)
        best = best_of_each_prompt(top.values, rows, count)
        return choice_of(best, top.indices, logprobs.gather(1, top.indices), top.values)

    def is_done(self, finished: Sequence[float], best: float, length: int, limit: int) -> bool:
        # No continuation of a row has a larger G than the row.
        return len(finished) >= self.width and best <= finished[-1]
