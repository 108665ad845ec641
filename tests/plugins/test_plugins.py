"""Spec strings, typed options, registration, entry points."""

import ast
import importlib
import pkgutil
import subprocess
import sys
import textwrap
from decimal import Decimal
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field, field_validator

import gptk
import gptk_plugins
from gptk import plugins
from gptk.cli.plugins import command as plugins_command
from gptk.decoding.settings import check_settings
from gptk.errors import shown
from gptk.spec import format_spec, parse_spec, split_specs, unescape
from gptk.training.config import read_config

NAMES = st.from_regex(r"[a-z0-9][a-z0-9.-]*", fullmatch=True)
KEYS = st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True)


# Any text, and texts of the characters that specs give a meaning.
TEXTS = st.text(st.characters(), max_size=10) | st.text("ab\\\"'nt0,:=[]{} \n\t\0", max_size=12)


@settings(max_examples=500)
@given(NAMES, st.dictionaries(KEYS, TEXTS, max_size=4))
@example("x", {"a": r"\d\n\\"})
@example("x", {"a": "[1, 2] "})
@example("x", {"a": '{"b": "\n\\\\"}'})
def test_a_spec_string_is_read_back(name, options):
    assert parse_spec(format_spec(name, options)) == (name, options)


@settings(max_examples=200)
@given(st.lists(st.tuples(NAMES, st.dictionaries(KEYS, TEXTS, max_size=2)), min_size=1))
@example([("x", {"a": '["b + c"]'}), ("y", {"a": "b+c"}), ("z", {"a": "b + c"})])
def test_joined_specs_are_split_between_them_alone(specs):
    each = [format_spec(name, options) for name, options in specs]
    assert split_specs(" + ".join(each)) == each


@given(TEXTS)
def test_a_quoted_text_is_read_back_whichever_quotes_it_has(text):
    for quote in "\"'":
        quoted = text.replace("\\", "\\\\").replace(quote, f"\\{quote}")
        assert parse_spec(f"x:a={quote}{quoted}{quote}") == ("x", {"a": text})


@pytest.mark.parametrize(
    ("quoted", "text"),
    [
        (r"\(\d{3}\) \d{3}", r"\(\d{3}\) \d{3}"),
        (r"\\d \w", r"\d \w"),
        (r"a\nb\tc\rd\0", "a\nb\tc\rd\0"),
        (r"\"\'", "\"'"),
        (r"\\n", r"\n"),
        (r"\\\\", r"\\"),
        (r"\x41\é", r"\x41\é"),
    ],
)
def test_in_quotes_and_stop_strings_a_backslash_before_an_unknown_letter_stays(quoted, text):
    assert unescape(quoted) == text  # used for --stop
    assert parse_spec(f'x:a="{quoted}"') == ("x", {"a": text})


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("x", {}),
        ("x:a=1,b=two", {"a": "1", "b": "two"}),
        ("x:path=/tmp/m.gguf", {"path": "/tmp/m.gguf"}),
        ('x:a="1, 2",b=3', {"a": "1, 2", "b": "3"}),
        ("x:a='say \"hi\"'", {"a": 'say "hi"'}),
        (r'x:a="line\nbreak \"q\" \\"', {"a": 'line\nbreak "q" \\'}),
        ("x:a=b=c", {"a": "b=c"}),
        ("x:a=it's", {"a": "it's"}),
        ("x:a=1, b=2", {"a": "1", "b": "2"}),
        ("x:4", {"": "4"}),
        ("x: 4, b=2", {"": "4", "b": "2"}),
        ('x:"a=b, c"', {"": "a=b, c"}),
        (r"x:\d+=x", {"": r"\d+=x"}),
        ('x:["a", "b"],c=1', {"": '["a", "b"]', "c": "1"}),
        ("x:a=b", {"a": "b"}),
    ],
)
def test_spec_strings_of_every_form(spec, options):
    assert parse_spec(spec) == ("x", options)


