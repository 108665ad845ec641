"""What is computed once, by whichever thread comes first."""

import threading

from gptk.plugins import registry
from gptk.system.once import computed_once


def at_once(function, threads=8):
    """The results of a function that several threads call at the same time."""
    together, results = threading.Barrier(threads), []

    def call():
        together.wait()
        results.append(function())

    running = [threading.Thread(target=call) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(results) == threads
    return results


def test_threads_share_one_result_for_each_argument():
    calls = []

    @computed_once
    def made(name):
        calls.append(name)
        threading.Event().wait(0.02)
        return object()

    assert len(set(at_once(lambda: made("a")))) == 1
    assert made("b") is not made("a")
    assert calls == ["a", "b"]
    made.cache_clear()
    made("a")
    assert calls == ["a", "b", "a"]


def test_threads_may_look_for_plugins_for_the_first_time_at_once(monkeypatch):
    """Each had a registry of its own, and a plug-in that one registered was not in the others'."""
    failures = list(registry._load_failures)
    monkeypatch.setattr(registry, "_load_failures", [])
    registry.manager.cache_clear()
    registry._survey.cache_clear()
    found = at_once(lambda: (registry.manager(), registry.provided("sampler")["greedy"].item))
    assert len(set(found)) == 1
    assert registry.failures([]) == failures
