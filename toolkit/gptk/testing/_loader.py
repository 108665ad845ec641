"""The contract of weight loaders."""

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import gptk
from gptk.testing._plugin import PluginContract
from gptk.testing._promises import check, promise
from gptk.testing._weights import SMALL, check_same, state_of
from gptk.testing.models import tiny_gpt


class LoaderContract(PluginContract):
    """What a weight loader promises."""

    _base: ClassVar[type] = gptk.WeightLoader
    config: ClassVar[gptk.GPTConfig] = SMALL
    """A model that the format can hold."""
    precision: ClassVar[torch.dtype] = torch.float32
    """The type of the format's numbers."""

    def write(self, folder: Path, config: gptk.GPTConfig, state: dict[str, Tensor]) -> str:
        """Write a model in the loader's format; returns its source. To be overridden.

        state: tensors by the names of `gptk.GPT`'s parameters. In some tests one is missing, or
        there is an unknown one: names that are not known are to be written as they are.
        """
        raise NotImplementedError("a LoaderContract defines write(folder, config, state)")

    def loader(self, source: str) -> gptk.WeightLoader:
        """The loader for a source."""
        loader = self.make.from_source(source)
        assert isinstance(loader, gptk.WeightLoader)
        return loader

    def load(self, source: str) -> gptk.GPT:
        """The model that the loader makes of a source."""
        return gptk.build_model(self.loader(source).load(), "cpu", torch.float32)

    def plugin(self) -> Any:
        """A loader to test; `make` is the class."""
        with tempfile.TemporaryDirectory() as folder:
            return self.loader(self.write(Path(folder), self.config, self.weights()))

    def weights(self) -> dict[str, Tensor]:
        """The tensors of a random model, by name, rounded to the format's precision."""
        state = state_of(tiny_gpt(self.config, seed=1))
        return {name: tensor.to(self.precision).float() for name, tensor in state.items()}

    @promise
    def test_every_tensor_arrives(self, tmp_path: Path) -> None:
        """The model has each tensor of the file, bit for bit, and gives the same logits."""
        want = self.weights()
        model = tiny_gpt(self.config)
        model.load_state_dict(want, strict=False)
        loaded = self.load(self.write(tmp_path, self.config, dict(want)))
        check_same(loaded, model, "the file")

    @promise
    def test_one_instance_serves_several_calls(self, tmp_path: Path) -> None:
        """A loader loads the same each time, also after another of its class has loaded."""
        states = [self.weights(), {name: tensor + 1 for name, tensor in self.weights().items()}]
        models, loaders = [], []
        for number, state in enumerate(states):
            models.append(tiny_gpt(self.config))
            rounded = {name: tensor.to(self.precision).float() for name, tensor in state.items()}
            models[-1].load_state_dict(rounded, strict=False)
            folder = tmp_path / str(number)
            folder.mkdir()
            loaders.append(self.loader(self.write(folder, self.config, rounded)))
        for _ in range(2):
            for loader, model in zip(loaders, models, strict=True):
                loaded = gptk.build_model(loader.load(), "cpu", torch.float32)
                check_same(loaded, model, "the file, in one of several calls,")

    @promise
    def test_a_missing_tensor_is_an_error(self, tmp_path: Path) -> None:
        """A tensor that the file lacks raises SourceError; the loader never makes it up."""
        first, last = "blocks.0.", f"blocks.{self.config.n_layers - 1}."
        names = (f"{last}mlp.down.weight", "norm.weight", "embed.weight", f"{first}attn.qkv.weight")
        for number, name in enumerate(names):
            state = self.weights()
            del state[name]
            folder = tmp_path / str(number)
            folder.mkdir()
            self._refuses(self.write(folder, self.config, state), f"without {name}")

    @promise
    def test_a_tensor_too_many_is_an_error(self, tmp_path: Path) -> None:
        """A tensor that nothing uses raises SourceError: the file holds another kind of model."""
        state = self.weights() | {"surplus.weight": torch.ones(3)}
        self._refuses(self.write(tmp_path, self.config, state), "with a tensor surplus.weight")

    @promise
    def test_a_file_cut_short_is_an_error(self, tmp_path: Path) -> None:
        """A file without its end, its second half, or all but its beginning raises SourceError."""
        source = self.write(tmp_path, self.config, self.weights())
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        whole = largest.read_bytes()
        for length in (len(whole) - 1, len(whole) // 2, 100, 7, 0):
            largest.write_bytes(whole[:length])
            self._refuses(source, f"with {length} of the {len(whole)} bytes of {largest.name}")

    @promise
    def test_what_is_not_its_own_is_left_to_others(self, tmp_path: Path) -> None:
        """`matches` returns False, and raises nothing, for paths and files of other formats."""
        (tmp_path / "empty").touch()
        (tmp_path / "text.txt").write_text("no model")
        (tmp_path / "bytes.bin").write_bytes(bytes(range(256)) * 4)
        (tmp_path / "folder").mkdir()
        others = ["", "no/such/file", "~", "a:b=c", "\0", "x" * 5000, *map(str, tmp_path.iterdir())]
        for other in others:
            check(not self.make.matches(other), f"it matches {Path(other).name[:20]!r}")

    def _refuses(self, source: str, what: str) -> None:
        try:
            self.load(source)
        except gptk.GptkError as error:
            check("\n" not in str(error), f"{what}: the error has several lines")
        else:
            raise AssertionError(f"{what} it loads without an error")
