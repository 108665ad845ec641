"""Makes the checkpoints beside it: GPT-2 as OpenAI's TensorFlow code names and saves it, tiny.

    pip install tensorflow-cpu==2.18.1
    python make_fixture.py

Not run by the tests. It was run with that version on Python 3.11. `tiny` is one data file, and
`two-shards` the same variables in two, as a saver writes them that found them on two devices.
`expected.npz` holds what the network of "Language Models are Unsupervised Multitask Learners"
(Radford et al. 2019), computed by TensorFlow with these variables, predicts for some ids:
`ids` (2, 10) and `logits` (2, 10, 280).
"""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import tensorflow as tf

HERE = Path(__file__).parent
HPARAMS = {"n_vocab": 280, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}
IDS = [[5, 279, 17, 256, 0, 101, 263, 32, 2, 2], [*range(240, 250)]]
TEXT = "the cat sat on the mat and the hat that the cat ate was the best hat in the land " * 3


def variables() -> dict[str, tf.Tensor]:
    """Every variable, by its name, with values that make predictions differ."""
    tf.compat.v1.disable_eager_execution()
    random = np.random.default_rng(0)
    width = HPARAMS["n_embd"]

    def variable(name: str, *shape: int, around: float = 0.0, spread: float = 0.3) -> tf.Tensor:
        # The saver makes a shard for each device.
        device = "/cpu:1" if "/h1/" in name else "/cpu:0"
        with tf.device(device):
            value = random.normal(around, spread, shape).astype(np.float32)
            return tf.compat.v1.get_variable(name, initializer=tf.constant(value))

    made = {
        "model/wpe": variable("model/wpe", HPARAMS["n_ctx"], width),
        "model/wte": variable("model/wte", HPARAMS["n_vocab"], width, spread=0.6),
    }
    for layer in range(HPARAMS["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            for part, around in (("g", 1.0), ("b", 0.0)):
                name = f"model/h{layer}/{norm}/{part}"
                made[name] = variable(name, width, around=around)
        for linear, inputs, outputs in (
            ("attn/c_attn", width, 3 * width),
            ("attn/c_proj", width, width),
            ("mlp/c_fc", width, 4 * width),
            ("mlp/c_proj", 4 * width, width),
        ):
            name = f"model/h{layer}/{linear}"
            made[f"{name}/w"] = variable(f"{name}/w", 1, inputs, outputs)
            made[f"{name}/b"] = variable(f"{name}/b", outputs)
    made["model/ln_f/g"] = variable("model/ln_f/g", width, around=1.0)
    made["model/ln_f/b"] = variable("model/ln_f/b", width)
    return made


def logits(model: dict[str, tf.Tensor], ids: tf.Tensor) -> tf.Tensor:
    """GPT-2's logits, (rows, time, vocab), for ids, (rows, time)."""
    width, n_heads = HPARAMS["n_embd"], HPARAMS["n_head"]
    time = ids.shape[1]
    later = tf.linalg.band_part(tf.ones((time, time)), 0, -1) - tf.eye(time)

    def norm(x: tf.Tensor, name: str) -> tf.Tensor:
        mean, variance = tf.nn.moments(x, axes=[-1], keepdims=True)
        scaled = (x - mean) * tf.math.rsqrt(variance + 1e-5)
        return scaled * model[f"{name}/g"] + model[f"{name}/b"]

    def linear(x: tf.Tensor, name: str) -> tf.Tensor:
        return tf.einsum("rti,io->rto", x, model[f"{name}/w"][0]) + model[f"{name}/b"]

    def gelu(x: tf.Tensor) -> tf.Tensor:
        return x / 2 * (1 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def heads(x: tf.Tensor) -> tf.Tensor:
        return tf.reshape(x, (-1, time, n_heads, width // n_heads))

    x = tf.gather(model["model/wte"], ids) + model["model/wpe"][:time]
    for layer in range(HPARAMS["n_layer"]):
        name = f"model/h{layer}"
        q, k, v = map(heads, tf.split(linear(norm(x, f"{name}/ln_1"), f"{name}/attn/c_attn"), 3, 2))
        scores = tf.einsum("rqhd,rkhd->rhqk", q, k) / math.sqrt(width // n_heads)
        weights = tf.nn.softmax(scores - 1e10 * later)
        mixed = tf.reshape(tf.einsum("rhqk,rkhd->rqhd", weights, v), (-1, time, width))
        x += linear(mixed, f"{name}/attn/c_proj")
        hidden = gelu(linear(norm(x, f"{name}/ln_2"), f"{name}/mlp/c_fc"))
        x += linear(hidden, f"{name}/mlp/c_proj")
    return tf.einsum("rtw,vw->rtv", norm(x, "model/ln_f"), model["model/wte"])


def tokenizer(folder: Path) -> None:
    """encoder.json and vocab.bpe with GPT-2's alphabet and a few merges learned from TEXT."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    alphabet = {byte: chr(byte) for byte in visible}
    alphabet |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    words = [[alphabet[byte] for byte in f" {word}".encode()] for word in TEXT.split()]
    tokens, merges = list(alphabet.values()), []
    while len(tokens) < HPARAMS["n_vocab"] - 1:
        pairs = [pair for word in words for pair in pairwise(word)]
        best = max(pairs, key=pairs.count)
        merges.append(best)
        tokens.append("".join(best))
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1
    tokens.append("<|endoftext|>")
    encoder = {token: number for number, token in enumerate(tokens)}
    (folder / "encoder.json").write_text(json.dumps(encoder))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "vocab.bpe").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    model = variables()
    config = tf.compat.v1.ConfigProto(device_count={"CPU": 2})
    with tf.compat.v1.Session(config=config) as session:
        session.run(tf.compat.v1.global_variables_initializer())
        for name, sharded in (("tiny", False), ("two-shards", True)):
            folder = HERE / name
            folder.mkdir(exist_ok=True)
            saver = tf.compat.v1.train.Saver(sharded=sharded, save_relative_paths=True)
            saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)
            (folder / "hparams.json").write_text(json.dumps(HPARAMS) + "\n")
        expected = session.run(logits(model, tf.constant(IDS)))
    tokenizer(HERE / "tiny")
    np.savez(HERE / "expected.npz", ids=np.array(IDS), logits=expected)


if __name__ == "__main__":
    main()
