"""The engine: any number of runs over one model, whose passes it joins.

A run is a function that uses the model, such as one that decodes a prompt with a strategy of its
own. Where it needs the model to read tokens, it is suspended (by a greenlet, not a thread); when
all runs are, one pass reads the tokens of all. A run knows nothing of the others.

    run 1    choose ─ read 1 token  ──┐          ┌── choose ─ …
    run 2    choose ─ read 4 tokens ──┼── pass ──┼── choose ─ …
    run 3    begin ── read 90 tokens ─┘          └── choose ─ …

Runs begin in the order in which they come, when there is room for their rows. Long prompts are read
in several passes, so that others go on meanwhile. Keys and values are in blocks within a budget of
all models; if these run out, the newest runs lose theirs, of whatever model, and read their texts
again when there is room.

Everything here happens in one thread, the engine's. Any thread may start runs and wait for them.
"""

import atexit
import logging
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from greenlet import getcurrent

from gptk.engine.memory import Memory
from gptk.engine.model import JoinedModel
from gptk.engine.passes import Passes
from gptk.engine.reading import Reading
from gptk.engine.run import CancelledError, Run, Wanted
from gptk.model.protocol import CausalModel
from gptk.system.threads import release_threads

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Engine:
    """Runs functions that use models."""

    def __init__(self) -> None:
        self._waiting: deque[Run[Any]] = deque()
        self._active: list[Run[Any]] = []
        self._ready: list[Run[Any]] = []
        """Those of them that can go on: they begin, have what they wanted, or have to end."""
        self._wanting: dict[Passes, list[Run[Any]]] = {}
        """The others, by the model that they want to read tokens."""
        self._count = 0
        self._inbox: queue.SimpleQueue[Sequence[Run[Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._number: int | None = None
        """The thread's, while it works."""
        self._hub: Any = None
        self._running: Run[Any] | None = None
        self._passes: weakref.WeakKeyDictionary[Any, Passes] = weakref.WeakKeyDictionary()
        """For each model."""
        self.memory = Memory()
        self._lock = threading.Lock()
        self._stopping = False
        self._inherited: dict[str, Any] = {}

    def submit(
        self,
        function: Callable[[], T],
        *,
        rows: int = 1,
        done: Callable[[Run[T]], None] | None = None,
    ) -> Run[T]:
        """Start a run; `done` is called in the engine's thread when it has ended."""
        run = Run(function, rows, done)
        self.start([run])
        return run

    def start(self, runs: Sequence[Run[Any]]) -> None:
        """Start runs together: they begin before the next pass, as far as there is room."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # Ctrl-C may prevent its start
                self._stopping = False
                self._thread = threading.Thread(target=self._work, name="gptk engine", daemon=True)
                self._thread.start()
        if not self.is_inside:
            release_threads()
        self._inbox.put(runs)

    def call(self, function: Callable[[], T], *, rows: int = 1) -> T:
        """Run a function and wait for what it returns. Within a run it is a part of this."""
        return function() if self.is_inside else self.submit(function, rows=rows).result()

    def joined(self, model: CausalModel) -> CausalModel:
        """Within a run: the model, with passes that are joined with those of other runs."""
        if not self.is_inside or isinstance(model, JoinedModel):
            return model
        return JoinedModel(model, self.passes(model))

    def passes(self, model: CausalModel) -> Passes:
        """The passes of a model."""
        with self._lock:
            if model not in self._passes:
                made = Passes(model, self.wait_for, self.memory)
                self._passes[model] = made
            return self._passes[model]

    @property
    def is_inside(self) -> bool:
        """Whether the caller is within a run."""
        return self._number == threading.get_ident()

    def has_one_run(self) -> bool:
        """Whether there is but one run."""
        return len(self._active) <= 1 and not self._waiting and self._inbox.empty()

    @property
    def most_rows(self) -> int:
        """How many rows are decoded at the same time, but that one run may have more."""
        on_gpu = any(passes.is_on_gpu for passes in list(self._passes.values()))
        return MOST_ROWS_ON_GPU if on_gpu else MOST_ROWS

    @property
    def rows_in_use(self) -> int:
        """How many rows the runs have that are under way."""
        return sum(run.rows for run in self._active)

    def wait_for(self, passes: Passes, wanted: Wanted) -> Any:
        """Suspend the run that asks until the engine has what it wants of a model.

        Returns the states or the logits, or both; they may share memory with those of others.
        """
        if not self.is_inside:  # a model that a run has given away
            return self.call(lambda: self.wait_for(passes, wanted))
        run = self._running
        if run is None:
            raise RuntimeError("a model was asked for a pass by the engine itself")
        if isinstance(wanted, Reading) and wanted.cache is not run.cache:
            self.memory.use(wanted.cache, run)
        if run.is_cancelled:
            raise CancelledError
        if self.has_one_run() and (answer := passes.at_once(run, wanted)) is not None:
            return answer
        return self._hub.switch((passes, wanted))

    def stop(self) -> None:
        """Cancel all runs and end the thread, as at the end of the process: a thread that is within
        PyTorch when Python ends takes the process down."""
        thread = self._thread
        if thread is not None:
            self._stopping = True
            self._inbox.put([])
            if thread.is_alive():
                thread.join(_PATIENCE)
            self._thread = None  # not before: its runs are inside until they have ended

    def forget_all(self) -> None:
        """In a process that was forked: there is no thread, and nothing under way.

        What the parent had is kept: it takes no memory as long as nobody writes into it.
        """
        inherited = dict(self.__dict__)
        self.__init__()  # type: ignore[misc]
        self._inherited = inherited

    def _work(self) -> None:
        """What the engine's thread does."""
        self._hub, self._number = getcurrent(), threading.get_ident()
        with torch.inference_mode():
            while not self._stopping:
                try:
                    runs = self._inbox.get(timeout=_IDLE)
                except queue.Empty:
                    release_threads()
                    runs = self._inbox.get()
                self._waiting.extend(runs)
                try:
                    self._serve()
                except BaseException as error:
                    _log.exception("the engine failed")
                    runs = [*self._active, *self._waiting]
                    self._active, self._waiting = [], deque()
                    self._ready, self._wanting = [], {}
                    for run in runs:
                        run.end(error)
        self._number = None

    def _serve(self) -> None:
        """Take all runs to their ends."""
        while self._waiting or self._active:
            while not self._inbox.empty():
                self._waiting.extend(self._inbox.get())
            if self._stopping:
                for run in [*self._active, *self._waiting]:
                    run.cancel()
            self._admit()
            self._go_on()
            self._read()

    def _admit(self) -> None:
        """Begin with those that wait, in their order, while there is room for their rows, and
        nobody was set back, who comes before them."""
        rows = self.rows_in_use
        if not self._may_begin(rows) or any(run.is_set_back for run in self._active):
            return
        while self._may_begin(rows):
            run = self._waiting.popleft()
            run.number, self._count = self._count, self._count + 1
            if run.threads != torch.get_num_threads():
                torch.set_num_threads(run.threads)
            rows += run.rows
            self._active.append(run)
            self._ready.append(run)

    def _may_begin(self, rows: int) -> bool:
        """Whether a run waits for which there is room beside so many rows."""
        waiting = self._waiting
        return bool(waiting) and (not self._active or self._has_room(rows + waiting[0].rows))

    def _has_room(self, rows: int) -> bool:
        if rows > self.most_rows:
            return False
        return all(passes.has_room(rows) for passes in list(self._passes.values()))

    def _go_on(self) -> None:
        """Let every run go on that can, until all want tokens to be read."""
        self._find_ready()
        asking: dict[Passes, deque[Run[Any]]] = {}
        while self._ready or any(asking.values()):
            ready, self._ready = self._ready, []
            for run in ready:
                self._running = run
                if not run.go_on():
                    self._end(run)
                elif isinstance(run.wanted, Reading):
                    self._wanting.setdefault(run.of, []).append(run)
                else:
                    asking.setdefault(run.of, deque()).append(run)
            self._running = None
            for passes, runs in asking.items():
                self._ready += passes.give_logits(runs)

    def _find_ready(self) -> None:
        """Of the runs that wanted tokens to be read, find those that can go on now."""
        wanting, self._wanting = self._wanting, {}
        for passes, runs in wanting.items():
            waiting: list[Run[Any]] = []
            for run in runs:
                can_go_on = run.answer is not None or run.is_cancelled
                (self._ready if can_go_on else waiting).append(run)
            if waiting:
                self._wanting[passes] = waiting

    def _end(self, run: Run[Any]) -> None:
        self._active.remove(run)
        if run.has_failed:
            self.memory.release(run)
        run.end()

    def _read(self) -> None:
        """One pass of each model over what runs want read.

        Where runs use several models, such as a draft's, the one that is read most often goes
        first, until its runs want the others again: so these read for all runs at a time.
        """
        groups = sorted(self._wanting.items(), key=lambda group: -group[0].count)
        for passes, runs in groups:
            first = groups[0][1]
            comes_back = runs is not first and any(passes in run.used for run in first)
            if comes_back and passes.waited < _MOST_WAITING:
                passes.waited += 1
            else:
                passes.read(runs)


MOST_ROWS = 64
"""See `Engine.most_rows`. More rows in a pass of a CPU would make it longer and not faster."""
MOST_ROWS_ON_GPU = 256
"""The same where a model is on a GPU: more would be no CUDA graph, see gptk.model.graphs."""

_MOST_WAITING = 32
"""Passes of another model that runs wait for at most, so that a model comes up for them, too."""

_IDLE = 0.1
"""Seconds after which an engine with nothing to do leaves the computing to others."""

_PATIENCE = 10.0
"""Seconds to wait for the thread: a pass may be under way."""

ENGINE = Engine()
"""The engine of this process."""

atexit.register(ENGINE.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ENGINE.forget_all)
