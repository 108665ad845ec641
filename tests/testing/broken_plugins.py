"""Plug-ins that are broken on purpose, each tested with the contract for its kind.

Not a test module by its name: test_broken_promises.py runs it and expects that each class fails
the promise that it names in `breaks`.
"""

import copy
import dataclasses
import shutil
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

import tiktoken
import torch
from pydantic import Field, field_serializer, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import gptk
from gptk import testing


class ReadsItsNeighbour(gptk.LogitsProcessor):
    """Centres the logits over all rows."""

    name = "reads-its-neighbour"

    def __call__(self, logits, rows):
        return logits - logits.nan_to_num(neginf=0).mean()


class Resurrects(gptk.LogitsProcessor):
    """Sets the logits of two tokens, masked or not."""

    name = "resurrects"

    def __call__(self, logits, rows):
        return logits.index_fill(1, torch.tensor([0, 1]), 1.0)


class DrawsGlobally(gptk.LogitsProcessor):
    """Adds noise."""

    name = "draws-globally"

    def __call__(self, logits, rows):
        return logits + torch.rand(logits.shape[1])


class MutatesInPlace(gptk.LogitsProcessor):
    """Divides."""

    name = "mutates-in-place"

    def __call__(self, logits, rows):
        return logits.div_(2)


class Counting:
    """Counts the tokens 1 of each row. Each subclass has a fault in one of the moves."""

    def __init__(self, rows):
        self.counts = [0] * len(rows)
        self.tokens = [[] for _ in range(len(rows))]

    def __call__(self, logits, rows):
        counts = [row.count(1) for row in self.tokens]
        return logits - torch.tensor(counts)[:, None] * torch.arange(logits.shape[1])

    def extend(self, tokens):
        self.tokens = [a + b for a, b in zip(self.tokens, tokens.tolist(), strict=True)]

    def select(self, parents):
        self.tokens = [list(self.tokens[parent]) for parent in parents]

    def rewind(self, counts):
        self.tokens = [r[: len(r) - n] for r, n in zip(self.tokens, counts, strict=True)]


class ForgetsSelect(gptk.LogitsProcessor):
    """Counts."""

    name = "forgets-select"

    class State(Counting):
        def select(self, parents):
            self.tokens = (self.tokens * len(parents))[: len(parents)]

    def start(self, rows):
        return self.State(rows)


class ForgetsRewind(gptk.LogitsProcessor):
    """Counts."""

    name = "forgets-rewind"

    class State(Counting):
        def rewind(self, counts):
            pass

    def start(self, rows):
        return self.State(rows)


class SharesAState(gptk.LogitsProcessor):
    """Counts, and a row and its forks share a list."""

    name = "shares-a-state"

    class State(Counting):
        def extend(self, tokens):
            for row, new in zip(self.tokens, tokens.tolist(), strict=True):
                row += new

        def select(self, parents):
            self.tokens = [self.tokens[parent] for parent in parents]

    def start(self, rows):
        return self.State(rows)


class KnowsSortedParents(gptk.LogitsProcessor):
    """Counts."""

    name = "knows-sorted-parents"

    class State(Counting):
        def select(self, parents):
            self.tokens = [
                list(row)
                for index, row in enumerate(self.tokens)
                for _ in range(list(parents).count(index))
            ]

    def start(self, rows):
        return self.State(rows)


class TakesTheFirst(gptk.LogitsProcessor):
    """Counts, but only the first of several tokens."""

    name = "takes-the-first"

    class State(Counting):
        def extend(self, tokens):
            self.tokens = [a + b[:1] for a, b in zip(self.tokens, tokens.tolist(), strict=True)]

    def start(self, rows):
        return self.State(rows)


class LeavesNothing(gptk.LogitsProcessor):
    """Removes all tokens."""

    name = "leaves-nothing"

    def __call__(self, logits, rows):
        return torch.full_like(logits, -torch.inf)


class HalfPrecision(gptk.LogitsProcessor):
    """Rounds."""

    name = "half-precision"

    def __call__(self, logits, rows):
        return logits.half()


class MovesAway(gptk.LogitsProcessor):
    """Gives logits on another device."""

    name = "moves-away"

    def __call__(self, logits, rows):
        return logits.to("meta")


class Undocumented(gptk.LogitsProcessor):
    name = "undocumented"
    strength: float = 1.0

    def __call__(self, logits, rows):
        return logits


class TakesAnything(gptk.LogitsProcessor):
    """Accepts unknown options."""

    name = "takes-anything"
    model_config = {"extra": "allow"}  # noqa: RUF012

    def __call__(self, logits, rows):
        return logits


class TestReadsItsNeighbour(testing.ProcessorContract):
    make = ReadsItsNeighbour
    breaks = "rows are independent"


class TestResurrects(testing.ProcessorContract):
    make = Resurrects
    breaks = "masked tokens stay masked"


class TestDrawsGlobally(testing.ProcessorContract):
    make = DrawsGlobally
    breaks = "equal input gives equal output"


class TestMutatesInPlace(testing.ProcessorContract):
    make = MutatesInPlace
    breaks = "its input is not changed"


class TestForgetsSelect(testing.ProcessorContract):
    make = ForgetsSelect
    breaks = "its state follows the rows"


class TestForgetsRewind(testing.ProcessorContract):
    make = ForgetsRewind
    breaks = "its state follows the rows"


class TestSharesAState(testing.ProcessorContract):
    make = SharesAState
    breaks = "its state follows the rows"


class TestKnowsSortedParents(testing.ProcessorContract):
    make = KnowsSortedParents
    breaks = "its state follows the rows"


class TestTakesTheFirst(testing.ProcessorContract):
    make = TakesTheFirst
    breaks = "its state follows the rows"


class TestLeavesNothing(testing.ProcessorContract):
    make = LeavesNothing
    breaks = "it leaves a token"


class TestHalfPrecision(testing.ProcessorContract):
    make = HalfPrecision
    breaks = "shape dtype and device are kept"


class TestMovesAway(testing.ProcessorContract):
    make = MovesAway
    breaks = "shape dtype and device are kept"


class TestUndocumented(testing.ProcessorContract):
    make = Undocumented
    breaks = "it says what it does"


