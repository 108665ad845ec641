"""Evaluation against the sliding window of transformers' guide to perplexity."""

import dataclasses
import io
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gptk
from checkpoints import CONFIGS, random_ids, random_model
from gptk import Tokenizer, evaluate, prepare_tokens
from gptk.measure.evaluation import token_logprobs
from gptk.testing import tiny_gpt, tiny_lm
from program import failing
from program import gptk as program
from toys import GPT2_LIKE, LLAMA_LIKE

WINDOW = 24
TEXT = "Once upon a time, in a village by the sea, naïve 한국어.\n" * 6


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def both(request, tmp_path_factory):
    """A random model of transformers with a short window, and gptk's reading of it."""
    size = "n_positions" if request.param == "gpt2" else "max_position_embeddings"
    config = transformers.CONFIG_MAPPING[request.param].from_dict(
        CONFIGS[request.param].to_dict() | {size: WINDOW}
    )
    with mock.patch.dict(CONFIGS, {request.param: config}):
        oracle = random_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    oracle.save_pretrained(folder)
    lm = gptk.load(str(folder), device="cpu", dtype="float32")
    assert lm.model.config.context_length == WINDOW
    return oracle, lm


def guide(model, ids, window, stride):
    """The loop in transformers' page on the perplexity of fixed-length models: nats, tokens.

    There the model shifts inputs and targets within a window of tokens, so that a window's first
    token is never predicted; here the two are shifted before windows are cut, and the model sees
    as many inputs.
    """
    inputs, targets = ids[:-1], ids[1:]
    nats, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(inputs), stride):
        end = min(begin + window, len(inputs))
        labels = targets[begin:end].clone()
        labels[: -(end - previous_end)] = -100
        with torch.no_grad():
            logits = model(inputs[None, begin:end]).logits[0]
        nats += F.cross_entropy(logits.double(), labels, reduction="sum").item()
        count += int((labels != -100).sum())
        previous_end = end
        if end == len(inputs):
            break
    return nats, count


@pytest.mark.parametrize("stride", [WINDOW, WINDOW // 2, WINDOW // 3, 5])
@pytest.mark.parametrize("length", [2, 24, 25, 26, 49, 97])
def test_the_loss_is_that_of_transformers_sliding_window(both, stride, length):
    model, lm = both
    ids = random_ids(length)[0]
    nats, count = guide(model, ids, WINDOW, stride)
    out = evaluate(lm, ids.tolist(), stride=stride, batch_size=3)
    assert (out.tokens, out.stride, out.context_length) == (count, stride, WINDOW)
    assert out.tokens == length - 1
    assert out.loss == pytest.approx(nats / count, abs=1e-5)
    assert out.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_the_loss_is_that_of_the_guides_own_code(both):
    """Its windows hold inputs and targets, so that each makes one prediction less than ours."""
    model, lm = both
    ids, stride, length = random_ids(150)[0][None], 9, WINDOW
    lm = gptk.LanguageModel(_shorter(lm.model, length - 1))
    losses, counts, previous_end = [], [], 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - previous_end)] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss
        counts.append(int((labels[:, 1:] != -100).sum()))
        losses.append(loss.item() * counts[-1])
        previous_end = end
        if end == ids.shape[1]:
            break
    out = evaluate(lm, ids[0].tolist(), stride=stride)
    assert out.tokens == sum(counts) == 149
    assert out.loss == pytest.approx(sum(losses) / sum(counts), abs=1e-5)


def _shorter(model, window):
    """The same weights with a shorter window."""
    config = dataclasses.replace(model.config, context_length=window)
    weights = model.state_dict()
    if "embed_positions.weight" in weights:
        weights["embed_positions.weight"] = weights["embed_positions.weight"][:window]
    return gptk.build_model(gptk.Checkpoint(config, weights), "cpu", torch.float32)


