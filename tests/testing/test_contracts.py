"""Every built-in plug-in keeps the promises of its kind, and so do the models."""

import dataclasses
import functools
import os
import tempfile
from pathlib import Path
from typing import ClassVar

import safetensors.torch
import tokenizers
import torch

import gptk
from gptk import testing
from gptk.plugins import KINDS, create, provided
from gptk.testing import tiny_gpt, tiny_lm
from toys import GPT2_LIKE, LLAMA_LIKE, PROCESSOR_OPTIONS, table_model

NEEDS_TEXT = {"choice", "grammar", "json-schema", "regex"}
# Options that some plug-ins need, or that show more than the defaults.
SAMPLERS = {
    "beam": "width=3",
    "best-of-n": "n=2",
    "contrastive": "k=3",
    "diverse-beam": "width=4,beam_groups=2,diversity=0.5",
    "stochastic-beam": "width=3",
    "top-k": "k=5",
}
SCHEDULERS = {"torch": 'scheduler=StepLR,options={"step_size": 20}'}


@functools.cache
def _tokenizer_file() -> Path:
    folder = Path(tempfile.mkdtemp())
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["the cat sat on the mat, and the dog"] * 9, vocab_size=300)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


class Spec:
    """Makes a plug-in by its spec."""

    def __init__(self, kind, name, options=""):
        self.kind, self.spec = kind, f"{name}:{options}" if options else name

    def __call__(self):
        base = KINDS[self.kind].base
        return create(self.kind, self.spec, base)


def cover(kind, contract, options, **more):
    """A test class for each built-in plug-in of a kind.

    options: by the plug-in's name. more: attributes of the class, each a dict by the plug-in's
    name.
    """
    for name in provided(kind):
        extra = {key: values[name] for key, values in more.items() if name in values}
        title = "".join(part.title() for part in name.replace("_", "-").split("-"))
        attributes = {"make": Spec(kind, name, options.get(name, "")), **extra}
        test = type(f"Test{title}{kind.title().replace('-', '')}", (contract,), attributes)
        globals()[test.__name__] = test


cover(
    "processor",
    testing.ProcessorContract,
    PROCESSOR_OPTIONS,
    needs_text=dict.fromkeys(NEEDS_TEXT, True),
)
cover(
    "sampler",
    testing.SamplerContract,
    SAMPLERS,
    scores_are_sums={"best-of-n": False, "stochastic-beam": False},
)
cover("scheduler", testing.SchedulerContract, SCHEDULERS)
cover("scorer", testing.ScorerContract, {})
cover("metric", testing.MetricContract, {})
cover(
    "regularizer",
    testing.RegularizerContract,
    {"l1": "strength=0.1", "z-loss": "strength=0.1"},
    off={
        "confidence-penalty": {"strength": 0},
        "dropout": {"p": 0},
        "grad-clip": {"max_norm": 1e9},
        "l1": {"strength": 0},
        "label-smoothing": {"strength": 0},
        "weight-decay": {"strength": 0},
        "z-loss": {"strength": 0},
    },
)


class TestLookupDrafter(testing.DrafterContract):
    make = Spec("drafter", "lookup", "ngram=1,tokens=3")


class TestModelDrafter(testing.DrafterContract):
    make = staticmethod(lambda: provided("drafter")["model"].item(source=tiny_lm(seed=1)))


class Edited(testing.LoaderContract):
    """A loader of safetensors files, which are edited to lack a tensor or have one too many."""

    names: ClassVar[dict[str, str]]
    """The file's names of the tensors that are removed."""

    def write_whole(self, folder: Path, model: gptk.GPT) -> Path:
        raise NotImplementedError

    def write(self, folder, config, state):
        known = {name: tensor for name, tensor in state.items() if name[:7] != "surplus"}
        model = tiny_gpt(config)
        model.load_state_dict(known, strict=False)
        path = self.write_whole(folder, model)
        tensors = safetensors.torch.load_file(path)
        for name in set(dict(model.named_parameters())) - set(known):
            del tensors[self.names[name]]
        tensors |= {name: tensor for name, tensor in state.items() if name not in known}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        return str(folder / "model")


class TestGptkLoader(Edited):
    make = provided("loader")["gptk"].item
    names: ClassVar = {
        name: name
        for name in (
            *("blocks.1.mlp.down.weight", "norm.weight"),
            *("embed.weight", "blocks.0.attn.qkv.weight"),
        )
    }

    def write_whole(self, folder, model):
        gptk.LanguageModel(model).save(folder / "model")
        return folder / "model/model.safetensors"


