"""vLLM on many prompts, run by the Python of an environment of its own.

    $VLLM_PYTHON vllm_many.py MODEL PROMPTS.json NEW

Reads a line for each round, continues all prompts greedily and writes the seconds.
"""

import json
import os
import sys
import time

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def main(folder: str, file: str, new: str) -> None:
    from vllm import LLM, SamplingParams

    with open(file, encoding="utf-8") as text:
        prompts = [{"prompt_token_ids": ids} for ids in json.load(text)]
    engine = LLM(folder, dtype="bfloat16", max_model_len=2048, enable_prefix_caching=False)
    settings = SamplingParams(temperature=0, max_tokens=int(new), ignore_eos=True)
    print("ready", file=sys.stderr, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        outputs = engine.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == int(new) for output in outputs)
        print(f"seconds {seconds}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
