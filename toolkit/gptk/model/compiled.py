"""A decoding step of one row as one compiled program, kept between runs.

Between its matrix products a step has some twenty small operations a layer, which take a third of
its time on a CPU. TorchInductor fuses them, and reads plain matrices at the speed of memory where
PyTorch's own products of one row do not. The program (an AOTInductor package) is made once for a
shape of model on a machine, in half a minute or more, and loaded in milliseconds from then on. It
holds no weights: they are given to it at each call, in place and as they are, so that models of
one shape share it. Any length of text and of cache will do.

On CUDA a step's kernels take less time than launching them one by one. There they are recorded as
a CUDA graph for each cache, and launched together from then on.
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
from gptk.model.linear import Blocked, Linear
from gptk.system.caches import cache_folder


class _RowStep:
    """What `GPT.states` and `logits` do for one new token of a single row with a cache.

    It fulfils the protocol `gptk.model.protocol.Step`.
    """

    def fits(self, ids: Tensor, cache: KVCache | None, layers: Collection[int]) -> bool:
        """Whether a pass is of that kind."""
        return ids.shape == (1, 1) and cache is not None and cache.is_plain and not layers

    def __call__(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """The hidden state (1, 1, 1, width) and the logits (1, 1, vocab), float32."""
        raise NotImplementedError


class CompiledStep(_RowStep):
    """As a program, on a CPU."""

    def __init__(self, model: GPT, program: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._model, self._program = model, program
        self._weights = [weight for _, _, weight in _weights(model)]

    def __call__(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        at = cache.plan(1)
        # The program takes cache and table to be longer than the text.
        if at.end == cache.capacity:
            cache.reserve(2 * cache.capacity)
        table = self._model.position_table(at.end + 1)
        end = _MARK.expand(at.end)
        hidden, logits = self._program(ids, end, table, list(cache.kv.unbind()), self._weights)
        cache.advance([1], at)
        return hidden, logits


Recorder = Callable[[Callable[[], tuple[Tensor, Tensor]]], Callable[[], tuple[Tensor, Tensor]]]
"""Given a function of no arguments, gives one that does the same to the same tensors."""


class RecordedStep(_RowStep):
    """As a CUDA graph: what a step does to its tensors, recorded and done again."""

    def __init__(self, model: GPT, record: "Recorder | None" = None) -> None:
        self._model = model
        self._record = _cuda_graph if record is None else record
        self._kv: Tensor | None = None
        self._ids: Tensor
        self._place: Tensor
        self._run: Callable[[], tuple[Tensor, Tensor]]

    def __call__(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        at = cache.plan(1)
        if self._kv is not cache.kv:
            self._ids, self._place = ids.clone(), torch.full_like(ids[0], at.start)
            self._run = self._record(self._step_over(cache))
            self._kv = cache.kv
        self._ids.copy_(ids)
        self._place.fill_(at.start)
        hidden, logits = self._run()
        cache.advance([1], at)
        return hidden.clone(), logits.clone()  # the next step writes over them

    def _step_over(self, cache: KVCache) -> Callable[[], tuple[Tensor, Tensor]]:
        """A step over all the memory of a cache, of which a mask says what is in use."""
        kv, ids, place = cache.kv, self._ids, self._place
        capacity = cache.capacity
        table = self._model.position_table(capacity + 1)
        keys, values = kv.flatten(2, 3)[:, :, :, None].unbind(1)
        every = torch.arange(capacity, device=kv.device)
        # Of a length that attention kernels like.
        mask = kv.new_zeros(1, 1, capacity + -capacity % 8)[..., :capacity]
        at = _SlotsAt(
            positions=place[None],
            start=0,
            end=capacity,
            group=1,  # of the mask: one row serves all queries
            trees=1,
            places=1,
            order=None,
            starts=[],
            mask=mask,
            causal=False,
            plain=True,
            slots=kv.unbind(),
            keys=keys.unbind(),
            values=values.unbind(),
        )

        def run() -> tuple[Tensor, Tensor]:
            mask.zero_().masked_fill_(every > place, -torch.inf)
            hidden = self._model.states_at(ids, at, table)
            return hidden, self._model.logits(hidden[:, :, 0])

        return run


class _SlotsAt(Slots):
    """One new token for one row, at the slot that is its position, a number in the device."""

    def write(self, layer: int, new: Tensor) -> None:
        self.slots[layer].index_copy_(3, self.positions[0], new.permute(2, 0, 3, 1, 4))


def _cuda_graph(run: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, Tensor]]:
    # Runs before the recording settle what kernels choose and allocate at first. They write what
    # the first step will write again.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def again() -> tuple[Tensor, Tensor]:
        graph.replay()
        return results

    return again


def compile_step(model: GPT, announce: Callable[[], None] | None = None) -> GPT:
    """Compile the step that decodes one row, or load it where that was done before.

    announce: called before a compilation on a CPU, which takes half a minute or more. Weights in
    bfloat16 that are packed for a CPU are unpacked for it, which is slower for several rows.
    `GPT.unpack` and `GPT.train` drop the step. Returns the model, whose `step` it is from now on.
    Raises DeviceError where there is no compiler, or the model is neither on a CPU nor on CUDA.
    """
    for module in model.modules():
        if isinstance(module, Linear) and isinstance(module.packed, Blocked):
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
        # A file that is damaged, or that something else is missing for, is made anew.
        with contextlib.suppress(RuntimeError):
            return CompiledStep(model, torch._inductor.aoti_load_package(str(path)))
    if announce is not None:
        announce()
    _compile(model, path)
    return CompiledStep(model, torch._inductor.aoti_load_package(str(path)))


class _Traced(nn.Module):
    """The step as a function of tensors alone, weights and cache among them."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.__dict__["_gpt"] = model  # no submodule: its weights are to come from outside

    def forward(
        self, ids: Tensor, end: Tensor, table: Tensor, kv: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """end: any tensor as long as the text with the new token; kv: each layer's cache."""
        model: GPT = self.__dict__["_gpt"]
        length = end.shape[0]
        both = [layer.flatten(1, 2)[:, :, None, :length].unbind() for layer in kv]
        at = Slots(
            positions=torch.full((1, 1), length - 1),
            start=length - 1,
            end=length,
            group=model.config.n_heads // model.config.n_kv_heads,
            trees=1,
            places=1,
            order=None,
            starts=[],
            mask=None,
            causal=False,
            plain=True,
            slots=tuple(layer[:, :, :, length - 1 : length] for layer in kv),
            keys=tuple(keys for keys, _ in both),
            values=tuple(values for _, values in both),
        )
        with _given(model, weights):
            hidden = model.states_at(ids, at, table)
            return hidden, model.logits(hidden[:, :, 0])


def _compile(model: GPT, path: Path) -> None:
    layers = range(model.config.n_layers)
    auto = torch.export.Dim.AUTO
    weights = [weight for _, _, weight in _weights(model)]
    cache = model.new_cache(1, 96)
    given = (
        torch.zeros(1, 1, dtype=torch.int64),
        _MARK.expand(40),
        model.position_table(40),
        list(cache.kv.unbind()),
        weights,
    )
    shapes = (None, {0: auto}, {1: auto}, [{3: auto} for _ in layers], [None for _ in weights])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch about its own insides
            program = torch.export.export(
                _Traced(model),
                given,
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = torch._inductor.aoti_compile_and_package(
                    program,
                    package_path=os.path.join(folder, path.name),
                    inductor_configs={"aot_inductor.custom_ops_to_c_shims": kernels.shims()},
                )
                os.replace(made, path)
    except OSError as error:
        raise DeviceError(f"the compiled step cannot be kept in {path.parent}: {error}") from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise DeviceError(f"the step cannot be compiled here: {reason}") from error


_MARK = torch.zeros(1)

Weight = tuple[list[dict[str, Any]], str, Tensor]
"""A weight, with the attributes among which it stands and its name there."""


def _weights(model: GPT) -> list[Weight]:
    """All weights of a model: parameters, and what packed layers hold instead."""
    found: list[Weight] = []
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                # `pack` has them among the module's attributes, too.
                places = [module._parameters, module.__dict__]
                found.append(([one for one in places if name in one], name, value))
        if isinstance(module, Linear) and module.packed is not None:
            for attributes in _attributes(module.packed):
                tensors = [
                    (name, one) for name, one in attributes.items() if isinstance(one, Tensor)
                ]
                found += [([attributes], name, one) for name, one in tensors]
    return found


def _attributes(packed: object) -> Iterator[dict[str, Any]]:
    yield vars(packed)
    for value in vars(packed).values():
        if type(value).__module__ == type(packed).__module__:
            yield from _attributes(value)


@contextlib.contextmanager
def _given(model: GPT, weights: Sequence[Tensor]) -> Iterator[None]:
    """Have the model compute with other tensors in its weights' places."""
    own = _weights(model)
    try:
        for (places, name, _), weight in zip(own, weights, strict=True):
            for place in places:
                place[name] = weight
        yield
    finally:
        for places, name, weight in own:
            for place in places:
                place[name] = weight


def _key(model: GPT) -> str:
    """What a program depends on: the code, the compiler, the machine, the shapes."""
    parts = [torch.__version__, str(torch.cpu.get_capabilities()), str(torch.get_num_threads())]
    folders = Path(__file__).parent, Path(kernels.__file__).parent
    parts += [code.read_text() for folder in folders for code in sorted(folder.glob("*.py"))]
    parts += [repr(model.config), str(model.dtype)]
    parts += [f"{name} {weight.dtype} {tuple(weight.shape)}" for _, name, weight in _weights(model)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
