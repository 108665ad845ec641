"""The decoding step of one row, compiled: a program on a CPU, a CUDA graph on CUDA.

Between its matrix products a step has some twenty small operations a layer, which take a third of
its time on a CPU. TorchInductor fuses them, and reads plain matrices at the speed of memory where
PyTorch's own products of one row do not. The program (an AOTInductor package) is compiled once for
a shape of model on a machine, in half a minute or more, kept on disk, and loaded in milliseconds
from then on. It holds no weights: they are arguments of each call, without copies, so that models
of one shape share a program. Lengths of text and cache are free.

On CUDA a step's kernels take less time than launching them one by one. So they are recorded as a
CUDA graph, one for each cache, and launched together from then on.
"""

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptk import kernels
from gptk.errors import DeviceError
from gptk.model.cache import KVCache, Slots
from gptk.model.gpt import GPT
from gptk.model.linear import Linear, OneDNNPacked
from gptk.system.caches import cache_folder


class _RowStep:
    """`GPT.states` and `GPT.logits` for one new token of a single row with a cache.

    Implements the protocol `gptk.model.protocol.Step`.
    """

    def fits(self, ids: Tensor, cache: KVCache | None, layers: Collection[int]) -> bool:
        """Whether a pass is one new token of one row, and returns no states of layers."""
        return (
            ids.shape == (1, 1) and cache is not None and cache.slots_are_positions and not layers
        )

    def __call__(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """The hidden state (1, 1, 1, width) and the logits (1, 1, vocab), float32."""
        raise NotImplementedError


class CompiledStep(_RowStep):
    """The step as a compiled program, on a CPU."""

    def __init__(self, model: GPT, program: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._model, self._program = model, program
        self._weights = [weight for _, _, weight in _weights(model)]

    def __call__(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        slots = cache.plan(1)
        # The program was compiled for a cache and a table that are longer than the text.
        if slots.end == cache.capacity:
            cache.reserve(2 * cache.capacity)
        table = self._model.position_table(slots.end + 1)
        sized = _ELEMENT.expand(slots.end)
        hidden, logits = self._program(ids, sized, table, list(cache.kv.unbind()), self._weights)
        cache.advance([1], slots)
        return hidden, logits


Recorder = Callable[[Callable[[], tuple[Tensor, Tensor]]], Callable[[], tuple[Tensor, Tensor]]]
"""Takes a function of no arguments; returns one that repeats its operations on the same tensors."""


class RecordedStep(_RowStep):
    """The step as a CUDA graph: its operations are recorded once for a cache, and replayed."""

    def __init__(self, model: GPT, record: "Recorder | None" = None) -> None:
        """record: by default `_cuda_graph`."""
        self._model = model
        self._record = _cuda_graph if record is None else record
        self._kv: Tensor | None = None
        self._ids: Tensor
        self._position: Tensor
        self._run: Callable[[], tuple[Tensor, Tensor]]

    def __call__(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        slots = cache.plan(1)
        if self._kv is not cache.kv:
            self._ids, self._position = ids.clone(), torch.full_like(ids[0], slots.start)
            self._run = self._record(self._step_over(cache))
            self._kv = cache.kv
        self._ids.copy_(ids)
        self._position.fill_(slots.start)
        hidden, logits = self._run()
        cache.advance([1], slots)
        return hidden.clone(), logits.clone()  # the next replay overwrites them

    def _step_over(self, cache: KVCache) -> Callable[[], tuple[Tensor, Tensor]]:
        """A step that attends to all the memory of a cache, with a mask for what is in use."""
        kv, ids, position = cache.kv, self._ids, self._position
        capacity = cache.capacity
        table = self._model.position_table(capacity + 1)
        keys, values = kv.flatten(2, 3)[:, :, :, None].unbind(1)
        positions = torch.arange(capacity, device=kv.device)
        # In memory its rows have a multiple of 8 numbers, as attention kernels need.
        mask = kv.new_zeros(1, 1, capacity + -capacity % 8)[..., :capacity]
        slots = _SlotAtPosition(
            positions=position[None],
            start=0,
            end=capacity,
            group=1,  # the mask's one row is broadcast to all queries
            trees=1,
            rows_per_tree=1,
            tree_index=None,
            starts=[],
            mask=mask,
            causal=False,
            one_token_per_tree=True,
            written=kv.unbind(),
            keys=keys.unbind(),
            values=values.unbind(),
        )

        def run() -> tuple[Tensor, Tensor]:
            mask.zero_().masked_fill_(positions > position, -torch.inf)
            hidden = self._model.states_at(ids, slots, table)
            return hidden, self._model.logits(hidden[:, :, 0])

        return run


class _SlotAtPosition(Slots):
    """The slot of one new token of one row: its position, which is a tensor on the device."""

    def write(self, layer: int, new: Tensor) -> None:
        self.written[layer].index_copy_(3, self.positions[0], new.permute(2, 0, 3, 1, 4))


def _cuda_graph(run: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, Tensor]]:
    """The recorder on CUDA: records a CUDA graph of `run`, returns a function that replays it."""
    # The first runs choose kernels and allocate memory, which must not be recorded. They write the
    # same as the first replay will.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return results

    return replay


def compile_step(model: GPT, announce: Callable[[], None] | None = None) -> GPT:
    """Compile the step that decodes one row, or load it if this machine has compiled it before.

    announce: called before a compilation on a CPU, which takes half a minute or more. Weights in
    bfloat16 that are packed for oneDNN are unpacked, which is slower for several rows. `GPT.unpack`
    and `GPT.train` drop the step. Sets the model's `step`, and returns the model. Raises
    DeviceError if there is no compiler, or the model is neither on a CPU nor on CUDA.
    """
    for module in model.modules():
        if isinstance(module, Linear) and isinstance(module.packed, OneDNNPacked):
            module.unpack()
    model.tie()
    model.step = _new_step(model, announce)
    return model


def _new_step(model: GPT, announce: Callable[[], None] | None) -> CompiledStep | RecordedStep:
    if model.device.type == "cuda":
        return RecordedStep(model)
    if model.device.type != "cpu":
        raise DeviceError(f"a step can be compiled on cpu and on cuda, not on {model.device}")
    path = cache_folder() / f"step-{_key(model)}.pt2"
    if path.exists():
        # If the file cannot be loaded, being damaged for example, it is compiled again.
        with contextlib.suppress(RuntimeError):
            return CompiledStep(model, torch._inductor.aoti_load_package(str(path)))
    if announce is not None:
        announce()
    _compile(model, path)
    return CompiledStep(model, torch._inductor.aoti_load_package(str(path)))


class _Traced(nn.Module):
    """The step as a function of tensors only, which include weights and cache."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.__dict__["_gpt"] = model  # not a submodule, as its weights are arguments

    def forward(
        self, ids: Tensor, sized: Tensor, table: Tensor, kv: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """sized: its size is the text's length with the new token; kv: each layer's cache."""
        model: GPT = self.__dict__["_gpt"]
        length = sized.shape[0]
        keys_and_values = [layer.flatten(1, 2)[:, :, None, :length].unbind() for layer in kv]
        slots = Slots(
            positions=torch.full((1, 1), length - 1),
            start=length - 1,
            end=length,
            group=model.config.n_heads // model.config.n_kv_heads,
            trees=1,
            rows_per_tree=1,
            tree_index=None,
            starts=[],
            mask=None,
            causal=False,
            one_token_per_tree=True,
            written=tuple(layer[:, :, :, length - 1 : length] for layer in kv),
            keys=tuple(keys for keys, _ in keys_and_values),
            values=tuple(values for _, values in keys_and_values),
        )
        with _weights_replaced(model, weights):
            hidden = model.states_at(ids, slots, table)
            return hidden, model.logits(hidden[:, :, 0])


def _compile(model: GPT, path: Path) -> None:
    """Compile the step's program and put it at `path`, atomically."""
    layers = range(model.config.n_layers)
    auto = torch.export.Dim.AUTO
    weights = [weight for _, _, weight in _weights(model)]
    cache = model.new_cache(1, 96)
    example = (
        torch.zeros(1, 1, dtype=torch.int64),
        _ELEMENT.expand(40),
        model.position_table(40),
        list(cache.kv.unbind()),
        weights,
    )
    shapes = (None, {0: auto}, {1: auto}, [{3: auto} for _ in layers], [None for _ in weights])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, about its own code
            program = torch.export.export(
                _Traced(model),
                example,
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                package = torch._inductor.aoti_compile_and_package(
                    program,
                    package_path=os.path.join(folder, path.name),
                    inductor_configs={"aot_inductor.custom_ops_to_c_shims": kernels.aoti_shims()},
                )
                os.replace(package, path)
    except OSError as error:
        raise DeviceError(f"the compiled step cannot be kept in {path.parent}: {error}") from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise DeviceError(f"the step cannot be compiled here: {reason}") from error


_ELEMENT = torch.zeros(1)
"""Expanded to a tensor of any size, without memory, to pass a length to the program."""

Weight = tuple[list[dict[str, Any]], str, Tensor]
"""A weight: the dictionaries of attributes that hold it, its name in them, and the tensor."""


def _weights(model: GPT) -> list[Weight]:
    """All weights of a model: parameters, and the tensors of packed layers."""
    found: list[Weight] = []
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                # `GPT.pack` has put them into the module's attributes, too.
                holders = [module._parameters, module.__dict__]
                found.append(([holder for holder in holders if name in holder], name, value))
        if isinstance(module, Linear) and module.packed is not None:
            for attributes in _attributes(module.packed):
                tensors = [item for item in attributes.items() if isinstance(item[1], Tensor)]
                found += [([attributes], name, tensor) for name, tensor in tensors]
    return found


def _attributes(packed: object) -> Iterator[dict[str, Any]]:
    """The attributes of packed weights, and of packed weights that these are made of."""
    yield vars(packed)
    for value in vars(packed).values():
        if type(value).__module__ == type(packed).__module__:
            yield from _attributes(value)


@contextlib.contextmanager
def _weights_replaced(model: GPT, weights: Sequence[Tensor]) -> Iterator[None]:
    """Within the block the model computes with these tensors instead of its weights."""
    originals = _weights(model)
    try:
        for (holders, name, _), weight in zip(originals, weights, strict=True):
            for holder in holders:
                holder[name] = weight
        yield
    finally:
        for holders, name, weight in originals:
            for holder in holders:
                holder[name] = weight


def _key(model: GPT) -> str:
    """A hash of all that a program depends on: code, PyTorch, processor, threads, shapes."""
    parts = [torch.__version__, str(torch.cpu.get_capabilities()), str(torch.get_num_threads())]
    folders = Path(__file__).parent, Path(kernels.__file__).parent
    parts += [path.read_text() for folder in folders for path in sorted(folder.glob("*.py"))]
    parts += [repr(model.config), str(model.dtype)]
    parts += [f"{name} {weight.dtype} {tuple(weight.shape)}" for _, name, weight in _weights(model)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
