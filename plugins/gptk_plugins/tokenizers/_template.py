"""The post-processor of a tokenizer.json: the tokens that it puts around a text."""

from pydantic import Field

import gptk
from gptk.plugins import Fields, shown
from gptk_plugins.tokenizers._companions import Id


class _TemplateToken(Fields):
    ids: list[Id]


class _Piece(Fields):
    id: str


class Processor(Fields):
    """A post-processor, or a sequence of such."""

    type: str
    processors: list["Processor"] = Field(default_factory=list)
    single: list[dict[str, _Piece]] = Field(default_factory=list)
    special_tokens: dict[str, _TemplateToken] = Field(default_factory=dict)
    cls: list[str | Id] = Field(default_factory=list)
    sep: list[str | Id] = Field(default_factory=list)


def first_and_last(processor: Processor | None, source: str) -> tuple[int | None, int | None]:
    """The id of the token in front of each text, and of the one behind it; None if there is none.

    Raises TokenizerError, naming `source`, for a template with other or more tokens.
    """
    first = last = None
    for step in _flat(processor):
        before, after = _around(step, source)
        if (first is not None and before is not None) or (last is not None and after is not None):
            raise _unsupported(source, "several templates with tokens around a text")
        first = before if first is None else first
        last = after if last is None else last
    return first, last


def _flat(processor: Processor | None) -> list[Processor]:
    if processor is None:
        return []
    if processor.type != "Sequence":
        return [processor]
    return [step for inner in processor.processors for step in _flat(inner)]


def _around(step: Processor, source: str) -> tuple[int | None, int | None]:
    match step.type:
        case "ByteLevel":
            return None, None
        case "BertProcessing" | "RobertaProcessing":
            match step.cls, step.sep:
                case [str(), int(first)], [str(), int(last)]:
                    return first, last
        case "TemplateProcessing":
            return _around_template(step, source)
    raise _unsupported(source, f"the post-processor {shown(step.type)}")


def _around_template(step: Processor, source: str) -> tuple[int | None, int | None]:
    pieces = [next(iter(piece.items()), ("", _Piece(id=""))) for piece in step.single]
    kinds = [kind for kind, _ in pieces]
    if kinds.count("Sequence") != 1 or len(kinds) > 3:
        raise _unsupported(source, "a template with more than one token before or after the text")
    place = kinds.index("Sequence")
    if place > 1 or len(kinds) - place > 2 or set(kinds) > {"Sequence", "SpecialToken"}:
        raise _unsupported(source, "a template with more than one token before or after the text")
    ids = [_id(step, piece.id, source) for kind, piece in pieces if kind == "SpecialToken"]
    before, after = ids[:place], ids[place:]
    return (before[0] if before else None), (after[0] if after else None)


def _id(step: Processor, name: str, source: str) -> int:
    token = step.special_tokens.get(name)
    if token is None or len(token.ids) != 1:
        raise _unsupported(source, f"a template with the token {shown(name)}")
    return token.ids[0]


def _unsupported(source: str, what: str) -> gptk.TokenizerError:
    return gptk.TokenizerError(
        f"{source}: {what} is not supported; name another tokenizer with --tokenizer"
    )
