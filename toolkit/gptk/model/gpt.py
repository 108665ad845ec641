"""One GPT, as configuration: GPT-2 and the Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3).

Read from top to bottom: normalization, attention, MLP, block, model. What is unusual:

- queries, keys and values come from one matrix, and so do an MLP's gate and up projections;
- the rotary embedding is applied to queries, keys and values in one operation, with an angle of 0
  for values and the sign in the sine table: in decoding, small operations cost more to call than
  to compute;
- in decoding, the query heads of a group and the rows of a prompt share the query axis of
  attention, and so one read of the keys; on CPUs that is many times faster than `enable_gqa`, and
  than a cache for each beam;
- each row of a batch has its own positions, see gptk.model.cache.
"""

from collections.abc import Collection
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptk import kernels
from gptk.model.cache import KVCache, Slots
from gptk.model.config import GPTConfig
from gptk.model.embedding import Embedding
from gptk.model.layout import PackableModel
from gptk.model.linear import HooklessModule, Linear
from gptk.model.panels import Panels


class RMSNorm(HooklessModule, nn.RMSNorm):
    """nn.RMSNorm (Zhang and Sennrich 2019). PyTorch runs eight small kernels for it in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 16 == 0 and kernels.can_run(x, self.weight):
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
            return kernels.rms_norm(x, self.weight, eps)
        return super().forward(x)


class LayerNorm(HooklessModule, nn.LayerNorm):
    """nn.LayerNorm (Ba et al. 2016), in inference by gptk's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if kernels.can_run(x, self.weight):
            return kernels.layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    """Layer norm or RMS norm over the last axis."""
    if config.norm == "rms":
        return RMSNorm(size, eps=config.norm_eps)
    return LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)


Rope = tuple[Tensor, Tensor]
"""Cosines and sines for the tokens of a pass, (1 or rows, time, heads, head_dim) each: for the
heads of queries, keys and values; for values, cosines are 1 and sines 0."""


class Joined(Protocol):
    """Where the tokens of several rows go and what they see, see gptk.model.passes."""

    @property
    def positions(self) -> Tensor:
        """(1, tokens): the position of each token in its row."""
        raise NotImplementedError

    @property
    def wanted(self) -> Tensor | None:
        """Which of the tokens the states are asked of; None: of all. The last block then leaves out
        what only concerns the others."""
        raise NotImplementedError

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        """Attention of all tokens. qkv: (1, tokens, heads, d). Returns (tokens, heads · d)."""
        raise NotImplementedError


AnySlots = Slots | Joined | None
"""Of a cache, of caches in blocks, or of none: the tokens are the first ones."""


class Attention(HooklessModule):
    """Causal self-attention with grouped heads and a KV cache."""

    dropout = 0.0
    """The dropout probability of attention weights, in training."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        heads = config.n_heads + 2 * config.n_kv_heads
        self.qkv = Linear(config.width, heads * config.head_dim, bias=config.qkv_bias)
        self.out = Linear(config.n_heads * config.head_dim, config.width, bias=config.out_bias)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rows: int,
        rope: Rope | None,
        slots: AnySlots,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x: (rows · time, width). slots: of the KV cache, if there is one. Returns x's shape, or
        the results of the tokens that are wanted, (tokens, width)."""
        qkv = self.qkv(x)
        qkv = qkv.view(rows, -1, self.n_heads + 2 * self.n_kv_heads, self.head_dim)
        heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        # Split, not sliced: the backward pass then concatenates the parts, without adding to zeros.
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split(heads, dim=2)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=2)
        if rope is not None:
            qkv = rotate(qkv, *rope)
        if slots is None:
            q, k, v = qkv.split(heads, dim=2)
            y = attend_causally(q, k, v, self.dropout if self.training else 0.0)
        elif not isinstance(slots, Slots):
            y = slots.attend(qkv, self.layer)
        else:
            kv = qkv.narrow(2, self.n_heads, 2 * self.n_kv_heads)
            kv = kv.view(rows, -1, 2, self.n_kv_heads, self.head_dim)
            slots.write(self.layer, kv)
            q = qkv.narrow(2, 0, self.n_heads)
            y = attend_causally(q, *kv.unbind(2)) if slots.causal else attend(q, self.layer, slots)
        return self.out(y if wanted is None else y[wanted])  # type: ignore[no-any-return]


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), halves of a head as pairs.

    x: (rows, time, heads, head_dim); cosines, sines: (1 or rows, time, heads, head_dim).
    """
    if x.shape[-1] % 32 == 0 and kernels.can_run(x, cosines):
        return kernels.rotate(x, cosines, sines)
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, dims=-1), sines)


def attend_causally(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √d) v where each token sees itself and those before it.

    q: (rows, time, heads, d); k, v: (rows, time, kv_heads, d). Returns (rows · time, heads · d).
    """
    if not dropout and kernels.should_run_causal_attention(q, k, v):
        return kernels.attend_causally(q, k, v).flatten(2).flatten(0, 1)
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, dropout_p=dropout
    )
    return y.transpose(1, 2).flatten(2).flatten(0, 1)


