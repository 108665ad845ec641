"""Files that are damaged, or made to do harm, are refused before their numbers are believed."""

import ast
import json
import os
import re
import socket
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from llms_from_scratch.ch04 import GPTModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoints
import gptk
from gptk.weights.building import build_model
from gptk.weights.loading import load_checkpoint
from gptk.weights.saving import save_checkpoint
from gptk_plugins.loaders._torch_file import read_torch_file

BOOK = {
    "vocab_size": 60, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 1,
    "drop_rate": 0.0, "qkv_bias": False,
}  # fmt: skip


def built(source: Path | str) -> gptk.GPT:
    return build_model(load_checkpoint(str(source)), "cpu", torch.float32)


def copied(state: Any) -> dict[str, Tensor]:
    """The tensors in memory of their own: those of a mapped file change when it is overwritten."""
    return {name: x.clone() for name, x in state.items()}


def refusal(source: Path | str) -> str:
    """The line that loading is refused with."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", gptk.PluginWarning)
        with pytest.raises(gptk.SourceError) as caught:
            built(source)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


# --- Files of torch.save ---------------------------------------------------------------------


@pytest.fixture
def book(tmp_path) -> Path:
    """The book's model, saved as the book does."""
    torch.manual_seed(0)
    torch.save(GPTModel(BOOK).state_dict(), tmp_path / "model.pth")
    return tmp_path / "model.pth"


def spec(path: Path) -> str:
    return f"llms-from-scratch:path={path},n_heads=4"


