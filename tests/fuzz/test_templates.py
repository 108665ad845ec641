"""Chat templates: real ones mutated, and ones made to use up time and memory."""

import random
import re

from attacking import mutated_text

import gptk
from gptk.text.chat import render_chat

REAL = [
    # In the style of SmolLM2 and Qwen2, Llama 3, Mistral, and Qwen3.
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}"
    "{% endif %}",
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{{ strftime_now('%d %b %Y') }}",
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if "
    "message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
    "{%- set ns = namespace(last=-1) %}{%- for m in messages[::-1] %}{%- if m.role == 'user' %}"
    "{%- set ns.last = messages|length - 1 - loop.index0 %}{%- break %}{%- endif %}{%- endfor %}"
    "{%- macro shown(content) %}{%- if content is string %}{{- content }}{%- else %}{%- for part "
    "in content %}{{- part.text }}{%- endfor %}{%- endif %}{%- endmacro %}{%- for m in messages %}"
    "{{- shown(m.content).split('</think>')[-1].lstrip('\n') }}{{- m | tojson(indent=2) }}"
    "{%- endfor %}",
]
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello</think>\n\n"},
    {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
]
NUMBERS = ["0", "1", "2", "-1", "9", "99999", "10 ** 6", "10 ** 9", "10 ** 18", "9 ** 9 ** 9"]
VALUES = ["messages", "'x'", "''", "'ab ' * 99", "[]", "{}", "none", "true", "1.5", "namespace()"]
VALUES += ["range(99999)", "'x' * 9999999", "messages[0].content", "loop", "self", "lipsum", "dict"]
FILTERS = re.findall(
    r"\w+",
    """abs attr batch capitalize center count d default dictsort e escape filesizeformat first float
    forceescape format groupby indent int items join last length list lower map max min pprint
    random reject rejectattr replace reverse round safe select selectattr slice sort string
    striptags sum title tojson trim truncate unique upper urlencode urlize wordcount wordwrap
    xmlattr""",
)
METHODS = re.findall(
    r"\w+",
    """center ljust rjust zfill expandtabs replace join split splitlines format format_map translate
    encode partition strip title count find startswith items keys values get copy bit_length
    to_bytes __class__ __mul__ append""",
)
OPERATORS = ["+", "-", "*", "**", "/", "//", "%", "~", "==", "<", "and", "or", "in", "is", "is not"]


def expression(rng: random.Random, depth: int = 0) -> str:
    """An expression, many of which want much time or memory."""

    def inner() -> str:
        return expression(rng, depth + 1)

    kind = rng.randrange(9) if depth < 4 else rng.randrange(2)
    if kind == 0:
        return rng.choice(VALUES)
    if kind == 1:
        return rng.choice([*NUMBERS, "v", "v", "x"])
    if kind == 2:
        return f"({inner()} {rng.choice(OPERATORS)} {inner()})"
    if kind in (3, 4):
        arguments = ", ".join(inner() for _ in range(rng.randrange(3)))
        return f"({inner()} | {rng.choice(FILTERS)}{f'({arguments})' if arguments else ''})"
    if kind == 5:
        return f"{rng.choice(VALUES)}.{rng.choice(METHODS)}({inner()})"
    if kind == 6:
        return f"[{inner()}, {inner()}]"
    if kind == 7:
        return f"('%{rng.choice(['9' * rng.randrange(1, 12), ''])}d' % {inner()})"
    return f"{rng.choice(['range', 'lipsum', 'dict', 'cycler', 'joiner', 'f'])}({inner()})"


def statement(rng: random.Random, depth: int = 0) -> str:
    """A statement; loops and macros grow the variable v."""

    def inner() -> str:
        return statement(rng, depth + 1)

    kind = rng.randrange(8) if depth < 3 else rng.randrange(3)
    if kind == 0:
        return f"{{{{ {expression(rng)} }}}}"
    if kind == 1:
        return f"{{% set v = {expression(rng)} %}}"
    if kind == 2:
        growth = rng.choice(["[ns.v, ns.v]", "ns.v ~ ns.v", "ns.v + ns.v", "{1: ns.v, 2: ns.v}"])
        return f"{{% set ns.v = {growth} %}}"
    if kind == 3:
        return f"{{% for x in {expression(rng)} %}}{inner()}{inner()}{{% endfor %}}"
    if kind == 4:
        times = rng.choice([10, 30, 60, 1000])
        return f"{{% for x in range({times}) %}}{inner()}{{% endfor %}}{{{{ ns.v | string }}}}"
    if kind == 5:
        return f"{{% macro f(x) %}}{inner()}{{{{ f({expression(rng)}) }}}}{{% endmacro %}}"
    if kind == 6:
        return f"{{% if {expression(rng)} %}}{inner()}{{% else %}}{inner()}{{% endif %}}"
    return f"{{% filter {rng.choice(FILTERS)} %}}{inner()}{{% endfilter %}}"


def render(template: str) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = gptk.ByteLevelBPE(
        "bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={}
    )
    text = render_chat(gptk.Tokenizer(encoding, bos=0, eos=(1,)), MESSAGES, template)
    assert len(text) <= 10_000_000


def test_real_templates_mutated(attack):
    attack(lambda rng: mutated_text(rng, rng.choice(REAL)), render)


def test_templates_that_want_much_time_or_memory(attack):
    def make(rng: random.Random) -> str:
        start = f"{{% set ns = namespace(v={rng.choice(['[1]', repr('xx'), 'messages'])}) %}}"
        return start + "".join(statement(rng) for _ in range(rng.randrange(1, 5)))

    attack(make, render)
