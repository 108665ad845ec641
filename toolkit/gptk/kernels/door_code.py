"""The code of the functions that check what kernels are called with, see gptk.kernels.door.

It is what somebody would write by hand who wants it to be fast.
"""

from collections.abc import Sequence

from gptk.kernels.parameters import Dtype, Input, Int, Made, Parameter, Real, Result, Written


def code_of(
    name: str, parameters: Sequence[Parameter], call: str, where: Sequence[str], *, makes: bool
) -> str:
    """The code of a function that checks its arguments and calls `function`.

    The arguments are those of a gptk.kernels.door.Signature. Names that are the code's alone begin
    with an underscore.
    """
    known: set[str] = set()
    lines: list[str] = []
    tensors = [each for each in parameters if isinstance(each, Input)]
    results = [each for each in parameters if isinstance(each, Result)]
    for each in parameters:
        if not isinstance(each, Input | Result):
            lines += _check_value(each)
            known.add(each.name)
    for tensor in tensors:
        lines += _check_tensor(tensor, known)
    lines += [f"if not ({rule}): break_rule({rule!r}, locals())" for rule in where]
    for tensor in tensors:
        if isinstance(tensor, Written):
            lines += _check_overlap(tensor, [other for other in tensors if other is not tensor])
    with_regions = [each for each in parameters if isinstance(each, Made) and each.has_regions]
    for made in with_regions:
        lines += _check_regions(made, tensors)
        if made.is_written:
            lines += [_check_apart(made, other) for other in with_regions if other is not made]
    for result in results:
        lines.append(_make(result, tensors[0] if tensors else None))
        lines.append(f"{result.name}_data = {result.name}.data_ptr()")
    outputs: list[Parameter] = [*results, *(each for each in tensors if isinstance(each, Written))]
    all_made = [each for each in parameters if isinstance(each, Made)]
    returned = f"return {', '.join(each.name for each in results)}"
    if not makes and not all_made:  # else slabs may be written
        written = " or ".join(f"{each.name}_data" for each in outputs)
        lines.append(f"if not ({written}): {returned}")
    addresses = {each.name: f"{each.name}_data" for each in [*tensors, *outputs]}
    if not makes:
        addresses |= {each.name: f"{each.name}.address" for each in all_made}
    given = ", ".join(addresses.get(text, text) for text in call.split(", "))
    if makes:
        lines.append(f"return function({given})")
    else:
        lines += [f"if _status := function({given}): fail(_status, locals())", returned]
    arguments = ", ".join(each.name for each in parameters if not isinstance(each, Result))
    return f"def {name}({arguments}):\n" + "".join(f"    {line}\n" for line in lines)


def _check_value(each: Parameter) -> list[str]:
    name = each.name
    if isinstance(each, Int):
        return [f"if type({name}) is not int: {name} = integer({name!r}, {name})"]
    if isinstance(each, Real):
        return [f"if type({name}) is not float: {name} = real({name!r}, {name})"]
    wrong = f"type({name}) is not type_of_{name}"
    if isinstance(each, Dtype):
        wrong = f"{name} is not FLOAT32 and {name} is not BFLOAT16"
    return [f"if {wrong}: refuse({name!r}, locals())"]


def _check_tensor(tensor: Input, known: set[str]) -> list[str]:
    """Check a tensor, name its sizes and strides, and take its address."""
    name = tensor.name
    refuse = f"refuse({name!r}, locals())"
    before = set(known)
    allowed = [f"dtypes_of_{name}[{i}]" for i in range(len(tensor.dtype))]
    if isinstance(tensor.dtype, str):
        allowed = [tensor.dtype]
    differs = " and ".join(f"_dtype is not {dtype}" for dtype in allowed)
    lines = [
        f"if not isinstance({name}, Tensor): {refuse}",
        f"_dtype = {name}.dtype",
        f"if {differs} or not {name}.is_cpu: {refuse}",
        *_check_dims(tensor, known, refuse),
    ]
    if tensor.strides is not None:
        lines += _check_strides(tensor, known, refuse)
    else:
        otherwise = f"{name} = {name}.contiguous()" if tensor.copied else refuse
        lines.append(f"if not {name}.is_contiguous(): {otherwise}")
    lines += [
        f"{name}_data = {name}.data_ptr()",
        f"if not {name}_data and {name}.numel(): refuse({name!r}, locals(), 'it has no data: it is "
        "a tracer or a wrapper, or its memory is freed')",
    ]
    if not tensor.optional:
        return lines
    nothing = [f"{name}_data = None", *(f"{size} = 0" for size in sorted(known - before))]
    lines = [f"    {line}" for line in lines]
    return [f"if {name} is None: {'; '.join(nothing)}", "else:", *lines]


