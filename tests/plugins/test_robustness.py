"""What plug-ins and callers get wrong, or push to an extreme, is told in a line or does no harm."""

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch

import gptk
from gptk.data.windows import Windows
from gptk.testing import markov_lm, tiny_gpt, tiny_lm
from training_runs import config

LM = tiny_lm()


def register(item, hook, request):
    """Provide a plug-in class by name until the test ends."""
    module = type("Module", (), {hook: staticmethod(gptk.hookimpl(lambda: [item]))})()
    getattr(module, hook).__name__ = hook
    gptk.plugins.register(module)
    request.addfinalizer(lambda: gptk.plugins.unregister(module))


class TestDeadBeams:
    """A beam without a token to go on with leaves its place to the others."""

    CHOICE = 'choice:choices=["a","bcdefghijkl"]'

    @pytest.mark.parametrize(
        "sampler",
        ["beam:width=2", "diverse-beam:width=4", "beam-sample:width=4", "stochastic-beam:width=4"],
    )
    def test_the_others_go_on(self, sampler):
        # After "a" nothing is allowed but the end, which is ignored.
        out = LM.generate(
            "hello", sampler=sampler, processors=[self.CHOICE], ignore_eos=True,
            max_new_tokens=5, seed=0,
        )  # fmt: skip
        assert out.text == "bcdef"
        assert math.isfinite(out.score)

    def test_results_stay_whatever_becomes_of_the_others(self):
        fine = 0
        for seed in range(10):
            try:
                out = tiny_lm(seed=seed).generate(
                    "hello", sampler="beam:width=4,early_stopping=never", n=4, max_new_tokens=8,
                    processors=["top-p:p=0.6", 'logit-bias:bias={"256":2}',
                                'regex:pattern="[a-m]{1,2}|[n-z]{3,6}"'],
                )  # fmt: skip
            except gptk.DecodingError:  # all beams are dead before one has ended
                continue
            fine += 1
            for result in (out, *out.alternatives):
                assert math.isfinite(result.score)
                assert result.complete or result.finish_reason == "length"
        assert fine

    def test_where_all_are_dead_it_is_said_who_left_nothing(self):
        with pytest.raises(gptk.DecodingError, match="processor choice left no token"):
            LM.generate(
                "x", sampler="beam", processors=['choice:choices=["a","b"]'], ignore_eos=True
            )


class LooksAhead(gptk.Sampler):
    """Greedy, after a look at what comes next, and asking twice."""

    name = "looks-ahead"

    def advance(self, decoding):
        session = decoding.session
        logits = decoding.processed_logits()
        tokens = logits.argmax(-1)
        session.extend(tokens)
        decoding.processed_logits()
        session.rewind(1)
        decoding.commit(gptk.Choice.one_each(tokens, logits, session.rows))


def test_a_sampler_may_look_ahead_and_take_back(tmp_path):
    steps = {}
    for sampler in ("greedy", LooksAhead()):
        path = tmp_path / "t.jsonl"
        out = LM.generate(
            "ab", sampler=sampler, processors=["top-k:k=9"], max_new_tokens=6,
            observers=[f"trace:path={path}"],
        )  # fmt: skip
        lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        shown = [(line["entropy"], line["removed"], line["candidates"]) for line in lines]
        steps[str(sampler)] = out.tokens, shown
    greedy, looking = steps.values()
    assert looking == greedy


def test_best_of_n_prefers_a_text_to_none():
    lm = markov_lm([[0.5, 0.5, 0.0], [0.4, 0.6, 0.0], [0.0, 0.5, 0.5]])
    tokens = [
        lm.generate([2], sampler="best-of-n:n=8", max_new_tokens=1, seed=seed).tokens
        for seed in range(5)
    ]
    assert all(tokens)
    scorer = gptk.plugins.create("scorer", "mean-logprob", gptk.Scorer)
    out = LM.generate("x", max_new_tokens=2, ignore_eos=True)
    empty = dataclasses.replace(out, tokens=[], token_logprobs=[], text="")
    assert scorer.score(empty) < scorer.score(out)


class TwoAtATime(gptk.Sampler):
    """Greedy, two tokens a step."""

    name = "two-at-a-time"

    def advance(self, decoding):
        for _ in range(2):
            if decoding.live:
                decoding.commit(self.step(decoding.processed_logits(), decoding.session.rows))

    def step(self, logits, rows):
        return gptk.Choice.one_each(logits.argmax(-1), logits, rows)


