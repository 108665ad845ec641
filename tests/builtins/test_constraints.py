"""Constraints: against Python's regex module, jsonschema and plain sets of texts."""

import dataclasses
import gc
import json
import operator
import subprocess
import sys
import weakref
from decimal import Decimal
from typing import Literal

import jsonschema
import pydantic
import pytest
import regex
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field
from typing_extensions import TypedDict

from gptk import DecodingError, LogitsProcessor, OptionError, PluginError, Rows, TokenizerError
from gptk.plugins.creating import create
from gptk.testing import tiny_lm
from gptk.weights.tokenizers import load_tokenizer
from gptk_plugins.constraints import _matcher
from toys import byte_tokenizer

LM = tiny_lm()
BYTES = LM.tokenizer
SMALL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "n": {"type": "integer", "minimum": 1, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", None]}, "maxItems": 2},
    },
    "required": ["name", "n", "tags"],
    "additionalProperties": False,
}
SAMPLERS = [
    "greedy",
    "multinomial:temperature=1.5",
    "top-k:k=5",
    "top-p:p=0.9",
    "beam:width=3",
]


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    return load_tokenizer(str(smollm2_path))


def constraint(name, **options):
    from gptk.plugins.registry import find

    return find("processor", name).item(**options)


def rows_of(count=1, tokenizer=BYTES, eos=None):
    prompts = [[65, 66, 67][: 1 + i % 3] for i in range(count)]
    return Rows(prompts, tokenizer=tokenizer, eos=tokenizer.eos if eos is None else eos)


class Walk:
    """A processor's follower and rows that move with it."""

    def __init__(self, processor, count=1, tokenizer=BYTES, eos=None, width=None):
        self.rows = rows_of(count, tokenizer, eos)
        self.width = width or tokenizer.encoding.max_token_value + 1
        self.follower = processor.start(self.rows)

    def allowed(self, row=0):
        return self.masks()[row].nonzero()[:, 0].tolist()

    def masks(self):
        logits = torch.zeros(len(self.rows), self.width)
        return self.follower(logits, self.rows) == 0

    def extend(self, tokens):
        self.rows.extend(torch.tensor(tokens))
        self.follower.extend(torch.tensor(tokens))

    def rewind(self, counts):
        self.rows.rewind(counts)
        self.follower.rewind(counts)

    def select(self, parents):
        self.rows.select(parents)
        self.follower.select(parents)


