"""The names that other trainers give to settings: those of Hugging Face's TrainingArguments and
model configurations, of nanoGPT, and of "Build a Large Language Model (From Scratch)".

A setting may be given by any name that means the same; files and messages use gptk's name. What
other trainers set apart and gptk does not is answered with what to write.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from gptk.errors import OptionError

ALIASES: Mapping[str, tuple[str, ...]] = {
    "model": ("model_name_or_path", "base_model"),
    "architecture": ("model_type", "arch"),
    "n_layers": ("n_layer", "num_layers", "num_hidden_layers", "depth"),
    "n_heads": ("n_head", "num_heads", "num_attention_heads"),
    "n_kv_heads": ("n_kv_head", "num_kv_heads", "num_key_value_heads", "n_kv_groups"),
    "width": ("n_embd", "d_model", "hidden_size", "emb_dim", "embed_dim", "dim"),
    "mlp_width": ("n_inner", "intermediate_size", "d_ff", "ffn_dim", "hidden_dim"),
    "qkv_bias": ("attention_bias",),
    "tied_head": ("tie_word_embeddings", "tie_embeddings", "weight_tying"),
    "context_length": (
        *("block_size", "seq_len", "seq_length", "sequence_len", "sequence_length"),
        *("max_seq_len", "max_seq_length", "max_length", "n_ctx", "ctx_len", "context_size"),
        *("n_positions", "max_position_embeddings"),
    ),
    "data": ("train_data", "train_file", "train_files", "dataset", "data_path"),
    "validation_data": ("val_data", "eval_data", "validation_file", "eval_file"),
    "train_ratio": ("train_split", "train_fraction"),
    "tokenizer": ("tokenizer_name", "tokenizer_name_or_path"),
    "batch_size": (
        *("per_device_train_batch_size", "train_batch_size", "micro_batch_size"),
        "device_batch_size",
    ),
    "accumulate": (
        *("gradient_accumulation_steps", "grad_accum_steps", "accumulation_steps"),
        "accumulate_grad_batches",
    ),
    "drop_last": ("dataloader_drop_last",),
    "steps": (
        *("max_steps", "num_steps", "n_steps", "total_steps", "train_steps", "num_train_steps"),
        *("max_iters", "num_iterations"),
    ),
    "epochs": ("num_epochs", "n_epochs", "max_epochs", "num_train_epochs"),
    "lr": ("learning_rate", "max_lr", "peak_lr"),
    "betas": ("adam_betas",),
    "eps": ("adam_epsilon", "adam_eps", "epsilon"),
    "scheduler": ("lr_scheduler", "lr_scheduler_type", "lr_schedule"),
    "regularizers": ("regularizer",),
    "seed": ("random_seed",),
    "dtype": ("precision", "torch_dtype"),
    "compile": ("torch_compile",),
    "activation_checkpointing": ("gradient_checkpointing",),
    "eval_every": ("eval_interval", "eval_steps", "eval_freq"),
    "eval_batches": ("eval_iters", "eval_iter"),
    "patience": ("early_stopping_patience",),
    "sample_prompt": ("prompt", "start_context"),
    "sample_sampler": ("sampler",),
    "sample_tokens": ("max_new_tokens",),
    "save_every": ("save_interval", "save_steps", "checkpoint_every"),
    "keep": ("save_total_limit",),
    "log_every": ("log_interval", "logging_steps"),
    "observers": ("observer", "report_to"),
}
"""Other names of each setting."""

_WARMUP = "write scheduler=warmup-cosine:warmup={value}, with the scheduler that you want"
_REGULARIZER = (
    'write regularizers=["{spec}", …] with all others that you want; without that, they are '
    "weight-decay:strength=0.1 and grad-clip:max_norm=1.0"
)
_DECAY, _CLIP, _DROPOUT, _SMOOTHING = (
    _REGULARIZER.replace("{spec}", spec)
    for spec in (
        "weight-decay:strength={value}",
        "grad-clip:max_norm={value}",
        "dropout:p={value}",
        "label-smoothing:strength={value}",
    )
)
_BETAS = "write both of AdamW's decay rates, betas=[0.9,0.95]"
_INIT = "for gpt2 write model=openai-community/gpt2, for resume --resume RUN, for scratch nothing"
_OUT = "name the run directory with --out, or in Python with run="

ELSEWHERE: Mapping[str, str] = {
    "warmup": _WARMUP,
    "warmup_steps": _WARMUP,
    "warmup_iters": _WARMUP,
    "num_warmup_steps": _WARMUP,
    "warmup_ratio": "write the number of steps, scheduler=warmup-cosine:warmup=100",
    "min_lr": "write it as a share of lr, scheduler=warmup-cosine:floor=0.1",
    "lr_decay_iters": "a schedule ends with the run; set steps",
    "weight_decay": _DECAY,
    "grad_clip": _CLIP,
    "max_grad_norm": _CLIP,
    "gradient_clip_val": _CLIP,
    "dropout": _DROPOUT,
    "drop_rate": _DROPOUT,
    "label_smoothing": _SMOOTHING,
    "label_smoothing_factor": _SMOOTHING,
    "beta1": _BETAS,
    "beta2": _BETAS,
    "adam_beta1": _BETAS,
    "adam_beta2": _BETAS,
    "optimizer": "gptk trains with AdamW",
    "optim": "gptk trains with AdamW",
    "bf16": "write dtype=bfloat16",
    "fp16": "write dtype=bfloat16",
    "vocab_size": "it follows from the tokenizer; set that",
    "out_dir": _OUT,
    "output_dir": _OUT,
    "init_from": _INIT,
    "resume_from_checkpoint": "go on with --resume RUN, or in Python with gptk.Trainer.resume",
}
"""What to write for settings that are options of plug-ins, or of the command."""

_NAMES = {alias: name for name, aliases in ALIASES.items() for alias in aliases}


def canonical(name: str) -> str:
    """gptk's name of a setting; a name that is unknown stays as it is."""
    return _NAMES.get(name, name)


def by_gptk_names(values: Mapping[str, Any], known: Iterable[str], title: str) -> dict[str, Any]:
    """The values by gptk's names. known: all of these. title: what has the settings.

    Raises OptionError for a name that is unknown, with the nearest ones, for a setting that is
    given under two names, and for one that gptk sets elsewhere.
    """
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    for key, value in values.items():
        name = canonical(key)
        if name not in known:
            raise OptionError(f"{title} has no option {key!r}; {_instead(key, value, known)}")
        if name in given:
            raise OptionError(f"{name} is given twice, as {given[name]} and as {key}")
        found[name], given[name] = value, key
    return found


def _instead(key: str, value: object, known: Iterable[str]) -> str:
    if key in ELSEWHERE:
        return ELSEWHERE[key].replace("{value}", str(value))
    near = difflib.get_close_matches(key, [*known, *_NAMES, *ELSEWHERE], n=3)
    hint = " or ".join(dict.fromkeys(canonical(name) for name in near))
    hint = f"did you mean {hint}? " if hint else ""
    return f"{hint}gptk train --help shows all settings"
