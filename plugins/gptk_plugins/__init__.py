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
    from gptk_plugins.loaders import (
        gguf,
        gptk_format,
        huggingface,
        llms_from_scratch,
        nanogpt,
        openai,
        smollm2,
    )

    return [
        gguf.GGUF,
        gptk_format.Gptk,
        huggingface.HuggingFace,
        llms_from_scratch.LLMsFromScratch,
        nanogpt.NanoGPT,
        openai.OpenAI,
        smollm2.SmolLM2,
    ]


@gptk.hookimpl
def gptk_weight_writers() -> list[type[gptk.WeightWriter]]:
    from gptk_plugins.writers import gptk_format, huggingface

    return [
        gptk_format.Gptk,
        huggingface.HuggingFace,
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


@gptk.hookimpl
def gptk_lr_schedulers() -> list[type[gptk.LRScheduler]]:
    from gptk_plugins.schedulers import (
        constant,
        cosine,
        inverse_sqrt,
        linear,
        one_cycle,
        polynomial,
        torch_schedulers,
        warmup_cosine,
        warmup_stable_decay,
    )

    return [
        constant.Constant,
        cosine.Cosine,
        inverse_sqrt.InverseSqrt,
        linear.Linear,
        one_cycle.OneCycle,
        polynomial.Polynomial,
        torch_schedulers.Torch,
        warmup_cosine.WarmupCosine,
        warmup_stable_decay.WarmupStableDecay,
    ]


@gptk.hookimpl
def gptk_regularizers() -> list[type[gptk.Regularizer]]:
    from gptk_plugins.regularizers import (
        confidence_penalty,
        dropout,
        ema,
        grad_clip,
        l1,
        label_smoothing,
        weight_decay,
        z_loss,
    )

    return [
        confidence_penalty.ConfidencePenalty,
        dropout.Dropout,
        ema.EMA,
        grad_clip.GradClip,
        l1.L1,
        label_smoothing.LabelSmoothing,
        weight_decay.WeightDecay,
        z_loss.ZLoss,
    ]


@gptk.hookimpl
def gptk_training_observers() -> list[type[gptk.TrainingObserver]]:
    from gptk_plugins.observers import tensorboard

    return [tensorboard.TensorBoard]
