"""An engine in a process of its own, by the Python of an environment of its own.

    PYTHON peer_process.py gptk|llama.cpp|openvino|transformers MODEL SETTINGS

Reads pieces of work, a line of JSON each (`ids`, `new`, `beams`), does them and writes the seconds
that they took. SETTINGS is JSON, see the engines below. Only the engine is imported: other
environments have no gptk and no pytest.
"""

import json
import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[int], int, int], int]
"""Continues a prompt greedily, or by beams, and returns how many tokens it has generated."""


def gptk_engine(model: str, **settings: str) -> Generate:
    import gptk
    from gptk.engine.engine import ENGINE

    lm = gptk.load(model, device="cpu", **settings)

    def generate(ids: list[int], new: int, beams: int) -> int:
        ENGINE.call(lambda: ENGINE.passes(lm.model).pool.forget_unused())
        sampler = f"beam:width={beams}" if beams > 1 else "greedy"
        out = lm.generate(ids, max_new_tokens=new, ignore_eos=True, sampler=sampler)
        return len(out.tokens)

    return generate


def llama_cpp_engine(model: str, *, context: int, flash_attn: bool) -> Generate:
    import llama_cpp

    threads = thread_count()
    llama = llama_cpp.Llama(
        model,
        n_ctx=context,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=flash_attn,
        verbose=False,
    )

    def generate(ids: list[int], new: int, beams: int) -> int:
        assert beams == 1
        llama.reset()  # clears the last round's cache
        for count, _ in enumerate(llama.generate(ids, temp=0.0), 1):
            if count == new:
                return count
        return 0

    return generate


def openvino_engine(model: str) -> Generate:
    import numpy as np
    import openvino
    import openvino_genai

    scheduling = openvino_genai.SchedulerConfig()
    scheduling.enable_prefix_caching = False  # the next round's prompt is the same
    pipeline = openvino_genai.LLMPipeline(
        model, "CPU", scheduler_config=scheduling, INFERENCE_NUM_THREADS=thread_count()
    )

    def generate(ids: list[int], new: int, beams: int) -> int:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.num_beams = new, True, beams
        row = np.array([ids], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(row), openvino.Tensor(np.ones_like(row))
        )
        return len(pipeline.generate(inputs, config).tokens[0])

    return generate


def transformers_engine(model: str, *, dtype: str) -> Generate:
    import torch
    import transformers

    folder, file = os.path.split(model)
    lm = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=getattr(torch, dtype)
    ).eval()

    def generate(ids: list[int], new: int, beams: int) -> int:
        rows = torch.tensor([ids])
        out = lm.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=new,
            min_new_tokens=new,
            num_beams=beams,
            do_sample=False,
            pad_token_id=0,
        )
        return int(out.shape[1]) - len(ids)

    return generate


ENGINES: dict[str, Callable[..., Generate]] = {
    "gptk": gptk_engine,
    "llama.cpp": llama_cpp_engine,
    "openvino": openvino_engine,
    "transformers": transformers_engine,
}


def thread_count() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def main(engine: str, model: str, settings: str) -> None:
    generate = ENGINES[engine](model, **json.loads(settings))
    for line in sys.stdin:
        work = json.loads(line)
        start = time.perf_counter()
        count = generate(work["ids"], work["new"], work["beams"])
        seconds = time.perf_counter() - start
        assert count == work["new"], f"{count} tokens, not {work['new']}"
        print(f"seconds {seconds}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
