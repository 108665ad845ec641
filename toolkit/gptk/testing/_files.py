"""Contracts of what reads and writes files: weight loaders and writers, and tokenizers."""

import tempfile
import unicodedata
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptk.errors import GptkError
from gptk.hooks.weights import WeightLoader
from gptk.model.config import GPTConfig
from gptk.model.gpt import GPT
from gptk.testing._promises import PluginContract, check, examples, promise
from gptk.testing.models import tiny_gpt
from gptk.text.tokenizer import Tokenizer
from gptk.weights.building import build_model
from gptk.weights.loading import load_checkpoint
from gptk.weights.tokenizers import load_tokenizer

SMALL = GPTConfig(
    vocab_size=40,
    context_length=24,
    width=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    head_dim=8,
    mlp_width=64,
)
"""Like GPT-2."""


class LoaderContract(PluginContract):
    """What a weight loader promises."""

    config: ClassVar[GPTConfig] = SMALL
    """A model that the format can hold."""
    precision: ClassVar[torch.dtype] = torch.float32
    """In which the format holds numbers."""

    def write(self, folder: Path, config: GPTConfig, state: dict[str, Tensor]) -> str:
        """Write a model in the loader's format; returns its source. To be overridden.

        state: tensors by the names of `gptk.GPT`'s parameters. Some promises give one too few or
        one too many: names that are not known are to be written as they are.
        """
        raise NotImplementedError("a LoaderContract defines write(folder, config, state)")

    def loader(self, source: str) -> WeightLoader:
        """The loader for a source."""
        loader = self.make.from_source(source)
        assert isinstance(loader, WeightLoader)
        return loader

    def load(self, source: str) -> GPT:
        """The model that the loader makes of a source."""
        return build_model(self.loader(source).load(), "cpu", torch.float32)

    def plugin(self) -> Any:
        """A loader to test; `make` is the class."""
        with tempfile.TemporaryDirectory() as folder:
            return self.loader(self.write(Path(folder), self.config, self.weights()))

    def weights(self) -> dict[str, Tensor]:
        """The tensors of a random model, by name, rounded to the format's precision."""
        model = tiny_gpt(self.config, seed=1)
        return {name: one.to(self.precision).float() for name, one in _state(model).items()}

    @promise
    def test_every_tensor_arrives(self, tmp_path: Path) -> None:
        """The model has each tensor of the file, bit for bit, and gives the same logits."""
        want = self.weights()
        model = tiny_gpt(self.config)
        model.load_state_dict(want, strict=False)
        loaded = self.load(self.write(tmp_path, self.config, dict(want)))
        _check_same(loaded, model, "the file")

    @promise
    def test_a_missing_tensor_is_an_error(self, tmp_path: Path) -> None:
        """A tensor that the file lacks raises SourceError; it is never made up."""
        last = self.config.n_layers - 1
        for number, name in enumerate((f"blocks.{last}.mlp.down.weight", "norm.weight")):
            state = self.weights()
            del state[name]
            folder = tmp_path / str(number)
            folder.mkdir()
            self._refuses(self.write(folder, self.config, state), f"without {name}")

    @promise
    def test_a_tensor_too_many_is_an_error(self, tmp_path: Path) -> None:
        """A tensor that nothing uses raises SourceError: the file is not what it seems to be."""
        state = self.weights() | {"surplus.weight": torch.ones(3)}
        self._refuses(self.write(tmp_path, self.config, state), "with a tensor surplus.weight")

    @promise
    def test_a_file_cut_short_is_an_error(self, tmp_path: Path) -> None:
        """A file that lacks its end raises SourceError."""
        source = self.write(tmp_path, self.config, self.weights())
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
        self._refuses(source, f"with half of {largest.name}")

    @promise
    def test_what_is_not_its_own_is_left_to_others(self, tmp_path: Path) -> None:
        """`matches` says no, and raises nothing, for paths and files of other kinds."""
        (tmp_path / "empty").touch()
        (tmp_path / "text.txt").write_text("no model")
        (tmp_path / "folder").mkdir()
        for other in ("", "no/such/file", *map(str, tmp_path.iterdir())):
            check(not self.make.matches(other), f"it matches {Path(other).name!r}")

    def _refuses(self, source: str, what: str) -> None:
        try:
            self.load(source)
        except GptkError as error:
            check("\n" not in str(error), f"{what}: the error has several lines")
        else:
            raise AssertionError(f"{what} it loads all the same")


