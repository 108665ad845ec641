"""Adapters: a processor gives the same results in its own library and in another."""

import re
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import generation

import gptk
from gptk.adapters.llama_cpp import to_llama_cpp
from gptk.adapters.transformers import from_stopping_criteria, from_transformers, to_transformers
from gptk.plugins import create, provided
from toys import byte_tokenizer

VOCABULARY, EOS = 257, 256


@pytest.fixture(scope="module")
def theirs():
    """A random GPT-2 over bytes, as transformers runs it."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def lm(theirs, tmp_path_factory):
    """The same weights in gptk."""
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    model = gptk.build_model(gptk.load_checkpoint(str(folder)), "cpu", torch.float32)
    return gptk.LanguageModel(model, byte_tokenizer())


PROMPTS = [[104, 101, 108, 108, 111], [32, 97, 98, 97, 98, 97, 98, 33], [49]]


def fast_tokenizer():
    """The bytes as a tokenizer of transformers."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({**gptk.GPT2_ALPHABET, "<|endoftext|>": EOS}, [])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


def padded(prompts, pad=EOS):
    """input_ids and attention_mask, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def run(model, processors, prompts, tokens=10, **options):
    flat = [part for p in processors for part in (p if isinstance(p, list) else [p])]
    out = model.generate(
        **padded(prompts),
        max_new_tokens=tokens,
        logits_processor=generation.LogitsProcessorList(flat),
        return_dict_in_generate=True,
        output_scores=True,
        **{"do_sample": False, **options},
    )
    return out.sequences.tolist(), torch.stack(out.scores)


def continuation(model, processors, prompt, tokens=10, **options):
    """The new tokens of the first result, without EOS."""
    (row, *_), _ = run(model, processors, [prompt], tokens, **options)
    new = row[len(prompt) :]
    return new[: new.index(EOS)] if EOS in new else new


class ByHand(transformers.LogitsProcessor):
    """gptk's processors without an adapter: at each step started anew and fed token by token."""

    def __init__(self, specs, prompts, beams=1, model=None):
        self.model = model
        self.processors = [create("processor", spec, gptk.LogitsProcessor) for spec in specs]
        self.prompts = [prompt for prompt in prompts for _ in range(beams)]
        self.columns = max(map(len, prompts))

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, prompt in enumerate(self.prompts):
            new = input_ids[row, self.columns :].tolist()
            if EOS in new:
                continue
            rows = gptk.Rows([prompt], eos=(EOS,), tokenizer=byte_tokenizer(), model=self.model)
            processes = [processor.start(rows) for processor in self.processors]
            for token in new:
                for follower in (rows, *processes):
                    if isinstance(follower, gptk.Follower):
                        follower.extend(torch.tensor([[token]]))
            for process in processes:
                scores[row] = process(scores[row : row + 1], rows)[0]
        return scores


class Counting(gptk.LogitsProcessor):
    """Lowers a token's logit each time that a row gets it; its follower checks the rows."""

    name = "counting"

    weight: float = 3.0

    def start(self, rows):
        return Counts(self.weight, rows)


class Counts(gptk.Follower):
    def __init__(self, weight, rows):
        self.weight = weight
        self.history = [[] for _ in range(len(rows))]
        self.prompts = [self.tokens(rows, row) for row in range(len(rows))]

    @staticmethod
    def tokens(rows, row):
        return rows.tokens[row, : rows.lengths[row]].tolist()

    def extend(self, tokens):
        for history, new in zip(self.history, tokens.tolist(), strict=True):
            history += new

    def select(self, parents):
        self.history = [list(self.history[parent]) for parent in parents]
        self.prompts = [self.prompts[parent] for parent in parents]

    def rewind(self, counts):
        for history, count in zip(self.history, counts, strict=True):
            del history[len(history) - count :]

    def __call__(self, logits, rows):
        logits = logits.clone()
        for row, history in enumerate(self.history):
            assert self.prompts[row] + history == self.tokens(rows, row)
            assert rows.prompt_lengths[row] == len(self.prompts[row])
            for token in history:
                logits[row, token] -= self.weight
        return logits


SPECS = [
    f"{name}:{found.item.example}" if found.item.example else name
    for name, found in provided("processor").items()
]


FILES = {
    "arithmetic.lark": 'start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,3}/\n',
    "person.json": '{"type": "object", "properties": {"age": {"type": "integer"}}}',
}
"""Files that the processors' examples name."""


