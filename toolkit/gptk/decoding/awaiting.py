"""Runs for asyncio: awaited without a thread for each, cancelled with their tasks."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from gptk.decoding.stream import Stream
from gptk.engine.engine import ENGINE
from gptk.engine.run import Run

T = TypeVar("T")


async def awaited(function: Callable[[], T], *, rows: int) -> T:
    """What a function returns that uses the model, in a run; a task that is cancelled ends it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    def tell(_: Run[T]) -> None:
        loop.call_soon_threadsafe(wake)

    run = ENGINE.submit(function, rows=rows, done=tell)
    try:
        await future
    except asyncio.CancelledError:
        run.cancel()
        raise
    return run.result()


async def pieces(stream: Stream) -> AsyncIterator[str]:
    """The pieces of a stream, which is ended with the iterator."""
    with stream:
        while (piece := await awaited(lambda: next(stream, None), rows=stream.rows)) is not None:
            yield piece