class TestHuggingFaceLoader(Edited):
    make = provided("loader")["huggingface"].item
    names: ClassVar = {
        "blocks.1.mlp.down.weight": "transformer.h.1.mlp.c_proj.weight",
        "norm.weight": "transformer.ln_f.weight",
        "embed.weight": "transformer.wte.weight",
        "blocks.0.attn.qkv.weight": "transformer.h.0.attn.c_attn.weight",
    }

    def write_whole(self, folder, model):
        (folder / "model").mkdir()
        writer = provided("writer")["huggingface"].item()
        writer.write(folder / "model", model, None)
        return folder / "model/model.safetensors"


class TestNanoGPTLoader(testing.LoaderContract):
    make = provided("loader")["nanogpt"].item
    config = dataclasses.replace(testing.LoaderContract.config, mlp="gelu")

    def write(self, folder, config, state):
        names = {
            "embed": "transformer.wte", "embed_positions": "transformer.wpe",
            "norm": "transformer.ln_f", "attn_norm": "ln_1", "mlp_norm": "ln_2",
            "attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj",
            "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
        }  # fmt: skip
        model = {}
        for name, tensor in state.items():
            module, _, parameter = name.rpartition(".")
            block, layer, part = "", "", module
            if name.startswith("blocks."):
                block, layer, part = module.split(".", 2)
                block = f"transformer.h.{layer}."
            model[f"{block}{names.get(part, part)}.{parameter}"] = tensor
        arguments = {
            "n_layer": config.n_layers, "n_head": config.n_heads, "n_embd": config.width,
            "block_size": config.context_length, "vocab_size": config.vocab_size, "bias": True,
        }  # fmt: skip
        # nanoGPT's checkpoints also have the number of steps.
        torch.save({"model": model, "model_args": arguments, "iter_num": 1}, folder / "ckpt.pt")
        return str(folder / "ckpt.pt")


class TestGptkWriter(testing.WriterContract):
    make = provided("writer")["gptk"].item
    with_text = True


class TestHuggingFaceWriter(testing.WriterContract):
    make = provided("writer")["huggingface"].item


class TestBytesTokenizer(testing.TokenizerContract):
    make = provided("tokenizer")["bytes"].item


class TestGPT2Tokenizer(testing.TokenizerContract):
    make = provided("tokenizer")["gpt2"].item


class TestSmolLM2Tokenizer(testing.PluginContract):
    make = provided("tokenizer")["smollm2"].item


class TestHuggingFaceTokenizer(testing.TokenizerContract):
    """With a file of 300 tokens that tokenizers trained."""

    def make(self):
        return provided("tokenizer")["huggingface"].item(path=str(_tokenizer_file()))


class TestTraceDecodingObserver(testing.DecodingObserverContract):
    def make(self):
        trace = provided("decoding-observer")["trace"].item
        return trace(path=str(Path(tempfile.gettempdir()) / f"gptk-steps-{os.getpid()}.jsonl"))


class TestTensorBoardTrainingObserver(testing.TrainingObserverContract):
    make = Spec("training-observer", "tensorboard")


# The formats below are tested with their files in test_weights.py, test_openai.py and
# test_tokenizers.py; here only the promises of every plug-in are.


class TestGGUFLoader(testing.PluginContract):
    make = Spec("loader", "gguf", "path=model.gguf")


class TestLLMsFromScratchLoader(testing.PluginContract):
    make = Spec("loader", "llms-from-scratch", "path=model.pth")


class TestOpenAILoader(testing.PluginContract):
    make = Spec("loader", "openai", "path=models/124M")


class TestSmolLM2Loader(testing.PluginContract):
    make = Spec("loader", "smollm2")


class TestTransformersLoader(testing.PluginContract):
    make = Spec("loader", "transformers", "path=models/granite-3")


class TestGGUFTokenizer(testing.PluginContract):
    make = Spec("tokenizer", "gguf", "path=model.gguf")


class TestTiktokenTokenizer(testing.PluginContract):
    make = Spec("tokenizer", "tiktoken", "encoding=cl100k_base")


def test_every_built_in_plugin_is_held_to_a_contract():
    held = set()
    for test in list(globals().values()):
        if (
            isinstance(test, type)
            and issubclass(test, testing.PluginContract)
            and "make" in vars(test)
        ):
            held.add((test().plugin().kind, test().plugin().name))
    assert held >= {(kind, name) for kind in KINDS if kind != "command" for name in provided(kind)}


def with_dropout(config):
    model = tiny_gpt(config)
    model.set_dropout(0.3)
    return model


class TestGPT2LikeModel(testing.ModelContract):
    make = staticmethod(lambda: with_dropout(GPT2_LIKE))


class TestLlamaLikeModel(testing.ModelContract):
    make = staticmethod(lambda: with_dropout(LLAMA_LIKE))


class TestTableModel(testing.ModelContract):
    make = staticmethod(table_model)


class TestTableModelOfTwoTokens(testing.ModelContract):
    make = staticmethod(lambda: table_model(2))