def rezipped(path: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> None:
    """Write the archive anew; `change` writes each entry."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            change(archive, name, content)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_archive_is_refused(method, book):
    """PyTorch maps the compressed bytes as if they were numbers."""
    rezipped(book, lambda archive, name, content: archive.writestr(name, content, method))
    assert book.name in refusal(spec(book))
    assert "is compressed" in refusal(spec(book))
    assert "is compressed" in refusal(book), "the format is still told"
    # Only the numbers of one tensor, as garbage in one matrix is least noticed.
    torch.save(GPTModel(BOOK).state_dict(), book)
    rezipped(
        book,
        lambda archive, name, content: archive.writestr(
            name, content, method if name.endswith("data/3") else zipfile.ZIP_STORED
        ),
    )
    assert "the entry model/data/3 of the zip archive is compressed" in refusal(spec(book))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("damage", [b"\0", b"\xff"])
def test_a_damaged_compressed_archive_is_refused(method, damage, book):
    """The loaders look at it one after another, to tell whose it is."""
    rezipped(book, lambda archive, name, content: archive.writestr(name, content, method))
    data = bytearray(book.read_bytes())
    with zipfile.ZipFile(book) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("data.pkl"))
    start = entry.header_offset + 30 + len(entry.filename)
    data[start + 4 : start + 40] = damage * 36
    book.write_bytes(data)
    assert book.name in refusal(book)


def test_an_archive_that_is_packed_uncompressed_is_read(book):
    before = copied(built(spec(book)).state_dict())
    rezipped(book, lambda archive, name, content: archive.writestr(name, content))
    assert all(torch.equal(x, before[name]) for name, x in built(spec(book)).state_dict().items())


def edit(path: Path, old: bytes, new: bytes, *, count: int = -1) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, count))


def directory_entries(data: bytes) -> list[int]:
    """Where the entries of the zip archive's directory begin."""
    found, place = [], 0
    while (place := data.find(b"PK\1\2", place)) >= 0:
        found.append(place)
        place += 4
    return found


@pytest.mark.parametrize(
    ("offset", "form", "value", "message"),
    [
        (8, "<H", 1, "is encrypted"),
        (10, "<H", 8, "is compressed"),
        (20, "<I", 5, "is compressed"),
        (34, "<H", 1, "is on another disk"),
        (42, "<I", 7, "overlaps the one before it"),
        (42, "<I", 2**31, "cut short or damaged"),
        (46, "<B", 90, "cut short or damaged"),
    ],
)
def test_a_directory_that_says_something_else_is_refused(offset, form, value, message, book):
    data = bytearray(book.read_bytes())
    struct.pack_into(form, data, directory_entries(data)[2] + offset, value)
    book.write_bytes(data)
    assert message in refusal(spec(book))


def test_entries_that_overlap_or_occur_twice_are_refused(book):
    data = bytearray(book.read_bytes())
    places = directory_entries(data)
    names = [bytes(data[place + 46 :].split(b"PK", 1)[0]) for place in places]
    first, second = [i for i, name in enumerate(names) if b"/data/" in name][:2]
    twice = bytearray(data)
    twice[places[second] : places[second] + 46] = data[places[first] : places[first] + 46]
    book.write_bytes(twice)
    assert "cut short or damaged" in refusal(spec(book)) or "overlaps" in refusal(spec(book))
    torch.save(GPTModel(BOOK).state_dict(), book)
    with warnings.catch_warnings(), zipfile.ZipFile(book, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("model/data/0", bytes(60 * 32 * 4))
    assert "the entry model/data/0 of the zip archive occurs twice" in refusal(spec(book))


def test_an_entry_that_is_too_short_for_its_tensor_is_refused(book):
    """PyTorch goes on into the entry that follows."""

    def change(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
        archive.writestr(name, content[:-4] if name.endswith("data/3") else content)

    rezipped(book, change)
    assert "its entry data/3 has" in refusal(spec(book))


def test_the_checksum_of_the_pickle_is_compared(book):
    edit(book, b"tok_emb.weight", b"tok_emb.weighs")
    assert "the checksum of its entry model/data.pkl is wrong" in refusal(spec(book))


def test_files_without_checksums_are_read(book):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(GPTModel(BOOK).state_dict(), book)
    finally:
        torch.serialization.set_crc32_options(True)
    assert built(spec(book)).config.n_layers == 1


def test_numbers_of_a_big_endian_machine_are_read(book):
    before = copied(built(spec(book)).state_dict())

    def change(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
        if name.endswith("byteorder"):
            content = b"big"
        elif "/data/" in name:
            content = b"".join(content[i : i + 4][::-1] for i in range(0, len(content), 4))
        archive.writestr(name, content)

    rezipped(book, change)
    assert all(torch.equal(x, before[name]) for name, x in built(spec(book)).state_dict().items())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_whole_model_is_refused_with_what_to_do(legacy, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(GPTModel(BOOK), path, _use_new_zipfile_serialization=not legacy)
    message = refusal(path)
    assert "llms_from_scratch.ch04.GPTModel; nothing in it was run" in message
    assert "torch.save(model.state_dict(), PATH)" in message


def test_a_torchscript_program_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    message = refusal(f"nanogpt:path={path}")
    assert "is a TorchScript program" in message
    assert "torch.save(model.state_dict(), PATH)" in message


class Trap:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call = (call, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_is_called_but_what_makes_tensors(legacy, tmp_path):
    path = tmp_path / "model.pth"
    sprung = tmp_path / "sprung"
    state = GPTModel(BOOK).state_dict()
    for trap in (
        Trap(Path.touch, sprung),
        Trap(os.system, f"touch {sprung}"),
        Trap(eval, f"open({str(sprung)!r}, 'w')"),
        Trap(bytearray, 10**11),  # which torch.load allows
        Trap(torch.zeros, 10**9),
        Trap(exec, "raise SystemExit"),
    ):
        torch.save({**state, "trap": trap}, path, _use_new_zipfile_serialization=not legacy)
        assert "nothing in it was run" in refusal(spec(path))
    assert not sprung.exists()


def deep(opcode: bytes, depth: int) -> bytes:
    return b"\x80\x02}(" + b"N" + opcode * depth + b"Nu."


def doubled(then: bytes) -> bytes:
    """A tuple of 2^90 items, as each level is the one before it twice, through the memo."""
    return b"\x80\x02N\x85" + b"q\x00h\x00\x86" * 90 + then


@pytest.mark.parametrize(
    "content",
    [
        doubled(b"q\x01}h\x01Ns."),
        doubled(b"NR."),
        b"",
        b"\x80\x02.",
        b"\x80\x04}.",
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\x7f.",
        deep(b"\x85", 200_000),  # tuples in tuples as a key: hashing it overflows the stack
        deep(b"]", 10),
        b"\x80\x02" + b"(" * 10**5,
        b"\x80\x02ctorch\nSize\n(K\x01t" * 10 + b".",
        b"\x80\x02}q\x00h\x00h\x00s.",
        b"\x80\x02X\x01\x00\x00\x00a\x85R.",
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00"
        b"\x00cpuJ\xff\xff\xff\x7ftQ.",
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nload\nX\x01\x00\x00\x000NK\x01tQ.",
        b"\x80\x02K\x01Q.",
    ],
)
def test_pickles_that_torch_save_does_not_write_are_refused(content, tmp_path):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", content)
        archive.writestr("model/version", "3\n")
    assert str(path) in refusal(spec(path))
    path.write_bytes(content)
    assert str(path) in refusal(spec(path))


def test_views_that_repeat_what_is_stored_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    state = GPTModel(BOOK).state_dict()
    for view in (
        torch.zeros(1).expand(10_000, 10_000),
        torch.zeros(100_000).as_strided((50_000, 50_000), (1, 1)),
        torch.zeros(1, 10_000).expand(10_000, -1),
    ):
        torch.save({**state, "tok_emb.weight": view}, path)
        assert "views that repeat numbers" in refusal(spec(path))
    # A transposed matrix, a part of a larger one, and two names of one matrix are read.
    weight = state["tok_emb.weight"]
    larger = torch.cat((weight, torch.ones(1, 32)))
    for view in (weight.T.contiguous().T, larger[:60]):
        torch.save({**state, "tok_emb.weight": view, "out_head.weight": weight}, path)
        assert torch.equal(built(spec(path)).embed.weight, weight)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x > 0, "is stored as bool"),
        (lambda x: x.to(torch.complex64), "is stored as complex64"),
        (lambda x: x.int(), "is stored as int32"),
        (lambda x: x.to(torch.uint8), "is stored as uint8"),
    ],
)
def test_weights_that_are_no_floats_are_refused(change, message, legacy, tmp_path):
    state = GPTModel(BOOK).state_dict()
    state["out_head.weight"] = change(state["out_head.weight"])
    path = tmp_path / "model.pth"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert f"the tensor out_head.weight {message}" in refusal(spec(path))


def test_tensors_of_other_layouts_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    state = GPTModel(BOOK).state_dict()
    weight = state["out_head.weight"]
    for tensor in (
        weight.to_sparse(),
        weight.to("meta"),
    ):
        torch.save({**state, "out_head.weight": tensor}, path)
        assert "nothing in it was run" in refusal(spec(path))


def test_names_that_are_no_names_or_twice_there_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    state = GPTModel(BOOK).state_dict()
    torch.save({**state, 3: torch.zeros(1)}, path)
    assert "a tensor whose name is 3, no text" in refusal(spec(path))
    torch.save({**state, "module.tok_emb.weight": torch.zeros(60, 32)}, path)
    assert "has two tensors tok_emb.weight" in refusal(spec(path))


def test_a_file_before_pytorch_1_6_whose_tensors_are_larger_than_it_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:3000])
    assert "its tensors need 4,000 bytes, and it has 3,000" in refusal(spec(path))


def test_what_is_read_is_what_torch_loads(tmp_path):
    state = {"a": torch.randn(7, 5), "b": torch.arange(3), "c": {"d": torch.ones(2).bfloat16()}}
    state |= {"e": [1, 2.5, None, True, "x"], "f": torch.nn.Parameter(torch.ones(3))}
    state |= {"g": torch.Size([1, 2]), "h": torch.float16}
    for legacy in (True, False):
        if not legacy:  # PyTorch has had these since its new format
            state["i"] = torch.ones(4).to(torch.float8_e5m2)
        torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        found = read_torch_file(tmp_path / "x.pt")
        expected = torch.load(tmp_path / "x.pt", weights_only=True)
        assert str(found) == str(expected)


# --- safetensors -----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path) -> Path:
    """A Hugging Face directory of gpt2."""
    checkpoints.random_model("gpt2").save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def with_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(changed or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_tensors_are_those_that_safetensors_reads(small):
    expected = load_file(small / "model.safetensors")
    state = load_checkpoint(str(small)).state
    assert torch.equal(state["embed.weight"], expected["transformer.wte.weight"])
    qkv = expected["transformer.h.1.attn.c_attn.weight"].T
    assert torch.equal(state["blocks.1.attn.qkv.weight"], qkv)


def test_tensors_at_odd_places_are_read(small):
    expected = copied(load_file(small / "model.safetensors"))
    for spaces in range(1, 8):
        with_header(small, lambda header, n=spaces: json.dumps(header).encode() + b" " * n)
        model = built(small)
        assert torch.equal(model.embed.weight, expected["transformer.wte.weight"])


def overlap(header: dict[str, Any]) -> None:
    first, second = sorted(header.keys() - {"__metadata__"})[:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]


def hole(header: dict[str, Any]) -> None:
    del header[sorted(header.keys() - {"__metadata__"})[3]]


def beyond(header: dict[str, Any]) -> None:
    entry = max(header.values(), key=lambda x: x.get("data_offsets", [0, 0])[1])
    entry["data_offsets"][1] += 4
    entry["shape"] = [*entry["shape"][:-1], entry["shape"][-1] + 1]


def twice(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    name = "transformer.wte.weight"
    return f'{{"{name}": {json.dumps(header[name])}, {text[1:]}'.encode()


@pytest.mark.parametrize(
    "change",
    [
        overlap, hole, beyond, twice,
        lambda header: b"",
        lambda header: b"[" * 10**5,
        lambda header: b'{"a":' * 10**5,
        lambda header: b"{}",
        lambda header: header["transformer.wte.weight"].update(dtype="I32"),
        lambda header: header["transformer.wte.weight"].update(dtype="F4"),
        lambda header: header["transformer.wte.weight"].update(dtype="F8_E8M0"),
        lambda header: header["transformer.wte.weight"].update(dtype="X"),
        lambda header: header["transformer.wte.weight"].update(shape=[2**62, 2**62]),
        lambda header: header["transformer.wte.weight"].update(shape=[-1]),
        lambda header: header["transformer.wte.weight"].update(shape=[97 * 64]),
        lambda header: header["transformer.wte.weight"].update(shape=[64, 97]),
        lambda header: header["transformer.wte.weight"].update(data_offsets=[-4, 4]),
        lambda header: header["transformer.wte.weight"].update(data_offsets=[2**64, 4]),
        lambda header: {**header, "more": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    ],
)  # fmt: skip
def test_headers_that_are_wrong_are_refused(change, small):
    with_header(small, change)
    assert "small" in refusal(small)


def test_a_header_larger_than_any_is_refused(small):
    path = small / "model.safetensors"
    for length in (2**63, 2**32, 10**8, 2**24 + 1):
        path.write_bytes(struct.pack("<Q", length) + b"{" + bytes(100))
        assert f"its header would have {length:,} bytes" in refusal(small)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.complex64])
def test_weights_stored_as_no_floats_are_refused(dtype, small):
    path = small / "model.safetensors"
    state = load_file(path)
    name = "transformer.ln_f.weight"
    save_file({**state, name: state[name].to(dtype)}, path)
    stored = str(dtype).removeprefix("torch.")
    assert f"the tensor {name} is stored as {stored}" in refusal(small)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_all_sizes_are_read(dtype, small):
    path = small / "model.safetensors"
    state = {name: x.to(dtype) for name, x in load_file(path).items()}
    save_file(state, path)
    assert torch.equal(built(small).embed.weight, state["transformer.wte.weight"].float())


# --- Shards ----------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path) -> Path:
    checkpoints.random_model("gpt2").save_pretrained(tmp_path / "model", max_shard_size="50KB")
    return tmp_path / "model"


def with_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index) or index))


