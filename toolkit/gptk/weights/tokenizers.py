"""Loading a tokenizer by name, file or spec string."""

import os
import re

from gptk.errors import TokenizerError
from gptk.hooks.tokenizers import TokenizerLoader
from gptk.plugins.asking import ask, matching
from gptk.plugins.blame import blaming, expect
from gptk.plugins.creating import create
from gptk.plugins.registry import provided
from gptk.text.tokenizer import Tokenizer
from gptk.weights.loading import default_source, load_checkpoint


def load_tokenizer(source: str) -> Tokenizer:
    """A tokenizer by name (`gpt2`, `bytes`, any of tiktoken's), file, or spec string.

    Raises TokenizerError, or UnknownNameError for an unknown name.
    """
    if not _is_spec(source):
        if loader := matching("tokenizer", source, TokenizerLoader):
            return _load(loader)
        if os.path.exists(source):
            raise TokenizerError(f"{source} is not a tokenizer file that gptk can read")
        if os.sep in source:
            raise TokenizerError(f"no such tokenizer file: {source}")
    return _load(create("tokenizer", source, TokenizerLoader))


def load_model_tokenizer(source: str | None) -> Tokenizer:
    """The tokenizer of a model (None: the default model), read without its weights.

    Where a loader of tokenizers knows the model's files, neither PyTorch nor a loader of weights is
    imported. Raises TokenizerError if the model has none, and what finding a model raises.
    """
    asked = [ask(p, "default_source", answer=str) for p in provided("tokenizer").values()]
    installed = [name for name in asked if name]
    source = source or os.environ.get("GPTK_MODEL") or next(iter(installed), None)
    source = source or default_source()
    known = source in installed or os.path.exists(source)
    if known and (loader := matching("tokenizer", source, TokenizerLoader)):
        return _load(loader)
    checkpoint = load_checkpoint(source)
    if checkpoint.tokenizer is None:
        raise TokenizerError(f"{source} has no tokenizer; name one with --tokenizer")
    return checkpoint.tokenizer()


def _load(loader: TokenizerLoader) -> Tokenizer:
    with blaming([loader]):
        return expect(loader, "load", loader.load(), Tokenizer, "a gptk.Tokenizer")


def _is_spec(source: str) -> bool:
    """Whether it names a tokenizer plug-in and an option; paths hardly begin like that."""
    name, colon, _ = source.partition(":")
    return bool((colon and name in provided("tokenizer")) or _OPTION.match(source))


_OPTION = re.compile(r"[\w.-]+:\w+=")