@pytest.mark.parametrize(
    "spec", ["", ":a=1", "x:", "x: ", "x:a=", 'x:a="1', "x:a=1,", "x y", "x:a=1,a=2"]
)
def test_other_strings_are_refused_in_one_line(spec):
    with pytest.raises(gptk.SpecError) as caught:
        parse_spec(spec)
    assert repr(spec) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["x:4,5", "x:a=1,5", "x:a=[a-z]{1,3}", "x:4,a=1,b"])
def test_only_the_first_value_comes_without_a_name(spec):
    with pytest.raises(gptk.SpecError, match="only the first value may come without"):
        parse_spec(spec)


ALL_CLASSES = [
    pytest.param(plugin.item, id=f"{kind}-{plugin.name}")
    for kind in plugins.KINDS
    if kind != "command"
    for plugin in plugins.provided(kind).values()
    if plugin.distribution.startswith("gptk")
]


@pytest.mark.parametrize("item", ALL_CLASSES)
def test_every_plugin_is_made_by_its_short_form(item):
    """`beam:4` is `beam:width=4`; a plug-in that needs one option takes it without its name."""
    needed = [name for name, option in item.model_fields.items() if option.is_required()]
    if len(needed) == 1:
        assert item.positional == needed[0]
    if not item.positional:
        with pytest.raises(gptk.OptionError, match="takes no value without a name") as raised:
            plugins.create(item.kind, f"{item.name}:4", item)
        assert all(f"{name}=" in str(raised.value) for name in item.model_fields)
        return
    short = plugins.short_form(item)
    options = parse_spec(f"{item.name}:{item.example}")[1] if item.example else {}
    if short is None:  # tensorboard's folder, which has no default and no example
        short, options = f"{item.name}:folder", {item.positional: "folder"}
    value = parse_spec(short)[1][""]
    others = {name: text for name, text in options.items() if name != item.positional}
    rest = format_spec("", others).removeprefix(":")
    with_rest = f"{short},{rest}" if rest else short
    named = {**others, item.positional: value}
    made = plugins.create(item.kind, with_rest, item)
    assert made == plugins.from_options(item, named)
    with pytest.raises(gptk.OptionError, match=f"{item.positional} is given twice"):
        plugins.create(item.kind, f"{short},{item.positional}=1", item)


@pytest.mark.parametrize(
    ("kind", "spec", "options"),
    [
        ("sampler", "beam:4,early_stopping=never", {"width": 4, "early_stopping": "never"}),
        ("sampler", "top-p:0.8", {"p": 0.8}),
        ("sampler", "multinomial:0.7", {"temperature": 0.7}),
        ("sampler", "best-of-n:3", {"n": 3}),
        ("sampler", "dola:[1, 2]", {"layers": (1, 2)}),
        ("processor", "repetition-penalty:1.1", {"penalty": 1.1}),
        ("processor", r"regex:\d+", {"pattern": r"\d+"}),
        ("processor", 'choice:["a", "b"]', {"choices": ("a", "b")}),
        ("drafter", "lookup:10", {"tokens": 10}),
        ("scheduler", "linear:100", {"warmup": 100}),
        ("regularizer", "grad-clip:0.5", {"max_norm": 0.5}),
        ("loader", "gguf:model.gguf", {"path": "model.gguf"}),
    ],
)
def test_the_short_form_sets_the_option_that_the_field_expects(kind, spec, options):
    item = plugins.find(kind, spec.partition(":")[0]).item
    assert plugins.create(kind, spec, item) == item(**options)


def test_a_value_with_an_equals_sign_is_never_silently_an_option():
    with pytest.raises(gptk.OptionError, match=r"no option 'a'.*is quoted, \"a=b\"$"):
        plugins.create("processor", "regex:a=b", gptk.LogitsProcessor)
    made = plugins.create("processor", 'regex:"a=b"', gptk.LogitsProcessor)
    assert made.pattern == "a=b"
    assert parse_spec(made.spec) == ("regex", {"pattern": "a=b"})


