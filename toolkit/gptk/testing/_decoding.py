"""Contracts of what takes part in decoding: processors, samplers, drafters and scorers."""

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptk.errors import DecodingError, IncompatibleError, OptionError
from gptk.hooks.drafting import Drafter
from gptk.hooks.results import Generation
from gptk.hooks.sampling import LogitsProcessor, Sampler
from gptk.language_model import LanguageModel
from gptk.session.rows import Follower, Rows
from gptk.session.session import DecodeSession
from gptk.testing._promises import PluginContract, check, examples, promise, undisturbed
from gptk.testing.models import batches, logits, tiny_gpt, tiny_lm

SEEDS = st.integers(0, 2**16)


@functools.cache
def _small(vocabulary: int) -> LanguageModel:
    """A random model of a few tokens, without text."""
    return LanguageModel(tiny_gpt(vocabulary=vocabulary))


@functools.cache
def _with_text() -> LanguageModel:
    return tiny_lm()


class ProcessorContract(PluginContract):
    """What a logits processor promises."""

    vocabulary: ClassVar[int] = 12
    """How many tokens the tests' logits have. Small ones make examples easy to read."""
    needs_text: ClassVar[bool] = False
    """It needs the text of tokens: the tests then have 256 bytes and an end of text as tokens."""
    several_at_once: ClassVar[bool] = True
    """What it remembers is the same whether tokens come one by one or several at a time. It need
    not be for one that learns from the distribution that each token was drawn from."""

    @property
    def lm(self) -> LanguageModel:
        """The model whose rows are processed."""
        return _with_text() if self.needs_text else _small(self.vocabulary)

    @promise
    @examples(12)
    @given(data=st.data())
    def test_rows_are_independent(self, data: st.DataObject) -> None:
        """A row gets the logits that it would get alone, whatever stands beside it.

        Otherwise a prompt's text depends on the batch that it happens to be in.
        """
        prompts = data.draw(self._prompts(unique=True), label="prompts")
        given_ = data.draw(self._logits(len(prompts)), label="logits")
        together = self._process(given_, prompts)
        for row, prompt in enumerate(prompts):
            alone = self._process(given_[row : row + 1], [prompt])[0]
            check(
                _alike(together[row], alone),
                f"row {row} of {prompts} gets {_differ(together[row], alone)} beside the others "
                "and alone",
            )

    @promise
    @examples(12)
    @given(data=st.data())
    def test_masked_tokens_stay_masked(self, data: st.DataObject) -> None:
        """A token at -inf stays there.

        What an earlier processor or a constraint took out must not come back.
        """
        prompts = data.draw(self._prompts(), label="prompts")
        given_ = data.draw(self._logits(len(prompts)), label="logits")
        got = self._process(given_, prompts)
        back = (given_.isneginf() & ~got.isneginf()).nonzero().tolist()
        check(not back, f"token {back[0][1] if back else 0} came back from -inf")

    @promise
    @examples(12)
    @given(data=st.data())
    def test_its_input_is_not_changed(self, data: st.DataObject) -> None:
        """Logits and rows are as they were: the model's logits belong to others, too."""
        prompts = data.draw(self._prompts(), label="prompts")
        given_ = data.draw(self._logits(len(prompts)), label="logits")
        before, rows = given_.clone(), self._rows(prompts)
        tokens, lengths = rows.tokens.clone(), list(rows.lengths)
        process = self.plugin().start(rows)
        process(given_, rows)
        check(torch.equal(given_, before), "it changed the logits in place")
        same = torch.equal(rows.tokens, tokens) and rows.lengths == lengths
        check(same, "it changed the rows")

    @promise
    @examples(12)
    @given(data=st.data())
    def test_shape_dtype_and_device_are_kept(self, data: st.DataObject) -> None:
        """It gives (rows, vocab) float32 on the device of its input, and no NaN or +inf."""
        prompts = data.draw(self._prompts(), label="prompts")
        given_ = data.draw(self._logits(len(prompts)), label="logits")
        got = self._process(given_, prompts)
        check(isinstance(got, Tensor), f"it returns {got!r:.50}, no tensor")
        check(got.shape == given_.shape, f"{tuple(got.shape)} of {tuple(given_.shape)}")
        check(got.dtype == torch.float32, f"it gives {got.dtype}")
        check(got.device == given_.device, f"it gives a tensor on {got.device}")
        check(not bool((got.isnan() | got.isposinf()).any()), "it gives NaN or +inf")

    @promise
    @examples(8)
    @given(data=st.data())
    def test_it_leaves_a_token(self, data: st.DataObject) -> None:
        """Of logits of which none is masked it leaves at least one, or decoding cannot go on."""
        prompts = data.draw(self._prompts(), label="prompts")
        given_ = data.draw(self._logits(len(prompts)), label="logits").clamp(min=-30)
        got = self._process(given_, prompts)
        check(bool((~got.isneginf()).any(dim=1).all()), "it leaves a row without a token")

    @promise
    @examples(5)
    @given(data=st.data())
    def test_equal_input_gives_equal_output(self, data: st.DataObject) -> None:
        """It is a function of rows and logits, and leaves the global generators alone.

        Luck comes from `rows.uniform(draw=1)` and the like, so that it belongs to the row.
        """
        prompts = data.draw(self._prompts(), label="prompts")
        given_ = data.draw(self._logits(len(prompts)), label="logits")
        with undisturbed():
            one = self._process(given_, prompts)
        torch.manual_seed(1)
        other = self._process(given_, prompts)
        check(_alike(one, other), f"the same call gives {_differ(one, other)}")

    @promise
    @examples(25)
    @given(data=st.data())
    def test_its_state_follows_the_rows(self, data: st.DataObject) -> None:
        """After any moves of the rows it does what it would do had they come there straight.

        Beams fork and drop rows, drafts take tokens back: what `start` returned must follow
        `extend`, `select` and `rewind`.
        """
        prompts = data.draw(self._prompts(unique=True), label="prompts")
        rows = self._rows(prompts)
        process = self.plugin().start(rows)
        followers = [rows, process] if isinstance(process, Follower) else [rows]
        origins = list(range(len(prompts)))
        # Copies that part and then change places are rare among any moves, and common in beams.
        begin = data.draw(st.sampled_from(["", "ses", "seses"]))
        moves = data.draw(st.lists(st.sampled_from("eeesr"), min_size=2, max_size=8), label="moves")
        moves = [*begin, *moves]
        for move in moves:
            process(self._logits_of(rows), rows)
            size = len(rows)
            if move == "e":
                # Few tokens, so that they repeat.
                token = st.integers(0, 2) | st.integers(0, self.lm.model.config.vocab_size - 1)
                several = data.draw(st.integers(1, 3)) if self.several_at_once else 1
                each = st.lists(token, min_size=several, max_size=several)
                drawn = data.draw(st.lists(each, min_size=size, max_size=size), label="extend")
                for follower in followers:
                    follower.extend(torch.tensor(drawn))
            elif move == "s":
                parents = data.draw(
                    st.lists(st.integers(0, size - 1), min_size=1, max_size=4), label="select"
                )
                # In any order; but rows of one prompt stay together.
                parents = sorted(parents, key=lambda parent: origins[parent])
                for follower in followers:
                    follower.select(parents)
                origins = [origins[parent] for parent in parents]
            else:
                new = [a - b for a, b in zip(rows.lengths, rows.prompt_lengths, strict=True)]
                counts = [data.draw(st.integers(0, most), label="rewind") for most in new]
                for follower in followers:
                    follower.rewind(counts)
        got = process(self._logits_of(rows), rows)
        for row, origin in enumerate(origins):
            start, end = rows.prompt_lengths[row], rows.lengths[row]
            straight = self._rows([prompts[origin]])
            fresh = self.plugin().start(straight)
            for token in rows.tokens[row, start:end].tolist():
                fresh(self._logits_of(straight), straight)
                for follower in (straight, fresh):
                    if isinstance(follower, Follower):
                        follower.extend(torch.tensor([[token]]))
            want = fresh(self._logits_of(straight), straight)[0]
            check(
                _alike(got[row], want),
                f"row {row} gets {_differ(got[row], want)} after these moves and straight",
            )

    @promise
    @examples(3)
    @given(data=st.data())
    def test_it_decodes_the_same_in_every_way(self, data: st.DataObject) -> None:
        """Alone or in a batch, with a cache or without, with a draft or without: one text."""
        prompts = data.draw(self._prompts(unique=True), label="prompts")
        sampler = data.draw(st.sampled_from(["greedy", "multinomial", "beam:width=2"]))
        seed = data.draw(SEEDS, label="seed")

        def run(batch: list[list[int]], **more: Any) -> list[Any]:
            return _run(
                self.lm, batch, sampler=sampler, processors=[self.plugin()], seed=seed, **more
            )

        alone = [run([prompt])[0] for prompt in prompts]
        if not any(isinstance(one, str) for one in alone):  # an error ends the whole batch
            check(run(prompts) == alone, f"{prompts} give other tokens in a batch than alone")
        check(
            run(prompts[:1], use_cache=False) == alone[:1],
            f"{prompts[0]} gives other tokens without the cache",
        )
        if "beam" not in sampler:
            check(
                run(prompts[:1], draft="lookup:ngram=1,tokens=3") == alone[:1],
                f"{prompts[0]} gives other tokens with a draft",
            )

    def _rows(self, prompts: list[list[int]]) -> Rows:
        lm = self.lm
        tokenizer = lm._tokenizer
        eos = () if tokenizer is None else tokenizer.eos
        return Rows(prompts, seed=0, eos=eos, tokenizer=tokenizer, model=lm.model)

    def _prompts(self, *, unique: bool = False) -> st.SearchStrategy[list[list[int]]]:
        return batches(min(self.lm.model.config.vocab_size, 256), 3, unique=unique)

    def _logits(self, rows: int) -> st.SearchStrategy[Tensor]:
        size = self.lm.model.config.vocab_size
        if size <= 40:
            return logits(rows, size)
        return st.builds(_random_logits, st.just(rows), st.just(size), SEEDS, st.floats(0.1, 8))

    def _logits_of(self, rows: Rows) -> Tensor:
        """Logits that are a function of a row's tokens."""
        size = self.lm.model.config.vocab_size
        made = []
        for row, length in enumerate(rows.lengths):
            key = hash(tuple(rows.tokens[row, :length].tolist())) % 2**32
            made.append(_random_logits(1, size, key, 3.0))
        return torch.cat(made)

    def _process(self, given_: Tensor, prompts: list[list[int]]) -> Tensor:
        rows = self._rows(prompts)
        got: Tensor = self.plugin().start(rows)(given_.clone(), rows)
        return got


