"""Ray Data: each row's text is that of its prompt alone, whatever the workers and batches."""

import os
import random

import pytest

import gptk
from gptk.testing import tiny_lm

pyarrow = pytest.importorskip("pyarrow", reason="the extra ray is not installed")
ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.slow  # `make test-slow` installs the extra

from gptk.adapters.ray import generation_stage  # noqa: E402 - only where pyarrow is

SAMPLING = {"sampler": "multinomial", "processors": ["top-k:k=20"], "max_new_tokens": 6}
PROMPTS = ["Once", "upon", "a time", "Once", "there was", "Once", "a", "king"]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def run(stage, **columns):
    """The stage in this process, as rows."""
    return stage()(pyarrow.table(columns)).to_pylist()


def alone(lm, prompt, ordinal=0, **settings):
    return lm.generate(prompt, **{**SAMPLING, "seed": 5, **settings}, ordinal=ordinal)


def stage_for(**options):
    return generation_stage(tiny_lm, **{**SAMPLING, "seed": 5, **options})


# --- A batch ----------------------------------------------------------------------------------


def test_rows_have_what_their_prompts_give_alone(lm):
    rows = run(stage_for(), prompt=PROMPTS, id=[*range(8)])
    for number, (row, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
        expected = alone(lm, prompt)
        assert row == {
            "prompt": prompt,
            "id": number,
            "generated_text": expected.text,
            "generated_tokens": expected.tokens,
            "score": pytest.approx(expected.score, abs=1e-4),
            "finish_reason": expected.finish_reason,
            "seed": 5,
            "error": None,
        }


def test_ordinals_tell_equal_prompts_apart(lm):
    rows = run(stage_for(ordinal_column="n"), prompt=["Once"] * 3, n=[7, 0, 7])
    texts = [row["generated_text"] for row in rows]
    assert texts == [alone(lm, "Once", n).text for n in (7, 0, 7)]
    assert texts[0] != texts[1]
    (row,) = run(stage_for(ordinal=7), prompt=["Once"])
    assert row["generated_text"] == texts[0]


def test_a_row_that_fails_has_its_error(lm):
    prompts = [[1, 2], [1, 10**6], None, []]
    rows = run(stage_for(), prompt=pyarrow.array(prompts, pyarrow.list_(pyarrow.int64())))
    assert rows[0]["generated_text"] == alone(lm, [1, 2]).text
    assert rows[0]["error"] is None
    for row, error in zip(
        rows[1:], ["token 1000000 is not in", "a prompt is", "no tok"], strict=True
    ):
        assert error in row["error"]
        assert row["generated_text"] is row["generated_tokens"] is row["score"] is None


def test_rows_have_settings_of_their_own(lm):
    own = [{"sampler": "greedy"}, {"max_new_tokens": 2}, None, {"sampler": "no-such"}, {"seed": 9}]
    stage = stage_for(settings_column="own")
    rows = run(stage, prompt=["Once"] * 5, own=own)
    assert rows[0]["generated_text"] == lm.generate("Once", max_new_tokens=6).text
    assert rows[1]["generated_tokens"] == alone(lm, "Once").tokens[:2]
    assert rows[2]["generated_tokens"] == alone(lm, "Once").tokens
    assert "no-such" in rows[3]["error"]
    assert (rows[4]["seed"], rows[4]["generated_text"]) == (9, alone(lm, "Once", seed=9).text)


def test_conversations():
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    lm = tiny_lm()
    tokenizer = gptk.Tokenizer(lm.tokenizer.encoding, chat_template=template)
    stage = generation_stage(
        lambda: gptk.LanguageModel(lm.model, tokenizer), messages_column="chat", max_new_tokens=4
    )
    chats = [[{"role": "user", "content": "Hi", "name": None}], None]
    rows = run(stage, chat=chats)
    assert rows[0]["generated_text"] == lm.generate("user:Hi;", max_new_tokens=4).text
    assert "no messages" in rows[1]["error"]


def test_columns_may_be_chosen(lm):
    columns = {"error": "failed", "alternatives": "others", "ordinal": "number", "complete": "ok"}
    (row,) = run(stage_for(columns=columns, n=3), prompt=["Once"])
    others = [other.text for other in alone(lm, "Once", n=3).alternatives]
    assert row == {"prompt": "Once", "failed": None, "others": others, "number": 0, "ok": None}


def test_types_do_not_depend_on_the_rows():
    fields = ["text", "tokens", "token_logprobs", "prompt_tokens", "alternatives", "complete"]
    columns = {field: f"{field}!" for field in [*fields, "error"]}
    stage = stage_for(columns=columns)()
    good, failed = (pyarrow.table({"prompt": [prompt]}) for prompt in ([1], [10**6]))
    assert stage(good).schema == stage(failed).schema


# --- What cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "no-such"}, "no-such"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"top_p": 0.9}, "top-p:0.9"),
        ({"columns": {"text": "text"}}, "must have error"),
        ({"columns": {"error": "error", "texts": "text"}}, "no result 'texts'"),
        ({"columns": {"error": "a", "text": "a"}}, "same column"),
        ({"seed": 2**63}, "at most 2"),
    ],
)
def test_settings_are_checked_before_a_model_is_loaded(options, message):
    def load():
        raise AssertionError("a model is loaded")

    with pytest.raises(gptk.GptkError, match=message):
        generation_stage(load, **options)