def attend(q: Tensor, layer: int, slots: Slots) -> Tensor:
    """softmax(q kᵀ / √d) v over a KV cache, where each token sees the slots of its row.

    The heads of a group and the rows of a tree share the query axis, so that keys are read once for
    all of them. q: (rows, time, heads, d). Returns (rows · time, heads · d).
    """
    rows, time, heads, d = q.shape
    keys, values = slots.keys[layer], slots.values[layer]
    # Trees and key heads are the batch: then the memory of the result is in the order of heads.
    batch = keys.shape[0]
    kv_heads, group = batch // slots.trees, heads * slots.trees // batch
    few_queries = slots.rows_per_tree * time * group <= kernels.FEW_QUERIES
    if few_queries and d in kernels.HEAD_DIMS and kernels.can_run(q, keys):
        q = q if slots.tree_index is None else slots.by_tree(q)
        y = kernels.attend(q.reshape(-1, heads, d), keys, values, slots.mask, slots.trees)
        return slots.by_row(y.view(-1, time, heads * d)).view(rows * time, -1)
    if slots.one_token_per_tree:
        q = q.reshape(batch, 1, -1, d)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=slots.mask_of_heads)
        return y.view(slots.trees, -1)
    # (trees, rows, time, kv_heads, group, d) -> (trees, kv_heads, group, rows, time, d)
    q = slots.by_tree(q).view(slots.trees, slots.rows_per_tree, time, kv_heads, group, d)
    q = q.permute(0, 3, 4, 1, 2, 5).reshape(batch, 1, -1, d)
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=slots.mask_of_heads)
    y = y.view(slots.trees, kv_heads, -1, slots.rows_per_tree, time, d).permute(0, 3, 4, 1, 2, 5)
    return slots.by_row(y.reshape(slots.trees * slots.rows_per_tree, time, heads * d)).flatten(0, 1)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up. x: (…, gate and up)."""
    if x.shape[-1] % 32 == 0 and kernels.can_run(x, x):
        return kernels.swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class MLP(HooklessModule):
    """Two layers with GELU, or a gated pair with SiLU (SwiGLU, Shazeer 2020)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        up = 2 * config.mlp_width if config.mlp == "swiglu" else config.mlp_width
        self.up = Linear(config.width, up, bias=config.mlp_bias)
        self.down = Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "swiglu":
            x = swiglu(x)
        elif self.kind == "gelu-tanh" and kernels.should_run_gelu(x):
            x = kernels.gelu(x)
        else:
            x = F.gelu(x, approximate="tanh" if self.kind == "gelu-tanh" else "none")
        return self.down(x)  # type: ignore[no-any-return]


class Block(HooklessModule):
    """Pre-norm attention and MLP, each added to the residual stream."""

    dropout = 0.0
    """The dropout probability of what is added to the residual stream, in training."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = make_norm(config, config.width)
        self.attn = Attention(config, layer)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rows: int,
        rope: Rope | None,
        slots: AnySlots,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x: (rows · time, width). Returns the same shape, or the tokens that are wanted."""
        y = self.attn(self.attn_norm(x), rows, rope, slots, wanted)
        x = x if wanted is None else x[wanted]
        x = x + (F.dropout(y, self.dropout) if self.training and self.dropout else y)
        y = self.mlp(self.mlp_norm(x))
        return x + (F.dropout(y, self.dropout) if self.training and self.dropout else y)