class TruncationContract(ProcessorContract):
    """What a processor promises that keeps the likeliest tokens: top-k, top-p, min-p, …"""

    def kept(self, processor: Any, probabilities: Tensor) -> int:
        """How many of the likeliest tokens it keeps, by its definition. To be overridden.

        probabilities: (vocab,) float64, falling. Tokens as likely as the last one kept may stay
        as well.
        """
        raise NotImplementedError("a TruncationContract defines kept(processor, probabilities)")

    @promise
    @examples(40)
    @given(data=st.data())
    def test_it_keeps_as_many_as_its_definition_says(self, data: st.DataObject) -> None:
        """The number of tokens left is what `kept` says."""
        given_ = data.draw(self._logits(1), label="logits")
        plugin = self.plugin()
        got = self._process(given_, [[0]])[0]
        falling = given_[0].double().softmax(-1).sort(descending=True).values
        # Sums that reach a bound within rounding may count as both.
        allowed = [self.kept(plugin, falling * (1 + change)) for change in (-1e-6, 0, 1e-6)]
        last = falling[max(allowed) - 1]
        ties = int((falling >= last * (1 - 1e-6)).sum())
        left = int((~got.isneginf()).sum())
        check(
            min(allowed) <= left <= max(ties, *allowed),
            f"it keeps {left} tokens of {[round(p, 4) for p in falling.tolist()]}, and its "
            f"definition {allowed[1]}",
        )

    @promise
    @examples(20)
    @given(data=st.data())
    def test_the_likeliest_tokens_stay_as_they_are(self, data: st.DataObject) -> None:
        """What stays keeps its logit, and nothing likelier than it is taken out."""
        given_ = data.draw(self._logits(1), label="logits")
        got = self._process(given_, [[0]])[0]
        stays = ~got.isneginf()
        check(bool(stays.any()), "it leaves no token")
        check(torch.equal(got[stays], given_[0][stays]), "it changes logits that it keeps")
        if not bool(stays.all()):
            check(
                given_[0][~stays].max() <= given_[0][stays].min(),
                "it takes out a token that is likelier than one that it keeps",
            )