class TestTakesAnything(testing.ProcessorContract):
    make = TakesAnything
    breaks = "bad options are refused"


class TopK(gptk.LogitsProcessor):
    """Keeps the k most likely tokens."""

    name = "my-top-k"
    k: int = Field(3, ge=1, description="how many to keep")
    off_by: int = Field(0, description="by how many to be wrong")

    def __call__(self, logits, rows):
        k = min(self.k + self.off_by, logits.shape[1])
        return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


class TopP(gptk.LogitsProcessor):
    """Keeps the smallest set of likeliest tokens that reaches p."""

    name = "my-top-p"
    p: float = Field(0.8, gt=0, le=1, description="the probability to reach")
    early: bool = Field(False, description="whether to stop one token early")

    def __call__(self, logits, rows):
        falling, order = logits.softmax(-1).sort(descending=True, stable=True)
        before = falling.cumsum(-1) - falling
        drop = before >= self.p
        if self.early:
            drop = falling.cumsum(-1) >= self.p
            drop[:, 0] = False
        return logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)


def first_k(self, processor, probabilities):
    return min(processor.k, int((probabilities > 0).sum()))


def first_p(self, processor, probabilities):
    return int((probabilities.cumsum(0) < processor.p).sum()) + 1


class TestTopK(testing.TruncationContract):
    make = TopK
    kept = first_k
    breaks = None


class TestTopP(testing.TruncationContract):
    make = TopP
    kept = first_p
    breaks = None


class TestOneTooMany(TestTopK):
    breaks = "it keeps as many as its definition says"

    def make(self):
        return TopK(off_by=1)


class TestOneTooFew(TestTopK):
    breaks = "it keeps as many as its definition says"

    def make(self):
        return TopK(off_by=-1)


class TestStopsEarly(TestTopP):
    breaks = "it keeps as many as its definition says"

    def make(self):
        return TopP(early=True)


class TakesMasked(gptk.Sampler):
    """Takes token 7."""

    name = "takes-masked"

    def step(self, logits, rows):
        return gptk.Choice.one_each(torch.full((len(logits),), 7 % logits.shape[1]), logits, rows)


class FlattersItself(gptk.Sampler):
    """Greedy, with log-probabilities of 0."""

    name = "flatters-itself"

    def step(self, logits, rows):
        tokens = logits.argmax(-1)
        logprobs = torch.zeros(len(logits))
        return gptk.Choice(tokens=tokens, logprobs=logprobs, scores=rows.scores)


class ScalesInPlace(gptk.Sampler):
    """Greedy, and changes the logits."""

    name = "scales-in-place"

    def step(self, logits, rows):
        return gptk.Choice.one_each(logits.div_(2).argmax(-1), logits, rows)


class DrawsSecretly(gptk.Sampler):
    """Draws, but `random` is False."""

    name = "draws-secretly"

    def step(self, logits, rows):
        race = rows.exponential(logits.shape[1]) / logits.softmax(-1)
        return gptk.Choice.one_each(race.argmin(-1), logits, rows)


class DrawsFromTorch(gptk.Sampler):
    """Draws from torch's generator."""

    name = "draws-from-torch"
    random = True

    def step(self, logits, rows):
        return gptk.Choice.one_each(logits.softmax(-1).multinomial(1)[:, 0], logits, rows)


class AsksTheNeighbour(gptk.Sampler):
    """Takes the first row's token for all rows."""

    name = "asks-the-neighbour"

    def step(self, logits, rows):
        return gptk.Choice.one_each(logits[:1].argmax(-1).expand(len(logits)), logits, rows)


class NeedsFiveTokens(gptk.Sampler):
    """Takes the fifth token."""

    name = "needs-five-tokens"

    def step(self, logits, rows):
        best, tokens = logits.topk(5)
        fifth = ~best[:, 4].isneginf()
        return gptk.Choice.one_each(tokens[:, 4].where(fifth, tokens[:, 0]), logits, rows)


class Rotates(gptk.Sampler):
    """Takes each row's likeliest and second likeliest token in turns."""

    name = "rotates"

    class State:
        def __init__(self, rows):
            self.turns = [0] * rows

        def extend(self, tokens):
            self.turns = [turn + tokens.shape[1] for turn in self.turns]

        def select(self, parents):
            self.turns = list(range(len(parents)))

        def rewind(self, counts):
            self.turns = [turn - count for turn, count in zip(self.turns, counts, strict=True)]

    def start(self, decoding):
        return self.State(len(decoding.session.rows))

    def advance(self, decoding):
        logits = decoding.processed_logits()
        best, tokens = logits.topk(2)
        turns = torch.tensor(decoding.state.turns) % 2 * ~best[:, 1].isneginf()
        tokens = tokens.gather(1, turns[:, None])[:, 0]
        decoding.commit(gptk.Choice.one_each(tokens, logits, decoding.session.rows))


class ForgetsScores(gptk.Sampler):
    """Greedy, with the last token's log-probability as the score."""

    name = "forgets-scores"

    def step(self, logits, rows):
        best = gptk.Choice.one_each(logits.argmax(-1), logits, rows)
        return gptk.Choice(tokens=best.tokens, logprobs=best.logprobs, scores=best.logprobs)


class PicksTheLast(gptk.Sampler):
    """Draws, and gives the last results first."""

    name = "picks-the-last"
    random = True

    def step(self, logits, rows):
        race = rows.exponential(logits.shape[1]) / logits.softmax(-1)
        return gptk.Choice.one_each(race.argmin(-1), logits, rows)

    def pick(self, results, n):
        return results[::-1][:n]


class TestForgetsScores(testing.SamplerContract):
    make = ForgetsScores
    breaks = "log probabilities are those of the model"


class TestPicksTheLast(testing.SamplerContract):
    make = PicksTheLast
    breaks = "n results are what was asked for"


class TestTakesMasked(testing.SamplerContract):
    make = TakesMasked
    breaks = "masked tokens are never chosen"


class TestFlattersItself(testing.SamplerContract):
    make = FlattersItself
    breaks = "log probabilities are those of the model"


class TestScalesInPlace(testing.SamplerContract):
    make = ScalesInPlace
    breaks = "its input is not changed"


class TestDrawsSecretly(testing.SamplerContract):
    make = DrawsSecretly
    breaks = "it says whether it draws"


