"""Diverse beam search (Vijayakumar et al. 2018): groups of beams that avoid each other's tokens.

At each step the groups choose in turn. Group g takes the candidates y with the largest

    Θ(y) - λ · (how often y's last token was just chosen by groups 1 … g-1)

where Θ is the sum of log-probabilities: the Hamming diversity of the paper. Results are ranked
by Θ / lengthᵃ. As in the paper the penalty decides, and does not stay in the score, which in
transformers it does.
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor

import gptk
from gptk_plugins.samplers._places import candidates_per_place
from gptk_plugins.samplers.beam import Beam


class DiverseBeam(Beam):
    """Beam search in groups, each kept from choosing what the groups before it chose."""

    name = "diverse-beam"
    example = "width=6,beam_groups=3,diversity=0.5"

    beam_groups: int = Field(2, ge=1, description="groups, which share the beams equally")
    diversity: float = Field(
        0.5,
        ge=0,
        le=1e6,
        description="λ, log-probability lost for a token that a group before chose",
    )

    @model_validator(mode="after")
    def _groups_share_equally(self) -> "DiverseBeam":
        if self.width % self.beam_groups:
            raise ValueError(
                f"{self.beam_groups} groups cannot share {self.width} beams equally; width must "
                "be a multiple of beam_groups"
            )
        return self

    @property
    def groups(self) -> int:
        return self.beam_groups

    def step(self, logits: Tensor, rows: gptk.Rows) -> gptk.Choice:
        logprobs = logits.log_softmax(dim=-1)
        scores = logprobs + rows.scores[:, None]
        places = self.width // self.beam_groups
        count = places * candidates_per_place(rows)
        vocabulary = logits.shape[1]
        eos = torch.tensor(rows.eos, device=logits.device, dtype=torch.int64)
        chosen = logits.new_zeros(vocabulary)
        picked = []
        first = 0
        while first < len(rows):
            prompt, group = rows.prompts[first], rows.groups[first]
            end = first
            while end < len(rows) and (rows.prompts[end], rows.groups[end]) == (prompt, group):
                end += 1
            if first == 0 or rows.prompts[first - 1] != prompt:
                chosen = torch.zeros_like(chosen)
            keys = (scores[first:end] - self.diversity * chosen).flatten()
            keys = keys.masked_fill(keys.isnan(), -torch.inf)  # of rows that cannot go on
            best = keys.topk(min(count, len(keys))).indices
            tokens = best % vocabulary
            # What the group goes on with; beams that end choose nothing to stay away from.
            going_on = tokens[~torch.isin(tokens, eos)][:places]
            chosen = chosen.index_add(0, going_on, torch.ones_like(going_on, dtype=chosen.dtype))
            picked.append(best + first * vocabulary)
            first = end
        at = torch.cat(picked)
        return gptk.Choice(
            tokens=at % vocabulary,
            logprobs=logprobs.flatten()[at],
            scores=scores.flatten()[at],
            parents=at // vocabulary,
        )
