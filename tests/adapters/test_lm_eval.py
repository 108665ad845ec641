"""lm-evaluation-harness: results are those of its own model `hf` with the same weights."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

import gptk

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytestmark = pytest.mark.slow  # `make test-slow` installs the extra

from lm_eval.api.instance import Instance  # noqa: E402 - only where lm-eval is
from lm_eval.tasks import TaskManager  # noqa: E402

from gptk.adapters import lm_eval as adapter  # noqa: E402
from gptk.adapters.lm_eval import GptkLM  # noqa: E402

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
# Printable characters alone: half a character would be U+FFFD for transformers, nothing for gptk.
LETTERS = [char for char, byte in gptk.GPT2_ALPHABET.items() if 32 <= byte < 127]
EOS, BOS = 95, 96
MODELS = {
    "gpt2": transformers.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=EOS
    ),
    "llama": transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=BOS,
        eos_token_id=EOS,
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    """A random model over letters in transformers' format. llama's tokenizer adds BOS."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[request.param]).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    vocabulary = {text: id for id, text in enumerate([*LETTERS, "</s>", "<s>"])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["</s>", "<s>"])
    if request.param == "llama":
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content }} | {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}",
        **{"bos_token" if request.param == "llama" else "pad_token": "<s>"},
    ).save_pretrained(folder)
    return folder