@pytest.mark.parametrize("item", ALL_CLASSES)
def test_every_built_in_is_imported_from_the_package_of_its_kind(item):
    home = importlib.import_module(item.__module__.rpartition(".")[0])
    assert item.__name__ in home.__all__
    assert getattr(home, item.__name__) is item


@pytest.mark.parametrize(
    "package", sorted(p.name for p in pkgutil.iter_modules(gptk_plugins.__path__))
)
def test_the_classes_of_a_package_are_listed_for_type_checkers_and_at_run_time(package):
    home = importlib.import_module(f"gptk_plugins.{package}")
    if not hasattr(home, "__all__"):
        return
    source = ast.parse(Path(home.__file__).read_text())
    typed = {
        alias.name: node.module
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{home.__name__}.")
        for alias in node.names
    }
    assert typed == {name: getattr(home, name).__module__ for name in home.__all__}
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = home.Nothing


def test_importing_a_built_in_loads_no_others():
    code = "from gptk_plugins.samplers import Greedy; import sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = [name for name in out.stdout.split() if name.startswith("gptk_plugins.")]
    assert loaded == [
        "gptk_plugins._homes",
        "gptk_plugins.samplers",
        "gptk_plugins.samplers.greedy",
    ]


class Everything(gptk.LogitsProcessor):
    """One option of each type.

    More about it.
    """

    name = "everything"

    count: int = Field(3, ge=1, le=9, description="how many")
    share: float = Field(0.5, gt=0, lt=1, description="how much")
    strict: bool = Field(False, description="whether")
    mode: Literal["a", "b"] = Field("a", description="which")
    text: str = Field(description="what")


def test_options_are_typed_from_text():
    plugin = Everything(
        **parse_spec('everything:count=4,share=0.25,strict=true,mode=b,text="a, b"')[1]
    )
    assert plugin == Everything(count=4, share=0.25, strict=True, mode="b", text="a, b")


