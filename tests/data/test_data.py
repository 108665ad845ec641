"""Token files against whole-text encoding, windows against the book's data loader."""

import itertools
import json
import os
import pydoc_data.topics
import signal
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import llms_from_scratch.ch02
import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gptk
from gptk.data import encoding, sources, token_files
from gptk.data.encoding import encode_documents
from gptk.data.token_files import prepare_tokens
from gptk.data.windows import check_enough, epoch_order
from gptk.weights.tokenizers import load_tokenizer
from toys import byte_tokenizer

ENGLISH = "".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def tokenizers(gpt2, smollm2_path):
    """Tokenizers that split texts in different ways. Most merge any two of some characters within
    a part, so that a wrong cut changes the ids."""
    singles = [bytes([byte]) for byte in range(256)]
    pairs = [bytes(pair) for pair in itertools.product(b"ab1!/ \n\r", repeat=2)]
    ranks = {piece: number for number, piece in enumerate(singles + pairs)}
    names = ["<|endoftext|>", "<|end|>", "<|a\nb c|>", "\n<x>", "<|end|>\nx"]
    special = {name: len(ranks) + number for number, name in enumerate(names)}

    def splitting(pattern, **about):
        encoding = tiktoken.Encoding(
            "x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        end = special["<|endoftext|>"]
        return gptk.Tokenizer(encoding, bos=end, eos=(end,), **about)

    return {
        "gpt2": gpt2,
        "bytes": byte_tokenizer(),
        "smollm2": load_tokenizer(str(smollm2_path)),
        "gpt2-pattern": splitting(gptk.SPLIT_PATTERNS["gpt2"]),
        "llama3": splitting(gptk.SPLIT_PATTERNS["llama3"], add_bos=True, normalization="NFC"),
        "tekken": splitting(gptk.SPLIT_PATTERNS["tekken"], normalization="NFKC"),
        "lines": splitting(r".*\n|.+|\s"),
        "lookbehind": splitting(r"(?<=\n)\w|\w+|\W"),
        "lookahead": splitting(r"\S+\s(?!a)|\S+|\s"),
        "whole": splitting(r"[\s\S]+"),
    }


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one two\nthree\n")
    return path


# Chunks

telling = st.sampled_from(
    [
        *[
            "\n",
            " ",
            "\n\n",
            "  ",
            "\r\n",
            "\t",
            "\n/",
            "!\n//",
            "\x1c",
            "\u3000",
            "\n\u0338",
            " \u0301",
        ],
        *["<|endoftext|>", "<|im_end|>", "<|end|>\n", "<|end|>\nx", "<|a\nb c|>", "\n<x>", "<|end"],
        *["don't", "'ll", "12 345\n6", "naïve", "e\u0301", "한국어\n", "🙂", "\x04", "´", "a\n´"],
    ]
)
words = st.text("ab1!/", min_size=1, max_size=6)
texts = st.lists(
    telling | st.builds(str.__add__, words, st.sampled_from([" ", "\n"])), min_size=40, max_size=90
).map("".join)


def ids_in_chunks(tokenizer, pieces, size):
    """The ids of one document, and how many chunks they came in."""
    parts = list(encode_documents([pieces], tokenizer, chunk=size))
    assert [first for first, _ in parts] == [True] + [False] * (len(parts) - 1)
    return np.concatenate([ids for _, ids in parts]).tolist(), len(parts)


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "bytes", "smollm2", "gpt2-pattern", "llama3", "tekken"),
        *("lines", "lookbehind", "lookahead", "whole"),
    ],
)
def test_ids_in_chunks_are_those_of_the_whole_text(tokenizers, name):
    tokenizer, chunks = tokenizers[name], Counter()

    @settings(max_examples=60)
    @given(texts, st.integers(1, 60), st.integers(1, 40))
    @example("some words here " * 12 + "!\n/ and more\nwords " * 12, 1, 7)
    @example(("word <|a\nb c|> \n<x> <|end|>\nx\n" * 8), 1, 7)
    def ids_are_equal(text, size, piece):
        pieces = [text[start : start + piece] for start in range(0, len(text), piece)]
        ids, count = ids_in_chunks(tokenizer, pieces, size)
        assert ids == tokenizer.encode(text)
        chunks[count > 1] += 1

    ids_are_equal()
    assert chunks[True] > 0.8 * chunks.total() or name == "whole"


