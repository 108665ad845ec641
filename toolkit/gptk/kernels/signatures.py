"""What each kernel takes, see gptk.kernels.door.

What it computes is said by the function that calls it, in the module named here, and in C++.
"""

from dataclasses import replace

from gptk.kernels.compiler import FEW_QUERIES
from gptk.kernels.door import Signature
from gptk.kernels.parameters import (
    BFLOAT16,
    FLOAT32,
    FLOATS,
    INT32,
    INT64,
    Input,
    Int,
    Made,
    Parameter,
    Real,
    Result,
    Written,
)
from gptk.kernels.quantized_signatures import QUANTIZED
from gptk.kernels.structures import (
    ALIGNED,
    HEADS,
    PANELS,
    Model,
    Slabs,
)


def _kernel(name: str, *parameters: Parameter, call: str, where: tuple[str, ...] = ()) -> Signature:
    return Signature(name, parameters, call, where)


_IS_BFLOAT16 = "x.dtype is BFLOAT16"
_BIAS = Input("bias", "outputs", "x.dtype", optional=True)

# --- Normalization, activations and rotary embeddings: layers.py ---

_LAYERS = (
    _kernel(
        "rms_norm",
        Input("x", "..., size"),
        Input("weight", "size", "x.dtype"),
        Real("eps"),
        Result("y", None, "x.dtype"),
        call=f"{_IS_BFLOAT16}, x, weight, eps, y, rows, size",
        where=("size % 16 == 0",),
    ),
    _kernel(
        "layer_norm",
        Input("x", "..., size"),
        Input("weight", "size", "x.dtype"),
        Input("bias", "size", "x.dtype", optional=True),
        Real("eps"),
        Result("y", None, "x.dtype"),
        call=f"{_IS_BFLOAT16}, x, weight, bias, eps, y, rows, size",
    ),
    _kernel(
        "swiglu",
        Input("x", "..., both"),
        Result("y", "..., both // 2", "x.dtype"),
        call=f"{_IS_BFLOAT16}, x, y, rows, both // 2",
        where=("both % 32 == 0",),
    ),
    _kernel(
        "gelu",
        Input("x"),
        Input("dy", dtype="x.dtype", optional=True),
        Result("y", None, "x.dtype"),
        call=f"{_IS_BFLOAT16}, x, dy, y, x.numel()",
        where=("dy is None or dy.shape == x.shape",),
    ),
    _kernel(
        "rotate",
        Input("x", "rows, time, heads, head_dim"),
        Input("cosines", "angle_rows, time, heads, head_dim", "x.dtype"),
        Input("sines", "angle_rows, time, heads, head_dim", "x.dtype"),
        Result("y", None, "x.dtype"),
        call=f"{_IS_BFLOAT16}, x, cosines, sines, y, rows * time * heads, "
        "angle_rows * time * heads, head_dim",
        where=("head_dim % 32 == 0", "angle_rows in (1, rows)"),
    ),
)

# --- Products with plain weights: panels.py ---

_EVEN = "inputs % 2 == 0 or x.dtype is FLOAT32"
_PANELS = Input("panels", PANELS, "x.dtype", copied=False)

_IN_PANELS = (
    _kernel(
        "linear",
        Input("x", "..., inputs"),
        Input("weight", "outputs, inputs", "x.dtype"),
        _BIAS,
        Result("y", "..., outputs", "x.dtype"),
        call=f"{_IS_BFLOAT16}, x, weight, bias, y, rows, inputs, outputs",
        where=(_EVEN,),
    ),
    _kernel(
        "linear_in_panels",
        Input("x", "..., inputs"),
        _PANELS,
        Int("outputs"),
        _BIAS,
        Int("in_float32"),
        Result("y", "..., outputs", "FLOAT32 if in_float32 else x.dtype"),
        call=f"{_IS_BFLOAT16}, in_float32 != 0, x, panels, bias, y, rows, inputs, outputs",
        where=("outputs >= 0", _EVEN, ALIGNED),
    ),
    *(
        _kernel(
            name,
            first("x", "outputs, inputs", copied=False),
            second("panels", PANELS, "x.dtype", copied=False),
            call=f"{_IS_BFLOAT16}, x, panels, outputs, inputs",
            where=(_EVEN, ALIGNED),
        )
        for name, first, second in (("to_panels", Input, Written), ("from_panels", Written, Input))
    ),
)

# --- Products in bfloat16: products.py ---

