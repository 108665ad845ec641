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

import hashlib
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from gptk import kernels
from gptk.errors import DeviceError, IncompatibleError
from gptk.model.blocks import BlockCache
from gptk.model.cache import KVCache, Slots
from gptk.model.captured import (
    Snapshot,
    description,
    weights_of,
    weights_replaced,
    why_not_capturable,
)
from gptk.model.gpt import GPT
from gptk.model.linear import OneDNNPacked
from gptk.model.packing import PackableModule
from gptk.model.panels import Panels
from gptk.model.slow_paths import tell_of_uncompiled_passes
from gptk.system.compiled_code import Code, load_or_make, use_private_inductor_folder
from gptk.system.processor import features

_log = logging.getLogger(__name__)


class _RowStep:
    """`GPT.states` and `GPT.logits` for one new token of a single row with a cache.

    Implements the protocol `gptk.model.protocol.Step`. It follows the model: if weights are
    replaced, the next text is decoded with the new ones; if it cannot, it is dropped, and the log
    says so.
    """

    def __init__(self, model: GPT) -> None:
        self._model = model
        self._cache: weakref.ref[KVCache] | None = None
        self._snapshot = Snapshot(model)
        self._description = description(model)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the model has no step: this one's is of this model

    def fits(self, ids: Tensor, cache: object, layers: Collection[int]) -> bool:
        """Whether a pass is one new token of one row, and returns no states of layers."""
        if (
            isinstance(cache, KVCache)
            and cache.slots_are_positions
            and ids.shape == (1, 1)
            and not layers
        ):
            return self._is_current(cache) or self._follows()
        tell_of_uncompiled_passes(_why_not(ids, cache, layers))
        return False

    def _is_current(self, cache: KVCache) -> bool:
        """Compares all with the first step of a text, and what could crash with each."""
        if self._cache is not None and self._cache() is cache:
            return self._snapshot.is_in_place()
        self._cache = weakref.ref(cache)
        return self._snapshot.is_current()

    def _follows(self) -> bool:
        """Take the model's new weights, or drop this step if the model is now another one."""
        if why_not_capturable(self._model) or description(self._model) != self._description:
            if self._model.step is self:
                self._model.step = None
            _log.warning("the compiled step is dropped: since compile_step the model has changed")
            return False
        self._snapshot = Snapshot(self._model)
        return True

    def __call__(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """The hidden state (1, 1, 1, width) and the logits (1, 1, vocab), float32."""
        raise NotImplementedError


class CompiledStep(_RowStep):
    """The step as a compiled program, on a CPU."""

    def __init__(self, model: GPT, program: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__(model)
        self._program = program

    def __call__(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        slots = cache.plan(1)
        # The program was compiled for a cache and a table that are longer than the text.
        if slots.end == cache.capacity:
            cache.reserve(2 * cache.capacity)
        table = self._model.position_table(slots.end + 1)
        sized = _ELEMENT.expand(slots.end)
        hidden, logits = self._program(
            ids, sized, table, list(cache.kv.unbind()), self._snapshot.tensors
        )
        cache.advance([1], slots)
        return hidden, logits


def _why_not(ids: Tensor, cache: object, layers: Collection[int]) -> str:
    """Why a step for one new token of one row does not fit a pass."""
    if layers:
        return "the strategy reads the states of layers"
    if len(ids) > 1 or isinstance(cache, BlockCache):
        return "several rows are decoded together (prompts, results, beams or candidates)"
    if ids.shape[1] > 1:
        return "several tokens are read at once, as those that a draft has guessed"
    return "there is no cache" if cache is None else "the cache still holds the slots of other rows"


Recorder = Callable[[Callable[[], tuple[Tensor, Tensor]]], Callable[[], tuple[Tensor, Tensor]]]
"""Takes a function of no arguments; returns one that repeats its operations on the same tensors."""


class RecordedStep(_RowStep):
    """The step as a CUDA graph: its operations are recorded once for a cache, and replayed."""

    def __init__(self, model: GPT, record: "Recorder | None" = None) -> None:
        """record: by default `_cuda_graph`."""
        super().__init__(model)
        self._record = _cuda_graph if record is None else record
        self._kv: Tensor | None = None
        self._ids: Tensor
        self._position: Tensor
        self._run: Callable[[], tuple[Tensor, Tensor]]
        self._lock = threading.Lock()
        """Held during a step: the graph reads and writes the same tensors for all threads."""

    def _follows(self) -> bool:
        self._kv = None  # to record anew
        return super()._follows()

    def __call__(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        slots = cache.plan(1)
        with self._lock:
            if self._kv is not cache.kv:
                self._ids, self._position = ids.clone(), torch.full_like(ids[0], slots.start)
                self._run = self._record(self._step_over(cache))
                self._kv = cache.kv
            self._ids.copy_(ids)
            self._position.fill_(slots.start)
            hidden, logits = (result.clone() for result in self._run())  # it overwrites them
        cache.advance([1], slots)
        return hidden, logits

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

    announce: called before a compilation on a CPU, which takes half a minute or more. Plain
    weights that are packed are unpacked, which is slower for several rows. Sets the
    model's `step`, and returns the model.

    The step goes on with the new weights if some are replaced by others of their dtype and shape.
    It is dropped, with a line in the log, if the model is converted, moved or quantized, or if
    layers are exchanged or get hooks; and silently by `GPT.unpack`, by `GPT.train`, and in copies.

    Raises IncompatibleError if the model has layers that are not gptk's, or hooks; DeviceError if
    there is no compiler, or if the model is neither on a CPU nor on CUDA.
    """
    for module in model.modules():
        if isinstance(module, PackableModule) and isinstance(module.packed, OneDNNPacked | Panels):
            module.unpack()
    model.tie()
    model.step = _new_step(model, announce)
    return model


def _new_step(model: GPT, announce: Callable[[], None] | None) -> CompiledStep | RecordedStep:
    if (reason := why_not_capturable(model)) is not None:
        raise IncompatibleError(f"the step cannot be compiled: {reason}")
    if model.device.type == "cuda":
        return RecordedStep(model)
    if model.device.type != "cpu":
        raise DeviceError(f"a step can be compiled on cpu and on cuda, not on {model.device}")

    def make(path: Path) -> None:
        if announce is not None:
            announce()
        _compile(model, path)

    kernels.load_aoti_shims()
    try:
        code = Code("step", ".pt2", _origin(model), make)
        return load_or_make(code, lambda path: CompiledStep(model, _load(path)))
    except OSError as error:
        raise DeviceError(f"the compiled step cannot be kept: {error}") from None


def _load(path: Path) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch._inductor.aoti_load_package(str(path))


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
        with weights_replaced(model, weights):
            hidden = model.states_at(ids, slots, table)
            return hidden, model.logits(hidden[:, :, 0])


def _compile(model: GPT, path: Path) -> None:
    """Compile the step's program into a file, whose folder has room for more."""
    layers = range(model.config.n_layers)
    auto = torch.export.Dim.AUTO
    weights = [weight for _, _, weight in weights_of(model)]
    cache = model.new_cache(1, 96)
    example = (
        torch.zeros(1, 1, dtype=torch.int64),
        _ELEMENT.expand(40),
        model.position_table(40),
        list(cache.kv.unbind()),
        weights,
    )
    shapes = (None, {0: auto}, {1: auto}, [{3: auto} for _ in layers], [None for _ in weights])
    use_private_inductor_folder()
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
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={"aot_inductor.custom_ops_to_c_shims": kernels.aoti_shims()},
            )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise DeviceError(f"the step cannot be compiled here: {reason}") from error


_ELEMENT = torch.zeros(1)
"""Expanded to a tensor of any size, without memory, to pass a length to the program."""


def _origin(model: GPT) -> dict[str, str]:
    """All that a program depends on: code, PyTorch, processor, threads, shapes."""
    folders = Path(__file__).parent, Path(kernels.__file__).parent
    files = [path for folder in folders for path in sorted(folder.rglob("*"))]
    sources = [path.read_bytes() for path in files if path.suffix in (".py", ".cpp", ".h")]
    return {
        "sources": hashlib.sha256(b"\0".join(sources)).hexdigest(),
        "torch": torch.__version__,
        "processor": str(sorted(features())),
        "threads": str(torch.get_num_threads()),
        "kernels": str(kernels.instructions()),
        "model": hashlib.sha256(description(model).encode()).hexdigest(),
    }
