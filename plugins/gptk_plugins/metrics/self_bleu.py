r"""Self-BLEU: the mean BLEU-n of each result of a prompt with the others as references.

0 to 1; 1 is all alike. It rises with the number of results, since each is compared with more
others. Zhu et al. 2018, "Texygen: A Benchmarking Platform for Text Generation Models". BLEU is
smoothed: an n-gram order without a match counts as 0.1 matches (Chen and Cherry 2014, method 1, as
in Texygen).
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import ClassVar

from pydantic import Field

import gptk
from gptk_plugins.metrics._ngrams import Text, ngrams


class SelfBLEU(gptk.Metric):
    """How alike the results of a prompt are: mean BLEU-n of each with the others as references."""

    name = "self-bleu"
    positional: ClassVar[str] = "n"

    n: int = Field(4, ge=1, description="the tokens of the longest n-grams")

    def measure(
        self, results: Sequence[gptk.Generation], logprobs: Sequence[Sequence[float]]
    ) -> float | None:
        return self_bleu([result.tokens for result in results], self.n)


def self_bleu(texts: Sequence[Text], n: int = 4) -> float | None:
    """The mean BLEU-n of each text with the other texts as references; None for fewer than two.

    >>> self_bleu(["abcde", "abcde"])
    1.0
    """
    if len(texts) < 2:
        return None
    references = _References(texts, n)
    each = [_bleu(text, references, n, is_one_of_them=True) for text in texts]
    return math.fsum(each) / len(each)


def bleu(text: Text, references: Sequence[Text], n: int = 4) -> float:
    """BLEU-n of a text, with uniform weights, 0 to 1:

        BLEU = exp(min(0, 1 - r / c)) · (p_1 · … · p_n)^(1/n)

    p_k: the share of the text's k-grams that match a reference, each k-gram counted at most as
    often as in the reference that has it most often; c: the length of the text; r: the length of
    the reference nearest in length, the shorter of two. Papineni et al. 2002, "BLEU: a Method for
    Automatic Evaluation of Machine Translation". If no k-grams match but a token does, p_k counts
    0.1 matches (Chen and Cherry 2014, smoothing 1, as in Texygen). n is at most the length of the
    text, so that equal texts have 1. An empty text has 1 if a reference is empty, else 0.

    >>> round(bleu("abcdx", ["abcde"]), 4)
    0.6687
    """
    return _bleu(text, _References(references, n), n, is_one_of_them=False)


class _References:
    """What BLEU asks of several references: how often each has an n-gram, and their lengths.

    One of them can be left out without counting the others again, so that the time that self-BLEU
    takes grows with the number of texts, and not with its square.
    """

    def __init__(self, texts: Sequence[Text], n: int) -> None:
        self._lengths = Counter(map(len, texts))
        self._counts: dict[tuple[Hashable, ...], tuple[int, int]] = {}
        """For each n-gram the two largest numbers of times that a text has it."""
        for text in texts:
            for size in range(1, n + 1):
                for gram, count in Counter(ngrams(text, size)).items():
                    most, second = self._counts.get(gram, (0, 0))
                    most, second, _ = sorted((most, second, count), reverse=True)
                    self._counts[gram] = (most, second)

    def most(self, gram: tuple[Hashable, ...], without: int) -> int:
        """How often the reference has the n-gram that has it most often.

        without: how often a reference has it that is left out; 0: none is.
        """
        most, second = self._counts.get(gram, (0, 0))
        return second if most == without else most

    def lengths(self, without: int | None) -> list[int]:
        """The lengths of the references, each once. without: the length of one that is left out."""
        return [length for length, many in self._lengths.items() if many > (length == without)]


def _bleu(text: Text, references: _References, n: int, *, is_one_of_them: bool) -> float:
    """BLEU-n. is_one_of_them: the text is one of the references, and is left out."""
    lengths = references.lengths(len(text) if is_one_of_them else None)
    if not text:
        return float(0 in lengths)
    order = min(n, len(text))
    logs = []
    for size in range(1, order + 1):
        grams = Counter(ngrams(text, size))
        matches = sum(
            min(count, references.most(gram, count if is_one_of_them else 0))
            for gram, count in grams.items()
        )
        if size == 1 and not matches:
            return 0.0
        logs.append(math.log((matches or 0.1) / grams.total()))
    nearest = min(lengths, key=lambda length: (abs(length - len(text)), length))
    return math.exp(min(0.0, 1 - nearest / len(text)) + math.fsum(logs) / order)