WORDS = re.findall(r"\w+", "the quick brown fox jumps over a lazy dog while seven wizards box")
DOCS = [
    {
        "question": " ".join(WORDS[i % 12 : i % 12 + 1 + i % 5]),
        "choices": [WORDS[(i + k) % 13] + "!" * (k % 2) for k in range(4)],
        "label": i % 4,
        "text": " ".join(WORDS[(i * k) % 13] for k in range(1, 3 + 4 * i)),
    }
    for i in range(12)
]
DOCS += [{**DOCS[0], "question": "", "choices": ["a", "b", "c", "d"]}]
DOCS += [{**DOCS[0], "question": "far too long " * 9}]
TASKS = {
    "choice": """
        output_type: multiple_choice
        doc_to_text: question
        doc_to_choice: choices
        doc_to_target: label
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "letters": """
        output_type: multiple_choice
        doc_to_text: "{{question}} A B C D? Answer:"
        doc_to_choice: [A, B, C, D]
        doc_to_target: label
        metric_list: [{metric: acc}]
    """,
    "greedy": """
        output_type: generate_until
        doc_to_text: "Q: {{question}}"
        doc_to_target: "{{choices[0]}}"
        generation_kwargs: {until: [e, "\\n\\n"], max_gen_toks: 12, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
    "beams": """
        output_type: generate_until
        doc_to_text: "Q: {{question}}"
        doc_to_target: "{{choices[0]}}"
        generation_kwargs: {until: [], max_gen_toks: 8, num_beams: 3}
        metric_list: [{metric: exact_match}]
    """,
    "penalty": """
        output_type: generate_until
        doc_to_text: "Q: {{question}}"
        doc_to_target: "{{choices[0]}}"
        generation_kwargs: {until: [], max_gen_toks: 8, repetition_penalty: 1.2}
        metric_list: [{metric: exact_match}]
    """,
    "rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: text
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
    """,
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of the tasks' YAML files; their data are in a file beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, text in TASKS.items():
        lines = "\n".join(line.strip() for line in text.strip().splitlines())
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'docs.jsonl'}}}}}\n{lines}\n"
        )
    return folder


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def evaluate(model, folder, tasks, names, **options):
    return lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[*names],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        **options,
    )


def test_every_kind_of_task_gives_what_hf_gives(folder, tasks):
    """One of the contexts is empty, one is longer than the window."""
    theirs = evaluate("hf", folder, tasks, TASKS)
    ours = evaluate("gptk", folder, tasks, TASKS)
    for name in TASKS:
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            assert len(mine["resps"]) == len(other["resps"])
            for (got,), (want,) in zip(mine["resps"], other["resps"], strict=True):
                if isinstance(want, tuple):
                    assert got == (pytest.approx(want[0], abs=2e-4), want[1])
                else:
                    assert got == (want if isinstance(want, str) else pytest.approx(want, abs=1e-3))
        metrics = {key: v for key, v in theirs["results"][name].items() if isinstance(v, float)}
        assert {key: ours["results"][name][key] for key in metrics} == pytest.approx(metrics)
    assert ours["config"]["gptk"]["settings"]["seed"] == 1234
    assert any(sample["resps"][0][0] for sample in ours["samples"]["greedy"])


def test_chat_templates_give_what_hf_gives(folder, tasks):
    options = {"apply_chat_template": True, "system_instruction": "Be brief.", "num_fewshot": 0}
    theirs = evaluate("hf", folder, tasks, ["greedy", "choice"], **options)
    ours = evaluate("gptk", folder, tasks, ["greedy", "choice"], **options)
    for name in ("greedy", "choice"):
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            for (got,), (want,) in zip(mine["resps"], other["resps"], strict=True):
                if isinstance(want, str):
                    assert got == want
                else:
                    assert got == (pytest.approx(want[0], abs=2e-4), want[1])


# --- Settings ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(folder):
    return gptk.load(str(folder), dtype="float32")


def plain(generation):
    return generation.text.replace("<s>", "")


def generate(lm, *contexts, **asked):
    requests = [
        Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 8, **asked}), 0)
        for context in contexts
    ]
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({}, {}),
        ({"temperature": 0.0, "top_p": 0.9, "top_k": 5}, {}),
        ({"do_sample": False, "temperature": 0.7}, {}),
        (
            {"do_sample": True, "temperature": 0.7},
            {"sampler": "multinomial", "processors": ["temperature:0.7"]},
        ),
        (
            {"temperature": 0.7, "top_p": 0.8, "top_k": -1},
            {"sampler": "multinomial", "processors": ["temperature:0.7", "top-p:0.8"]},
        ),
        ({"num_beams": 3}, {"sampler": "beam:3"}),
        ({"repetition_penalty": 1.3}, {"processors": ["repetition-penalty:1.3"]}),
        ({"until": ["e", ""]}, {"stop": ["e"]}),
        ({"until": "e"}, {"stop": ["e"]}),
        ({"max_gen_toks": None, "max_tokens": 3}, {"max_new_tokens": 3}),
        ({"sampler": "beam:2"}, {"sampler": "beam:2"}),
    ],
)
def test_settings_of_tasks_are_those_of_gptk(loaded, asked, settings):
    lm = GptkLM(loaded, seed=3)
    expected = loaded.generate("the", **{"max_new_tokens": 8, "seed": 3, **settings})
    assert generate(lm, "the", **asked) == [plain(expected)]


@pytest.mark.parametrize(
    "args",
    [
        {"sampler": "beam:4", "processors": ["no-repeat-ngram:2"]},
        {"sampler": "multinomial", "processors": ["top-k:5"]},
        {"processors": "top-p:0.8"},
        {"sampler": "greedy", "draft": "lookup"},
    ],
)
def test_a_sampler_of_the_model_decides(loaded, args):
    lm = GptkLM(loaded, seed=3, **args)
    expected = loaded.generate("the", max_new_tokens=8, seed=3, **args)
    assert generate(lm, "the", do_sample=False, temperature=0.0) == [plain(expected)]
    assert generate(lm, "the", do_sample=True, temperature=9.0) == [plain(expected)]


def test_processors_of_the_model_are_used_with_the_tasks_sampler(loaded):
    lm = GptkLM(loaded, processors=["repetition-penalty:1.4"], seed=3)
    settings = {"max_new_tokens": 8, "seed": 3}
    greedy = loaded.generate("the", processors=["repetition-penalty:1.4"], **settings)
    assert generate(lm, "the") == [plain(greedy)]
    processors = ["repetition-penalty:1.4", "temperature:2"]
    drawn = loaded.generate("the", sampler="multinomial", processors=processors, **settings)
    assert generate(lm, "the", do_sample=True, temperature=2) == [plain(drawn)]


def test_repeats_differ_and_do_not_depend_on_other_requests(loaded):
    lm = GptkLM(loaded, seed=3)
    first, other, second = generate(lm, "the", "a", "the", temperature=1.0)
    assert first != second
    assert generate(lm, "the", "the", temperature=1.0) == [first, second]
    assert generate(lm, "a", temperature=1.0) == [other]


def test_results_are_cached(loaded):
    saved = {}

    class Hook:
        def add_partial(self, kind, args, result):
            saved[kind, str(args)] = result

    lm = GptkLM(loaded)
    lm.set_cache_hook(Hook())
    pair = Instance("loglikelihood", {}, ("the", " fox"), 0)
    (score,) = lm.loglikelihood([pair], disable_tqdm=True)
    (total,) = lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, ("the fox",), 0)], disable_tqdm=True
    )
    (text,) = generate(lm, "the")
    assert [*saved.values()] == [score, total, text]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"sampler": "no-such"}, "no-such"),
        ({"revision": "main"}, "no setting revision"),
        ({"max_new_tokens": 3}, "tasks say it"),
        ({"max_length": 100}, "max_length is 100; it must be 1 to 64"),
    ],
)
def test_what_the_model_refuses(loaded, args, message):
    with pytest.raises(gptk.GptkError, match=message):
        GptkLM(loaded, **args)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_gen_toks": 64}, "64 new tokens, and the model's window is 64"),
        ({"no_such": 3}, "no setting no_such"),
        ({"until": ["\ud800"]}, "no model writes"),
    ],
)
def test_what_tasks_cannot_ask_for(loaded, asked, message):
    with pytest.raises(gptk.GptkError, match=message):
        generate(GptkLM(loaded), "the", **asked)


def test_a_sampler_that_overrides_a_task_is_told_once(loaded, caplog, monkeypatch):
    monkeypatch.setattr(adapter, "_warned", set())
    lm = GptkLM(loaded, sampler="beam:2")
    generate(lm, "a", "b", do_sample=True)
    generate(lm, "a", do_sample=False)
    assert len([r for r in caplog.records if "sampler and processors are used" in r.message]) == 1


# --- The command ------------------------------------------------------------------------------


def run(*args, cwd):
    return subprocess.run(
        [sys.executable, "-m", "gptk", "lm-eval", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "HF_DATASETS_CACHE": str(cwd / "datasets")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_is_lm_evals_own(folder, tasks, tmp_path):
    args = f"pretrained={folder},dtype=float32,sampler=beam:width=2,processors=['top-k:k=9']"
    out = run(
        *("--model", "gptk", "--model_args", args, "--tasks", "greedy,rolling", "--limit", 3),
        *("--include_path", tasks, "--output_path", tmp_path / "out.json", "--seed", 7),
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr
    assert re.search(r"^gptk \(\{'pretrained': ", out.stdout, re.MULTILINE)
    assert "word_perplexity" in out.stdout
    (path,) = tmp_path.glob("out_*.json")
    settings = json.loads(path.read_text())["config"]["gptk"]["settings"]
    assert settings == {"sampler": "beam:width=2", "processors": ["top-k:k=9"], "seed": 7}


def test_options_that_gptk_has_too_are_lm_evals(tmp_path):
    out = run("run", "--help", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "--verbosity" in out.stdout


def test_a_wrong_setting_is_one_line(tasks, tmp_path):
    out = run(
        *("--model", "gptk", "--model_args", "sampler=beem", "--tasks", "rolling"),
        *("--include_path", tasks),
        cwd=tmp_path,
    )
    assert out.returncode == 2
    assert out.stderr.splitlines()[-1].startswith("gptk: no sampler is called 'beem'")


def test_lm_evals_plug_ins_find_the_model():
    settings = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    points = settings["project"]["entry-points"]["lm_eval.models"]
    (point,) = (EntryPoint(name, value, "lm_eval.models") for name, value in points.items())
    assert point.name == "gptk"
    assert point.load() is GptkLM is lm_eval.api.registry.get_model("gptk")