class WriterContract(PluginContract):
    """What a weight writer promises."""

    config: ClassVar[GPTConfig] = SMALL
    """A model that the format can hold."""
    with_text: ClassVar[bool] = False
    """Whether to write a tokenizer, too: the 256 bytes."""

    @promise
    def test_what_it_writes_is_read_back(self, tmp_path: Path) -> None:
        """The loader that matches the directory makes the same model and tokenizer of it."""
        model, same = (tiny_gpt(self.config, seed=1) for _ in range(2))
        tokenizer = load_tokenizer("bytes") if self.with_text else None
        self.plugin().write(tmp_path, model, tokenizer)
        _check_same(model, same, "before it was written")
        checkpoint = load_checkpoint(str(tmp_path))
        _check_same(build_model(checkpoint, "cpu", torch.float32), same, "the model")
        if tokenizer is None:
            return
        check(checkpoint.tokenizer is not None, "the tokenizer is lost")
        assert checkpoint.tokenizer is not None
        again = checkpoint.tokenizer()
        for text in ("", "abc", "naïve 한국어\n\0", "a<|endoftext|>b"):
            check(again.encode(text) == tokenizer.encode(text), f"{text!r} has other ids")
        check(again.eos == tokenizer.eos, f"EOS is {again.eos}, and was {tokenizer.eos}")


class TokenizerContract(PluginContract):
    """What a tokenizer promises."""

    alphabet: ClassVar[st.SearchStrategy[str]] = st.characters(exclude_categories=["Cs"])
    """The characters that it can hold."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer to test."""
        tokenizer = self.plugin().load()
        check(isinstance(tokenizer, Tokenizer), f"load() gives {tokenizer!r:.40}")
        assert isinstance(tokenizer, Tokenizer)
        return tokenizer

    @promise
    def test_a_text_is_decoded_to_itself(self) -> None:
        """decode(encode(text)) is the text, and the tokens' bytes joined are its bytes."""
        tokenizer = self.tokenizer
        start = [] if not tokenizer.add_bos or tokenizer.bos is None else [tokenizer.bos]
        beginning = tokenizer.decode(start)

        @examples(100)
        @given(st.text(self.alphabet, max_size=30))
        def holds(text: str) -> None:
            ids = tokenizer.encode(text)
            check(ids[: len(start)] == start, f"{text!r} does not begin with BOS")
            if beginning and text.startswith(beginning):  # its own BOS is not put before again
                return
            rest = ids[len(start) :]
            form = tokenizer.normalization
            text = text if form is None else unicodedata.normalize(form, text)
            got = tokenizer.decode(rest)
            check(got == text, f"{text!r} comes back as {got!r}")
            joined = b"".join(map(tokenizer.token_bytes, rest))
            check(joined == text.encode(), f"{text!r} has the bytes {joined!r}")

        holds()

    @promise
    def test_ids_are_those_of_the_vocabulary(self) -> None:
        """Token ids are whole numbers below the size of the vocabulary, the same each time."""
        tokenizer, again = self.tokenizer, self.tokenizer
        size = tokenizer.encoding.max_token_value + 1

        @examples(50)
        @given(st.text(self.alphabet, max_size=30))
        def holds(text: str) -> None:
            ids = tokenizer.encode(text)
            check(all(0 <= one < size for one in ids), f"{text!r} has the ids {ids}")
            check(again.encode(text) == ids, f"{text!r} has other ids the second time")

        holds()
        for token in (*tokenizer.eos, *([] if tokenizer.bos is None else [tokenizer.bos])):
            check(0 <= token < size, f"BOS or EOS is {token}, and the vocabulary has {size}")

    @promise
    def test_special_tokens_are_one_token_each(self) -> None:
        """A special token written in a text counts as such."""
        tokenizer = self.tokenizer
        for text, token in tokenizer.encoding._special_tokens.items():
            check(tokenizer.encode(text)[-1:] == [token], f"{text} has other ids than {token}")


def _check_same(got: GPT, want: GPT, whose: str) -> None:
    """Raises AssertionError unless two models have equal tensors and logits."""
    ours, theirs = _state(got), _state(want)
    check(ours.keys() == theirs.keys(), f"it has {sorted(ours)}, and {whose} {sorted(theirs)}")
    for name, tensor in theirs.items():
        check(torch.equal(ours[name], tensor), f"{name} has other values than {whose}")
    ids = torch.arange(12)[None] % want.config.vocab_size
    with torch.inference_mode():
        one, other = (model.logits(model(ids)) for model in (got, want))
    check(
        torch.allclose(one, other, rtol=1e-4, atol=1e-5),
        f"logits are up to {(one - other).abs().max():.3g} apart: the configuration is another",
    )


def _state(model: GPT) -> dict[str, Tensor]:
    """The model's tensors; a tied head is not among them."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
