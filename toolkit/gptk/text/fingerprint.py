"""A hash by which two tokenizers can be compared."""

import hashlib
import json

from gptk.text.pipeline import PipelineEncoding
from gptk.text.tokenizer import Tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """The SHA-256 of what a tokenizer is made of, in hexadecimal digits.

    That is the bytes and ids of its tokens, those that are only decoded, the special tokens and how
    they are found, the pattern that splits texts, the normal form, BOS and the tokens that end a
    text; of a `gptk.PipelineEncoding` its `tokenizer.json`, BOS and the tokens that end a text.
    """
    encoding = tokenizer.encoding
    if isinstance(encoding, PipelineEncoding):
        settings: dict[str, object] = {
            "pipeline": json.loads(encoding.to_json()),
            "splits_special_tokens": encoding.splits_special_tokens,
        }
        return hashlib.sha256(_json(settings | _ends(tokenizer))).hexdigest()
    from gptk.text.encoding import ByteLevelBPE  # tiktoken is not needed before

    encoding = ByteLevelBPE.of(encoding)
    about = {
        "pattern": encoding._pat_str,
        "special": encoding._special_tokens,
        "special_options": {
            text: sorted(options) for text, options in (tokenizer.special_options or {}).items()
        },
        "normalization": tokenizer.normalization,
        "tokens": len(encoding._mergeable_ranks),
    }
    digest = hashlib.sha256(_json(about | _ends(tokenizer)))
    ranks = sorted((rank, token) for token, rank in encoding._mergeable_ranks.items())
    for number, token in (*ranks, *sorted(encoding.decode_only.items())):
        digest.update(number.to_bytes(8, "little") + len(token).to_bytes(8, "little") + token)
    return digest.hexdigest()


def _ends(tokenizer: Tokenizer) -> dict[str, object]:
    """How a tokenizer begins and ends a text."""
    ends: dict[str, object] = {name: getattr(tokenizer, name) for name in ("bos", "add_bos", "eos")}
    return ends | ({"add_eos": True} if tokenizer.add_eos else {})


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