@pytest.mark.parametrize("text", [ENGLISH, "a\n" + ENGLISH[:60000].replace("\n", "")])
def test_chunks_are_about_as_large_as_asked_for(gpt2, text):
    pieces = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    sizes = [len(gpt2.decode(ids)) for _, ids in encode_documents([pieces], gpt2, chunk=9000)]
    assert max(sizes) < 14_000
    assert min(sizes[:-1]) > 4400


# Token files


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cn"])), min_size=1, max_size=4),
    st.sampled_from(["gpt2", "llama3", "smollm2"]),
    st.integers(1, 9),
)
@settings(max_examples=40)
def test_documents_stand_between_end_of_text_tokens(
    tokenizers, tmp_path_factory, documents, name, block
):
    tokenizer, folder = tokenizers[name], tmp_path_factory.mktemp("documents")
    paths = [folder / f"{number}.txt" for number in range(len(documents))]
    for path, text in zip(paths, documents, strict=True):
        path.write_bytes(text.encode())
    documents = [text.removeprefix("\N{BYTE ORDER MARK}") for text in documents]
    want = []
    for text in filter(None, documents):
        want += [*(tokenizer.eos[:1] if want else ()), *tokenizer.encode(text)]
    # Characters lie across blocks.
    with mock.patch.object(encoding, "CHUNK", block), mock.patch.object(sources, "BLOCK", block):
        if not want:
            with pytest.raises(gptk.DataError, match=r"no text in .*0\.txt"):
                prepare_tokens(list(map(str, paths)), tokenizer, cache=folder)
            return
        got = prepare_tokens(list(map(str, paths)), tokenizer, cache=folder)
    assert got.tokens.tolist() == want
    assert got.documents == len(list(filter(None, documents)))
    assert got.n_bytes == len("".join(documents).encode())


def test_the_python_documentation_is_built_in(gpt2, cache):
    tokens = prepare_tokens(["builtin:python-docs"], gpt2, cache=cache)
    assert tokens.tokens.tolist() == gpt2.encode(ENGLISH)
    assert tokens.n_bytes == len(ENGLISH.encode()) > 400_000
    assert (tokens.n_tokens, tokens.documents, tokens.tokenizer) == (len(tokens.tokens), 1, "gpt2")
    again = prepare_tokens("builtin:python-docs", gpt2, cache=cache)
    assert again.path == tokens.path
    assert again.path.stat().st_mtime_ns == tokens.path.stat().st_mtime_ns


def test_the_file_is_raw_integers_as_small_as_the_vocabulary_allows(cache, text_file):
    small = byte_tokenizer()
    ranks = small.encoding._mergeable_ranks
    for highest, dtype in ((65535, "<u2"), (65536, "<u4")):
        encoding = tiktoken.Encoding(
            "x", pat_str=".", mergeable_ranks=ranks, special_tokens={"one": highest}
        )
        tokens = prepare_tokens([str(text_file)], gptk.Tokenizer(encoding), cache=cache)
        assert tokens.tokens.dtype == np.dtype(dtype)
        assert tokens.tokens[0] == highest
        assert np.fromfile(tokens.path, dtype).tolist() == tokens.tokens.tolist()


