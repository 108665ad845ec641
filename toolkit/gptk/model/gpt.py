"""One GPT, as configuration: GPT-2, Llama, Gemma and their kin; see docs/models.md for all.

Read from top to bottom: attention, MLP, block, model. What is unusual:

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
from gptk.model.attention import Attending, attend, attend_causally, attending_of
from gptk.model.cache import KVCache, Slots
from gptk.model.config import GPTConfig
from gptk.model.embedding import Embedding
from gptk.model.layout import PackableModel
from gptk.model.linear import HooklessModule, Linear
from gptk.model.norms import make_norm
from gptk.model.panels import Panels
from gptk.model.rotary import rotary_tables, rotate

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

    def attend(self, qkv: Tensor, layer: int, how: Attending) -> Tensor:
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
        self.attending = attending_of(config, layer)
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        heads = config.n_heads + 2 * config.n_kv_heads
        self.qkv = Linear(config.width, heads * config.head_dim, bias=config.qkv_bias)
        self.out = Linear(config.n_heads * config.head_dim, config.width, bias=config.out_bias)
        has_norms = config.qk_norm or config.qk_norm_joint
        normed = (config.n_heads, config.n_kv_heads) if config.qk_norm_joint else (1, 1)
        self.q_norm, self.k_norm = (
            make_norm(config, heads * config.head_dim) if has_norms else None for heads in normed
        )
        self.joint_norms = config.qk_norm_joint

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
            if self.joint_norms:
                q, k = q.flatten(2), k.flatten(2)
            q, k = (
                x.view(*v.shape[:2], -1, self.head_dim) for x in (self.q_norm(q), self.k_norm(k))
            )
            qkv = torch.cat((q, k, v), dim=2)
        if rope is not None:
            qkv = rotate(qkv, *rope)
        if slots is None:
            q, k, v = qkv.split(heads, dim=2)
            y = attend_causally(q, k, v, self.attending, self.dropout if self.training else 0.0)
        elif not isinstance(slots, Slots):
            y = slots.attend(qkv, self.layer, self.attending)
        else:
            kv = qkv.narrow(2, self.n_heads, 2 * self.n_kv_heads)
            kv = kv.view(rows, -1, 2, self.n_kv_heads, self.head_dim)
            slots.write(self.layer, kv)
            q = qkv.narrow(2, 0, self.n_heads)
            if slots.causal:
                k, v = kv.unbind(2)
                y = attend_causally(q, k, v, self.attending)
            else:
                y = attend(q, self.layer, slots, self.attending)
        return self.out(y if wanted is None else y[wanted])  # type: ignore[no-any-return]


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up. x: (…, gate and up)."""
    if x.shape[-1] % 32 == 0 and kernels.can_run(x, x):
        return kernels.swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, by tanh."""
    if kernels.should_run_gelu(x):
        return kernels.gelu(x)
    return F.gelu(x, approximate="tanh")


GATED = ("swiglu", "geglu-tanh")


class MLP(HooklessModule):
    """Two layers with GELU or ReLU, or a gated pair with SiLU or GELU (Shazeer 2020)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        up = 2 * config.mlp_width if config.mlp in GATED else config.mlp_width
        self.up = Linear(config.width, up, bias=config.mlp_bias)
        self.down = Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "swiglu":
            x = swiglu(x)
        elif self.kind == "geglu-tanh":
            gate, up = x.chunk(2, dim=-1)
            x = gelu(gate) * up
        elif self.kind == "gelu-tanh":
            x = gelu(x)
        else:
            x = F.relu(x) if self.kind == "relu" else F.gelu(x)
        return self.down(x)  # type: ignore[no-any-return]


class Experts(HooklessModule):
    """Several MLPs, of which each token is given to those that a router chooses (Mixtral, 2024)."""

    def __init__(self, config: GPTConfig, count: int, used: int) -> None:
        super().__init__()
        self.used, self.normalizes = used, config.normalize_experts
        self.router = Linear(config.width, count, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, width). The experts' results are added in their order, for each token."""
        weights, chosen = self.router(x).float().softmax(-1).topk(self.used)  # (tokens, used)
        if self.normalizes:
            weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            added = self.experts[number](x[tokens]) * weights[tokens, place, None].to(x.dtype)
            y = y.index_add(0, tokens, added)
        return y


