"""Models that are broken on purpose, each tested with the contract for models.

Not a test module by its name: test_broken_promises.py runs it and expects that each class fails
the promise that it names in `breaks`. All but a few are tables, see toys.TableModel.
"""

import torch
from torch import nn

from gptk import testing
from toys import TableCache, TableModel, table_model

TABLE = table_model(40).log_table.exp()


class Table(TableModel):
    """A table that is not broken; the classes below override something."""

    def __init__(self):
        super().__init__(TABLE)


class Layered:
    """A GPT that is not broken, as an object that is no module."""

    def __init__(self):
        self.gpt = testing.tiny_gpt()

    def __getattr__(self, name):
        return getattr(self.gpt, name)


class HalfPrecisionStates(Table):
    def states(self, ids, cache, counts, layers):
        return super().states(ids, cache, counts, layers).half()


class WithoutLayersAxis(Table):
    def states(self, ids, cache, counts, layers):
        return super().states(ids, cache, counts, layers)[:, :, 0]

    def logits(self, states):
        return self.log_table[states.long()]


class OfAnotherWidth(Layered):
    def __init__(self):
        super().__init__()
        self.config = testing.tiny_gpt(testing.LoaderContract.config).config


class PadsItsVocabulary(Table):
    def logits(self, states):
        return nn.functional.pad(super().logits(states), (0, 24), value=-torch.inf)


class HalfPrecisionLogits(Table):
    def logits(self, states):
        return super().logits(states).bfloat16()


class OnlyWholeBatches(Table):
    def logits(self, states):
        rows, time, _ = states.shape
        return super().logits(states).view(rows, time, -1)


class LayersInReverse(Layered):
    def states(self, ids, cache, counts, layers):
        states = self.gpt.states(ids, cache, counts, layers)
        return torch.cat((states[:, :, :1], states[:, :, 1:].flip(2)), dim=2)


class CountsLayersFromOne(Layered):
    def __init__(self):
        super().__init__()
        self.config = testing.tiny_gpt().config

    def states(self, ids, cache, counts, layers):
        return self.gpt.states(ids, cache, counts, {min(layer + 1, 2) for layer in layers})


class LooksAhead(Table):
    def states(self, ids, cache, counts, layers):
        states = super().states(ids, cache, counts, layers)
        return (states + states[:, -1:]) % len(TABLE)


class BeginsAnewWithSeveral(Table):
    """A pass of several tokens forgets the tokens before it."""

    def states(self, ids, cache, counts, layers):
        if ids.shape[1] == 1 or cache is None or not any(cache.lengths):
            return super().states(ids, cache, counts, layers)
        fresh = TableCache(len(ids))
        states = super().states(ids, fresh, counts, layers)
        cache.lines = [old + new for old, new in zip(cache.lines, fresh.lines, strict=True)]
        return states


class KeepsPadding(Table):
    """What `counts` says is padding is read all the same."""

    def states(self, ids, cache, counts, layers):
        return super().states(ids, cache, None, layers)


class AddsItsNeighbour(Table):
    def states(self, ids, cache, counts, layers):
        states = super().states(ids, cache, counts, layers)
        return (states + states[:1]) % len(TABLE)


class WithCache(Table):
    """A table with another cache."""

    def new_cache(self, rows, capacity):
        return self.Cache(rows)


class SharesRows(WithCache):
    class Cache(TableCache):
        def select(self, parents):
            self.lines = [self.lines[parent] for parent in parents]


class SelectsInOrder(WithCache):
    class Cache(TableCache):
        def select(self, parents):
            super().select(sorted(parents))


class RewindsAllAlike(WithCache):
    class Cache(TableCache):
        def rewind(self, counts):
            super().rewind([min(counts)] * len(counts))


class RewindsLengthsOnly(WithCache):
    """The length is right, and what was read still counts."""

    class Cache(TableCache):
        def rewind(self, counts):
            for lines, count in zip(self.lines, counts, strict=True):
                if 0 < count < len(lines):
                    lines[-count - 1 :] = lines[-1:]


class ClearsTheFirstRow(WithCache):
    class Cache(TableCache):
        def clear(self):
            self.lines = [[], *self.lines[1:]]


class ClearsRowsToo(WithCache):
    class Cache(TableCache):
        def clear(self):
            self.lines = []


class RewindsOldRows(WithCache):
    """After `select`, `rewind` takes the counts of the rows as they were before."""

    class Cache(TableCache):
        def __init__(self, rows):
            super().__init__(rows)
            self.order = list(range(rows))

        def select(self, parents):
            super().select(parents)
            self.order = [self.order[parent] for parent in parents]

        def rewind(self, counts):
            super().rewind([counts[min(old, len(counts) - 1)] for old in self.order])


class FixedCapacity(Table):
    def new_cache(self, rows, capacity):
        cache = TableCache(rows)
        cache.capacity = max(capacity, 4)
        return cache

    def states(self, ids, cache, counts, layers):
        if cache is not None and max(cache.lengths) + ids.shape[1] > max(cache.capacity, 24):
            raise IndexError("the cache is full")
        return super().states(ids, cache, counts, layers)


class HasOneCache(Table):
    """As if the cache were part of the model."""

    cache = None

    def new_cache(self, rows, capacity):
        self.cache = self.cache or TableCache(rows)
        self.cache.lines = [[] for _ in range(rows)]
        return self.cache