def _check_dims(tensor: Input, known: set[str], refuse: str) -> list[str]:
    if tensor.dims is None:
        return []
    name, dims = tensor.name, tensor.dims.split(", ")
    if dims[0] == "...":
        size = dims[1]
        new = size not in known
        known |= {size, "rows"}
        return [
            f"_shape = {name}.shape",
            f"if not _shape: {refuse}",
            f"{size} = _shape[-1]" if new else f"if _shape[-1] != {size}: {refuse}",
            f"rows = {name}.numel() // {size} if {size} else prod(_shape[:-1])",
        ]
    new_names = [dim for dim in dims if dim.isidentifier() and dim not in known]
    known.update(new_names)
    if not new_names:
        return [f"if {name}.shape != ({', '.join(dims)},): {refuse}"]
    taken = [dim if dim in new_names else f"_size_{i}" for i, dim in enumerate(dims)]
    equal = [f"{a} != {b}" for a, b in zip(taken, dims, strict=True) if a != b]
    return [
        f"if {name}.dim() != {len(dims)}: {refuse}",
        f"{', '.join(taken)}, = {name}.shape",
        *([f"if {' or '.join(equal)}: {refuse}"] if equal else []),
    ]


def _check_strides(tensor: Input, known: set[str], refuse: str) -> list[str]:
    assert tensor.strides is not None
    name, wrong = tensor.name, []
    lines = [f"{name}_strides = {name}.stride()"]
    for i, stride in enumerate(tensor.strides.split(", ")):
        if stride == "_":
            continue
        if stride.isidentifier() and stride not in known:
            lines.append(f"{stride} = {name}_strides[{i}]")
            known.add(stride)
        else:
            wrong.append(f"{name}_strides[{i}] != {stride} and {name}.shape[{i}] > 1")
    return [*lines, f"if {' or '.join(wrong)}: {refuse}"] if wrong else lines


def _check_overlap(written: Written, others: list[Input]) -> list[str]:
    name = written.name
    lines = [f"_end = {_end(written)}"]
    for other in others:
        there = f"{other.name} is not None and " if other.optional else ""
        lines.append(
            f"if {there}{name}_data < {_end(other)} and {other.name}_data < _end "
            f"and {name}.numel() and {other.name}.numel(): "
            f"refuse({name!r}, locals(), 'it is written, and shares memory with {other.name}')"
        )
    if written.optional:
        lines = [f"if {name} is not None:", *(f"    {line}" for line in lines)]
    return lines


def _check_regions(made: Made, tensors: list[Input]) -> list[str]:
    lines = []
    for tensor in tensors:
        if made.is_written or isinstance(tensor, Written):
            name = tensor.name
            there = f"{name} is not None and " if tensor.optional else ""
            lines.append(
                f"if {there}{made.name}.regions.share({name}_data, {_end(tensor)}) "
                f"and {name}.numel(): "
                f"refuse({name!r}, locals(), 'it shares memory with {made.name}')"
            )
    return lines


def _check_apart(written: Made, other: Made) -> str:
    return (
        f"if {written.name}.regions.meet({other.name}.regions): "
        f"refuse({written.name!r}, locals(), 'it shares memory with {other.name}')"
    )


def _end(tensor: Input) -> str:
    """The address after a tensor's last number, if it has numbers."""
    name = tensor.name
    if tensor.strides is None:
        return f"{name}_data + {name}.nbytes"
    assert tensor.dims is not None
    sizes = enumerate(tensor.dims.split(", "))
    last = " + ".join(f"({size} - 1) * {name}_strides[{i}]" for i, size in sizes)
    return f"{name}_data + ({last} + 1) * {name}.itemsize"


def _make(result: Result, first: Input | None) -> str:
    """The code that makes a result. PyTorch takes sizes faster than a tuple of sizes."""
    dims = result.dims
    if first is None:
        return f"{result.name} = empty({dims}, dtype={result.dtype}, device='cpu')"
    dtype = "" if result.dtype == f"{first.name}.dtype" else f", dtype={result.dtype}"
    if dims is None and first.strides is None:
        return f"{result.name} = empty_like({first.name}{dtype})"
    dims = (dims or first.dims or "").replace("...", f"*{first.name}.shape[:-1]")
    return f"{result.name} = {first.name}.new_empty({dims}{dtype})"