@pytest.mark.parametrize(
    "name",
    ["../../x", "../model/{}", "/etc/hostname", "./{}", "x/../{}", "", ".", "..", "x/y", "{}/"],
)
def test_shards_are_files_in_the_same_directory(name, sharded, tmp_path):
    shard = sorted(path.name for path in sharded.glob("*-of-*"))[0]
    (tmp_path / "x").write_bytes((sharded / shard).read_bytes())
    with_index(
        sharded,
        lambda index: index["weight_map"].update(
            {n: name.format(shard) for n, s in index["weight_map"].items() if s == shard}
        ),
    )
    assert "shards are files in the same directory" in refusal(sharded)


def test_shards_may_be_links_as_in_the_hubs_cache(sharded, tmp_path):
    expected = built(sharded).embed.weight
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(f"../blobs/{number}")
    assert torch.equal(built(sharded).embed.weight, expected)


def test_a_tensor_in_two_shards_or_in_another_one_is_refused(sharded):
    first, second = sorted(sharded.glob("*-of-*"))[:2]
    state, more = load_file(first), load_file(second)
    name = next(iter(state))
    save_file({**more, name: state[name]}, second)
    assert f"the tensor {name} is in two shards" in refusal(sharded)
    save_file({n: x for n, x in state.items() if n != name}, first)
    assert f"the shard {first.name} has no tensor {name}" in refusal(sharded)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": []}, "weight_map is []; it must be"),
        ({"weight_map": {"a": 1}}, "weight_map.a is 1; it must be a string"),
        ({"weight_map": {}}, "has 2 layers, the file only 0 tensors"),
        ({"weight_map": {"a": "b.safetensors"}}, "the shard b.safetensors is missing"),
        ({"weight_map": {"a": "\n\x1b[31m"}}, "is missing"),
    ],
)
def test_an_index_that_is_wrong_is_refused(index, message, sharded):
    with_index(sharded, lambda _: index)
    if index == {}:
        (sharded / "model.safetensors.index.json").write_text("{}")
    assert message in refusal(sharded)