def test_a_loaded_model_is_no_draft(lm):
    with pytest.raises(gptk.OptionError, match="name its source"):
        generation_stage("smollm2", draft=lm)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ({"text": ["a"]}, {}, "no column 'prompt'; it has text"),
        ({"prompt": ["a"]}, {"ordinal_column": "n"}, "no column 'n'"),
        ({"prompt": ["a"], "score": [1]}, {}, "a column 'score' already"),
    ],
)
def test_columns_that_are_missing_or_taken(batch, options, message):
    with pytest.raises(gptk.OptionError, match=message):
        run(stage_for(**options), **batch)


def test_other_batch_formats_are_refused():
    with pytest.raises(gptk.OptionError, match="batch_format"):
        stage_for()()({"prompt": ["a"]})


# --- Two workers ------------------------------------------------------------------------------


@pytest.fixture
def two_processors(monkeypatch):
    monkeypatch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().wait_for_min_actors_s = 120
    yield
    ray.shutdown()


@pytest.mark.usefixtures("two_processors")
def test_two_workers_give_what_a_prompt_gives_alone(lm, tmp_path):
    """In three orders and batch sizes; one prompt of 40 fails."""
    lm.save(tmp_path / "model")
    rows = [{"prompt": PROMPTS[n % 8], "row": n} for n in range(40)]
    rows[11]["prompt"] = "long " * 200
    Stage = generation_stage(  # noqa: N806
        str(tmp_path / "model"), ordinal_column="row", **SAMPLING, seed=5
    )

    class Shown(Stage):
        """Says which worker it is."""

        def __call__(self, batch):
            batch = super().__call__(batch)
            return batch.append_column("pid", pyarrow.array([os.getpid()] * batch.num_rows))

    expected = {
        row["row"]: alone(lm, row["prompt"], row["row"]).text for row in rows if row["row"] != 11
    }
    assert len({*expected.values()}) > 20
    workers = set()
    for order, batch_size in ((1, 3), (2, 7), (3, 20)):
        random.Random(order).shuffle(rows)
        dataset = ray.data.from_items(rows, override_num_blocks=4)
        results = dataset.map_batches(
            Shown,
            batch_format="pyarrow",
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=2),
        ).take_all()
        assert {r["row"]: r["generated_text"] for r in results if r["error"] is None} == expected
        assert [(r["row"], r["generated_text"]) for r in results if r["error"]] == [(11, None)]
        workers |= {r["pid"] for r in results}
    assert len(workers) >= 4