@pytest.mark.parametrize("spec", SPECS)
def test_a_processor_in_generate_equals_itself_by_hand(theirs, lm, spec, tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    for beams in (1, 3):
        by_hand = ByHand([spec], PROMPTS[:1], beams, lm.model)
        want = run(theirs, [by_hand], PROMPTS[:1], num_beams=beams)
        adapter = to_transformers(spec, tokenizer=byte_tokenizer(), model=lm.model, num_beams=beams)
        got = run(theirs, [adapter], PROMPTS[:1], num_beams=beams)
        assert got[0] == want[0]
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-4)


STACK = [Counting(), "repetition-penalty:penalty=1.3", "top-k:k=60"]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_padded_batch_is_processed_as_its_rows_alone(theirs, beams):
    """Rows end at different steps here, so the adapter also has to leave ended rows as they are."""
    got = run(
        theirs,
        [to_transformers(STACK, pad_token_id=EOS, eos=[EOS])],
        PROMPTS,
        tokens=30,
        num_beams=beams,
    )
    want = run(theirs, [ByHand(STACK, PROMPTS, beams)], PROMPTS, tokens=30, num_beams=beams)
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])


def test_without_pad_token_id_padding_belongs_to_the_prompt():
    seen = []

    class Look(gptk.LogitsProcessor):
        name = "look"

        def __call__(self, logits, rows):
            seen.append([rows.tokens[i, :n].tolist() for i, n in enumerate(rows.lengths)])
            return logits

    ids = padded([[7, 8], [EOS, 9, EOS, 10]])["input_ids"]
    to_transformers(Look())(ids, torch.zeros(2, VOCABULARY))
    to_transformers(Look(), pad_token_id=EOS)(ids, torch.zeros(2, VOCABULARY))
    to_transformers(Look(), pad_token_id=10)(torch.tensor([[10, 10]]), torch.zeros(1, VOCABULARY))
    assert seen[0] == [[EOS, EOS, 7, 8], [EOS, 9, EOS, 10]]
    assert seen[1] == [[7, 8], [9, EOS, 10]]
    assert seen[2] == [[10]], "a prompt keeps a token"


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}])
def test_assisted_decoding_gives_what_plain_decoding_gives(theirs, options):
    """Guesses go through the processors and are taken back, by two models that share these."""
    if "assistant_model" in options:
        options = {"assistant_model": theirs}
    prompt = PROMPTS[1]
    stack = [Counting(weight=1.0), "repetition-penalty:penalty=1.05"]
    want = run(theirs, [ByHand(stack, [prompt])], [prompt], tokens=20)[0]
    got = run(theirs, [to_transformers(stack, eos=[EOS])], [prompt], tokens=20, **options)[0]
    assert got == want


def test_sampling_draws_from_the_processed_distribution(theirs):
    options = {"do_sample": True, "num_return_sequences": 4, "tokens": 12}
    torch.manual_seed(1)
    want = run(theirs, [ByHand(STACK, PROMPTS[:1], 4)], PROMPTS[:1], **options)
    torch.manual_seed(1)
    got = run(theirs, [to_transformers(STACK, eos=[EOS])], PROMPTS[:1], **options)
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])


@st.composite
def evolutions(draw):
    """input_ids as a loop might call with: rows reordered, shortened, and one token longer."""
    count, prompt = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    token = st.integers(0, 3)
    rows = draw(st.lists(st.lists(token, min_size=prompt, max_size=prompt), min_size=count))
    steps = [rows]
    for _ in range(draw(st.integers(1, 8))):
        back = draw(st.integers(0, min(2, len(rows[0]) - prompt)))
        parents = draw(st.lists(st.integers(0, len(rows) - 1), min_size=1))
        parents = (parents * len(rows))[: len(rows)]
        kept = len(rows[0]) - back
        rows = [[*rows[parent][:kept], draw(token)] for parent in parents]
        steps.append(rows)
    return prompt, steps


@settings(max_examples=200)
@given(evolution=evolutions(), eos=st.sampled_from([(), (3,)]))
def test_state_follows_however_the_rows_move(evolution, eos):
    prompt, steps = evolution
    adapter = to_transformers(Counting(weight=1.0), eos=eos)
    for rows in steps:
        scores = torch.rand(len(rows), 4)
        want = scores.clone()
        for row, tokens in enumerate(rows):
            if not set(eos) & set(tokens[prompt:]):
                for token in tokens[prompt:]:
                    want[row, token] -= 1.0
        torch.testing.assert_close(adapter(torch.tensor(rows), scores), want)


