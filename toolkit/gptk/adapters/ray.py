"""Generation in Ray Data: any number of prompts, on the processors and GPUs of one machine or many.

    import ray
    from gptk.adapters.ray import generation_stage

    stage = generation_stage("smollm2", sampler="top-p:p=0.9", seed=0)
    prompts = ray.data.read_json("prompts.jsonl", lines=True)
    results = prompts.map_batches(
        stage,
        batch_format="pyarrow",
        batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    results.write_parquet("results")

This module does not import ray, which calls the stage with pyarrow's tables.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Unpack

import gptk

__all__ = ["generation_stage"]

_COLUMNS = {
    "text": "generated_text",
    "tokens": "generated_tokens",
    "score": "score",
    "finish_reason": "finish_reason",
    "seed": "seed",
    "error": "error",
}
_TYPES = {
    "text": "string",
    "tokens": "list<int64>",
    "token_logprobs": "list<float64>",
    "score": "float64",
    "finish_reason": "string",
    "prompt_tokens": "list<int64>",
    "seed": "int64",
    "ordinal": "int64",
    "complete": "bool",
    "alternatives": "list<string>",
    "error": "string",
}
"""What a column may hold: fields of `gptk.Generation`, and the error; and the column's type."""


def generation_stage(
    model: str | Callable[[], gptk.LanguageModel],
    *,
    prompt_column: str = "prompt",
    messages_column: str | None = None,
    ordinal_column: str | None = None,
    settings_column: str | None = None,
    columns: Mapping[str, str] = _COLUMNS,
    **settings: Unpack[gptk.Settings],
) -> "type[GenerationStage]":
    """A class for `Dataset.map_batches`, which continues the prompts of a dataset.

    Give `map_batches` batch_format="pyarrow", and compute=ray.data.ActorPoolStrategy(size=N) for N
    workers. Each loads the model once, and computes with as many threads as num_cpus says, or on
    the GPUs of num_gpus. batch_size: prompts that a worker gets at a time.

    model: a source as `gptk.load` takes it, or a function that returns the LanguageModel, which is
    called in each worker: `lambda: gptk.load("smollm2", dtype="bfloat16")`.
    prompt_column: texts or lists of token ids. messages_column: conversations, instead of prompts.
    ordinal_column: numbers that tell equal prompts apart, such as a row number, see
    `gptk.Settings.ordinal`. Without it all rows have the setting's, and equal prompts equal texts.
    settings_column: structs of settings that differ from those of the call; null is not given.
    columns: the results to add, each with the name of its column: text, tokens, token_logprobs,
    score, finish_reason, prompt_tokens, seed, ordinal, complete, alternatives (their texts), and
    error, which cannot be left out. By default text and tokens as generated_text and
    generated_tokens, and score, finish_reason, seed and error under their own names.
    settings: those of `gptk.LanguageModel.generate`. The seed is chosen here if it is not given.

    A row's result does not depend on the others, on its batch or on its worker. A row that fails
    has its error in the column error, and null in the others.

    Raises OptionError for columns that cannot be, PluginError if pyarrow is missing, and what
    wrong settings raise.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise gptk.PluginError(
            "gptk.adapters.ray needs a package: pip install 'gptk-decoding[ray]'"
        ) from None
    _check_columns(columns)
    if isinstance(settings.get("draft"), gptk.LanguageModel):
        raise gptk.OptionError(
            "draft is a loaded model, which is not sent to workers; name its source"
        )
    settings["seed"] = _seed_that_fits(gptk.check_settings(**settings).seed)

    class Generate(GenerationStage):
        def __init__(self) -> None:
            self.lm = gptk.load(model) if isinstance(model, str) else model()
            self.settings = settings
            self.columns = columns
            self.prompt_column = prompt_column
            self.messages_column = messages_column
            self.ordinal_column = ordinal_column
            self.settings_column = settings_column

    return Generate


class GenerationStage:
    """What a worker of Ray Data runs; `generation_stage` makes a class of it for a model."""

    lm: gptk.LanguageModel
    settings: gptk.Settings
    columns: Mapping[str, str]
    prompt_column: str
    messages_column: str | None
    ordinal_column: str | None
    settings_column: str | None

    def __call__(self, batch: Any) -> Any:
        """The batch, a pyarrow Table, with the columns of results."""
        import pyarrow

        if not isinstance(batch, pyarrow.Table):
            raise gptk.OptionError('give map_batches batch_format="pyarrow"')
        self._check_names(batch.column_names)
        results = self._results(batch)
        for field, name in self.columns.items():
            values = [result.get(field) for result in results]
            batch = batch.append_column(name, pyarrow.array(values, _arrow_type(field)))
        return batch

    def _check_names(self, names: list[str]) -> None:
        """Raise OptionError for a column that is missing, or that is there already."""
        prompts = self.messages_column or self.prompt_column
        for name in (prompts, self.ordinal_column, self.settings_column):
            if name is not None and name not in names:
                raise gptk.OptionError(
                    f"the dataset has no column {name!r}; it has {', '.join(names)}"
                )
        for field, name in self.columns.items():
            if name in names:
                raise gptk.OptionError(
                    f"the dataset has a column {name!r} already; name the result in columns: "
                    f"{{{field!r}: …}}"
                )

    def _results(self, batch: Any) -> list[dict[str, Any]]:
        """For each row its results by field, or its error."""
        rows = batch.num_rows
        results: list[dict[str, Any]] = [{} for _ in range(rows)]
        numbers: list[int] = []  # the row of each request

        def requests() -> Iterator[gptk.Request]:
            for row in range(rows):
                try:
                    request = self._request(batch, row)
                except gptk.GptkError as error:
                    results[row] = {"error": str(error)}
                    continue
                numbers.append(row)
                yield request

        for response in self.lm.generate_many(requests(), **self.settings):
            results[numbers[response.index]] = _fields(response)
        return results

    def _request(self, batch: Any, row: int) -> gptk.Request:
        """A row's request. Raises PromptError or OptionError."""
        ordinal = self._value(batch, self.ordinal_column, row)
        own = _without_nulls(self._value(batch, self.settings_column, row))
        if "seed" in own:
            _seed_that_fits(own["seed"])
        number = self.settings.get("ordinal", 0) if ordinal is None else ordinal
        if self.messages_column is None:
            prompt = self._value(batch, self.prompt_column, row)
            return gptk.Request(prompt, settings=own, ordinal=number)
        messages = self._value(batch, self.messages_column, row)
        return gptk.Request(messages=messages or [], settings=own, ordinal=number)

    def _value(self, batch: Any, column: str | None, row: int) -> Any:
        return None if column is None else batch.column(column)[row].as_py()


