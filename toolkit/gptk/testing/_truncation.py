"""The contract of processors that keep the likeliest tokens: top-k, top-p, min-p, …"""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from gptk.testing._decoding import worst_logits
from gptk.testing._processor import ProcessorContract
from gptk.testing._promises import check, promise, worst_and_drawn


class TruncationContract(ProcessorContract):
    """What a processor that keeps the likeliest tokens promises: top-k, top-p, min-p, …"""

    def kept(self, processor: Any, probabilities: Tensor) -> int:
        """How many of the likeliest tokens it keeps, by its definition. To be overridden.

        probabilities: (vocab,) float64, falling. Tokens as likely as the last one kept may stay
        as well.
        """
        raise NotImplementedError("a TruncationContract defines kept(processor, probabilities)")

    @promise
    @worst_and_drawn(40)
    def test_it_keeps_as_many_as_its_definition_says(self, data: st.DataObject | None) -> None:
        """The number of tokens left is what `kept` says."""
        plugin = self.plugin()
        for before in self._single_rows(data):
            after = self._process(before[None], [[0]])[0]
            falling = before.double().softmax(-1).sort(descending=True).values
            # A sum that is equal to a bound but for rounding may be taken as below or above it.
            allowed = [self.kept(plugin, falling * (1 + change)) for change in (-1e-6, 0, 1e-6)]
            last = falling[max(allowed) - 1]
            ties = int((falling >= last * (1 - 1e-6)).sum())
            left = int((~after.isneginf()).sum())
            check(
                min(allowed) <= left <= max(ties, *allowed),
                f"it keeps {left} tokens of {[round(p, 4) for p in falling.tolist()]}, its "
                f"definition {allowed[1]}",
            )

    @promise
    @worst_and_drawn(20)
    def test_the_likeliest_tokens_stay_as_they_are(self, data: st.DataObject | None) -> None:
        """A token that stays keeps its logit, and no likelier token is removed."""
        for before in self._single_rows(data):
            after = self._process(before[None], [[0]])[0]
            stays = ~after.isneginf()
            check(bool(stays.any()), "it leaves no token")
            check(bool((after[stays] == before[stays]).all()), "it changes logits that it keeps")
            if not bool(stays.all()):
                check(
                    bool(before[~stays].max() <= before[stays].min()),
                    "it removes a token that is likelier than one that it keeps",
                )

    def _single_rows(self, data: st.DataObject | None) -> list[Tensor]:
        """Logits, (vocab,): those built by hand, or drawn ones."""
        if data is None:
            worst = worst_logits(self.lm.model.config.vocab_size)
            # Without those so unlike that probabilities become 0, from which `kept` starts.
            return [
                row
                for row in worst
                if bool(((row.double().softmax(-1) > 0) == (row > -torch.inf)).all())
            ]
        return [data.draw(self._logits(1), label="logits")[0]]
