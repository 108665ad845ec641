"""Which settings may change when a run goes on: those that cannot are refused, others honoured."""

import json

import pytest

import gptk
from gptk.runs.directory import CONFIG
from gptk.training.config import DATA, FIXED, TrainConfig
from gptk.training.trainer import Trainer
from toys import byte_tokenizer
from training_runs import config

# For each setting another value than that of the run.
OTHERS = {
    "model": "smollm2",
    "architecture": "gpt2",
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 1,
    "width": 64,
    "mlp_width": 64,
    "qkv_bias": True,
    "tied_head": False,
    "context_length": 8,
    "tokenizer": "gpt2",
    "train_ratio": 0.5,
    "stride": 3,
    "shuffle": False,
    "seed": 7,
    "batch_size": 6,
    "accumulate": 2,
    "drop_last": False,
    "steps": 9,
    "epochs": 0.5,
    "lr": 0.5,
    "betas": [0.5, 0.75],
    "eps": 0.25,
    "scheduler": "linear:warmup=2,floor=0.5",
    "regularizers": ["weight-decay:strength=0.75", "dropout:p=0.25", "ema:decay=0.5"],
    "on_nan": "skip",
    "device": "auto",
    "dtype": "bfloat16",
    "compile": True,
    "activation_checkpointing": True,
    "eval_every": 3,
    "eval_batches": 1,
    "patience": 9,
    "sample_prompt": "Q",
    "sample_sampler": "greedy",
    "sample_tokens": 2,
    "save_every": 4,
    "keep": 5,
    "log_every": 3,
    "observers": [],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    (folder / "text.txt").write_text("abcdefgh" * 400)
    (folder / "validation.txt").write_text("hgfedcba" * 40)
    data = {"data": [str(folder / "text.txt")], "validation_data": [str(folder / "validation.txt")]}
    Trainer.start(config(steps=2, **data), folder / "run").train()
    return folder / "run"


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value)


def test_each_setting_is_known_to_be_fixed_or_free():
    assert OTHERS.keys() | {*DATA} == TrainConfig.model_fields.keys()
    assert {*FIXED} <= OTHERS.keys()


@pytest.mark.parametrize("where", ["command", "file"])
@pytest.mark.parametrize("name", FIXED)
def test_a_setting_that_cannot_change_is_refused_with_both_values(name, where, run):
    before = (run / CONFIG).read_text()
    then = json.dumps(getattr(TrainConfig(**Trainer.resume(run).config.model_dump()), name))
    now = json.dumps(OTHERS[name])
    assert now != then
    changes = [f"{name}={as_text(OTHERS[name])}"]
    try:
        if where == "file":
            lines = [line for line in before.splitlines() if not line.startswith(f"{name} =")]
            (run / CONFIG).write_text("\n".join([*lines, f"{name} = {now}"]))
            changes = []
        with pytest.raises(gptk.OptionError) as caught:
            Trainer.resume(run, changes)
    finally:
        (run / CONFIG).write_text(before)
    assert f"{name}={now} cannot change" in str(caught.value)
    assert f"step-00000002 was trained with {name}={then}" in str(caught.value)


def test_the_other_settings_may_change_and_count(run):
    free = {name: value for name, value in OTHERS.items() if name not in {*FIXED, "epochs"}}
    free.pop("compile")  # takes half a minute
    trainer = Trainer.resume(run, [f"{name}={as_text(value)}" for name, value in free.items()])
    for name, value in free.items():
        got = getattr(trainer.config, name)
        assert (list(got) if isinstance(got, tuple) else got) == value, name
    group, *_ = trainer.optimizer.param_groups
    assert (group["betas"], group["eps"]) == ((0.5, 0.75), 0.25)
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {0.75, 0}
    assert trainer.scheduler.spec == "linear:warmup=2,floor=0.5"
    assert trainer.model.blocks[0].attn.dropout == 0.25
    assert (trainer.total_steps, trainer.step_windows) == (9, 12)
    record = trainer.step()
    assert record["lr"] == pytest.approx(0.5)  # the third of nine steps, the first after warmup
    assert record["tokens"] == 2 * 4 * 16 + 12 * 16
    assert trainer._state.averaged() is not None
    trainer.close()
    resumed = Trainer.resume(run, ["epochs=2"])
    assert resumed.total_steps == 2 * resumed.steps_per_epoch


def test_a_run_is_resumed_with_its_texts_at_another_place(run, tmp_path):
    copies = [tmp_path / name for name in ("text.txt", "validation.txt")]
    for copy in copies:
        copy.write_bytes((run.parent / copy.name).read_bytes())
    changes = [f"{name}={copy}" for name, copy in zip(DATA, copies, strict=True)]
    trainer = Trainer.resume(run, changes, warn=pytest.fail)
    assert trainer.config.data == [str(copies[0])]


@pytest.mark.parametrize("name", DATA)
def test_a_run_is_not_resumed_with_other_texts(name, run, tmp_path):
    (tmp_path / "other.txt").write_text("12345678" * 400)
    with pytest.raises(gptk.OptionError, match=rf'{name}=\["\S+other.txt"\] cannot change'):
        Trainer.resume(run, [f"{name}={tmp_path}/other.txt"])


def test_settings_of_the_checkpoint_count_even_if_the_file_has_been_edited_twice(run, tmp_path):
    """config.toml and the change agree with each other, and not with the weights."""
    text = (run / CONFIG).read_text()
    try:
        (run / CONFIG).write_text(text.replace("width = 32", "width = 64"))
        with pytest.raises(gptk.OptionError, match="width=64 cannot change"):
            Trainer.resume(run, ["width=64"])
        assert Trainer.resume(run, ["width=32"]).model.config.width == 32
    finally:
        (run / CONFIG).write_text(text)


def test_a_token_file_that_was_overwritten_is_made_anew_before_a_run_goes_on(tmp_path, monkeypatch):
    """With ids that are valid, and as many."""
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("abcdefgh" * 400)
    trainer = Trainer.start(config(steps=2, data=[str(tmp_path / "text.txt")]), tmp_path / "run")
    trainer.train()
    (tokens,) = (tmp_path / "cache/tokens").glob("*.tokens")
    before = tokens.read_bytes()
    tokens.write_bytes(before[2:] + before[:2])
    resumed = Trainer.resume(tmp_path / "run", ["steps=3"], warn=pytest.fail)
    want = byte_tokenizer().encode("abcdefgh" * 400)
    assert resumed.train_windows.tokens.tolist() == want[: len(resumed.train_windows.tokens)]


@pytest.mark.parametrize(
    "text",
    [
        "lr = = 3",
        "x" * 100,
        "lr = 'fast'",
        "lr = [[[[" * 1000,
        "lr = " + "[" * 100_000,
        "lr = " + "9" * 5000,
        "lr = nan",
        "lr = 1e999",
        "steps = 10.5",
        "data = 3",
        "betas = [[1]]",
        "width = 2038-01-01",
        "lr = 1\nlearning_rate = 2",
        "[model]\nname = 'x'",
        "\0",
        "\ufeff",
    ],
)
def test_a_config_of_wrong_types_is_told_in_a_line(text, run):
    before = (run / CONFIG).read_text()
    try:
        (run / CONFIG).write_text(text)
        with pytest.raises(gptk.GptkError) as caught:
            Trainer.resume(run)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400
    finally:
        (run / CONFIG).write_text(before)