class SamplerContract(PluginContract):
    """What a sampler promises."""

    logprobs_are_the_models: ClassVar[bool] = True
    """Log-probabilities follow from the model's logits and processors; not so for a sampler that
    changes logits by what it remembers itself."""
    scores_are_sums: ClassVar[bool] = True
    """A result's score follows from the sum of its log-probabilities; not so for one that ranks by
    something else."""

    @property
    def lm(self) -> LanguageModel:
        """The model that is decoded: by default 256 bytes and an end of text as tokens."""
        return _with_text()

    def run(self, prompts: list[list[int]], **settings: Any) -> list[list[tuple[Any, ...]]]:
        """For each prompt its results, as (tokens, finish reason), or what went wrong."""
        return _run(self.lm, prompts, sampler=self.plugin(), **settings)

    @promise
    @examples(5)
    @given(batch=batches(unique=True), seed=SEEDS)
    def test_a_prompt_gets_the_same_alone_and_in_a_batch(
        self, batch: list[list[int]], seed: int
    ) -> None:
        """The tokens of a prompt do not depend on what stands beside it, or where it stands."""
        together = self.run(batch, seed=seed)
        check(
            self.run(batch[::-1], seed=seed)[::-1] == together,
            f"{batch} in another order give other tokens",
        )
        for prompt, result in zip(batch, together, strict=True):
            check(
                self.run([prompt], seed=seed)[0] == result,
                f"{prompt} gives other tokens alone than in {batch}",
            )

    @promise
    @examples(5)
    @given(batch=batches(unique=True), seed=SEEDS, every=st.integers(2, 5))
    def test_its_state_follows_the_rows(
        self, batch: list[list[int]], seed: int, every: int
    ) -> None:
        """Rows that end early, and take their place with them, change nothing for the others."""

        def stop(tokens: list[int]) -> bool:
            return tokens[-1] % every == 0

        together = self.run(batch, seed=seed, stop=stop)
        for prompt, result in zip(batch, together, strict=True):
            check(
                self.run([prompt], seed=seed, stop=stop)[0] == result,
                f"{prompt} gives other tokens alone than in {batch}, where rows end in turns",
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
        """All luck comes from the rows; the global generators are neither used nor changed."""
        with undisturbed():
            one = self.run(batch, seed=seed)
        torch.manual_seed(1)
        check(self.run(batch, seed=seed) == one, f"{batch} give other tokens the second time")

    @promise
    def test_it_says_whether_it_draws(self) -> None:
        """`random` is True if seeds make a difference, and False if they make none."""
        batch = [[i, i + 1] for i in range(0, 40, 2)]
        one, other = (self.run(batch, seed=seed) for seed in (0, 1))
        if self.plugin().random:
            check(one != other, "random is True, but two seeds give the same for 20 prompts")
        else:
            check(one == other, "random is False, but two seeds give different tokens")

    @promise
    @examples(5)
    @given(batch=batches(max_prompts=2), seed=SEEDS, data=st.data())
    def test_masked_tokens_are_never_chosen(
        self, batch: list[list[int]], seed: int, data: st.DataObject
    ) -> None:
        """What a processor took out is not chosen."""
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
        """Each token's log-probability is that of the processed distribution at its place.

        A result's score is the sampler's `rank` of their sum.
        """
        if not self.logprobs_are_the_models:
            return
        sampler = self.plugin()
        user = _Repeats()
        outs = self.lm.generate_batch(
            batch, sampler=sampler, processors=[user], max_new_tokens=5, seed=seed
        )
        for out in outs:
            for one in (out, *out.alternatives):
                want = _teacher_forced(self.lm, sampler, [user], one.prompt_tokens, one.tokens)
                for place, (got, right) in enumerate(zip(one.token_logprobs, want, strict=True)):
                    check(
                        abs(got - right) < 1e-3,
                        f"token {place} of {one.tokens} after {one.prompt_tokens} has "
                        f"log-probability {right:.4f}, and it says {got:.4f}",
                    )
                if self.scores_are_sums and one.finish_reason == "length":
                    rank = sampler.rank(math.fsum(one.token_logprobs), len(one.tokens))
                    check(
                        abs(one.score - rank) < 1e-3,
                        f"{one.tokens} has the score {one.score:.4f}; by its token_logprobs it is "
                        f"{rank:.4f}",
                    )

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=2), seed=SEEDS)
    def test_its_input_is_not_changed(self, batch: list[list[int]], seed: int) -> None:
        """The logits it is given are as they were afterwards."""
        guard = _Guard()
        self.run(batch, seed=seed, processors=[guard])
        check(not guard.log.changed, "it changed the logits in place")

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=3), seed=SEEDS)
    def test_followers_hear_of_every_move(self, batch: list[list[int]], seed: int) -> None:
        """Whatever else remembers the rows is told when they fork, end, or lose tokens."""
        plain = self.run(batch, seed=seed)
        witness = _Witness()
        check(self.run(batch, seed=seed, processors=[witness]) == plain, "a follower lost its row")

    @promise
    @examples(3)
    @given(batch=batches(max_prompts=2), seed=SEEDS)
    def test_a_draft_changes_nothing(self, batch: list[list[int]], seed: int) -> None:
        """With a draft the tokens are the same, or `refuses_draft` says why there can be none."""
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
        """n results, or OptionError; competing ones are distinct and come best first.

        Of samples, the first is the one that n=1 gives.
        """
        sampler = self.plugin()
        try:
            sampler.max_rows(n)
        except OptionError:
            return
        out = self.lm.generate(prompt[0], sampler=sampler, n=n, seed=seed, max_new_tokens=4)
        every = [out, *out.alternatives]
        check(len(every) <= n, f"{len(every)} results for n={n}")
        if sampler.competing:
            scores = [one.score for one in every]
            check(scores == sorted(scores, reverse=True), f"scores {scores} are not best first")
            texts = [(tuple(one.tokens), one.finish_reason) for one in every]
            check(len(set(texts)) == len(texts), f"two results are the same: {texts}")
        else:
            check(len(every) == n, f"{len(every)} results for n={n}")
            one = self.lm.generate(prompt[0], sampler=sampler, seed=seed, max_new_tokens=4)
            check(
                out.tokens == one.tokens,
                f"the first of {n} results is {out.tokens}, and n=1 gives {one.tokens}",
            )

    @promise
    def test_a_vocabulary_may_be_small(self) -> None:
        """With two tokens it works: there may be fewer than its k, width or candidates."""
        lm = _small(2)
        for seed in range(3):
            try:
                out = lm.generate([0, 1], sampler=self.plugin(), max_new_tokens=3, seed=seed)
            except IncompatibleError:  # it needs text, which this model has not
                return
            check(len(out.tokens) == 3, f"it gives {out.tokens}")


