"""Files that torch.save wrote, checked before torch.load reads them with weights_only=True.

torch.load trusts what surrounds the tensors: it maps compressed or encrypted entries of the zip
archive as if they were numbers, reads beyond an entry into the next one, and allocates what the
pickle asks for. So the archive's directory and the pickle's instructions are looked at first;
nothing is unpickled for that.
"""

import io
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import gptk
from gptk.plugins import is_out_of_memory, shown
from gptk_plugins.mapped_file import MappedFile

_ZIP = b"PK\x03\x04"
_HEAD = 1 << 20
"""How many bytes of a file are looked at to tell whose it is."""
_MAX_PICKLE = 1 << 26
"""The size of a pickle without its tensors; that of a large model with its optimizer is a tenth."""


def read_torch_file(path: Path) -> dict[Any, Any]:
    """A dict that torch.save wrote. Only tensors and plain containers are unpickled.

    Tensors are memory-mapped if the file has PyTorch's zip format, that of 1.6 and later. Raises
    SourceError.
    """
    file = MappedFile(path)
    is_zip = file.file.read(len(_ZIP)) == _ZIP
    file.file.seek(0)
    try:
        found = _checked_archive(file, path) if is_zip else _checked_legacy_file(file, path)
    except gptk.GptkError:
        raise
    except Exception as error:  # a damaged file can make zipfile and the unpickler raise anything
        if is_out_of_memory(error):
            raise
        raise _damaged(error, path, file.size) from None
    if not isinstance(found, dict):
        raise gptk.SourceError(f"{path} holds a {type(found).__name__}, not a state dict")
    _check_sizes(found, path, file.size)
    return found


def torch_file_contains(path: str, *names: bytes) -> bool:
    """Whether a .pt or .pth file seems to contain all these names."""
    if not path.endswith((".pth", ".pt")) or not os.path.isfile(path):
        return False
    try:
        # torch.save writes the names first and uncompressed, so no unpickling is needed; a file
        # that is cut short can still be told.
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            if not all(name in head for name in names) and head.startswith(_ZIP):
                with zipfile.ZipFile(file) as archive, archive.open(_pickle_of(archive)) as pickle:
                    head = pickle.read(_HEAD)
    except Exception as error:  # a damaged file can make zipfile raise anything
        if is_out_of_memory(error):
            raise
        return False
    return all(name in head for name in names)


def state_readers(weights: Mapping[Any, Any], source: str) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a state dict, by name, without the prefixes of torch.compile and
    data-parallel wrappers. Raises SourceError if a name is no text, or two names become one."""

    def same(tensor: Tensor) -> Tensor:
        return tensor

    readers: dict[str, Callable[[], Tensor]] = {}
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            continue
        if not isinstance(name, str):
            raise gptk.SourceError(f"{source} has a tensor whose name is {shown(name)}, no text")
        plain = name.removeprefix("_orig_mod.").removeprefix("module.")
        if plain in readers:
            raise gptk.SourceError(f"{source} has two tensors {plain}")
        readers[plain] = partial(same, tensor)
    return readers


# --- The zip format --------------------------------------------------------------------------


def _checked_archive(file: MappedFile, path: Path) -> Any:
    with zipfile.ZipFile(file.file) as archive:
        pickle = _pickle_of(archive)
        prefix = pickle.removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in archive.namelist():
            raise gptk.SourceError(
                f"{path} is a TorchScript program, not a state dict; where it was made, save the "
                "weights: torch.save(model.state_dict(), PATH)"
            )
        entries = {entry.filename: entry for entry in _checked_entries(archive, file, path)}
    for storage in _storages(io.BytesIO(_content(file, entries[pickle], path)), path):
        entry = entries.get(f"{prefix}data/{storage.key}")
        if entry is None or entry.file_size != storage.nbytes:
            raise gptk.SourceError(
                f"{path} is damaged: its entry data/{storage.key} has "
                f"{entry.file_size if entry else 0:,} bytes, and a tensor needs {storage.nbytes:,}"
            )
    return torch.load(file.path, map_location="cpu", weights_only=True, mmap=True)


def _pickle_of(archive: zipfile.ZipFile) -> str:
    """The entry with the pickle, NAME/data.pkl. Raises ValueError if there is none."""
    for name in archive.namelist():
        if name.endswith("/data.pkl") and name.count("/") == 1:
            return name
    raise ValueError("it is a zip archive, but not one of torch.save")


def _checked_entries(
    archive: zipfile.ZipFile, file: MappedFile, path: Path
) -> list[zipfile.ZipInfo]:
    """The entries. Raises SourceError unless each is stored as it is, in a place of its own."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    names, end = set(), 0
    for entry in entries:
        what = f"{path}: the entry {entry.filename} of the zip archive"
        if entry.flag_bits & 1:
            raise gptk.SourceError(f"{what} is encrypted, which is not supported")
        if entry.volume:
            raise gptk.SourceError(f"{what} is on another disk, which is not supported")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise gptk.SourceError(
                f"{what} is compressed, and torch.save compresses nothing; unpack the archive and "
                "pack it uncompressed (zip -0), or load the weights and save them again"
            )
        if entry.filename in names:
            raise gptk.SourceError(f"{what} occurs twice")
        if entry.header_offset < end:
            raise gptk.SourceError(f"{what} overlaps the one before it")
        archive.open(entry).close()  # compares the entry's own header with the directory
        names.add(entry.filename)
        end = _start(file, entry) + entry.file_size
    if end > archive.start_dir:
        raise gptk.SourceError(f"{path} is damaged: the entries of its zip archive overlap its end")
    return entries