def test_an_adapter_begins_anew_with_another_prompt_and_after_reset():
    adapter = to_transformers(Counting(weight=1.0))

    def penalties(*tokens):
        return adapter(torch.tensor([tokens]), torch.zeros(1, 4))[0].tolist()

    assert penalties(1, 2) == [0, 0, 0, 0]
    assert penalties(1, 2, 3) == [0, 0, 0, -1]
    assert penalties(1, 2) == [0, 0, 0, 0], "the same prompt again"
    assert penalties(1, 2, 0) == [-1, 0, 0, 0]
    assert penalties(2, 2) == [0, 0, 0, 0]
    assert penalties(2, 2, 1, 1) == [0, 0, 0, 0], "two tokens at once are a new prompt"
    adapter.reset()
    assert penalties(2, 2, 1, 1, 1) == [0, 0, 0, 0]
    assert adapter(torch.tensor([[2], [2]]), torch.zeros(2, 4)).sum() == 0


def test_prompt_length_says_what_is_new_from_the_first_call_on():
    adapter = to_transformers(Counting(weight=1.0), prompt_length=2)
    assert adapter(torch.tensor([[1, 2, 3, 3]]), torch.zeros(1, 4)).tolist() == [[0, 0, 0, -2]]
    with pytest.raises(gptk.OptionError, match="prompt_length is 2, but the rows have 1 tokens"):
        adapter(torch.tensor([[1]]), torch.zeros(1, 4))
    with pytest.raises(gptk.OptionError, match="prompt_length is 0; it must be 1 or more"):
        to_transformers("top-k", prompt_length=0)


def test_after_an_error_the_rows_are_started_again():
    """The second follower fails once, when the first has moved already."""

    class Fails(Counting):
        name = "fails"

        def start(self, rows):
            return Failing(self.weight, rows)

    failures = []

    class Failing(Counts):
        def extend(self, tokens):
            if 2 in tokens and not failures:
                failures.append(tokens)
                raise gptk.DecodingError("two")
            super().extend(tokens)

    adapter = to_transformers([Counting(weight=1.0), Fails(weight=0.5)], prompt_length=1)
    adapter(torch.tensor([[0, 1]]), torch.zeros(1, 4))
    with pytest.raises(gptk.DecodingError, match="two"):
        adapter(torch.tensor([[0, 1, 2]]), torch.zeros(1, 4))
    got = adapter(torch.tensor([[0, 1, 2]]), torch.zeros(1, 4))
    assert got.tolist() == [[0, -1.5, -1.5, 0]]


def test_scores_keep_their_type_and_are_not_changed():
    scores = torch.randn(2, VOCABULARY, dtype=torch.bfloat16)
    before = scores.clone()
    got = to_transformers("top-k:k=3")(torch.tensor([[1], [2]]), scores)
    assert got.dtype == torch.bfloat16
    assert torch.equal(scores, before)
    assert (got > -torch.inf).sum(1).tolist() == [3, 3]


def test_a_fast_tokenizer_of_transformers_serves_as_one_of_gptks():
    seen = []

    class Look(gptk.LogitsProcessor):
        name = "look"

        def __call__(self, logits, rows):
            seen.append((rows.tokenizer.decode(rows.tokens[0].tolist()), rows.eos))
            return logits

    fast = fast_tokenizer()
    ids = torch.tensor([fast("Grüße")["input_ids"]])
    to_transformers(Look(), tokenizer=fast)(ids, torch.zeros(1, 4))
    assert seen == [("Grüße", (EOS,))]
    with pytest.raises(gptk.TokenizerError, match="give a fast tokenizer"):
        to_transformers(Look(), tokenizer=object())


# --- From transformers -------------------------------------------------------------------------


class FirstLetters(transformers.LogitsProcessor):
    """A user's processor that writes into the scores it gets."""

    def __call__(self, input_ids, scores):
        scores[:, 128:EOS] = -torch.inf
        return scores


def only_lower(batch_id, tokens):
    return [*range(97 + batch_id, 123), EOS]