@pytest.mark.parametrize("stop", [(), ("e",), (" t",)])
def test_a_stream_shows_all_that_a_step_made(stop):
    text = "hello there"
    settings = {"max_new_tokens": 9, "stop": stop, "processors": [f'choice:choices=["{text}"]']}
    stream = LM.stream("x", sampler=TwoAtATime(), **settings)
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text == LM.generate("x", **settings).text
    assert pieces[0]


class CountsItself(gptk.LogitsProcessor):
    """Keeps to the token that is as many steps on; the processor is its own follower."""

    name = "counts-itself"
    _rows: list[int] = []  # noqa: RUF012

    def start(self, rows):
        self._rows[:] = [0] * len(rows)
        return self

    def __call__(self, logits, rows):
        masked = torch.full_like(logits, -torch.inf)
        masked[torch.arange(len(logits)), self._rows] = 0.0
        return masked

    def extend(self, tokens):
        self._rows[:] = [n + tokens.shape[1] for n in self._rows]

    def select(self, parents):
        self._rows[:] = [self._rows[p] for p in parents]

    def rewind(self, counts):
        self._rows[:] = [n - c for n, c in zip(self._rows, counts, strict=True)]


def test_a_processor_may_be_its_own_follower():
    out = LM.generate("x", processors=[CountsItself()], max_new_tokens=5)
    assert out.tokens == [0, 1, 2, 3, 4]


def chooses(make):
    class Chooses(gptk.Sampler):
        """Chooses wrongly."""

        name = "chooses"

        def step(self, logits, rows):
            return make(logits, rows)

    return Chooses()


class TestWhatASamplerChooses:
    """A choice that cannot be is a PluginError that names the sampler."""

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda logits, rows: logits.argmax(-1), "returned tensor.*must return a gptk.Choice"),
            (lambda logits, rows: None, "returned None; it must return a gptk.Choice"),
            (
                lambda logits, rows: gptk.Choice(
                    logits.argmax(-1).float(), torch.zeros(len(logits)), torch.zeros(len(logits))
                ),
                "chose tokens of type torch.float32; they must be whole numbers",
            ),
            (
                lambda logits, rows: gptk.Choice(
                    torch.full((len(logits),), 257), torch.zeros(len(logits)), rows.scores
                ),
                "chose token 257; the vocabulary has 257",
            ),
            (
                lambda logits, rows: gptk.Choice(
                    torch.full((len(logits),), -1), torch.zeros(len(logits)), rows.scores
                ),
                "chose token -1; the vocabulary has 257",
            ),
            (
                lambda logits, rows: gptk.Choice(
                    logits.argmax(-1), torch.zeros(len(logits)), rows.scores,
                    parents=torch.tensor([3]),
                ),
                "chose for row 3 of 1",
            ),
        ],
    )  # fmt: skip
    def test_it_is_checked(self, make, message):
        with pytest.raises(gptk.PluginError, match=f"sampler chooses {message}"):
            LM.generate("x", sampler=chooses(make))

    def test_smaller_integers_will_do(self):
        def make(logits, rows):
            best = gptk.Choice.one_each(logits.argmax(-1), logits, rows)
            return dataclasses.replace(best, tokens=best.tokens.to(torch.int32))

        want = LM.generate("x", max_new_tokens=5).tokens
        assert LM.generate("x", sampler=chooses(make), max_new_tokens=5).tokens == want


def guesses(made):
    class Guesses(gptk.Drafter):
        """Guesses wrongly."""

        name = "guesses"

        def start(self, decoding):
            return self

        def propose(self, decoding, count):
            return made

    return Guesses()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([1, 2], r"guessed \[1, 2\]; it must give a tensor"),
        (torch.zeros(1, 2), "of shape \\(1, 2\\) and type torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int64), "of shape \\(2, 2\\) and type torch.int64"),
        (torch.zeros(3, dtype=torch.int64), "of shape \\(3,\\) and type torch.int64"),
        (torch.zeros(1, 60, dtype=torch.int64), "60 tokens ahead where 7 were asked for"),
        (torch.tensor([[999]]), "guessed token 999; the vocabulary has 257"),
        (torch.tensor([[-2]]), "guessed token -2"),
    ],
)
def test_what_a_drafter_guesses_is_checked(made, message):
    with pytest.raises(gptk.PluginError, match=f"drafter guesses .*{message}"):
        LM.generate("x", draft=guesses(made), max_new_tokens=8)


