"""gptk's own format, as `LanguageModel.save` writes it; see `gptk.weights.saving`."""

from pathlib import Path

import gptk


class Gptk(gptk.WeightWriter):
    """gptk's own: gptk.json, model.safetensors and tokenizer.tiktoken."""

    name = "gptk"

    def write(self, path: Path, model: gptk.GPT, tokenizer: gptk.Tokenizer | None) -> None:
        gptk.LanguageModel(model, tokenizer).save(path)