@given(st.integers(2, 90), st.integers(1, 32), st.integers(1, 4))
@settings(max_examples=20)
@example(33, 32, 1)
@example(34, 32, 1)
def test_every_token_is_scored_once_in_the_first_window_that_predicts_it(length, stride, batch):
    window, model = 32, tiny_gpt(GPT2_LIKE)
    ids = torch.arange(length) * 37 % 257
    nats, windows = 0.0, {}
    for position in range(1, length):
        begin = max(0, -(-(position - window) // stride)) * stride
        assert position - begin >= min(position, window - stride + 1)
        if begin not in windows:
            with torch.inference_mode():
                windows[begin] = model.logits(model(ids[None, begin : begin + window]))[0]
        logits = windows[begin][position - begin - 1]
        nats -= logits.double().log_softmax(-1)[ids[position]].item()
    seen = []
    out = evaluate(
        gptk.LanguageModel(model),
        ids.numpy(),
        stride=stride,
        batch_size=batch,
        progress=lambda *counts: seen.append(counts),
    )
    assert out.loss == pytest.approx(nats / (length - 1), abs=1e-5)
    assert seen[-1] == (length - 1, length - 1)
    assert seen == sorted(set(seen))


def test_a_text_within_the_window_gets_the_loss_of_score():
    lm = tiny_lm()
    out = evaluate(lm, lm.encode(TEXT[:60]))
    assert out.loss == pytest.approx(lm.score(TEXT[:60]).loss, abs=1e-6)
    assert (out.stride, out.context_length) == (48, 96)


def test_bits_per_byte_are_nats_over_the_bytes_of_the_scored_text(tmp_path):
    lm = tiny_lm()
    (tmp_path / "text.txt").write_text(TEXT)
    out = evaluate(lm, str(tmp_path / "text.txt"))
    assert out.bytes == out.tokens == len(TEXT.encode()) - 1
    assert out.bits_per_byte == pytest.approx(out.loss / math.log(2))
    assert out == evaluate(lm, prepare_tokens([str(tmp_path / "text.txt")], lm.tokenizer))
    assert out == evaluate(lm, [tmp_path / "text.txt"]) == evaluate(lm, lm.encode(TEXT))


def test_the_tokens_between_documents_are_scored_and_have_no_bytes(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(TEXT)
    out = evaluate(tiny_lm(), [str(tmp_path)])
    assert out.tokens == 2 * len(TEXT.encode())
    assert out.bytes == 2 * len(TEXT.encode()) - 1


def test_where_texts_begin_with_bos_the_first_token_is_scored(tmp_path):
    lm = tiny_lm()
    tokenizer = Tokenizer(lm.tokenizer.encoding, bos=256, add_bos=True)
    lm = gptk.LanguageModel(lm.model, tokenizer)
    (tmp_path / "text.txt").write_text(TEXT)
    out = evaluate(lm, str(tmp_path / "text.txt"))
    assert out.bytes == out.tokens == len(TEXT.encode())
    assert out.loss == pytest.approx(evaluate(lm, [256, *TEXT.encode()]).loss)


def test_without_a_tokenizer_there_are_no_bytes():
    out = evaluate(gptk.LanguageModel(tiny_gpt()), [1, 2, 3])
    assert (out.tokens, out.bytes, out.bits_per_byte) == (2, None, None)
    with pytest.raises(gptk.TokenizerError):
        evaluate(gptk.LanguageModel(tiny_gpt()), "builtin:python-docs")


@pytest.mark.parametrize("config", [GPT2_LIKE, LLAMA_LIKE])
def test_the_batch_size_and_packing_do_not_change_the_figures(config):
    ids = np.frombuffer(TEXT.encode(), dtype=np.uint8)
    lm = tiny_lm(config)
    loss = evaluate(lm, ids, stride=30, batch_size=1).loss
    for batch_size in (2, 1000, None):
        assert evaluate(lm, ids, stride=30, batch_size=batch_size).loss == pytest.approx(loss)
    lm.model.pack()
    assert evaluate(lm, ids, stride=30).loss == pytest.approx(loss, abs=1e-5)


def test_a_model_in_training_is_evaluated_without_dropout_and_goes_on_training():
    lm = tiny_lm()
    want = evaluate(lm, [*range(100)]).loss
    lm.model.set_dropout(0.5)
    lm.model.train()
    assert evaluate(lm, [*range(100)]).loss == want
    assert lm.model.training
    assert torch.is_grad_enabled()


def test_logits_never_stand_in_memory_for_more_than_a_part_of_a_batch():
    lm, rows, real = tiny_lm(), [], gptk.GPT.logits

    def logits(model, hidden):
        rows.append(len(hidden))
        return real(model, hidden)

    with mock.patch.object(gptk.GPT, "logits", logits):
        evaluate(lm, [*range(250)] * 10, batch_size=50)
    assert sum(rows) == 2499
    assert max(rows) == 256


def test_token_logprobs_are_log_softmax_at_the_targets():
    model = tiny_gpt()
    hidden, targets = torch.randn(600, 32), torch.arange(600) % 257
    with torch.inference_mode():
        want = model.logits(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        assert torch.allclose(token_logprobs(model, hidden, targets), want, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "settings", "error", "words"),
    [
        ([5], {}, gptk.DataError, ["two tokens", "1"]),
        ([], {}, gptk.DataError, ["two tokens", "0"]),
        ([5, 257], {}, gptk.DataError, ["257", "vocabulary"]),
        ([5, -1], {}, gptk.DataError, ["-1", "vocabulary"]),
        ([5, 6], {"stride": 97}, gptk.OptionError, ["stride is 97", "96"]),
        ([5, 6], {"stride": 0}, gptk.OptionError, ["stride is 0", "96"]),
        ([5, 6], {"batch_size": 0}, gptk.OptionError, ["batch_size is 0"]),
        ("none.txt", {}, gptk.DataError, ["none.txt"]),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(data, settings, error, words):
    with pytest.raises(error) as caught:
        evaluate(tiny_lm(), data, **settings)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_damaged_weights_are_told():
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.norm.weight[3] = math.nan
    with pytest.raises(gptk.DecodingError, match="the loss is nan"):
        evaluate(lm, [1, 2, 3])


@pytest.mark.slow
def test_smollm2_has_transformers_bits_per_byte(hf_smollm2):
    lm = gptk.load("smollm2", device="cpu", dtype="float32")
    lm = gptk.LanguageModel(_shorter(lm.model, 256), lm.tokenizer)
    ids = prepare_tokens(["builtin:python-docs"], lm.tokenizer).tokens[:1000]
    nats, count = guide(hf_smollm2, torch.from_numpy(ids.astype(np.int64)), 256, 128)
    out = evaluate(lm, ids)
    assert out.loss == pytest.approx(nats / count, abs=1e-4)
    size = len(lm.tokenizer.decode_bytes(ids[1:].tolist()))
    assert out.bits_per_byte == pytest.approx(nats / math.log(2) / size, abs=1e-4)


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    tiny_lm().save(path)
    return path


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_eval_prints_what_evaluate_gives(model, text_file):
    want = evaluate(tiny_lm(), str(text_file), stride=20)
    out = program("eval", "--model", model, "--data", text_file, "--stride", 20)
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    lines = dict(line.split("  ", 1) for line in out.stdout.splitlines())
    lines = {label: value.strip() for label, value in lines.items()}
    speed = lines.pop("speed")
    assert speed.endswith("tokens/s")
    assert lines == {
        "loss": f"{want.loss:.4f} nats/token",
        "perplexity": f"{want.perplexity:.4f}",
        "bits per byte": f"{want.bits_per_byte:.4f}",
        "tokens": f"{len(TEXT.encode()) - 1}",
        "bytes": f"{len(TEXT.encode()) - 1}",
        "window": "96",
        "stride": "20",
    }
    assert len({line.index(line.split("  ")[-1].strip()) for line in out.stdout.splitlines()}) == 1


def test_eval_prints_json(model, text_file):
    out = program("eval", "--model", model, "--data", text_file, "--json", "--batch-size", 2)
    record = json.loads(out.stdout)
    assert record.pop("tokens_per_second") > 0
    want = dataclasses.asdict(evaluate(tiny_lm(), str(text_file), batch_size=2))
    assert record == pytest.approx(want)


def test_eval_takes_the_first_tokens_of_several_texts(model, text_file):
    args = ("eval", "--model", model, "--data", text_file, "--data", "builtin:python-docs")
    length = len(TEXT.encode())
    out = json.loads(program(*args, "--max-tokens", length + 11, "--json").stdout)
    assert out["tokens"] == length + 10
    assert out["bytes"] == length + 9  # the end-of-text token between the two has none


def test_eval_takes_another_tokenizer(model, text_file):
    out = program("eval", "--model", model, "--data", text_file, "--tokenizer", "gpt2")
    assert out.returncode == 1
    assert "vocabulary of 257" in out.stderr
    assert len(out.stderr.splitlines()) == 1


def test_on_a_terminal_a_bar_shows_progress(model, text_file):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with mock.patch.object(io, "StringIO", Terminal), mock.patch.dict("os.environ", TERM="xterm"):
        out = program("eval", "--model", model, "--data", text_file)
    assert "Evaluating" in out.stderr
    assert "100%" in out.stderr
    assert "loss" in out.stdout


def test_mistakes_are_one_line(model, text_file, tmp_path):
    assert "--data" in failing("eval", "--model", model, code=2)
    assert "none.txt" in failing("eval", "--model", "none.gguf", "--data", "none.txt", code=1)
    line = failing("eval", "--model", model, "--data", text_file, "--stride", 97, code=2)
    assert "stride is 97" in line
    assert "x>=1" in failing("eval", "--data", text_file, "--stride", 0, code=2)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    line = failing("eval", "--model", model, "--data", tmp_path / "latin", code=1)
    assert "byte 3 is 0xe9" in line
    assert "none.gguf" in failing("eval", "--model", "none.gguf", "--data", text_file, code=1)
