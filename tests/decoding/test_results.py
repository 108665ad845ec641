"""What a result says of itself: repr, dictionary, HTML, and the object that its text stands for."""

import html
import json
import re
import warnings
from html.parser import HTMLParser

import pytest
from test_generation import Dictate

import gptk
from gptk.testing import tiny_lm

LM = tiny_lm()


def written(text, **settings):
    data = text if isinstance(text, bytes) else text.encode()
    settings = {"max_new_tokens": len(data), **settings}
    return LM.generate("x", sampler=Dictate(tokens=tuple(data)), ignore_eos=True, **settings)


def test_a_repr_is_one_short_line():
    out = written("a line\nand more " * 5)
    cut = r"a line\nand more a line\nand more a line\nand more a line\nand m…"
    assert repr(out) == (
        f"Generation('{cut}', 80 tokens, score {out.score:.4f}, finish_reason='length')"
    )
    many = LM.generate("x", sampler="multinomial", n=3, max_new_tokens=2)
    assert repr(many).endswith(", 2 alternatives)")
    assert "\n" not in repr(many)
    assert "…" not in repr(written("short"))


def test_reprs_of_models_and_scores_are_one_short_line(tmp_path):
    assert repr(LM) == (
        "LanguageModel(GPT of 2 layers, 257 tokens, window 96, float32 on cpu, tokenizer bytes)"
    )
    LM.save(tmp_path / "m")
    assert repr(gptk.load(tmp_path / "m")).startswith("LanguageModel('")
    assert re.fullmatch(r"Score\(300 tokens, loss \d+\.\d{4}, perplexity [\d.]+\)",
                        repr(gptk.Score([1] * 300, [-2.0] * 299)))  # fmt: skip
    (compared,) = gptk.compare(LM, ["x", "y"], ["greedy"], n=1, max_new_tokens=80)
    assert re.fullmatch(r"Comparison\('greedy', 2 prompts, 1 result each, .*\)", repr(compared))
    assert len(repr(compared)) < 200


def test_a_dictionary_has_every_field_and_is_json():
    out = LM.generate("x", sampler="multinomial", n=2, top_logprobs=2, max_new_tokens=3, seed=1)
    values = json.loads(json.dumps(out.to_dict(), allow_nan=False))
    assert set(values) == set(gptk.Generation.__dataclass_fields__)
    for name in ("text", "tokens", "token_logprobs", "score", "seed", "token_texts"):
        assert values[name] == getattr(out, name)
    (other,) = values["alternatives"]
    assert other["tokens"] == out.alternatives[0].tokens
    top = values["top_logprobs"][0]
    assert [entry["token"] for entry in top["before"]] == [
        entry.token for entry in out.top_logprobs[0].before
    ]
    assert set(top["after"][0]) == {"token", "logprob", "text"}


def test_a_dictionary_is_json_whatever_a_scorer_says():
    out = gptk.Generation("a", [1], [-1.0], float("nan"), "length", [1], 0)
    assert out.to_dict()["score"] is None
    json.dumps(out.to_dict(), allow_nan=False)


def test_a_dictionary_shares_no_list_with_the_result():
    out = LM.generate("x", max_new_tokens=3)
    out.to_dict()["tokens"].clear()
    assert len(out.tokens) == 3


def test_token_texts_join_to_the_text():
    out = written("né\u6f22x STOP more", stop="STOP")
    assert "".join(out.token_texts) == out.text == "né\u6f22x "
    assert out.token_texts == ["n", "", "é", "", "", "\u6f22", "x", " "]
    assert written("é".encode()[:1]).token_texts == [""]


# --- HTML -------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.spans, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "span":
            self.spans.append(dict(attributes))

    def handle_data(self, data):
        self.text += data


HOSTILE = '<script>alert("1")</script> & \'"><img src=x onerror=alert(1)> \x1b[0m\u202e\x00'


def test_html_escapes_everything_that_the_model_wrote():
    out = written(HOSTILE, top_logprobs=3)
    page = out._repr_html_()
    tags = Tags(page)
    assert set(tags.tags) == {"div", "span"}
    assert all(set(span) == {"title", "style"} for span in tags.spans)
    assert len(tags.spans) == len(out.tokens)
    assert html.unescape(page).count("<script>") <= page.count("&lt;")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page)


def test_html_shows_the_text_with_improbable_tokens_coloured():
    out = written("plain text", top_logprobs=2)
    tags = Tags(out._repr_html_())
    assert tags.text.startswith("plain text")
    for logprob, span in zip(out.token_logprobs, tags.spans, strict=True):
        opacity = float(re.search(r"rgba\(255, 140, 0, ([\d.]+)\)", span["style"])[1])
        assert opacity == pytest.approx(0.6 * min(-logprob / 6, 1), abs=0.006)
        assert "before processors: " in span["title"]
        # Text keeps the page's own colour, so that it is readable on dark and light pages.
        assert not re.search(r"(^|[; ])color:", span["style"])


def test_html_of_many_alternatives_is_cut():
    out = LM.generate("x", sampler="multinomial", n=40, max_new_tokens=2)
    assert "… and 20 more" in out._repr_html_()
    assert len(LM.generate("x", max_new_tokens=1)._repr_html_()) < 1000


# --- The parsed object ------------------------------------------------------------------------


class Number(gptk.LogitsProcessor):
    """A constraint to digits whose object is the number."""

    name = "number"
    fails: bool = False

    def __call__(self, logits, rows):
        return logits

    def is_complete(self, tokens, rows):
        return len(tokens) >= 3

    def parse(self, text):
        if self.fails:
            raise ValueError("no such number\nat all")
        return int(text)


def test_a_complete_text_is_parsed_and_an_incomplete_one_is_not():
    out = written("123", processors=[Number()])
    assert (out.complete, out.parsed, out.to_dict()["parsed"]) == (True, 123, 123)
    out = written("12", processors=[Number()])
    assert (out.complete, out.parsed) == (False, None)
    assert written("123").parsed is None


def test_each_result_is_parsed_by_itself():
    out = LM.generate("x", sampler="beam:width=3", n=3, processors=[Digits(), Number()],
                      max_new_tokens=3)  # fmt: skip
    for result in (out, *out.alternatives):
        assert result.parsed == int(result.text)


class Digits(gptk.LogitsProcessor):
    name = "digits"

    def __call__(self, logits, rows):
        masked = logits.new_full(logits.shape, float("-inf"))
        masked[:, 48:58] = logits[:, 48:58]
        return masked


def test_a_text_that_cannot_be_parsed_is_told_and_does_not_lose_the_result():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = written("123", processors=[Number(fails=True)])
    (warning,) = caught
    assert issubclass(warning.category, gptk.PluginWarning)
    assert str(warning.message).startswith("processor number cannot read its text: ValueError:")
    assert (out.text, out.complete, out.parsed) == ("123", True, None)


def test_a_parsed_pydantic_object_is_a_dictionary_in_json():
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    person = Person(name="Tom", age=34)
    out = gptk.Generation("…", [1], [-1.0], -1.0, "eos", [1], 0, parsed=person)
    assert out.to_dict()["parsed"] == {"name": "Tom", "age": 34}