EVERYTHING = {
    "repetition-penalty": lambda: transformers.RepetitionPenaltyLogitsProcessor(1.3),
    "no-repeat-ngram": lambda: transformers.NoRepeatNGramLogitsProcessor(2),
    "min-length": lambda: transformers.MinLengthLogitsProcessor(12, EOS),
    "bad-words": lambda: transformers.NoBadWordsLogitsProcessor([[65], [66, 67]], EOS),
    "sequence-bias": lambda: transformers.SequenceBiasLogitsProcessor(
        [[[70], 4.0], [[70, 71], 9.0]]
    ),
    "encoder-repetition": lambda: transformers.EncoderRepetitionPenaltyLogitsProcessor(
        1.5, torch.tensor([[90, 91, 92]])
    ),
    "encoder-ngram": lambda: transformers.EncoderNoRepeatNGramLogitsProcessor(
        2, torch.tensor([[90, 91, 92]])
    ),
    "prefix": lambda: transformers.PrefixConstrainedLogitsProcessor(only_lower, 1),
    "forced-eos": lambda: transformers.ForcedEOSTokenLogitsProcessor(14, EOS),
    "suppress": lambda: transformers.SuppressTokensLogitsProcessor(range(0, 200, 3)),
    "suppress-first": lambda: transformers.SuppressTokensAtBeginLogitsProcessor(range(100), 5),
    "decay": lambda: transformers.ExponentialDecayLengthPenalty((3, 1.5), EOS, 5),
    "remove-nan": lambda: transformers.InfNanRemoveLogitsProcessor(),
    "normalize": lambda: transformers.LogitNormalization(),
    "watermark": lambda: transformers.WatermarkLogitsProcessor(VOCABULARY, "cpu", bias=4.0),
    "temperature": lambda: transformers.TemperatureLogitsWarper(0.5),
    "top-k": lambda: transformers.TopKLogitsWarper(5),
    "top-p": lambda: transformers.TopPLogitsWarper(0.7),
    "top-h": lambda: transformers.TopHLogitsWarper(0.5),
    "min-p": lambda: transformers.MinPLogitsWarper(0.2),
    "typical": lambda: transformers.TypicalLogitsWarper(0.6),
    "epsilon": lambda: transformers.EpsilonLogitsWarper(0.02),
    "eta": lambda: transformers.EtaLogitsWarper(0.05),
    "own": FirstLetters,
    "list": lambda: generation.LogitsProcessorList(
        [
            transformers.NoRepeatNGramLogitsProcessor(1),
            transformers.TemperatureLogitsWarper(0.8),
            transformers.TopPLogitsWarper(0.9),
        ]
    ),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_their_processor_gives_the_same_greedy_text_in_gptk(theirs, lm, name):
    got = lm.generate(PROMPTS[0], processors=[from_transformers(EVERYTHING[name]())])
    want = continuation(theirs, [EVERYTHING[name]()], PROMPTS[0], tokens=len(got.tokens) + 1)
    assert got.tokens == want[: len(got.tokens)]
    assert got.finish_reason == "eos" or len(got.tokens) == len(want) - 1


@pytest.mark.parametrize("name", EVERYTHING)
def test_their_processor_gives_the_same_distribution_to_each_row_of_a_batch(theirs, lm, name):
    """Each token drawn has the probability that it has in transformers for the prompt alone."""
    batch = lm.generate_batch(
        PROMPTS,
        sampler="multinomial",
        n=2,
        seed=3,
        max_new_tokens=6,
        processors=[from_transformers(EVERYTHING[name]())],
    )
    for index, (prompt, best) in enumerate(zip(PROMPTS, batch, strict=True)):
        for out in (best, *best.alternatives):
            ids = torch.tensor([prompt + out.tokens])
            with torch.no_grad():
                logits = theirs(ids).logits[0, len(prompt) - 1 :].float()
            process = EVERYTHING[name]()
            if name == "prefix":
                process = transformers.PrefixConstrainedLogitsProcessor(
                    lambda _, tokens, index=index: only_lower(index, tokens), 1
                )
            for step, token in enumerate(out.tokens):
                prefix = ids[:, : len(prompt) + step]
                want = process(prefix, logits[step : step + 1].clone()).log_softmax(-1)[0, token]
                assert out.token_logprobs[step] == pytest.approx(float(want), abs=1e-3)


def test_their_processor_goes_with_beams_and_does_not_change_its_input(lm):
    scores = torch.randn(2, VOCABULARY)
    before = scores.clone()
    processor = from_transformers(FirstLetters())
    got = processor(scores, gptk.Rows(PROMPTS[:2]))
    assert torch.equal(scores, before)
    assert got[:, 128:EOS].max() == -torch.inf
    out = lm.generate(PROMPTS[0], sampler="beam:width=3", processors=[processor], n=3)
    for result in (out, *out.alternatives):
        assert max(result.tokens) < 128


SAMPLERS = [
    f"{name}:{found.item.example}" if found.item.example else name
    for name, found in provided("sampler").items()
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_under_every_sampler_theirs_give_what_ours_give(lm, sampler):
    def results(processors):
        batch = lm.generate_batch(
            PROMPTS, sampler=sampler, processors=processors, seed=5, max_new_tokens=8
        )
        return [out.tokens for out in batch]

    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.5), transformers.TopKLogitsWarper(9)
    ours = ["repetition-penalty:penalty=1.5", "top-k:k=9"]
    assert results([from_transformers(processor) for processor in theirs]) == results(ours)


@pytest.mark.parametrize("name", EVERYTHING)
def test_out_of_and_back_into_transformers_is_the_same(theirs, name):
    for beams in (1, 3):
        processor = EVERYTHING[name]()
        if name == "prefix":
            processor._num_beams = beams
        want = run(theirs, [processor], PROMPTS[:1], num_beams=beams)
        back = to_transformers(from_transformers(EVERYTHING[name]()), num_beams=beams)
        got = run(theirs, [back], PROMPTS[:1], num_beams=beams)
        assert got[0] == want[0]
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-6)


