r"""Beam sampling (beam-search multinomial sampling of transformers): candidates are drawn.

At each step the candidates of a prompt, all tokens of all its beams, are drawn without
replacement with probabilities

$$q(y) \propto \exp\left(\frac{1}{T} \sum_t \log p(y_t \mid y_{<t})\right)$$

and the drawn ones go on as in beam search, best score first. Drawing is by Gumbel-top-k (Vieira
2014): those with the largest sum of score / T and Gumbel noise.
"""

from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.samplers._beam_candidates import (
    best_of_each_prompt,
    candidates_per_beam,
    choice_of,
)
from gptk_plugins.samplers.beam import Beam


class BeamSample(Beam):
    """Beam search whose candidates are drawn at random instead of being the best."""

    name = "beam-sample"
    example = "width=4,temperature=0.7"
    random = True
    other_names = Beam.other_names | {"do_sample": ""}

    temperature: float = Field(
        1.0, ge=1e-6, le=1e6, description="below 1 sharpens, above 1 flattens"
    )

    def step(self, logits: Tensor, rows: gptk.Rows) -> gptk.Choice:
        count = self.width * candidates_per_beam(rows)
        logprobs = logits.log_softmax(dim=-1)
        scores = logprobs + rows.scores[:, None]
        noise = -rows.exponential(logits.shape[-1], apart=True).log()
        keys = scores / self.temperature + noise
        drawn = gptk.vocabulary.top(keys, min(count, logits.shape[-1]))
        logprobs, scores = logprobs.gather(1, drawn.tokens), scores.gather(1, drawn.tokens)
        chosen = best_of_each_prompt(drawn.values, rows, count)
        # Best score first, prompt by prompt: a stable sort by the score, then by the prompt.
        chosen = chosen[scores.flatten()[chosen].argsort(descending=True, stable=True)]
        prompts = chosen.new_tensor(rows.prompts)[chosen // scores.shape[1]]
        chosen = chosen[prompts.argsort(stable=True)]
        return choice_of(chosen, drawn.tokens, logprobs, scores)