class GPT(PackableModel):
    """A decoder-only transformer; see GPTConfig for what can vary."""

    dropout = 0.0
    """The dropout probability of the embeddings, in training."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)
        learned = config.positions == "learned"
        self.embed_positions = (
            nn.Embedding(config.context_length, config.width) if learned else None
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config, config.width)
        self.head = Linear(config.width, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.weight
        self._rope = torch.empty(2, 0, config.head_dim, dtype=torch.float32, device="cpu")
        self._initialize()

    def forward(
        self, ids: Tensor, cache: KVCache | None = None, counts: list[int] | None = None
    ) -> Tensor:
        """The final hidden state of each token, normalized; `logits` computes logits from it.

        ids: (rows, time). With a cache the tokens follow those in it; row i has counts[i] of them
        (default: all), and the rest is padding. Returns (rows, time, width).
        """
        return self.states(ids, cache, counts)[:, :, 0]

    def states(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        counts: list[int] | None = None,
        layers: Collection[int] = (),
    ) -> Tensor:
        """As `forward`, with the hidden states of layers as well.

        layers: in ascending order; 0 are the embeddings, i is the result of the i-th block. Returns
        (rows, time, 1 + layers, width): the normalized final state, then the unnormalized others.
        """
        rows, time = ids.shape
        if cache is None:
            return self.states_at(ids, None, self.position_table(time), layers)
        slots = cache.plan(time, self.config.n_heads // self.config.n_kv_heads)
        table = self.position_table(max(cache.lengths) + time)
        states = self.states_at(ids, slots, table, layers)
        cache.advance(counts or [time] * rows, slots)
        return states

    def states_at(
        self, ids: Tensor, slots: AnySlots, table: Tensor, layers: Collection[int] = ()
    ) -> Tensor:
        """`states` of tokens that go to these slots of a cache; without slots, from position 0.

        table: see `position_table`. Returns the states of all tokens, or of those that the slots
        say are wanted.
        """
        rows, time = ids.shape
        positions = slots.positions if slots else torch.arange(time, device=ids.device)[None]
        rope = self._rope_at(positions, table) if self.embed_positions is None else None
        x = self.embeddings(ids, positions).flatten(0, 1)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        kept = [x] if 0 in layers else []
        wanted = None if slots is None or isinstance(slots, Slots) else slots.wanted
        for layer, block in enumerate(self.blocks, start=1):
            x = block(x, rows, rope, slots, wanted if layer == len(self.blocks) else None)
            if layer in layers:
                kept.append(x)
        if wanted is not None:
            kept = [states if len(states) == len(x) else states[wanted] for states in kept]
        return torch.stack((self.norm(x), *kept), dim=1).view(rows, -1, 1 + len(kept), x.shape[-1])

    def embeddings(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads. ids, positions: (rows, time). Returns (rows, time, width)."""
        x: Tensor = self.embed(ids)
        return x if self.embed_positions is None else x + self.embed_positions(positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, float32. hidden: (…, width). Returns (…, vocab)."""
        packed = self.head.packed
        if isinstance(packed, Panels) and self.head.is_plain(hidden):
            return packed.linear_in_float32(hidden)  # without a copy in hidden's dtype
        return self.head(hidden).float()  # type: ignore[no-any-return]

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty KV cache for `rows` rows with memory for `capacity` tokens each."""
        sizes = (self.config.n_layers, self.config.n_kv_heads, self.config.head_dim)
        return KVCache(*sizes, rows=rows, capacity=capacity, device=self.device, dtype=self.dtype)

    def set_dropout(self, p: float) -> None:
        """Dropout in training, where GPT-2 has it: embeddings, attention weights, residuals."""
        for module in self.modules():
            if isinstance(module, GPT | Block | Attention):
                module.dropout = p

    def _initialize(self) -> None:
        """GPT-2's: std 0.02, or 0.02 / √(2 n_layers) for projections onto the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
                std = 0.02 / (2 * self.config.n_layers) ** 0.5 if residual else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def _rope_at(self, positions: Tensor, table: Tensor) -> Rope:
        """The rotary angles of queries, keys and values. positions: (1 or rows, time)."""
        config = self.config
        rotated = config.n_heads + config.n_kv_heads
        values_shape = (*positions.shape, config.n_kv_heads, config.head_dim)
        cosines, sines = table[:, positions, None].expand(-1, -1, -1, rotated, -1)
        ones, zeros = table.new_ones(values_shape), table.new_zeros(values_shape)
        return torch.cat((cosines, ones), dim=2), torch.cat((sines, zeros), dim=2)

    def position_table(self, length: int) -> Tensor:
        """(2, at least `length`, head_dim): cosines, and sines with `rotate`'s sign.

        Empty where positions are learned.
        """
        table, device, dtype = self._rope, self.device, self.dtype
        if self.embed_positions is not None:
            return table
        is_long_enough = table.shape[1] >= length
        if is_long_enough and table.device == device and table.dtype == dtype:
            return table
        # Computed in float32 whatever the model's dtype, as angles grow large; at least doubled if
        # too short. Not an inference tensor, so that training can use it after sampling.
        with torch.inference_mode(False):
            length = max(length, 2 * table.shape[1], 128)
            half = self.config.head_dim // 2
            exponents = torch.arange(half, device=device, dtype=torch.float32) / half
            frequencies = 1.0 / self.config.rope_theta**exponents
            if self.config.rope_factors is not None:
                frequencies /= torch.tensor(self.config.rope_factors, device=device)
            positions = torch.arange(length, device=device, dtype=torch.float32)
            angles = torch.outer(positions, frequencies)
            cos, sin = angles.cos(), angles.sin()
            table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
            self._rope = table.to(dtype)
        return self._rope