def _start(file: MappedFile, entry: zipfile.ZipInfo) -> int:
    """Where the content of an entry begins, after its header."""
    file.file.seek(entry.header_offset)
    name, extra = struct.unpack_from("<HH", file.file.read(30), 26)
    return int(entry.header_offset + 30 + name + extra)


def _content(file: MappedFile, entry: zipfile.ZipInfo, path: Path) -> bytes:
    if entry.file_size > _MAX_PICKLE:
        raise gptk.SourceError(f"{path} has {entry.file_size:,} bytes without its tensors")
    file.file.seek(_start(file, entry))
    content = file.file.read(entry.file_size)
    # torch.serialization.set_crc32_options(False) leaves the checksum 0.
    if entry.CRC and zlib.crc32(content) != entry.CRC:
        raise gptk.SourceError(
            f"{path} is damaged: the checksum of its entry {entry.filename} is wrong"
        )
    return content


# --- The format before PyTorch 1.6 -----------------------------------------------------------


def _checked_legacy_file(file: MappedFile, path: Path) -> Any:
    """Five pickles (a magic number, a version, the system, the object, keys), then the numbers."""
    head = io.BytesIO(file.file.read(min(file.size, _MAX_PICKLE)))
    needed = sum(storage.nbytes for _ in range(5) for storage in {*_storages(head, path)})
    if needed > file.size:
        raise gptk.SourceError(
            f"{path} is cut short or damaged: its tensors need {needed:,} bytes, and it has "
            f"{file.size:,}"
        )
    file.file.seek(0)
    return torch.load(file.file, map_location="cpu", weights_only=True)


# --- Pickles, read without executing them ----------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    """Numbers that a pickle refers to."""

    key: str
    nbytes: int


_CALLED = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.nn.parameter Parameter",
    "__builtin__ set",
    "torch.serialization _get_layout",
}
"""What the pickle of a state dict calls. torch.load allows more, a bytearray of any size too."""


