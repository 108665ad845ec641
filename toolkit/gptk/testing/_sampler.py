"""The contract of samplers."""

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gptk
from gptk.testing._decoding import SEEDS, decode, lm_with_text, lm_without_text, tokenizer_of
from gptk.testing._promises import PluginContract, check, examples, promise, undisturbed
from gptk.testing.models import batches


class SamplerContract(PluginContract):
    """What a sampler promises."""

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
        """For each prompt its results, as (tokens, finish reason); the message if it fails."""
        return decode(self.lm, prompts, sampler=self.plugin(), **settings)

    @promise
    @examples(5)
    @given(batch=batches(unique=True), seed=SEEDS)
    def test_a_prompt_gets_the_same_alone_and_in_a_batch(
        self, batch: list[list[int]], seed: int
    ) -> None:
        """The tokens of a prompt depend neither on the other prompts nor on their order."""
        together = self.run(batch, seed=seed)
        check(
            self.run(batch[::-1], seed=seed)[::-1] == together,
            f"{batch} in another order give other tokens",
        )
        for prompt, results in zip(batch, together, strict=True):
            check(
                self.run([prompt], seed=seed)[0] == results,
                f"{prompt} gives other tokens alone than in {batch}",
            )

    @promise
    @examples(5)
    @given(batch=batches(unique=True), seed=SEEDS, every=st.integers(2, 5))
    def test_its_state_follows_the_rows(
        self, batch: list[list[int]], seed: int, every: int
    ) -> None:
        """When a row ends early and leaves the batch, nothing changes for the other rows."""

        def stop(tokens: list[int]) -> bool:
            return tokens[-1] % every == 0

        together = self.run(batch, seed=seed, stop=stop)
        for prompt, results in zip(batch, together, strict=True):
            check(
                self.run([prompt], seed=seed, stop=stop)[0] == results,
                f"{prompt} gives other tokens alone than in {batch}, whose rows end at different "
                "steps",
            )

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=2), seed=SEEDS)
    def test_the_cache_changes_nothing(self, batch: list[list[int]], seed: int) -> None:
        """Without a KV cache the tokens are the same."""
        check(
            self.run(batch, seed=seed) == self.run(batch, seed=seed, use_cache=False),
            f"{batch} give other tokens without the cache",
        )

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=2), seed=SEEDS)
    def test_equal_seeds_give_equal_tokens(self, batch: list[list[int]], seed: int) -> None:
        """It draws from the rows' streams, and does not use the global random generators."""
        with undisturbed():
            first = self.run(batch, seed=seed)
        torch.manual_seed(1)
        check(self.run(batch, seed=seed) == first, f"{batch} give other tokens the second time")

    @promise
    def test_it_says_whether_it_draws(self) -> None:
        """`random` is True if results depend on the seed, and False if they do not."""
        batch = [[i, i + 1] for i in range(0, 40, 2)]
        first, second = (self.run(batch, seed=seed) for seed in (0, 1))
        if self.plugin().random:
            check(first != second, "random is True, but two seeds give the same for 20 prompts")
        else:
            check(first == second, "random is False, but two seeds give different tokens")

    @promise
    @examples(5)
    @given(batch=batches(max_prompts=2), seed=SEEDS, data=st.data())
    def test_masked_tokens_are_never_chosen(
        self, batch: list[list[int]], seed: int, data: st.DataObject
    ) -> None:
        """A token that a processor removed is not chosen."""
        size = self.lm.model.config.vocab_size
        allowed = data.draw(
            st.sets(st.integers(0, size - 1), min_size=1, max_size=6), label="allowed"
        )
        only = _Only(allowed=tuple(sorted(allowed)))
        for results in self.run(batch, seed=seed, processors=[only]):
            check(not isinstance(results, str), f"with the tokens {allowed}: {results}")
            for tokens, *_ in results:
                check(allowed.issuperset(tokens), f"it chose {set(tokens) - allowed}")

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=2), seed=SEEDS)
    def test_log_probabilities_are_those_of_the_model(
        self, batch: list[list[int]], seed: int
    ) -> None:
        """`token_logprobs` are log-probabilities of the processed distribution of each step.

        A result's score is the sampler's `rank` of their sum.
        """
        if not self.logprobs_are_the_models:
            return
        outs = self.lm.generate_batch(
            batch, sampler=self.plugin(), processors=[_Repeats()], max_new_tokens=5, seed=seed
        )
        for out in outs:
            for result in (out, *out.alternatives):
                self._check_scores(result)

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=2), seed=SEEDS)
    def test_its_input_is_not_changed(self, batch: list[list[int]], seed: int) -> None:
        """The logits that it is given stay as they were."""
        guard = _Guard()
        self.run(batch, seed=seed, processors=[guard])
        check(not guard.log.changed, "it changed the logits in place")

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=3), seed=SEEDS)
    def test_followers_hear_of_every_move(self, batch: list[list[int]], seed: int) -> None:
        """All followers of the rows are told when rows fork, end, or lose tokens."""
        plain = self.run(batch, seed=seed)
        witness = _Witness()
        check(self.run(batch, seed=seed, processors=[witness]) == plain, "a follower lost its row")

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=2), seed=SEEDS)
    def test_a_draft_changes_nothing(self, batch: list[list[int]], seed: int) -> None:
        """With a draft the tokens are the same, or `refuses_draft` says why it takes none."""
        reason = self.plugin().refuses_draft()
        if reason is not None:
            check(isinstance(reason, str) and reason.strip(), "refuses_draft gives no reason")
            return
        check(
            self.run(batch, seed=seed) == self.run(batch, seed=seed, draft="lookup:ngram=1"),
            f"{batch} give other tokens with a draft",
        )

    @promise
    @examples(3)
    @given(prompt=batches(max_prompts=1), seed=SEEDS, n=st.integers(2, 3))
    def test_n_results_are_what_was_asked_for(
        self, prompt: list[list[int]], seed: int, n: int
    ) -> None:
        """It gives n results or raises OptionError; competing results are distinct, best first.

        The first of n samples is the one that n=1 gives.
        """
        sampler = self.plugin()
        try:
            sampler.max_rows(n)
        except gptk.OptionError:
            return
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
    def test_a_vocabulary_may_be_small(self) -> None:
        """It works with two tokens, although that may be fewer than its k, width or candidates."""
        lm = lm_without_text(2)
        for seed in range(3):
            try:
                out = lm.generate([0, 1], sampler=self.plugin(), max_new_tokens=3, seed=seed)
            except gptk.IncompatibleError:  # it needs text, and this model has no tokenizer
                return
            check(len(out.tokens) == 3, f"it gives {out.tokens}")

    def _check_scores(self, result: gptk.Generation) -> None:
        """Compare a result's log-probabilities and score with a teacher-forced run."""
        sampler, tokens = self.plugin(), result.tokens
        want = _teacher_forced(self.lm, sampler, [_Repeats()], result.prompt_tokens, tokens)
        for index, (got, right) in enumerate(zip(result.token_logprobs, want, strict=True)):
            check(
                abs(got - right) < 1e-3,
                f"token {index} of {tokens} after {result.prompt_tokens} has log-probability "
                f"{right:.4f}, and token_logprobs says {got:.4f}",
            )
        if self.scores_are_sums and result.finish_reason == "length":
            rank = sampler.rank(math.fsum(result.token_logprobs), len(tokens))
            check(
                abs(result.score - rank) < 1e-3,
                f"{tokens} has the score {result.score:.4f}; by its token_logprobs it is "
                f"{rank:.4f}",
            )


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
    session.rows.tokenizer = tokenizer_of(lm)
    session.rows.eos = () if session.rows.tokenizer is None else session.rows.tokenizer.eos
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