# --- GGUF ------------------------------------------------------------------------------------


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    checkpoints.write_gguf(tmp_path / "model.gguf", checkpoints.random_model("llama"))
    return tmp_path / "model.gguf"


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def number(key: str, value: int) -> bytes:
    return string(key) + struct.pack("<II", 4, value)


def gguf_bytes(
    fields: list[bytes], tensors: list[tuple[str, tuple[int, ...], int, int]], data: bytes = b""
) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(fields)
    for name, shape, kind, offset in tensors:
        out += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return out + bytes(-len(out) % 32) + data


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return string("x") + struct.pack("<IIQ", 9, kind, count) + content


LLAMA = string("general.architecture") + struct.pack("<I", 8) + string("llama")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gguf_bytes([number("x", 1), number("x", 1)], []), "the key 'x' occurs twice"),
        (
            gguf_bytes([], [("a", (4,), 0, 0), ("a", (4,), 0, 32)], bytes(64)),
            "the tensor 'a' occurs twice",
        ),
        (
            gguf_bytes([], [("a", (4,), 0, 0), ("b", (4,), 0, 0)], bytes(64)),
            "the tensor b begins at byte 0 of the tensors, not 32",
        ),
        (
            gguf_bytes([], [("a", (4,), 0, 0), ("b", (4,), 0, 16)], bytes(64)),
            "the tensor b begins at byte 16 of the tensors, not 32",
        ),
        (
            gguf_bytes([], [("a", (4,), 0, 0), ("b", (4,), 0, 2**64 - 32)], bytes(64)),
            "of the tensors, not 32",
        ),
        (gguf_bytes([], [("a", (4, 1, 1, 1, 1), 0, 0)], bytes(64)), "has more than 4 axes"),
        (gguf_bytes([], [("a", (2**63, 2**63), 0, 0)]), "the file is cut short"),
        (gguf_bytes([number("general.alignment", 0)], []), "general.alignment is 0"),
        (gguf_bytes([number("general.alignment", 24)], []), "it must be a power of 2"),
        (gguf_bytes([array(9, 1, struct.pack("<IQ", 4, 0))], []), "a list holds items of type 9"),
        (
            gguf_bytes([array(9, 1, struct.pack("<IQ", 9, 1) * 10**5)], []),
            "a list holds items of type 9",
        ),
        (gguf_bytes([array(8, 2**60)], []), "the file is cut short within its metadata"),
        (gguf_bytes([array(4, 2**60)], []), "the file is cut short within its metadata"),
        (gguf_bytes([array(7, 2**23, bytes(2**23))], []), "more than 4,194,304 items"),
        (gguf_bytes([array(13, 1)], []), "a list holds items of type 13"),
        (gguf_bytes([string("x") + struct.pack("<I", 13)], []), "a field has the type 13"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "it would have 9,223,372,036,854,775,808"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "it would have 1,099,511,627,776 fields"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648 is not supported"),
        (gguf_bytes([number("general.architecture", 1)], []), "general.architecture is 1"),
        (
            gguf_bytes([LLAMA, string("split.count") + struct.pack("<I", 8) + string("2")], []),
            "split.count is '2'; it must be a whole number",
        ),
        (
            gguf_bytes([LLAMA], [("token_embd.weight", (4,), 0, 0)], bytes(32)),
            "the matrix token_embd.weight is missing",
        ),
    ],
)  # fmt: skip
def test_gguf_files_that_break_a_rule_are_refused(content, message, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("key", "write", "message"),
    [
        ("llama.attention.scale", 0.5, "its attention.scale is 0.5; only 0.0"),
        ("llama.logit_scale", 0.0625, "its logit_scale is 0.0625"),
        ("llama.attn_logit_softcapping", 50.0, "attn_logit_softcapping"),
        ("llama.rope.freq_base", float("nan"), "rope.freq_base is nan; it must be a finite number"),
        ("llama.rope.freq_base", -1.0, "the model's rope_theta is -1.0"),
        ("llama.attention.layer_norm_rms_epsilon", -1e-5, "the model's norm_eps is -9.9"),
        ("llama.context_length", "128", "context_length is '128'; it must be a whole number"),
        ("llama.block_count", 2**32 - 1, "must be a whole number from 1 to"),
        ("llama.attention.key_length", 2**31 - 2, "only 2147483646 is supported"),
        ("llama.rope.scaling.type", "dynamic", "rotary scaling 'dynamic'"),
        ("llama.rope.scaling.factor", float("inf"), "rope.scaling.factor is inf"),
        ("llama.attention.head_count", [4, 2], "attention.head_count is [4, 2]"),
        ("llama.attention.causal", False, "attention.causal is False"),
        ("llama.expert_count", 8, "expert_used_count is 0; it must be 1 to expert_count, 8"),
        ("llama.expert_group_count", 2, "expert_group_count is 2"),
    ],
)
def test_gguf_metadata_of_other_models_are_named(key, write, message, tmp_path, monkeypatch):
    class Writer(gguf.GGUFWriter):
        """Writes the field instead of what the model has."""

        def add_key_value(self, name, value, kind, sub_type=None):  # type: ignore[no-untyped-def]
            if name != key:
                super().add_key_value(name, value, kind, sub_type)

        def write_kv_data_to_file(self):  # type: ignore[no-untyped-def]
            kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
            kinds |= {str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL}
            kind = kinds.get(type(write), gguf.GGUFValueType.ARRAY)
            super().add_key_value(key, write, kind)
            super().write_kv_data_to_file()

        def write_header_to_file(self, path=None):  # type: ignore[no-untyped-def]
            self.kv_data[0].setdefault(key, gguf.GGUFValue(0, gguf.GGUFValueType.UINT32))
            super().write_header_to_file(path)
            del self.kv_data[0][key]

    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(path, checkpoints.random_model("llama"))
    assert message in refusal(path)