@given(
    st.builds(
        Everything,
        count=st.integers(1, 9),
        share=st.floats(0.01, 0.99),
        strict=st.booleans(),
        mode=st.sampled_from("ab"),
        text=st.text(),
    )
)
def test_a_plugin_is_made_again_from_its_spec(plugin):
    name, options = parse_spec(plugin.spec)
    assert name == "everything"
    assert Everything(**options) == plugin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "processor everything needs the option text (string)"),
        ({"text": "", "cuont": 1}, "has no option 'cuont'; did you mean count?"),
        ({"text": "", "count": "10"}, "count=10 is not allowed; count is integer ≥ 1, ≤ 9"),
        ({"text": "", "share": 1}, "share=1 is not allowed; share is number > 0, < 1"),
        ({"text": "", "strict": "maybe"}, "strict=maybe is not allowed; strict is true or false"),
        ({"text": "", "mode": "c"}, "mode=c is not allowed; mode is a or b (default a)"),
    ],
)  # fmt: skip
def test_wrong_options_say_what_is_allowed(options, message):
    with pytest.raises(gptk.OptionError) as caught:
        Everything(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_default_that_is_no_number_or_text_is_shown_as_json():
    class Defaults(gptk.LogitsProcessor):
        """Options with defaults of all types."""

        name = "defaults"
        share: float = 0.5
        mode: str = "a"
        text: str = ""
        strict: bool = False
        words: tuple[str, ...] = ("\n", "b")
        end: int | None = None

    shown = [default for _, _, default, _ in gptk.plugins.option_help(Defaults)]
    assert shown == ["0.5", "a", '""', "false", '["\\n", "b"]', "null"]


def test_bounds_and_defaults_are_written_without_exponents():
    class Bounded(gptk.LogitsProcessor):
        """Options with small and large bounds."""

        name = "bounded"
        ratio: float = Field(1e-6, ge=1e-6, le=1e6)
        share: float = Field(0.25, gt=-0.5, lt=1.0)
        count: int = Field(3, ge=0, le=10**6)
        far: float = Field(1.0, ge=0.0, le=1e300)

    shown = [(allowed, default) for _, allowed, default, _ in gptk.plugins.option_help(Bounded)]
    assert shown == [
        ("number ≥ 0.000001, ≤ 1000000", "0.000001"),
        ("number > -0.5, < 1", "0.25"),
        ("integer ≥ 0, ≤ 1000000", "3"),
        ("number ≥ 0, ≤ 1e+300", "1.0"),
    ]
    with pytest.raises(gptk.OptionError, match=r"ratio is number ≥ 0\.000001, ≤ 1000000 "):
        Bounded(ratio=0)


HUGE = [10**20, -(10**30), 10**400, 10**5000, "9" * 30, "9" * 400, "9" * 5000, "1e999", "inf"]
HUGE += [
    float("inf"),
    float("nan"),
    "1e99999999999999999999",
    "[" * 5000,
    [[[]]],
    {"": None},
    None,
    "a\nb",
]


@pytest.mark.parametrize("value", HUGE, ids=lambda value: shown(value, 20))
@pytest.mark.parametrize(
    ("kind", "name", "option"),
    [
        ("scheduler", "linear", "warmup"),
        ("scheduler", "linear", "floor"),
        ("processor", "temperature", "temperature"),
        ("processor", "top-k", "k"),
        ("processor", "suppress-tokens", "tokens"),
        ("processor", "logit-bias", "bias"),
        ("sampler", "beam", "width"),
        ("regularizer", "label-smoothing", "strength"),
    ],
)
def test_a_number_that_cannot_be_used_is_refused_in_a_short_line(kind, name, option, value):
    item = plugins.find(kind, name).item
    tries = [lambda: item(**{option: value})]
    if isinstance(value, str):
        tries.append(lambda: plugins.create(kind, format_spec(name, {option: value}), item))
    for make in tries:
        with pytest.raises(gptk.OptionError) as raised:
            make()
        said = str(raised.value)
        assert said.startswith(f"{kind} {name}: {option}")
        assert "\n" not in said
        assert len(said) < 300


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("steps = true", "steps=true is not allowed; steps is integer > 0"),
        ("lr = false", "lr=false is not allowed; lr is number > 0"),
        ("shuffle = 'maybe'", "shuffle=maybe is not allowed; shuffle is true or false"),
        ("scheduler = {}", "scheduler={} is not allowed; scheduler is string"),
        ("regularizers = [5]", "regularizers=5 is not allowed; regularizers is array"),
        ("data = 1979-05-27", "is not allowed; data is array"),
        ("lr = inf", "lr=inf is not allowed"),
        ("lr = 1" + "0" * 400, "is not allowed; lr is number"),
        ("width = 1" + "0" * 30, "width is too large; it must be below 2**63"),
        ("seed = " + "9" * 5000, "cannot be read as TOML"),
        ("x = " + "[" * 3000, "cannot be read as TOML"),
    ],
)
def test_a_training_configuration_with_a_wrong_value_is_refused_in_a_short_line(
    tmp_path, toml, said
):
    (tmp_path / "config.toml").write_text(toml)
    with pytest.raises(gptk.OptionError) as raised:
        read_config(tmp_path / "config.toml")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_spec_in_toml_keeps_its_backslashes(tmp_path):
    spec = r'regex:"\d{2}, \w\n"'
    for toml in (f"scheduler = '{spec}'", 'scheduler = """' + spec.replace("\\", "\\\\") + '"""'):
        (tmp_path / "config.toml").write_text(toml)
        assert parse_spec(read_config(tmp_path / "config.toml").scheduler) == (
            "regex",
            {"": "\\d{2}, \\w\n"},
        )


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**400, 10**5000, True, 1.5], ids=shown)
def test_a_seed_that_64_bits_do_not_hold_is_refused(seed):
    with pytest.raises(gptk.OptionError, match=r"^seed is .*whole number"):
        check_settings(seed=seed)


def test_as_many_rows_as_no_machine_holds_are_refused():
    for sampler in ("beam:10000000000", "best-of-n:10000000000"):
        with pytest.raises(gptk.OptionError, match="would decode 10000000000 rows for a prompt"):
            check_settings(sampler=sampler)


