"""The memory that a container's limit leaves."""

import math

import pytest

from gptk.system.control_groups import memory_left


def group(folder, limit, used, stat):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current")
    if "total_" in stat:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip((*names, "memory.stat"), (limit, used, stat), strict=True):
        (folder / name).write_text(f"{value}\n")


@pytest.fixture
def own(tmp_path):
    return tmp_path / "own"


def test_a_group_leaves_what_it_does_not_use(tmp_path, own):
    """Files that were read count as free."""
    own.write_text("0::/a/b\n")
    group(tmp_path / "a/b", 1000, 700, "anon 500\ninactive_file 200")
    assert memory_left(tmp_path, own) == 500


def test_the_group_that_leaves_least_counts(tmp_path, own):
    own.write_text("0::/a/b\n")
    group(tmp_path / "a/b", "max", 700, "inactive_file 0")
    group(tmp_path / "a", 800, 790, "inactive_file 5")
    assert memory_left(tmp_path, own) == 15


def test_in_a_container_the_path_may_be_the_one_outside(tmp_path, own):
    own.write_text("0::/kubepods/pod1\n")
    group(tmp_path, 2000, 500, "inactive_file 0")
    assert memory_left(tmp_path, own) == 1500


def test_version_1(tmp_path, own):
    own.write_text("5:cpu:/x\n4:cpuset,memory:/x\n0::/\n")
    group(tmp_path / "memory/x", 3000, 1000, "inactive_file 9\ntotal_inactive_file 100")
    group(tmp_path / "memory", 9223372036854771712, 10**9, "total_inactive_file 0")
    assert memory_left(tmp_path, own) == 2100


def test_a_group_that_is_full_leaves_nothing(tmp_path, own):
    own.write_text("0::/\n")
    group(tmp_path, 100, 120, "inactive_file 0")
    assert memory_left(tmp_path, own) == 0


def test_without_groups_there_is_no_limit(tmp_path, own):
    assert memory_left(tmp_path, own) == math.inf
    own.write_text("0::/\n")
    assert memory_left(tmp_path, own) == math.inf