class _Only(gptk.LogitsProcessor):
    """Removes all tokens but those allowed."""

    name = "only"
    allowed: tuple[int, ...]

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        masked = torch.full_like(logits, -torch.inf)
        masked[:, list(self.allowed)] = logits[:, list(self.allowed)]
        return masked


class _Repeats(gptk.LogitsProcessor):
    """Lowers each token's logit by the number of times that the row has it."""

    name = "repeats"

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        return logits - torch.zeros_like(logits).scatter_add_(1, rows.tokens, rows.mask.float())


class _Log:
    changed = False
    last: tuple[Tensor, Tensor] | None = None


class _Guard(gptk.LogitsProcessor):
    """Checks at each call that the logits it returned before are unchanged."""

    name = "guard"

    @functools.cached_property
    def log(self) -> _Log:
        return _Log()

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        if self.log.last is not None and not torch.equal(*self.log.last):
            self.log.changed = True
        returned = logits.clone()
        self.log.last = returned, returned.clone()
        return returned


class _Witness(gptk.LogitsProcessor):
    """Fails if its follower loses track of the rows."""

    name = "witness"

    def start(self, rows: gptk.Rows) -> "_Notes":
        return _Notes(rows)


class _Notes:
    """Each row's tokens, as the moves say they are."""

    def __init__(self, rows: gptk.Rows) -> None:
        self._tokens = _tokens_of(rows)

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        tokens = _tokens_of(rows)
        check(
            self._tokens == tokens, f"by its moves a follower has {self._tokens}, the rows {tokens}"
        )
        return logits

    def extend(self, tokens: Tensor) -> None:
        self._tokens = [a + b for a, b in zip(self._tokens, tokens.tolist(), strict=True)]

    def select(self, parents: Sequence[int]) -> None:
        self._tokens = [list(self._tokens[parent]) for parent in parents]

    def rewind(self, counts: Sequence[int]) -> None:
        self._tokens = [
            row[: len(row) - count] for row, count in zip(self._tokens, counts, strict=True)
        ]


def _tokens_of(rows: gptk.Rows) -> list[list[int]]:
    return [rows.tokens[row, :length].tolist() for row, length in enumerate(rows.lengths)]