def test_models_and_tokenizers_are_named_by_the_short_form(smollm2_path, tmp_path):
    assert gptk.load_tokenizer(f"gguf:{smollm2_path}").encode("a") == [81]
    assert gptk.load_checkpoint(f"gguf:{smollm2_path}", stored=True).config.n_layers == 30
    with pytest.raises(gptk.TokenizerError, match="nowhere"):
        gptk.load_tokenizer(f"gguf:{tmp_path}/nowhere.gguf")


def test_help_shows_the_short_form():
    shown_text = CliRunner().invoke(plugins_command, ["show", "top-p"]).output
    assert "p may come first without its name: top-p:0.9" in shown_text


def test_whole_numbers_of_an_option_fit_into_64_bits():
    item = plugins.find("scheduler", "linear").item
    assert item(warmup=2**63 - 1).warmup == 2**63 - 1
    with pytest.raises(gptk.OptionError, match="9223372036854775808 is not allowed; whole"):
        item(warmup=2**63)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 2.5]", [1, 2.5]),
        ("0.10000000000000000001", Decimal("0.10000000000000000001")),
        ("12345678901234567890", 12345678901234567890),
        ("1e400", Decimal("1e400")),
        ('"a\nb"', "a\nb"),
    ],
)
def test_json_in_options_loses_nothing(text, value):
    assert plugins.from_json(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' occurs twice"),
        ("[NaN]", "NaN is no number"),
        ("-Infinity", "-Infinity is no number"),
        ("9" * 5000, "5,000 digits"),
        ("1e99999999999999999999", "too large or too small"),
        ("[1,", "Expecting value"),
    ],
)
def test_json_that_readers_understand_differently_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        plugins.from_json(text)


def test_plugins_are_frozen():
    plugin = Everything(text="x")
    with pytest.raises(gptk.PluginError, match="everything cannot be changed"):
        plugin.count = 4


class Provider:
    """A plug-in object, as a module would be."""

    def __init__(self, *items):
        self.items = items

    @gptk.hookimpl
    def gptk_logits_processors(self):
        return list(self.items)


def test_a_registered_plugin_is_found_and_taken_out_again():
    provider = Provider(Everything)
    plugins.register(provider, origin="mine 1.0")
    try:
        assert plugins.provided("processor")["everything"].distribution == "mine 1.0"
        plugin = plugins.create("processor", "everything:text=x", gptk.LogitsProcessor)
        assert plugin == Everything(text="x")
    finally:
        plugins.unregister(provider)
    assert "everything" not in plugins.provided("processor")


def test_a_name_that_is_taken_is_an_error_naming_both():
    class TopK(gptk.LogitsProcessor):
        name = "top-k"

    with pytest.raises(gptk.PluginError, match=r"'top-k': one from gptk-dec.*, one from mine 1.0"):
        plugins.register(Provider(TopK), origin="mine 1.0")
    assert "top-k" in plugins.provided("processor")


def test_kinds_have_names_of_their_own():
    assert plugins.find("sampler", "top-k").item is not plugins.find("processor", "top-k").item


class Broken:
    @gptk.hookimpl
    def gptk_logits_processors(self):
        raise RuntimeError("no luck\ntoday")


class BuiltForAnother:
    GPTK_API = 2

    @gptk.hookimpl
    def gptk_samplers(self):
        return []


class Misspelt:
    GPTK_API = 1

    @gptk.hookimpl
    def gptk_sampler(self):
        return []

    @gptk.hookimpl
    def gptk_logits_processors(self):
        return [Everything]


class Unmarked:
    def gptk_samplers(self):
        return []


class OneClass:
    @gptk.hookimpl
    def gptk_samplers(self):
        return WrongKind


class Async:
    @gptk.hookimpl
    async def gptk_samplers(self):
        return []