# Patterns that mean the same to Rust's crate regex and to Python's module of that name.
_atoms = st.sampled_from(
    ["a", "b", "0", " ", "[ab]", "[^a]", "[0-9]", ".", r"\.", r"\d", "-", "ab"]
)
_few = st.one_of(_atoms, st.tuples(_atoms, _atoms).map(lambda two: f"(?:{two[0]}|{two[1]})"))
_patterns = st.recursive(
    # No nested repetitions: Python's search would take exponential time.
    st.tuples(_few, st.sampled_from(["", "?", "*", "+", "{2}", "{1,3}"])).map(
        lambda two: f"(?:{two[0]}){two[1]}"
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        inner.map(lambda pattern: f"(?:{pattern})?"),
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(pattern=_patterns, data=st.data())
def test_a_byte_is_allowed_iff_the_text_can_still_match(pattern, data):
    walk = Walk(constraint("regex", pattern=pattern))
    text = ""
    for _ in range(8):
        allowed = walk.allowed()
        want = {
            byte for byte in range(128) if regex.fullmatch(pattern, text + chr(byte), partial=True)
        }
        assert {token for token in allowed if token < 128} == want
        assert (256 in allowed) == bool(regex.fullmatch(pattern, text))
        if not want:
            break
        byte = data.draw(st.sampled_from(sorted(want)))
        text += chr(byte)
        walk.extend([[byte]])


@settings(max_examples=30)
@given(pattern=_patterns, data=st.data())
def test_a_token_of_many_bytes_is_allowed_only_if_the_text_can_still_match(smollm2, pattern, data):
    processor = constraint("regex", pattern=pattern)
    walk = Walk(processor, tokenizer=smollm2)
    tokens, text = [], ""
    for _ in range(5):
        allowed = walk.allowed()
        ends = set(smollm2.eos) & set(allowed)
        assert ends == (set(smollm2.eos) if regex.fullmatch(pattern, text) else set())
        assert processor.is_complete(tokens, walk.rows) == bool(ends)
        tried = allowed if len(allowed) < 50 else data.draw(st.sampled_from([allowed[:50]]))
        for token in set(tried) - ends:
            piece = smollm2.token_bytes(token)
            if piece.isascii():
                assert regex.fullmatch(pattern, text + piece.decode(), partial=True)
        go_on = [t for t in tried if t not in ends and smollm2.token_bytes(t).isascii()]
        if not go_on:
            break
        tokens.append(data.draw(st.sampled_from(go_on)))
        text += smollm2.decode(tokens[-1:])
        walk.extend([tokens[-1:]])


PROCESSORS = {
    "regex": {"pattern": r"(abc|ab[0-9]{1,4} )*x+y"},
    "json-schema": {"schema": SMALL},
    "choice": {"choices": ["yes", "yes, but no", "perhaps", ""]},
    "grammar": {"grammar": 'start: "(" start ")" | "[" start "]" | /[a-z ]{2,9}/'},
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("vocabulary", ["bytes", "smollm2"])
@settings(max_examples=25)
@given(data=st.data())
def test_after_any_moves_a_row_is_as_if_it_had_come_straight_there(smollm2, name, vocabulary, data):
    tokenizer = smollm2 if vocabulary == "smollm2" else BYTES
    width = tokenizer.encoding.max_token_value + 9  # a model's vocabulary may be padded
    processor = constraint(name, **PROCESSORS[name])
    walk = Walk(processor, 3, tokenizer, width=width)
    texts = [[], [], []]
    for _ in range(data.draw(st.integers(1, 10))):
        match data.draw(st.sampled_from(["extend", "extend", "wrong", "select", "rewind"])):
            case "extend":
                # If nothing is allowed, any token.
                new = [
                    data.draw(st.sampled_from(walk.allowed(row)[:40] or [tokenizer.eos[0]]))
                    for row in range(len(texts))
                ]
                walk.extend([[token] for token in new])
                texts = [[*text, token] for text, token in zip(texts, new, strict=True)]
            case "wrong":
                n = data.draw(st.integers(1, 3))
                new = [
                    data.draw(st.lists(st.integers(0, width - 1), min_size=n, max_size=n))
                    for _ in texts
                ]
                walk.extend(new)
                texts = [text + more for text, more in zip(texts, new, strict=True)]
            case "select":
                parents = data.draw(
                    st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=4)
                )
                walk.select(parents)
                texts = [texts[parent] for parent in parents]
            case "rewind":
                counts = [data.draw(st.integers(0, len(text))) for text in texts]
                walk.rewind(counts)
                texts = [
                    text[: len(text) - count] for text, count in zip(texts, counts, strict=True)
                ]
        masks = walk.masks()
        for row, text in enumerate(texts):
            fresh = Walk(processor, tokenizer=tokenizer, width=width)
            if text:
                fresh.extend([text])
            assert torch.equal(masks[row], fresh.masks()[0])


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), vocabulary=st.sampled_from(["bytes", "smollm2"]))
def test_json_is_valid_when_it_may_end_and_not_before(smollm2, seed, vocabulary):
    tokenizer = smollm2 if vocabulary == "smollm2" else BYTES
    processor = constraint("json-schema", schema=SMALL)
    walk = Walk(processor, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    while True:
        logits = torch.randn(1, walk.width, generator=generator)
        token = int(walk.follower(logits, walk.rows).argmax())
        if token in tokenizer.eos:
            break
        assert not processor.is_complete(tokens, walk.rows)
        tokens.append(token)
        walk.extend([[token]])
        assert len(tokens) < 200
    assert processor.is_complete(tokens, walk.rows)
    value = json.loads(tokenizer.decode_bytes(tokens).decode())
    jsonschema.validate(value, SMALL)
    between = regex.sub(r'"(?:[^"\\]|\\.)*"', '""', tokenizer.decode(tokens))
    assert not regex.search(r"\s(?<![,:] )|[,:](?! )", between)  # one space where json.dumps has it


def texts_of(processor, tokenizer=BYTES):
    """All texts that the masks lead to, by depth-first search."""
    found, walk = set(), Walk(processor, tokenizer=tokenizer)

    def visit(text):
        for token in walk.allowed():
            if token in tokenizer.eos:
                found.add(text)
            else:
                walk.extend([[token]])
                visit(text + tokenizer.token_bytes(token))
                walk.rewind([1])

    visit(b"")
    return {text.decode() for text in found}


@settings(max_examples=25)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=5))
def test_choice_leads_to_the_choices_and_nothing_else(choices):
    choices = [text.encode("utf-8", "replace").decode() for text in choices]
    assert texts_of(constraint("choice", choices=choices)) == set(choices)


@pytest.mark.parametrize("choices", [["yes", "no"], ["new york", "new yorker", "newt"]])
def test_choice_leads_to_the_choices_in_tokens_of_many_bytes(smollm2, choices):
    assert texts_of(constraint("choice", choices=choices), smollm2) == set(choices)


def test_grammar_follows_nesting_of_any_depth():
    grammar = constraint("grammar", grammar='start: "(" start ")" | "[" start "]" | "x"')
    walk = Walk(grammar)
    walk.extend([list(b"((([([x")])
    for closing in b"])])))":
        assert walk.allowed() == [closing]
        walk.extend([[closing]])
    assert walk.allowed() == [256]


def test_grammar_may_ask_for_json_and_special_tokens(smollm2):
    text = 'start: "say " <|im_start|> %json {"type": "boolean"} <|im_end|>'
    grammar = constraint("grammar", grammar=text)
    im_start, im_end = smollm2.encode("<|im_start|><|im_end|>")
    walk = Walk(grammar, tokenizer=smollm2)
    walk.extend([smollm2.encode("say ")])
    assert walk.allowed() == [im_start]
    walk.extend([[im_start, *smollm2.encode("true")]])
    assert walk.allowed() == [im_end]
    new = [*smollm2.encode("say "), im_start, *smollm2.encode("true")]
    assert grammar.is_complete(new, walk.rows)
    assert not grammar.is_complete(new[:-1], walk.rows)


