r"""Diverse beam search (Vijayakumar et al. 2018): groups of beams with a penalty on equal tokens.

At each step the groups choose in turn. Group $g$ takes the candidates $y$ with the largest

$$\Theta(y) - \lambda \sum_{h < g} c_h(y_t)$$

where $\Theta$ is the sum of log-probabilities, $y_t$ the candidate's last token, and $c_h(y_t)$ the
number of beams of group $h$ that chose $y_t$ at this step: the Hamming diversity of the paper.
Results are ranked by $\Theta / |y|^{\alpha}$. As in the paper, the penalty affects the choice and
is not part of the score; in transformers it is.
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor

import gptk
from gptk_plugins.samplers._beam_candidates import candidates_per_beam
from gptk_plugins.samplers.beam import Beam


class DiverseBeam(Beam):
    """Beam search in groups, each penalized for the tokens that earlier groups chose."""

    name = "diverse-beam"
    example = "width=6,beam_groups=3,diversity=0.5"
    other_names = Beam.other_names | {
        "num_beam_groups": "beam_groups",
        "diversity_penalty": "diversity",
    }

    beam_groups: int = Field(2, ge=1, description="groups, which share the beams equally")
    diversity: float = Field(
        0.5,
        ge=0,
        le=1e6,
        description="λ, subtracted for each time that earlier groups chose the token",
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
        beams = self.width // self.beam_groups
        count = beams * candidates_per_beam(rows)
        vocabulary = logits.shape[1]
        eos = torch.tensor(rows.eos, device=logits.device, dtype=torch.int64)
        times_chosen = logits.new_zeros(vocabulary)
        picked = []
        first = 0
        while first < len(rows):
            prompt, group = rows.prompts[first], rows.groups[first]
            end = first
            while end < len(rows) and (rows.prompts[end], rows.groups[end]) == (prompt, group):
                end += 1
            if first == 0 or rows.prompts[first - 1] != prompt:
                times_chosen = torch.zeros_like(times_chosen)
            keys = (scores[first:end] - self.diversity * times_chosen).flatten()
            keys = keys.masked_fill(keys.isnan(), -torch.inf)  # rows without a possible token
            best = keys.topk(min(count, len(keys))).indices
            tokens = best % vocabulary
            # Only the tokens of beams that go on count: other groups may choose EOS, too.
            counted = tokens[~torch.isin(tokens, eos)][:beams]
            ones = torch.ones_like(counted, dtype=times_chosen.dtype)
            times_chosen = times_chosen.index_add(0, counted, ones)
            picked.append(best + first * vocabulary)
            first = end
        candidates = torch.cat(picked)
        return gptk.Choice(
            tokens=candidates % vocabulary,
            logprobs=logprobs.flatten()[candidates],
            scores=scores.flatten()[candidates],
            parents=candidates // vocabulary,
        )
