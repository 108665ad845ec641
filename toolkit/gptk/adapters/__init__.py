"""gptk together with other libraries. None of them is loaded before its module is imported.

A logits processor written once runs everywhere: `gptk.adapters.transformers` converts logits
processors and stopping criteria of Hugging Face transformers for gptk, and gptk's processors for
transformers; `gptk.adapters.llama_cpp` converts gptk's processors for llama-cpp-python.
`gptk.adapters.ray` distributes prompts among workers by Ray Data. `gptk.adapters.lm_eval` is a
model for lm-evaluation-harness.
"""