class DrafterContract(PluginContract):
    """What a drafter promises."""

    @promise
    @examples(6)
    @given(
        batch=batches(max_prompts=3),
        seed=SEEDS,
        sampler=st.sampled_from(["greedy", "multinomial", "mirostat"]),
    )
    def test_a_draft_changes_nothing(self, batch: list[list[int]], seed: int, sampler: str) -> None:
        """With the draft the tokens are those without it."""
        lm = _with_text()
        plain = _run(lm, batch, sampler=sampler, seed=seed)
        drafted = _run(lm, batch, sampler=sampler, seed=seed, draft=self.plugin())
        check(plain == drafted, f"{batch} give other tokens with the draft")

    @promise
    @examples(6)
    @given(batch=batches(max_prompts=3), seed=SEEDS)
    def test_guesses_are_tokens(self, batch: list[list[int]], seed: int) -> None:
        """`propose` gives (rows, at most count) int64: token ids, then -1 where there are none."""
        lm = _with_text()
        drafter = self.plugin()
        problems: list[str] = []

        class Spy(Drafter):
            name = "spy"

            def start(self, decoding: Any) -> Any:
                return _Spied(drafter.start(decoding), problems)

        _run(lm, batch, sampler="multinomial", seed=seed, draft=Spy())
        check(not problems, problems[0] if problems else "")