def test_into_and_back_out_of_transformers_is_the_processor_itself():
    processor = Counting()
    assert from_transformers(to_transformers(processor)) is processor


# Processors that remember earlier calls.


def synthid():
    return transformers.SynthIDTextWatermarkLogitsProcessor(
        3, [11, 5, 8, 2], 2**8, 7, 64, torch.device("cpu")
    )


def guided(model):
    return transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(
        1.5, model, unconditional_ids=torch.tensor([[120, 121]])
    )


@pytest.mark.parametrize("negative", [[120, 121], [49], None])
def test_guidance_here_and_in_transformers_is_the_same(theirs, lm, negative):
    """On the same logits, at each step of a text, with and without a negative prompt."""
    ids = torch.tensor([negative]) if negative else None
    guidance = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(
        1.5, theirs, unconditional_ids=ids
    )
    spec = "cfg:scale=1.5" + (f",negative={negative}" if negative else "")
    rows = gptk.Rows(PROMPTS[:1], model=lm.model)
    process = create("processor", spec, gptk.LogitsProcessor).start(rows)
    tokens = list(PROMPTS[0])
    for _ in range(8):
        with torch.no_grad():
            logits = theirs(torch.tensor([tokens])).logits[:, -1]
            want = guidance(torch.tensor([tokens]), logits)
        got = process(logits, rows)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        tokens.append(int(want.argmax()))
        for follower in (rows, process):
            follower.extend(torch.tensor([tokens[-1:]]))


STATEFUL = {"synthid": lambda model: synthid(), "guidance": guided}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_processor_with_state_gives_the_same_greedy_text(theirs, lm, name):
    processor = from_transformers(STATEFUL[name](theirs))
    for prompt in PROMPTS:
        want = continuation(theirs, [STATEFUL[name](theirs)], prompt)
        for _ in range(2):  # calls do not share state
            got = lm.generate(prompt, processors=[processor], max_new_tokens=10)
            assert got.tokens == want


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("sampler", ["multinomial", "beam:width=3"])
def test_state_follows_the_rows(theirs, lm, name, sampler):
    """Each result has the log-probabilities of a run over its tokens without other rows."""
    batch = lm.generate_batch(
        PROMPTS,
        sampler=sampler,
        n=3,
        seed=1,
        max_new_tokens=8,
        processors=[from_transformers(STATEFUL[name](theirs))],
    )
    for prompt, best in zip(PROMPTS, batch, strict=True):
        for out in (best, *best.alternatives):
            process = STATEFUL[name](theirs)
            for step, token in enumerate(out.tokens):
                ids = torch.tensor([prompt + out.tokens[:step]])
                with torch.no_grad():
                    want = process(ids, theirs(ids).logits[:, -1]).log_softmax(-1)[0, token]
                assert out.token_logprobs[step] == pytest.approx(float(want), abs=1e-3)