def test_a_folder_gives_its_text_files_in_the_order_of_their_paths(tmp_path, cache):
    folder = tmp_path / "folder"
    for name in ("b.txt", "a/z.MD", "a/b.rst", "c.png", ".hidden.txt", ".git/x.txt", "empty.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("" if name == "empty.txt" else f"{name};")
    tokenizer = byte_tokenizer()
    tokens = prepare_tokens([str(folder)], tokenizer, cache=cache)
    want = "a/b.rst;<|endoftext|>a/z.MD;<|endoftext|>b.txt;"
    assert tokens.tokens.tolist() == tokenizer.encode(want)
    assert (tokens.documents, tokens.n_bytes) == (3, 21)
    (folder / "b.txt").unlink()
    assert prepare_tokens([str(folder)], tokenizer, cache=cache).documents == 2


def test_line_ends_stay_and_a_byte_order_mark_goes(cache, text_file):
    text_file.write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    tokens = prepare_tokens([str(text_file)], byte_tokenizer(), cache=cache)
    assert tokens.tokens.tobytes()[::2] == b"a\r\nb\n"
    assert tokens.n_bytes == 5


def test_a_file_name_may_be_any_bytes(tmp_path, cache):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    with open(path, "wb") as file:
        file.write(b"abc")
    assert prepare_tokens([os.fsdecode(path)], byte_tokenizer(), cache=cache).n_tokens == 3
    assert prepare_tokens([os.fsdecode(path)], byte_tokenizer(), cache=cache).n_tokens == 3


def test_split_is_by_tokens(cache, text_file):
    tokens = prepare_tokens([str(text_file)], byte_tokenizer(), cache=cache)
    train, validation = tokens.split(0.72)
    assert (len(train), len(validation)) == (10, 4)
    assert [*train, *validation] == tokens.tokens.tolist()
    for ratio in (0, 1, 1.5, float("nan")):
        with pytest.raises(gptk.OptionError, match="between 0 and 1"):
            tokens.split(ratio)


class TestReuse:
    """A token file is used as long as it is complete and its sources are the same."""

    @pytest.fixture
    def prepare(self, cache, text_file):
        def prepare(tokenizer=None, *more):
            """The tokens, and whether the text was tokenized for them."""
            with mock.patch.object(token_files, "_write", wraps=token_files._write) as write:
                texts = [str(text_file), *more]
                tokens = prepare_tokens(texts, tokenizer or byte_tokenizer(), cache=cache)
            return tokens, write.called

        return prepare

    def text(self, tokens):
        return byte_tokenizer().decode(tokens.tokens.tolist())

    def test_it_is_made_once(self, prepare):
        (first, tokenized), (second, again) = prepare(), prepare()
        assert (tokenized, again) == (True, False)
        assert first.tokens.tolist() == second.tokens.tolist()
        assert vars(first).keys() == vars(second).keys()
        for name in vars(first).keys() - {"tokens"}:
            assert getattr(first, name) == getattr(second, name)

    def test_another_modification_time_has_the_contents_compared_once(self, prepare, text_file):
        prepare()
        os.utime(text_file, ns=(5, 5))
        assert prepare()[1] is False
        with mock.patch.object(sources.Source, "checksum", side_effect=AssertionError):
            assert prepare()[1] is False

    @pytest.mark.parametrize("content", ["one two\nthrEE\n", "another length"])
    def test_another_content_is_tokenized(self, prepare, text_file, cache, content):
        before, _ = prepare()
        old = before.tokens.tolist()
        text_file.write_text(content)
        os.utime(text_file, ns=(7, 7))
        tokens, tokenized = prepare()
        assert tokenized
        assert self.text(tokens) == content
        assert before.tokens.tolist() == old  # still mapped
        assert len(list(cache.iterdir())) == 2  # but no longer in the cache

    def test_other_tokenizers_and_sources_have_their_own_files(self, prepare, gpt2, text_file):
        names = {prepare()[0].path, prepare(gpt2)[0].path, prepare(None, str(text_file))[0].path}
        assert len(names) == 3
        assert prepare()[1] is False

    def test_a_cut_token_file_is_made_anew(self, prepare):
        tokens, _ = prepare()
        size = tokens.path.stat().st_size
        for cut in (size - 1, 2, 0):
            os.truncate(tokens.path, cut)
            tokens, tokenized = prepare()
            assert tokenized
            assert tokens.path.stat().st_size == size
        tokens.path.unlink()
        assert prepare()[1] is True

    def test_a_token_file_with_other_tokens_is_made_anew(self, prepare, text_file):
        """Valid ones, as many, and with the old time of modification."""
        tokens, _ = prepare()
        before = tokens.path.stat()
        data = tokens.path.read_bytes()
        tokens.path.write_bytes(data[2:] + data[:2])
        os.utime(tokens.path, ns=(before.st_atime_ns, before.st_mtime_ns))
        again, tokenized = prepare()
        assert tokenized
        assert self.text(again) == text_file.read_text()
        assert prepare()[1] is False

    def test_a_text_of_the_same_size_and_time_is_tokenized(self, prepare, text_file):
        """As a copy has it that keeps times; no program can set the time of change back."""
        prepare()
        before = text_file.stat()
        text_file.write_text("One two\nthree\n")
        os.utime(text_file, ns=(before.st_atime_ns, before.st_mtime_ns))
        tokens, tokenized = prepare()
        assert tokenized
        assert self.text(tokens) == "One two\nthree\n"

    @pytest.mark.parametrize(
        "change",
        [
            {"n_bytes": 15},
            {"documents": 2},
            {"tokenizer": "gpt2"},
            {"fingerprint": "0"},
            {"n_tokens": 7, "dtype": "<u4"},
            {"sha256": "0" * 64},
            {"tokens": ""},
            {"tokens": "/dev/zero"},
            {"tokens": "\0"},
            {"n_tokens": -1},
            {"n_tokens": 10**40},
            {"checksum": ""},
            {"sources": []},
        ],
    )
    def test_a_header_that_was_changed_is_made_anew(self, prepare, cache, change):
        before, _ = prepare()
        (header,) = cache.glob("*.json")
        header.write_text(json.dumps(json.loads(header.read_text()) | change))
        tokens, tokenized = prepare()
        assert tokenized
        assert (tokens.n_bytes, tokens.documents, tokens.sha256) == (14, 1, before.sha256)
        assert prepare()[1] is False

    @pytest.mark.parametrize("what", ["header", "tokens"])
    @pytest.mark.parametrize("kind", ["FIFO", "folder", "link to a device"])
    def test_what_is_no_file_is_not_opened(self, prepare, cache, kind, what):
        """A folder cannot be replaced, which is told."""
        tokens, _ = prepare()
        path = tokens.path if what == "tokens" else next(cache.glob("*.json"))
        path.unlink()
        if kind == "folder":
            path.mkdir()
            with pytest.raises(gptk.DataError, match="the tokens cannot be kept"):
                prepare()
            return
        os.mkfifo(path) if kind == "FIFO" else path.symlink_to("/dev/zero")
        assert prepare()[1] is True
        assert prepare()[1] is False

    @pytest.mark.parametrize("change", [b"", b"{}", b"[1]", b"\xff", b"[" * 10**5, None])
    def test_a_header_that_cannot_be_read_is_made_anew(self, prepare, cache, change):
        prepare()
        (header,) = cache.glob("*.json")
        changed = change
        if changed is None:
            changed = json.dumps(json.loads(header.read_bytes()) | {"format": 1}).encode()
        header.write_bytes(changed)
        assert prepare()[1] is True
        assert prepare()[1] is False

    def test_the_header_tells_what_the_tokens_are_of(self, prepare, cache, text_file):
        tokens, _ = prepare()
        (header,) = cache.glob("text-*.json")
        about = json.loads(header.read_bytes())
        (source,) = about.pop("sources")
        assert source["name"] == str(text_file)
        assert (source["size"], source["mtime_ns"]) == (14, text_file.stat().st_mtime_ns)
        assert about["n_tokens"] == about["n_bytes"] == 14
        assert (about["documents"], about["tokenizer"], about["format"]) == (1, "bytes", 2)
        assert about["sha256"] == tokens.sha256


def test_a_split_pattern_that_takes_too_long_at_a_cut_is_an_error(monkeypatch):
    monkeypatch.setattr(gptk.text.encoding, "_SECONDS", 0.3)
    slow = gptk.ByteLevelBPE(
        "slow",
        pat_str=r"(?:a|aa)+$|.",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={},
    )
    text = "b" * 100 + " " + "a" * 63 + "b" * 100
    with pytest.raises(gptk.TokenizerError, match="takes too long"):
        list(encode_documents([[text]], gptk.Tokenizer(slow), chunk=200))


def test_the_cache_is_where_gptk_cache_says(tmp_path, text_file, monkeypatch):
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path / "there"))
    tokens = prepare_tokens([str(text_file)], byte_tokenizer())
    assert tokens.path.parent == tmp_path / "there" / "tokens"
    monkeypatch.delenv("GPTK_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "user"))
    assert prepare_tokens([str(text_file)], byte_tokenizer()).path.parent.parent.name == "user"


# Several processes, killed processes, long texts: in forked children


def in_child(function):
    """Run function() in a forked process; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child):
    """How a child ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("killed_in", ["encode_documents", "_write_header"])
def test_a_preparation_that_is_killed_leaves_no_file_that_is_used(text_file, cache, killed_in):
    def prepare():
        return prepare_tokens([str(text_file)], byte_tokenizer(), cache=cache)

    def killed():
        def encode(*args, **settings):
            yield True, np.array([1, 2, 3])
            os.kill(os.getpid(), signal.SIGKILL)

        def write_header(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        with mock.patch.object(
            token_files, killed_in, encode if killed_in == "encode_documents" else write_header
        ):
            prepare()

    assert ended(in_child(killed)) == -signal.SIGKILL
    assert len(list(cache.iterdir())) == 1
    assert prepare().tokens.tolist() == byte_tokenizer().encode(text_file.read_text())


def test_a_preparation_that_is_killed_at_any_time_is_made_anew(tmp_path, cache, gpt2):
    path = tmp_path / "text.txt"
    path.write_text(ENGLISH)
    for hundredths in range(1, 22, 4):
        child = in_child(lambda: prepare_tokens([str(path)], gpt2, cache=cache))
        time.sleep(hundredths / 100)
        os.kill(child, signal.SIGKILL)
        ended(child)
        for header in cache.glob("*.json"):  # it ended before it was killed
            header.unlink()
    assert prepare_tokens([str(path)], gpt2, cache=cache).tokens.tolist() == gpt2.encode(ENGLISH)


@pytest.mark.parametrize("stop", ["write", "finish"])
def test_an_interrupted_preparation_removes_its_file(text_file, cache, stop):
    parts = {"write": "encode_documents", "finish": "_write_header"}
    interrupted = mock.patch.object(token_files, parts[stop], side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        prepare_tokens([str(text_file)], byte_tokenizer(), cache=cache)
    assert not list(cache.glob(".*"))
    assert not list(cache.glob("*.json"))
    assert prepare_tokens([str(text_file)], byte_tokenizer(), cache=cache).n_tokens == 14


def test_what_killed_preparations_left_is_removed_after_a_day(text_file, cache):
    cache.mkdir()
    for name, age in ((".old.new", 25), (".young.new", 23), ("other", 99)):
        (cache / name).touch()
        then = time.time() - age * 3600
        os.utime(cache / name, (then, then))
    prepare_tokens([str(text_file)], byte_tokenizer(), cache=cache)
    assert {".young.new", "other"} == {
        path.name for path in cache.iterdir() if "text" not in path.name
    }


def test_processes_that_prepare_one_file_at_once_all_get_it_whole(tmp_path, cache, gpt2):
    path = tmp_path / "text.txt"
    path.write_text(ENGLISH)
    want = gpt2.encode(ENGLISH)

    def prepare():
        assert prepare_tokens([str(path)], gpt2, cache=cache).tokens.tolist() == want

    children = [in_child(prepare) for _ in range(4)]
    assert [ended(child) for child in children] == [0, 0, 0, 0]
    assert len(list(cache.iterdir())) == 2
    prepare()


def test_a_text_that_changes_between_two_processes_is_not_mixed_up(text_file, cache):
    """Another process publishes its tokens of the older text just before ours get their header."""
    tokenizer, write_header = byte_tokenizer(), token_files._write_header

    def other_first(*args):
        content = text_file.read_bytes()
        text_file.write_bytes(content.swapcase())
        with mock.patch.object(token_files, "_write_header", write_header):
            prepare_tokens([str(text_file)], tokenizer, cache=cache)
        text_file.write_bytes(content)
        write_header(*args)

    with mock.patch.object(token_files, "_write_header", other_first):
        ours = prepare_tokens([str(text_file)], tokenizer, cache=cache)
    assert tokenizer.decode(ours.tokens.tolist()) == text_file.read_text()
    again = prepare_tokens([str(text_file)], tokenizer, cache=cache)
    assert tokenizer.decode(again.tokens.tolist()) == text_file.read_text()


@pytest.mark.parametrize(
    ("copies", "chunk", "limit"),
    [(16, 1 << 16, 15), pytest.param(256, 1 << 20, 150, marks=pytest.mark.slow)],
)
def test_a_long_text_needs_memory_for_a_few_chunks_only(
    tmp_path, cache, gpt2, copies, chunk, limit
):
    """Encoding 16 copies, 7.5 MB, at once takes 87 MiB."""

    def memory(name):
        status = Path("/proc/self/status").read_text()
        return int(status.partition(f"{name}:")[2].split()[0]) / 1024

    def prepare():
        before = memory("VmRSS")
        with (
            mock.patch.object(encoding, "CHUNK", chunk),
            mock.patch.object(sources, "BLOCK", chunk),
            mock.patch("os.cpu_count", return_value=2),
        ):
            tokens = prepare_tokens([str(path)], gpt2, cache=cache)
        report.write_text(f"{memory('VmHWM') - before} {tokens.n_tokens} {tokens.n_bytes}")

    path, report = tmp_path / "text.txt", tmp_path / "report"
    with path.open("w") as file:
        for _ in range(copies):
            file.write(ENGLISH)
    assert ended(in_child(prepare)) == 0
    extra, n_tokens, n_bytes = map(float, report.read_text().split())
    once, twice = len(gpt2.encode(ENGLISH)), len(gpt2.encode(2 * ENGLISH))
    assert n_tokens == once + (copies - 1) * (twice - once)
    assert n_bytes == copies * len(ENGLISH.encode())
    assert extra < limit


# What cannot be read


def fails(sources, *words, cache):
    with pytest.raises(gptk.DataError) as caught:
        prepare_tokens(sources, byte_tokenizer(), cache=cache)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("content", "byte"),
    [(b"\xff", 0), (b"abc\xe9t\xe9", 3), (b"ab\xe2\x82", 2), (b"x" * 20 + b"\xe2\x82x", 20)],
)
@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_a_file_that_is_not_utf8_is_an_error_that_names_the_byte(
    tmp_path, cache, content, byte, block
):
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    with mock.patch.object(sources, "BLOCK", block):
        fails([str(path)], "latin.txt is not UTF-8", f"byte {byte} is 0x", cache=cache)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("inside", [False, True])
def test_a_fifo_is_not_read(tmp_path, cache, inside):
    """It would wait for somebody to write to it."""
    os.mkfifo(tmp_path / "fifo.txt")
    fails([str(tmp_path if inside else tmp_path / "fifo.txt")], "fifo.txt", "neither", cache=cache)


def test_binary_data_is_no_text(tmp_path, cache):
    (tmp_path / "x.bin").write_bytes(np.random.default_rng(0).bytes(10_000))
    fails([str(tmp_path / "x.bin")], "x.bin is not UTF-8 text: byte", cache=cache)


def test_a_line_of_megabytes_is_tokenized(tmp_path, cache):
    path = tmp_path / "line.txt"
    path.write_text("abcdefgh" * 400_000)
    tokens = prepare_tokens([str(path)], byte_tokenizer(), cache=cache)
    assert tokens.n_tokens == tokens.n_bytes == 3_200_000


def test_missing_and_empty_sources_are_told_by_name(tmp_path, cache):
    fails([], "no data", "builtin:python-docs", cache=cache)
    fails([str(tmp_path / "none.txt")], "none.txt", "not there", cache=cache)
    fails([""], "a source of data is empty", cache=cache)
    fails(["/dev/null"], "/dev/null", "neither a file nor a folder", cache=cache)
    fails(["x" * 300], "cannot be read", "too long", cache=cache)
    fails(["~nobody-of-that-name/x"], "not there", cache=cache)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").touch()
    fails([str(tmp_path / "folder")], "folder", "no text files", ".md", ".txt", cache=cache)
    (tmp_path / "folder" / "a.txt").touch()
    fails([str(tmp_path / "folder")], "no text in", "a.txt", cache=cache)
    fails(["builtin:python"], "did you mean python-docs", cache=cache)
    (tmp_path / "file").touch()
    fails(["builtin:python-docs"], "file/cache", "GPTK_CACHE", cache=tmp_path / "file" / "cache")


# Windows


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (16, 5), (4, 1), (7, 20)])
def test_windows_are_those_of_the_books_loader(gpt2, cache, length, stride):
    text = ENGLISH[:4000] + "<|endoftext|>" + ENGLISH[9000:9500]
    cache.mkdir()
    (cache / "text.txt").write_text(text)
    with mock.patch.object(tiktoken, "get_encoding", return_value=gpt2.encoding):
        loader = llms_from_scratch.ch02.create_dataloader_v1(
            text, batch_size=6, max_length=length, stride=stride, shuffle=False, drop_last=False
        )
    tokens = prepare_tokens([str(cache / "text.txt")], gpt2, cache=cache).tokens
    windows = gptk.Windows(tokens, length, stride)
    assert len(windows) == len(loader.dataset)
    order = epoch_order(len(windows), seed=0, epoch=0, shuffle=False)
    for number, (inputs, targets) in enumerate(loader):
        got = windows.batch(order[6 * number : 6 * number + 6])
        assert torch.equal(got[0], inputs)
        assert torch.equal(got[1], targets)
        assert got[0].dtype == got[1].dtype == torch.int64
        assert got[0].is_contiguous()


