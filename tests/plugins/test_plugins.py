"""Spec strings, typed options, registration, entry points."""

import subprocess
import sys
import textwrap
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, field_validator

import gptk
from gptk import plugins
from gptk.spec import format_spec, parse_spec

NAMES = st.from_regex(r"[a-z0-9][a-z0-9.-]*", fullmatch=True)
KEYS = st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True)


@given(NAMES, st.dictionaries(KEYS, st.text(max_size=10), max_size=4))
def test_a_spec_string_is_read_back(name, options):
    assert parse_spec(format_spec(name, options)) == (name, options)


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
    ],
)
def test_spec_strings_of_every_form(spec, options):
    assert parse_spec(spec) == ("x", options)


@pytest.mark.parametrize(
    "spec", ["", ":a=1", "x:", "x:a", "x:a=", 'x:a="1', "x:a=1,", "x y", "x:a=1,a=2"]
)
def test_other_strings_are_refused_in_one_line(spec):
    with pytest.raises(gptk.SpecError) as caught:
        parse_spec(spec)
    assert repr(spec) in str(caught.value)
    assert "\n" not in str(caught.value)


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
        (OneClass(), "hook gptk_samplers of mine 1.0: it returned <class '"),
        (Provider(Nameless), "Nameless has the name None"),
        (Provider(Inherited), "Inherited has the name None"),
        (
            Provider(Undefined),
            "an option of Undefined has the type Nowhere, which is not defined",
        ),
        (Provider(Spaced), "Spaced has the name 'two words'"),
        (Provider(WrongKind), "is not a subclass of gptk.LogitsProcessor"),
        (Provider(Everything(text="")), "is not a subclass of gptk.LogitsProcessor"),
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
            name: str = "odd"  # a field, not the class's name

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
    said = listed.stderr.splitlines()
    assert len(said) == 8
    for line in (
        "plug-in gptk-broken of gptk-broken 1.0: ModuleNotFoundError",
        "hook gptk_samplers of gptk-odd 1.0: Odd has the name None",
        "two samplers are called 'top-k': one from gptk",
        "hook gptk_tokenizers of gptk-odd 1.0: it returned None, not a list",
        "plug-in gptk-bare of gptk-bare 1.0: it has no hook of gptk's: gptk_samplers is not marked",
        "a function of gptk-typo 1.0: there is no hook gptk_sampler; did you mean gptk_samplers",
        "hook gptk_commands of gptk-odd 1.0: gptk has a command generate of its own",
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
    import ast
    from pathlib import Path

    import gptk_plugins

    for file in Path(gptk_plugins.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.ImportFrom(module=str(module)):
                    assert module.split(".")[0] != "gptk", f"{file.name} imports from {module}"
                case ast.Import(names=names):
                    for name in names:
                        assert not name.name.startswith("gptk."), f"{file.name} imports {name.name}"
                        assert name.name != "gptk" or not name.asname, f"{file.name} renames gptk"
                case ast.Attribute(value=ast.Name(id="gptk"), attr=name):
                    assert name in gptk.__all__, f"{file.name} uses gptk.{name}"
