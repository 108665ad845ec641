"""The fixture `attack`: runs a fuzz target, see attacking.py."""

import itertools
import time
from collections.abc import Callable, Iterator

import pytest
from attacking import Attacker

FEW = 20


@pytest.fixture(scope="session")
def attacker() -> Iterator[Attacker]:
    attacker = Attacker()
    yield attacker
    attacker.close()


@pytest.fixture
def attack(request: pytest.FixtureRequest, attacker: Attacker) -> Callable[..., None]:
    """`attack(make, run)`, with the options of attacking.make_target, fails if an input does harm.

    There are 20 inputs, those of the seeds 0 to 19; `--fuzz-inputs N` makes N of them, and
    `--fuzz-minutes M` as many as fit into M minutes, which all targets of the session share.
    `--fuzz-seed S` begins with the seed S.
    """
    config = request.config

    def run(*_parts: object, **_options: object) -> None:
        first = config.getoption("--fuzz-seed")
        inputs, minutes = config.getoption("--fuzz-inputs"), config.getoption("--fuzz-minutes")
        seeds = itertools.count(first)
        deadline = float("inf")
        if minutes is not None:
            targets = sum("attack" in item.fixturenames for item in request.session.items)
            deadline = time.monotonic() + 60 * minutes / targets
        else:
            seeds = itertools.islice(seeds, inputs)
        tried, harms = 0, []
        for harm in attacker.attack(request.path, request.node.originalname, seeds):
            tried += 1
            if harm is not None:
                harms.append(harm)
            if time.monotonic() > deadline or len(harms) == 20:
                break
        print(f"{tried} inputs")
        if harms:
            told = "\n".join(map(str, harms))
            pytest.fail(f"{len(harms)} of {tried} inputs did harm:\n{told}", pytrace=False)

    return run
