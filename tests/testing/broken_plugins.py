"""Plug-ins that are broken on purpose, each tested with the contract for its kind.

Not a test module by its name: test_broken_promises.py runs it and expects that each class fails
the promise that it names in `breaks`.
"""

import dataclasses

import tiktoken
import torch
from pydantic import Field
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
        return gptk.Choice.one_each(torch.full((len(logits),), 7), logits, rows)


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
        return gptk.Choice.one_each(logits.topk(5).indices[:, 4], logits, rows)


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
        turns = torch.tensor(decoding.state.turns) % 2
        tokens = logits.topk(2).indices.gather(1, turns[:, None])[:, 0]
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
    dropped: str = "blocks.0.attn.qkv.bias"

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
    dropped: str = ""


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


class TestIgnoresSurplus(Loader):
    make = FillsIn
    breaks = "a tensor too many is an error"


class TestDoesNotCatch(Loader):
    make = FillsIn
    breaks = "a file cut short is an error"


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