class EveryOther(transformers.LogitsProcessor):
    """Allows odd and even tokens in turns, by a count of its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.index_fill(1, torch.arange(self.calls % 2, VOCABULARY, 2), -torch.inf)


def test_stateful_keeps_a_users_own_state_for_each_row(lm):
    processor = from_transformers(EveryOther(), stateful=True)
    for out in lm.generate_batch(PROMPTS, sampler="beam:width=3", processors=[processor]):
        assert all(token % 2 == index % 2 for index, token in enumerate(out.tokens))


def test_functions_go_with_every_draft_and_state_not_with_guesses_through_it(lm):
    prompt = [97, 98, 97, 98, 97, 98]
    bias = transformers.SequenceBiasLogitsProcessor([[[97], 9.0], [[98], 9.0], [[97, 98], 5.0]])
    stateful = from_transformers(EveryOther(), stateful=True)
    for processor in (from_transformers(bias), Counting(weight=0.1), stateful):
        want = lm.generate(prompt, max_new_tokens=12, processors=[processor])
        got = lm.generate(prompt, max_new_tokens=12, processors=[processor], draft="lookup")
        assert got.tokens == want.tokens
        if processor is not stateful:
            got = lm.generate(prompt, max_new_tokens=12, processors=[processor], draft=lm)
            assert got.tokens == want.tokens
    with pytest.raises(gptk.IncompatibleError, match="EveryOther keeps state"):
        lm.generate(prompt, max_new_tokens=12, processors=[stateful], draft=lm)


def test_state_that_cannot_be_copied_is_refused_and_a_function_is_not_copied():
    class Locked(transformers.LogitsProcessor):
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, input_ids, scores):
            return scores

    rows = gptk.Rows([[1]])
    assert from_transformers(Locked())(torch.ones(1, 4), rows).tolist() == [[1] * 4]
    with pytest.raises(gptk.OptionError, match="Locked: its state cannot be copied for each row"):
        from_transformers(Locked(), stateful=True).start(rows)


def test_state_that_cannot_be_taken_back_is_refused():
    rows = gptk.Rows([[1, 2]])
    process = from_transformers(EveryOther(), stateful=True).start(rows)
    first = process(torch.zeros(1, VOCABULARY), rows)
    assert torch.equal(process(torch.zeros(1, VOCABULARY), rows), first), "asked again"
    process.extend(torch.tensor([[5]]))
    process.rewind([1])
    process.extend(torch.tensor([[5]]))
    process(torch.zeros(1, VOCABULARY), rows)
    with pytest.raises(gptk.IncompatibleError, match=r"EveryOther keeps state .* taken back"):
        process.rewind([1])
    process = from_transformers(EveryOther(), stateful=True).start(rows)
    process.extend(torch.tensor([[5, 6]]))
    with pytest.raises(gptk.IncompatibleError, match="several at a time"):
        process(torch.zeros(1, VOCABULARY), rows)


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (
            lambda: transformers.ClassifierFreeGuidanceLogitsProcessor(2.0),
            "ClassifierFreeGuidanceLogitsProcessor cannot be used in gptk: it expects every row "
            "twice",
        ),
        (
            lambda: transformers.RepetitionPenaltyLogitsProcessor(1.1, torch.tensor([1, 2])),
            "it was made for a batch of 2 rows",
        ),
        (
            lambda: transformers.EncoderNoRepeatNGramLogitsProcessor(2, torch.ones(3, 4).long()),
            "it was made for a batch of 3 rows",
        ),
        (
            lambda: transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(
                1.5, None, unconditional_ids=torch.ones(2, 1).long()
            ),
            "it was made for a batch of 2 rows",
        ),
        (lambda: print, "it is not a transformers LogitsProcessor"),
        (
            lambda: generation.LogitsProcessorList([to_transformers("top-k")]),
            "it is gptk's own; use its processors as they are",
        ),
    ],
)
def test_what_cannot_work_on_single_rows_is_refused_with_the_reason(processor, reason):
    with pytest.raises(gptk.OptionError) as caught:
        from_transformers(processor())
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_processor_that_needs_more_than_scores_is_refused():
    class Needy(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores, encoder_outputs):
            return scores

    with pytest.raises(gptk.OptionError, match="it needs encoder_outputs, which only its own"):
        from_transformers(Needy())


def test_a_wrapped_processor_has_no_spec_string():
    with pytest.raises(gptk.OptionError, match="TopKLogitsWarper of transformers has no spec"):
        _ = from_transformers(transformers.TopKLogitsWarper(3)).spec


# --- Stopping criteria -------------------------------------------------------------------------


class SumIsEven(transformers.StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, 5:].sum(dim=1) % 2 == 0


@pytest.mark.parametrize(
    "criteria",
    [
        lambda: generation.MaxLengthCriteria(9),
        lambda: generation.EosTokenCriteria(list(range(60))),
        lambda: generation.MaxTimeCriteria(0.0),
        SumIsEven,
        lambda: generation.StoppingCriteriaList([generation.MaxLengthCriteria(8), SumIsEven()]),
    ],
)
def test_their_stopping_criteria_stop_gptk_where_they_stop_transformers(theirs, lm, criteria):
    (want,) = theirs.generate(
        **padded(PROMPTS[:1]),
        max_new_tokens=30,
        do_sample=False,
        stopping_criteria=generation.StoppingCriteriaList([criteria()]),
    ).tolist()
    got = lm.generate(PROMPTS[0], max_new_tokens=30, stop=[from_stopping_criteria(criteria())])
    assert PROMPTS[0] + got.tokens == want
    assert got.finish_reason == "stop"


def test_their_stop_strings_stop_gptk(lm):
    free = lm.generate(PROMPTS[0], max_new_tokens=30)
    stop = next(c for c in free.text[3:] if c.isascii())
    criteria = generation.StopStringCriteria(fast_tokenizer(), [stop])
    out = lm.generate(PROMPTS[0], max_new_tokens=30, stop=from_stopping_criteria(criteria))
    assert out.tokens == free.tokens[: free.tokens.index(ord(stop)) + 1]
    assert out.finish_reason == "stop"


def test_stopping_criteria_that_need_scores_are_refused():
    with pytest.raises(gptk.OptionError, match="ConfidenceCriteria needs the scores"):
        from_stopping_criteria(generation.ConfidenceCriteria(0.4))
    with pytest.raises(gptk.OptionError, match="is not a transformers StoppingCriteria"):
        from_stopping_criteria(len)


# --- llama-cpp-python --------------------------------------------------------------------------


def as_llama_cpp_calls(processors, ids, logits):
    """New logits as llama-cpp-python computes them: in place, in a field of its candidates."""
    fields = [("id", np.intc), ("logit", np.single), ("p", np.single)]
    candidates = np.recarray(shape=logits.shape, dtype=np.dtype(fields, align=True))
    candidates.logit[:] = logits
    for processor in processors:
        candidates.logit[:] = processor(np.array(ids, dtype=np.intc), candidates.logit)
    return candidates.logit.copy()


@pytest.mark.parametrize("as_list", [True, False])
def test_llama_cpp_gets_what_transformers_gets(as_list):
    adapter = to_llama_cpp(STACK, eos=[EOS])
    same = to_transformers(STACK, eos=[EOS])
    generator = np.random.default_rng(0)
    ids = list(PROMPTS[0])
    for _ in range(12):
        logits = generator.normal(size=VOCABULARY).astype(np.single)
        want = same(torch.tensor([ids]), torch.from_numpy(logits)[None])[0].numpy()
        got = as_llama_cpp_calls([adapter] if as_list else adapter, ids, logits)
        np.testing.assert_array_equal(got, want)
        ids.append(int(got.argmax()))


def test_llama_cpp_keeps_the_error_that_it_would_lose():
    class Broken(gptk.LogitsProcessor):
        name = "broken"

        def __call__(self, logits, rows):
            raise gptk.DecodingError(f"broken at {rows.lengths[0]}")

    adapter = to_llama_cpp(Broken())
    assert adapter.error is None
    for ids in ([1, 2], [1, 2, 3]):
        with pytest.raises(gptk.DecodingError, match="broken at 2"):
            adapter(np.array(ids, dtype=np.intc), np.zeros(4, dtype=np.single))
    assert str(adapter.error) == "broken at 2"
    adapter.reset()
    assert adapter.error is None


def test_llama_cpp_scores_are_not_changed():
    scores = np.arange(8, dtype=np.single)
    got = to_llama_cpp("top-k:k=2")(np.array([1], dtype=np.intc), scores)
    assert scores.tolist() == list(range(8))
    assert got.dtype == np.single
    assert got.tolist() == [-np.inf] * 6 + [6, 7]


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ('regex:pattern="[0-9]{4}-[0-9]{2}"', r"\d{4}-\d{2}"),
        ('choice:choices=["purple", "green"]', "purple|green"),
        ("no-repeat-ngram:size=1", None),
    ],
)
def test_a_processor_works_in_llama_cpp_itself(smollm2_path, spec, want):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    llm = llama_cpp.Llama(str(smollm2_path), n_ctx=128, n_threads=1, verbose=False)
    tokenizer = gptk.load_tokenizer(str(smollm2_path))
    adapter = to_llama_cpp(spec, tokenizer=tokenizer)
    prompt = "One, two, three, four, one, two, three,"
    out = llm(prompt, max_tokens=12, temperature=0.0, logits_processor=adapter)
    text = out["choices"][0]["text"]
    assert adapter.error is None
    if want:
        assert re.fullmatch(want, text)
    else:
        row = tokenizer.encode(prompt + text)
        new = row[len(tokenizer.encode(prompt)) :]
        assert len(new) == len(set(new)) > 6
        assert not set(new) & set(tokenizer.encode(prompt))


# --- Imports -----------------------------------------------------------------------------------


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_transformers_the_error_names_the_extra():
    out = python(
        "import sys; sys.modules['transformers'] = None\n"
        "import gptk.adapters.llama_cpp\n"
        "try:\n    import gptk.adapters.transformers\n"
        "except gptk.PluginError as error:\n    print(error)"
    )
    assert out.stdout == (
        "gptk.adapters.transformers needs a package: pip install 'gptk-decoding[transformers]'\n"
    ), out.stderr


def test_gptk_does_not_load_what_it_adapts_to():
    out = python(
        "import sys, gptk, gptk.adapters\n"
        "print({'transformers', 'llama_cpp', 'torch'} & set(sys.modules))"
    )
    assert out.stdout == "set()\n", out.stderr


class Faulty(transformers.LogitsProcessor):
    """A processor of transformers that goes wrong."""

    def __init__(self, fault):
        self.fault = fault

    def __call__(self, input_ids, scores):
        return self.fault(scores)


class FaultyOfGptks(gptk.LogitsProcessor):
    """A processor of gptk that goes wrong."""

    name = "faulty"
    fault: Any = None

    def __call__(self, logits, rows):
        return self.fault(logits)


class HalfAFollower(gptk.LogitsProcessor):
    """Its state hears of some moves only."""

    name = "half-a-follower"

    class State:
        def __call__(self, logits, rows):
            return logits

        def extend(self, tokens): ...

    def start(self, rows):
        return self.State()


class NoFunction(gptk.LogitsProcessor):
    """Starts with nothing."""

    name = "no-function"

    def start(self, rows):
        return None


class TestFaults:
    """What a processor or its user gets wrong is told as in gptk's own loop, in a line."""

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                generation.TemperatureLogitsWarper,
                "TemperatureLogitsWarper cannot be used in gptk: it is a cl",
            ),
            ("top-k:k=3", "it is gptk's own; give it to `processors` as it is"),
            (FaultyOfGptks(), "FaultyOfGptks cannot be used in gptk: it is gptk's own"),
            (3, "int cannot be used in gptk: it is not a transformers LogitsProcessor"),
        ],
    )
    def test_what_is_given_to_from_transformers(self, given, message):
        with pytest.raises(gptk.OptionError) as caught:
            from_transformers(given)
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (lambda scores: None, "Faulty, a processor of transformers, returned None; it must"),
            (lambda scores: scores[0], r"returned shape \(257,\); it must return .* \(1, 257\)"),
            (
                lambda scores: 1 / 0,
                "Faulty, a processor of transformers, failed: ZeroDivisionError",
            ),
        ],
    )
    def test_a_processor_of_transformers_that_goes_wrong(self, fault, message, gptk_lm):
        with pytest.raises(gptk.PluginError, match=message):
            gptk_lm.generate("ab", processors=[from_transformers(Faulty(fault))])

    @pytest.mark.parametrize(
        ("processor", "message"),
        [
            (FaultyOfGptks(fault=lambda logits: None), "processor faulty returned None; it must"),
            (FaultyOfGptks(fault=lambda logits: logits[:, 1:]), "processor faulty returned shape"),
            (FaultyOfGptks(fault=lambda logits: 1 / 0), "processor faulty of .*ZeroDivisionError"),
            (HalfAFollower(), "the state of processor half-a-follower has extend, but a follower"),
            (NoFunction(), r"processor no-function: start\(\) returned None; it must return a fun"),
        ],
    )
    @pytest.mark.parametrize("adapter", [to_transformers, to_llama_cpp])
    def test_a_processor_of_gptks_in_anothers_loop(self, adapter, processor, message):
        adapted = adapter(processor)
        inputs = torch.tensor([[1, 2]]), torch.zeros(1, 257)
        if adapter is to_llama_cpp:
            inputs = tuple(part[0].numpy() for part in inputs)
        with pytest.raises(gptk.PluginError, match=message):
            adapted(*inputs)

    def test_a_class_in_place_of_an_instance(self):
        for adapter in (to_transformers, to_llama_cpp):
            with pytest.raises(gptk.OptionError, match="a processor is an instance, NoFunction"):
                adapter([NoFunction])
