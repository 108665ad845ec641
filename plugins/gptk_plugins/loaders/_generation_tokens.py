"""The tokens that generation begins and ends with, as transformers takes them: those of
generation_config.json, or where there is no such file, of config.json.

tokenizer_config.json and special_tokens_map.json may name other tokens, which chat templates use.
They count only where neither file names any.
"""

import dataclasses
import os
from pathlib import Path

import gptk
from gptk.plugins import Fields, read_json


class _Ids(Fields):
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None


def with_generation_tokens(tokenizer: gptk.Tokenizer, folder: Path) -> gptk.Tokenizer:
    """The tokenizer with the `bos` and `eos` of a Hugging Face directory.

    Ids that the tokenizer lacks are left out: no text can contain them. Raises TokenizerError for a
    file that cannot be read or has ids of another type.
    """
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        path = folder / "config.json"
    ids = _Ids.parse(read_json(path, gptk.TokenizerError), path, gptk.TokenizerError)
    bos, eos = _known(ids.bos_token_id, tokenizer), _known(ids.eos_token_id, tokenizer)
    return dataclasses.replace(
        tokenizer,
        # A token that the tokenizer puts in front of every text is the beginning.
        bos=bos[0] if bos and not tokenizer.add_bos else tokenizer.bos,
        eos=eos or tokenizer.eos,
    )


def _known(ids: int | list[int] | None, tokenizer: gptk.Tokenizer) -> tuple[int, ...]:
    """The ids that the tokenizer has, each once."""
    listed = [] if ids is None else [ids] if isinstance(ids, int) else ids
    known = range(tokenizer.encoding.max_token_value + 1)
    return tuple(dict.fromkeys(number for number in listed if number in known))
