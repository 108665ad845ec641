"""metrics.jsonl: what is written comes back, whatever happened to the last line."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gptk
from gptk.runs.metrics import MetricsFile, iterate_metrics, read_metrics, truncate_metrics

RECORDS = st.lists(
    st.fixed_dictionaries(
        {"kind": st.sampled_from(["step", "evaluation", "sample"]), "step": st.integers(0, 20)},
        optional={
            "loss": st.floats(allow_nan=False, allow_infinity=False),
            "text": st.text(),
        },
    ),
    max_size=12,
)


def write(path, records):
    file = MetricsFile(path)
    for record in records:
        file.record(record)
    file.close()


@given(RECORDS, st.integers(0, 20), st.binary(max_size=8).filter(lambda b: b"\n" not in b))
def test_a_cut_last_line_is_dropped_and_later_steps_are_truncated(
    tmp_path_factory, records, step, rest
):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write(path, records)
    assert read_metrics(path) == records
    with path.open("ab") as file:
        file.write(rest)
    assert read_metrics(path) == records
    truncate_metrics(path, step)
    assert read_metrics(path) == [record for record in records if record["step"] <= step]


def test_each_record_is_on_disk_at_once(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.record({"kind": "step", "step": 1, "loss": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "step", "step": 1, "loss": 0.5}]
    file.close()


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"kind": "step", "step": 1, "loss": math.nan, "grad_norm": math.inf}])
    assert json.loads(path.read_text()) == {
        "kind": "step",
        "step": 1,
        "loss": None,
        "grad_norm": None,
    }


def test_truncating_leaves_what_stays_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = (
        b'{"step":1,  "kind":"step", "loss": 1e-3}\n{"kind":"sample","step":2,"text":"\\u00e9"}\n'
    )
    path.write_bytes(kept + b'{"kind": "step", "step": 3}\n{"kind": "st')
    truncate_metrics(path, 2)
    assert path.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_truncating_a_damaged_file_leaves_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "step", "step": 1}\n{\n')
    with pytest.raises(gptk.SourceError, match="line 2 is damaged"):
        truncate_metrics(path, 1)
    assert path.read_bytes() == b'{"kind": "step", "step": 1}\n{\n'
    assert list(tmp_path.iterdir()) == [path]


def test_records_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "step", "step": 1}\n{"kind": "step", "step": 2}\n{\n')
    records = iterate_metrics(path)
    assert [next(records)["step"] for _ in range(2)] == [1, 2]
    with pytest.raises(gptk.SourceError, match="line 3 is damaged"):
        next(records)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"",
        b"[]",
        b"\xff",
        b'{"kind": "step"}',
        b'{"kind": "step", "step": "1"}',
        b'{"kind": "step", "step": null}',
        b'{"kind": ["step"], "step": 1}',
    ],
)
def test_a_damaged_line_is_named(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"kind": "step", "step": 1}])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(gptk.SourceError, match="line 2 is damaged"):
        read_metrics(path)


def test_a_missing_file_is_an_error_to_read_and_made_by_truncating(tmp_path):
    with pytest.raises(gptk.SourceError, match="there is no such file"):
        read_metrics(tmp_path / "metrics.jsonl")
    truncate_metrics(tmp_path / "metrics.jsonl", 0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
