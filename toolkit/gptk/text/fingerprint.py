"""A hash by which two tokenizers can be compared."""

import hashlib
import json

from gptk.text.tokenizer import Tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """The SHA-256 of what a tokenizer is made of, in hexadecimal digits.

    That is the bytes of each token, the special tokens and how they are found, the pattern that
    splits texts, the normal form, BOS and the tokens that end a text.
    """
    encoding = tokenizer.encoding
    about = {
        "pattern": getattr(encoding, "_pat_str", None),
        "special": getattr(encoding, "_special_tokens", None),
        "special_options": {
            text: sorted(options) for text, options in (tokenizer.special_options or {}).items()
        },
        "normalization": tokenizer.normalization,
        "bos": tokenizer.bos,
        "add_bos": tokenizer.add_bos,
        "eos": list(tokenizer.eos),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for token in range(encoding.n_vocab):
        data = tokenizer.token_bytes(token)
        digest.update(len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()