def test_dola_goes_with_samplers_that_only_choose():
    with pytest.raises(gptk.OptionError, match="beam"):
        LM.generate("x", sampler="dola:sampler=beam")


class OwnWay(gptk.Sampler):
    """Draws, by an `advance` of its own; step alone knows nothing."""

    name = "own-way"
    random = True

    def advance(self, decoding):
        logits, rows = decoding.processed_logits(), decoding.session.rows
        race = rows.exponential(logits.shape[1]) / logits.softmax(-1)
        decoding.commit(gptk.Choice.one_each(race.argmin(-1), logits, rows))


def test_best_of_n_over_a_sampler_with_its_own_advance(request):
    register(OwnWay, "gptk_samplers", request)
    out = LM.generate("x", sampler="best-of-n:n=3,sampler=own-way", max_new_tokens=4, seed=1)
    assert out == LM.generate("x", sampler="best-of-n:n=3", max_new_tokens=4, seed=1) or out.tokens


class Innocent(gptk.LogitsProcessor):
    """Does nothing."""

    name = "innocent"

    def __call__(self, logits, rows):
        return logits


class Guilty(gptk.LogitsProcessor):
    """Fails."""

    name = "guilty"

    def __call__(self, logits, rows):
        raise KeyError("oh")


class GuiltyState(gptk.LogitsProcessor):
    """Its state fails."""

    name = "guilty-state"

    class State:
        def __call__(self, logits, rows):
            raise KeyError("oh")

    def start(self, rows):
        return self.State()


@pytest.mark.parametrize("make", [Guilty, GuiltyState])
def test_of_two_plugins_in_a_module_the_right_one_is_named(make):
    for processors in ([Innocent(), make()], [make(), Innocent()]):
        with pytest.raises(gptk.PluginError, match=f"^processor {make.name} of .* failed"):
            LM.generate("x", processors=processors)


class Odd(gptk.LogitsProcessor):
    """Returns, or begins with, what its options say."""

    name = "odd"
    fault: str = ""

    def start(self, rows):
        return None if self.fault == "start" else self

    def __call__(self, logits, rows):
        return logits.nan_to_num(neginf=-99).long() if self.fault == "integers" else logits

    def is_complete(self, tokens, rows):
        return 1 / 0 if self.fault == "is_complete" else None


class OddSampler(gptk.Sampler):
    """Fails where its option says."""

    name = "odd-sampler"
    fault: str = ""

    def max_rows(self, n):
        return 1 / 0 if self.fault == "max_rows" else n

    def hidden_layers(self, config):
        return 1 / 0 if self.fault == "hidden_layers" else ()

    def rank(self, score, length):
        return 1 / 0 if self.fault == "rank" else score

    def pick(self, results, n):
        return [] if self.fault == "pick" else results[:n]

    def advance(self, decoding):
        if self.fault != "advance":
            super().advance(decoding)

    def step(self, logits, rows):
        best = gptk.Choice.one_each(logits.argmax(-1), logits, rows)
        if self.fault == "lists":
            return dataclasses.replace(best, tokens=best.tokens.tolist())
        if self.fault == "nan":
            return dataclasses.replace(best, scores=best.scores * torch.nan)
        return best


class OddDrafter(gptk.Drafter):
    """Begins with nothing."""

    name = "odd-drafter"

    def start(self, decoding):
        return None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"processors": [Odd(fault="start")]}, r"processor odd: start\(\) returned None; it must"),
        ({"processors": [Odd(fault="integers")]}, "processor odd returned .* type torch.int64"),
        ({"processors": [Odd(fault="is_complete")]}, "processor odd of .* in Odd.is_complete"),
        ({"sampler": OddSampler(fault="max_rows")}, "sampler odd-sampler of .*max_rows"),
        ({"sampler": OddSampler(fault="hidden_layers")}, "odd-sampler of .*hidden_layers"),
        ({"sampler": OddSampler(fault="rank")}, "sampler odd-sampler of .*OddSampler.rank"),
        ({"sampler": OddSampler(fault="pick")}, "sampler odd-sampler picked none of 1 results"),
        ({"sampler": OddSampler(fault="advance")}, "odd-sampler made no choice in a step"),
        ({"sampler": OddSampler(fault="lists")}, "chose tokens of type list; they must be tensors"),
        ({"draft": OddDrafter()}, r"drafter odd-drafter: start\(\) returned None; it must"),
    ],
)  # fmt: skip
def test_faults_of_plugins_are_theirs(settings, message):
    with pytest.raises(gptk.PluginError, match=message):
        LM.generate("x", **settings, max_new_tokens=3)


