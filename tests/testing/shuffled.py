"""A plug-in for pytest that puts tests in another order, for the seed in SHUFFLE."""

import os
import random


def pytest_collection_modifyitems(items):
    if seed := os.environ.get("SHUFFLE"):
        random.Random(seed).shuffle(items)
