"""Settings by the names that other trainers give them, and their values as files hold them."""

import json
import tomllib

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

import gptk
from gptk.hooks.training import Regularizer
from gptk.plugins import create
from gptk.training.config import HEADINGS, TrainConfig, read_config
from gptk.training.names import ALIASES, ELSEWHERE, canonical
from training_runs import value_of

NAMES = [(name, alias) for name, aliases in ALIASES.items() for alias in aliases]


@pytest.mark.parametrize(("name", "alias"), NAMES)
def test_a_setting_may_have_the_name_of_another_trainer(name, alias):
    value = value_of(name)
    want = TrainConfig(**{name: value})
    assert getattr(want, name) != TrainConfig.model_fields[name].default
    assert TrainConfig(**{alias: value}) == want
    text = value if isinstance(value, str) else json.dumps(value)
    for key in (alias, alias.replace("_", "-")):
        assert read_config(None, [f"{key}={text}"]) == want
    assert f"\n{name} =" in want.to_toml(comments=True)
    with pytest.raises(gptk.OptionError, match=f"{name} is given twice, as {name}"):
        TrainConfig(**{name: value, alias: value})


def test_a_name_means_one_setting():
    aliases = [alias for _, alias in NAMES]
    assert len(set(aliases)) == len(aliases)
    assert ALIASES.keys() <= TrainConfig.model_fields.keys()
    assert not {*aliases, *ELSEWHERE} & TrainConfig.model_fields.keys()
    assert not {*aliases} & ELSEWHERE.keys()
    assert HEADINGS.keys() <= TrainConfig.model_fields.keys()


HUGGING_FACE = """
    learning_rate per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps
    warmup_steps weight_decay max_grad_norm adam_beta1 adam_beta2 adam_epsilon lr_scheduler_type
    eval_steps save_steps save_total_limit logging_steps seed bf16 fp16 output_dir optim
    dataloader_drop_last gradient_checkpointing torch_compile resume_from_checkpoint report_to
    label_smoothing_factor
"""
NANOGPT = """
    eval_interval log_interval eval_iters init_from dataset gradient_accumulation_steps batch_size
    block_size n_layer n_head n_embd dropout learning_rate max_iters weight_decay beta1 beta2
    grad_clip warmup_iters lr_decay_iters min_lr device dtype compile out_dir
"""
THE_BOOKS = """
    vocab_size context_length emb_dim n_heads n_layers drop_rate qkv_bias learning_rate num_epochs
    batch_size weight_decay eval_freq eval_iter start_context max_length stride shuffle drop_last
    train_ratio warmup_steps min_lr peak_lr n_kv_groups hidden_dim
"""


@pytest.mark.parametrize("name", [*HUGGING_FACE.split(), *NANOGPT.split(), *THE_BOOKS.split()])
def test_the_names_of_other_trainers_work_or_are_answered(name):
    if canonical(name) in TrainConfig.model_fields:
        return
    with pytest.raises(gptk.OptionError) as caught:
        TrainConfig(**{name: 0.25})
    assert ELSEWHERE[name].replace("{value}", "0.25") in str(caught.value)


@pytest.mark.parametrize("name", HUGGING_FACE.split())
def test_hugging_faces_names_are_its_own(name):
    assert name in transformers.TrainingArguments.__dataclass_fields__


@pytest.mark.parametrize("name", [n for n in ELSEWHERE if "write " in ELSEWHERE[n]])
def test_what_an_answer_says_to_write_can_be_written(name):
    words = ELSEWHERE[name].replace("{value}", "0.25" if "warmup" not in name else "25")
    written = next(word.strip(",;") for word in words.split() if "=" in word)
    setting, _, value = written.partition("=")
    value = value.removeprefix('["').removesuffix('"')
    if setting == "regularizers":
        assert create("regularizer", value, Regularizer)
    else:
        assert read_config(None, [f"{setting}={value}"]) != TrainConfig()


@pytest.mark.parametrize("name", ["data", "validation_data", "regularizers", "observers"])
def test_null_is_an_empty_list(name):
    if name == "data":
        with pytest.raises(gptk.OptionError, match=r"data=\[\] is not allowed"):
            read_config(None, ["data=null"])
    else:
        assert getattr(read_config(None, [f"{name}=null"]), name) == []


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("batchsize", "batch_size"),
        ("learnign_rate", "lr"),
        ("nlayer", "n_layers"),
        ("max_step", "steps"),
        ("warmup_step", "warmup_steps"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(wrong, right):
    with pytest.raises(gptk.OptionError, match=rf"no option '{wrong}'; did you mean .*\b{right}\b"):
        TrainConfig(**{wrong: 1})


def test_a_file_may_have_other_names_and_not_two_for_one(tmp_path):
    (tmp_path / "c.toml").write_text("learning_rate = 0.5\nblock_size = 32\nmax_iters = 7\n")
    config = read_config(tmp_path / "c.toml", ["lr=0.25"])
    assert (config.lr, config.context_length, config.steps) == (0.25, 32, 7)
    (tmp_path / "c.toml").write_text("learning_rate = 0.5\nmax_lr = 0.5\n")
    with pytest.raises(gptk.OptionError, match="lr is given twice, as learning_rate and as max_lr"):
        read_config(tmp_path / "c.toml")
    assert read_config(None, ["num_train_epochs=2"]).epochs == 2
    with pytest.raises(gptk.OptionError, match="give steps or epochs, not both"):
        read_config(None, ["num_train_epochs=2", "max_steps=3"])


@pytest.mark.parametrize("changes", [["lr=1", "lr=1"], ["lr=1", "learning-rate=2"]])
def test_a_change_given_twice_is_refused(changes):
    with pytest.raises(gptk.OptionError, match="lr is given twice, as lr=1 and as "):
        read_config(None, changes)


# Text that a command line can hold: no lone surrogates, which are refused, and no null.
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(words, st.lists(words, min_size=1, max_size=3), st.floats(1e-300, 1e300))
def test_a_configuration_comes_back_from_its_file(prompt, data, lr):
    config = TrainConfig(sample_prompt=prompt, data=data, lr=lr, betas=(0.1, 0.2))
    for comments in (False, True):
        assert TrainConfig(**tomllib.loads(config.to_toml(comments=comments))) == config


@pytest.mark.parametrize(
    "settings",
    [
        {"sample_prompt": "\udcff"},
        {"data": ["a", "\ud800.txt"]},
        {"steps": 10**100},
        {"seed": 2**63},
        {"width": 2**64},
    ],
)
def test_what_a_file_cannot_hold_is_refused(settings):
    with pytest.raises(gptk.OptionError) as caught:
        TrainConfig(**settings)
    assert str(caught.value).isprintable()
