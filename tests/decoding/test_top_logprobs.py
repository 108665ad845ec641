"""The likeliest tokens of each step, before and after the processors."""

import pytest
import torch

import gptk
from gptk.testing import tiny_gpt, tiny_lm
from toys import GPT2_LIKE, PROCESSOR_OPTIONS

LM = tiny_lm()
PROMPT = "Once upon"
PROCESSORS = ["repetition-penalty:penalty=1.3", "temperature:temperature=0.7"]
SAMPLERS = [
    *(
        "greedy",
        "multinomial",
        "beam:width=3",
        "diverse-beam:width=4,beam_groups=2",
        "contrastive:k=3",
    ),
    *("stochastic-beam:width=3", "mirostat", "best-of-n:n=3", "beam-sample:width=3"),
]


def flat(out):
    return [out, *out.alternatives]


def plain_logits(model, tokens):
    with torch.inference_mode():
        return model.logits(model(torch.tensor([tokens])))[0]


def check(lm, out, k, processors):
    """Each step's tokens are those of the model, and of the processors, for the result's row."""
    names = [gptk.plugins.create("processor", name, gptk.LogitsProcessor) for name in processors]
    tokens = out.prompt_tokens + out.tokens
    logits = plain_logits(lm.model, tokens)
    assert len(out.top_logprobs) == len(out.tokens)
    for step, top in enumerate(out.top_logprobs):
        end = len(out.prompt_tokens) + step
        rows = gptk.Rows([tokens[:end]], prompt_lengths=[len(out.prompt_tokens)])
        after = logits[end - 1][None]
        for name in names:
            after = name.start(rows)(after, rows)
        for got, want in ((top.before, logits[end - 1][None]), (top.after, after)):
            best = want.log_softmax(-1)[0].topk(k)
            assert [entry.logprob for entry in got] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [entry.token for entry in got] == best.indices.tolist()
            assert [entry.text for entry in got] == [
                lm.tokenizer.decode([entry.token]) for entry in got
            ]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_they_are_those_of_the_row_of_each_result(sampler):
    """Against the model's logits of the whole text, and the processors called on them."""
    settings = {"sampler": sampler, "seed": 1, "max_new_tokens": 9, "processors": PROCESSORS}
    plain = LM.generate_batch([PROMPT, "x"], **settings)
    outs = LM.generate_batch([PROMPT, "x"], top_logprobs=4, **settings)
    own = gptk.plugins.create("sampler", sampler, gptk.Sampler).processors()
    for out, before in zip(outs, plain, strict=True):
        assert [result.tokens for result in flat(out)] == [result.tokens for result in flat(before)]
        assert before.top_logprobs is None
        for result in flat(out):
            if own:  # mirostat's truncation has a state that this test does not follow
                assert len(result.top_logprobs) == len(result.tokens)
            else:
                check(LM, result, 4, PROCESSORS)


def test_a_chosen_token_has_the_log_probability_that_is_reported_for_it():
    settings = {"sampler": "greedy", "processors": PROCESSORS, "max_new_tokens": 12}
    out = LM.generate(PROMPT, top_logprobs=1, **settings)
    for token, logprob, top in zip(out.tokens, out.token_logprobs, out.top_logprobs, strict=True):
        assert top.after[0].token == token
        assert top.after[0].logprob == pytest.approx(logprob, abs=1e-5)


@pytest.mark.parametrize("sampler", ["greedy", "multinomial"])
@pytest.mark.parametrize("draft", ["lookup:ngram=1,tokens=4", "model"])
def test_a_draft_changes_nothing(sampler, draft):
    settings = {"sampler": sampler, "seed": 3, "max_new_tokens": 20, "top_logprobs": 3}
    draft = LM if draft == "model" else draft
    prompts = ["abab abab ab", "x"]
    for out in LM.generate_batch(prompts, draft=draft, processors=PROCESSORS, **settings):
        check(LM, out, 3, PROCESSORS)


def test_a_sliding_window_has_those_of_its_last_tokens():
    lm = gptk.LanguageModel(tiny_gpt(GPT2_LIKE))
    window = GPT2_LIKE.context_length
    out = lm.generate([1] * 30, max_new_tokens=6, overflow="slide", top_logprobs=2)
    tokens = out.prompt_tokens + out.tokens
    for step, top in enumerate(out.top_logprobs):
        seen = tokens[: 30 + step][-window:]
        best = plain_logits(lm.model, seen)[-1].log_softmax(-1).topk(2)
        assert [entry.token for entry in top.before] == best.indices.tolist()
        assert [entry.logprob for entry in top.before] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )


def test_tokens_that_are_masked_are_left_out():
    out = LM.generate("x", processors=["top-k:k=2"], top_logprobs=5, max_new_tokens=3)
    for top in out.top_logprobs:
        assert (len(top.before), len(top.after)) == (5, 2)
        assert sum(2.718281828**entry.logprob for entry in top.after) == pytest.approx(1)


def test_more_than_the_vocabulary_are_all():
    out = LM.generate("x", top_logprobs=10_000, max_new_tokens=1)
    assert len(out.top_logprobs[0].before) == 257


@pytest.mark.parametrize("processor", sorted(gptk.plugins.provided("processor")))
def test_every_processor_has_its_tokens_kept(processor):
    options = PROCESSOR_OPTIONS.get(processor)
    spec = f"{processor}:{options}" if options else processor
    settings = {"sampler": "multinomial", "seed": 2, "max_new_tokens": 4, "processors": [spec]}
    plain = LM.generate("ab", **settings)
    out = LM.generate("ab", top_logprobs=257, **settings)
    assert out.tokens == plain.tokens
    for token, logprob, top in zip(out.tokens, out.token_logprobs, out.top_logprobs, strict=True):
        after = {entry.token: entry.logprob for entry in top.after}
        assert after[token] == pytest.approx(logprob, abs=1e-5)


def test_they_equal_transformers_logits_and_scores():
    """transformers' generate: `output_logits` are the model's, `output_scores` the processed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=299, pad_token_id=299,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = gptk.LanguageModel(_as_gpt(theirs))
    prompt = [5, 6, 7, 8]
    want = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, repetition_penalty=1.5,
        output_logits=True, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    out = ours.generate(
        prompt, max_new_tokens=8, processors=["repetition-penalty:penalty=1.5"], top_logprobs=6
    )
    assert out.tokens == want.sequences[0, 4:].tolist()
    for top, logits, scores in zip(out.top_logprobs, want.logits, want.scores, strict=True):
        for got, theirs_ in ((top.before, logits), (top.after, scores)):
            best = theirs_[0].log_softmax(-1).topk(6)
            assert [entry.token for entry in got] == best.indices.tolist()
            assert [entry.logprob for entry in got] == pytest.approx(best.values.tolist(), abs=1e-4)


def _as_gpt(theirs):
    """The same weights as a gptk.GPT."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return gptk.load(folder, dtype="float32").model
