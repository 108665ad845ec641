r"""Classifier-free guidance (Sanchez et al. 2023): away from a negative prompt's continuation.

$$\log p'(v) = \log p(v \mid \text{negative})
+ \text{scale} \cdot \left(\log p(v \mid \text{row}) - \log p(v \mid \text{negative})\right)$$

The row's new tokens are appended to both prompts. Without a negative prompt, that is the last
token of the row's own prompt, as in transformers; scale 1 changes nothing. Each step runs the model
a second time.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

import gptk


class CFG(gptk.LogitsProcessor):
    """Strengthens the prompt's influence on the text, or avoids a negative prompt's."""

    name = "cfg"
    example = "scale=1.5"
    positional = "scale"
    other_names = {"guidance_scale": "scale", "negative_prompt": "negative"}

    scale: float = Field(
        1.5, ge=-1e6, le=1e6, description="above 1 follows the prompt more closely"
    )
    negative: str | tuple[int, ...] | None = Field(
        None, description="the negative prompt, a text or a list of token ids"
    )

    def start(self, rows: gptk.Rows) -> "Guidance":
        if rows.model is None:
            raise gptk.OptionError("processor cfg runs the model once more; these rows have none")
        first_rows = [rows.prompts.index(prompt) for prompt in range(max(rows.prompts) + 1)]
        negative = self._tokens(rows)
        prompts = [
            negative or [int(rows.tokens[row, rows.prompt_lengths[row] - 1])] for row in first_rows
        ]
        session = gptk.DecodeSession(rows.model, prompts, overflow="slide")
        session.select(rows.prompts)
        return Guidance(session, self.scale)

    def _tokens(self, rows: gptk.Rows) -> list[int] | None:
        if not self.negative:
            return None
        if isinstance(self.negative, tuple):
            tokens = list(self.negative)
        elif rows.tokenizer is None:
            raise gptk.TokenizerError(
                "a negative prompt as text needs the model's tokenizer; there is none"
            )
        else:
            tokens = rows.tokenizer.encode(self.negative)
        assert rows.model is not None
        size = rows.model.config.vocab_size
        if bad := [token for token in tokens if not 0 <= token < size]:
            raise gptk.OptionError(
                f"processor cfg: token {bad[0]} is not in the model's vocabulary of {size}"
            )
        return tokens


class Guidance(gptk.Follower):
    """A session of the same model, whose rows begin with the negative prompt."""

    def __init__(self, session: gptk.DecodeSession, scale: float) -> None:
        self._session = session
        self._scale = scale

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        session = self._session
        if not all(session.known):
            session.read()
        negative = session.logits.log_softmax(dim=-1)
        guided = negative + self._scale * (logits.log_softmax(dim=-1) - negative)
        return guided.masked_fill(logits == -torch.inf, -torch.inf)

    def extend(self, tokens: Tensor) -> None:
        self._session.move(tokens)

    def select(self, parents: Sequence[int]) -> None:
        self._session.select(parents)

    def rewind(self, counts: Sequence[int]) -> None:
        self._session.rewind(counts)