class Twice:
    @gptk.hookimpl
    def gptk_logits_processors(self):
        class Other(gptk.LogitsProcessor):
            name = "everything"

        return [Everything, Everything, Other]  # one of them is only named twice


class Quits:
    @gptk.hookimpl
    def gptk_samplers(self):
        sys.exit()


class HalfMarked:
    def gptk_samplers(self):
        return []

    @gptk.hookimpl
    def gptk_logits_processors(self):
        return [Everything]


class Nameless(gptk.LogitsProcessor):
    pass


class Inherited(Everything):
    pass


class Spaced(gptk.LogitsProcessor):
    name = "two words"


class Underscored(gptk.LogitsProcessor):
    name = "my_sampler"


class Undefined(gptk.LogitsProcessor):
    name = "undefined"
    mode: "Nowhere" = 3  # noqa: F821


class Picky(gptk.LogitsProcessor):
    """Its validator fails."""

    name = "picky"
    count: int = 3

    @field_validator("count")
    @classmethod
    def check(cls, value):
        return 1 / value


class NoSuchOption(gptk.LogitsProcessor):
    name = "no-such-option"
    positional = "cuont"
    count: int = 3


class WrongKind(gptk.Sampler):
    name = "wrong-kind"


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Broken(), "hook gptk_logits_processors of mine 1.0: RuntimeError: no luck"),
        (
            BuiltForAnother(),
            "it was built for version 2 of gptk's hooks, and this gptk has version 1",
        ),
        (
            Unmarked(),
            "it has no hook of gptk's: gptk_samplers is not marked as a hook; write @gptk",
        ),
        (object(), "it has no hook, so gptk finds nothing in it; add a function gptk_samplers()"),
        (OneClass(), "hook gptk_samplers of mine 1.0: it returned the class WrongKind; return [Wr"),
        (Async(), "hook gptk_samplers of mine 1.0: it is async, and gptk does not await it"),
        (Twice(), "two logits processors are called 'everything', both of mine 1.0; rename one"),
        (Quits(), "hook gptk_samplers of mine 1.0: SystemExit"),
        (Provider(Nameless), "Nameless has no name; give it a class attribute, `name = 'namel"),
        (Provider(Inherited), "Inherited has no name; give it"),
        (
            Provider(Undefined),
            "an option of Undefined has the type Nowhere, which is not defined",
        ),
        (
            Provider(Spaced),
            "Spaced has the name 'two words'; a name has letters, digits, dots and hyphens: "
            "'two-words'",
        ),
        (
            Provider(NoSuchOption),
            "NoSuchOption has no option 'cuont', its `positional`; did you mean count?",
        ),
        (
            Provider(Underscored),
            "has the name 'my_sampler'; a name has letters, digits, dots and hyphens: 'my-sampler'",
        ),
        (Provider(WrongKind), "is not a subclass of gptk.LogitsProcessor"),
        (
            Provider(Everything(text="")),
            "it returned an instance of Everything; return the class itself, [Everything]",
        ),
        (Provider(3), "3 is not a subclass of gptk.LogitsProcessor"),
    ],
)
def test_a_plugin_that_breaks_a_rule_is_refused_and_the_others_go_on(plugin, message):
    with pytest.raises(gptk.PluginError) as caught:
        plugins.register(plugin, origin="mine 1.0")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "top-k" in plugins.provided("processor")
    assert plugins.failures() == []


def test_a_class_that_fails_to_be_made_is_named():
    provider = Provider(Picky)
    plugins.register(provider, origin="mine 1.0")
    try:
        with pytest.raises(
            gptk.PluginError,
            match=r"^processor picky of mine 1.0 \(hook gptk_logits_processors\) cannot be made: "
            "ZeroDivisionError: division by zero$",
        ):
            plugins.create("processor", "picky:count=0", gptk.LogitsProcessor)
    finally:
        plugins.unregister(provider)


class Lists(gptk.LogitsProcessor):
    """Options that are neither text nor numbers."""

    name = "lists"
    tokens: tuple[int, ...] = ()
    words: list[str] | None = Field(["a, b"])
    weights: dict[str, float] = Field({})