def test_every_eos_token_is_allowed_when_the_text_is_valid_and_only_then(smollm2):
    assert len(smollm2.eos) == 2
    walk = Walk(constraint("regex", pattern="ab?"), tokenizer=smollm2)
    assert not set(walk.allowed()) & set(smollm2.eos)
    walk.extend([smollm2.encode("a")])
    assert set(walk.allowed()) == {*smollm2.eos, *smollm2.encode("b")}
    walk.extend([smollm2.encode("b")])
    assert set(walk.allowed()) == set(smollm2.eos)


def test_a_token_with_text_that_ends_rows_is_never_text():
    newline = ord("\n")
    walk = Walk(constraint("regex", pattern="(?s).{2}"), eos=[newline, 256])
    assert newline not in walk.allowed()
    walk.extend([list(b"a")])
    assert newline not in walk.allowed()
    walk.extend([list(b"b")])
    assert walk.allowed() == [newline, 256]


def test_special_tokens_and_padding_ids_are_never_text(smollm2):
    for tokenizer in (smollm2, load_tokenizer("gpt2"), BYTES):
        end = tokenizer.encoding.max_token_value + 1
        walk = Walk(constraint("regex", pattern="(?s).*"), tokenizer=tokenizer, width=end + 50)
        special = {
            tokenizer.encoding.encode_single_token(text)
            for text in tokenizer.encoding.special_tokens_set
        }
        allowed = set(walk.allowed())
        assert allowed & special == set(tokenizer.eos)
        assert max(allowed) < end
        assert len(allowed) > 0.7 * (end - len(special))


def test_a_model_with_fewer_ids_than_the_tokenizer_gets_a_mask_of_its_own_width(smollm2):
    walk = Walk(constraint("regex", pattern="(?s).*"), tokenizer=smollm2, width=100)
    assert walk.masks().shape == (1, 100)


@pytest.mark.parametrize("wrong", [[98], [97, 256, 97], [256], [300, 0], [97, 98, 98]])
def test_after_a_wrong_token_or_the_end_all_is_masked_until_a_rewind(wrong):
    walk = Walk(constraint("regex", pattern="aab?"))
    walk.extend([[97]])
    before = walk.masks()
    walk.extend([wrong])
    assert not walk.masks().any()
    walk.select([0, 0])
    assert not walk.masks().any()
    walk.rewind([len(wrong), len(wrong) + 1])
    assert torch.equal(walk.masks()[0], before[0])
    assert walk.allowed(1) == [97]


def test_text_with_a_byte_that_the_vocabulary_lacks_is_masked_not_made_up(smollm2):
    assert b"\x04" not in [smollm2.token_bytes(token) for token in range(300)]
    for pattern in ("a\x04bc|ax", r"a\x04bc|ax", "a\U00050000|ax"):
        walk = Walk(constraint("regex", pattern=pattern), tokenizer=smollm2)
        walk.extend([smollm2.encode("a")])
        assert walk.allowed() == smollm2.encode("x")
    for pattern in ("a\x04bc", r"a\x04bc", "a\U00050000"):
        walk = Walk(constraint("regex", pattern=pattern), tokenizer=smollm2)
        assert walk.allowed() == smollm2.encode("a")
        walk.extend([smollm2.encode("a")])
        assert walk.allowed() == []
        walk.rewind([1])
        assert walk.allowed() == smollm2.encode("a")
    with pytest.raises(OptionError, match="no text fits"):
        Walk(constraint("regex", pattern="\x04+"), tokenizer=smollm2)


def test_text_without_a_choice_comes_in_the_tokens_of_the_tokenizer(smollm2):
    text = "The quick brown fox, 1234 times"
    walk = Walk(constraint("choice", choices=[text]), tokenizer=smollm2)
    for token in smollm2.encode(text):
        assert walk.allowed() == [token]
        walk.extend([[token]])


def test_the_logits_of_allowed_tokens_are_not_changed():
    walk = Walk(constraint("regex", pattern="[ab]"), 2)
    logits = torch.randn(2, 257)
    before = logits.clone()
    got = walk.follower(logits, walk.rows)
    assert torch.equal(logits, before)
    assert torch.equal(got[:, 97:99], before[:, 97:99])
    assert (got > -torch.inf).sum() == 4
    assert got.dtype == torch.float32


def test_a_schema_may_choose_its_own_whitespace():
    schema = {"type": "array", "items": {"enum": [1]}, "minItems": 2, "maxItems": 2}
    assert texts_of(constraint("json-schema", schema=schema)) == {"[1, 1]"}
    schema["x-guidance"] = {"item_separator": ",[ \n]?"}
    assert texts_of(constraint("json-schema", schema=schema)) == {"[1,1]", "[1, 1]", "[1,\n1]"}