class LogitsOfTheLastPass(Table):
    def states(self, ids, cache, counts, layers):
        self.last = super().states(ids, cache, counts, layers)
        return self.last

    def logits(self, states):
        return super().logits(states) + self.last.flatten()[0]


class LogitsOfOthers(Table):
    def logits(self, states):
        logits = super().logits(states)
        return logits - logits.mean()


class DrawsNoise(Table):
    def states(self, ids, cache, counts, layers):
        states = super().states(ids, cache, counts, layers)
        return (states + torch.randint(2, states.shape)) % len(TABLE)


class ShiftsIdsInPlace(Table):
    def states(self, ids, cache, counts, layers):
        return super().states(ids.add_(1), cache, counts, layers)


class ScalesStatesInPlace(Table):
    def logits(self, states):
        return super().logits(states.mul_(1.5))


class StaysInTraining(nn.Module):
    """Once trained, it has dropout for ever."""

    training_seen = False

    def __init__(self):
        super().__init__()
        self.gpt = testing.tiny_gpt()
        self.config = self.gpt.config
        self.device, self.dtype = self.gpt.device, self.gpt.dtype
        self.new_cache, self.logits = self.gpt.new_cache, self.gpt.logits

    def train(self, mode=True):
        self.training_seen |= mode
        return super().train(mode)

    def states(self, ids, cache, counts, layers):
        states = self.gpt.states(ids, cache, counts, layers)
        return nn.functional.dropout(states, 0.3, training=self.training_seen)


class TestTable(testing.ModelContract):
    make = Table
    breaks = None


class TestLayered(testing.ModelContract):
    make = Layered
    breaks = None


class TestHalfPrecisionStates(testing.ModelContract):
    make = HalfPrecisionStates
    breaks = "states are as the configuration says"


class TestWithoutLayersAxis(testing.ModelContract):
    make = WithoutLayersAxis
    breaks = "states are as the configuration says"


class TestOfAnotherWidth(testing.ModelContract):
    make = OfAnotherWidth
    breaks = "states are as the configuration says"


class TestPadsItsVocabulary(testing.ModelContract):
    make = PadsItsVocabulary
    breaks = "logits are as the configuration says"


class TestHalfPrecisionLogits(testing.ModelContract):
    make = HalfPrecisionLogits
    breaks = "logits are as the configuration says"


class TestOnlyWholeBatches(testing.ModelContract):
    make = OnlyWholeBatches
    breaks = "logits are as the configuration says"


class TestLayersInReverse(testing.ModelContract):
    make = LayersInReverse
    breaks = "layers that are asked for are returned"


class TestCountsLayersFromOne(testing.ModelContract):
    make = CountsLayersFromOne
    breaks = "states are as the configuration says"


class TestLooksAhead(testing.ModelContract):
    make = LooksAhead
    breaks = "later tokens change nothing"


class TestBeginsAnewWithSeveral(testing.ModelContract):
    make = BeginsAnewWithSeveral
    breaks = "the cache changes nothing"


class TestKeepsPadding(testing.ModelContract):
    make = KeepsPadding
    breaks = "rows are independent"


class TestAddsItsNeighbour(testing.ModelContract):
    make = AddsItsNeighbour
    breaks = "rows are independent"


class TestSharesRows(testing.ModelContract):
    make = SharesRows
    breaks = "its cache copies reorders and drops rows"


class TestSelectsInOrder(testing.ModelContract):
    make = SelectsInOrder
    breaks = "its cache copies reorders and drops rows"


class TestRewindsAllAlike(testing.ModelContract):
    make = RewindsAllAlike
    breaks = "its cache drops tokens"


class TestRewindsLengthsOnly(testing.ModelContract):
    make = RewindsLengthsOnly
    breaks = "its cache drops tokens"


class TestClearsTheFirstRow(testing.ModelContract):
    make = ClearsTheFirstRow
    breaks = "its cache forgets all tokens"


class TestClearsRowsToo(testing.ModelContract):
    make = ClearsRowsToo
    breaks = "its cache forgets all tokens"


class TestRewindsOldRows(testing.ModelContract):
    make = RewindsOldRows
    breaks = "its cache follows any moves"


class TestFixedCapacity(testing.ModelContract):
    make = FixedCapacity
    breaks = "a cache grows up to the window"


class TestHasOneCache(testing.ModelContract):
    make = HasOneCache
    breaks = "caches are independent"


class TestLogitsOfTheLastPass(testing.ModelContract):
    make = LogitsOfTheLastPass
    breaks = "logits are a function of states"


class TestLogitsOfOthers(testing.ModelContract):
    make = LogitsOfOthers
    breaks = "logits are a function of states"


class TestDrawsNoise(testing.ModelContract):
    make = DrawsNoise
    breaks = "equal input gives equal output"


class TestShiftsIdsInPlace(testing.ModelContract):
    make = ShiftsIdsInPlace
    breaks = "its input is not changed"


class TestScalesStatesInPlace(testing.ModelContract):
    make = ScalesStatesInPlace
    breaks = "its input is not changed"


class TestStaysInTraining(testing.ModelContract):
    make = StaysInTraining
    breaks = "a session has no dropout"
