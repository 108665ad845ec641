r"""Beam search: keep the `width` likeliest partial sequences at each step.

$$\text{score}(y) = \frac{1}{|y|^{\alpha}} \sum_{t=1}^{|y|} \log p(y_t \mid y_{<t})$$

with $\alpha$ = length_penalty and $|y|$ the length of the continuation, EOS included. The
bookkeeping follows transformers, so that results are equal: of the 2·width best candidates, those
that end become results if they are among the first `width`, and the first `width` that do not end
go on.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

import gptk
from gptk_plugins.samplers._beam_candidates import (
    best_of_each_prompt,
    candidates_per_beam,
    choice_of,
)


class Beam(gptk.Sampler):
    """The likeliest sequences found by keeping a fixed number of them at each step."""

    name = "beam"
    example = "width=4"
    positional = "width"
    other_names = {
        "num_beams": "width",
        "beam_size": "width",
        "beam_width": "width",
        "length_penalty": "length_penalty",
        "early_stopping": "early_stopping",
    }
    competing = True

    width: int = Field(4, ge=1, description="beams kept at each step")
    length_penalty: float = Field(
        1.0, ge=-10, le=10, description="above 0 favours longer results, below 0 shorter ones"
    )
    early_stopping: bool | Literal["never"] = Field(
        False,
        description="true: stop at `width` results; false: when a better one is unlikely; "
        "never: when a better one is impossible",
    )

    def max_rows(self, n: int) -> int:
        if n > self.width:
            raise gptk.OptionError(
                f"n={n} results are more than the beam width {self.width}; "
                f"ask for at most {self.width}, or give {self.name}:width={n}"
            )
        return self.width

    def step(self, logits: Tensor, rows: gptk.Rows) -> gptk.Choice:
        count = self.width * candidates_per_beam(rows)
        # The best candidates of a prompt are among the best of each of its rows.
        top = gptk.vocabulary.top(logits, min(count, logits.shape[-1]))
        logprobs = gptk.vocabulary.logprobs_of(top.values, logits)
        scores = logprobs + rows.scores[:, None]
        best = best_of_each_prompt(scores, rows, count)
        return choice_of(best, top.tokens, logprobs, scores)

    def rank(self, score: float, length: int) -> float:
        return float(score / max(length, 1) ** self.length_penalty)

    def is_done(self, finished: Sequence[float], best: float, length: int, limit: int) -> bool:
        if len(finished) < self.width // self.groups:
            return False
        if self.early_stopping is True:
            return True
        # Running scores are below zero: with a positive penalty the longest length ranks best.
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = limit
        return self.rank(best, length) <= finished[-1]