def _fields(response: gptk.Response) -> dict[str, Any]:
    """A response's results by field."""
    generation = response.generation
    if generation is None:
        return {"error": str(response.error)}
    fields = {field: getattr(generation, field, None) for field in _TYPES}
    return fields | {"alternatives": [other.text for other in generation.alternatives]}


def _without_nulls(settings: Any) -> dict[str, Any]:
    """A struct without the fields that are null: all rows of a column have the same fields."""
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise gptk.OptionError(f"a row's settings are {settings!r:.60}; they must be a struct")
    return {name: value for name, value in settings.items() if value is not None}


def _check_columns(columns: Mapping[str, str]) -> None:
    for field in columns:
        if field not in _TYPES:
            raise gptk.OptionError(
                f"there is no result {field!r} for a column; there are {', '.join(_TYPES)}"
            )
    if "error" not in columns:
        raise gptk.OptionError("columns must have error, or rows that fail would not be noticed")
    if len({*columns.values()}) < len(columns):
        raise gptk.OptionError("two results have the same column")


def _seed_that_fits(seed: Any) -> Any:
    if isinstance(seed, int) and seed >= 2**63:
        raise gptk.OptionError(f"seed is {seed}; a column of integers holds at most 2^63 - 1")
    return seed


def _arrow_type(field: str) -> Any:
    import pyarrow

    name = _TYPES[field]
    if name.startswith("list<"):
        return pyarrow.list_(pyarrow.type_for_alias(name[5:-1]))
    return pyarrow.type_for_alias(name)
