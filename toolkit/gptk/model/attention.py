"""Attention: of the tokens of a pass among themselves, or over a KV cache."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import kernels
from gptk.model.cache import Slots
from gptk.model.config import GPTConfig


@dataclass(frozen=True)
class Attending:
    """What differs between layers of models in how a token sees those before it, and itself."""

    scale: float | None = None
    """Of the scores; None: 1 / √d."""
    softcap: float | None = None
    """Scores are softcap · tanh(score / softcap) (Gemma 2)."""
    sinks: Tensor | None = None
    """(heads,): scores of a key without a value that all queries see, too (gpt-oss)."""
    window: int | None = None
    """A token sees this many of the last tokens, itself included (Mistral)."""
    chunk: int | None = None
    """A token sees those in its part of the row, which has this many tokens (Llama 4)."""

    def first(self, position: int) -> int:
        """The first position that the token at a position sees."""
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return first if self.chunk is None else max(first, position // self.chunk * self.chunk)

    @property
    def has_usual_scores(self) -> bool:
        """Whether the weights of the keys seen are their softmax(q kᵀ · scale)."""
        return self.softcap is None and self.sinks is None

    @property
    def is_usual(self) -> bool:
        """Whether these weights are softmax(q kᵀ / √d)."""
        return self.has_usual_scores and self.scale is None

    @property
    def is_plain(self) -> bool:
        """Whether it is softmax(q kᵀ / √d) over all tokens before."""
        return self.is_usual and self.window is None and self.chunk is None

    def seen(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which keys each query sees, (queries, keys). queries, keys: their positions."""
        queries = queries[:, None]
        seen = keys <= queries
        if self.window is not None:
            seen &= keys > queries - self.window
        if self.chunk is not None:
            seen &= keys // self.chunk == queries // self.chunk
        return seen

    def scaled(self, qkv: Tensor, heads: int) -> Tensor:
        """qkv with queries for which the scale is 1 / √d. qkv: (tokens, heads + 2 · kv_heads, d),
        of which nobody else has a part."""
        factor = 1.0 if self.scale is None else self.scale * math.sqrt(qkv.shape[2])
        if abs(factor - 1) > 1e-12:
            qkv[:, :heads] *= factor
        return qkv


PLAIN = Attending()


def attending_of(config: GPTConfig, layer: int) -> Attending:
    """How a layer of a GPT attends."""
    scale, window = config.attention_scale, config.window if config.has_window(layer) else None
    if scale is not None and abs(scale * math.sqrt(config.head_dim) - 1) < 1e-6:
        scale = None
    return Attending(scale, config.attention_softcap, window=window)


def attend_causally(
    q: Tensor, k: Tensor, v: Tensor, how: Attending = PLAIN, dropout: float = 0.0
) -> Tensor:
    """softmax(q kᵀ / √d) v where each token sees itself and those before it.

    q: (rows, time, heads, d); k, v: (rows, time, kv_heads, d). how: if it is another. Returns
    (rows · time, heads · d).
    """
    time = q.shape[1]
    sees_all = how.window is None or time <= how.window
    fits = how.is_usual and sees_all and not dropout
    if fits and kernels.should_run_causal_attention(q, k, v):
        return kernels.attend_causally(q, k, v).flatten(2).flatten(0, 1)
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    places = torch.arange(time, device=q.device)
    mask = None if sees_all else how.seen(places, places)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = softmax_attention(q, k, v, mask, how, is_causal=sees_all, dropout=dropout)
    return y.transpose(1, 2).flatten(2).flatten(0, 1)


def attend(q: Tensor, layer: int, slots: Slots, how: Attending = PLAIN) -> Tensor:
    """softmax(q kᵀ / √d) v over a KV cache, where each token sees the slots of its row.

    The heads of a group and the rows of a tree share the query axis, so that keys are read once for
    all of them. q: (rows, time, heads, d). how: if it is another. Returns (rows · time,
    heads · d).
    """
    rows, time, heads, d = q.shape
    keys, values = slots.keys[layer], slots.values[layer]
    mask = slots.mask if how.window is None else slots.window_mask
    # Trees and key heads are the batch: then the memory of the result is in the order of heads.
    batch = keys.shape[0]
    kv_heads, group = batch // slots.trees, heads * slots.trees // batch
    few_queries = slots.rows_per_tree * time * group <= kernels.FEW_QUERIES
    fits = few_queries and how.is_usual and d in kernels.HEAD_DIMS
    if fits and kernels.can_run(q, keys):
        q = q if slots.tree_index is None else slots.by_tree(q)
        y = kernels.attend(q.reshape(-1, heads, d), keys, values, mask, slots.trees)
        return slots.by_row(y.view(-1, time, heads * d)).view(rows * time, -1)
    mask = slots.of_heads(mask)
    if slots.one_token_per_tree:
        q = q.reshape(batch, 1, -1, d)
        return softmax_attention(q, keys, values, mask, how).view(slots.trees, -1)
    # (trees, rows, time, kv_heads, group, d) -> (trees, kv_heads, group, rows, time, d)
    q = slots.by_tree(q).view(slots.trees, slots.rows_per_tree, time, kv_heads, group, d)
    q = q.permute(0, 3, 4, 1, 2, 5).reshape(batch, 1, -1, d)
    y = softmax_attention(q, keys, values, mask, how)
    y = y.view(slots.trees, kv_heads, -1, slots.rows_per_tree, time, d).permute(0, 3, 4, 1, 2, 5)
    return slots.by_row(y.reshape(slots.trees * slots.rows_per_tree, time, heads * d)).flatten(0, 1)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    how: Attending,
    *,
    is_causal: bool = False,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scores) v by PyTorch. q, k, v: (…, time, d). mask: added to scores, or what is seen;
    the window is in it. is_causal: each query sees as many keys as there are queries up to it.
    sinks: those of each query, (…, time, 1)."""
    if how.has_usual_scores:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, scale=how.scale
        )
    scale = q.shape[-1] ** -0.5 if how.scale is None else how.scale
    scores = q.float() @ k.float().transpose(-2, -1) * scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        is_seen = mask if mask.dtype == torch.bool else mask == 0
        scores = scores.masked_fill(~is_seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[-2]]
    weights = F.dropout(weights, dropout, training=bool(dropout))
    return weights.to(v.dtype) @ v


def attend_row(
    q: Tensor, keys: Tensor, values: Tensor, past: int, first: int, how: Attending
) -> Tensor:
    """Attention of the last tokens of a row.

    q: (count, heads, d), of the tokens from position `past` on; keys, values: (kv_heads, n, d) of
    the tokens from position `first` on, up to the last of these. Returns q's shape.
    """
    count, heads, d = q.shape
    kv_heads, n, _ = keys.shape
    # The heads of a group share the query axis, so that keys are read once for all of them.
    q = q.view(count, kv_heads, -1, d).permute(1, 2, 0, 3).reshape(kv_heads, -1, d)
    mask = sinks = None
    if count > 1 or how.first(past) > first:
        queries = torch.arange(past, past + count, device=q.device)
        mask = how.seen(queries, torch.arange(first, first + n, device=q.device))
        mask = mask.repeat(heads // kv_heads, 1)
    if how.sinks is not None:
        sinks = how.sinks.view(kv_heads, -1, 1).repeat_interleave(count, dim=1)
    y = softmax_attention(q, keys, values, mask, how, sinks=sinks)
    return y.view(kv_heads, -1, count, d).permute(2, 0, 1, 3).reshape(count, heads, d)
