"""The contracts of samplers, logits processors and scorers, which plug-ins fill in."""

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from gptk.errors import OptionError
from gptk.hooks.base import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from gptk.hooks.choice import Choice
    from gptk.hooks.results import Generation
    from gptk.hooks.run import Run
    from gptk.model.protocol import ModelConfig
    from gptk.session.rows import Rows
    from gptk.session.session import DecodeSession

    Process = Callable[[Tensor, Rows], Tensor]


class LogitsProcessor(Plugin):
    """Maps next-token logits to next-token logits: temperature, top-k, penalties, constraints.

    By default a pure function of the rows' tokens so far and their logits:

        class Temperature(gptk.LogitsProcessor):
            name = "temperature"
            temperature: float = Field(1.0, gt=0)

            def __call__(self, logits, rows):
                return logits / self.temperature

    One that needs state for each row overrides `start`.
    """

    kind: ClassVar[str] = "processor"
    for_sampling: ClassVar[bool] = False
    """It shapes what is drawn, as temperature and top-p do, and means little to greedy search: a
    run that names no sampler then draws (multinomial) instead of taking the likeliest token."""

    @classmethod
    def _class_problem(cls) -> str | None:
        """What is wrong with the class itself, or None."""
        call = vars(cls).get("__call__")
        if inspect.isfunction(call) and "input_ids" in inspect.signature(call).parameters:
            return (
                f"{cls.__name__}.__call__() takes {', '.join(inspect.signature(call).parameters)}, "
                "as transformers' processors do; gptk's take logits, rows. "
                "gptk.adapters.transformers.from_transformers takes one of transformers' as it is"
            )
        return super()._class_problem()

    def __call__(self, logits: "Tensor", rows: "Rows") -> "Tensor":
        """New logits, (rows, vocab) float32; -inf takes a token out. `logits` is not changed."""
        raise NotImplementedError(f"{type(self).__name__} does not define __call__()")

    def start(self, rows: "Rows") -> "Process":
        """The function to call at each step of one generation: by default the processor itself.

        If the returned object is a `gptk.Follower`, it is told of every move of the rows.
        """
        return self

    def is_complete(self, tokens: "Sequence[int]", rows: "Rows") -> bool | None:
        """Whether a row's new tokens, without EOS, satisfy what this processor asks for.

        None, the default: it asks for nothing. A constraint says whether the text is valid as it
        is, and not only the beginning of a valid text.
        """
        return None

    def parse(self, text: str) -> object:
        """The value that a row's new text stands for, such as the object that JSON describes.

        None, the default: there is none, or the text is not complete. Raises DecodingError for a
        complete text that has no value.
        """
        return None


class Sampler(Plugin):
    """A decoding strategy. One that only chooses tokens implements `step` alone.

    One that looks ahead overrides `advance` and drives the session with its four verbs.
    """

    kind: ClassVar[str] = "sampler"

    random: ClassVar[bool] = False
    """The strategy draws at random, so that n samples of one prompt differ."""
    competing: ClassVar[bool] = False
    """The rows of a prompt compete for places (beams) instead of each being a result."""

    @property
    def groups(self) -> int:
        """How many groups the competing rows of a prompt form; they share the places equally [1].

        Rows never change their group, `rows.groups`.
        """
        return 1

    def processors(self) -> Sequence[LogitsProcessor]:
        """Processors that are part of the strategy; they come after the user's."""
        return ()

    def hidden_layers(self, config: "ModelConfig") -> Sequence[int]:
        """The model's layers whose state the strategy needs as `session.layer_hidden` [none].

        0 are the embeddings, i is what the i-th block gives.
        """
        return ()

    def max_rows(self, n: int) -> int:
        """The most rows a prompt has at a time when n results are asked for.

        Raises OptionError if the strategy cannot give n results.
        """
        if n > 1 and not self.random:
            raise OptionError(f"{self.name} has one result for a prompt; n={n} is not possible")
        return n

    def refuses_draft(self) -> str | None:
        """Why the strategy cannot be combined with a draft, or None.

        A draft is meaningful where the next token depends on the row and its logits alone.
        """
        if self.competing:
            return "its rows compete at every step, so none can run ahead of the others"
        if type(self).advance is not Sampler.advance:
            return "it runs the model on several continuations at each step itself"
        return None

    def start(self, run: "Run") -> object:
        """What the strategy keeps during one run, found as `run.state` [None].

        If it is a `gptk.Follower`, it is told of every move of the rows.
        """
        return None

    def logits(self, session: "DecodeSession") -> "Tensor":
        """The logits that the processors begin with, (rows, vocab): by default the model's."""
        return session.logits

    def step(self, logits: "Tensor", rows: "Rows") -> "Choice":
        """Choose from the logits after all processors, (rows, vocab) float32."""
        raise NotImplementedError(f"{type(self).__name__} does not define step()")

    def advance(self, run: "Run") -> None:
        """One step of decoding: by default process the logits, `step`, commit the choice."""
        run.commit(self.step(run.processed_logits(), run.session.rows))

    def rank(self, score: float, length: int) -> float:
        """What results are ranked by and report as `score`. length: new tokens, EOS included."""
        return score

    def is_done(self, finished: Sequence[float], best: float, length: int, limit: int) -> bool:
        """Whether competing rows can stop before they end; asked for each group of a prompt.

        finished: ranks of the results so far, best first, as many as the group has places at
        most; best: the best running score of the live rows; length: their new tokens; limit: the
        most allowed.
        """
        return False

    def pick(self, results: "Sequence[Generation]", n: int) -> "Sequence[Generation]":
        """The n results that a prompt gets, best first, from the results of all its rows."""
        return results[:n]


class Scorer(Plugin):
    """Judges whole results, for samplers that keep the best of several."""

    kind: ClassVar[str] = "scorer"

    def score(self, result: "Generation") -> float:
        """The higher, the better."""
        raise NotImplementedError(f"{type(self).__name__} does not define score()")
