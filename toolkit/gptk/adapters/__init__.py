"""Logits processors across libraries: a processor written once runs in gptk and elsewhere.

`gptk.adapters.transformers` takes processors and stopping criteria in from Hugging Face
transformers and gives processors out to its `generate`; `gptk.adapters.llama_cpp` gives
processors out to llama-cpp-python. Neither package is loaded before its module is imported.
"""