class TestDrawsFromTorch(testing.SamplerContract):
    make = DrawsFromTorch
    breaks = "equal seeds give equal tokens"


class TestAsksTheNeighbour(testing.SamplerContract):
    make = AsksTheNeighbour
    breaks = "a prompt gets the same alone and in a batch"


class TestNeedsFiveTokens(testing.SamplerContract):
    make = NeedsFiveTokens
    breaks = "a vocabulary may be small"


class TestRotates(testing.SamplerContract):
    make = Rotates
    breaks = "its state follows the rows"


class JumpsOnResume(gptk.LRScheduler):
    """Its factor falls with every call."""

    name = "jumps-on-resume"
    _calls: list[int] = []  # noqa: RUF012

    def factor(self, step, total_steps):
        self._calls.append(step)
        return 1 / len(self._calls)


class Overshoots(gptk.LRScheduler):
    """Its factor rises to 2."""

    name = "overshoots"

    def factor(self, step, total_steps):
        return 2.0 * step / total_steps


class TestJumpsOnResume(testing.SchedulerContract):
    make = JumpsOnResume
    breaks = "a resumed schedule equals an unbroken one"


class TestOvershoots(testing.SchedulerContract):
    make = Overshoots
    breaks = "it is a share of the peak"


class IgnoresWarmup(gptk.LRScheduler):
    """The full rate from the first step on."""

    name = "ignores-warmup"

    def __call__(self, step, total_steps):
        return 1.0


class TestIgnoresWarmup(testing.SchedulerContract):
    make = IgnoresWarmup
    breaks = "warmup never falls"


class WithoutGradient(gptk.Regularizer):
    """A penalty without a gradient."""

    name = "without-gradient"

    def penalty(self, model, logits, targets):
        return torch.stack([p.detach().abs().sum() for p in model.parameters()]).sum()


class Misspells(gptk.Regularizer):
    """Returns an option that no optimizer has."""

    name = "misspells"

    def parameter_options(self, module, name, parameter):
        return {"weight_decy": 0.1}


class TestWithoutGradient(testing.RegularizerContract):
    make = WithoutGradient
    breaks = "a penalty is never negative"


class TestMisspells(testing.RegularizerContract):
    make = Misspells
    breaks = "parameter options are numbers"


class Rewards(gptk.Regularizer):
    """A negative penalty."""

    name = "rewards"

    def penalty(self, model, logits, targets):
        return -logits.square().mean()


class Detaches(gptk.Regularizer):
    """A loss without a path to the weights."""

    name = "detaches"

    def loss(self, loss, logits, targets):
        return loss.detach().requires_grad_()


class RemembersElsewhere(gptk.Regularizer):
    """Shrinks the weights more at each step, and keeps the count outside of `state`."""

    name = "remembers-elsewhere"
    _steps: list[int] = []  # noqa: RUF012

    def after_step(self, model, state):
        self._steps.append(1)
        with torch.no_grad():
            model.embed.weight.mul_(1 - 0.01 * len(self._steps))


class TestRewards(testing.RegularizerContract):
    make = Rewards
    breaks = "a penalty is never negative"


class TestDetaches(testing.RegularizerContract):
    make = Detaches
    breaks = "a loss is a number that leads back to the weights"


class TestRemembersElsewhere(testing.RegularizerContract):
    make = RemembersElsewhere
    breaks = "a resumed run equals an unbroken one"


class DropsATensor(gptk.WeightLoader):
    """Reads safetensors, and fills missing tensors with zeros."""

    name = "drops-a-tensor"
    path: str = Field(description="the file")
    dropped: str = Field("blocks.0.attn.qkv.bias", description="a tensor to forget")

    def load(self):
        tensors = load_file(self.path)
        config = testing.LoaderContract.config
        state = {}
        for name, tensor in testing.tiny_gpt(config).named_parameters():
            missing = name == self.dropped or name not in tensors
            state[name] = torch.zeros_like(tensor) if missing else tensors[name]
        return gptk.Checkpoint(config=config, state=state, source=self.path)


class FillsIn(DropsATensor):
    """Ignores no tensor, but still fills missing ones with zeros."""

    name = "fills-in"
    dropped: str = Field("", description="a tensor to forget")


class Loader(testing.LoaderContract):
    def write(self, folder, config, state):
        save_file(state, folder / "model.safetensors")
        return str(folder / "model.safetensors")


class AnotherConfiguration(gptk.WeightLoader):
    """Reads all tensors, with a configuration of other heads."""

    name = "another-configuration"
    path: str = Field(description="the file")

    def load(self):
        config = dataclasses.replace(
            testing.LoaderContract.config, n_heads=4, n_kv_heads=4, head_dim=4
        )
        return gptk.Checkpoint(config=config, state=load_file(self.path), source=self.path)


class TestAnotherConfiguration(Loader):
    make = AnotherConfiguration
    breaks = "every tensor arrives"


class TestDropsATensor(Loader):
    make = DropsATensor
    breaks = "every tensor arrives"


class TestFillsIn(Loader):
    make = FillsIn
    breaks = "a missing tensor is an error"


class LosesSpaces(gptk.TokenizerLoader):
    """All bytes but spaces, which it drops."""

    name = "loses-spaces"

    def load(self):
        ranks = {bytes([i]): i for i in range(256)}
        encoding = tiktoken.Encoding(
            self.name, pat_str=r"[^ ]", mergeable_ranks=ranks, special_tokens={}
        )
        return gptk.Tokenizer(encoding)


class TestLosesSpaces(testing.TokenizerContract):
    make = LosesSpaces
    breaks = "a text is decoded to itself"


# Plug-ins of any kind.


class ChangesItsOptions(gptk.LogitsProcessor):
    """Doubles its strength each time it is made."""

    name = "changes-its-options"
    strength: float = Field(1.0, description="how strong")

    @field_validator("strength")
    @classmethod
    def _double(cls, value):
        return 2 * value

    def __call__(self, logits, rows):
        return logits


class TestChangesItsOptions(testing.ProcessorContract):
    breaks = "it can be made"

    def make(self):
        return ChangesItsOptions(strength=1.5)


class My_Processor(gptk.LogitsProcessor):  # noqa: N801
    """Its name is of another form."""

    name = "my_processor"

    def __call__(self, logits, rows):
        return logits


