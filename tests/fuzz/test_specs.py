"""Spec strings, options in Python and training configurations: wrong ones are refused in a line."""

import json
import random
from pathlib import Path
from typing import Any

from attacking import mutated_json, mutated_text

import gptk
from gptk.plugins import KINDS, create, parse_spec, provided, short_form
from gptk.testing import tiny_lm
from gptk.training.config import TrainConfig, read_config

KINDS_OF_CLASSES = [kind for kind in KINDS if kind != "command"]


LM = tiny_lm()


def warm_up() -> None:
    """Compile the kernels, which takes long where they are not cached."""
    LM.generate("a", sampler="multinomial", max_new_tokens=1)


def specs(kind: str) -> list[str]:
    """A valid spec of each plug-in, one in its short form, and one that gives every option."""
    found = []
    for plugin in provided(kind).values():
        item = plugin.item
        found.append(f"{plugin.name}:{item.example}" if item.example else plugin.name)
        found += filter(None, [short_form(item)])
        options = item.model_fields
        given = [f"{name}={options[name].default}" for name in options]
        found.append(f"{plugin.name}:{','.join(given)}")
    return found


def used(kind: str, plugin: Any) -> None:
    """Do something with a plug-in that shows whether its options can be used."""
    assert isinstance(plugin.spec, str)
    settings = {"max_new_tokens": 3, "seed": 0, "max_seconds": 5.0}
    match kind:
        case "sampler":
            LM.generate("ab ab", sampler=plugin, **settings)
        case "processor":
            LM.generate("ab ab", sampler="multinomial", processors=[plugin], **settings)
        case "scheduler":
            for step in (0, 1, 50, 99):
                assert 0 <= plugin(step, 100) <= 1


def test_specs(attack):
    def make(rng: random.Random) -> tuple[str, str]:
        kind = rng.choice(KINDS_OF_CLASSES)
        return kind, mutated_text(rng, rng.choice(specs(kind)))

    def run(attacked: tuple[str, str]) -> None:
        kind, spec = attacked
        parse_spec(spec)
        used(kind, create(kind, spec, KINDS[kind].base))

    warm_up()
    attack(make, run)


def test_options_in_python(attack):
    def make(rng: random.Random) -> tuple[str, str, Any]:
        kind = rng.choice(KINDS_OF_CLASSES)
        plugin = rng.choice(list(provided(kind).values()))
        fields = plugin.item.model_fields
        options = parse_spec(f"{plugin.name}:{plugin.item.example or 'x=1'}")[1]
        options = {name: options.get(name, fields[name].default) for name in fields}
        text = mutated_json(rng, json.loads(json.dumps(options, default=str)))
        try:
            return kind, plugin.name, json.loads(text)
        except (ValueError, RecursionError):
            return kind, plugin.name, {}

    def run(attacked: tuple[str, str, Any]) -> None:
        kind, name, options = attacked
        if isinstance(options, dict):
            used(kind, provided(kind)[name].item(**options))

    warm_up()
    attack(make, run)


def test_training_configurations(attack):
    def make(rng: random.Random) -> str:
        if rng.random() < 0.5:
            return mutated_text(rng, TrainConfig().to_toml(comments=True))
        options = json.loads(TrainConfig().model_dump_json())
        try:
            options = json.loads(mutated_json(rng, options))
        except (ValueError, RecursionError):
            options = {}
        options = options if isinstance(options, dict) else {"x": options}
        lines = [
            f"{json.dumps(key)} = {_toml(value)}"
            for key, value in options.items()
            if value is not None or rng.random() < 0.01  # TOML has no null
        ]
        return "\n".join(lines)

    def run(text: str) -> None:
        path = Path("config.toml")
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        config = read_config(path)
        create("scheduler", config.scheduler, gptk.LRScheduler)
        for spec in config.regularizers:
            create("regularizer", spec, gptk.Regularizer)

    attack(make, run)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return "{}" if value is None else json.dumps(value)
