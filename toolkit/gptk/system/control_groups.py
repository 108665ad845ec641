"""How much memory the control groups of Linux leave, by which containers are limited."""

import math
from collections.abc import Iterator
from pathlib import Path


def memory_left(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """The bytes that this process can still take in the control groups it is in, or infinity.

    root: where they are mounted; own: the file that names those of this process. Of a group's
    memory, files that were read and can be read again count as free, as in MemAvailable.
    """
    return min((_left(group, *names) for group, names in _groups(root, own)), default=math.inf)


def _groups(root: Path, own: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of the groups and of those that these are in, and what their files are called."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return  # another system
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounted, names = root, _VERSION_2
        elif "memory" in controllers.split(","):
            mounted, names = root / "memory", _VERSION_1
        else:
            continue
        group = mounted / path.lstrip("/")
        # In a container the path may be the one outside; then the group is where it is mounted.
        while mounted in (group, *group.parents):
            yield group, names
            group = group.parent


def _left(group: Path, limit: str, used: str, reclaimable: str) -> float:
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return math.inf
        left = float(most) - float((group / used).read_text())
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            left += float(value) if name == reclaimable else 0
    except (OSError, ValueError):
        return math.inf
    return max(0.0, left)


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
