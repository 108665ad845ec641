"""The plug-ins that a result depends on, and the files that they have read."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gptk.decoding.settings import CheckedSettings
from gptk.hooks.base import Plugin
from gptk.language_model import LanguageModel
from gptk.plugins.blame import blaming, expect
from gptk.plugins.files import source_file
from gptk.system.read_files import ReadFile
from gptk.weights.loading import find_loader


def plugins_of(settings: CheckedSettings) -> list[Plugin]:
    """The plug-ins of a call on which its results depend."""
    used: list[Plugin] = [settings.sampler, *settings.processors, *settings.sampler.processors()]
    return [*used, *([] if settings.drafter is None else [settings.drafter])]


def loader_of(lm: LanguageModel) -> list[Plugin]:
    """The plug-in that loads a model, if it was loaded."""
    return [] if lm.source is None else [find_loader(lm.source)]


def with_made(plugins: Iterable[Plugin]) -> Iterator[Plugin]:
    """Plug-ins, and those that they have made, such as the sampler that another wraps."""
    for plugin in plugins:
        yield plugin
        yield from with_made(made for made in vars(plugin).values() if isinstance(made, Plugin))


def files_of(plugins: Iterable[Plugin]) -> list[dict[str, Any]]:
    """The files that plug-ins have read, and those that they are written in, each with its
    SHA-256: `plugin` (kind and name), `name`, `bytes`, `sha256`.

    plugins: after the run, as some read files in it. Raises PluginError or InternalError.
    """
    files = []
    for plugin in with_made(plugins):
        wanted = "a list of gptk.plugins.ReadFile"
        with blaming([plugin]):
            read = list(expect(plugin, "files_read", plugin.files_read(), list | tuple, wanted))
        for file in read:
            expect(plugin, "files_read", file, ReadFile, wanted)
        if (source := source_file(type(plugin))) is not None:
            read.append(source)
        files += [{"plugin": plugin.title(), **_described(file)} for file in dict.fromkeys(read)]
    return files


@functools.lru_cache(maxsize=1000)
def _described(file: ReadFile) -> dict[str, Any]:
    """A file as records have it: read for its hash once, not for each record."""
    return file.to_dict()


def each_once(files: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Files as `files_of` has them, without those that several plug-ins of a name have read."""
    return [*{json.dumps(file, sort_keys=True): file for file in files}.values()]


def file_differences(
    recorded: Iterable[Mapping[str, Any]], found: Iterable[Mapping[str, Any]]
) -> list[str]:
    """A line for each file of a plug-in that is not what it was; both as `files_of` has them."""
    was, now = _numbered(recorded), _numbered(found)
    return [
        f"{key[1]} of {key[0]}: SHA-256 {now.get(key) or 'none':.16}, "
        f"was {was.get(key) or 'none':.16}"
        for key in {**was, **now}
        if was.get(key) != now.get(key)
    ]


def known_differences(
    recorded: Iterable[Mapping[str, Any]], found: Iterable[Mapping[str, Any]]
) -> list[str]:
    """As `file_differences`, but only of the plug-ins that have files in both: some read theirs
    when a run starts, and have none before."""
    recorded, found = list(recorded), list(found)
    both = {str(f.get("plugin")) for f in recorded} & {str(f.get("plugin")) for f in found}
    was, now = ([f for f in files if str(f.get("plugin")) in both] for files in (recorded, found))
    return file_differences(was, now)


def files_in(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The files of a record that was read without a check of its fields."""
    files = record.get("files")
    return [file for file in files if isinstance(file, dict)] if isinstance(files, list) else []


def _numbered(files: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, int], str | None]:
    """The hash of each file by its plug-in, its name, and a number for those alike in both."""
    numbered: dict[tuple[str, str, int], str | None] = {}
    for file in files:
        plugin, name, sha256 = (file.get(key) for key in ("plugin", "name", "sha256"))
        number = sum(key[:2] == (plugin, name) for key in numbered)
        numbered[str(plugin), str(name), number] = None if sha256 is None else str(sha256)
    return numbered