def test_schemas_and_grammars_are_read_from_files_or_given_as_they_are(tmp_path):
    schema = {"$defs": {"e": {"enum": ["ö", "x"]}}, "$ref": "#/$defs/e"}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "grammar.lark").write_text('# either\nstart: "ö" | "x"\n', encoding="utf-8-sig")
    for source in (schema, json.dumps(schema), str(tmp_path / "schema.json")):
        assert texts_of(constraint("json-schema", schema=source)) == {'"ö"', '"x"'}
    for source in ('start: "ö" | "x"', str(tmp_path / "grammar.lark")):
        assert texts_of(constraint("grammar", grammar=source)) == {"ö", "x"}


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (r'regex:pattern="\\d+, \\w"', {"pattern": r"\d+, \w"}),
        (r'regex:pattern="\(\d{3}\) \d{3}"', {"pattern": r"\(\d{3}\) \d{3}"}),
        (r'regex:"\d+, \w"', {"pattern": r"\d+, \w"}),
        (r"regex:\d+", {"pattern": r"\d+"}),
        (r"regex:pattern=\d+", {"pattern": r"\d+"}),
        ("""json-schema:schema='{"type": "null"}'""", {"schema": {"type": "null"}}),
        ("""choice:choices='["a, b", "é"]'""", {"choices": ("a, b", "é")}),
        ("grammar:grammar='start: \"a\"'", {"grammar": 'start: "a"'}),
    ],
)
def test_spec_strings(spec, options):
    processor = create("processor", spec, LogitsProcessor)
    assert processor == constraint(processor.name, **options)
    assert create("processor", processor.spec, LogitsProcessor) == processor


WRONG = [
    ("regex", {"pattern": "(a"}, "pattern '(a': unclosed group"),
    ("regex", {"pattern": "(?=a)b"}, "look-ahead and look-behind, is not supported"),
    ("regex", {"pattern": r"(a)\1"}, "backreferences are not supported"),
    ("regex", {"pattern": "[a&&b]"}, "no text fits"),
    ("regex", {"pattern": "\ud800"}, "has characters that no text can have"),
    ("json-schema", {"schema": {"type": "text"}}, "schema: Invalid type: text"),
    ("json-schema", {"schema": {"not": {}}}, 'schema: Unimplemented keys: ["not"]'),
    ("json-schema", {"schema": '{"a": '}, "is not JSON: Expecting value"),
    ("json-schema", {"schema": "lost.json"}, "'lost.json': there is no such file, and it is not a"),
    ("json-schema", {"schema": {"type": "string", "pattern": "a("}}, "schema: unclosed group"),
    ("json-schema", {"schema": {"x-guidance": {"spaces": 2}}}, "unknown field `spaces`"),
    ("json-schema", {"schema": "."}, "'.': cannot be read: Is a directory"),
    ("grammar", {"grammar": "lost.lark"}, "there is no such file, and it is not a Lark grammar"),
    ("grammar", {"grammar": 'start: "a" | x\nx: b'}, 'line 2, column 4: unknown name: "b"'),
    ("grammar", {"grammar": 'start: x "b"\nx: x "a"'}, "no text fits"),
    ("grammar", {"grammar": 'start: a\na[stop="x"]: /.*/'}, "stop of a rule are not supported"),
    ("regex", {"pattern": "(" * 300 + ")" * 300}, "exceed the maximum number of nested"),
    ("json-schema", {"schema": '{"const": 1, "const": 2}'}, "the key 'const' occurs twice"),
    ("json-schema", {"schema": '{"const": NaN}'}, "NaN is no number of JSON"),
    ("json-schema", {"schema": '{"const": ' + "[" * 10**5}, "schema: is nested too deeply"),
    ("json-schema", {"schema": {"const": {1, 2}}}, "schema: {1, 2} is no value that JSON has"),
    ("json-schema", {"schema": {"const": {1: 2}}}, "schema: 1 is no value that JSON has"),
    ("json-schema", {"schema": {1: 2}}, "schema={1: 2} is not allowed"),
    ("json-schema", {"schema": {"items": {1: 2}}}, "1 is a key, and keys in JSON are texts"),
    ("json-schema", {"schema": {"properties": {"a": 1}}}, "a is 1, which is not a schema"),
    ("json-schema", {"schema": {"patternProperties": 5}}, "Expected object for 'patternPro"),
    ("json-schema", {"schema": {"properties": True}}, "properties must be an object"),
    ("json-schema", {"schema": {"multipleOf": "3"}}, "Expected f64 for 'multipleOf'"),
    ("json-schema", {"schema": "/dev/zero"}, "'/dev/zero': is not a regular file"),
    ("grammar", {"grammar": 'start: "\x7f"'}, "control characters are written \\n, \\u007f"),
    ("grammar", {"grammar": "start: %json {"}, "what follows %json is not JSON: '{'"),
    ("grammar", {"grammar": "start: %json " + "[" * 10**5}, "is nested too deeply"),
    ("grammar", {"grammar": '{"grammars": []}\nstart: "a"'}, "is JSON, and not a Lark grammar"),
    ("grammar", {"grammar": "start: " + "(" * 100 + '"a"' + ")" * 100}, "too deeply nested"),
    ("choice", {"choices": ["\ud800"]}, "choices: has characters that no text can have"),
    ("choice", {"choices": []}, "choices=[] is not allowed; choices is array of 1 or more"),
    ("choice", {"choices": "yes"}, """choices is a JSON list, '["yes", "no"]', not 'yes'"""),
]