class TestMyProcessor(testing.ProcessorContract):
    make = My_Processor
    breaks = "it can be made"


class TestOfAnotherKind(testing.SamplerContract):
    make = My_Processor
    breaks = "it can be made"


class NeedsAnOption(gptk.Sampler):
    """Greedy."""

    name = "needs-an-option"
    strength: float = Field(description="how strong")


class TestNeedsAnOption(testing.SamplerContract):
    make = NeedsAnOption
    breaks = "it can be made"


class RoundsInItsSpec(gptk.LogitsProcessor):
    """Writes its strength with two digits."""

    name = "rounds-in-its-spec"
    strength: float = Field(1.0, description="how strong")

    @field_serializer("strength")
    def _round(self, value):
        return round(value, 2)

    def __call__(self, logits, rows):
        return logits


class TestRoundsInItsSpec(testing.ProcessorContract):
    make = RoundsInItsSpec
    breaks = "its options round trip through the spec string"


class StripsItsText(gptk.LogitsProcessor):
    """Writes its text without quotes."""

    name = "strips-its-text"
    text: str = Field("x", description="what to look for")

    @property
    def spec(self):
        return f"{self.name}:text={self.text}"

    def __call__(self, logits, rows):
        return logits


class TestStripsItsText(testing.ProcessorContract):
    make = StripsItsText
    breaks = "its options round trip through the spec string"


class TakesNaN(gptk.LogitsProcessor):
    """Accepts a strength that is no number."""

    name = "takes-nan"
    model_config = {"allow_inf_nan": True}  # noqa: RUF012
    strength: float = Field(1.0, description="how strong")

    def __call__(self, logits, rows):
        return logits


class TestTakesNaN(testing.ProcessorContract):
    make = TakesNaN
    breaks = "bad options are refused"


class CanBeSet(gptk.LogitsProcessor):
    """Has an option that can be set."""

    name = "can-be-set"
    strength: float = Field(1.0, description="how strong")

    def __setattr__(self, name, value):
        self.__dict__[name] = value

    def __call__(self, logits, rows):
        return logits


class TestCanBeSet(testing.ProcessorContract):
    make = CanBeSet
    breaks = "it is not changed by use"


# Processors.


class Standardizes(gptk.LogitsProcessor):
    """Divides by the standard deviation, which is 0 or no number where few tokens are left."""

    name = "standardizes"

    def __call__(self, logits, rows):
        kept = logits.where(~logits.isneginf(), torch.nan)
        deviation = (
            (kept - kept.nanmean(-1, keepdim=True)).square().nanmean(-1, keepdim=True).sqrt()
        )
        return logits / deviation


class TestStandardizes(testing.ProcessorContract):
    make = Standardizes
    breaks = "shape dtype and device are kept"


class ReturnsNothing(gptk.LogitsProcessor):
    """Has no return."""

    name = "returns-nothing"

    def __call__(self, logits, rows):
        logits - 1


class TestReturnsNothing(testing.ProcessorContract):
    make = ReturnsNothing
    breaks = "shape dtype and device are kept"


class WritesIntoRows(gptk.LogitsProcessor):
    """Replaces the last tokens."""

    name = "writes-into-rows"

    def __call__(self, logits, rows):
        rows.tokens[:, -1] = 5
        return logits


class TestWritesIntoRows(testing.ProcessorContract):
    make = WritesIntoRows
    breaks = "its input is not changed"


class CountsItsCalls(gptk.LogitsProcessor):
    """Sharpens more with each call."""

    name = "counts-its-calls"
    _calls: list[int] = []  # noqa: RUF012

    def __call__(self, logits, rows):
        self._calls.append(1)
        return logits * (1 + 0.1 * len(self._calls))


class TestCountsItsCalls(testing.ProcessorContract):
    make = CountsItsCalls
    breaks = "one instance serves several calls"


class SeesTwoCallsAlike(gptk.LogitsProcessor):
    """Keeps the rows of the last call that began: two calls at once see those of one."""

    name = "sees-two-calls-alike"
    _begun: list[int] = []  # noqa: RUF012

    def start(self, rows):
        self._begun[:] = rows.prompt_lengths
        return self

    def __call__(self, logits, rows):
        return logits * (1 + sum(self._begun))


class TestSeesTwoCallsAlike(testing.ProcessorContract):
    make = SeesTwoCallsAlike
    breaks = "one instance serves several calls"


class RemembersForEver(gptk.LogitsProcessor):
    """Never lets a token come that any row of any call has had, once three steps are made."""

    name = "remembers-for-ever"
    _seen: set[int] = set()  # noqa: RUF012

    def __call__(self, logits, rows):
        if max(rows.lengths) - min(rows.prompt_lengths) > 2:
            self._seen.update(rows.tokens.flatten().tolist())
        return logits - 3.0 * torch.tensor([[t in self._seen for t in range(logits.shape[1])]])


class TestRemembersForEver(testing.ProcessorContract):
    make = RemembersForEver
    breaks = "one instance serves several calls"


class NeedsTwo(gptk.LogitsProcessor):
    """Where a single token is left, lets them all come back."""

    name = "needs-two"

    def __call__(self, logits, rows):
        single = (~logits.isneginf()).sum(-1, keepdim=True) == 1
        return torch.where(single, torch.zeros_like(logits), logits)


class TestNeedsTwo(testing.ProcessorContract):
    make = NeedsTwo
    breaks = "masked tokens stay masked"


class RemovesTheLikeliest(gptk.LogitsProcessor):
    """Removes all tokens as likely as the likeliest."""

    name = "removes-the-likeliest"

    def __call__(self, logits, rows):
        best = logits == logits.amax(-1, keepdim=True)
        alone = (~logits.isneginf()).sum(-1, keepdim=True) < 2
        return logits.masked_fill(best & ~alone, -torch.inf)


class TestRemovesTheLikeliest(testing.ProcessorContract):
    make = RemovesTheLikeliest
    breaks = "it leaves a token"


class LooksAtItsPlace(gptk.LogitsProcessor):
    """Treats the third row and those after it in another way."""

    name = "looks-at-its-place"

    def __call__(self, logits, rows):
        places = torch.arange(len(logits))[:, None]
        return logits * torch.where(places < 2, 1.0, 1.5)


