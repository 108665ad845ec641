"""The LZ penalty as a plug-in of gptk."""

import gptk

GPTK_API = 1


@gptk.hookimpl
def gptk_logits_processors() -> list[type[gptk.LogitsProcessor]]:
    # Imported when gptk asks, so that `gptk --help` need not wait for numpy and torch.
    from gptk_lz_penalty.processor import LZPenalty

    return [LZPenalty]
