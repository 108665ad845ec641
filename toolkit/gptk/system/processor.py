"""What the processor can do."""

import functools
import platform
import subprocess
import sys


@functools.cache
def features() -> frozenset[str]:
    """The processor's instructions by the names that Linux has for them, such as `avx512_bf16`.

    Those of /proc/cpuinfo, which lists what processor and kernel allow together. On macOS the ones
    that gptk asks for. Empty on other systems.
    """
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
                return _of_cpuinfo(file.read())
        except OSError:
            return frozenset()
    if sys.platform == "darwin" and machine() == "aarch64":
        names = {"asimddp": "FEAT_DotProd", "i8mm": "FEAT_I8MM", "bf16": "FEAT_BF16"}
        return frozenset(name for name, feature in names.items() if _macos_has(feature))
    return frozenset()


def machine() -> str:
    """The kind of processor by Linux's name for it: x86_64, aarch64, …"""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _of_cpuinfo(text: str) -> frozenset[str]:
    """What all processors have: there are machines with several kinds."""
    lines = (line.partition(":") for line in text.splitlines())
    each = [set(value.split()) for key, _, value in lines if key.strip() in ("flags", "Features")]
    return frozenset(set.intersection(*each)) if each else frozenset()


def _macos_has(feature: str) -> bool:
    command = ["/usr/sbin/sysctl", "-n", f"hw.optional.arm.{feature}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.stdout.strip() == "1"
