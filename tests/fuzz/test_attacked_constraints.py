"""Constraints: whatever the schema, pattern, grammar or list, a line or texts that satisfy it."""

import itertools
import json
import random
from typing import Any

from attacking import mutated_json, mutated_text

from gptk.testing import tiny_lm
from gptk_plugins.constraints.choice import Choice
from gptk_plugins.constraints.grammar import Grammar
from gptk_plugins.constraints.json_schema import JsonSchema
from gptk_plugins.constraints.regex import Regex

LM = tiny_lm()


def warm_up() -> None:
    """Compile the kernels, which takes long where they are not cached."""
    LM.generate("a", sampler="multinomial", max_new_tokens=1)


def decoded(constraint: Any) -> None:
    LM.generate_batch(
        [[65], [66, 67]],
        sampler="multinomial",
        processors=[constraint],
        max_new_tokens=12,
        seed=0,
        max_seconds=10.0,
    )


SCHEMAS: list[Any] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6, "pattern": "^[a-z]*$"},
            "n": {"type": "integer", "minimum": 1, "exclusiveMaximum": 120, "multipleOf": 3},
            "tags": {"type": "array", "items": {"enum": ["a", 2, None, 1.5]}, "maxItems": 2},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
        "minProperties": 1,
    },
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"v": {"type": "number"}, "l": {"$ref": "#/$defs/tree"}},
                "required": ["v"],
            },
            "id": {"anyOf": [{"type": "string", "format": "date"}, {"const": 9007199254740993}]},
        },
        "anyOf": [{"$ref": "#/$defs/tree"}, {"$ref": "#/$defs/id"}],
    },
    {"allOf": [{"multipleOf": 0.5}, {"minimum": -2.5}], "type": "number", "maximum": 1e3},
    {"patternProperties": {"^a": {"type": "null"}, "^b": {"type": "boolean"}}, "type": "object"},
    {"oneOf": [{"type": "array", "prefixItems": [{"const": 1}]}, {"type": ["null", "string"]}]},
]
PATTERNS = [
    r"\d{3}-\d{4}",
    r"(abc|ab[0-9]{1,4} )*x+y",
    r"(?i)[a-z]+(\.[a-z]+){0,3}@\w+",
    r"((a{2,9}){1,30}|\p{Greek}*)?[^\x00-\x7f]?",
    r"(\"[^\"\\]*(\\.[^\"\\]*)*\")|\\d\n\t",
]
GRAMMARS = [
    'start: "(" start ")" | "[" start "]" | /[a-z ]{2,9}/',
    'start: item ("," item)*\nitem: NAME "=" (NUMBER | STRING)\nNAME: /[a-z]+/\n'
    'NUMBER: /[0-9]+/ ("." /[0-9]+/)?\nSTRING: "\\"" /[^"]*/ "\\""\n%ignore /[ ]+/',
    'start: "say " %json {"type": "object", "properties": {"n": {"maximum": 1e3}}} end?\nend: "."',
    'start: a{2,5} b[lazy]\na: /x/ | %regex {"substring_chars": "abcd"}\nb: T & ~/q/\nT: /.*;/',
]
NUMBERS = ["1000", "100000", "4294967296", "9223372036854775808", "1e400", "0.07", "-1", "1e-300"]


def with_numbers(rng: random.Random, text: str) -> str:
    """The text, half of the time with one of its numbers replaced by one at a limit."""
    places = [place for place, character in enumerate(text) if character.isdigit()]
    if not places or rng.random() < 0.5:
        return text
    place = rng.choice(places)
    return text[:place] + rng.choice(NUMBERS) + text[place + 1 :]


def test_json_schemas(attack):
    def make(rng: random.Random) -> str:
        schema = rng.choice(SCHEMAS)
        if rng.random() < 0.3:
            names = [f"a{i}" for i in range(rng.choice([3, 30, 3000]))]
            part = rng.choice([{"allOf": [1, 1]}, {"items": 1}, 1, {"anyOf": [1, {}]}])
            schema = {"$ref": "#/$defs/a0", "$defs": {names[-1]: schema}}
            for name, following in itertools.pairwise(names):
                reference = f'{{"$ref": "#/$defs/{following}"}}'
                schema["$defs"][name] = json.loads(json.dumps(part).replace("1", reference))
        return with_numbers(rng, mutated_json(rng, schema))

    warm_up()
    attack(make, lambda text: decoded(JsonSchema(schema="{" + text.removeprefix("{"))))


def test_regular_expressions(attack):
    def make(rng: random.Random) -> str:
        text = mutated_text(rng, rng.choice(PATTERNS))
        for _ in range(rng.choice([0, 0, 1, 3, 300])):
            text = rng.choice([f"({text}){{1000}}", f"({text})*", f"(a|{text})", f"{text}."])
        return with_numbers(rng, text * rng.choice([1, 1, 1, 2, 1000]))

    warm_up()
    attack(make, lambda text: decoded(Regex(pattern=text)))


def test_grammars(attack):
    def make(rng: random.Random) -> str:
        text = with_numbers(rng, mutated_text(rng, rng.choice(GRAMMARS)))
        if rng.random() < 0.3:
            count = rng.choice([3, 30, 4000])
            rule, end = rng.choice([("r", "r"), ("T", "T")]), rng.choice(["", "x", " | 'a'"])
            text = text.replace('"', f'{rule[0]}0 "', 1)
            text += "".join(f"\n{rule[0]}{i}: {rule[1]}{i + 1} {end}" for i in range(count))
            text += f'\n{rule[0]}{count}: "z"'
        return text

    warm_up()
    attack(make, lambda text: decoded(Grammar(grammar=text)))


def test_choices(attack):
    def make(rng: random.Random) -> Any:
        texts = ["yes", "no", "perhaps not", "", "é", "\u2028"]
        texts = [mutated_text(rng, text) for text in texts] * rng.choice([1, 1, 5000])
        return rng.choice(
            [texts, mutated_text(rng, json.dumps(texts)), [f"{i}" for i in range(30000)]]
        )

    warm_up()
    attack(make, lambda choices: decoded(Choice(choices=choices)))
