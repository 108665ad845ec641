"""The attack itself: what does harm is seen."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from attacking import Attacker

from gptk.errors import PluginError, SpecError


def harmful(attack) -> None:
    """A target whose inputs do what their seed says."""

    def run(seed: int) -> None:
        if seed == 1:
            raise SpecError("refused")
        if seed == 2:
            raise ValueError("a traceback")
        if seed == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        if seed == 4:
            raise PluginError("the plug-in x is broken")
        if seed == 5:
            _ = bytearray(os.urandom(1)) * 700_000_000
        if seed == 6:
            raise SystemExit(1)
        if seed == 7:
            Path("left-over").touch()
        if seed == 8:
            assert not list(Path().iterdir())
        if seed == 9:
            time.sleep(1000)

    def make(rng: random.Random) -> int:
        return SEEDS[rng.random()]

    attack(make, run)


SEEDS = {random.Random(seed).random(): seed for seed in range(10)}


def test_an_attack_sees_what_each_input_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attacking.SECONDS", 5.0)
    attacker = Attacker()
    harms = list(attacker.attack(Path(__file__), "harmful", range(10)))
    attacker.close()
    harmless = [seed for seed, harm in enumerate(harms) if harm is None]
    assert harmless == [0, 1, 7, 8]
    told = {harm.seed: harm.what for harm in harms if harm is not None}
    assert "ValueError: a traceback" in told[2]
    assert told[3] == "the process ended with -11"
    assert "blames a plug-in" in told[4]
    assert "took 7" in told[5]
    assert "SystemExit" in told[6]
    assert "over 5 s" in told[9]
