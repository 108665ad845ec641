"""The contract of weight writers."""

from pathlib import Path
from typing import ClassVar

import torch

import gptk
from gptk.testing._plugin import PluginContract
from gptk.testing._promises import check, promise
from gptk.testing._weights import SMALL, check_same
from gptk.testing.models import tiny_gpt


class WriterContract(PluginContract):
    """What a weight writer promises."""

    _base: ClassVar[type] = gptk.WeightWriter
    config: ClassVar[gptk.GPTConfig] = SMALL
    """A model that the format can hold."""
    with_text: ClassVar[bool] = False
    """Whether to write a tokenizer, too: the 256 bytes."""

    @promise
    def test_what_it_writes_is_read_back(self, tmp_path: Path) -> None:
        """The loader that matches the directory makes the same model and tokenizer of it."""
        self._check_written(tmp_path, seed=1)

    @promise
    def test_one_instance_serves_several_calls(self, tmp_path: Path) -> None:
        """What it writes does not depend on what it has written before."""
        for seed in (1, 2, 1):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            self._check_written(folder, seed=seed)

    def _check_written(self, folder: Path, *, seed: int) -> None:
        model, copy = (tiny_gpt(self.config, seed=seed) for _ in range(2))
        tokenizer = gptk.load_tokenizer("bytes") if self.with_text else None
        self.plugin().write(folder, model, tokenizer)
        check_same(model, copy, "before it was written")
        checkpoint = gptk.load_checkpoint(str(folder))
        check_same(gptk.build_model(checkpoint, "cpu", torch.float32), copy, "the model")
        if tokenizer is None:
            return
        check(checkpoint.tokenizer is not None, "the tokenizer is lost")
        assert checkpoint.tokenizer is not None
        again = checkpoint.tokenizer()
        for text in ("", "abc", "naïve 한국어\n\0", "a<|endoftext|>b"):
            check(again.encode(text) == tokenizer.encode(text), f"{text!r} has other ids")
        check(again.eos == tokenizer.eos, f"EOS is {again.eos}, and was {tokenizer.eos}")
