"""`gptk tokenize`, run as a user runs it."""

import json
import subprocess
import sys

import pytest

import gptk
from gptk.testing import tiny_lm
from gptk.text.chat import conversation, encode_chat
from program import GPTK, failing
from program import gptk as run
from tokenizer_files import saved, trained

TEXT = "The lighthouse keeper 🙂漢"


def tokenize(*args, **settings):
    out = run("tokenize", *args, **settings)
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_each_token_is_a_line_with_its_id_and_its_text_or_bytes():
    assert tokenize(TEXT, "--tokenizer", "gpt2") == (
        "  464  'The'\n"
        "46371  ' lighthouse'\n"
        "28356  ' keeper'\n"
        "32485  ' 🙂'\n"
        "  162  b'\\xe6'\n"
        "  120  b'\\xbc'\n"
        "   95  b'\\xa2'\n"
    )
    assert tokenize("", "--tokenizer", "gpt2") == ""


def test_ids_count_and_json_say_the_same():
    ids = gptk.load_tokenizer("gpt2").encode(TEXT)
    assert tokenize(TEXT, "--tokenizer", "gpt2", "--ids") == " ".join(map(str, ids)) + "\n"
    assert tokenize(TEXT, "--tokenizer", "gpt2", "--count") == f"{len(ids)}\n"
    found = json.loads(tokenize(TEXT, "--tokenizer", "gpt2", "--json"))
    assert found["ids"] == ids
    assert found["tokens"][:2] == ["The", " lighthouse"]
    data = TEXT.encode()
    assert "".join(found["tokens"]) == "".join(
        data[start:end].decode(errors="replace") for start, end in found["offsets"]
    )
    assert (found["offsets"][0][0], found["offsets"][-1][1]) == (0, len(data))


def test_the_text_comes_from_standard_input_or_a_file(tmp_path):
    assert tokenize("--tokenizer", "bytes", "--ids", stdin="é\n\n") == "195 169 10\n"
    (tmp_path / "text.txt").write_text("é\r\n", encoding="utf-8", newline="")
    args = ("--tokenizer", "bytes", "--ids", "--file", tmp_path / "text.txt")
    assert tokenize(*args) == "195 169 13 10\n"


def test_decode_is_the_other_way():
    ids = tokenize(TEXT, "--tokenizer", "gpt2", "--ids")
    assert tokenize("--decode", ids.strip(), "--tokenizer", "gpt2") == TEXT + "\n"
    assert tokenize("--decode", "-", "--tokenizer", "gpt2", stdin=ids) == TEXT + "\n"
    assert tokenize("--decode", "[464, 3139]", "--tokenizer", "gpt2") == "The capital\n"


def test_the_default_model_is_that_of_generate(smollm2_path):
    assert gptk.default_source() == "smollm2"
    prompt = gptk.load_tokenizer(str(smollm2_path)).encode(TEXT)
    assert json.loads(tokenize(TEXT, "--json"))["ids"] == prompt
    assert json.loads(tokenize(TEXT, "--model", smollm2_path, "--json"))["ids"] == prompt
    assert json.loads(tokenize(TEXT, "--model", "smollm2", "--json"))["ids"] == prompt


def test_chat_shows_the_prompt_of_a_conversation():
    tokenizer = gptk.load_tokenizer("smollm2")
    prompt = encode_chat(tokenizer, conversation("Hi", "Be kind."))
    shown = tokenize("Hi", "--chat", "--system", "Be kind.", "--ids")
    assert list(map(int, shown.split())) == prompt


def test_the_model_is_any_that_gptk_loads(tmp_path, monkeypatch):
    tiny_lm().save(tmp_path / "own")
    assert tokenize("ab", "--model", tmp_path / "own", "--ids") == "97 98\n"
    folder = saved(trained(), tmp_path / "files")
    ids = gptk.load_tokenizer(str(folder)).encode("assert")
    assert tokenize("assert", "--model", folder, "--ids") == f"{ids[0]}\n"
    monkeypatch.setenv("GPTK_MODEL", str(tmp_path / "own"))
    assert tokenize("ab", "--ids") == "97 98\n"
    (tmp_path / "own" / "gptk.json").write_text("{")
    assert "gptk.json" in failing("tokenize", "a", "--model", tmp_path / "own", code=1)


@pytest.mark.parametrize("source", [[], ["--model", "smollm2"], ["--tokenizer", "gpt2"]])
def test_pytorch_is_not_imported(source):
    program = (
        "import sys; sys.argv[0] = 'gptk'\n"
        "from gptk.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    args = [sys.executable, "-c", program, "tokenize", "Hello", "--count", *source]
    out = subprocess.run(args, capture_output=True, text=True, check=False)
    assert (out.returncode, out.stdout) == (0, "1\n"), out.stderr


def test_a_locale_that_is_not_utf8_makes_no_difference(tmp_path):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PATH": "/usr/bin:/bin"}
    (tmp_path / "text.txt").write_text("é漢", encoding="utf-8")
    given = (["é漢"], ["--file", tmp_path / "text.txt"], [])
    for args in given:
        out = subprocess.run(
            [*GPTK, "tokenize", "--tokenizer", "gpt2", *args],
            input="é漢\n".encode(),
            capture_output=True,
            env={**environment, **inherited()},
            check=False,
        )
        assert out.returncode == 0, out.stderr
        assert out.stdout.splitlines()[0] == "2634  'é'".encode()


def inherited():
    import os

    return {name: os.environ[name] for name in ("PYTHONPATH", "HOME") if name in os.environ}


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        (["a", "--ids", "--count"], "one of --ids, --count and --json", 2),
        (["a", "--decode", "1"], "--decode works alone", 2),
        (["a", "--system", "x"], "--system works with --chat", 2),
        (["a", "--model", "x", "--tokenizer", "gpt2"], "not both", 2),
        (["--decode", "1 x 2", "--tokenizer", "gpt2"], "'x' is none", 2),
        (["--decode", "", "--tokenizer", "gpt2"], "there is none", 2),
        (["--decode", "99999999", "--tokenizer", "gpt2"], "no token has the id 99999999", 1),
        (["--file", "/no/such/file"], "/no/such/file", 2),
        (["a", "--tokenizer", "gpt3"], "did you mean gpt2", 2),
        (["a", "--model", "/no/such/model"], "/no/such/model", 1),
        (["a", "--chat", "--tokenizer", "gpt2"], "has no chat template", 1),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(args, words, code):
    assert words in failing("tokenize", *args, code=code)


def test_a_file_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "data").write_bytes(b"a\xff")
    line = failing("tokenize", "--file", tmp_path / "data", "--tokenizer", "gpt2", code=2)
    assert "not UTF-8 at byte 1" in line
    assert "not both" in failing("tokenize", "a", "--file", tmp_path / "data", code=2)