_PRODUCTS = (
    _kernel(
        "product",
        Input("a", "rows, depth", (BFLOAT16,), strides="a_row, a_column"),
        Input("b", "depth, columns", strides="b_row, b_column"),
        Written("y", "rows, columns", strides="y_stride, 1"),
        Input("bias", "columns", (FLOAT32,), optional=True),
        Int("add"),
        call="a, a_row if a_column == 1 else a_column, a_column == 1, "
        "b.dtype is BFLOAT16, b, b_column if b_row == 1 else b_row, b_row == 1, "
        "y.dtype is BFLOAT16, y, y_stride, bias, add != 0, rows, columns, depth",
        where=(
            "1 in (a_row, a_column) or rows * depth < 2",
            "1 in (b_row, b_column) or depth * columns < 2",
            "y_stride >= columns or rows < 2",
            "not add or y.dtype is FLOAT32",
        ),
    ),
    _kernel(
        "column_sums",
        Input("x", "rows, columns"),
        Result("y", "columns", "FLOAT32"),
        call=f"{_IS_BFLOAT16}, x, y, rows, columns",
    ),
)

# --- Passes over a vocabulary: vocabulary.py ---

_VOCABULARY = (
    _kernel(
        "cross_entropy",
        Written("logits", "rows, size", strides="stride, 1"),
        Input("targets", "rows", (INT64,)),
        Real("scale"),
        Result("losses", "rows", "FLOAT32"),
        call="logits.dtype is BFLOAT16, logits, targets, losses, scale, rows, size, stride",
        where=("stride >= size or rows < 2",),
    ),
    _kernel(
        "exponential",
        Input("keys", None, (INT32,)),
        Input("tokens", "count", (INT32,)),
        Result("y", "count", "FLOAT32"),
        call="keys, keys.dim() == 2, tokens, y, count",
        where=("keys.shape in ((2,), (count, 2))",),
    ),
    _kernel(
        "softmax_sums",
        Input("x", "rows, size", (FLOAT32,)),
        *(Result(name, "rows, 1", "x.dtype") for name in ("highest", "weight", "weighted")),
        call="x, highest, weight, weighted, rows, size",
    ),
    _kernel(
        "last_key",
        Input("keys", "rows, size", (FLOAT32,)),
        Input("logits", "rows, size", (FLOAT32,)),
        Real("p"),
        Result("y", "rows, 1", "keys.dtype"),
        call="keys, logits, p, y, rows, size",
    ),
    _kernel(
        "keep_from",
        Input("x", "rows, size", (FLOAT32,)),
        Input("least", "rows, 1", (FLOAT32,)),
        Input("keys", "rows, size", (FLOAT32,)),
        Result("y", None, "x.dtype"),
        call="x, least, keys, y, rows, size",
    ),
    _kernel(
        "top",
        Input("x", "rows, size", (FLOAT32,)),
        Int("k"),
        Result("values", "rows, k", "x.dtype"),
        Result("tokens", "rows, k", "INT64"),
        Result("found", "rows", "INT32"),
        call="x, values, tokens, found, rows, size, k",
        where=("0 <= k <= size",),
    ),
    _kernel(
        "draw",
        Input("logits", "rows, size", (FLOAT32,)),
        Input("keys", "rows, 2", (INT32,)),
        Result("tokens", "rows", "INT64"),
        Result("logprobs", "rows", "FLOAT32"),
        call="logits, keys, tokens, logprobs, rows, size",
        where=("size > 0",),
    ),
    _kernel(
        "permutation",
        Int("size"),
        Int("seed"),
        Int("count"),
        Result("y", "count", "INT32"),
        call="seed, size, count, y",
        where=("0 <= count <= size < 2**27", "0 <= seed < 2**32"),
    ),
)

# --- Attention: attention.py ---

_QKV = tuple(
    Input(
        name,
        f"rows, time, {heads}, head_dim",
        FLOATS if name == "q" else "q.dtype",
        strides=f"{part}_row, {part}_time, head_dim, 1",
    )
    for name, heads, part in (("q", "heads", "q"), ("k", "kv_heads", "kv"), ("v", "kv_heads", "kv"))
)
_CAUSAL = "rows, time, heads, kv_heads, head_dim, q_row, q_time, kv_row, kv_time"
_GROUPED = (HEADS, "kv_heads > 0", "heads % kv_heads == 0")
_LOGSUMS = "rows, heads, time"
_SEQUENCES = (
    Input("sequences", "count, 4", (INT64,)),
    Input("tables", "entries", (INT32,)),
    Made("slabs", Slabs, has_regions=True, is_written=True),
)