def test_lists_and_the_like_are_written_as_json():
    provider = Provider(Lists)
    plugins.register(provider, origin="mine")
    try:
        odd = Lists(tokens=(4, 5), words=None, weights={'"x"': 0.5})
        for plugin in (Lists(), odd, Lists(words=[])):
            assert plugins.create("processor", plugin.spec, gptk.LogitsProcessor) == plugin
        assert plugins.create("processor", 'lists:tokens="[1, 2]"', Lists).tokens == (1, 2)
    finally:
        plugins.unregister(provider)


def test_a_hyphen_in_an_option_is_an_underscore():
    assert parse_spec("beam:length-penalty=2") == ("beam", {"length_penalty": "2"})


def test_a_hook_that_there_is_not_is_warned_of_and_the_others_go_on():
    plugin = Misspelt()
    with pytest.warns(gptk.PluginWarning, match="no hook gptk_sampler; did you mean gptk_samplers"):
        plugins.register(plugin)
    try:
        assert "everything" in plugins.provided("processor")
    finally:
        plugins.unregister(plugin)


def test_a_hook_that_is_not_marked_is_warned_of_and_the_others_go_on():
    plugin = HalfMarked()
    with pytest.warns(gptk.PluginWarning, match="gptk_samplers is not marked as a hook; write @gp"):
        plugins.register(plugin)
    try:
        assert "everything" in plugins.provided("processor")
    finally:
        plugins.unregister(plugin)


def test_all_hooks_exist():
    hooks = vars(plugins.manager().hook)
    specs = {name for name, hook in hooks.items() if getattr(hook, "spec", None)}
    assert specs == {kind.hook for kind in plugins.KINDS.values()}


@pytest.fixture
def third_party(tmp_path):
    """A folder with installed distributions: one that works, one that fails to import."""

    def distribution(name, module, source):
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[gptk]\n{name} = {module}\n")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))

    distribution(
        "gptk-coldest",
        "coldest",
        """
        import click, gptk

        class Coldest(gptk.Sampler):
            "Always the least likely token."
            name = "coldest"

            def step(self, logits, rows):
                return gptk.Choice.one_each(logits.argmin(dim=-1), logits, rows)

        @gptk.hookimpl
        def gptk_samplers():
            return [Coldest]

        @click.command("hello")
        def hello():
            "Say hello."
            click.echo("hello from a plug-in")

        @gptk.hookimpl
        def gptk_commands():
            return [hello]
        """,
    )
    distribution("gptk-broken", "broken", "import a_module_that_is_not_there\n")
    distribution(
        "gptk-odd",
        "odd",
        """
        import click, gptk

        class Odd(gptk.Sampler):
            "Has no name."

        class TopK(gptk.Sampler):
            "[bold]Not markup[/nope]"
            name = "top-k"

        @gptk.hookimpl
        def gptk_samplers():
            yield Odd
            yield TopK

        @gptk.hookimpl
        def gptk_tokenizers():
            return None

        @gptk.hookimpl
        def gptk_commands():
            return [click.Command("generate"), len]
        """,
    )
    distribution("gptk-bare", "bare", "def gptk_samplers():\n    return []\n")
    distribution(
        "gptk-typo",
        "typo",
        """
        import gptk

        @gptk.hookimpl
        def gptk_sampler():
            return []

        @gptk.hookimpl
        def gptk_scorers():
            return []
        """,
    )

    distribution(
        "gptk-declares",
        "declares",
        """
        import gptk

        class Declares(gptk.Sampler):
            name: str = "declares"  # a field, not the class's name
        """,
    )
    distribution("gptk-quits", "quits", "import sys\nprint('printed by quits')\nsys.exit()\n")
    distribution("gptk-interrupts", "interrupts", "raise BaseException('gone')\n")
    return tmp_path


