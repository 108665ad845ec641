"""The built-in plug-ins of gptk. Like third-party ones, they use only what gptk makes public."""

import click

import gptk


@gptk.hookimpl
def gptk_samplers() -> list[type[gptk.Sampler]]:
    from gptk_plugins.samplers import (
        beam,
        beam_sample,
        best_of_n,
        contrastive,
        diverse_beam,
        dola,
        greedy,
        min_p,
        mirostat,
        multinomial,
        stochastic_beam,
        top_k,
        top_p,
        typical,
    )

    return [
        beam.Beam,
        beam_sample.BeamSample,
        best_of_n.BestOfN,
        contrastive.Contrastive,
        diverse_beam.DiverseBeam,
        dola.DoLa,
        greedy.Greedy,
        min_p.MinPSampler,
        mirostat.Mirostat,
        multinomial.Multinomial,
        stochastic_beam.StochasticBeam,
        top_k.TopKSampler,
        top_p.TopPSampler,
        typical.TypicalSampler,
    ]


@gptk.hookimpl
def gptk_logits_processors() -> list[type[gptk.LogitsProcessor]]:
    from gptk_plugins.constraints import choice, grammar, json_schema, regex
    from gptk_plugins.processors import (
        bad_words,
        cfg,
        dry,
        epsilon,
        eta,
        forced_tokens,
        frequency_penalty,
        length_decay,
        logit_bias,
        min_new_tokens,
        min_p,
        no_repeat_ngram,
        presence_penalty,
        repetition_penalty,
        sequence_bias,
        suppress_tokens,
        temperature,
        top_h,
        top_k,
        top_n_sigma,
        top_p,
        typical,
        watermark,
        xtc,
    )

    return [
        choice.Choice,
        grammar.Grammar,
        json_schema.JsonSchema,
        regex.Regex,
        bad_words.BadWords,
        cfg.CFG,
        dry.DRY,
        epsilon.Epsilon,
        eta.Eta,
        forced_tokens.ForcedTokens,
        frequency_penalty.FrequencyPenalty,
        length_decay.LengthDecay,
        logit_bias.LogitBias,
        min_new_tokens.MinNewTokens,
        min_p.MinP,
        no_repeat_ngram.NoRepeatNgram,
        presence_penalty.PresencePenalty,
        repetition_penalty.RepetitionPenalty,
        sequence_bias.SequenceBias,
        suppress_tokens.SuppressTokens,
        temperature.Temperature,
        top_h.TopH,
        top_k.TopK,
        top_n_sigma.TopNSigma,
        top_p.TopP,
        typical.Typical,
        watermark.Watermark,
        xtc.XTC,
    ]


@gptk.hookimpl
def gptk_drafters() -> list[type[gptk.Drafter]]:
    from gptk_plugins.drafters import lookup, model

    return [
        lookup.Lookup,
        model.ModelDrafter,
    ]


@gptk.hookimpl
def gptk_scorers() -> list[type[gptk.Scorer]]:
    from gptk_plugins.scorers import mean_logprob

    return [mean_logprob.MeanLogprob]


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
def gptk_decoding_observers() -> list[type[gptk.DecodingObserver]]:
    from gptk_plugins.observers import trace

    return [trace.Trace]


@gptk.hookimpl
def gptk_training_observers() -> list[type[gptk.TrainingObserver]]:
    from gptk_plugins.observers import tensorboard

    return [tensorboard.TensorBoard]


@gptk.hookimpl
def gptk_commands() -> list[click.Command]:
    from gptk_plugins.commands import detect_watermark

    return [detect_watermark.command]