def _storages(pickle: BinaryIO, path: Path) -> Iterator[_Storage]:
    """The storages that a pickle refers to, from its instructions.

    Raises SourceError if it names anything that a state dict does not consist of, ValueError or
    IndexError if it is no pickle as torch.save writes them.
    """
    memo: dict[Any, Any] = {}
    stack: list[Any] = []  # texts, numbers, names, and tuples of these; None for anything else
    for operation, argument, _ in pickletools.genops(pickle):
        name = operation.name
        pushed: Any = argument if name in _PUSHES else None
        if name == "PROTO" and argument != 2:
            raise ValueError(f"its pickle has protocol {argument}; save it with 2, the default")
        if name == "GLOBAL":
            _check_global(str(argument), path)
        elif name in ("BINGET", "LONG_BINGET"):
            pushed = memo.get(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "BINPERSID":
            yield _storage(stack[-1])
        elif name in _UNKNOWN:
            raise ValueError(
                f"its pickle has the instruction {name}, which torch.save never writes"
            )
        taken = _take(stack, operation.stack_before)
        if name == "REDUCE" and taken[0] not in _CALLED:
            raise ValueError(f"its pickle calls {shown(taken[0])}")
        if name == "MARK":
            pushed = pickletools.markobject
        elif name.startswith("TUPLE"):
            pushed = _Tuple(taken)
        stack += [pushed] * len(operation.stack_after)


def _take(stack: list[Any], wanted: list[Any]) -> list[Any]:
    """Take what an instruction takes from the stack; returns what was above the mark, if any."""
    taken: list[Any] = []
    if pickletools.markobject in wanted:
        while (value := stack.pop()) is not pickletools.markobject:
            taken.append(value)
        for _ in range(wanted.index(pickletools.markobject)):
            stack.pop()
    else:
        taken = [stack.pop() for _ in wanted]
    return taken[::-1]


class _Tuple(tuple[Any, ...]):
    """A tuple that can be hashed, as a key is: that would overflow the stack if it were nested
    deeply, and take forever if it held itself twice, through the memo, on many levels."""

    depth: int
    size: int
    """The items that are hashed."""

    def __new__(cls, items: list[Any]) -> "_Tuple":
        made = super().__new__(cls, items)
        tuples = [item for item in items if isinstance(item, cls)]
        made.depth = 1 + max((item.depth for item in tuples), default=0)
        made.size = 1 + len(items) + sum(item.size for item in tuples)
        if made.depth > _MAX_DEPTH:
            raise ValueError(f"its pickle has tuples nested more than {_MAX_DEPTH} deep")
        if made.size > _MAX_SIZE:
            raise ValueError(f"its pickle has a tuple of more than {_MAX_SIZE:,} items")
        return made


_MAX_DEPTH, _MAX_SIZE = 100, 1 << 16


_PUSHES = {
    "BININT", "BININT1", "BININT2", "BINUNICODE", "GLOBAL", "LONG1", "SHORT_BINSTRING",
}  # fmt: skip
_UNKNOWN = {"EXT1", "EXT2", "EXT4", "GET", "INST", "OBJ", "PERSID", "POP", "POP_MARK", "DUP", "PUT"}


def _check_global(name: str, path: Path) -> None:
    module, _, attribute = name.partition(" ")
    kinds = (torch.dtype, torch.layout)
    if name in _CALLED or (
        module == "torch" and isinstance(getattr(torch, attribute, None), kinds)
    ):
        return
    if (module, attribute) == ("torch.storage", "UntypedStorage") or _storage_dtype(name):
        return
    raise gptk.SourceError(
        f"{path} holds more than tensors and plain containers: {name.replace(' ', '.')}; nothing "
        "in it was run. If it is a whole model, save its state dict where it was made: "
        "torch.save(model.state_dict(), PATH)"
    )


def _storage_dtype(name: str) -> torch.dtype | None:
    """The dtype of `torch FloatStorage` and the like; None for other names."""
    module, _, attribute = name.partition(" ")
    storage = getattr(torch, attribute, None) if module == "torch" else None
    is_storage = isinstance(storage, type) and issubclass(storage, torch.TypedStorage)
    dtype = getattr(storage, "_dtype", None) if is_storage else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _storage(identifier: Any) -> _Storage:
    """The storage of an identifier: `storage`, its type, key, location and count of numbers."""
    match identifier:
        case ("storage", str() as kind, str() as key, _, int() as count, *_) if count >= 0:
            is_bytes = kind == "torch.storage UntypedStorage"
            if dtype := torch.uint8 if is_bytes else _storage_dtype(kind):
                return _Storage(key, count * dtype.itemsize)
    raise ValueError("its pickle refers to tensors as torch.save does not")


# --- What was read ---------------------------------------------------------------------------


def _check_sizes(found: Mapping[Any, Any], path: Path, size: int) -> None:
    """Raises SourceError if the tensors have more numbers than the file: views that repeat what is
    stored, by a stride of 0 for example. A head may share the embedding's."""
    dicts = [found, *(value for value in found.values() if isinstance(value, dict))]
    expanded = sum(x.nbytes for part in dicts for x in part.values() if isinstance(x, Tensor))
    if expanded > 2 * size:
        raise gptk.SourceError(
            f"{path} has {size:,} bytes, but its tensors {expanded:,}: they are views that repeat "
            "numbers; save them as tensor.clone()"
        )


def _damaged(error: Exception, path: Path, size: int) -> gptk.SourceError:
    if isinstance(error, EOFError | zipfile.BadZipFile):
        return gptk.SourceError(f"{path} is cut short or damaged: {error or 'it ends too early'}")
    reason = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
    return gptk.SourceError(f"{path} is cut short or damaged: {reason:.200}")