CHANGED = [
    {"enum": [1234567890123456789]},
    {"const": -(2**63)},
    {"const": 2**63},
    {"const": 10**25},
    {"const": 9007199254740993.0 + 2**60},
    {"const": 1e300},
    {"const": [{"a": [2**53 + 1]}]},
    {"$defs": {"a": {"anyOf": [{"enum": [None, 2**53 + 1]}]}}, "$ref": "#/$defs/a"},
    {"type": "object", "properties": {"const": {"const": 2**53 + 1}}},
    {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 3},
    {"type": "integer", "exclusiveMinimum": 2**53, "exclusiveMaximum": 2**53 + 2},
    {"type": "integer", "exclusiveMinimum": 2**53 - 2, "exclusiveMaximum": 2**53},
    {"type": "integer", "minimum": 2**62},
    {"type": "number", "minimum": 1e300},
    {"type": "number", "minimum": 1e-300},
    {"type": "string", "minLength": 2**53},
    {"type": "integer", "multipleOf": 2**53 + 1},
    {"type": "number", "multipleOf": 0.07},
    {"type": "number", "multipleOf": 1e-30},
    {"allOf": [{"multipleOf": 65536}, {"multipleOf": 65537}], "type": "integer"},
    {"const": float("nan")},
    {"maximum": float("inf")},
    '{"const": 1e400}',
    '{"const": 1e99999999999999999999}',
    '{"const": 1e-1000000000}',
    '{"const": 12345678901234567890.0}',
    '{"const": 0.1000000000000000055511151231257827}',
    '{"maximum": 0.1000000000000000055511151231257827}',
    '{"const": %s}' % ("9" * 5000),
]


@pytest.mark.parametrize("schema", CHANGED, ids=lambda schema: str(schema)[:60])
def test_a_number_that_llguidance_would_change_is_refused_by_name(schema):
    """It computes with float64 and int64: 1234567890123456789 would be …768."""
    with pytest.raises(OptionError, match=r"^processor json-schema: schema: ") as raised:
        constraint("json-schema", schema=schema)
    said = str(raised.value)
    assert "\n" not in said
    assert regex.search(r"number|beyond|digits|Length|multipleOf", said)


def test_numbers_of_a_schema_in_a_grammar_are_exact_or_refused():
    for number in (1234567890123456789, -(2**63), 2**64):
        with pytest.raises(OptionError, match=f"would change the number {number}"):
            constraint("grammar", grammar=f'start: "n" %json {{"const": {number}}}')
    text = '"%json {" // %json {\n  | /%json [{]/ | %json {"enum": [5, 9007199254740992]}'
    found = texts_of(constraint("grammar", grammar=f"start: {text}"))
    assert found == {"%json {", "5", "9007199254740992"}


def test_a_schema_is_read_from_a_spec_without_losing_digits():
    with pytest.raises(OptionError, match="the number 1234567890123456789"):
        create("processor", 'json-schema:{"const": 1234567890123456789}', LogitsProcessor)
    with pytest.raises(OptionError, match=r"the number 0\.10000000000000000555"):
        create("processor", 'json-schema:{"const": 0.10000000000000000555}', LogitsProcessor)


WRITTEN = [
    (2**53, "9007199254740992"),
    (2**60, "1152921504606846976"),
    (-(2**62), "-4611686018427387904"),
    (10**18, "1000000000000000000"),
    (1e18, "1000000000000000000"),
    (0.1, "0.1"),
    (123456.789, "123456.789"),
    (1e-7, "0.0000001"),
    (-2.5e3, "-2500"),
    (1.0, "1"),
    (-0.0, "-0"),
]