def run(path, *args):
    return subprocess.run(
        [sys.executable, "-m", "gptk", *args],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(path), "PATH": ""},
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_entry_points_are_found_and_a_broken_one_is_reported_and_skipped(third_party):
    listed = run(third_party, "plugins")
    assert listed.returncode == 0
    assert "gptk-coldest 1.0" in listed.stdout
    assert "beam" in listed.stdout
    assert "printed" not in listed.stdout
    printed, *said = listed.stderr.splitlines()
    assert printed == "printed by quits"
    assert len(said) == 11
    for line in (
        "plug-in gptk-broken of gptk-broken 1.0: ModuleNotFoundError",
        "hook gptk_samplers of gptk-odd 1.0: Odd has no name; give it a class attribute",
        "two samplers are called 'top-k': one from gptk",
        "hook gptk_tokenizers of gptk-odd 1.0: it returned None, not a list",
        "plug-in gptk-bare of gptk-bare 1.0: it has no hook of gptk's: gptk_samplers is not marked",
        "a function of gptk-typo 1.0: there is no hook gptk_sampler; did you mean gptk_samplers",
        "hook gptk_commands of gptk-odd 1.0: gptk has a command generate of its own",
        "plug-in gptk-declares of gptk-declares 1.0: Declares declares `name` as an option, which "
        "Sampler has for itself; write `name = …` without a type",
        "plug-in gptk-quits of gptk-quits 1.0: SystemExit",
        "plug-in gptk-interrupts of gptk-interrupts 1.0: BaseException: gone",
        "hook gptk_commands of gptk-odd 1.0: <built-in function len> is not a click command",
    ):
        assert any(line in message for message in said), said
    shown = run(third_party, "plugins", "show", "coldest")
    assert "Always the least likely token." in shown.stdout


def test_a_name_that_two_distributions_claim_is_an_error_when_it_is_used(third_party):
    used = run(third_party, "generate", "x", "--sampler", "top-k")
    assert used.returncode == 1
    assert "two samplers are called 'top-k'" in used.stderr.splitlines()[-1]
    # Others go on: this fails for its model, not for a plug-in.
    other = run(third_party, "generate", "x", "--sampler", "beam", "--model", "nowhere.gguf")
    assert "nowhere.gguf" in other.stderr.splitlines()[-1]


def test_a_plugin_can_add_a_command(third_party):
    assert run(third_party, "hello").stdout == "hello from a plug-in\n"


def test_the_core_runs_without_built_ins(tmp_path):
    """With plugins/ gone the core says that it knows no samplers, and decodes by one's own."""
    code = """
        import importlib.metadata
        importlib.metadata.entry_points = lambda **_: ()
        import gptk
        from gptk.plugins import create
        try:
            create("sampler", "greedy", gptk.Sampler)
        except gptk.GptkError as error:
            print(error)

        class Second(gptk.Sampler):
            name = "second"

            def step(self, logits, rows):
                return gptk.Choice.one_each(logits.topk(2).indices[:, 1], logits, rows)

        from gptk.testing import tiny_gpt
        lm = gptk.LanguageModel(tiny_gpt())
        assert len(lm.generate([1, 2], sampler=Second(), max_new_tokens=4).tokens) == 4
        assert len(lm.score([1, 2, 3]).token_logprobs) == 2
        import sys
        assert "gptk_plugins" not in sys.modules
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "no sampler is called 'greedy'; no samplers are known"


def test_built_ins_import_only_what_is_public():
    for file in Path(gptk_plugins.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.ImportFrom(module=str(module)):
                    public = ("gptk.adapters", "gptk.plugins", "gptk.vocabulary")
                    is_public = module.split(".")[0] != "gptk" or module in public
                    assert is_public, f"{file.name} imports from {module}"
                case ast.Import(names=names):
                    for name in names:
                        assert not name.name.startswith("gptk."), f"{file.name} imports {name.name}"
                        assert name.name != "gptk" or not name.asname, f"{file.name} renames gptk"
                case ast.Attribute(value=ast.Name(id="gptk"), attr=name):
                    assert name in gptk.__all__, f"{file.name} uses gptk.{name}"
