"""What people type who know transformers, vLLM, llama.cpp or OpenAI's API: it works, or the answer
says the very words to type."""

import json

import pytest
import torch

import gptk
from gptk.cli import COMMANDS
from gptk.decoding.other_names import translate_settings
from gptk.testing import tiny_lm
from program import gptk as run_gptk

LM = tiny_lm()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    LM.save(folder)
    return str(folder)


def record(model, *words):
    """What `gptk generate … --json` says it did."""
    out = run_gptk("generate", "abc", "--model", model, "--json", "--seed", "1", *words)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


@pytest.mark.parametrize(
    ("given", "sampler", "processors"),
    [
        ({"num_beams": 2}, "beam:2", []),
        ({"num_beams": 2, "do_sample": True}, "beam-sample:2", []),
        ({"do_sample": True}, "multinomial", []),
        ({"do_sample": False, "repeat_penalty": 1.2}, None, ["repetition-penalty:1.2"]),
        ({"top_p": 0.9, "top_k": 40}, None, ["top-p:0.9", "top-k:40"]),
        ({"typical_p": 0.9}, None, ["typical:0.9"]),
        ({"no_repeat_ngram_size": 3}, None, ["no-repeat-ngram:3"]),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive:alpha=0.6", ["top-k:4"]),
        (
            {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.5},
            "diverse-beam:width=6,beam_groups=3,diversity=0.5",
            [],
        ),
        (
            {"xtc_probability": 0.5, "xtc_threshold": 0.1},
            None,
            ["xtc:probability=0.5,threshold=0.1"],
        ),
        ({"mirostat": 2, "mirostat_tau": 3}, "mirostat:version=2,tau=3", []),
        ({"guided_regex": "a=b, c"}, None, ['regex:"a=b, c"']),
    ],
    ids=str,
)
def test_settings_of_other_programs_are_samplers_and_processors(given, sampler, processors):
    translation = translate_settings(given, [])
    assert (translation.sampler, [*translation.processors.values()]) == (sampler, processors)
    for spec in processors:
        gptk.plugins.create("processor", spec, gptk.LogitsProcessor)
    if sampler:
        gptk.plugins.create("sampler", sampler, gptk.Sampler)


@pytest.mark.parametrize(
    ("words", "done"),
    [
        (["--num-beams", "2"], "beam"),
        (["--num-beams=2", "--do-sample"], "beam-sample"),
        (["--temperature", "0.7"], "multinomial"),
        (["--repetition-penalty", "1.2"], "greedy"),
        (["--max-tokens", "3"], "greedy"),
        (["--max-time", "100"], "greedy"),
        (["--logits-processor", "top-k:3"], "multinomial"),
        (["--max-tokens", "3", "--debug"], "greedy"),
    ],
)
def test_the_program_does_what_the_options_mean(words, done, model):
    said = record(model, *words)
    assert said["settings"]["sampler"].partition(":")[0] == done
    if "--max-tokens" in words:
        assert said["settings"]["max_new_tokens"] == 3


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--processor top-k:50 --top-p 0.9", "--processor top-k:50 --processor top-p:0.9"),
        ("--top-p 0.9 --processor top-k:50", "--processor top-p:0.9 --processor top-k:50"),
        (
            "--xtc-threshold 0.1 --processor top-k:5 --xtc-probability 0.5 --min-p=0.1",
            "--processor xtc:threshold=0.1,probability=0.5 --processor top-k:5 "
            "--processor min-p:0.1",
        ),
        (
            "--logits-processor top-k:9 --logits-processors top-p:0.9 --logits-processor top-k:5",
            "--processor top-k:9 --processor top-p:0.9 --processor top-k:5",
        ),
        ("--stop-strings x --stop y --stop-sequences z", "--stop x --stop y --stop z"),
    ],
)
def test_other_programs_options_keep_their_places(typed, meant, model):
    said, wanted = record(model, *typed.split()), record(model, *meant.split())
    assert said["settings"] == wanted["settings"]
    assert said["text"] == wanted["text"]