@pytest.mark.parametrize(("number", "text"), WRITTEN)
def test_a_constant_is_written_with_its_own_digits(number, text):
    """Exactly: Decimal is the oracle."""
    for schema in ({"const": number}, {"enum": [number]}, {"anyOf": [{"const": number}]}):
        assert texts_of(constraint("json-schema", schema=schema)) == {text}
    assert Decimal(text) == Decimal(repr(number))


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        ({"minimum": -(2**63), "maximum": 2**63 - 1}, [0, -(10**18), 9 * 10**18], [2**63]),
        ({"minimum": 0, "maximum": 2**64 - 1}, [0, 9 * 10**18], [-1, 2**63, 2**64]),
        ({"maximum": 1e300}, [-(10**30), 9 * 10**18], [10**301]),
        ({"exclusiveMaximum": 2**60 // 10**11 * 10**11}, [5], [2**60 // 10**11 * 10**11]),
        ({"maximum": 2**60 // 10**11 * 10**11, "exclusiveMaximum": True}, [5], [10**19]),
        ({"minimum": 2**53 - 1, "maximum": 2**62}, [2**53 - 1, 2**53, 4 * 10**18], [2**62 + 1]),
        ({"exclusiveMinimum": 2**53 - 2, "maximum": 10**17}, [2**53 - 1], [2**53 - 2]),
        ({"maximum": 10**400}, None, None),
    ],
)
def test_bounds_beyond_float64_are_moved_inwards(bounds, inside, outside):
    schema = {"type": "integer", **bounds}
    if inside is None:
        with pytest.raises(OptionError, match="beyond what float64 holds"):
            constraint("json-schema", schema=schema)
        return
    processor = constraint("json-schema", schema=schema)
    for number in inside:
        assert processor.is_complete(str(number).encode(), rows_of()), number
    for number in outside:
        assert not processor.is_complete(str(number).encode(), rows_of()), number


KEYWORDS = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}


def numbers_of(draw):
    near = st.sampled_from([0, 2**31, 2**53, 10**15, 2**60, 2**63, 2**64, 10**18])
    whole = st.builds(
        lambda at, by, sign: sign * (at + by), near, st.integers(-9, 9), st.sampled_from([1, -1])
    )
    return draw(whole | st.floats(-1e4, 1e4).map(lambda x: round(x, 3)) | st.integers(-99, 99))


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_is_written_satisfies_the_numbers_of_a_schema(data):
    """In exact arithmetic; jsonschema computes with the numbers as Python reads them."""
    chosen = data.draw(st.lists(st.sampled_from(list(KEYWORDS)), max_size=2, unique=True))
    schema = {key: numbers_of(data.draw) for key in chosen}
    if data.draw(st.booleans()):
        schema["enum"] = [numbers_of(data.draw) for _ in range(3)]
    schema["type"] = data.draw(st.sampled_from(["integer", "number"]))
    try:
        processor = constraint("json-schema", schema=schema)
    except OptionError:
        return
    walk, text = Walk(processor), b""
    for _ in range(30):
        allowed = walk.allowed()
        ends = allowed and allowed[-1] == 256
        if ends:
            number = Decimal(text.decode())
            if "enum" in schema:
                assert number in [Decimal(repr(n)) for n in schema["enum"]]
            for key, holds in KEYWORDS.items():
                assert key not in schema or holds(number, Decimal(repr(schema[key])))
            assert schema["type"] == "number" or number == number.to_integral_value()
        digits = [token for token in allowed if token != 256]
        if not digits or (ends and len(text) > 20):
            break
        token = data.draw(st.sampled_from(digits))
        text += bytes([token])
        walk.extend([[token]])


def references(count, part):
    """A chain of so many references, each by way of `part`."""
    definitions = {
        f"a{i}": json.loads(part.replace("REF", f'{{"$ref": "#/$defs/a{i + 1}"}}'))
        for i in range(count)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**definitions, f"a{count}": {"type": "null"}}}


def test_chains_of_thousands_of_references_and_rules_work():
    """llguidance alone overflows the stack at 3,000."""
    assert texts_of(constraint("json-schema", schema=references(3000, "REF"))) == {"null"}
    chain = "".join(f"\nr{i}: r{i + 1}" for i in range(3000))
    grammar = constraint("grammar", grammar=f'start: r0{chain}\nr3000: "a"')
    assert texts_of(grammar) == {"a"}


STRINGS = {"type": "string", "pattern": "a.*b"}
TOO_LARGE = {
    "references": {"schema": references(20_000, '{"items": REF, "type": "array"}')},
    "strings in each other": {
        "schema": {
            **references(40, '{"allOf": [REF, REF]}'),
            "$defs": {**references(40, '{"allOf": [REF, REF]}')["$defs"], "a40": STRINGS},
        }
    },
    "names": {"schema": {"type": "object", "required": [f"p{i}" for i in range(100_000)]}},
    "multiple": {"schema": {"type": "integer", "multipleOf": 2**31}},
    "rules": {"grammar": "start: r0" + "".join(f"\nr{i}: r{i + 1}" for i in range(40_000))},
}


@pytest.mark.parametrize(
    "what",
    [pytest.param(what, marks=[pytest.mark.slow] if what == "names" else []) for what in TOO_LARGE],
)
def test_what_would_end_the_process_or_fill_memory_is_refused(what):
    """Each ends llguidance by a signal, or takes minutes or gigabytes."""
    (option,) = TOO_LARGE[what]
    name = "grammar" if option == "grammar" else "json-schema"
    with pytest.raises(OptionError, match=rf"^processor {name}: {option}: ") as raised:
        constraint(name, **TOO_LARGE[what])
    assert "llguidance needs more than 3 s, 400 MB of memory or 16 MB of stack" in str(raised.value)


def test_a_small_schema_is_compiled_without_a_process():
    class Engine(pydantic.BaseModel):
        power: int = Field(ge=0, le=1000)
        kind: Literal["electric", "diesel"] | None = None

    class Car(pydantic.BaseModel):
        name: str = Field(max_length=20)
        engines: list[Engine] = Field(max_length=4)

    processor = constraint("json-schema", schema=Car.model_json_schema())
    assert processor._grammar.is_plain
    assert not constraint("json-schema", schema={"allOf": [True]})._grammar.is_plain


