"""The folder for files that gptk can compute again, such as compiled kernels."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """$GPTK_CACHE, else the user's cache directory. All in it can be deleted and computed again."""
    folder = os.environ.get("GPTK_CACHE") or platformdirs.user_cache_dir("gptk", appauthor=False)
    return Path(folder)