# --- Files that are no files -----------------------------------------------------------------


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_directory(path: Path) -> None:
    path.mkdir()


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_dangling(path: Path) -> None:
    path.symlink_to("nothing")


def as_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**13)  # without blocks on the disk


REPLACEMENTS = [as_fifo, as_directory, as_device, as_socket, as_loop, as_dangling, as_huge]


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "shard"],
)
def test_what_is_no_regular_file_is_refused_at_once(replace, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    size = "50KB" if name == "shard" else "1GB"
    checkpoints.random_model("gpt2").save_pretrained(folder, max_shard_size=size)
    (folder / "tokenizer.json").write_text("{}")
    path = sorted(folder.glob("model*.safetensors"))[0] if name == "shard" else folder / name
    path.unlink()
    replace(path)
    with pytest.raises((gptk.SourceError, gptk.TokenizerError)) as caught:
        load_checkpoint(f"huggingface:path={folder}").tokenizer()  # type: ignore[misc]
    assert str(caught.value).isprintable()
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize(
    "source",
    ["gguf:path=x", "llms-from-scratch:path=x", "nanogpt:path=x", "x", "x.gguf", "x.pth", "x.pt"],
)
def test_a_source_that_is_no_regular_file_is_refused_at_once(
    replace, source, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    replace(tmp_path / source.rpartition("=")[2])
    assert source.rpartition("=")[2] in refusal(source)


# --- Memory ----------------------------------------------------------------------------------

PROGRAM = """
import resource, sys

import torch

import gptk
from gptk.weights.building import build_model
from gptk.weights.loading import load_checkpoint

def load(path):
    return build_model(load_checkpoint(path), "cpu", torch.float32)

small, large = sys.argv[1:]
for prefix in ("", "llms-from-scratch:path="):
    suffix = ".pth" if prefix else ""
    load(prefix + small + suffix)
    for more in (1_000_000, 60_000_000, 150_000_000):
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + more, -1))
        try:
            load(prefix + large + suffix)
        except gptk.OutOfMemory as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_too_little_memory_is_one_line_with_how_much_is_needed(tmp_path):
    for name, vocab_size in (("small", 64), ("large", 1_000_000)):
        config = gptk.GPTConfig(
            vocab_size=vocab_size, context_length=16, width=64, n_layers=1, n_heads=1,
            n_kv_heads=1, head_dim=64, mlp_width=64,
        )  # fmt: skip
        save_checkpoint(tmp_path / name, gptk.GPT(config).bfloat16(), None)
        settings = {**BOOK, "emb_dim": 64, "n_heads": 1, "vocab_size": vocab_size}
        torch.save(GPTModel(settings).bfloat16().state_dict(), tmp_path / f"{name}.pth")
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "small"), str(tmp_path / "large")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    lines = out.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert f"{tmp_path / 'large'}" in line
        assert "needs more memory than there is" in line
        assert "take --dtype bfloat16, --quantize int8 or a smaller model" in line
    told = [line for line in lines if re.search(r"the last piece takes \d+,\d{3},\d{3} byt", line)]
    assert len(told) >= 4, lines
    assert out.stderr == ""


def test_layers_are_counted_before_any_is_made(tmp_path):
    """A file names as many layers as it has tensors; it took a module for each."""
    folder = tmp_path / "model"
    checkpoints.random_model("llama").save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    more: dict[str, Tensor] = {f"x{i}": torch.zeros(1) for i in range(5_000)}
    save_file({**state, **more}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5_000}))
    assert "the tensor model.layers.2.input_layernorm.weight is missing" in refusal(folder)


def test_many_tensors_are_read_in_a_time_that_grows_with_their_number(tmp_path):
    """Each reading parsed the whole header of a safetensors file."""
    from gptk_plugins.loaders._tensor_readers import safetensors_readers

    save_file({f"x{i}": torch.full((1,), i * 1.0) for i in range(5_000)}, tmp_path / "x")
    readers = safetensors_readers(tmp_path / "x")
    assert sum(float(read()) for read in readers.values()) == sum(range(5_000))


def test_nothing_is_unpickled_but_by_torch_load_with_weights_only():
    """What reads models imports no unpickler, and calls torch.load in the safe way alone."""
    import gptk_plugins

    calls = 0
    for root in (Path(gptk_plugins.__file__).parent, Path(gptk.__file__).parent / "weights"):
        for path in root.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                    assert not names & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    calls += 1
                    assert "weights_only=True" in ast.unparse(node), path
    assert calls == 2
