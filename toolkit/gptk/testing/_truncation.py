"""The contract of processors that keep the likeliest tokens: top-k, top-p, min-p, …"""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptk.testing._processor import ProcessorContract
from gptk.testing._promises import check, examples, promise


class TruncationContract(ProcessorContract):
    """What a processor that keeps the likeliest tokens promises: top-k, top-p, min-p, …"""

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
        before = data.draw(self._logits(1), label="logits")
        plugin = self.plugin()
        after = self._process(before, [[0]])[0]
        falling = before[0].double().softmax(-1).sort(descending=True).values
        # A sum that is equal to a bound but for rounding may be taken as below or above it.
        allowed = [self.kept(plugin, falling * (1 + change)) for change in (-1e-6, 0, 1e-6)]
        last = falling[max(allowed) - 1]
        ties = int((falling >= last * (1 - 1e-6)).sum())
        left = int((~after.isneginf()).sum())
        check(
            min(allowed) <= left <= max(ties, *allowed),
            f"it keeps {left} tokens of {[round(p, 4) for p in falling.tolist()]}, its definition "
            f"{allowed[1]}",
        )

    @promise
    @examples(20)
    @given(data=st.data())
    def test_the_likeliest_tokens_stay_as_they_are(self, data: st.DataObject) -> None:
        """A token that stays keeps its logit, and no likelier token is removed."""
        before = data.draw(self._logits(1), label="logits")[0]
        after = self._process(before[None], [[0]])[0]
        stays = ~after.isneginf()
        check(bool(stays.any()), "it leaves no token")
        check(torch.equal(after[stays], before[stays]), "it changes logits that it keeps")
        if not bool(stays.all()):
            check(
                before[~stays].max() <= before[stays].min(),
                "it removes a token that is likelier than one that it keeps",
            )
