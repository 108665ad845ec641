"""The built-in logits processors, one per file; constraints are in `gptk_plugins.constraints`."""

from typing import TYPE_CHECKING

from gptk_plugins._homes import names_of

if TYPE_CHECKING:
    from gptk_plugins.processors.bad_words import BadWords as BadWords
    from gptk_plugins.processors.cfg import CFG as CFG
    from gptk_plugins.processors.dry import DRY as DRY
    from gptk_plugins.processors.epsilon import Epsilon as Epsilon
    from gptk_plugins.processors.eta import Eta as Eta
    from gptk_plugins.processors.forced_tokens import ForcedTokens as ForcedTokens
    from gptk_plugins.processors.frequency_penalty import FrequencyPenalty as FrequencyPenalty
    from gptk_plugins.processors.length_decay import LengthDecay as LengthDecay
    from gptk_plugins.processors.logit_bias import LogitBias as LogitBias
    from gptk_plugins.processors.min_new_tokens import MinNewTokens as MinNewTokens
    from gptk_plugins.processors.min_p import MinP as MinP
    from gptk_plugins.processors.no_repeat_ngram import NoRepeatNgram as NoRepeatNgram
    from gptk_plugins.processors.presence_penalty import PresencePenalty as PresencePenalty
    from gptk_plugins.processors.repetition_penalty import RepetitionPenalty as RepetitionPenalty
    from gptk_plugins.processors.sequence_bias import SequenceBias as SequenceBias
    from gptk_plugins.processors.suppress_tokens import SuppressTokens as SuppressTokens
    from gptk_plugins.processors.temperature import Temperature as Temperature
    from gptk_plugins.processors.top_h import TopH as TopH
    from gptk_plugins.processors.top_k import TopK as TopK
    from gptk_plugins.processors.top_n_sigma import TopNSigma as TopNSigma
    from gptk_plugins.processors.top_p import TopP as TopP
    from gptk_plugins.processors.typical import Typical as Typical
    from gptk_plugins.processors.watermark import Watermark as Watermark
    from gptk_plugins.processors.xtc import XTC as XTC

_HOMES = {
    "BadWords": "bad_words",
    "CFG": "cfg",
    "DRY": "dry",
    "Epsilon": "epsilon",
    "Eta": "eta",
    "ForcedTokens": "forced_tokens",
    "FrequencyPenalty": "frequency_penalty",
    "LengthDecay": "length_decay",
    "LogitBias": "logit_bias",
    "MinNewTokens": "min_new_tokens",
    "MinP": "min_p",
    "NoRepeatNgram": "no_repeat_ngram",
    "PresencePenalty": "presence_penalty",
    "RepetitionPenalty": "repetition_penalty",
    "SequenceBias": "sequence_bias",
    "SuppressTokens": "suppress_tokens",
    "Temperature": "temperature",
    "TopH": "top_h",
    "TopK": "top_k",
    "TopNSigma": "top_n_sigma",
    "TopP": "top_p",
    "Typical": "typical",
    "Watermark": "watermark",
    "XTC": "xtc",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # to a type checker a misspelt name is an error
    __getattr__ = names_of(__name__, _HOMES)
