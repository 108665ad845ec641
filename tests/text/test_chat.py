"""Chat: prompts as transformers' `apply_chat_template` makes them, replies, and bad templates."""

import contextlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

import gptk
from gptk.testing import tiny_gpt, tiny_lm
from gptk.text import chat
from gptk.text.chat import encode_chat, render_chat
from gptk.text.rendering import MAX_STEPS
from gptk.weights.tokenizers import load_tokenizer
from gptk_plugins.writers.huggingface import HuggingFace
from program import failing
from program import gptk as run_gptk
from tokenizer_files import saved, trained
from toys import GPT2_LIKE, byte_tokenizer

USER = [{"role": "user", "content": "Hello"}]

# In the style of the models that they are named after.
TEMPLATES = {
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
    "llama3": """{% set ns = namespace(system='Be brief.', from=0) %}
{%- if messages[0]['role'] == 'system' -%}
    {%- set ns.system = messages[0]['content'] | trim -%}
    {%- set ns.from = 1 -%}
{%- endif -%}
{{- bos_token }}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' -}}
{{- 'Year: ' ~ strftime_now('%Y') ~ '\n\n' ~ ns.system ~ '<|eot_id|>' -}}
{% for message in messages[ns.from:] %}
    {%- if message['role'] not in ('user', 'assistant', 'tool') %}
        {{- raise_exception('no such role: ' ~ message['role']) }}
    {%- endif %}
    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
""",
    "mistral": """{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content + '\n\n', messages[1:] %}
{%- else %}
    {%- set system, turns = '', messages %}
{%- endif %}
{%- if tools is not none %}{{ raise_exception('no tools were given') }}{% endif %}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate: user, assistant,\n user, …") }}
    {%- endif %}
    {%- if turn.role == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + turn.content + '[/INST]' }}
    {%- else %}
        {{- ' ' ~ turn.content ~ eos_token }}
    {%- endif %}
{%- endfor %}""",
    "qwen2": """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
    "qwen3": """{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last < 0 %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else message.content | tojson %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if not content %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- endif %}""",
    "for training": """{%- macro header(role) %}{{ '<|' ~ role ~ '|>' }}
{% endmacro %}
{%- for message in messages -%}
    {% if message.role == 'assistant' %}
    {{- header(message.role) }}{% generation %}{% set end = eos_token %}{{ message.content + end }}
    {%- endgeneration %}{{ end }}
    {% else %}
    {{ header(message.role) }}{{ {'text': message.content, 'é': '<é>'} | tojson(indent=2) }}
    {% endif %}
{%- endfor %}
{{ dict(a=1).items() | list }} {{ dict.fromkeys(['a', 'b'], 0) }}""",
}

special = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "</think>\n\n", "{{ bos_token }}", "{% if %}"]
)
content = st.lists(st.text(max_size=8) | special, max_size=4).map("".join)
roles = st.sampled_from(["system", "user", "assistant", "tool", "critic"])
message = st.fixed_dictionaries({"role": roles, "content": content})


@st.composite
def alternating(draw):
    """A conversation that most templates accept."""
    turns = [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(draw(st.lists(content, min_size=1, max_size=5)))
    ]
    system = draw(st.none() | content)
    return turns if system is None else [{"role": "system", "content": system}, *turns]


conversations = alternating() | st.lists(message, min_size=1, max_size=4)
tokenizer = replace(byte_tokenizer(), template_tokens={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return load_tokenizer(str(smollm2_path))


@pytest.fixture(scope="module")
def smollm2_oracle(smollm2, tmp_path_factory):
    """SmolLM2's tokenizer, converted, in transformers."""
    folder = tmp_path_factory.mktemp("converted")
    HuggingFace().write(folder, tiny_gpt(replace(GPT2_LIKE, vocab_size=49152)), smollm2)
    return transformers.AutoTokenizer.from_pretrained(folder)


# --- Equal to transformers --------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_and_refusals_equal_those_of_transformers(name):
    template = TEMPLATES[name]

    @settings(max_examples=60)
    @given(conversations, st.booleans())
    @example([{"role": "system", "content": ""}, *USER], True)
    @example([{"role": "assistant", "content": "a</think>\n\nb"}, *USER], True)
    def same(messages, add_generation_prompt):
        refusal = None
        try:
            [expected], _ = render_jinja_template(
                [messages],
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                bos_token="<s>",
                eos_token="</s>",
            )
        except jinja2.TemplateError as error:
            refusal = error
        if refusal is None:
            rendered = render_chat(
                tokenizer, messages, template, add_generation_prompt=add_generation_prompt
            )
            assert rendered == expected
        else:
            with pytest.raises(gptk.PromptError) as caught:
                render_chat(tokenizer, messages, template)
            assert " ".join(str(refusal).split()) in str(caught.value)

    same()


@settings(max_examples=60)
@given(conversations)
@example(USER)
@example([*USER, {"role": "assistant", "content": "Hi"}, *USER])
def test_smollm2_tokens_equal_those_of_transformers(smollm2, smollm2_oracle, messages):
    text = smollm2_oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render_chat(smollm2, messages) == text
    ids = smollm2_oracle.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert encode_chat(smollm2, messages) == ids


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("in_map", [None, "<b>", {"content": "<b>"}])
@pytest.mark.parametrize(
    "in_config", ["absent", None, "<a>", {"content": "<a>", "__type": "AddedToken"}]
)
def test_a_directorys_bos_and_eos_reach_the_template_as_in_transformers(
    in_config, in_map, newer, tmp_path
):
    """Not those that generation_config.json names: they end a text, but can be other tokens."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"}
    if in_config != "absent":
        config["bos_token"] = in_config
    if newer:
        config["added_tokens_decoder"] = {"1": {"content": "<b>", "special": True}}
    folder = saved(
        trained(special=("<a>", "<b>", "<e>", "<f>")),
        tmp_path,
        tokenizer_config=config,
        **({} if in_map is None else {"special_tokens_map": {"bos_token": in_map}}),
        generation_config={"bos_token_id": 3, "eos_token_id": [3, 2]},
    )
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    mine = load_tokenizer(str(folder))
    assert mine.eos == (3, 2)
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    expected = oracle.apply_chat_template(USER, chat_template=template, tokenize=False)
    assert render_chat(mine, USER, template) == expected
    assert expected.endswith("Hello<e>")


def test_a_directorys_template_file_comes_before_its_settings(tmp_path):
    folder = saved(trained(), tmp_path, tokenizer_config={"chat_template": "old"})
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}, new\n")
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    expected = oracle.apply_chat_template(USER, tokenize=False)
    assert render_chat(load_tokenizer(str(folder)), USER) == expected == "Hello, new"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(gptk.TokenizerError, match=r"chat_template\.jinja"):
        load_tokenizer(str(folder))


def test_saving_and_converting_keep_the_template_and_its_tokens(tmp_path):
    source = saved(
        trained(special=("<a>", "<e>", "<f>")),
        tmp_path / "source",
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<e>",
            "chat_template": TEMPLATES["mistral"],
        },
        generation_config={"bos_token_id": 0, "eos_token_id": [2, 1]},
    )
    tokenizer = load_tokenizer(str(source))
    talk = [*USER, {"role": "assistant", "content": "Hi"}, *USER]
    expected = transformers.AutoTokenizer.from_pretrained(source).apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True
    )
    assert render_chat(tokenizer, talk) == expected
    assert "Hi<e>" in expected
    lm = gptk.LanguageModel(tiny_gpt(replace(GPT2_LIKE, vocab_size=700)), tokenizer)
    lm.save(tmp_path / "saved")
    assert render_chat(gptk.load(str(tmp_path / "saved")).tokenizer, talk) == expected
    (tmp_path / "hf").mkdir()
    HuggingFace().write(tmp_path / "hf", lm.model, tokenizer)
    assert render_chat(load_tokenizer(str(tmp_path / "hf")), talk) == expected
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert oracle.apply_chat_template(talk, tokenize=False) == expected


def same_as_transformers(messages, template, **tokens):
    """Check that the text is that of transformers; `tokens` are the named ones."""
    [expected], _ = render_jinja_template(
        [[{k: v for k, v in m.items() if v is not None} for m in messages]],
        chat_template=template,
        add_generation_prompt=True,
        **tokens,
    )
    named = replace(tokenizer, template_tokens=tokens)
    assert render_chat(named, messages, template) == expected
    return expected


LOOPS = [
    "{% for part in m.content %}{{ part.text }};{% endfor %}",
    "{% for part in m['content'] %}{{ part['text'] }};{% endfor %}",
    "{% set content = m.content %}{% for part in content %}{{ part.text }};{% endfor %}",
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}",
    "{% macro shown(content) %}{% for p in content %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{{ shown(m.content) }}",
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": "c"},
]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_template_that_loops_over_a_content_gets_its_parts_as_in_transformers(loop):
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}"
        f"{{% else %}}{loop}{{% endif %}}{{% endfor %}}"
    )
    assert "a" in same_as_transformers(PARTS, template)


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen2", "qwen3"])
def test_for_a_template_that_takes_texts_the_parts_are_joined_by_line_breaks(name):
    """As llama.cpp and vLLM do; transformers gives it the list, which it cannot use."""
    joined = [{**PARTS[0], "content": "a\nb"}, PARTS[1]]
    template = TEMPLATES[name]
    assert render_chat(tokenizer, PARTS, template) == render_chat(tokenizer, joined, template)


def test_keys_without_a_value_are_left_out_as_in_transformers():
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": None}]},
        {"role": "tool", "content": "1", "tool_calls": None},
    ]
    template = (
        "{% for m in messages %}{{ m.content is defined }}{{ m.tool_calls is defined }}"
        "{{ m | tojson }}{% endfor %}"
    )
    assert "FalseTrue" in same_as_transformers(messages, template)


def test_all_named_tokens_reach_the_template_as_in_transformers(tmp_path):
    special = ("<s>", "</s>", "<pad>", "<unk>", "<sep>", "<img>")
    folder = saved(
        trained(special=special),
        tmp_path,
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "sep_token": "<sep>",
            "image_token": "<img>",
            "mask_token": None,
        },
    )
    template = (
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token }}"
        "{{ image_token }}{{ cls_token is defined }}{{ mask_token is defined }}"
    )
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    expected = oracle.apply_chat_template(USER, chat_template=template, tokenize=False)
    mine = load_tokenizer(str(folder))
    assert render_chat(mine, USER, template) == expected == "".join(special) + "FalseFalse"
    (tmp_path / "hf").mkdir()
    HuggingFace().write(tmp_path / "hf", tiny_gpt(replace(GPT2_LIKE, vocab_size=700)), mine)
    assert render_chat(load_tokenizer(str(tmp_path / "hf")), USER, template) == expected


# --- Beginning and end ------------------------------------------------------------------------


def test_bos_is_there_once_if_the_template_writes_it_and_not_otherwise():
    first = replace(byte_tokenizer(), bos=256, add_bos=True)
    assert first.encode("Hello") == [256, *b"Hello"]
    written = encode_chat(first, USER, "{{ bos_token }}{{ messages[0].content }}")
    assert written == [256, *b"Hello"]
    assert encode_chat(first, USER, "{{ messages[0].content }}") == [*b"Hello"]


def test_without_names_for_the_template_bos_and_the_first_eos_count():
    both = replace(byte_tokenizer(), bos=ord("B"), eos=(256, 1))
    assert render_chat(both, USER, "{{ bos_token }} {{ eos_token }}") == "B <|endoftext|>"
    assert render_chat(replace(both, bos=None), USER, "{{ bos_token is defined }}") == "False"


def test_a_reply_is_what_generate_makes_of_the_rendered_text():
    lm = tiny_lm()
    chat_lm = gptk.LanguageModel(lm.model, replace(lm.tokenizer, chat_template=TEMPLATES["chatml"]))
    chosen = {"sampler": "top-p:p=0.9", "seed": 3, "n": 2, "max_new_tokens": 9}
    expected = lm.generate(render_chat(chat_lm.tokenizer, USER), **chosen)
    assert chat_lm.chat(USER, **chosen) == expected
    assert lm.chat(USER, template=TEMPLATES["chatml"], **chosen) == expected
    stream = chat_lm.stream_chat(USER, max_new_tokens=9)
    assert "".join(stream) == stream.result.text == chat_lm.chat(USER, max_new_tokens=9).text


def test_smollm2_replies_and_ends_its_turn():
    out = run_gptk("generate", "--chat", "What is the capital of France?")
    assert out.stdout == "The capital of France is Paris.\n"
    assert "finish reason: eos" in out.stderr


# --- Conversations and templates that do not do -----------------------------------------------


def deep():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no messages"),
        ("Hello", "a list of messages"),
        ({"role": "user", "content": "Hello"}, "a list of messages"),
        (["Hello"], "message 1 is not like"),
        ([*USER, {"role": "user"}], "message 2 is not like"),
        ([{"role": 1, "content": "Hello"}], "the role 1"),
        ([{"role": "user", "content": object()}], "texts, numbers, lists and dicts"),
        ([{"role": "user", "content": "", "x": [{1: 2}]}], "texts, numbers, lists and dicts"),
        ([{"role": "user", "content": "", "x": 10**5000}], "texts, numbers, lists and dicts"),
        ([{"role": "user", "content": "", "x": deep()}], "nested too deeply"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "the type 'image_url'; gptk's mo"),
        ([{"role": "user", "content": [{"type": "text"}]}], "reads? text"),
        ([{"role": "user", "content": ["Hi"]}], "the part 'Hi'"),
    ],
)
def test_a_conversation_that_is_none_is_refused(messages, words):
    with pytest.raises(gptk.PromptError, match=words):
        render_chat(tokenizer, messages, "x")


def test_the_template_gets_copies_without_methods_of_their_own():
    class Loud(str):
        def shout(self):
            raise AssertionError

    messages = [{"role": "user", "content": Loud("a"), "parts": ({"n": 1},)}]
    template = "{{ messages[0].content.shout is defined }} {{ messages[0].parts }}"
    assert render_chat(tokenizer, messages, template) == "False [{'n': 1}]"


def test_without_a_template_the_error_says_what_to_do():
    with pytest.raises(gptk.PromptError, match=r"no chat template; give one \(--chat-template"):
        tiny_lm().chat(USER)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "not valid jinja2: line 1: Expected an expression"),
        ("a\n{% for x in messages %}", "not valid jinja2: line 2: Unexpected end of template"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ 'x' + none }}", "TypeError"),
        ("{{ raise_exception('one\n two') }}", "refuses the messages: one two"),
    ],
)
def test_an_error_of_a_template_is_one_line(template, words):
    with pytest.raises(gptk.PromptError) as caught:
        render_chat(tokenizer, USER, template)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ [''] | map(attribute='__class__') | list }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ lipsum.__globals__ }}",
        "{{ dict.__class__ }}",
        "{{ dict.mro() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ open('/etc/passwd').read() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_reaches_neither_python_nor_files(template):
    with pytest.raises(gptk.PromptError, match="the chat template fails"):
        render_chat(tokenizer, USER, template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{{ (f(n - 1) ~ f(n - 1)) if n }}{% endmacro %}{{ f(60) }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** 10 * [messages] }}",
        "{% set x = 'x' * 9999999 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'x'.center(10 ** 10) }}",
        "{{ 'x' | indent(10 ** 10) }}",
        "{{ [1] | tojson(indent=10 ** 10) }}",
        "{{ [1] | batch(10 ** 10, 0) | list }}",
        "{% set ns = namespace(x='xx') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ (9 ** 99999) | string }}",
    ],
)
def test_a_template_that_would_run_or_grow_for_ever_is_stopped(template):
    with pytest.raises(gptk.PromptError, match="the chat template fails"):
        render_chat(tokenizer, USER, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 | round(1000000000, 'ceil') }}",
        "{{ lipsum(n=10000000) }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
        "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | string }}",
    ],
)
def test_a_template_that_spends_time_outside_of_its_steps_is_stopped(template, monkeypatch):
    monkeypatch.setattr(chat, "WALL_SECONDS", 1.5)
    with pytest.raises(gptk.PromptError, match="it took too much time or memory"):
        render_chat(tokenizer, USER, template)
    assert render_chat(tokenizer, USER, "{{ messages[0].content }}") == "Hello"


@pytest.mark.slow
def test_the_processor_time_of_a_template_is_limited(monkeypatch):
    monkeypatch.setattr(chat, "WALL_SECONDS", 300)
    with pytest.raises(gptk.PromptError, match="it took too much time or memory"):
        render_chat(tokenizer, USER, "{{ 1 | round(1000000000, 'ceil') }}")


def test_the_rendering_process_ends_with_its_parent_and_survives_a_fork():
    program = """
import os, sys
from gptk.text import chat
import gptk
tokenizer = gptk.load_tokenizer("bytes")
render = lambda: chat.render_chat(tokenizer, [{"role": "user", "content": "a"}], "{{ messages }}")
first = render()
number = chat._renderer._process.pid
if os.fork() == 0:
    assert render() == first
    assert chat._renderer._process.pid != number
    os._exit(0)
assert os.wait()[1] == 0
assert render() == first
assert chat._renderer._process.pid == number
print(number)
"""
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    assert not Path(f"/proc/{out.stdout.strip()}").exists()


def test_threads_share_the_rendering_process():
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(render_chat, tokenizer, [{"role": "user", "content": str(n)}], TEMPLATE)
            for n in range(100)
        ]
    assert [job.result() for job in jobs] == [f"user: {n}\n" for n in range(100)]


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_without_an_interpreter_the_error_says_so(monkeypatch):
    chat._renderer.close()
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(gptk.PromptError, match="/nonexistent/python cannot be started"):
        render_chat(tokenizer, USER, "x")


def test_a_long_conversation_is_not_taken_for_an_endless_one():
    messages = USER * (MAX_STEPS // 100)
    text = render_chat(tokenizer, messages, TEMPLATES["chatml"])
    assert text.count("<|im_start|>user") == len(messages)


pieces = st.sampled_from(["{{", "}}", "{%", "%}", "for x in", "messages", "if", "endfor", ".", "|"])


@given(st.lists(pieces | st.text(max_size=5), min_size=1, max_size=8).map(" ".join))
def test_any_text_as_a_template_renders_or_is_a_prompt_error(template):
    with contextlib.suppress(gptk.PromptError):
        render_chat(tokenizer, USER, template)


# --- The command line -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random model with a chat template, saved."""
    lm = tiny_lm()
    path = tmp_path_factory.mktemp("model") / "small"
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    gptk.LanguageModel(lm.model, replace(lm.tokenizer, chat_template=template)).save(path)
    return path


def asked(*args, **settings):
    """The prompts that the program built, as texts."""
    out = run_gptk("generate", "--chat", "--max-new-tokens", 3, "--json", *args, **settings)
    assert out.returncode == 0, out.stderr
    objects = [json.loads(line) for line in out.stdout.splitlines()]
    return [(line["prompt"], bytes(line["prompt_tokens"]).decode()) for line in objects]


def test_chat_takes_a_message_from_the_command_line_or_standard_input(model):
    assert asked("Hi", "--model", model) == [("Hi", "user:Hi;")]
    assert asked("--model", model, stdin="Hi\n") == [("Hi", "user:Hi;")]
    system = asked("Hi", "--model", model, "--system", "Be kind.")
    assert system == [("Hi", "system:Be kind.;user:Hi;")]


def test_each_line_of_a_prompts_file_is_a_message(model, tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\ntwo words\n")
    args = ("--model", model, "--prompts-file", tmp_path / "lines.txt", "--system", "S")
    assert asked(*args) == [
        ("one", "system:S;user:one;"),
        ("two words", "system:S;user:two words;"),
    ]


def test_a_template_file_serves_instead_of_the_models_own(model, tmp_path):
    (tmp_path / "my.jinja").write_text("<{{ messages[-1].content }}>\n")
    args = ("--model", model, "--chat-template", tmp_path / "my.jinja")
    assert asked("Hi", *args) == [("Hi", "<Hi>")]


def test_what_chat_cannot_do_is_said_in_one_line(model, tmp_path):
    plain = tmp_path / "plain"
    tiny_lm().save(plain)
    chat = ("generate", "--chat", "Hi")
    assert "has no chat template" in failing(*chat, "--model", plain, code=1)
    assert "needs a message" in failing("generate", "--chat", "--model", model, code=2)
    assert "work with --chat" in failing("generate", "Hi", "--system", "x", code=2)
    file = tmp_path / "bad.jinja"
    missing = failing(*chat, "--chat-template", tmp_path / "none.jinja", code=2)
    assert "none.jinja" in missing
    for data, words, code in (
        (b"\xff\xfe", "not a UTF-8 text file", 2),
        (b" \n", "it is empty", 2),
        (b"{% if %}", "not valid jinja2: line 1", 1),
    ):
        file.write_bytes(data)
        # Reported before the model is searched.
        line = failing(*chat, "--chat-template", file, "--model", "no/such/model", code=code)
        assert words in line
    file.write_text("{{ raise_exception('no system message, please') }}")
    line = failing(*chat, "--chat-template", file, "--model", model, code=1)
    assert "refuses the messages: no system message, please" in line