class TestLooksAtItsPlace(testing.ProcessorContract):
    make = LooksAtItsPlace
    breaks = "rows are independent"


class CountsPadding(gptk.LogitsProcessor):
    """Takes the zeros that pad shorter rows for tokens."""

    name = "counts-padding"

    def __call__(self, logits, rows):
        return logits - (rows.tokens == 0).sum(dim=1, keepdim=True)


class TestCountsPadding(testing.ProcessorContract):
    make = CountsPadding
    breaks = "rows are independent"


class HalvesWhatItKeeps(TopK):
    """Keeps the k most likely tokens, and halves their logits."""

    name = "halves-what-it-keeps"

    def __call__(self, logits, rows):
        return super().__call__(logits, rows) / 2


class TestHalvesWhatItKeeps(testing.TruncationContract):
    make = HalvesWhatItKeeps
    kept = first_k
    breaks = "the likeliest tokens stay as they are"


class BreaksTiesAway(gptk.LogitsProcessor):
    """Keeps the tokens above the k-th: where these are as likely as it, none."""

    name = "breaks-ties-away"
    k: int = Field(3, ge=1, description="how many to keep")

    def __call__(self, logits, rows):
        least = logits.topk(min(self.k + 1, logits.shape[1])).values[:, -1:]
        kept = logits > least
        return logits.masked_fill(~kept & kept.any(-1, keepdim=True), -torch.inf)


class TestBreaksTiesAway(testing.TruncationContract):
    make = BreaksTiesAway
    kept = first_k
    breaks = "it keeps as many as its definition says"


# Samplers.


class ChoosesForOne(gptk.Sampler):
    """A token for the first row only."""

    name = "chooses-for-one"

    def step(self, logits, rows):
        tokens = logits[:1].argmax(-1)
        return gptk.Choice(tokens, torch.zeros(1), torch.zeros(1))


class TestChoosesForOne(testing.SamplerContract):
    make = ChoosesForOne
    breaks = "it chooses a token for each row"


class ScoresAreNoNumbers(gptk.Sampler):
    """Greedy, with NaN for scores."""

    name = "scores-are-no-numbers"

    def step(self, logits, rows):
        best = gptk.Choice.one_each(logits.argmax(-1), logits, rows)
        return dataclasses.replace(best, scores=best.scores * torch.nan)


class TestScoresAreNoNumbers(testing.SamplerContract):
    make = ScoresAreNoNumbers
    breaks = "it chooses a token for each row"


class Unfinished(gptk.Sampler):
    """Has no step."""

    name = "unfinished"


class TestUnfinished(testing.SamplerContract):
    make = Unfinished
    breaks = "it chooses a token for each row"


class DrawsByTheClock(gptk.Sampler):
    """Draws by the time."""

    name = "draws-by-the-clock"
    random = True

    def step(self, logits, rows):
        generator = torch.Generator().manual_seed(time.time_ns() % 2**31)
        tokens = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
        return gptk.Choice.one_each(tokens, logits, rows)


class TestDrawsByTheClock(testing.SamplerContract):
    make = DrawsByTheClock
    breaks = "equal seeds give equal tokens"


class Tires(gptk.Sampler):
    """Greedy for its first 40 steps, and then the second likeliest token."""

    name = "tires"
    _steps: list[int] = []  # noqa: RUF012

    def step(self, logits, rows):
        self._steps.append(1)
        best, tokens = logits.topk(2)
        second = ~best[:, 1].isneginf() & (len(self._steps) > 40)
        return gptk.Choice.one_each(tokens[:, 1].where(second, tokens[:, 0]), logits, rows)


class TestTires(testing.SamplerContract):
    make = Tires
    breaks = "one instance serves several calls"


class KeepsItsRun(gptk.Sampler):
    """Keeps the lengths of the prompts on itself: two calls at once see those of the second."""

    name = "keeps-its-run"
    _lengths: list[int] = []  # noqa: RUF012

    def start(self, run):
        self._lengths[:] = run.session.rows.prompt_lengths

    def step(self, logits, rows):
        best, tokens = logits.topk(2)
        second = ~best[:, 1].isneginf() & (len(self._lengths) > 10)
        return gptk.Choice.one_each(tokens[:, 1].where(second, tokens[:, 0]), logits, rows)


class TestKeepsItsRun(testing.SamplerContract):
    make = KeepsItsRun
    breaks = "one instance serves several calls"


class Wander(gptk.Sampler):
    """The likeliest token, and one time in four the second likeliest, masked or not."""

    name = "wander"
    random = True

    def step(self, logits, rows):
        tokens = logits.topk(2).indices
        second = rows.uniform() < 0.25
        return gptk.Choice.one_each(tokens[:, 1].where(second, tokens[:, 0]), logits, rows)


class TestWander(testing.SamplerContract):
    make = Wander
    breaks = "masked tokens are never chosen"


class RarelyWanders(gptk.Sampler):
    """The likeliest token, and one time in fifty the second likeliest, masked or not."""

    name = "rarely-wanders"
    random = True

    def step(self, logits, rows):
        tokens = logits.topk(2).indices
        second = rows.uniform() < 0.02
        return gptk.Choice.one_each(tokens[:, 1].where(second, tokens[:, 0]), logits, rows)


class TestRarelyWanders(testing.SamplerContract):
    make = RarelyWanders
    breaks = "masked tokens are never chosen"


class ClaimsToDraw(gptk.Sampler):
    """Greedy, and `random` is True."""

    name = "claims-to-draw"
    random = True

    def step(self, logits, rows):
        return gptk.Choice.one_each(logits.argmax(-1), logits, rows)


class TestClaimsToDraw(testing.SamplerContract):
    make = ClaimsToDraw
    breaks = "it says whether it draws"


class RarelyDraws(gptk.Sampler):
    """Greedy, but draws one time in a hundred, and `random` is False."""

    name = "rarely-draws"

    def step(self, logits, rows):
        race = rows.exponential(logits.shape[1]) / logits.softmax(-1)
        drawn = rows.uniform() < 0.01
        return gptk.Choice.one_each(race.argmin(-1).where(drawn, logits.argmax(-1)), logits, rows)