class Unfinished(gptk.Sampler):
    """Has no step."""

    name = "unfinished"


class Outdated(gptk.Sampler):
    """Takes no rows."""

    name = "outdated"

    def step(self, logits):
        return None


class OutdatedState(gptk.LogitsProcessor):
    """Makes a state that takes no rows."""

    name = "outdated-state"

    def start(self, rows):
        return TakesNoRows()


class TakesNoRows:
    def __call__(self, logits):
        return logits


class NoStart(gptk.DecodingObserver):
    """Has no start."""

    name = "no-start"


MODULE = "of module test_robustness failed: "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sampler": Unfinished()},
            f"sampler unfinished {MODULE}NotImplementedError: Unfinished does not define step",
        ),
        ({"sampler": Outdated()}, rf"outdated {MODULE}TypeError: Outdated.step\(\) takes 2"),
        (
            {"processors": [OutdatedState()]},
            rf"outdated-state {MODULE}TypeError: TakesNoRows.__call__\(\) takes 2",
        ),
    ],
)
def test_what_a_plugin_lacks_or_does_not_take_is_its_fault(settings, message):
    with pytest.raises(gptk.PluginError, match=message):
        LM.generate("x", **settings, max_new_tokens=3)


def test_an_observer_that_lacks_a_method_is_named():
    with pytest.warns(gptk.PluginWarning, match=f"decoding-observer no-start {MODULE}"):
        LM.generate("x", observers=[NoStart()], max_new_tokens=2)


class Three(gptk.TokenizerLoader):
    """No tokenizer."""

    name = "three"

    def load(self):
        return 3


def test_a_tokenizer_that_is_none_is_told_so(request):
    register(Three, "gptk_tokenizers", request)
    message = r"^tokenizer three of Module \(hook gptk_tokenizers\): load\(\) returned 3; it must"
    with pytest.raises(gptk.PluginError, match=message):
        gptk.load_tokenizer("three")


class OddScheduler(gptk.LRScheduler):
    """Gives a word for a rate."""

    name = "odd-scheduler"

    def factor(self, step, total_steps):
        return "fast" if step == 1 else 1.0


class OddRegularizer(gptk.Regularizer):
    """Goes wrong where it is asked to."""

    name = "odd-regularizer"
    fault: str

    def parameter_options(self, module, name, parameter):
        return None if self.fault == "parameter_options" else {}

    def loss(self, loss, logits, targets):
        return None if self.fault == "loss" else loss

    def penalty(self, model, logits, targets):
        return None if self.fault == "penalty" else 0.0

    def before_step(self, model):
        return 0.5 if self.fault == "before_step" else None


class NeverStarts(gptk.TrainingObserver):
    """Fails at once."""

    name = "never-starts"

    def start(self, run):
        raise KeyError("oh")


def trained(**settings):
    windows = Windows(np.arange(400) % 257, 16)
    trainer = gptk.Trainer(tiny_gpt(), windows, windows, config(steps=2, **settings))
    trainer.train()
    return trainer


class TestTraining:
    """Plug-ins of a training run that go wrong."""

    def test_a_rate_that_is_no_number(self, request):
        register(OddScheduler, "gptk_lr_schedulers", request)
        with pytest.raises(
            gptk.PluginError, match=r"odd-scheduler of Module .*: factor\(\) returned 'f"
        ):
            trained(scheduler="odd-scheduler")

    @pytest.mark.parametrize("fault", ["parameter_options", "loss", "penalty", "before_step"])
    def test_a_regularizer_that_returns_something_else(self, fault, request):
        register(OddRegularizer, "gptk_regularizers", request)
        message = rf"odd-regularizer of Module .*: {fault}\(\) returned (None|0\.5); it must return"
        with pytest.raises(gptk.PluginError, match=message):
            trained(regularizers=[f"odd-regularizer:fault={fault}"])

    def test_an_observer_that_cannot_begin_is_warned_of(self, request):
        register(NeverStarts, "gptk_training_observers", request)
        with pytest.warns(gptk.PluginWarning, match="training-observer never-starts .* KeyError"):
            assert trained(observers=["never-starts"]).step_count == 2