_ATTENTION = (
    _kernel(
        "attend",
        Input("q", "tokens, heads, head_dim", strides="row_stride, head_dim, 1"),
        *(
            Input(
                *(name, "batch, 1, length, head_dim", "q.dtype"),
                strides="key_stride, _, head_dim, 1",
            )
            for name in ("keys", "values")
        ),
        Input(
            *("mask", "mask_trees, mask_rows, length", "q.dtype"),
            strides="tree_stride, mask_stride, 1",
            optional=True,
        ),
        Int("trees"),
        Result("y", None, "q.dtype"),
        call="q.dtype is BFLOAT16, q, keys, values, mask, y, trees, tokens // trees, heads, "
        "batch // trees, length, head_dim, row_stride, key_stride, "
        "tree_stride if mask_trees > 1 else 0, mask_stride",
        where=(
            HEADS,
            "0 < trees <= batch",
            "batch % trees == 0",
            "tokens % trees == 0",
            "heads % (batch // trees) == 0",
            f"heads * tokens <= {FEW_QUERIES} * batch",
            "mask is None or (mask_trees in (1, trees) and mask_rows == tokens // trees)",
        ),
    ),
    _kernel(
        "attend_causally",
        *_QKV,
        Written("logsums", _LOGSUMS, (FLOAT32,), optional=True),
        Result("y", None, "q.dtype"),
        call=f"q.dtype is BFLOAT16, q, k, v, y, logsums, {_CAUSAL}",
        where=_GROUPED,
    ),
    _kernel(
        "attend_causally_backward",
        *(replace(part, dtype=(BFLOAT16,)) for part in _QKV),
        *(Input(name, "rows, time, heads, head_dim", (BFLOAT16,)) for name in ("y", "dy")),
        Input("logsums", _LOGSUMS, (FLOAT32,)),
        Result("dq", None, "q.dtype"),
        *(Result(name, "rows, time, kv_heads, head_dim", "q.dtype") for name in ("dk", "dv")),
        call=f"q, k, v, y, dy, logsums, dq, dk, dv, {_CAUSAL}",
        where=_GROUPED,
    ),
    _kernel(
        "attend_blocks",
        Input("qkv", "tokens, all_heads, head_dim", "slabs.dtype"),
        *_SEQUENCES,
        *map(Int, ("layer", "heads", "window")),
        Result("y", "tokens, heads, head_dim", "qkv.dtype"),
        call="qkv.dtype is BFLOAT16, qkv, y, sequences, tables, slabs, tokens, count, entries, "
        "slabs.count, slabs.bits, heads, slabs.kv_heads, head_dim, "
        "2 * layer * slabs.half, (2 * layer + 1) * slabs.half, window",
        where=(
            "head_dim == slabs.head_dim",
            "0 <= window < 2**31",
            "0 <= layer < slabs.layers",
            "all_heads == heads + 2 * slabs.kv_heads",
            "heads > 0",
            "heads % slabs.kv_heads == 0",
            f"heads <= {FEW_QUERIES} * slabs.kv_heads",
        ),
    ),
)

# --- A pass through all blocks of a GPT: walk.py ---

_WALK = _kernel(
    "walk",
    Made("model", Model, has_regions=True),
    Written("x", "tokens, width", "slabs.dtype"),
    Input("table", "kinds, 2, angles, head_dim", copied=False),
    Input("positions", "tokens", (INT64,)),
    *_SEQUENCES,
    Input("wanted", "asked", (INT64,), optional=True),
    Input("kept", "kept_count", (INT64,)),
    Result("states", "tokens if wanted is None else asked, 1 + kept_count, width", "x.dtype"),
    call="model, tokens, x, table, angles, positions, sequences, tables, slabs, count, entries, "
    "slabs.count, slabs.bits, slabs.half, wanted, "
    "-1 if wanted is None else asked, kept, kept_count, states",
    where=(
        "width == model.width",
        "head_dim == model.head_size == slabs.head_dim",
        "model.kv_heads == slabs.kv_heads",
        "model.layers <= slabs.layers",
        "model.is_bfloat16 == (x.dtype is BFLOAT16)",
        "angles == 0 or table.dtype is x.dtype",
        "model.ropes <= kinds",
    ),
)

KERNELS = (*_LAYERS, *_IN_PANELS, *QUANTIZED, *_PRODUCTS, *_VOCABULARY, *_ATTENTION, _WALK)
"""The functions that the library exports."""
