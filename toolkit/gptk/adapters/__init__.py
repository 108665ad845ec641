"""Logits processors across libraries: a processor written once runs in gptk and elsewhere.

`gptk.adapters.transformers` converts logits processors and stopping criteria of Hugging Face
transformers for gptk, and gptk's processors for transformers; `gptk.adapters.llama_cpp` converts
gptk's processors for llama-cpp-python. Neither package is loaded before its module is imported.
"""
