"""What a user may set the memory for keys and values to."""

import pytest

import gptk
from gptk.system.kv_memory import Amount, kv_memory, read_amount


@pytest.fixture(autouse=True)
def _default():
    yield
    gptk.set_kv_memory(None)


@pytest.mark.parametrize(
    ("given", "bytes_of_1000"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("2GB", 2 * 10**9),
        (" 1.5 gib ", 3 * 2**29),
        ("800kB", 800_000),
        ("25%", 250),
        ("100 %", 1000),
        ("0.5%", 5),
    ],
)
def test_amounts(given, bytes_of_1000):
    gptk.set_kv_memory(given)
    assert kv_memory().bytes_of(1000.0) == bytes_of_1000


BAD = ["", "no", "-1GB", "0", "0%", "101%", "1e9", "2 potatoes", "nan", "9" * 400, "9" * 19 + "TB"]


@pytest.mark.parametrize("given", [*BAD, 0, -1, True, 2.5, 2**70, [1]])
def test_anything_else_is_refused_in_one_line(given):
    with pytest.raises(gptk.OptionError, match="is no amount; give bytes"):
        gptk.set_kv_memory(given)


def test_the_environment_variable(monkeypatch):
    assert kv_memory() == Amount(0.25, is_share=True)
    monkeypatch.setenv("GPTK_KV_MEMORY", "2GB")
    assert kv_memory() == Amount(2e9)
    gptk.set_kv_memory("1GB")
    assert kv_memory() == Amount(1e9)
    gptk.set_kv_memory(None)
    monkeypatch.setenv("GPTK_KV_MEMORY", "much")
    with pytest.raises(gptk.OptionError, match=r"^\$GPTK_KV_MEMORY: 'much' is no amount"):
        kv_memory()


def test_the_name_of_the_option_is_in_the_error():
    with pytest.raises(gptk.OptionError, match=r"^--kv-memory: 'x' is no amount"):
        read_amount("x", "--kv-memory")
