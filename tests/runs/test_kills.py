"""kill -9 at any moment of a run: it goes on, and ends with the bits of a run without kills."""

import json
import os
import random
import signal
from collections import Counter

import pytest

import training_runs
from gptk.runs import checkpoints
from training_runs import STATEFUL, finish, in_child, same_state

# A run whose moments are many: steps, saves with and without an evaluation, samples.
SETTINGS = STATEFUL | {"save_every": 2, "eval_every": 5, "keep": 2, "accumulate": 2}


KILLS = 100


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nobody kills, how many changes of files it makes, and its seconds."""
    folder = tmp_path_factory.mktemp("straight")
    # The first child compiles the kernels, unless they are compiled already.
    finish(in_child(training_runs.train, SETTINGS, folder / "first"))
    finish(in_child(training_runs.train_counting, SETTINGS, folder / "run", folder / "report"))
    return folder / "run", json.loads((folder / "report").read_text())


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(straight, tmp_path):
    """Every other kill comes at a random time, the others before a random change of a file:
    before it is opened, synced, renamed or removed. A killed run is resumed until it ends; then
    another one begins."""
    wanted, whole = straight
    chance, moments, ended = random.Random(0), Counter(), 0
    while moments.total() < KILLS:
        run = tmp_path / f"run-{ended}"
        while True:
            code, moment = killed_child(run, chance, whole, moments.total())
            check_intact(run)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            moments[moment] += 1
        same_state(wanted, run)
        ended += 1
    print(f"{moments.total()} kills in {ended} runs: {dict(moments)}")


def killed_child(run, chance, whole, number):
    """A child that trains until it ends or is killed: its exit code, and when it was killed."""
    if number % 2:
        report = run.with_suffix(".moment")
        change = chance.randint(1, whole["changes"])
        child = in_child(training_runs.train_until_change, SETTINGS, run, change, report)
        child.join()
        return child.exitcode, report.read_text() if child.exitcode else ""
    child = in_child(training_runs.train, SETTINGS, run)
    child.join(chance.uniform(0, whole["seconds"]))
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    saving = any(run.glob("checkpoints/.step-*"))
    begun = any(run.glob("checkpoints/step-*"))
    return child.exitcode, "in a save" if saving else "between saves" if begun else "at the start"


def check_intact(run):
    """Whatever has a checkpoint's name is whole."""
    if any(run.glob("checkpoints/step-*")):
        checkpoints.newest_intact(run, pytest.fail)