def test_a_score_that_is_no_number_is_told_so():
    with pytest.raises(gptk.DecodingError, match=r"gave its token a score .* that is no number"):
        LM.generate("x", sampler=OddSampler(fault="nan"))


def test_the_callers_own_functions_are_not_a_plugins():
    def stop(tokens):
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        LM.generate("x", sampler=OddSampler(), stop=stop)


def test_an_observer_that_cannot_begin_is_warned_of():
    class CannotBegin(gptk.DecodingObserver):
        """Fails at once."""

        name = "cannot-begin"

        def start(self, decoding):
            raise KeyError("oh")

    want = LM.generate("x", max_new_tokens=3, seed=0)
    with pytest.warns(gptk.PluginWarning, match="decoding-observer cannot-begin .* KeyError"):
        assert LM.generate("x", max_new_tokens=3, seed=0, observers=[CannotBegin()]) == want


def test_a_hook_takes_no_arguments():
    module = type("Module", (), {})()
    module.gptk_samplers = gptk.hookimpl(_with_an_argument)
    with pytest.raises(gptk.PluginError, match=r"hook gptk_samplers takes no arguments; .*manager"):
        gptk.plugins.register(module)


def gptk_samplers(manager):
    return []


_with_an_argument = gptk_samplers


class TestSettings:
    """What is given in place of a setting."""

    def test_none_means_none(self):
        settings = {"max_new_tokens": 3, "seed": 0}
        none = {"stop": None, "processors": None, "observers": None}
        assert LM.generate("x", **settings, **none) == LM.generate("x", **settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"processors": 3}, "processors is 3; it must be a list of specs or instances"),
            ({"observers": 0.5}, "observers is 0.5; it must be a list of specs or instances"),
            ({"stop": 3}, "stop is 3; it must be a text, a function, or a list of these"),
            ({"max_tokens": 3}, "no setting max_tokens; write max_new_tokens=3"),
            (
                {"temperature": 0.5},
                "no setting temperature; write processors=\\['temperature:0.5'\\]",
            ),
            ({"top_p": 0.5}, "no setting top_p; write processors=\\['top-p:0.5'\\]"),
        ],
    )
    def test_what_cannot_be_is_told(self, settings, message):
        with pytest.raises(gptk.OptionError, match=message):
            LM.generate("x", **settings)


def test_dropout_is_for_training():
    model = tiny_gpt()
    want = gptk.LanguageModel(model).generate([1, 2], max_new_tokens=8).tokens
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    model.train()
    assert gptk.LanguageModel(model).generate([1, 2], max_new_tokens=8).tokens == want
    assert model.training


class TestSessions:
    """A session is left as it was by a call that cannot be."""

    @pytest.fixture
    def session(self):
        return gptk.DecodeSession(LM.model, [[1, 2, 3], [4, 5]])

    def test_tokens_of_any_integer_type(self, session):
        other = gptk.DecodeSession(LM.model, [[1, 2, 3], [4, 5]])
        one = session.extend(torch.tensor([7, 8], dtype=torch.int32))
        assert torch.equal(one, other.extend(torch.tensor([7, 8])))

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (torch.tensor([1.0, 2.0]), "tokens of type torch.float32"),
            (torch.tensor([1, 257]), "token 257 is not in the model's vocabulary of 257"),
            (torch.tensor([-1, 1]), "token -1 is not in"),
            (torch.tensor([1]), r"tokens of shape \(1, 1\) cannot extend 2 rows"),
        ],
    )
    def test_tokens_that_cannot_be(self, session, tokens, message):
        logits = session.logits
        with pytest.raises(gptk.DecodingError, match=message):
            session.extend(tokens)
        assert list(session.rows.lengths) == [3, 2]
        assert torch.equal(session.logits, logits)

    @pytest.mark.parametrize("counts", [[1], [1, 1, 1], []])
    def test_as_many_counts_as_rows(self, session, counts):
        session.extend(torch.tensor([7, 8]))
        with pytest.raises(gptk.DecodingError, match=f"{len(counts)} counts for 2 rows"):
            session.rewind(counts)
        assert list(session.rows.lengths) == [4, 3]
        session.rewind(1)
        assert list(session.rows.lengths) == [3, 2]

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ([], "a session needs a prompt"),
            ([[1], []], "prompt 2 has no tokens"),
            ([[1], [257]], "token 257 is not in the model's vocabulary of 257"),
        ],
    )
    def test_prompts_that_cannot_be(self, prompts, message):
        with pytest.raises(gptk.PromptError, match=message):
            gptk.DecodeSession(LM.model, prompts)