class Block(HooklessModule):
    """Attention and MLP, each added to the residual stream, with norms before or after each."""

    dropout = 0.0
    """The dropout probability of what is added to the residual stream, in training."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        before, after = config.norms != "after", config.norms != "before"
        self.parallel = config.parallel
        self.attn_norm = make_norm(config, config.width, exists=before)
        self.attn = Attention(config, layer)
        self.attn_post_norm = make_norm(config, config.width, exists=after)
        self.mlp_norm = make_norm(config, config.width, exists=before)
        self.mlp: nn.Module = MLP(config)
        if config.n_experts is not None and config.n_experts_used is not None:
            self.mlp = Experts(config, config.n_experts, config.n_experts_used)
        self.mlp_post_norm = make_norm(config, config.width, exists=after)

    def forward(
        self,
        x: Tensor,
        rows: int,
        rope: Rope | None,
        slots: AnySlots,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x: (rows · time, width). Returns the same shape, or the tokens that are wanted."""
        y = self.attn_post_norm(self.attn(self.attn_norm(x), rows, rope, slots, wanted))
        before = x if wanted is None else x[wanted]
        x = before + (F.dropout(y, self.dropout) if self.training and self.dropout else y)
        y = self.mlp_post_norm(self.mlp(self.mlp_norm(before if self.parallel else x)))
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
        self._rope = torch.empty(
            config.ropes, 2, 0, config.head_dim, dtype=torch.float32, device="cpu"
        )
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
        ropes = [self._rope_at(positions, kind) for kind in table]
        x = self.embeddings(ids, positions).flatten(0, 1)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        kept = [x] if 0 in layers else []
        wanted = None if slots is None or isinstance(slots, Slots) else slots.wanted
        for layer, block in enumerate(self.blocks, start=1):
            kind = self.config.rope_of(layer - 1)
            rope = None if kind is None else ropes[kind]
            x = block(x, rows, rope, slots, wanted if layer == len(self.blocks) else None)
            if layer in layers:
                kept.append(x)
        if wanted is not None:
            kept = [states if len(states) == len(x) else states[wanted] for states in kept]
        return torch.stack((self.norm(x), *kept), dim=1).view(rows, -1, 1 + len(kept), x.shape[-1])

    def embeddings(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads. ids, positions: (rows, time). Returns (rows, time, width)."""
        x: Tensor = self.embed(ids)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        return x if self.embed_positions is None else x + self.embed_positions(positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, float32. hidden: (…, width). Returns (…, vocab)."""
        packed, cap = self.head.packed, self.config.logit_softcap
        logits: Tensor
        if isinstance(packed, Panels) and self.head.is_plain(hidden):
            logits = packed.linear_in_float32(hidden)  # without a copy in hidden's dtype
        else:
            logits = self.head(hidden).float()
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty KV cache for `rows` rows with memory for `capacity` tokens each."""
        config = self.config
        return KVCache(
            *(config.n_layers, config.n_kv_heads, config.head_dim),
            rows=rows,
            capacity=capacity,
            device=self.device,
            dtype=self.dtype,
            window=config.window,
        )

    @property
    def has_plain_attention(self) -> bool:
        """Whether all layers attend as GPT-2's and Llama's do, see `Attending`."""
        config = self.config
        return all(attending_of(config, layer).is_plain for layer in range(config.n_layers))

    def set_dropout(self, p: float) -> None:
        """Dropout in training, where GPT-2 has it: embeddings, attention weights, residuals."""
        for module in self.modules():
            if isinstance(module, GPT | Block | Attention):
                module.dropout = p

    def _initialize(self) -> None:
        """GPT-2's: std 0.02, or 0.02 / √(2 n_layers) for projections onto the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attn.out.weight", ".down.weight"))
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
        """The tables of each kind of rotary positions, (kinds, 2, at least `length`, head_dim): see
        gptk.model.rotary. There is no kind where positions are learned."""
        table, device, dtype = self._rope, self.device, self.dtype
        if not self.config.ropes:
            return table
        is_long_enough = table.shape[2] >= length
        if is_long_enough and table.device == device and table.dtype == dtype:
            return table
        # At least doubled if too short. Not an inference tensor, so that training can use it after
        # sampling.
        with torch.inference_mode(False):
            length = max(length, 2 * table.shape[2], 128)
            self._rope = rotary_tables(self.config, length, device).to(dtype)
        return self._rope