@settings(max_examples=20)
@given(
    choices=st.lists(
        st.text(st.characters(max_codepoint=0x80), min_size=1, max_size=3), min_size=1, max_size=4
    )
)
@example(choices=["\x7f", "\0", "\x1f\n"])
def test_choices_may_have_control_characters(choices):
    assert texts_of(constraint("choice", choices=choices)) == set(choices)


class Pet(pydantic.BaseModel):
    name: str = Field(max_length=5)
    age: int = Field(ge=0, le=30)

    @pydantic.field_validator("name")
    @classmethod
    def _no_x(cls, name):
        if "x" in name:
            raise ValueError("no x in names")
        return name


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Movie(TypedDict):
    title: str


def test_a_schema_may_be_a_class():
    """The text is one that pydantic reads, and `parse` makes an instance of it."""
    processor = constraint("json-schema", schema=Pet)
    out = LM.generate("x", sampler="multinomial", processors=[processor], seed=3, max_new_tokens=60)
    assert out.finish_reason == "eos"
    value = json.loads(out.text)
    assert value.keys() == {"name", "age"}
    assert 0 <= value["age"] <= 30
    assert processor.parse('{"name": "Tom", "age": 3}') == Pet(name="Tom", age=3)
    point = constraint("json-schema", schema=Point)
    assert point.is_complete(b'{"x": 1}', rows_of())
    assert not point.is_complete(b'{"x": 1, "z": 1}', rows_of())
    assert point.parse('{"x": 1}') == Point(1, 0)
    assert constraint("json-schema", schema=Movie).parse('{"title": "M"}') == {"title": "M"}