@given(st.integers(0, 50), st.integers(1, 12), st.integers(1, 12))
def test_each_window_is_whole_and_begins_where_it_says(n, length, stride):
    windows = gptk.Windows(np.arange(100, 100 + n, dtype=np.uint16), length, stride)
    assert len(windows) == len(range(0, n - length, stride))
    if len(windows):
        inputs, targets = windows.batch(np.arange(len(windows)))
        assert inputs[:, 0].tolist() == [100 + windows.start(i) for i in range(len(windows))]
        assert torch.equal(inputs + 1, targets)
        assert targets.shape == (len(windows), length)
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows.batch(np.array([index]))


def test_windows_do_not_overlap_by_default():
    windows = gptk.Windows(np.arange(30), 7)
    assert (windows.stride, len(windows)) == (7, 4)
    for bad in ({"context_length": 0}, {"context_length": 4, "stride": 0}):
        with pytest.raises(gptk.OptionError, match="must be 1 or more"):
            gptk.Windows(np.arange(30), **bad)


# The order of an epoch


@given(st.integers(0, 300), st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_an_epoch_takes_each_window_once_in_an_order_of_its_own(n, seed, epoch):
    order = epoch_order(n, seed=seed, epoch=epoch, shuffle=True)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == epoch_order(n, seed=seed, epoch=epoch, shuffle=True).tolist()
    if n > 20:
        for other in ({"seed": seed + 1, "epoch": epoch}, {"seed": seed, "epoch": epoch + 1}):
            assert order.tolist() != epoch_order(n, **other, shuffle=True).tolist()


def test_without_shuffling_the_order_is_that_of_the_text():
    assert epoch_order(5, seed=1, epoch=3, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_every_order_is_as_likely_as_another():
    """Chi-squared over the 24 orders of 4 windows in 4,800 epochs: 200 expected of each."""
    counts = Counter(tuple(epoch_order(4, seed=3, epoch=e, shuffle=True)) for e in range(4800))
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7  # p = 0.001


def test_the_order_is_that_of_philox():
    """Fixed for ever: a run that goes on elsewhere takes the windows that it would have taken.

    Philox4x64-10 in Python's integers, after Salmon et al. 2011.
    """

    def block(counter, key):
        words, mask = [counter, 0, 0, 0], 2**64 - 1
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * words[0], 2**64)
            high1, low1 = divmod(0xCA5A826395121157 * words[2], 2**64)
            words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
            key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
        return words

    numbers = [word for counter in range(1, 6) for word in block(counter, [42, 7])]
    want = sorted(range(20), key=numbers.__getitem__)
    assert epoch_order(20, seed=42, epoch=7, shuffle=True).tolist() == want


# Enough for a batch


def test_too_few_tokens_for_a_step_name_the_numbers_and_the_settings():
    windows = gptk.Windows(np.arange(1000), 64, 32)
    assert len(windows) == 30
    check_enough(windows, 30, which="training", context_length=64, train_ratio=0.9)
    with pytest.raises(gptk.DataError) as caught:
        check_enough(windows, 31, which="training", context_length=64, train_ratio=0.9)
    message = str(caught.value)
    assert "\n" not in message
    for word in (
        "training",
        "1000 tokens",
        "30 windows",
        "context_length=64",
        "stride=32",
        "takes 31",
        "train_ratio=0.9",
        "batch_size",
        "accumulate",
        "raise train_ratio",
    ):
        assert word in message  # fmt: skip


def test_too_few_tokens_to_validate_on():
    windows = gptk.Windows(np.arange(64), 64)
    with pytest.raises(gptk.DataError) as caught:
        check_enough(windows, 1, which="validation", context_length=64, train_ratio=0.95)
    for word in ("validation", "64 tokens", "65 tokens", "0 windows", "lower train_ratio"):
        assert word in str(caught.value)
    with pytest.raises(gptk.DataError) as caught:
        check_enough(windows, 1, which="validation", context_length=64, train_ratio=None)
    assert "train_ratio" not in str(caught.value)
