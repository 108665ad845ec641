"""Programs run to their end: gptk's, and Python."""

import subprocess
import sys
from pathlib import Path

GPTK = str(Path(sys.executable).with_name("gptk"))


def run(*command):
    """Its standard output. Raises if it fails."""
    words = list(map(str, command))
    return subprocess.run(
        words, check=True, capture_output=True, stdin=subprocess.DEVNULL, text=True
    ).stdout