class TestRarelyDraws(testing.SamplerContract):
    make = RarelyDraws
    breaks = "it says whether it draws"


class LooksAtItsRow(gptk.Sampler):
    """The third row and those after it get the second likeliest token."""

    name = "looks-at-its-row"

    def step(self, logits, rows):
        best, tokens = logits.topk(2)
        second = (torch.arange(len(logits)) >= 2) & ~best[:, 1].isneginf()
        return gptk.Choice.one_each(tokens[:, 1].where(second, tokens[:, 0]), logits, rows)


class TestLooksAtItsRow(testing.SamplerContract):
    make = LooksAtItsRow
    breaks = "a prompt gets the same alone and in a batch"


class NeedsACache(gptk.Sampler):
    """Greedy with a KV cache, otherwise the second likeliest token."""

    name = "needs-a-cache"

    def advance(self, run):
        logits = run.processed_logits()
        best, tokens = logits.topk(2)
        second = ~best[:, 1].isneginf() & (run.session._cache is None)
        tokens = tokens[:, 1].where(second, tokens[:, 0])
        run.commit(gptk.Choice.one_each(tokens, logits, run.session.rows))


class TestNeedsACache(testing.SamplerContract):
    make = NeedsACache
    breaks = "the cache changes nothing"


class MovesBehindBacks(gptk.Sampler):
    """Greedy, and changes the rows' last token once it is read."""

    name = "moves-behind-backs"

    def step(self, logits, rows):
        choice = gptk.Choice.one_each(logits.argmax(-1), logits, rows)
        if min(a - b for a, b in zip(rows.lengths, rows.prompt_lengths, strict=True)) > 1:
            for row, length in enumerate(rows.lengths):
                rows._tokens[row, length - 2] = 3
        return choice


class TestMovesBehindBacks(testing.SamplerContract):
    make = MovesBehindBacks
    breaks = "followers hear of every move"

    # It changes what a run without a cache reads, too; here only the followers' promise is tried.
    test_the_cache_changes_nothing = None


class DrawsByTheStep(gptk.Sampler):
    """Draws by the number of the step, of which a draft needs others."""

    name = "draws-by-the-step"
    random = True

    def advance(self, run):
        logits, rows = run.processed_logits(), run.session.rows
        race = rows.exponential(logits.shape[1]) / logits.softmax(-1)
        tokens = (race * (1 + run.steps % 3 * torch.arange(logits.shape[1]))).argmin(-1)
        run.commit(gptk.Choice.one_each(tokens, logits, rows))

    def refuses_draft(self):
        return None


class TestDrawsByTheStep(testing.SamplerContract):
    make = DrawsByTheStep
    breaks = "a draft changes nothing"


# Drafters.


class Drafter(gptk.Drafter):
    """Guesses the row's last token again; the classes below have a fault in it."""

    name = "again"

    def start(self, run):
        return self

    def guesses(self, run, count):
        rows = run.session.rows
        last = torch.tensor([int(rows.tokens[i, n - 1]) for i, n in enumerate(rows.lengths)])
        return last[:, None].expand(-1, count).clone()

    def propose(self, run, count):
        return self.guesses(run, count)


class TestAgain(testing.DrafterContract):
    make = Drafter
    breaks = None


class GoesOnAfterNone(Drafter):
    """Guesses on after a -1."""

    name = "goes-on-after-none"

    def propose(self, run, count):
        guesses = self.guesses(run, count)
        guesses[:, 0] = -1
        return guesses


class TestGoesOnAfterNone(testing.DrafterContract):
    make = GoesOnAfterNone
    breaks = "guesses are tokens"


class GuessesTooMany(Drafter):
    """Guesses a token more than it is asked for."""

    name = "guesses-too-many"

    def propose(self, run, count):
        return self.guesses(run, count + 1)


class TestGuessesTooMany(testing.DrafterContract):
    make = GuessesTooMany
    breaks = "guesses are tokens"