class ScorerContract(PluginContract):
    """What a scorer promises."""

    @promise
    @examples(20)
    @given(
        logprobs=st.lists(st.floats(-30, 0), max_size=8),
        reason=st.sampled_from(["eos", "length", "stop"]),
    )
    def test_a_score_is_a_number(self, logprobs: list[float], reason: Any) -> None:
        """A finite number for every result, an empty one too, and the same each time."""
        result = Generation(
            text="x" * len(logprobs),
            tokens=[120] * len(logprobs),
            token_logprobs=logprobs,
            score=math.fsum(logprobs),
            finish_reason=reason,
            prompt_tokens=[1],
            seed=0,
        )
        with undisturbed():
            score = self.plugin().score(result)
        check(isinstance(score, int | float) and math.isfinite(score), f"it gives {score!r}")
        check(self.plugin().score(result) == score, "it gives another score the second time")


class _Only(LogitsProcessor):
    """Leaves a few tokens."""

    name = "only"
    allowed: tuple[int, ...]

    def __call__(self, logits: Tensor, rows: Rows) -> Tensor:
        masked = torch.full_like(logits, -torch.inf)
        masked[:, list(self.allowed)] = logits[:, list(self.allowed)]
        return masked


class _Repeats(LogitsProcessor):
    """Makes what a row has less likely."""

    name = "repeats"

    def __call__(self, logits: Tensor, rows: Rows) -> Tensor:
        return logits - torch.zeros_like(logits).scatter_add_(1, rows.tokens, rows.mask.float())


