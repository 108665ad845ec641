"""Packed weights that are kept in the cache folder: used only if they are the file's."""

import logging
import os
import re
import shutil

import pytest
import torch
from click.testing import CliRunner

import checkpoints
import gptk
from gptk import kernels
from gptk.cli import cli
from gptk.model.quantization import KernelGroups
from gptk.weights import kept

pytestmark = pytest.mark.skipif(not kernels.available(), reason="gptk's kernels do not run here")
IDS = [1, 2, 3, 4]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, in which packed weights of any size and of new files are kept."""
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "SMALLEST", 1)
    monkeypatch.setattr(kept, "_SETTLED", 0)
    return tmp_path / "cache" / "weights"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model in Q4_0, and another of the same sizes."""
    folder = tmp_path_factory.mktemp("written")
    oracle = checkpoints.random_model("llama")
    checkpoints.write_gguf(folder / "one.gguf", oracle, "Q4_0")
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.mul_(1.5)
    checkpoints.write_gguf(folder / "other.gguf", oracle, "Q4_0")
    return folder


@pytest.fixture
def file(written, tmp_path):
    return shutil.copy(written / "one.gguf", tmp_path / "model.gguf")


def load(file):
    return gptk.load(str(file), device="cpu", tokenizer="bytes")


def logits(file):
    lm = load(file)
    with torch.inference_mode():
        return lm.model(torch.tensor([IDS]))


def uses_kept(file, monkeypatch):
    """Whether all matrices are mapped; what is packed is small parts, to compare."""
    with monkeypatch.context() as patch:
        patch.setattr(KernelGroups, "packs", lambda self, levels: True)
        patch.setattr(kept, "KernelGroups", _NoPacking)
        try:
            load(file)
        except _PackedError:
            return False
    return True


class _PackedError(Exception):
    pass


class _NoPacking:
    of_packed = KernelGroups.of_packed

    def __init__(self, levels):
        raise _PackedError


@pytest.fixture
def loaded(cache, file):
    """The logits of the file, after which its packed weights are kept."""
    want = logits(file)
    assert len(list(cache.glob("*.packed"))) == 1
    return want


def test_kept_weights_are_mapped_and_the_same(loaded, file, cache, monkeypatch):
    assert uses_kept(file, monkeypatch)
    assert torch.equal(logits(file), loaded)
    (path,) = cache.glob("*.packed")
    assert path.stat().st_mode & 0o777 == 0o600
    assert not [*cache.glob(".*.new")]


@pytest.mark.parametrize("at", [0, 100, -1, -10, -40, -300])
def test_a_damaged_file_is_made_again(at, loaded, file, cache, monkeypatch, caplog):
    (path,) = cache.glob("*.packed")
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "gptk"):
        assert torch.equal(logits(file), loaded)
    assert "are not used, and are made again" in caplog.text
    assert uses_kept(file, monkeypatch)
    assert torch.equal(logits(file), loaded)


@pytest.mark.parametrize("size", [0, 7, 16, 1000, -1, -20])
def test_a_file_that_is_cut_short_is_made_again(size, loaded, file, cache, monkeypatch):
    (path,) = cache.glob("*.packed")
    path.write_bytes(path.read_bytes()[:size])
    assert torch.equal(logits(file), loaded)
    assert uses_kept(file, monkeypatch)


def test_a_file_that_was_replaced_is_packed_anew(loaded, file, written, cache, monkeypatch):
    """Of the same name and size, and with the time of the first one."""
    times = os.stat(file)
    content = (written / "other.gguf").read_bytes()
    assert len(content) == times.st_size
    with open(file, "r+b") as opened:  # in its place, so that the inode is the same
        opened.write(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    want = logits(written / "other.gguf")
    assert not torch.equal(want, loaded)
    assert torch.equal(logits(file), want)


def test_weights_of_another_file_are_noticed(loaded, file, written, cache, monkeypatch):
    """As if two files had the same sizes, times and inode."""
    other = str(written / "other.gguf")
    want = logits(other)
    stamp = kept.Source.of(file).stamp
    monkeypatch.setattr(kept.Source, "of", classmethod(lambda cls, path: cls(stamp)))
    assert torch.equal(logits(other), want)
    assert torch.equal(logits(file), loaded)


def test_a_file_that_others_can_write_is_not_used(loaded, file, cache, caplog):
    (path,) = cache.glob("*.packed")
    path.chmod(0o666)
    with caplog.at_level(logging.WARNING, "gptk"):
        assert torch.equal(logits(file), loaded)
    assert "others can write" in caplog.text


def test_in_a_folder_that_others_can_write_nothing_is_kept(cache, file):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    load(file)
    assert not list(cache.glob("*.packed"))


def test_a_file_that_changed_just_now_is_not_kept(cache, file, monkeypatch):
    monkeypatch.setattr(kept, "_SETTLED", 60e9)
    load(file)
    assert not cache.exists()


def test_small_weights_are_not_kept(cache, file, monkeypatch):
    monkeypatch.setattr(kept, "SMALLEST", 32 << 20)
    load(file)
    assert not cache.exists()


def test_the_oldest_are_removed(cache, written, file, monkeypatch):
    files = [shutil.copy(file, file.with_name(f"{i}.gguf")) for i in range(3)]
    for copy in files[:2]:
        load(copy)
    os.utime(kept.Source.of(files[1]).kept, (1, 1))
    size = sum(kept.kept_sizes().values()) // 2
    monkeypatch.setattr(kept, "LARGEST", 2 * size + 100)
    load(files[2])
    there = [kept.Source.of(copy).kept.exists() for copy in files]
    assert there == [True, False, True]


def test_what_was_used_last_is_removed_last(cache, loaded, file):
    (path,) = cache.glob("*.packed")
    os.utime(path, (1, 1))
    load(file)
    assert path.stat().st_mtime > 1


def test_on_a_disk_with_little_room_nothing_is_kept(cache, file, monkeypatch):
    usage = shutil.disk_usage(file.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    load(file)
    assert not list(cache.glob("*.packed"))


@pytest.mark.parametrize("name", ["_write", "_make_room"])
def test_what_cannot_be_written_does_not_matter(name, cache, file, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, name, fail)
    load(file)
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_info_says_what_is_kept(cache, loaded, file):
    out = CliRunner().invoke(cli, ["info", str(file)]).output
    (path,) = cache.glob("*.packed")
    assert f"packed weights: kept in {path}\n" in out
    assert re.search(rf"all packed weights: 1 file, 0\.\d MiB, in {re.escape(str(cache))}", out)
    path.unlink()
    assert "packed weights" not in CliRunner().invoke(cli, ["info", str(file)]).output


def test_weights_of_several_chunks(cache, file, monkeypatch):
    monkeypatch.setattr(kept, "_CHUNK", 1000)
    want = logits(file)
    assert uses_kept(file, monkeypatch)
    assert torch.equal(logits(file), want)


def test_a_kept_model_may_be_changed(cache, loaded, file):
    """The mapping is copy-on-write: neither the file nor another model changes."""
    first, second = load(file), load(file)
    first.model.head.packed.weights.zero_()
    first.model.unpack()
    with torch.inference_mode():
        assert torch.equal(second.model(torch.tensor([IDS])), loaded)
    assert torch.equal(logits(file), loaded)
