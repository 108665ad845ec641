"""Run by test_processors.py in a process of its own: every precision of a model, on this processor.

Prints for each what it did, as JSON: whether it raised, and how far its log-probabilities are from
those of the model in float32.
"""

import itertools
import json
import logging
import sys

import numpy as np
import torch

import gptk
from gptk import kernels

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("auto", "none", "int8", "int4")


def main(path: str) -> None:
    notices: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notices.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gptk").addHandler(handler)
    ids = [[token * token % 97 for token in range(length)] for length in (3, 9, 100)]
    plain = gptk.load(path, device="cpu", quantize="none", tokenizer="bytes")
    want = torch.tensor(plain.score(ids[2]).token_logprobs)
    tokens = plain.generate(ids[2], max_new_tokens=8).tokens
    found = {}
    for dtype, quantize in itertools.product(DTYPES, QUANTIZE):
        try:
            lm = gptk.load(path, device="cpu", dtype=dtype, quantize=quantize, tokenizer="bytes")
            one = lm.generate(ids[2], max_new_tokens=8)
            lm.generate_batch(ids, max_new_tokens=8, seed=1, sampler="top-p:p=0.9")
            lm.generate_batch(ids, max_new_tokens=8, sampler="beam:width=3")
            lm.generate(ids[0], max_new_tokens=8, draft="lookup:ngram=1,tokens=4")
            error = torch.tensor(lm.score(ids[2]).token_logprobs) - want
            found[f"{dtype} {quantize}"] = {
                "error": float(error.abs().mean()),
                "same": one.tokens == tokens,
                "model": str(lm.model.dtype),
            }
        except Exception as error:
            found[f"{dtype} {quantize}"] = {"raised": f"{type(error).__name__}: {error}"}
    for dtype in ("auto", "float32", "bfloat16"):
        try:
            model = gptk.load(path, device="cpu", tokenizer="bytes").model
            windows = gptk.Windows(np.arange(400) % 97, 16)
            config = gptk.TrainConfig(steps=1, batch_size=2, dtype=dtype)
            found[f"training {dtype}"] = {
                "loss": gptk.Trainer(model, windows, windows, config).step()["loss"]
            }
        except Exception as error:
            found[f"training {dtype}"] = {"raised": f"{type(error).__name__}: {error}"}
    print(json.dumps({"found": found, "notices": notices, "kernels": kernels.why_not()}))


if __name__ == "__main__":
    main(sys.argv[1])