class _Log:
    changed = False
    last: tuple[Tensor, Tensor] | None = None


class _Guard(LogitsProcessor):
    """Sees whether the logits that it gave are as they were when it is called again."""

    name = "guard"

    @functools.cached_property
    def log(self) -> _Log:
        return _Log()

    def __call__(self, logits: Tensor, rows: Rows) -> Tensor:
        if self.log.last is not None and not torch.equal(*self.log.last):
            self.log.changed = True
        given_ = logits.clone()
        self.log.last = given_, given_.clone()
        return given_


class _Witness(LogitsProcessor):
    """Fails if its followers lose track of the rows."""

    name = "witness"

    def start(self, rows: Rows) -> "_Notes":
        return _Notes(rows)


class _Notes:
    def __init__(self, rows: Rows) -> None:
        self._tokens = [
            rows.tokens[row, :length].tolist() for row, length in enumerate(rows.lengths)
        ]

    def __call__(self, logits: Tensor, rows: Rows) -> Tensor:
        there = [rows.tokens[row, :length].tolist() for row, length in enumerate(rows.lengths)]
        check(self._tokens == there, f"a follower thinks of {self._tokens}, and the rows {there}")
        return logits

    def extend(self, tokens: Tensor) -> None:
        self._tokens = [a + b for a, b in zip(self._tokens, tokens.tolist(), strict=True)]

    def select(self, parents: Sequence[int]) -> None:
        self._tokens = [list(self._tokens[parent]) for parent in parents]

    def rewind(self, counts: Sequence[int]) -> None:
        self._tokens = [
            row[: len(row) - count] for row, count in zip(self._tokens, counts, strict=True)
        ]


