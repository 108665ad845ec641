"""Settings of other programs, in gptk's words.

transformers, vLLM, llama.cpp and OpenAI's API have flat lists of settings. Some of these are
settings of gptk under another name; others are options of a sampler or of a logits processor, which
say themselves how other programs call them (`Plugin.other_names`). The program does what
`translate_settings` returns, and Python answers with it.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptk.errors import OptionError, suggest
from gptk.hooks.base import Plugin
from gptk.plugins.registry import provided
from gptk.spec import format_spec, format_value

SETTINGS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_gen_toks": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "num_return_sequences": "n",
    "num_samples": "n",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "random_seed": "seed",
    "assistant_model": "draft",
    "draft_model": "draft",
    "speculative_model": "draft",
    "max_time": "max_seconds",
    "logits_processor": "processors",
    "logits_processors": "processors",
}
"""Other programs' name of a setting -> gptk's."""
ANSWERS = {
    "max_length": "max_new_tokens counts new tokens, without the prompt",
    "min_length": "the processor min-new-tokens counts new tokens, without the prompt",
    "max_model_len": "the window is the model's; max_new_tokens limits the new tokens",
    "streamer": "lm.stream(…) gives the text as it comes",
    "generation_config": "settings are given one by one: sampler, processors, max_new_tokens, …",
    "stopping_criteria": "stop takes functions; gptk.adapters.transformers adapts the criteria",
    "eos_token_id": "the model's EOS ends a text, and stop names other endings",
    "attention_mask": "rows are not padded: give token ids without padding",
    "pad_token_id": "rows are not padded: give token ids without padding",
}
"""Other programs' settings that gptk has no counterpart of -> what to do instead."""


@dataclass
class Translation:
    """Settings in gptk's words, see `translate_settings`."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Those that are no plug-ins, such as max_new_tokens."""
    sampler: str | None = None
    """A spec string."""
    sampler_setting: str = ""
    """The first setting that names the sampler."""
    processors: dict[str, str] = field(default_factory=dict)
    """Spec strings by the first setting that names each."""

    def __str__(self) -> str:
        """As keyword arguments: `n=2, sampler='beam:4'`."""
        plugins = {"sampler": self.sampler, "processors": [*self.processors.values()]}
        named = self.settings | {name: value for name, value in plugins.items() if value}
        return ", ".join(f"{name}={value!r}" for name, value in named.items())


def option_of(setting: str) -> str:
    """The option of the command line that is a setting of Python, such as --max-new-tokens."""
    return "--processor" if setting == "processors" else f"--{setting.replace('_', '-')}"


def is_known(name: str) -> bool:
    """Whether a setting of another program means a plug-in, or has no counterpart."""
    return name in ANSWERS or _processor_option(name) is not None or bool(_samplers_with(name))


def takes_value(name: str) -> bool:
    """Whether a setting needs a value, unlike do_sample, which stands for a sampler."""
    return all(sampler.other_names[name] for sampler in _samplers_with(name))


def translate_settings(given: Mapping[str, Any], known: Iterable[str] = ()) -> Translation:
    """What settings of other programs are in gptk: of transformers, vLLM, llama.cpp, OpenAI's API.

    given: values by name, with underscores; a None says nothing. known: gptk's own settings, to
    suggest similar names. Raises OptionError for a setting that no program known here has, or
    without a counterpart, and for two names of the same.
    """
    translation = Translation()
    sampler_options: dict[str, Any] = {}
    processors: dict[str, dict[str, Any]] = {}
    first: dict[str, str] = {}
    for name, value in given.items():
        if value is None and (name in SETTINGS or is_known(name)):
            continue  # elsewhere None is a setting's default
        if name in SETTINGS:
            _put(translation.settings, SETTINGS[name], value, name)
        elif name in ANSWERS:
            raise OptionError(f"there is no setting {name}: {ANSWERS[name]}")
        elif (found := _processor_option(name)) is not None:
            processor, option = found
            first.setdefault(processor, name)
            _put(processors.setdefault(processor, {}), option, value, name)
        elif _samplers_with(name):
            sampler_options[name] = value
        else:
            raise OptionError(f"there is no setting {name}; {_suggestion(name, known)}")
    # A flag that is switched off names nothing: do_sample=False.
    sampler_options = {n: v for n, v in sampler_options.items() if str(v) not in ("False", "false")}
    if sampler_options:
        translation.sampler = _sampler(sampler_options)
        translation.sampler_setting = next(iter(sampler_options))
    translation.processors = {
        first[name]: _short_spec(provided("processor")[name].item, options)
        for name, options in processors.items()
    }
    return translation


def _put(values: dict[str, Any], key: str, value: Any, name: str) -> None:
    """Put a value that was given under another program's name. Raises OptionError if it is there
    already, under a second name."""
    if key in values:
        raise OptionError(f"{name} is given twice: another name of {key} is given, too")
    values[key] = value


def _processor_option(name: str) -> tuple[str, str] | None:
    """A processor and its option, by the processor's name or by other programs' name of it."""
    processors = provided("processor")
    plugin = processors.get(name.replace("_", "-"))
    if plugin is not None and plugin.item.positional:
        return plugin.name, plugin.item.positional
    for plugin in processors.values():
        if name in plugin.item.other_names:
            return plugin.name, plugin.item.other_names[name]
    return None


def _sampler(given: Mapping[str, Any]) -> str:
    """The spec of the sampler that has all these options, and least others."""
    samplers = [plugin.item for plugin in provided("sampler").values()]
    fitting = [sampler for sampler in samplers if given.keys() <= sampler.other_names.keys()]
    if not fitting:
        raise OptionError(f"no sampler has {_listed(given)} together; see gptk plugins")
    sampler: type[Plugin] = min(fitting, key=lambda s: (len(s.other_names), len(s.model_fields)))
    options: dict[str, Any] = {}
    for name, value in given.items():
        _put(options, sampler.other_names[name], value, name)
    options.pop("", None)  # a name such as do_sample stands for the sampler, not for an option
    return _short_spec(sampler, options)


def _samplers_with(name: str) -> list[type[Plugin]]:
    """The samplers that have an option of this name in other programs."""
    samplers = [plugin.item for plugin in provided("sampler").values()]
    return [sampler for sampler in samplers if name in sampler.other_names]


def _short_spec(plugin: type[Plugin], options: Mapping[str, Any]) -> str:
    """The plug-in's spec; a single option is written without its name if it may be."""
    options = {name: value if _is_writable(value) else "…" for name, value in options.items()}
    if [*options] == [plugin.positional]:
        return f"{plugin.name}:{format_value(options[plugin.positional])}"
    return format_spec(plugin.name, options)


def _is_writable(value: object) -> bool:
    """Whether a value can be written as text, unlike an array."""
    try:
        format_value(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _suggestion(name: str, known: Iterable[str]) -> str:
    return suggest(name, [*known], what="settings")


def _listed(names: Collection[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
