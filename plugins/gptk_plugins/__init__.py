"""The built-in plug-ins of gptk. They use only what gptk makes public, as anybody's would."""

import gptk


@gptk.hookimpl
def gptk_samplers() -> list[type[gptk.Sampler]]:
    from gptk_plugins.samplers import beam, greedy, multinomial, top_k, top_p

    return [
        beam.Beam,
        greedy.Greedy,
        multinomial.Multinomial,
        top_k.TopKSampler,
        top_p.TopPSampler,
    ]


@gptk.hookimpl
def gptk_logits_processors() -> list[type[gptk.LogitsProcessor]]:
    from gptk_plugins.processors import min_p, repetition_penalty, temperature, top_k, top_p

    return [
        min_p.MinP,
        repetition_penalty.RepetitionPenalty,
        temperature.Temperature,
        top_k.TopK,
        top_p.TopP,
    ]


@gptk.hookimpl
def gptk_weight_loaders() -> list[type[gptk.WeightLoader]]:
    from gptk_plugins.loaders import gguf, gptk_format, huggingface, llms_from_scratch, smollm2

    return [
        gguf.GGUF,
        gptk_format.Gptk,
        huggingface.HuggingFace,
        llms_from_scratch.LLMsFromScratch,
        smollm2.SmolLM2,
    ]


@gptk.hookimpl
def gptk_tokenizers() -> list[type[gptk.TokenizerLoader]]:
    from gptk_plugins.tokenizers import byte_level, gguf, gpt2, huggingface, tiktoken_names

    return [
        byte_level.Bytes,
        gguf.GGUFTokenizer,
        gpt2.GPT2,
        huggingface.HuggingFaceTokenizer,
        tiktoken_names.Tiktoken,
    ]