def _run(lm: LanguageModel, prompts: list[list[int]], **settings: Any) -> list[Any]:
    """For each prompt its results, as (tokens, finish reason); a text if decoding fails."""
    chosen: dict[str, Any] = {"max_new_tokens": 5, **settings}
    try:
        outs = lm.generate_batch(prompts, **chosen)
    except DecodingError as error:
        return [str(error)] * len(prompts)
    return [[(one.tokens, one.finish_reason) for one in (out, *out.alternatives)] for out in outs]


@torch.inference_mode()
def _teacher_forced(
    lm: LanguageModel,
    sampler: Sampler,
    processors: Sequence[LogitsProcessor],
    prompt: list[int],
    tokens: list[int],
) -> list[float]:
    """The log-probability of each token in a run that decides nothing."""
    layers = sampler.hidden_layers(lm.model.config)
    session = DecodeSession(lm.model, [prompt], layers=layers)
    session.rows.tokenizer = lm._tokenizer
    session.rows.eos = () if lm._tokenizer is None else lm._tokenizer.eos
    processes = [one.start(session.rows) for one in (*processors, *sampler.processors())]
    for process in processes:
        if isinstance(process, Follower):
            session.follow(process)
    logprobs = []
    for token in tokens:
        scores = sampler.logits(session)
        for process in processes:
            scores = process(scores, session.rows)
        logprobs.append(scores.log_softmax(-1)[0, token].item())
        session.extend(torch.tensor([token]))
    return logprobs


class _Spied:
    """A draft whose guesses are looked at."""

    def __init__(self, draft: Any, problems: list[str]) -> None:
        self._draft, self._problems = draft, problems
        if isinstance(draft, Follower):
            self.extend, self.select, self.rewind = draft.extend, draft.select, draft.rewind

    def propose(self, decoding: Any, count: int) -> Any:
        guesses = self._draft.propose(decoding, count)
        if guesses is not None:
            self._problems += _wrong_guesses(guesses, len(decoding.live), count)
        return guesses


def _wrong_guesses(guesses: Tensor, rows: int, count: int) -> list[str]:
    vocabulary = _with_text().model.config.vocab_size
    problems = []
    if guesses.dtype != torch.int64 or guesses.dim() != 2 or len(guesses) != rows:
        problems.append(f"guesses are {tuple(guesses.shape)} {guesses.dtype} for {rows} rows")
    elif guesses.shape[1] > count:
        problems.append(f"{guesses.shape[1]} guesses where {count} were asked for")
    elif bool(((guesses < -1) | (guesses >= vocabulary)).any()):
        problems.append(f"guesses {guesses.tolist()} are no tokens")
    elif bool(((guesses[:, :-1] < 0) & (guesses[:, 1:] >= 0)).any()):
        problems.append(f"guesses {guesses.tolist()} go on after a -1")
    return problems


def _random_logits(rows: int, size: int, seed: int, scale: float) -> Tensor:
    """Random logits, a tenth of them masked."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, size, generator=generator) * scale
    masked = torch.rand(rows, size, generator=generator) < 0.1
    masked[:, 0] = False
    return drawn.masked_fill(masked, -torch.inf)


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def _differ(one: Tensor, other: Tensor) -> str:
    """Where two sets of logits differ first, in words."""
    apart = ~torch.isclose(one, other, rtol=1e-4, atol=1e-4)
    if not bool(apart.any()):
        return "the same"
    place = tuple(apart.nonzero()[0].tolist())
    return f"{one[place].item():.4f} and {other[place].item():.4f} for token {place[-1]}"
