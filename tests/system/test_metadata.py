"""Files that anybody may have written are read strictly, or refused in one line."""

import json
import os
import socket
import sys

import pydantic
import pytest

import gptk
from gptk.plugins import Fields, open_regular, parse_json, read_json, read_text, shown


def refusal(function, *arguments):
    with pytest.raises(gptk.SourceError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


def test_json_is_what_json_reads(tmp_path):
    value = {"a": [1, 2.5, None, True, "é\U0001f600"], "b": {"c": {}}, "n": 10**30}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == value
    assert parse_json(json.dumps(value, ensure_ascii=False), "x") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"b": {"a": 1, "c": 0, "a": 1}}', "the key 'a' occurs twice"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": -Infinity}', "-Infinity is no number of JSON"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "a number has 5,000 digits"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 100 deep"),
        ('{"a":' * 20_000 + "1" + "}" * 20_000, "nested more than 100 deep"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested more than 100 deep"),
        (r'{"a": "\ud800"}', "half of a surrogate pair"),
        (r'{"\udc00": 1}', "half of a surrogate pair"),
        ("[1]", "holds no JSON object"),
        ("1", "holds no JSON object"),
        ("", "is not valid JSON: Expecting value"),
        ('{"a": 1', "is not valid JSON"),
        ("\ufeff{}", "is not valid JSON"),
    ],
)
def test_what_json_leaves_open_is_refused(text, message):
    found = refusal(parse_json, text, "the file")
    assert message in found
    assert found.startswith("the file ")


def test_pairs_of_surrogates_and_99_levels_are_read():
    assert parse_json(r'{"a": "\ud83d\ude00"}', "x") == {"a": "\U0001f600"}
    assert parse_json('{"a": ' + "[" * 99 + "]" * 99 + "}", "x")


def test_text_that_is_no_utf8_or_too_large_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": "\xff"}')
    assert "is not UTF-8 at byte 7" in refusal(read_json, path)
    with pytest.raises(gptk.SourceError, match="has 10 bytes; such a file has 9 at most"):
        read_text(path, max_bytes=9)
    os.truncate(path, 10**12)  # a sparse file: were it read, memory would not do
    assert "has 1,000,000,000,000 bytes" in refusal(read_json, path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
def test_only_regular_files_and_links_to_them_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(tmp_path / "socket"))
    server.close()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "to-fifo").symlink_to("fifo")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in {
        "fifo": "is a FIFO, not a file",
        "to-fifo": "is a FIFO, not a file",
        "socket": "is a socket, not a file",
        "folder": "is a directory, not a file",
        "dangling": "there is no such file",
        "nothing": "there is no such file",
        "file/x": "there is no such file",
        "loop": "cannot be read: Too many levels of symbolic links",
        "x" * 300: "cannot be read: File name too long",
        "a\0b": "cannot be read: embedded null byte",
    }.items():
        assert message in refusal(open_regular, tmp_path / name)
    assert "is a device, not a file" in refusal(open_regular, "/dev/zero")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"x"


@pytest.mark.skipif(
    sys.platform == "win32" or os.getuid() == 0, reason="permissions are not checked here"
)
def test_a_file_that_may_not_be_read_says_so(tmp_path):
    (tmp_path / "x").touch(mode=0)
    assert "cannot be read: Permission denied" in refusal(open_regular, tmp_path / "x")


def test_an_error_of_the_callers_choice_is_raised(tmp_path):
    with pytest.raises(gptk.TokenizerError, match="there is no such file"):
        read_json(tmp_path / "x", gptk.TokenizerError)
    with pytest.raises(gptk.TokenizerError, match="has no size"):
        Part.parse({}, "x", gptk.TokenizerError)


class Part(Fields):
    size: int = pydantic.Field(ge=1)
    scale: float = 1.0
    name: str | None = None
    ids: list[int] = pydantic.Field(default_factory=list)


def test_fields_are_typed_and_nothing_is_converted():
    part = Part.parse({"size": 3, "scale": 2, "unknown": object()}, "x")
    assert (part.size, part.scale, part.name) == (3, 2.0, None)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "x.json has no size"),
        ({"size": "64"}, "x.json: size is '64'; it must be a whole number"),
        ({"size": True}, "x.json: size is True; it must be a whole number"),
        ({"size": 64.5}, "x.json: size is 64.5; it must be a whole number"),
        ({"size": 0}, "x.json: size is 0; it must be 1 or more"),
        ({"size": 1, "scale": float("nan")}, "x.json: scale is nan; it must be a finite number"),
        ({"size": 1, "scale": "1"}, "x.json: scale is '1'; it must be a number"),
        ({"size": 1, "name": 3}, "x.json: name is 3; it must be a string"),
        ({"size": 1, "ids": [1, "2"]}, "x.json: ids.1 is '2'; it must be a whole number"),
        ({"size": 1, "ids": {"a": 1}}, "x.json: ids is {'a': 1}; it must be a list"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(raw, message):
    assert refusal(Part.parse, raw, "x.json") == message


def test_values_in_messages_are_short():
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    for value in ("x" * 10**6, deep, list(range(10**6)), 10**900, {"a": {"b": {"c": {"d": 1}}}}):
        assert len(shown(value)) < 100
    assert shown([1, "a", None]) == "[1, 'a', None]"


def test_messages_are_one_line_that_can_be_printed():
    error = gptk.SourceError("a\nb\x1b[31m\udcff\u202ec é 東")
    assert str(error) == "a b\\x1b[31m\\udcff\\u202ec é 東"
