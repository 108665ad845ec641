"""The threads that PyTorch and gptk's kernels compute with."""

import logging
import threading

import torch

_log = logging.getLogger(__name__)


def use_threads_that_start() -> None:
    """Have PyTorch use no more threads than this process may start; a line in the log says so.

    Its threads start with the first operation that uses them. Should one of them not start, for
    want of memory or by a limit of the system, OpenMP ends the process. So they are tried before.
    """
    wanted = torch.get_num_threads()
    threads: list[threading.Thread] = []
    done = threading.Event()
    try:
        for _ in range(wanted - 1):
            thread = threading.Thread(target=done.wait)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        torch.set_num_threads(len(threads) + 1)
        _log.warning("of %d threads the system starts %d; these are used", wanted, len(threads) + 1)
    finally:
        done.set()
        for thread in threads:
            thread.join()
