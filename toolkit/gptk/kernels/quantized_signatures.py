"""What the kernels of quantized weights take: products.py, stored.py. See gptk.kernels.door."""

from gptk.kernels.door import Signature
from gptk.kernels.parameters import (
    FLOAT32,
    INT64,
    UINT8,
    Dtype,
    Input,
    Int,
    Made,
    Result,
    Written,
)
from gptk.kernels.structures import PACKED, StoredAddresses

_LEVELS = (
    Input("codes", "outputs, inputs", (UINT8,)),
    Input("scale", "outputs, groups", (FLOAT32,)),
    Input("offset", "outputs, groups", (FLOAT32,)),
)
_GROUPS = "inputs == 32 * groups"
QUANTIZED = (
    Signature(
        "quantized_linear",
        (
            Input("x", "rows, inputs"),
            Input("weights", None, (UINT8,), copied=False),
            Input("bias", "outputs", "x.dtype", optional=True),
            Int("format"),
            Int("outputs"),
            Result("y", "rows, outputs", "x.dtype"),
        ),
        call="x.dtype is BFLOAT16, format, x, weights, bias, y, rows, inputs, outputs",
        where=PACKED,
    ),
    Signature(
        "dequantize_packed",
        (
            Input("weights", None, (UINT8,), copied=False),
            Int("format"),
            Int("outputs"),
            Int("inputs"),
            Dtype("dtype"),
            Result("y", "outputs, inputs", "dtype"),
        ),
        call="dtype is BFLOAT16, format, weights, y, inputs, outputs",
        where=PACKED,
    ),
    Signature(
        "dequantize_rows",
        (
            Input("weights", None, (UINT8,), copied=False),
            Int("format"),
            Int("outputs"),
            Int("inputs"),
            Input("wanted", "count", (INT64,)),
            Dtype("dtype"),
            Result("y", "count, inputs", "dtype"),
        ),
        call="dtype is BFLOAT16, format, weights, wanted, y, inputs, outputs, count",
        where=PACKED,
    ),
    Signature(
        "pack",
        (
            *_LEVELS,
            Int("bits"),
            Written("y", None, (UINT8,)),
        ),
        call="bits, codes, scale, offset, y, outputs, inputs",
        where=(
            "bits in (4, 8)",
            _GROUPS,
            "y.numel() >= packed_bytes(1 if bits == 4 else 3, outputs, inputs) >= 0",
        ),
    ),
    Signature(
        "dequantize",
        (
            *_LEVELS,
            Written("y", "outputs, inputs"),
        ),
        call="y.dtype is BFLOAT16, codes, scale, offset, y, outputs * groups",
        where=(_GROUPS,),
    ),
    Signature(
        "pack_stored",
        (
            Made("rows", StoredAddresses),
            Written("y", None, (UINT8,)),
        ),
        call="rows.format, rows, y, rows.outputs, rows.inputs",
        where=("y.numel() >= packed_bytes(rows.format, rows.outputs, rows.inputs) >= 0",),
    ),
)
