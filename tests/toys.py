"""Small models that several tests share; more are in gptk.testing."""

from gptk import GPTConfig, Tokenizer
from gptk.testing.models import TINY as LLAMA_LIKE

VOCABULARY = 257

GPT2_LIKE = GPTConfig(
    vocab_size=VOCABULARY,
    context_length=32,
    width=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    head_dim=8,
    mlp_width=64,
)
# Options of the built-in processors that need some, or whose defaults change too little.
PROCESSOR_OPTIONS = {
    "bad-words": "words=[[1, 2], [5]]",
    "cfg": "negative=[3]",
    "choice": """choices='["ab", "b"]'""",
    "dry": "multiplier=0.8,allowed_length=1,sequence_breakers=[3]",
    "forced-tokens": "tokens=[5, 7],at=1",
    "grammar": """grammar='start: ("a" | "b")* "c"'""",
    "json-schema": 'schema={"type": "integer"}',
    "length-decay": "after=1,factor=1.5",
    "logit-bias": 'bias={"3": 2.5, "4": -100}',
    "min-new-tokens": "n=2",
    "no-repeat-ngram": "size=2",
    "regex": "pattern=[a-f]{2}x*",
    "sequence-bias": "biases=[[[3, 4], 2.5]]",
    "suppress-tokens": "tokens=[3, 4]",
    "top-k": "k=3",
}
CONFIGS = {"gpt2-like": GPT2_LIKE, "llama-like": LLAMA_LIKE}


def byte_tokenizer() -> Tokenizer:
    from gptk.weights.tokenizers import load_tokenizer

    return load_tokenizer("bytes")
