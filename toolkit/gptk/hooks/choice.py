"""What a sampler decides at a step."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptk.errors import counted, shown

if TYPE_CHECKING:
    from torch import Tensor

    from gptk.session.rows import Rows


@dataclass(frozen=True)
class Choice:
    """What a sampler decides at a step: which tokens extend which rows.

    Candidates are in order of preference. Those that end (end of text, stop string, length)
    finish; the others become the new rows, as many as the sampler's `max_rows` allows.
    """

    tokens: "Tensor"
    """(candidates,) int64"""
    logprobs: "Tensor"
    """(candidates,) float32: each token's log-probability after all processors."""
    scores: "Tensor"
    """(candidates,) float32: the running score of the row with this token."""
    parents: "Tensor | None" = None
    """(candidates,) int64: the row that each extends; None: candidate i extends row i."""

    @classmethod
    def one_each(cls, tokens: "Tensor", logits: "Tensor", rows: "Rows") -> "Choice":
        """One token for each row, scored by its log-probability. tokens: (rows,) int64.

        Raises TypeError or ValueError for other tokens.
        """
        from gptk.vocabulary import logprobs_of

        if not hasattr(tokens, "is_floating_point"):
            raise TypeError(f"the tokens are {shown(tokens)}; they must be a tensor")
        if tokens.shape != (len(rows),):
            shape = f"tokens of shape {tuple(tokens.shape)}"
            what = counted(len(tokens), "token") if tokens.dim() == 1 else shape
            needed = counted(len(rows), "row")
            raise ValueError(f"{what} for {needed}; there must be one for each, (rows,)")
        if tokens.is_floating_point() or tokens.dtype.is_complex:
            raise TypeError(f"the tokens are of type {tokens.dtype}; they must be whole numbers")
        tokens = tokens.long()
        logprobs = logprobs_of(logits.gather(1, tokens[:, None]), logits)[:, 0]
        return cls(tokens=tokens, logprobs=logprobs, scores=rows.scores + logprobs)