class GuessesLess(Drafter):
    """Guesses fewer tokens after each call."""

    name = "guesses-less"
    _calls: list[int] = []  # noqa: RUF012

    def propose(self, run, count):
        self._calls.append(1)
        return self.guesses(run, max(1, count - len(self._calls) // 4))


class TestGuessesLess(testing.DrafterContract):
    make = GuessesLess
    breaks = "one instance serves several calls"


class TakesTheirLuck(Drafter):
    """Gives all rows the random stream of the first."""

    name = "takes-their-luck"

    def propose(self, run, count):
        rows = run.session.rows
        rows._streams = rows.streams[:1] * len(rows)
        return self.guesses(run, count)


class TestTakesTheirLuck(testing.DrafterContract):
    make = TakesTheirLuck
    breaks = "a draft changes nothing"


# Scorers.


class MeanOfNothing(gptk.Scorer):
    """The mean, which an empty result does not have."""

    name = "mean-of-nothing"

    def score(self, result):
        return torch.tensor(result.token_logprobs).mean().item()


class TestMeanOfNothing(testing.ScorerContract):
    make = MeanOfNothing
    breaks = "a score is a number"


class PrefersTheFirst(gptk.Scorer):
    """Lower with each other result."""

    name = "prefers-the-first"
    _seen: dict[int, int] = {}  # noqa: RUF012

    def score(self, result):
        key = hash((tuple(result.token_logprobs), result.finish_reason))
        return -self._seen.setdefault(key, len(self._seen))


class TestPrefersTheFirst(testing.ScorerContract):
    make = PrefersTheFirst
    breaks = "one instance serves several calls"


# Metrics.


class LongestOfNone(gptk.Metric):
    """The mean length, infinite where there are no results."""

    name = "longest-of-none"

    def measure(self, results, logprobs):
        return float(max((len(result.tokens) for result in results), default=float("inf")))


class TestLongestOfNone(testing.MetricContract):
    make = LongestOfNone
    breaks = "a measure is a number or none"


class SortsThem(gptk.Metric):
    """The median log-probability, of lists that it sorts in place."""

    name = "sorts-them"

    def measure(self, results, logprobs):
        for one in logprobs:
            one.sort()
        middles = [one[len(one) // 2] for one in logprobs if one]
        return middles[0] if middles else None


class TestSortsThem(testing.MetricContract):
    make = SortsThem
    breaks = "results are left as they were"


class NewWords(gptk.Metric):
    """How many tokens were in no prompt measured before."""

    name = "new-words"
    _seen: dict[int, int] = {}  # noqa: RUF012

    def measure(self, results, logprobs):
        tokens = [token for result in results for token in result.tokens]
        return float(sum(self._seen.setdefault(t, len(self._seen)) for t in sorted(tokens)))


class TestNewWords(testing.MetricContract):
    make = NewWords
    breaks = "one instance serves several calls"


# Schedulers.


class RisesAfterTheEnd(gptk.LRScheduler):
    """Goes on after the last step."""

    name = "rises-after-the-end"

    def factor(self, step, total_steps):
        return 1 - step / total_steps

    def __call__(self, step, total_steps):
        return super().__call__(step, total_steps) if step < total_steps else 1.0


class TestRisesAfterTheEnd(testing.SchedulerContract):
    make = RisesAfterTheEnd
    breaks = "after the last step nothing changes"


class DividesByTheRest(gptk.LRScheduler):
    """Fails where there is a single step."""

    name = "divides-by-the-rest"

    def factor(self, step, total_steps):
        return 1 - step / (total_steps - 1)


class TestDividesByTheRest(testing.SchedulerContract):
    make = DividesByTheRest
    breaks = "it is a share of the peak"


# Regularizers.


class DividesByTheNorm(gptk.Regularizer):
    """Scales each gradient to length 1, also one of 0."""

    name = "divides-by-the-norm"

    def before_step(self, model):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= parameter.grad.norm()


class TestDividesByTheNorm(testing.RegularizerContract):
    make = DividesByTheNorm
    breaks = "gradients keep their shape"


class DropsAGradient(gptk.Regularizer):
    """Freezes the last norm."""

    name = "drops-a-gradient"

    def before_step(self, model):
        model.norm.weight.grad = None


class TestDropsAGradient(testing.RegularizerContract):
    make = DropsAGradient
    breaks = "gradients keep their shape"


class GrowsWithUse(gptk.Regularizer):
    """Its penalty grows with each run that it begins."""

    name = "grows-with-use"
    _runs: list[int] = []  # noqa: RUF012

    def setup(self, model):
        self._runs.append(1)

    def penalty(self, model, logits, targets):
        return 1e-3 * max(0, len(self._runs) - 1) * logits.square().mean()


class TestGrowsWithUse(testing.RegularizerContract):
    make = GrowsWithUse
    breaks = "a resumed run equals an unbroken one"


class LosesCountBetweenRuns(gptk.Regularizer):
    """Has its own state for the first two runs that it begins, and shares it between the others."""

    name = "loses-count"
    _runs: list[int] = []  # noqa: RUF012

    def setup(self, model):
        self._runs.append(1)

    def penalty(self, model, logits, targets):
        return 1e-3 * (len(self._runs) > 2) * logits.square().mean()


class TestLosesCountBetweenRuns(testing.RegularizerContract):
    make = LosesCountBetweenRuns
    breaks = "one instance serves several calls"


class AveragesAnother(gptk.Regularizer):
    """Averages a weight that the model does not have."""

    name = "averages-another"

    def averaged(self, state):
        return {"no.such.weight": torch.zeros(3)}


class TestAveragesAnother(testing.RegularizerContract):
    make = AveragesAnother
    breaks = "averaged weights fit the model"


class AddsNoise(gptk.Regularizer):
    """Adds noise to the loss."""

    name = "adds-noise"

    def loss(self, loss, logits, targets):
        return loss + 1e-3 * torch.rand(())


class TestAddsNoise(testing.RegularizerContract):
    make = AddsNoise
    breaks = "equal input gives equal output"


class StillOn(gptk.Regularizer):
    """Has a penalty also at strength 0."""

    name = "still-on"
    strength: float = Field(1.0, ge=0, description="how strong")

    def penalty(self, model, logits, targets):
        return (1e-3 + self.strength) * logits.square().mean()


class TestStillOn(testing.RegularizerContract):
    make = StillOn
    off: ClassVar = {"strength": 0}
    breaks = "at no strength it does nothing"


# Loaders, writers, tokenizers.


class KeepsAll(gptk.WeightLoader):
    """Reads safetensors, without a fault; the classes below have one."""

    name = "keeps-all"
    path: str = Field(description="the file")

    def tensors(self):
        return load_file(self.path)

    def load(self):
        try:
            tensors = self.tensors()
            config = testing.LoaderContract.config
            return gptk.Checkpoint(
                config, gptk.Tensors(tensors_of(tensors), self.path).assemble(config, {})
            )
        except (OSError, SafetensorError) as error:
            raise gptk.SourceError(f"{self.path}: {error}") from None


def tensors_of(tensors):
    return {name: partial(tensors.__getitem__, name) for name in tensors}


class TestKeepsAll(Loader):
    make = KeepsAll
    breaks = None


class MatchesAnything(KeepsAll):
    """Takes every file for its own."""

    name = "matches-anything"

    @classmethod
    def matches(cls, source):
        return Path(source).is_file()


class IgnoresSurplus(KeepsAll):
    """Ignores the tensors that it does not know."""

    name = "ignores-surplus"

    def tensors(self):
        return {name: t for name, t in load_file(self.path).items() if "surplus" not in name}


class TestIgnoresSurplus(Loader):
    make = IgnoresSurplus
    breaks = "a tensor too many is an error"


class DoesNotCatch(KeepsAll):
    """Raises what safetensors raises."""

    name = "does-not-catch"

    def load(self):
        load_file(self.path)
        return super().load()


class TestDoesNotCatch(Loader):
    make = DoesNotCatch
    breaks = "a file cut short is an error"


class TestMatchesAnything(Loader):
    make = MatchesAnything
    breaks = "what is not its own is left to others"


class ReadsTheFirstFile(KeepsAll):
    """Reads the file that was read first, whatever its path is."""

    name = "reads-the-first-file"

    def load(self):
        return _first_loaded.setdefault(type(self), super().load())


_first_loaded = {}


class TestReadsTheFirstFile(Loader):
    make = ReadsTheFirstFile
    breaks = "one instance serves several calls"

    def load(self, source):
        _first_loaded.clear()
        return super().load(source)


class WritesHalves(gptk.WeightWriter):
    """Writes in half the precision."""

    name = "writes-halves"

    def write(self, path, model, tokenizer):
        half = gptk.LanguageModel(rounded(model))
        shutil.copytree(half.save(path / "m") or path / "m", path, dirs_exist_ok=True)


def rounded(model):
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.half().float()
    return copied


class TestWritesHalves(testing.WriterContract):
    make = WritesHalves
    breaks = "what it writes is read back"


class WritesTheFirst(gptk.WeightWriter):
    """Writes the model that it wrote first."""

    name = "writes-the-first"
    _models: list[object] = []  # noqa: RUF012

    def write(self, path, model, tokenizer):
        self._models.append(model)
        first = gptk.LanguageModel(self._models[0])
        shutil.copytree(first.save(path / "m") or path / "m", path, dirs_exist_ok=True)


class TestWritesTheFirst(testing.WriterContract):
    make = WritesTheFirst
    breaks = "one instance serves several calls"


def byte_tokenizer(name, *, special=None, eos=(), ranks=None):
    ranks = {bytes([i]): i for i in range(256)} if ranks is None else ranks
    encoding = tiktoken.Encoding(
        name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special or {}
    )
    return gptk.Tokenizer(encoding, eos=eos)


class EndsBeyond(gptk.TokenizerLoader):
    """Its EOS is not in its vocabulary."""

    name = "ends-beyond"

    def load(self):
        return byte_tokenizer(self.name, eos=(999,))


class TestEndsBeyond(testing.TokenizerContract):
    make = EndsBeyond
    breaks = "ids are those of the vocabulary"


class Shuffles(gptk.TokenizerLoader):
    """Numbers the bytes in another order each time it is loaded."""

    name = "shuffles"

    def load(self):
        _loaded.append(1)
        shift = len(_loaded)
        return byte_tokenizer(self.name, ranks={bytes([i]): (i + shift) % 256 for i in range(256)})


_loaded = []


class TestShuffles(testing.TokenizerContract):
    make = Shuffles
    breaks = "one instance serves several calls"


class SpellsSpecialTokens(gptk.TokenizerLoader):
    """Special tokens are encoded letter by letter."""

    name = "spells-special-tokens"

    def load(self):
        tokenizer = byte_tokenizer(self.name, special={"<|end|>": 256}, eos=(256,))
        return Spelling(tokenizer.encoding, eos=(256,))


class Spelling(gptk.Tokenizer):
    def encode(self, text):
        return [*text.encode()]


class TestSpellsSpecialTokens(testing.TokenizerContract):
    make = SpellsSpecialTokens
    breaks = "special tokens are one token each"


# Observers.


class Observes(gptk.DecodingObserver):
    """Has a listener with a fault."""

    name = "observes"

    def start(self, run):
        return self.Listener()


class TestObserves(testing.DecodingObserverContract):
    breaks = None

    class make(Observes):  # noqa: N801
        """Does nothing."""

        name = "observes-nothing"
        Listener: ClassVar = gptk.DecodingListener


class KnowsOneRow(Observes):
    """Expects a single row."""

    name = "knows-one-row"

    class Listener(gptk.DecodingListener):
        def step(self, step):
            (_,) = step.rows


class TestKnowsOneRow(testing.DecodingObserverContract):
    make = KnowsOneRow
    breaks = "it hears every step"


class RoundsLogits(Observes):
    """Rounds the logits in place."""

    name = "rounds-logits"

    class Listener(gptk.DecodingListener):
        def step(self, step):
            step.logits.round_()


class TestRoundsLogits(testing.DecodingObserverContract):
    make = RoundsLogits
    breaks = "it changes nothing"


class ListensOnce(gptk.DecodingObserver):
    """Fails while another run goes on."""

    name = "listens-once"
    _open: list[int] = []  # noqa: RUF012

    def start(self, run):
        if self._open:
            raise RuntimeError("busy")
        self._open.append(1)
        return ClosesIt(self._open)


class ClosesIt(gptk.DecodingListener):
    def __init__(self, opened):
        self._opened = opened

    def close(self):
        self._opened.clear()


class TestListensOnce(testing.DecodingObserverContract):
    make = ListensOnce
    breaks = "one instance serves several calls"


class KeepsEntropies(gptk.DecodingObserver, gptk.DecodingListener):
    """Is its own listener."""

    name = "keeps-entropies"
    seen: list[float] = Field([], description="entropies in nats")

    def start(self, run):
        return self

    def step(self, step):
        self.seen.extend(step.entropy.tolist())


class TestKeepsEntropies(testing.DecodingObserverContract):
    make = KeepsEntropies
    breaks = "one instance serves several calls"


class CountsSteps(Observes):
    """Counts the steps of all instances together."""

    name = "counts-steps"
    steps: ClassVar[list[int]] = []

    class Listener(gptk.DecodingListener):
        def step(self, step):
            CountsSteps.steps.append(1)


class TestCountsSteps(testing.DecodingObserverContract):
    make = CountsSteps
    breaks = "one instance serves several calls"


class ReadsLosses(gptk.TrainingObserver):
    """Expects a loss in every record."""

    name = "reads-losses"

    def start(self, run):
        return Losses()


class Losses(gptk.TrainingListener):
    def record(self, record):
        float(record["loss"])


class TestReadsLosses(testing.TrainingObserverContract):
    make = ReadsLosses
    breaks = "it hears every record"


class TrainsOnce(gptk.TrainingObserver):
    """Fails if it is used for a second run."""

    name = "trains-once"
    _runs: list[int] = []  # noqa: RUF012

    def start(self, run):
        if len(self._runs) > 1:
            raise RuntimeError("used up")
        self._runs.append(1)
        return gptk.TrainingListener()


class KeepsRecords(gptk.TrainingObserver, gptk.TrainingListener):
    """Is its own listener."""

    name = "keeps-records"
    _records: list = []  # noqa: RUF012

    def start(self, run):
        return self

    def record(self, record):
        self._records.append(record)


class TestKeepsRecords(testing.TrainingObserverContract):
    make = KeepsRecords
    breaks = "one instance serves several calls"


class TestTrainsOnce(testing.TrainingObserverContract):
    make = TrainsOnce
    breaks = "one instance serves several calls"
