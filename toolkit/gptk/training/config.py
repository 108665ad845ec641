"""The settings of a training run, declared once for `gptk train`, its files and Python."""

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import Field, PositiveInt

from gptk.errors import OptionError
from gptk.model.config import GPTConfig
from gptk.options import Options, from_text, option_help
from gptk.system.metadata import read_text
from gptk.training.names import by_gptk_names, canonical


class TrainConfig(Options):
    """The settings of a training run. By default a small byte-level model learns English.

    A setting may be given by its name in other trainers, such as `learning_rate` or `block_size`:
    see `gptk.training.names`.
    """

    # Model
    model: str | None = Field(
        None, description="weights to begin with, any model gptk can load; without, a new model"
    )
    architecture: Literal["gpt2", "llama"] = Field(
        "llama", description="of a new model; llama: rotary positions, RMS norm, SwiGLU, no biases"
    )
    n_layers: PositiveInt = Field(4, description="blocks of a new model")
    n_heads: PositiveInt = Field(4, description="attention heads of a new model")
    n_kv_heads: PositiveInt | None = Field(
        None, description="heads for keys and values; without, as many as n_heads"
    )
    width: PositiveInt = Field(128, description="of a new model's hidden states")
    mlp_width: PositiveInt | None = Field(
        None,
        description="hidden units of a block's MLP; without, 4 times width, or for llama 8/3 of "
        "width, rounded up to a multiple of 64",
    )
    qkv_bias: bool | None = Field(
        None,
        description="biases on queries, keys and values; without, gpt2 has them, llama has none",
    )
    tied_head: bool = Field(True, description="the output head is the token embedding")
    context_length: PositiveInt | None = Field(
        None,
        description="tokens a window; without, 64 for a new model, else the model's own",
    )

    # Data
    data: list[str] = Field(
        ["builtin:python-docs"],
        min_length=1,
        description="text files, folders, or builtin:python-docs",
    )
    validation_data: list[str] = Field(
        [], description="texts to validate on; without, the end of the data"
    )
    train_ratio: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="share of the tokens to train on; the rest validates, unless there is "
        "validation_data",
    )
    tokenizer: str | None = Field(
        None, description="without, that of the model, or bytes for a new one"
    )
    stride: PositiveInt | None = Field(
        None,
        description="tokens from one training window to the next; without, context_length",
    )
    batch_size: PositiveInt = Field(12, description="windows a batch, in each process")
    accumulate: PositiveInt = Field(1, description="batches whose gradients make one step")
    shuffle: bool = Field(True, description="take the windows of each epoch in a random order")
    drop_last: bool = Field(True, description="leave out an epoch's last step if it is not full")

    # Optimization
    steps: PositiveInt = Field(800, description="optimizer steps in all")
    epochs: float | None = Field(None, gt=0, description="instead of steps: passes over the data")
    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.99), description="AdamW's decay rates")
    eps: float = Field(1e-8, ge=0, description="AdamW's epsilon")
    scheduler: str = Field(
        "warmup-cosine:warmup=100,floor=0.1", description="an LR scheduler's spec"
    )
    regularizers: list[str] = Field(
        ["weight-decay:strength=0.1", "grad-clip:max_norm=1.0"],
        description="regularizers' specs, applied in order",
    )
    seed: int = Field(
        0, ge=0, description="of the initial weights, the order of the data, and dropout"
    )
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="what to do when loss or gradient is not finite"
    )

    # Hardware
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of matrix products (autocast); auto: bfloat16 where the hardware has it",
    )
    compile: bool = Field(False, description="compile the model with torch.compile")
    activation_checkpointing: bool = Field(
        False,
        description="keep only the input of each block, and compute the rest again in the "
        "backward pass: less memory, a third more work",
    )

    # Evaluation
    eval_every: PositiveInt = Field(200, description="steps from one evaluation to the next")
    eval_batches: PositiveInt = Field(
        64,
        description="batches of training and of validation data, always the same ones, "
        "in each process",
    )
    patience: PositiveInt | None = Field(
        None, description="stop after this many evaluations without a better validation loss"
    )
    sample_prompt: str = Field(
        "The ", description="what the text sampled at each evaluation begins with"
    )
    sample_sampler: str = Field("top-k:k=40,temperature=0.8", description="a sampler's spec")
    sample_tokens: int = Field(100, ge=0, description="tokens of a sample; 0 for none")

    # Run
    save_every: PositiveInt | None = Field(
        None, description="steps from one checkpoint to the next; without, eval_every"
    )
    keep: PositiveInt = Field(2, description="how many last checkpoints to keep, besides the best")
    log_every: PositiveInt = Field(10, description="steps from one line of metrics to the next")
    observers: list[str] = Field([], description="training observers' specs, such as tensorboard")

    def __init__(self, **settings: Any) -> None:
        super().__init__(**by_gptk_names(settings, type(self).model_fields, self.title()))

    @classmethod
    def title(cls) -> str:
        return "the training configuration"

    def model_post_init(self, _context: Any) -> None:
        for name, value in self:
            _check_writable(name, value)
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise OptionError("give steps or epochs, not both")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise OptionError(f"betas={list(self.betas)} is not allowed; each is from 0 to below 1")

    def new_model_config(self, vocab_size: int) -> GPTConfig:
        """The configuration of a new model. Raises OptionError for sizes that do not fit."""
        if self.width % self.n_heads:
            raise OptionError(
                f"width={self.width} does not divide into n_heads={self.n_heads} heads; change one"
            )
        n_kv_heads = self.n_kv_heads or self.n_heads
        if self.n_heads % n_kv_heads:
            raise OptionError(f"n_kv_heads={n_kv_heads} does not divide n_heads={self.n_heads}")
        head_dim = self.width // self.n_heads
        sizes: dict[str, Any] = {
            "vocab_size": vocab_size,
            "context_length": self.context_length or 64,
            "width": self.width,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": n_kv_heads,
            "head_dim": head_dim,
            "tied_head": self.tied_head,
        }
        if self.architecture == "gpt2":
            return GPTConfig(
                **sizes,
                mlp_width=self.mlp_width or 4 * self.width,
                qkv_bias=self.qkv_bias is not False,
            )
        if head_dim % 2:
            raise OptionError(f"rotary positions need heads of an even size, not {head_dim}")
        return GPTConfig(
            **sizes,
            mlp_width=self.mlp_width or -(-8 * self.width // (3 * 64)) * 64,
            norm="rms",
            positions="rotary",
            mlp="swiglu",
            mlp_bias=False,
            qkv_bias=bool(self.qkv_bias),
            out_bias=False,
        )

    def to_toml(self, *, comments: bool = False) -> str:
        """The settings as TOML. comments: say what each setting is and what it allows."""
        lines: list[str] = []
        for name, allowed, _, description in option_help(type(self)):
            if comments and name in HEADINGS:
                lines += [*([""] if lines else []), f"# --- {HEADINGS[name]}", ""]
            value = getattr(self, name)
            if name == "steps" and self.epochs is not None:
                value = None
            if comments:
                fixed = "; cannot change on --resume" if name in FIXED else ""
                lines.append(f"# {description} ({allowed}{fixed})")
            if value is not None:
                lines.append(f"{name} = {_toml(value)}")
            elif comments:
                lines.append(f"# {name} =")
        return "\n".join(lines) + "\n"


HEADINGS = {
    "model": "Model",
    "data": "Data",
    "steps": "Optimization",
    "device": "Hardware",
    "eval_every": "Evaluation",
    "save_every": "Run",
}
"""The heading of each group of settings, by its first setting."""

FIXED = (
    *("model", "architecture", "n_layers", "n_heads", "n_kv_heads", "width", "mlp_width"),
    *("qkv_bias", "tied_head", "context_length", "tokenizer"),
    # A run remembers how many windows of the epoch it has taken; these decide which they were.
    *("train_ratio", "stride", "shuffle", "seed"),
)
"""Settings that a resumed run cannot change: they decide what the weights and the data are."""

DATA = ("data", "validation_data")
"""Settings that a resumed run can change only if the texts are the same, at another place."""


def _check_writable(name: str, value: object) -> None:
    """Raise OptionError for what config.toml cannot hold."""
    if isinstance(value, int) and value >= 2**63:
        raise OptionError(f"{name} is too large; it must be below 2**63")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise OptionError(
                    f"{name}={text} is not UTF-8 text, or not text in this locale; with "
                    "PYTHONUTF8=1 in the environment any locale will do"
                ) from None


def _toml(value: object) -> str:
    # JSON's values are TOML's, but for the character that TOML wants to have escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_config(path: Path | None, changes: Iterable[str] = ()) -> TrainConfig:
    """The settings in a TOML file with `key=value` changes on top.

    A list is given as JSON, or by its key repeated, once for each entry; `null` removes a
    setting's value. Raises OptionError for a file or a change that cannot be read, unknown keys
    and values that are not allowed.
    """
    values = {} if path is None else _read_toml(path)
    changed = _parse_changes(changes)
    if "epochs" in changed and "steps" not in changed:  # it replaces the file's steps
        values.pop("steps", None)
    if "steps" in changed and "epochs" not in changed:
        values.pop("epochs", None)
    return TrainConfig(**(values | changed))


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise OptionError(f"no such configuration file: {path}")
    text = read_text(path, OptionError)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} cannot be read as TOML: {error}") from None
    return by_gptk_names(values, TrainConfig.model_fields, str(path))


def _parse_changes(changes: Iterable[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise OptionError(f"cannot read {change!r}; expected key=value, such as lr=3e-4")
        name, value = canonical(key), from_text(text)
        if _is_list(name):
            items = value if isinstance(value, list) else [] if value is None else [value]
            values[name] = [*values.get(name, []), *items]
        elif name in values:
            raise OptionError(f"{name} is given twice, as {given[name]} and as {change}")
        else:
            values[name], given[name] = value, change
    return by_gptk_names(values, TrainConfig.model_fields, TrainConfig.title())


def _is_list(key: str) -> bool:
    field = TrainConfig.model_fields.get(key)
    annotation = field.annotation if field else None
    if isinstance(annotation, UnionType):
        return any(get_origin(option) is list for option in get_args(annotation))
    return get_origin(annotation) is list
