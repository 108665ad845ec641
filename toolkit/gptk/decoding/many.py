"""Many requests at a time: as many are under way as there is room for, each in a run of its own."""

import queue
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from gptk.decoding.requests import Request, Response
from gptk.engine.engine import ENGINE
from gptk.engine.run import Run
from gptk.errors import GptkError
from gptk.hooks.results import Generation


@dataclass(frozen=True)
class Job:
    """A request, and what continues it; or the error that its prompt or settings have."""

    index: int
    request: Request
    rows: int = 1
    run: Callable[[], Generation] | None = None
    error: GptkError | None = None

    def response(self, run: Run[Generation]) -> Response:
        """Once it has ended. What a stop function raised is its error, too."""
        try:
            return Response(self.index, self.request, generation=run.result())
        except Exception as error:
            return Response(self.index, self.request, error=error)


def respond(jobs: Iterable[Job], *, ordered: bool, together: bool = False) -> Iterator[Response]:
    """The responses, as they end or in order. Jobs are taken as there is room for them.

    together: none begins before as many have been taken as there is room for, so that the same jobs
    share the same passes each time.
    What is under way when the iterator is closed is cancelled.
    """
    source = iter(jobs)
    ended: queue.SimpleQueue[tuple[Job, Run[Generation]]] = queue.SimpleQueue()
    under_way: dict[int, Run[Generation]] = {}
    held: dict[int, Response] = {}
    following = 0  # the next index, if in order
    exhausted = False
    try:
        while under_way or held or not exhausted:
            started: list[Run[Generation]] = []
            ahead = 2 * ENGINE.most_rows  # to be taken before the first of them has ended
            while not exhausted and len(under_way) + len(held) < ahead:
                job = next(source, None)
                if job is None:
                    exhausted = True
                elif job.run is None:
                    held[job.index] = Response(job.index, job.request, error=job.error)
                else:
                    run = under_way[job.index] = _run_of(job, ended)
                    if together:
                        started.append(run)
                    else:
                        ENGINE.start([run])
            ENGINE.start(started)
            if under_way and (not held or (ordered and following not in held)):
                job, run = ended.get()
                del under_way[job.index]
                held[job.index] = job.response(run)
            while held and (not ordered or following in held):
                yield held.pop(following if ordered else next(iter(held)))
                following += 1
    finally:
        for run in under_way.values():
            run.cancel()


def _run_of(job: Job, ended: "queue.SimpleQueue[tuple[Job, Run[Generation]]]") -> Run[Generation]:
    assert job.run is not None
    return Run(job.run, job.rows, lambda run: ended.put((job, run)))
