"""Attention: of the tokens of a pass among themselves, or over a KV cache."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import kernels
from gptk.model.cache import Slots
from gptk.model.config import GPTConfig


@dataclass(frozen=True)
class Scoring:
    """How a layer scores keys, and which of them a query sees."""

    scale: float
    """What products of queries and keys are multiplied by."""
    softcap: float | None = None
    """Bounds scores softly: cap · tanh(score / cap)."""
    window: int | None = None
    """How many tokens a query sees, the last ones, itself included. None: all."""
    is_usual: bool = True
    """The scale is 1 / √d, and scores have no bound."""

    @property
    def is_plain(self) -> bool:
        """Scores are as usual, and no window hides keys."""
        return self.is_usual and self.window is None


def scoring_of(config: GPTConfig, layer: int) -> Scoring:
    """How a layer of a GPT scores keys."""
    usual = config.head_dim**-0.5
    scale = usual if config.attention_scale is None else config.attention_scale
    window = config.window if config.has_window(layer) else None
    is_usual = abs(scale / usual - 1) < 1e-6 and config.attention_softcap is None
    return Scoring(scale, config.attention_softcap, window, is_usual)


def attend_causally(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q kᵀ / √d) v where each token sees itself and those before it.

    q: (rows, time, heads, d); k, v: (rows, time, kv_heads, d). scoring: if it is another. Returns
    (rows · time, heads · d).
    """
    scoring = scoring or Scoring(q.shape[-1] ** -0.5)
    time = q.shape[1]
    sees_all = scoring.window is None or time <= scoring.window
    fits = scoring.is_usual and sees_all and not dropout
    if fits and kernels.should_run_causal_attention(q, k, v):
        return kernels.attend_causally(q, k, v).flatten(2).flatten(0, 1)
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    mask = None if sees_all else visible(torch.arange(time, device=q.device), 0, time, scoring)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = softmax_attention(q, k, v, mask, scoring, is_causal=sees_all, dropout=dropout)
    return y.transpose(1, 2).flatten(2).flatten(0, 1)


def attend(q: Tensor, layer: int, slots: Slots, scoring: Scoring | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v over a KV cache, where each token sees the slots of its row.

    The heads of a group and the rows of a tree share the query axis, so that keys are read once for
    all of them. q: (rows, time, heads, d). scoring: if it is another. Returns (rows · time,
    heads · d).
    """
    rows, time, heads, d = q.shape
    scoring = scoring or Scoring(d**-0.5)
    keys, values = slots.keys[layer], slots.values[layer]
    mask = slots.mask if scoring.window is None else slots.window_mask
    # Trees and key heads are the batch: then the memory of the result is in the order of heads.
    batch = keys.shape[0]
    kv_heads, group = batch // slots.trees, heads * slots.trees // batch
    few_queries = slots.rows_per_tree * time * group <= kernels.FEW_QUERIES
    fits = few_queries and scoring.is_usual and d in kernels.HEAD_DIMS
    if fits and kernels.can_run(q, keys):
        q = q if slots.tree_index is None else slots.by_tree(q)
        y = kernels.attend(q.reshape(-1, heads, d), keys, values, mask, slots.trees)
        return slots.by_row(y.view(-1, time, heads * d)).view(rows * time, -1)
    mask = slots.of_heads(mask)
    if slots.one_token_per_tree:
        q = q.reshape(batch, 1, -1, d)
        return softmax_attention(q, keys, values, mask, scoring).view(slots.trees, -1)
    # (trees, rows, time, kv_heads, group, d) -> (trees, kv_heads, group, rows, time, d)
    q = slots.by_tree(q).view(slots.trees, slots.rows_per_tree, time, kv_heads, group, d)
    q = q.permute(0, 3, 4, 1, 2, 5).reshape(batch, 1, -1, d)
    y = softmax_attention(q, keys, values, mask, scoring)
    y = y.view(slots.trees, kv_heads, -1, slots.rows_per_tree, time, d).permute(0, 3, 4, 1, 2, 5)
    return slots.by_row(y.reshape(slots.trees * slots.rows_per_tree, time, heads * d)).flatten(0, 1)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    *,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scores) v by PyTorch. q, k, v: (…, time, d). mask: added to scores, or what is seen;
    the window is in it. is_causal: each query sees as many keys as there are queries up to it."""
    if scoring.softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, scale=scoring.scale
        )
    scores = q.float() @ k.float().transpose(-2, -1) * scoring.scale
    scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        is_seen = mask if mask.dtype == torch.bool else mask == 0
        scores = scores.masked_fill(~is_seen, -torch.inf)
    weights = F.dropout(scores.softmax(-1), dropout, training=bool(dropout))
    return weights.to(v.dtype) @ v


def visible(positions: Tensor, first: int, end: int, scoring: Scoring) -> Tensor:
    """Which keys each query sees, (queries, keys). positions: (queries,), of the queries; keys have
    the positions from `first` to `end`."""
    keys, queries = torch.arange(first, end, device=positions.device), positions[:, None]
    seen = keys <= queries
    return seen if scoring.window is None else seen & (keys > queries - scoring.window)
