"""gptk's models in EleutherAI's lm-evaluation-harness.

    gptk lm-eval --model gptk --model_args pretrained=smollm2 --tasks hellaswag --limit 100

From versions of lm-eval on that have plug-ins, its own command knows the model, too:

    lm_eval --model gptk --model_args pretrained=smollm2,sampler=beam:4 --tasks gsm8k

Raises PluginError at import where lm-eval is not installed.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack, cast

import torch

import gptk

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise gptk.PluginError(
        f"gptk.adapters.lm_eval needs a package: pip install 'gptk-decoding[lm-eval]' ({error})"
    ) from None

__all__ = ["GptkLM"]

_log = logging.getLogger(__name__)

_OF_THE_TASK = ("max_new_tokens", "stop", "n", "ordinal")
_SWITCHED_OFF = {"top_k": (0, -1), "min_p": (0,), "typical_p": (0,), "repetition_penalty": (0,)}
"""Values with which other programs' settings do nothing, and that gptk refuses."""

Tokens = Sequence[int]


@register_model("gptk")
class GptkLM(TemplateLM):
    """A model of gptk's as lm-eval sees it: `--model gptk`.

    What is between commas in --model_args:

    pretrained: smollm2, a path, a hub id or a loader spec, as `gptk.load` takes it, or, in Python,
    a LanguageModel. tokenizer, device, dtype, quantize: as in `gptk.load`; where there is no CUDA,
    cuda:0, lm-eval's default, is auto.
    sampler, processors, draft and other settings of `gptk.LanguageModel.generate`: how texts are
    generated. Without a sampler the task's do_sample, temperature, top_p and so on decide; with
    one, or with processors that are meant for sampling, they do not.
    seed: by default lm-eval's third, `--seed`. Repeats of a request get different texts.
    max_gen_toks: new tokens, where the task does not say how many. max_length: a shorter window.
    add_bos_token: whether texts begin with BOS; by default as the tokenizer has it.
    prefix_token_id: the context of texts without one; by default BOS, else the end-of-text token.
    batch_size: ignored; gptk chooses what to read together.

    Raises what `gptk.load` and wrong settings raise.
    """

    def __init__(
        self,
        pretrained: str | gptk.LanguageModel | None = None,
        *,
        tokenizer: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str = "auto",
        max_gen_toks: int = 256,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        **settings: Unpack[gptk.Settings],
    ) -> None:
        super().__init__()
        for name in _OF_THE_TASK:
            if name in settings:
                raise gptk.OptionError(f"{name} cannot be set for the model: tasks say it")
        settings.setdefault("seed", torch.initial_seed())  # lm-eval has set it
        checked = gptk.check_settings(**settings)
        self._settings = settings
        self._processors = checked.processors
        self._chooses = settings.get("sampler") is not None or any(
            processor.for_sampling for processor in checked.processors
        )
        self._max_gen_toks, self._add_bos = max_gen_toks, add_bos_token
        if isinstance(pretrained, gptk.LanguageModel):
            self.lm = pretrained
        else:
            self.lm = gptk.load(
                pretrained,
                device=_device(device),
                dtype=dtype,
                quantize=cast(Any, quantize),
                tokenizer=tokenizer,
            )
        self._source = "a model" if isinstance(pretrained, gptk.LanguageModel) else pretrained
        window = self.lm.model.config.context_length
        if max_length is not None and not 1 <= max_length <= window:
            raise gptk.OptionError(f"max_length is {max_length}; it must be 1 to {window}")
        self._max_length = max_length or window
        self._prefix = prefix_token_id

    # --- What lm-eval asks of a model -----------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.lm.model.device

    @property
    def max_length(self) -> int:
        """The window, in tokens."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens, where a task does not say how many."""
        return self._max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises TokenizerError if there is none."""
        eos = self.lm.tokenizer.eos
        if not eos:
            raise gptk.TokenizerError("the model's tokenizer has no end-of-text token")
        return eos[0]

    @property
    def prefix_token_id(self) -> int:
        """The context of texts without one."""
        bos = self.lm.tokenizer.bos if self._prefix is None else self._prefix
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The token ids of a text. add_special_tokens: BOS; None: as the model has it."""
        tokenizer = self.lm.tokenizer
        add = self._add_bos if add_special_tokens is None else add_special_tokens
        if add is False:
            return tokenizer.encode_without_bos(string)
        ids = tokenizer.encode(string)
        if self._add_bos and tokenizer.bos is not None and ids[:1] != [tokenizer.bos]:
            return [tokenizer.bos, *ids]
        return ids

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests tells tokenizers apart by."""
        return f"gptk-{self._source or gptk.default_source()}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's chat template, which lm-eval writes into its results."""
        if isinstance(chat_template, str):
            raise gptk.OptionError(f"the model has no other chat template, {chat_template!r}")
        return self.lm.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation. add_generation_prompt: False: the last message goes on."""
        text = gptk.render_chat(
            self.lm.tokenizer, chat_history, add_generation_prompt=add_generation_prompt
        )
        if not add_generation_prompt:
            last = str(chat_history[-1]["content"]).strip()
            text = text[: text.rindex(last) + len(last)]
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What repeats the results, besides what lm-eval writes itself."""
        model = self.lm.to_dict()
        settings = {name: _written(value) for name, value in self._settings.items()}
        return {
            "model_dtype": model["dtype"],
            "gptk": {"version": gptk.__version__, "model": model, "settings": settings},
        }

    # --- Log-likelihoods ------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, Tokens, Tokens]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        pairs = (self._shortened(context, new) for _, context, new in requests)
        scores = self.lm.score_continuations(pairs)
        shown = _progress(scores, "loglikelihood", len(requests), disable_tqdm)
        results: list[tuple[float, bool]] = []
        for request, score in zip(requests, shown, strict=True):
            results.append((score.logprob, score.is_greedy))
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], results[-1])
        return results

    def _shortened(self, context: Tokens, new: Tokens) -> tuple[Tokens, Tokens]:
        """The end of a context that fits into the window with its continuation."""
        room = self.max_length + 1 - len(new)
        if room < 1:
            raise gptk.PromptError(
                f"a continuation has {len(new)} tokens; the model's window is {self.max_length}"
            )
        return context[-room:], new

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, in windows in which each token is predicted once."""
        windows: list[tuple[None, Tokens, Tokens]] = []
        owners: list[int] = []  # the request of each window
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (logprob, _) in zip(owners, scores, strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- Texts ----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to one of the task's stop strings.

        Raises the error of a request that fails.
        """
        texts = [""] * len(requests)
        responses = self.lm.generate_many(self._requests(requests), **self._settings)
        for response in _progress(responses, "generate_until", len(requests), disable_tqdm):
            if response.generation is None:
                assert response.error is not None
                raise response.error
            text = texts[response.index] = self._plain(response.generation)
            self.cache_hook.add_partial("generate_until", requests[response.index].args, text)
        return texts

    def _plain(self, generation: gptk.Generation) -> str:
        """The text without BOS, padding and other tokens with a name, as lm-eval's hf gives it.

        Other special tokens stay: <think> and <tool_call> belong to a reply.
        """
        tokenizer = self.lm.tokenizer
        ends = [token for token in (tokenizer.bos, *tokenizer.eos) if token is not None]
        named = {tokenizer.decode([token]) for token in ends}
        named |= {*(tokenizer.template_tokens or {}).values()}
        return "".join(part for part in generation.token_texts if part not in named)

    def _requests(self, requests: Sequence[Instance]) -> Iterator[gptk.Request]:
        seen: Counter[str] = Counter()
        for request in requests:
            context, asked = request.args
            settings = self._settings_of(asked)
            room = self.max_length - settings["max_new_tokens"]
            if room < 1:
                raise gptk.PromptError(
                    f"a task asks for {settings['max_new_tokens']} new tokens, and the model's "
                    f"window is {self.max_length}; set max_gen_toks in --gen_kwargs"
                )
            ids = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
            key = repr((context, asked))
            yield gptk.Request(ids, settings=settings, ordinal=seen[key])
            seen[key] += 1

    def _settings_of(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """gptk's settings for what a task asks for."""
        wanted = normalize_gen_kwargs(dict(asked), self.max_gen_toks)
        until, new_tokens = wanted.pop("until"), wanted.pop("max_gen_toks")
        settings = {"stop": [text for text in until if text], "max_new_tokens": new_tokens}
        own = {name: wanted.pop(name) for name in [*wanted] if name in _OWN_SETTINGS}
        samples = bool(wanted.pop("do_sample"))
        if self._chooses:
            if samples:
                _warn_once(
                    "the model's sampler and processors are used; the task's do_sample, "
                    "temperature and so on are not"
                )
            return settings | own
        return settings | self._chosen(wanted, samples) | own

    def _chosen(self, wanted: Mapping[str, Any], samples: bool) -> dict[str, Any]:
        """The sampler and processors that a task's settings stand for in gptk."""
        given = {
            name: value
            for name, value in wanted.items()
            if value not in _SWITCHED_OFF.get(name, ())
        }
        if not samples:
            given.pop("temperature", None)
        translation = gptk.translate_settings(given | ({"do_sample": True} if samples else {}))
        made = [
            gptk.plugins.create("processor", spec, gptk.LogitsProcessor)
            for spec in translation.processors.values()
        ]
        processors = [processor for processor in made if samples or not processor.for_sampling]
        return translation.settings | {
            "sampler": translation.sampler or "greedy",
            "processors": [*self._processors, *processors],
        }


_OWN_SETTINGS = frozenset(gptk.Settings.__annotations__) - {"stop", "max_new_tokens"}


def _device(name: str) -> str:
    """The device, unless it is CUDA and there is none: lm-eval asks for it everywhere."""
    return "auto" if name.startswith("cuda") and not torch.cuda.is_available() else name


def _progress(items: Iterable[Any], what: str, total: int, disable: bool) -> Iterable[Any]:
    bar: Iterable[Any] = tqdm(items, f"Running {what} requests", total, disable=disable)
    return bar


def _written(value: Any) -> Any:
    """A setting as JSON has it: plug-ins by their specs."""
    if isinstance(value, gptk.Plugin):
        return value.spec
    if isinstance(value, list | tuple):
        return [_written(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else repr(value)


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _log.warning(message)
