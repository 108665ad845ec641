"""Wrong calls of every kernel, made from right ones by what the kernel's signature says, raise.

$GPTK_TEST_WRONG_CALLS says how many there are.
"""

import os
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import Tensor

from gptk import kernels
from gptk.kernels import build
from gptk.kernels.attention import slabs_of
from gptk.kernels.parameters import Dtype, Input, Int, Made, Real, Result, Written
from gptk.kernels.signatures import KERNELS
from gptk.kernels.structures import STRUCTURES, Matrix, Norm, Segment, StoredAddresses
from gptk.kernels.walk import matrix_in_panels, model_of, norm_of

pytestmark = pytest.mark.skipif(not kernels.available(), reason="gptk's kernels do not run here")

SIGNATURES = (*KERNELS, *STRUCTURES.signatures.values())
CALLS = int(os.environ.get("GPTK_TEST_WRONG_CALLS", "10000"))
ODD = (0, 1, 2, 3, 5, 15, 17, 31, 33)
FLAGS = ("add", "in_float32", "is_layer_norm")
"""Integers that may be any."""
TOKENS, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 70, 4, 2, 32, 32
"""Of passes over blocks."""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class Maker:
    """Makes the arguments of a right call."""

    def __init__(self, signature, rng):
        self.signature, self.rng = signature, rng
        self.scope = {"FLOAT32": torch.float32, "BFLOAT16": torch.bfloat16}
        self.has_format = any(each.name == "format" for each in signature.parameters)
        self.dtype = rng.choice([torch.float32, torch.bfloat16])
        self.alive, self.kept_slabs = [], []
        given = [each for each in signature.parameters if not isinstance(each, Result)]
        for each in sorted(given, key=lambda each: isinstance(each, Input)):
            self.scope[each.name] = self.value(each)
        self.arguments = [self.scope[each.name] for each in given]

    def value(self, each):
        if isinstance(each, Int):
            return self.size(each.name)
        if isinstance(each, Real):
            return 0.5
        if isinstance(each, Dtype):
            return self.dtype
        if isinstance(each, Made):
            return getattr(self, each.name)()
        if each.optional and self.rng.random() < 0.3:
            return None
        return self.tensor(each)

    def size(self, name):
        """A size or an integer, such that what the kernels need is true."""
        if name not in self.scope:
            get, choice = self.scope.get, self.rng.choice
            of_blocks = self.signature.name in ("attend_blocks", "walk")
            chosen = {
                "bits": lambda: choice([4, 8]),
                "format": lambda: choice(range(len(kernels.FORMATS))),
                "seed": lambda: choice([0, 2**32 - 1]),
                "layer": lambda: choice([0, 1]),
                "head_dim": lambda: HEAD_DIM if of_blocks else choice(kernels.HEAD_DIMS),
                "inputs": lambda: choice([0, 256] if self.has_format else [0, 32, 64]),
                "both": lambda: choice([0, 32, 64]),
                "groups": lambda: self.size("inputs") // 32,
                "k": lambda: min(choice([0, 1, 100]), self.size("size")),
                "angle_rows": lambda: choice([1, self.size("rows")]),
                "trees": lambda: choice([1, 2]),
                "kv_heads": lambda: choice([1, 2]),
                "heads": lambda: HEADS if of_blocks else 2 * choice([0, 1, 2]),
                "batch": lambda: self.size("trees") * choice([1, 2]),
                "mask_trees": lambda: choice([1, self.size("trees")]),
                "mask_rows": lambda: get("tokens") // get("trees"),
                "angles": lambda: 128,
                "width": lambda: WIDTH,
                "all_heads": lambda: HEADS + 2 * KV_HEADS,
                "count": lambda: 2 if of_blocks else choice(ODD),
                "entries": lambda: 3,
                "add": lambda: int(self.dtype is torch.float32),
                "in_float32": lambda: choice([0, 1]),
                "is_layer_norm": lambda: choice([0, 1]),
                "window": lambda: choice([0, 1, 70]),
                "kinds": lambda: choice([1, 2]),
                "kept_count": lambda: choice([0, 1, 2]),
            }
            if self.signature.name == "attend":
                chosen["tokens"] = lambda: self.size("trees") * choice([0, 1, 2])
                chosen["heads"] = lambda: choice([0, 2, 4])
            if of_blocks:
                chosen["tokens"] = lambda: TOKENS
            if self.signature.name == "layer":
                sizes = {"activation": 1, "width": WIDTH, "heads": HEADS, "kv_heads": KV_HEADS}
                return {**sizes, "head_size": HEAD_DIM, "window": 3, "rope": 1}[name]
            if self.signature.name == "quantized_matrix":
                parts = (get(part) for part in ("first", "second", "third"))
                return sum(part.outputs for part in parts)
            if self.signature.name == "slab":
                chosen |= {key: lambda: choice([1, 2, 4]) for key in ("layers", "blocks")}
            if self.signature.name in ("rms_norm", "norm"):
                chosen["size"] = lambda: choice([0, 16, 48])
            if self.signature.name == "dequantize_rows":
                chosen |= {"outputs": lambda: choice(ODD[1:]), "inputs": lambda: 256}
            if self.signature.name in ("draw", "cross_entropy"):
                chosen["size"] = lambda: choice(ODD[1:])
            if self.signature.name == "permutation":
                chosen["size"] = lambda: choice([33, 100])
            self.scope[name] = chosen.get(name, lambda: choice(ODD))()
        return self.scope[name]

    def dims(self, text):
        if text is None:
            return [self.rng.choice(ODD), self.rng.choice(ODD)]
        words = text.split(", ")
        leading = []
        if words[0] == "...":
            leading, words = self.rng.choice([[], [3], [2, 0], [5, 1]]), words[1:]
        return leading + [
            self.size(word) if word.isidentifier() else eval(word, {}, self.scope) for word in words
        ]

    def tensor(self, each):
        dtype = each.dtype
        if isinstance(dtype, str):
            dtype = eval(dtype, {}, self.scope)
        else:
            dtype = self.dtype if self.dtype in dtype else dtype[0]
        name = each.name
        if name in ("weights", "y") and each.dims is None and dtype == torch.uint8:
            shape = [kernels.packed_bytes(*self.packed_sizes())]
        elif name == "keys" and self.signature.name == "exponential":
            shape = [2] if self.rng.random() < 0.5 else [self.size("count"), 2]
        elif name == "dy" and self.signature.name == "gelu":
            shape = self.scope["x"].shape
        else:
            shape = self.dims(each.dims)
        if name == "panels":
            return aligned(shape, dtype)
        if values := getattr(self, f"values_of_{name}", None):
            return torch.tensor(values(shape), dtype=dtype).view(shape)
        if dtype.is_floating_point:
            return torch.randn(shape).to(dtype)
        return torch.randint(0, 16, shape, dtype=dtype)

    def packed_sizes(self):
        if "rows" in self.scope and isinstance(self.scope["rows"], StoredAddresses):
            rows = self.scope["rows"]
            return rows.format, rows.outputs, rows.inputs
        if self.signature.name == "pack":
            format = kernels.FORMATS[kernels.FORMAT_OF_BITS[self.size("bits")]].number
        else:
            format = self.size("format") if self.has_format else 0
        return format, self.size("outputs"), self.size("inputs")

    def values_of_targets(self, shape):
        return [self.rng.randrange(self.size("size")) for _ in range(shape[0])]

    def values_of_positions(self, shape):
        return [*range(60, 128), 0, 1]

    def values_of_sequences(self, shape):
        return [[0, 68, 60, 0], [68, 2, 0, 2]]

    def values_of_tables(self, shape):
        return [3, 0, 1]

    def values_of_wanted(self, shape):
        if self.signature.name == "dequantize_rows":
            return [self.rng.randrange(self.size("outputs")) for _ in range(*shape)]
        return sorted(self.rng.sample(range(TOKENS), shape[0]))

    def values_of_kept(self, shape):
        return sorted(self.rng.sample(range(3), self.scope["kept_count"]))

    def slabs(self):
        slab = torch.zeros(2, 2, 2, KV_HEADS, 64, HEAD_DIM, dtype=self.dtype)
        self.kept_slabs = [slab, torch.zeros_like(slab)]
        return slabs_of(self.kept_slabs)

    def rows(self):
        format = self.rng.choice([found for found in kernels.FORMATS.values() if found.stored])
        count = self.rng.choice([0, 1, 2])
        blocks = torch.zeros(5, count * format.stored, dtype=torch.uint8)
        self.alive.append(blocks)
        addresses = torch.arange(5) * blocks.stride(0) + blocks.data_ptr()
        return StoredAddresses(addresses, format.number, count * format.unit)

    def segment(self, outputs):
        format = self.rng.choice([*kernels.FORMATS.values()])
        size = kernels.packed_bytes(format.number, outputs, 256)
        self.alive.append(torch.zeros(size, dtype=torch.uint8))
        return STRUCTURES.segment(self.alive[-1], format.number, outputs, 256)

    def first(self):
        return self.segment(32)

    def second(self):
        return self.segment(16)

    def third(self):
        return self.rng.choice([Segment(), self.segment(5)])

    def norm(self, size=WIDTH):
        weight = torch.ones(size, dtype=self.dtype)
        self.alive.append(weight)
        return norm_of(self.dtype, weight, None, 1e-5, is_layer_norm=False)

    def matrix(self, outputs, inputs):
        panels = aligned((outputs, inputs), self.dtype)
        self.alive.append(panels)
        return matrix_in_panels(self.dtype, panels, outputs, None)

    attention_norm = attention_post_norm = mlp_norm = mlp_post_norm = norm

    def query_norm(self):
        return self.norm(HEAD_DIM)

    def key_norm(self):
        return Norm()

    def qkv(self):
        return self.matrix((HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH)

    def out(self):
        return self.matrix(WIDTH, HEADS * HEAD_DIM)

    def up(self):
        return self.matrix(64, WIDTH)

    def down(self):
        return self.matrix(WIDTH, 32)

    def model(self):
        layer = (
            *(self.norm(), self.query_norm(), self.key_norm(), self.norm()),
            *(self.norm(), self.norm()),
            *(self.qkv(), self.out(), self.up(), self.down()),
        )
        return model_of(
            self.dtype,
            [layer, layer],
            self.norm(),
            windows=[0, 9],
            ropes=[1, 0],
            activation="swiglu",
            width=WIDTH,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_size=HEAD_DIM,
        )


def aligned(shape, dtype):
    """Numbers from a multiple of 64 bytes on."""
    memory = torch.empty(torch.Size(shape).numel() * dtype.itemsize + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    x = memory[start : len(memory) - 64 + start].view(dtype).view(*shape)
    return x.copy_(torch.randn(x.shape))


class Wrapper(torch.Tensor):
    """A tensor without data of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return NotImplemented


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def with_gaps(x):
    return torch.stack((x, x), dim=-1)[..., 0]


NO_TENSORS = (3, 2.5, "x", [1.0], (), object(), torch.float32, {})
NO_INTEGERS = (
    None,
    1.5,
    "3",
    float("nan"),
    [2],
    2**31,
    2**62,
    2**63,
    -(2**63),
    2**70,
    -1,
    -(2**31),
)
WRONG_DTYPES = (torch.float16, torch.float64, torch.int16, torch.bool, torch.complex64)
OUT_OF_RANGE = {
    **dict.fromkeys(("targets", "positions", "wanted", "kept"), (-1, 10**6, 2**62, -(2**63))),
    "sequences": (-1, 2**62, 2**63 - 1, -(2**63), 10**4),
    "tables": (-1, 4, 2**31 - 1, -(2**31)),
}


def wrong_tensor(rng, maker, each, x, arguments):
    """A tensor that is wrong in place of a right one, and what is wrong; None if there is none."""
    signature = maker.signature
    kinds = ["type", "dtype", "meta", "sparse"]
    if not each.optional:
        kinds.append("none")
    if each.dims is not None:
        kinds += ["size"] * 3
        if "..." not in each.dims:
            kinds += ["dim", "dim"]
    if x.numel():
        kinds += ["freed", "wrapper"]
        if each.name in OUT_OF_RANGE:
            kinds += ["value"] * 4
        if not each.copied and each.strides is None and x.shape[-1] > 1:
            kinds.append("gaps")
        if each.name == "panels":
            kinds.append("address")
        if isinstance(each, Written):
            kinds += ["overlap"] * 4
            if x.dim() > 1 and x.shape[0] > 1:
                kinds.append("expanded")
        if maker.kept_slabs:
            kinds += ["in a slab"] * 2
            if each.name == "x":
                kinds += ["in a weight"] * 2
    kind = rng.choice(kinds)
    if kind == "none":
        return kind, None
    if kind == "type":
        return kind, rng.choice(NO_TENSORS)
    if kind == "dtype":
        return kind, x.to(rng.choice(WRONG_DTYPES))
    if kind == "meta":
        return kind, x.to("meta")
    if kind == "sparse":
        return kind, x.to_sparse()
    if kind == "dim":
        return kind, x[None] if rng.random() < 0.5 else x.flatten()[0] if x.numel() else x[
            ..., None
        ]
    if kind == "freed":
        return kind, freed(x)
    if kind == "wrapper":
        return kind, Wrapper(x)
    if kind == "gaps":
        return kind, with_gaps(x)
    if kind == "address":
        memory = aligned((x.numel() + 16,), x.dtype)
        return kind, memory[1 : 1 + x.numel()].view(x.shape)
    if kind == "expanded":
        return kind, x[:1].expand(x.shape)
    if kind == "in a slab":
        return kind, within(rng, rng.choice(maker.kept_slabs), x).copy_(x)
    if kind == "in a weight":
        y = within(rng, rng.choice(maker.alive), x)
        return None if y is None else (kind, y)
    if kind == "value":
        x = x.clone()
        x.view(-1)[rng.randrange(x.numel())] = rng.choice(OUT_OF_RANGE[each.name])
        return kind, x
    if kind == "overlap":
        others = [
            i for i, other in enumerate(arguments)
            if isinstance(other, Tensor) and other is not x and other.numel()
        ]  # fmt: skip
        if not others:
            return None
        place = rng.choice(others)
        other = arguments[place]
        memory = aligned((max(x.nbytes, other.nbytes) + 64,), torch.uint8)
        arguments[place] = memory[: other.nbytes].view(other.dtype).view(other.shape)
        arguments[place].copy_(other)
        start = rng.choice([0, 0, 64 * (other.nbytes // 128)])
        memory = torch.cat((memory, memory)) if start + x.nbytes > len(memory) else memory
        if arguments[place].data_ptr() != memory.data_ptr():
            start, memory = 0, aligned((max(x.nbytes, other.nbytes),), torch.uint8)
            arguments[place] = memory[: other.nbytes].view(other.dtype).view(other.shape)
        return kind, memory[start : start + x.nbytes].view(x.dtype).view(x.shape)
    # Another size, of a dimension that others have, too.
    words = each.dims.split(", ")
    others = [
        word
        for other, value in zip(given(signature), arguments, strict=True)
        if isinstance(other, Input) and other is not each and value is not None and other.dims
        for word in other.dims.split(", ")
    ]
    shared = [i for i, word in enumerate(words) if word in others and word != "..."]
    if not shared:
        return None
    place = rng.choice(shared) - len(words) + x.dim()
    sizes = list(x.shape)
    sizes[place] += rng.choice([1, 16, 32])
    return kind, x.new_zeros(sizes)


def within(rng, memory, x):
    """A tensor like x in the memory of another one without gaps; None if it is too large."""
    numbers = torch.tensor([], dtype=torch.uint8).set_(memory.untyped_storage())
    start = memory.data_ptr() - numbers.data_ptr()
    room = memory.nbytes - x.nbytes
    if room < 0:
        return None
    start += rng.choice([0, room // 2, room]) // 64 * 64
    return numbers[start : start + x.nbytes].view(x.dtype).view(x.shape)


def given(signature):
    return [each for each in signature.parameters if not isinstance(each, Result)]


def wrong(rng, maker):
    """The arguments of a wrong call, and what is wrong; None if none was found."""
    signature, arguments = maker.signature, list(maker.arguments)
    if rng.random() < 0.02:
        return "count", arguments[:-1] if rng.random() < 0.5 else [*arguments, 1]
    place = rng.randrange(len(arguments))
    each, value = given(signature)[place], arguments[place]
    if isinstance(each, Int):
        if each.name in FLAGS:
            arguments[place] = rng.choice([None, 1.5, "3", [2]])
        else:
            arguments[place] = rng.choice(NO_INTEGERS)
            if each.name == "seed" and arguments[place] == 2**31:
                return None  # it may be
        return f"{each.name} {arguments[place]}", arguments
    if isinstance(each, Real):
        arguments[place] = rng.choice([None, "x", [1.0], torch.ones(2), object(), 10**400])
        return each.name, arguments
    if isinstance(each, Dtype):
        arguments[place] = rng.choice([None, "float32", torch.float16, torch.int8, 3])
        return each.name, arguments
    if isinstance(each, Made):
        others = [None, 3, torch.ones(3), object(), "x"]
        others.append(Matrix() if each.type is Norm else Norm())
        arguments[place] = rng.choice(others)
        return each.name, arguments
    if value is None:
        return None
    found = wrong_tensor(rng, maker, each, value, arguments)
    if found is None:
        return None
    kind, arguments[place] = found
    return f"{each.name}: {kind}", arguments


def call(maker, arguments):
    door = STRUCTURES if maker.signature.makes else build.library()
    return getattr(door, maker.signature.name)(*arguments)


def raised_by(maker, arguments):
    try:
        call(maker, arguments)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        return error
    return None


def results_of(maker):
    """What a right call returns and writes."""
    arguments = [
        value.clone() if isinstance(each, Written) and value is not None else value
        for each, value in zip(given(maker.signature), maker.arguments, strict=True)
    ]
    if maker.signature.name in ("to_panels", "from_panels"):
        arguments = [aligned(x.shape, x.dtype).copy_(x) for x in maker.arguments]
    for slab in maker.kept_slabs:
        slab.zero_()
    returned = call(maker, arguments)
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [x for x in (*returned, *arguments) if isinstance(x, Tensor)]


@pytest.fixture(scope="module")
def makers():
    torch.manual_seed(0)
    rng = random.Random(0)
    return [Maker(signature, rng) for signature in SIGNATURES for _ in range(12)]


def test_weights_within_keys_and_values_are_refused():
    """They would be overwritten while they are read."""
    walk = next(signature for signature in KERNELS if signature.name == "walk")
    maker = Maker(walk, random.Random(0))
    call(maker, maker.arguments)
    slab = maker.kept_slabs[0]
    inside = slab.view(-1)[: maker.arguments[0].width].fill_(1)
    maker.norm = lambda size=WIDTH: norm_of(maker.dtype, inside, None, 1e-5, is_layer_norm=False)
    model = maker.model()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot take slabs: .*it shares memory with model"):
            call(maker, [model, *maker.arguments[1:]])
        call(maker, maker.arguments)


def test_wrong_calls_raise_and_right_ones_stay_right(makers):
    rng = random.Random(CALLS)
    with torch.no_grad():
        before = [results_of(maker) for maker in makers]
    made, errors = Counter(), Counter()
    while made.total() < CALLS:
        maker = rng.choice(makers)
        if (found := wrong(rng, maker)) is None:
            continue
        what, arguments = found
        made[maker.signature.name] += 1
        error = raised_by(maker, arguments)
        assert error is not None, f"{maker.signature.name} takes a wrong {what}: {arguments}"
        errors[type(error)] += 1
    assert set(made) == {signature.name for signature in SIGNATURES}
    assert errors[TypeError] + errors[ValueError] > 0.9 * CALLS
    for maker, results in zip(makers, before, strict=True):
        for ours, first in zip(results_of(maker), results, strict=True):
            assert same(ours, first), maker.signature.name


def same(x, y):
    return torch.equal(x.nan_to_num(0), y.nan_to_num(0)) and torch.equal(x.isnan(), y.isnan())


FIRST_USE = """
import sys, threading
import torch
torch.set_grad_enabled(False)
from gptk import kernels
barrier, results = threading.Barrier(16), []
x, weight = torch.ones(3, 64), torch.ones(64)
def use(number):
    torch.set_grad_enabled(False)
    barrier.wait()
    if number % 2:
        results.append(kernels.available())
    results.append(kernels.rms_norm(x, weight, 0.0).equal(x))
    results.append(kernels.gelu(torch.zeros(5)).equal(torch.zeros(5)))
    results.append(kernels.softmax_sums(x)[1].equal(torch.full((3, 1), 64.0)))
threads = [threading.Thread(target=use, args=(number,)) for number in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(results) == 56 and all(results), results
"""


def test_sixteen_threads_may_be_the_first_to_use_them():
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True)


TOO_LITTLE_MEMORY = """
import resource
from pathlib import Path
import torch
torch.set_grad_enabled(False)
torch.set_num_threads(1)
from gptk import kernels
x = torch.zeros(1, 2**22)
q, kv = torch.ones(16, 1, 32), torch.ones(1, 1, 2**18, 32)
calls = {
    "last_key": lambda: kernels.last_key(x, x, 0.5),
    "permutation": lambda: kernels.permutation(2**25, 1, 3),
    "attend": lambda: kernels.attend(q, kv, kv, None, 1),
}
kernels.last_key(x[:, :9], x[:, :9], 0.5)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for name, call in calls.items():
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**23, -1))
    try:
        call()
    except MemoryError as error:
        assert str(error) == f"gptk.kernels.{name} has too little memory", error
    else:
        raise AssertionError(f"{name} found memory")
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    call()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it limits memory as Linux does")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer takes all of the memory")
def test_too_little_memory_in_cpp_is_a_memory_error():
    subprocess.run([sys.executable, "-c", TOO_LITTLE_MEMORY], check=True)
