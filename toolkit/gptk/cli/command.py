"""How every command reads its command line.

An option that takes one value may be given once. Commands that decode also take other programs'
options: `--num-beams 4` is `--sampler beam:4`, `--top-p 0.9` is `--processor top-p:0.9`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import click

from gptk.cli.program_options import PLUGIN, register_files
from gptk.errors import OptionError


@dataclass(frozen=True)
class _Word:
    """An option as it was written, or a word that is none."""

    words: list[str]
    """As they were written: `--seed 1` are two, `--seed=1` is one."""
    name: str = ""
    """Such as --seed; empty for arguments."""
    value: str | None = None
    parameter: click.Option | None = None
    """None for an option that the command does not have."""
    meaning: Sequence[str] | None = None
    """For another program's option the words that it stands for; none if an earlier one says it."""

    @property
    def passed_on(self) -> Sequence[str]:
        return self.words if self.meaning is None else self.meaning


class Command(click.Command):
    """A command of gptk."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            words = self._translated(ctx, [*self._words(ctx, args)])
            _refuse_repetitions(words)
            args = [part for word in words for part in word.passed_on]
        return super().parse_args(ctx, args)

    def _translated(self, ctx: click.Context, words: list[_Word]) -> list[_Word]:
        return words

    def _options(self, ctx: click.Context) -> dict[str, click.Option]:
        return {
            name: parameter
            for parameter in self.get_params(ctx)
            if isinstance(parameter, click.Option)
            for name in (*parameter.opts, *parameter.secondary_opts)
        }

    def _words(self, ctx: click.Context, args: list[str]) -> Iterator[_Word]:
        """The command line in its parts, each option with its value."""
        options, rest = self._options(ctx), iter(args)
        for word in rest:
            if word == "--":
                yield _Word([word, *rest])
            elif not word.startswith("-") or word == "-":
                yield _Word([word])
            else:
                name, equals, value = word.partition("=")
                parameter = options.get(name)
                if equals or not self._takes_value(name, parameter):
                    yield _Word([word], name, value if equals else None, parameter)
                else:
                    following = [*_next(rest)]
                    yield _Word([word, *following], name, "".join(following), parameter)

    def _takes_value(self, name: str, parameter: click.Option | None) -> bool:
        if parameter is None:
            return False
        is_switch = parameter.is_flag or parameter.count or getattr(parameter, "is_switch", False)
        return not is_switch


class DecodingCommand(Command):
    """A command with --sampler and --processor, which takes other programs' options as well."""

    def _words(self, ctx: click.Context, args: list[str]) -> Iterator[_Word]:
        """Without --plugin: the files' plug-ins may have the options that follow."""
        for word in super()._words(ctx, args):
            if word.parameter is PLUGIN and word.value:
                register_files([word.value])
            else:
                yield word

    def _takes_value(self, name: str, parameter: click.Option | None) -> bool:
        if parameter is None and name.startswith("--"):
            from gptk.decoding.other_names import takes_value

            return takes_value(_setting(name))
        return super()._takes_value(name, parameter)

    def _translated(self, ctx: click.Context, words: list[_Word]) -> list[_Word]:
        """Put gptk's options where other programs' stand, as the order of processors matters."""
        if all(word.parameter or not word.name.startswith("--") for word in words):
            return words
        from gptk.decoding.other_names import is_known

        options = self._options(ctx)
        words = [self._renamed(word, options) for word in words]
        foreign = [word for word in words if not word.parameter and is_known(_setting(word.name))]
        if "--processor" not in options or not foreign:
            return words
        meanings = self._meanings(foreign)
        for option, spec in meanings.values():
            if option == "--sampler":
                _check_sampler(words, spec)
        return [
            replace(word, meaning=meanings.get(word.name, ())) if word in foreign else word
            for word in words
        ]

    def _renamed(self, word: _Word, options: Mapping[str, click.Option]) -> _Word:
        """A setting under another program's name, such as --max-tokens, as gptk's own."""
        from gptk.decoding.other_names import SETTINGS, option_of

        name = option_of(SETTINGS.get(_setting(word.name), ""))
        if word.parameter is not None or name not in options:
            return word
        meaning = (name, self._value(word))
        return replace(word, name=name, parameter=options[name], meaning=meaning)

    def _meanings(self, foreign: list[_Word]) -> dict[str, tuple[str, str]]:
        """The samplers and processors that other programs' options mean, by the first of these."""
        from gptk.decoding.other_names import translate_settings

        _refuse_repetitions(foreign)
        values = {_setting(word.name): self._value(word) or True for word in foreign}
        try:
            translation = translate_settings(values, [])
        except OptionError as error:
            raise click.UsageError(_as_options(str(error))) from None
        meanings = {name: ("--processor", spec) for name, spec in translation.processors.items()}
        if translation.sampler:
            meanings[translation.sampler_setting] = ("--sampler", translation.sampler)
        return {_option(name): meaning for name, meaning in meanings.items()}

    def _value(self, word: _Word) -> str:
        """The value of a word, empty for a switch. Raises click.UsageError if it lacks one."""
        if not word.value and (word.value == "" or self._takes_value(word.name, None)):
            raise click.UsageError(f"{word.name} needs a value")
        return word.value or ""


def _check_sampler(words: Iterable[_Word], sampler: str) -> None:
    """Raise click.UsageError if a sampler is named as well, unless several are allowed."""
    for word in words:
        if word.name == "--sampler" and word.parameter and not word.parameter.multiple:
            raise click.UsageError(
                f"--sampler {word.value} is given, and options that mean --sampler {sampler}; "
                "give one of them"
            )


def _as_options(message: str) -> str:
    """A message about settings in the words of the command line: `--max-new-tokens`."""
    message = message.replace("no setting ", "no option ")
    return re.sub(r"\b[a-z]+(?:_[a-z]+)+\b", lambda name: _option(name[0]), message)


def _refuse_repetitions(words: list[_Word]) -> None:
    """Raise click.UsageError for an option that takes one value and is given twice."""
    seen: dict[str, _Word] = {}
    for word in words:
        option = word.parameter
        if not word.name or (option is not None and (option.multiple or option.count)):
            continue
        first = seen.setdefault((option and option.name) or word.name, word)
        if first is not word:
            several = "; gptk compare runs several" if word.name == "--sampler" else ""
            raise click.UsageError(
                f"{word.name} is given twice: {' '.join(first.words)} and "
                f"{' '.join(word.words)}{several}"
            )


def _next(words: Iterator[str]) -> Iterator[str]:
    for word in words:
        yield word
        return


def _setting(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"
