"""Small models that several tests share; more are in gptk.testing."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptk import GPTConfig, Tokenizer, load_tokenizer
from gptk.testing.models import TINY as LLAMA_LIKE

VOCABULARY = 257

GPT2_LIKE = GPTConfig(
    vocab_size=VOCABULARY,
    context_length=32,
    width=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    head_dim=8,
    mlp_width=64,
)
# Options for the built-in processors that require any, or whose defaults change too little.
PROCESSOR_OPTIONS = {
    "bad-words": "words=[[1, 2], [5]]",
    "cfg": "negative=[3]",
    "choice": """choices='["ab", "b"]'""",
    "dry": "multiplier=0.8,allowed_length=1,sequence_breakers=[3]",
    "forced-tokens": "tokens=[5, 7],at=1",
    "grammar": """grammar='start: ("a" | "b")* "c"'""",
    "json-schema": 'schema={"type": "integer"}',
    "length-decay": "after=1,factor=1.5",
    "logit-bias": 'bias={"3": 2.5, "4": -100}',
    "min-new-tokens": "n=2",
    "no-repeat-ngram": "size=2",
    "regex": "pattern=[a-f]{2}x*",
    "sequence-bias": "biases=[[[3, 4], 2.5]]",
    "suppress-tokens": "tokens=[3, 4]",
    "top-k": "k=3",
}
CONFIGS = {"gpt2-like": GPT2_LIKE, "llama-like": LLAMA_LIKE}


def byte_tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


@dataclass(frozen=True)
class TableConfig:
    """A `gptk.ModelConfig` without hidden states to compare and without layers."""

    vocab_size: int
    context_length: int = 64
    width: int = 0
    n_layers: int = 0
    tied_head: bool = False


class TableCache:
    """For each token of each row, the index of the table line that predicts the next token."""

    def __init__(self, rows: int) -> None:
        self.lines: list[list[int]] = [[] for _ in range(rows)]

    @property
    def lengths(self) -> list[int]:
        return [len(lines) for lines in self.lines]

    def select(self, parents: Sequence[int]) -> None:
        self.lines = [list(self.lines[parent]) for parent in parents]

    def rewind(self, counts: Sequence[int]) -> None:
        self.lines = [
            lines[: len(lines) - count] for lines, count in zip(self.lines, counts, strict=True)
        ]

    def clear(self) -> None:
        self.lines = [[] for _ in self.lines]


class TableModel:
    """A `gptk.CausalModel` that is no GPT and no module: a table of next-token probabilities.

    table: (lines, vocab), in each line the probabilities of the next token. Which line it is
    depends on all tokens of a row and on their order, so that a lost or swapped token shows. The
    state after a token is the number of the line.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, table: Tensor) -> None:
        self.config = TableConfig(vocab_size=table.shape[1])
        self.log_table = table.float().log()

    def new_cache(self, rows: int, capacity: int) -> TableCache:
        return TableCache(rows)

    def states(
        self,
        ids: Tensor,
        cache: TableCache | None,
        counts: list[int] | None,
        layers: Collection[int],
    ) -> Tensor:
        assert not layers, "it has no layers"
        rows, time = ids.shape
        cache = TableCache(rows) if cache is None else cache
        states = torch.zeros(rows, time, 1, 1)
        for row, (lines, tokens) in enumerate(zip(cache.lines, ids.tolist(), strict=True)):
            for position, token in enumerate(tokens[: time if counts is None else counts[row]]):
                lines.append(self.next_line(lines[-1] if lines else 0, token))
                states[row, position] = lines[-1]
        return states

    def next_line(self, line: int, token: int) -> int:
        return (3 * line + token + 1) % len(self.log_table)

    def logits(self, states: Tensor) -> Tensor:
        return self.log_table[states[..., 0].long()]


def table_model(vocabulary: int = VOCABULARY, *, noise: float = 0.0) -> TableModel:
    """A table of 61 random lines. noise: how much it differs from the table without noise."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(61, vocabulary, generator=generator)
    logits += noise * torch.randn(logits.shape, generator=generator)
    return TableModel(logits.softmax(-1))
