"""The contract of samplers."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import gptk
from gptk.testing._decoding import (
    MANY,
    PROMPTS,
    SEEDS,
    Result,
    Together,
    decode,
    decode_in_turns,
    decode_together,
    lm_with_text,
    lm_without_text,
    tokenizer_of,
    without_numbers,
)
from gptk.testing._plugin import PluginContract
from gptk.testing._processors import Flat, Guard, Next, Only, Repeats, Witness
from gptk.testing._promises import check, examples, instance, promise, undisturbed
from gptk.testing.models import batches


class SamplerContract(PluginContract):
    """What a sampler promises."""

    _base: ClassVar[type] = gptk.Sampler
    logprobs_are_the_models: ClassVar[bool] = True
    """Log-probabilities follow from the model's logits and processors. Set it to False for a
    sampler that changes logits by what it remembers itself."""
    scores_are_sums: ClassVar[bool] = True
    """A result's score follows from the sum of its log-probabilities. Set it to False for a
    sampler that ranks by something else."""

    @property
    def lm(self) -> gptk.LanguageModel:
        """The model to decode with: by default 256 bytes and an end of text as tokens."""
        return lm_with_text()

    def run(self, prompts: list[list[int]], **settings: Any) -> list[list[tuple[Any, ...]]]:
        """For each prompt, a row of one session, its results as (tokens, finish reason)."""
        return without_numbers(self._together(prompts, **settings))

    def _together(self, prompts: list[list[int]], **settings: Any) -> list[list[Result]]:
        return decode_together(self.lm, prompts, **{"sampler": self.plugin(), **settings})

    @promise
    def test_it_chooses_a_token_for_each_row(self) -> None:
        """It decodes a single prompt and several, and tokens and scores are numbers."""
        size = self.lm.model.config.vocab_size
        for batch in (PROMPTS[:1], PROMPTS):
            for prompt, results in zip(batch, self._together(batch), strict=True):
                for result in results:
                    known = all(0 <= token < size for token in result.tokens)
                    check(known, f"{prompt} give the tokens {result.tokens}")
                    numbers = [result.score, *result.token_logprobs]
                    check(
                        all(map(math.isfinite, numbers))
                        and max(result.token_logprobs, default=0) <= 1e-5,
                        f"{prompt} give the score {result.score} and the "
                        f"log-probabilities {result.token_logprobs}",
                    )

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=2), seed=SEEDS)
    @example(batch=PROMPTS, seed=0)
    def test_its_input_is_not_changed(self, batch: list[list[int]], seed: int) -> None:
        """The logits that it is given stay as they were."""
        guard = Guard()
        self.run(batch, seed=seed, processors=[guard])
        check(not guard.log.has_changed(), "it changed the logits in place")

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=2), seed=SEEDS)
    @example(batch=PROMPTS, seed=0)
    def test_equal_seeds_give_equal_tokens(self, batch: list[list[int]], seed: int) -> None:
        """It draws from the rows' streams, and does not use the global random generators."""
        for more in ({}, {"processors": [Flat()]}):
            with undisturbed():
                first = self.run(batch, seed=seed, sampler=instance(self), **more)
            torch.manual_seed(1)
            again = self.run(batch, seed=seed, sampler=instance(self), **more)
            check(again == first, f"{batch} give other tokens the second time")

    @promise
    def test_one_instance_serves_several_calls(self) -> None:
        """An instance gives what a new one gives, after other calls and during others.

        What a sampler remembers of its rows belongs into the object that `start` returns. An
        instance stays as it is made; it may serve several calls at once.
        """
        want = self.run(PROMPTS, seed=0, sampler=instance(self))
        other = self.run(MANY, seed=1, sampler=instance(self))
        for _ in range(2):
            self.run(PROMPTS[:1], seed=2, max_new_tokens=24)
            check(self.run(PROMPTS, seed=0) == want, "called again it gives other tokens")
            check(self.run(MANY, seed=1) == other, "after other prompts it gives other tokens")
        plugin = self.plugin()
        first = Together(self.lm, PROMPTS, seed=0, sampler=plugin)
        second = Together(self.lm, MANY, seed=1, sampler=plugin)
        check(
            list(map(without_numbers, decode_in_turns([first, second]))) == [want, other],
            "two calls that take turns give other tokens than one after the other",
        )
        alone = [
            decode(self.lm, [prompt], seed=0, ordinal=number, sampler=instance(self))[0]
            for number, prompt in enumerate(PROMPTS)
        ]
        check(
            decode(self.lm, PROMPTS, seed=0, sampler=plugin) == alone,
            "the prompts of a batch get other tokens than each from an instance of its own",
        )

    @promise
    @examples(4)
    @given(batch=batches(unique=True), seed=SEEDS)
    @example(batch=PROMPTS, seed=0)
    def test_a_prompt_gets_the_same_alone_and_in_a_batch(
        self, batch: list[list[int]], seed: int
    ) -> None:
        """The tokens of a prompt depend neither on the other prompts nor on their order.

        What they depend on is the prompt, the seed, and the prompt's ordinal.
        """
        together, ordinals = self.run(batch, seed=seed), range(len(batch))
        check(
            self.run(batch[::-1], seed=seed, ordinals=ordinals[::-1])[::-1] == together,
            f"{batch} in another order give other tokens",
        )
        for number, (prompt, results) in enumerate(zip(batch, together, strict=True)):
            check(
                self.run([prompt], seed=seed, ordinals=[number])[0] == results,
                f"{prompt} gives other tokens alone than in {batch}",
            )

    @promise
    @examples(4)
    @given(batch=batches(unique=True), seed=SEEDS, every=st.integers(2, 5))
    @example(batch=PROMPTS, seed=0, every=2)
    @example(batch=PROMPTS, seed=1, every=3)
    def test_its_state_follows_the_rows(
        self, batch: list[list[int]], seed: int, every: int
    ) -> None:
        """When a row ends early and leaves the batch, nothing changes for the other rows."""

        def stop(tokens: list[int]) -> bool:
            return tokens[-1] % every == 0

        settings: dict[str, Any] = {"seed": seed, "stop": stop, "max_new_tokens": 8}
        together = self.run(batch, **settings)
        for number, (prompt, results) in enumerate(zip(batch, together, strict=True)):
            check(
                self.run([prompt], ordinals=[number], **settings)[0] == results,
                f"{prompt} gives other tokens alone than in {batch}, whose rows end at different "
                "steps",
            )

    @promise
    def test_a_vocabulary_may_be_small(self) -> None:
        """It works with two tokens, although that may be fewer than its k, width or candidates."""
        for size in (2, 3):
            lm = lm_without_text(size)
            for seed in range(3):
                try:
                    out = lm.generate([0, 1], sampler=self.plugin(), max_new_tokens=3, seed=seed)
                except gptk.IncompatibleError:
                    pytest.skip("it needs text, and this model has no tokenizer")
                check(len(out.tokens) == 3, f"of {size} tokens it makes {out.tokens}")

    @promise
    @examples(5)
    @given(batch=batches(max_prompts=2), seed=SEEDS, data=st.data())
    @example(batch=MANY, seed=0, data=None)
    @example(batch=PROMPTS[:1], seed=1, data=None)
    def test_masked_tokens_are_never_chosen(
        self, batch: list[list[int]], seed: int, data: st.DataObject | None
    ) -> None:
        """A token that a processor removed is not chosen.

        A constraint may leave a single token, in each row another.
        """
        size = self.lm.model.config.vocab_size
        if data is None:
            masks: list[set[int]] = [{0}, {7}, {size - 1}, {3, size - 2}, {0, 1, 2}]
            masks.append(set(range(1, size, 2)))
        else:
            token = st.integers(0, size - 1)
            masks = [data.draw(st.sets(token, min_size=1, max_size=6), label="allowed")]
        for allowed in masks:
            only = Only(allowed=tuple(sorted(allowed)))
            left = f"with only the tokens {_short(allowed)} left"
            settings = {"seed": seed, "max_new_tokens": 8}
            for results in self._run_masked(batch, left, processors=[only], **settings):
                for tokens, _ in results:
                    chosen = set(tokens) - allowed
                    check(not chosen, f"{left} it chose {_short(chosen)}")
        follow = Next(size=size)
        left = "with a single token left for each row"
        masked = self._run_masked(batch, left, seed=seed, processors=[follow])
        for prompt, results in zip(batch, masked, strict=True):
            for tokens, _ in results:
                want = follow.after(prompt[-1], len(tokens))
                check(tokens == want, f"{left}, {want}, it chose {tokens}")

    @promise
    def test_it_says_whether_it_draws(self) -> None:
        """`random` is True if results depend on the seed, and False if they do not."""
        runs = [
            self.run(MANY, seed=seed, processors=processors)
            for processors in ([], [Flat()])
            for seed in range(4)
        ]
        same = [runs[0] == run for run in runs[:4]] + [runs[4] == run for run in runs[4:]]
        if self.plugin().random:
            check(not all(same), "random is True, but four seeds give the same for 20 prompts")
        else:
            check(all(same), "random is False, but two seeds give different tokens")

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=2), seed=SEEDS)
    @example(batch=PROMPTS, seed=0)
    def test_the_cache_changes_nothing(self, batch: list[list[int]], seed: int) -> None:
        """Without a KV cache the tokens are the same."""
        check(
            self.run(batch, seed=seed) == self.run(batch, seed=seed, use_cache=False),
            f"{batch} give other tokens without the cache",
        )

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=3), seed=SEEDS)
    @example(batch=PROMPTS, seed=0)
    def test_followers_hear_of_every_move(self, batch: list[list[int]], seed: int) -> None:
        """All followers of the rows are told when rows fork, end, or lose tokens."""
        plain, lost = self.run(batch, seed=seed), []  # type: ignore[var-annotated]
        watched = self.run(batch, seed=seed, processors=[Witness(lost=lost)])
        check(not lost, lost[0] if lost else "")
        check(watched == plain, "with a follower that changes nothing it gives other tokens")

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=2), seed=SEEDS)
    @example(batch=PROMPTS, seed=0)
    def test_log_probabilities_are_those_of_the_model(
        self, batch: list[list[int]], seed: int
    ) -> None:
        """`token_logprobs` are log-probabilities of the processed distribution of each step.

        A result's score is the sampler's `rank` of their sum.
        """
        if not self.logprobs_are_the_models:
            pytest.skip("logprobs_are_the_models is False")
        together = self._together(batch, processors=[Repeats()], seed=seed)
        for prompt, results in zip(batch, together, strict=True):
            for result in results:
                self._check_scores(prompt, result)

    @promise
    @examples(3)
    @given(prompt=batches(max_prompts=1), seed=SEEDS, n=st.integers(2, 3))
    @example(prompt=PROMPTS[:1], seed=0, n=2)
    @example(prompt=PROMPTS[1:2], seed=1, n=3)
    @example(prompt=PROMPTS[2:3], seed=2, n=3)
    def test_n_results_are_what_was_asked_for(
        self, prompt: list[list[int]], seed: int, n: int
    ) -> None:
        """It gives n results or raises OptionError; competing results are distinct, best first.

        The first of n samples is the one that n=1 gives.
        """
        sampler = self.plugin()
        try:
            sampler.max_rows(n)
        except gptk.OptionError as error:
            if n == 2:  # the first example's
                pytest.skip(f"it gives one result: {error}")
            assume(False)
        out = self.lm.generate(prompt[0], sampler=sampler, n=n, seed=seed, max_new_tokens=4)
        results = [out, *out.alternatives]
        check(len(results) <= n, f"{len(results)} results for n={n}")
        if sampler.competing:
            scores = [result.score for result in results]
            check(scores == sorted(scores, reverse=True), f"scores {scores} are not best first")
            texts = [(tuple(result.tokens), result.finish_reason) for result in results]
            check(len(set(texts)) == len(texts), f"two results are the same: {texts}")
        else:
            check(len(results) == n, f"{len(results)} results for n={n}")
            single = self.lm.generate(prompt[0], sampler=sampler, seed=seed, max_new_tokens=4)
            check(
                out.tokens == single.tokens,
                f"the first of {n} results is {out.tokens}, and n=1 gives {single.tokens}",
            )

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=2), seed=SEEDS)
    @example(batch=PROMPTS, seed=0)
    def test_a_draft_changes_nothing(self, batch: list[list[int]], seed: int) -> None:
        """With a draft the tokens are the same, or `refuses_draft` says why it takes none."""
        reason = self.plugin().refuses_draft()
        if reason is not None:
            check(isinstance(reason, str) and reason.strip(), "refuses_draft gives no reason")
            pytest.skip(f"it takes no draft: {reason}")
        # Of two tokens each many guesses are right, so that rows run ahead of each other.
        settings = {"seed": seed, "max_new_tokens": 12, "processors": ["top-k:k=2"]}
        plain, drafted = (
            self.run(batch, **settings, draft=draft) for draft in (None, "lookup:ngram=1")
        )
        check(plain == drafted, f"{batch} give other tokens with a draft")

    def _run_masked(self, batch: list[list[int]], left: str, **settings: Any) -> Any:
        try:
            return self.run(batch, **settings)
        except gptk.DecodingError as error:
            raise AssertionError(f"{left}: {error}") from None

    def _check_scores(self, prompt: list[int], result: Result) -> None:
        """Compare a result's log-probabilities and score with a teacher-forced run."""
        sampler, tokens = self.plugin(), result.tokens
        want = _teacher_forced(self.lm, sampler, [Repeats()], prompt, tokens)
        for index, (got, right) in enumerate(zip(result.token_logprobs, want, strict=True)):
            check(
                abs(got - right) < 1e-3,
                f"token {index} of {tokens} after {prompt} has log-probability "
                f"{right:.4f}, and token_logprobs says {got:.4f}",
            )
        if self.scores_are_sums and result.finish_reason == "length":
            rank = sampler.rank(math.fsum(result.token_logprobs), len(tokens))
            check(
                abs(result.score - rank) < 1e-3,
                f"{tokens} has the score {result.score:.4f}; by its token_logprobs it is "
                f"{rank:.4f}",
            )


def _short(tokens: set[int]) -> str:
    shown = ", ".join(map(str, sorted(tokens)[:6]))
    return f"{{{shown}, …}}" if len(tokens) > 6 else f"{{{shown}}}"


@torch.inference_mode()
def _teacher_forced(
    lm: gptk.LanguageModel,
    sampler: gptk.Sampler,
    processors: Sequence[gptk.LogitsProcessor],
    prompt: list[int],
    tokens: list[int],
) -> list[float]:
    """The log-probability of each token in a run that is given all tokens."""
    layers = sampler.hidden_layers(lm.model.config)
    session = gptk.DecodeSession(lm.model, [prompt], layers=layers)
    tokenizer = tokenizer_of(lm)
    session.rows.set_tokenizer(tokenizer, () if tokenizer is None else tokenizer.eos)
    processes = [part.start(session.rows) for part in (*processors, *sampler.processors())]
    for process in processes:
        if isinstance(process, gptk.Follower):
            session.follow(process)
    logprobs = []
    for token in tokens:
        scores = sampler.logits(session)
        for process in processes:
            scores = process(scores, session.rows)
        logprobs.append(scores.log_softmax(-1)[0, token].item())
        session.extend(torch.tensor([token]))
    return logprobs