def test_compare_runs_samplers_in_the_order_typed(model):
    words = ["abc", "--model", model, "--max-tokens", "2", "--sampler", "greedy", "--num-beams"]
    out = run_gptk("compare", *words, "2", "--sampler", "multinomial", "--json")
    assert out.returncode == 0, out.stderr
    names = [found["spec"].partition(":")[0] for found in json.loads(out.stdout)["samplers"]]
    assert names == ["greedy", "beam", "multinomial"]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            ["--temperature", "0"],
            "temperature must be above 0; for the likeliest token",
        ),
        (["--top-p"], "--top-p needs a value"),
        (["--max-length", "9"], "no option --max-length: --max-new-tokens counts new tokens"),
        (["--sampler", "greedy", "--sampler", "beam"], "--sampler is given twice"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice: --seed 1 and --seed 2"),
        (["--sampler", "greedy", "--num-beams", "2"], "options that mean --sampler beam:2"),
        (
            ["--top-p", "0.9", "--top-p", "0.8"],
            "--top-p is given twice: --top-p 0.9 and --top-p 0.8",
        ),
        (
            ["--max-new-tokens", "5", "--max-tokens", "6"],
            "--max-new-tokens is given twice: --max-new-tokens 5 and --max-tokens 6",
        ),
        (
            ["--max-tokens=3", "--n-predict", "5"],
            "--max-new-tokens is given twice: --max-tokens=3 and --n-predict 5",
        ),
        (["--max-tokens"], "--max-tokens needs a value"),
        (["--max-tokens="], "--max-tokens needs a value"),
        (["--temp", "1", "--temperature", "2"], "another name of temperature"),
        (["--num-beams", "3", "--beam-size", "2"], "another name of width"),
        (["--sampler", "multinomial:0"], "take the sampler greedy"),
        (["--sampler", "beam:4,4"], "without the name"),
        (["--plugin", "no/such/file.py"], "no/such/file.py"),
    ],
)
def test_what_cannot_be_is_answered_with_the_words_to_type(words, answer, model):
    out = run_gptk("generate", "abc", "--model", model, *words)
    assert out.returncode in (1, 2)
    assert answer in out.stderr
    assert out.stderr.startswith("gptk: ")
    assert out.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [*sorted(COMMANDS.keys() - {"plugins"}), "plugins show"])
def test_every_command_takes_the_program_s_options(command):
    out = run_gptk(*command.split(), "--plugin", "no/such/file.py")
    assert out.returncode == 1
    assert out.stderr == "gptk: no/such/file.py: there is no such file\n"


def test_a_command_takes_only_what_it_has_options_for(model):
    words = ("compare", "abc", "--model", model, "--sampler", "greedy", "--max-tokens", "3")
    assert run_gptk(*words).returncode == 0
    out = run_gptk(*words, "--stop-strings", "x")
    assert out.returncode == 2
    assert "--stop-strings" in out.stderr


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"num_beams": 4}, "there is no setting num_beams; write sampler='beam:4'"),
        ({"do_sample": True, "temperature": 0.7}, "'multinomial', processors=['temperature:0.7']"),
        ({"num_return_sequences": 3}, "write n=3"),
        ({"stop_strings": ["x"]}, "write stop=['x']"),
        ({"max_tokens": 5}, "write max_new_tokens=5"),
        ({"top_p": 0.9}, "write processors=['top-p:0.9']"),
        ({"bad_words_ids": {b"x"}}, "write processors=['bad-words:…']"),
        ({"do_sample": False}, "there is no setting do_sample; leave do_sample out"),
        ({"top_p": None}, "there is no setting top_p; leave top_p out"),
        ({"max_time": None, "num_beams": None}, "; leave max_time and num_beams out"),
        ({"pad_token_id": None}, "; leave pad_token_id out"),
        ({"top_p": None, "top_k": 4}, "write processors=['top-k:4']"),
        ({"procesors": None}, "did you mean processors?"),
        ({"max_length": 5}, "max_new_tokens counts new tokens"),
        ({"max_tokens": 5, "n_predict": 6}, "n_predict is given twice"),
        ({"use_cache": [False, True]}, "use_cache is [False, True]; it must be True or False"),
        ({"use_cache": torch.ones(2)}, "it must be True or False"),
        ({"procesors": []}, "did you mean processors?"),
    ],
)
def test_python_answers_with_the_words_to_write(settings, answer):
    with pytest.raises(gptk.OptionError) as error:
        LM.generate("abc", **settings)
    assert answer in str(error.value)


def test_a_processor_that_is_meant_for_sampling_makes_a_run_sample():
    drawn = {
        LM.generate("abc", processors=["temperature:2"], seed=seed, max_new_tokens=8).text
        for seed in range(5)
    }
    assert len(drawn) > 1
    greedy = {
        LM.generate("abc", processors=["repetition-penalty:1.1"], seed=seed, max_new_tokens=8).text
        for seed in range(5)
    }
    assert len(greedy) == 1