def test_parse_gives_the_value_of_a_complete_text_and_none_of_another():
    plain = constraint("json-schema", schema=SMALL)
    assert plain.parse('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    for text in ("", "{", '{"name": "To', "[" * 10**5):
        assert plain.parse(text) is None
        assert constraint("json-schema", schema=Pet).parse(text) is None
    assert constraint("regex", pattern="a").parse("a") is None
    assert constraint("choice", choices=["a"]).parse("a") is None


def test_a_text_that_the_class_itself_refuses_is_an_error_that_says_why():
    processor = constraint("json-schema", schema=Pet)
    with pytest.raises(DecodingError, match=r"^Pet refuses the text .*name: .*no x in names$"):
        processor.parse('{"name": "xy", "age": 3}')


def test_the_spec_of_a_class_is_its_json_schema():
    processor = constraint("json-schema", schema=Pet)
    again = create("processor", processor.spec, LogitsProcessor)
    assert again._grammar == processor._grammar


def test_a_class_without_a_json_schema_is_refused():
    with pytest.raises(OptionError, match=r"^processor json-schema: schema of Walk: .*schema"):
        constraint("json-schema", schema=Walk)


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_what_is_wrong_is_said_in_a_line_when_a_constraint_is_made(name, options, message):
    with pytest.raises(OptionError) as raised:
        constraint(name, **options)
    assert str(raised.value).startswith(f"processor {name}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_schema_is_named(tmp_path):
    for content, message in (
        (b"[1]", "is not a JSON object"),
        (b"{", "is not JSON"),
        (b"\xff", "is not a text in UTF-8"),
        (b'{"type": 1}', "type must be a string"),
    ):
        path = tmp_path / f"{'long-' * 20}schema.json"
        path.write_bytes(content)
        with pytest.raises(OptionError, match=f"{path}': {message}"):
            constraint("json-schema", schema=str(path))


def test_a_special_token_that_the_vocabulary_lacks_is_an_option_error():
    grammar = constraint("grammar", grammar="start: <|im_start|>")
    with pytest.raises(OptionError, match=r"unknown special token: .*im_start"):
        grammar.start(rows_of())


def test_without_a_tokenizer_there_is_no_text_to_constrain():
    with pytest.raises(TokenizerError, match=r"^processor regex needs the text of tokens"):
        constraint("regex", pattern="a").start(Rows([[1]]))


def test_without_llguidance_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for name, options in PROCESSORS.items():
        with pytest.raises(PluginError, match=r"pip install 'gptk-decoding\[constraints\]'"):
            constraint(name, **options)


def test_finding_the_plugins_does_not_import_llguidance():
    code = "import sys; from gptk.plugins import provided, failures; provided('processor')"
    code += "; assert not failures(), failures(); assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_a_vocabulary_is_read_once_for_each_tokenizer_and_goes_with_it():
    tokenizer = byte_tokenizer()
    processor = constraint("choice", choices=["a"])
    processor.start(rows_of(tokenizer=tokenizer))
    vocabulary = weakref.ref(_matcher._vocabulary(tokenizer))
    processor.start(rows_of(tokenizer=tokenizer))
    assert _matcher._vocabulary(tokenizer) is vocabulary()
    del tokenizer
    gc.collect()
    assert vocabulary() is None


PROMPTS = [[1], [72, 101, 108, 108, 111], list(b"The answer: "), [200, 13, 7]]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", PROCESSORS)
def test_every_sampler_gives_valid_text_the_same_alone_and_in_a_batch(sampler, name):
    processor = constraint(name, **PROCESSORS[name])
    asked = {"sampler": sampler, "processors": [processor], "max_new_tokens": 60, "seed": 5}
    for prompt, out in zip(PROMPTS, LM.generate_batch(PROMPTS, **asked), strict=True):
        alone = LM.generate(prompt, ordinal=out.ordinal, **asked)
        assert (out.tokens, out.finish_reason) == (alone.tokens, alone.finish_reason)
        assert out.score == pytest.approx(alone.score, abs=1e-3)
        assert out.finish_reason in ("eos", "length")
        complete = processor.is_complete(out.tokens, rows_of())
        assert complete or out.finish_reason == "length"
        if complete and name == "json-schema":
            jsonschema.validate(json.loads(out.text), SMALL)
        elif complete and name == "choice":
            assert out.text in PROCESSORS[name]["choices"]
        elif name == "regex":
            pattern = PROCESSORS[name]["pattern"]
            assert regex.fullmatch(pattern, out.text, partial=not complete)


def test_beam_ranks_choices_by_their_probability_under_the_constraint():
    """Each choice has one tokenization in bytes, so that all can be scored by hand."""
    choices = ["yes", "yet", "no", "nor", "maybe", "m", "zz"]
    prompt = [10, 20, 30]
    scores = {}
    for text in choices:
        total, tokens = 0.0, list(text.encode())
        for place, token in enumerate([*tokens, 256]):
            with torch.inference_mode():
                ids = torch.tensor([prompt + tokens[:place]])
                logits = LM.model.logits(LM.model(ids))[0, -1]
            begun = [choice.encode() for choice in choices if choice.startswith(text[:place])]
            open_to = [c[place] if len(c) > place else 256 for c in begun]
            allowed = torch.full_like(logits, -torch.inf)
            allowed[open_to] = logits[open_to]
            total += allowed.log_softmax(-1)[token].item()
        scores[text] = total
    out = LM.generate(
        prompt,
        sampler="beam:width=7,length_penalty=0,early_stopping=never",
        processors=[constraint("choice", choices=choices)],
        max_new_tokens=8,
        n=7,
    )
    got = [(result.text, result.score) for result in (out, *out.alternatives)]
    want = sorted(scores.items(), key=lambda pair: -pair[1])
    assert [text for text, _ in got] == [text for text, _ in want]
    assert [score for _, score in got] == pytest.approx([s for _, s in want], abs=1e-3)


def test_where_no_token_ends_a_row_nothing_is_left_when_nothing_may_follow():
    processor = constraint("regex", pattern="[ab]{3}")
    asked = {"processors": [processor], "ignore_eos": True}
    with pytest.raises(DecodingError, match=r"processor regex left no token .* after 3 new tokens"):
        LM.generate("x", **asked, max_new_tokens=9)
    assert regex.fullmatch("[ab]{3}", LM.generate("x", **asked, max_new_tokens=3).text)


def test_several_constraints_hold_together():
    both = [constraint("regex", pattern="[a-m]+"), constraint("regex", pattern=".{3,5}")]
    out = LM.generate("x", sampler="top-p:p=0.99", processors=both, seed=1, max_new_tokens=20)
    assert regex.fullmatch("[a-m]{3,5}", out.text)


# With the real model. 50 prompts: chat, plain text, code and noise.
QUESTIONS = [
    "Describe {} as JSON.",
    "<|im_start|>user\nTell me about {}.<|im_end|>\n<|im_start|>assistant\n",
    "{} is",
    "# {}\n\n```json\n",
    "def {}(",
]
THINGS = [
    "Albert Einstein",
    "a cat",
    "the sea at night",
    "Napoléon",
    "pi",
    "my neighbour",
    "東京",
    "quicksort",
    "an empty box",
    "42",
]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
        "kind": {"enum": ["person", "animal", "thing"]},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "age", "likes", "kind", "alive"],
    "additionalProperties": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["greedy", "top-p:p=0.9", "beam:width=3"])
@pytest.mark.parametrize("name", ["json-schema", "regex"])
def test_smollm2_gives_valid_text_on_fifty_prompts(smollm2_path, sampler, name):
    import gptk

    lm = gptk.load(str(smollm2_path))
    date = r"(Mon|Tues|Fri)day, \d{1,2} (May|June) \d{4}( at \d{2}:\d{2})?"
    options = {"json-schema": {"schema": PERSON}, "regex": {"pattern": date}}
    processor = constraint(name, **options[name])
    prompts = [question.format(thing) for question in QUESTIONS for thing in THINGS]
    outs = lm.generate_batch(
        prompts, sampler=sampler, processors=[processor], max_new_tokens=120, seed=3
    )
    assert len(outs) == 50
    for out in outs:
        assert out.finish_reason == "eos"
        if name == "regex":
            assert regex.fullmatch(date, out.text)
        else:
            jsonschema.validate(json.loads(out.text), PERSON)
