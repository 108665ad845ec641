"""The folder for what gptk can make anew."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Where gptk keeps what it can make anew: $GPTK_CACHE, else the user's cache directory."""
    folder = os.environ.get("GPTK_CACHE") or platformdirs.user_cache_dir("gptk", appauthor=False)
    return Path(folder)
