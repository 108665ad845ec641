"""A hash by which two tokenizers can be compared."""

import hashlib
import json

from gptk.text.tokenizer import Tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """The SHA-256 of what a tokenizer is made of, in hexadecimal digits.

    That is the bytes and ids of its tokens, those that are only decoded, the special tokens and how
    they are found, the pattern that splits texts, the normal form, BOS and the tokens that end a
    text.
    """
    from gptk.text.encoding import ByteLevelBPE  # tiktoken is not needed before

    encoding = ByteLevelBPE.of(tokenizer.encoding)
    about = {
        "pattern": encoding._pat_str,
        "special": encoding._special_tokens,
        "special_options": {
            text: sorted(options) for text, options in (tokenizer.special_options or {}).items()
        },
        "normalization": tokenizer.normalization,
        "bos": tokenizer.bos,
        "add_bos": tokenizer.add_bos,
        "eos": tokenizer.eos,
        "tokens": len(encoding._mergeable_ranks),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    ranks = sorted((rank, token) for token, rank in encoding._mergeable_ranks.items())
    for number, token in (*ranks, *sorted(encoding.decode_only.items())):
        digest.update(number.to_bytes(8, "little") + len(token).to_bytes(8, "little") + token)
    return digest.hexdigest()