def test_a_long_hypothesis_can_be_shown_compared_and_sent():
    from gptk.hooks.results import Hypothesis

    one = Hypothesis(prompt=0)
    for length in range(5000):
        one = Hypothesis(prompt=0, parent=one, token=1, length=length + 1)
    assert len(repr(one)) < 500
    assert one != dataclasses.replace(one, token=2)
    assert hash(one) == hash(dataclasses.replace(one))
    assert pickle.loads(pickle.dumps(dataclasses.replace(one, parent=None))).length == 5000


def test_observers_that_began_are_closed_where_a_later_one_cannot(tmp_path):
    closed = []

    class Begins(gptk.DecodingObserver):
        """Begins."""

        name = "begins"

        def start(self, decoding):
            class Listener(gptk.DecodingListener):
                def step(self, step): ...

                def close(self):
                    closed.append(1)

            return Listener()

    with pytest.raises(gptk.GptkError):
        LM.generate("x", observers=[Begins(), f"trace:path={tmp_path}/nowhere/t.jsonl"])
    assert closed == [1]


def test_a_batch_of_no_prompts():
    assert LM.generate_batch([]) == []
    assert list(LM.generate_many([])) == []


OPTIONS = [
    pytest.param(kind, plugin.name, option, id=f"{plugin.name}-{option}")
    for kind in ("sampler", "processor")
    for plugin in gptk.plugins.provided(kind).values()
    for option, field in plugin.item.model_fields.items()
    if field.annotation in (float, int, float | None, int | None)
    and plugin.distribution.startswith("gptk-decoding ")
]


EXTREMES = [0, 1e-45, 1e-30, 1e30, 1e300, -1e30, math.inf, -math.inf]
COUNTED = {"width", "beam_groups", "n"}
"""Options that ask for as much work as they say."""


@pytest.mark.parametrize(("kind", "name", "option"), OPTIONS)
def test_extreme_options_work_or_are_refused(kind, name, option):
    item = gptk.plugins.find(kind, name).item
    base = {"sampler": gptk.Sampler, "processor": gptk.LogitsProcessor}[kind]
    made = gptk.plugins.create(kind, f"{name}:{item.example}".rstrip(":"), base)
    whole = item.model_fields[option].annotation in (int, int | None)
    for value in EXTREMES:
        given = int(value) if whole and math.isfinite(value) else value
        if kind == "sampler" and option in COUNTED and given > 1:
            continue
        try:
            plugin = item(**{**made.model_dump(exclude_defaults=True), option: given})
        except gptk.OptionError:
            continue
        settings = {"sampler": plugin}
        if kind == "processor":
            settings = {"sampler": "multinomial", "processors": [plugin]}
        try:
            out = LM.generate("ab ab ab", **settings, max_new_tokens=4, seed=0)
        except gptk.OptionError:  # it does not go with another option
            continue
        for number in (out.score, *out.token_logprobs):
            assert math.isfinite(number), (given, out)


class NoCheckpoint(gptk.WeightLoader):
    """No checkpoint."""

    name = "no-checkpoint"

    @classmethod
    def matches(cls, source):
        return source == "no-checkpoint"

    @classmethod
    def from_source(cls, source):
        return cls()

    def load(self):
        return 3


def test_a_loader_of_something_else_is_named(request):
    register(NoCheckpoint, "gptk_weight_loaders", request)
    with pytest.raises(gptk.PluginError, match=r"no-checkpoint of .*load\(\) returned 3"):
        gptk.load("no-checkpoint")
