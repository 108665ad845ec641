"""Stochastic beam search (Kool et al. 2019): samples of whole sequences, without replacement.

Every sequence has a Gumbel-perturbed log-probability G = log p + Gumbel(0), and the `width`
largest of all sequences are a sample without replacement. They are found top-down: a partial
sequence has the largest G among those that begin with it, so its children's are drawn given
that their largest is its own,

    G = -log(exp(-Gₚ) - exp(-Z) + exp(-G̃)),   G̃ = log p + Gumbel(0),   Z = maxᵥ G̃

and only the `width` best go on. The score of a result is its G; its log-probability is the sum
of `token_logprobs`.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.samplers._places import best_of_each_prompt, candidates_per_place, choice_at


class StochasticBeam(gptk.Sampler):
    """Draws `width` different sequences at once, each as likely as ancestral sampling has it."""

    name = "stochastic-beam"
    example = "width=4"
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
        # The first row has drawn nothing yet: its G is that of the likeliest thing, log p = 0.
        new = torch.tensor(rows.lengths) == torch.tensor(rows.prompt_lengths)
        first = -(-rows.uniform(draw=1).clamp(min=2.0**-54).log()).log()
        parent = torch.where(new.to(logits.device), first.to(logits.dtype), rows.scores)[:, None]

        logprobs = logits.log_softmax(dim=-1)
        noise = -rows.exponential(logits.shape[-1], apart=True).log()
        # In float64, or differences of nearly equal numbers lose their digits.
        drawn = (rows.logprobs[:, None] + logprobs).double() + noise.double()
        largest = drawn.amax(dim=-1, keepdim=True)
        # The formula above, written so that nothing overflows (the paper's appendix B.3).
        v = parent - drawn + torch.log1p(-(drawn - largest).exp())
        scores = parent - v.relu() - torch.log1p((-v.abs()).exp())

        count = self.width * candidates_per_place(rows)
        top = scores.topk(min(count, logits.shape[-1]), dim=-1)
        at = best_of_each_prompt(top.values, rows, count)
        return choice_at(at, top.indices, logprobs.gather(1, top.indices), top.values)

    def is_done(self, finished: Sequence[float], best: float, length: int, limit: int) -> bool:
        # What a row becomes has no larger G than the row.
        return len(finished) >= self.width and best <= finished[-1]
