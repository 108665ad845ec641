"""How every command reads its command line.

Options of the program itself (`--plugin FILE`, `--debug`) may also follow the command's name. An
option that takes one value may be given once. Commands that decode also take other programs'
options: `--num-beams 4` is `--sampler beam:4`, `--top-p 0.9` is `--processor top-p:0.9`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import click

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


class Command(click.Command):
    """A command of gptk."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            words = [*self._take_program_options(self._words(ctx, args))]
            args = self._translated(ctx, words)
            _refuse_repetitions([*self._words(ctx, args)])
        return super().parse_args(ctx, args)

    def _translated(self, ctx: click.Context, words: list[_Word]) -> list[str]:
        return [word for group in words for word in group.words]

    def _words(self, ctx: click.Context, args: list[str]) -> Iterator[_Word]:
        """The command line in its parts, each option with its value."""
        options = {
            name: parameter
            for parameter in self.get_params(ctx)
            if isinstance(parameter, click.Option)
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        rest = iter(args)
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
            return name == "--plugin"
        is_switch = parameter.is_flag or parameter.count or getattr(parameter, "is_switch", False)
        return not is_switch

    def _take_program_options(self, words: Iterator[_Word]) -> Iterator[_Word]:
        """Register the files of --plugin, leave --debug out, and yield the other words."""
        for word in words:
            if word.name == "--plugin" and word.parameter is None:
                if not word.value:
                    raise click.UsageError("--plugin needs a file")
                from gptk.plugins.files import register_file

                register_file(word.value)
            elif word.name != "--debug" or word.parameter is not None:
                yield word


class DecodingCommand(Command):
    """A command with --sampler and --processor, which takes other programs' options as well."""

    def _takes_value(self, name: str, parameter: click.Option | None) -> bool:
        if parameter is None and name.startswith("--"):
            from gptk.decoding.other_names import takes_value

            return name == "--plugin" or takes_value(_setting(name))
        return super()._takes_value(name, parameter)

    def _translated(self, ctx: click.Context, words: list[_Word]) -> list[str]:
        unknown = {word.name: word for word in words if word.name and word.parameter is None}
        if not any(name.startswith("--") for name in unknown):
            return super()._translated(ctx, words)
        from gptk.decoding.other_names import SETTINGS, is_known, option_of, translate

        own = {name for parameter in self.params for name in parameter.opts}
        foreign = {
            name: word
            for name, word in unknown.items()
            if is_known(setting := _setting(name))
            and option_of(SETTINGS.get(setting, "processors")) in own
        }
        _refuse_repetitions([word for word in words if word.name in foreign])
        for name, word in foreign.items():
            if (word.value is None and self._takes_value(name, None)) or word.value == "":
                raise click.UsageError(f"{name} needs a value")
        values = {
            _setting(name): True if word.value is None else word.value
            for name, word in foreign.items()
        }
        try:
            translation = translate(values, [])
        except OptionError as error:
            raise click.UsageError(_as_options(str(error))) from None
        kept = [word for word in words if word.name not in foreign]
        if translation.sampler:
            self._check_sampler(kept, translation.sampler)
        return [*translation.as_options(), *super()._translated(ctx, kept)]

    def _check_sampler(self, words: list[_Word], sampler: str) -> None:
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
    return re.sub(r"\b[a-z]+(?:_[a-z]+)+\b", lambda name: f"--{name[0].replace('_', '-')}", message)


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
