"""Metrics and crash-safe files: what survives a crash, and means that merge exactly."""

import json
import math

import numpy as np
import pytest

from sdzero_jax import files, metrics
from sdzero_jax.errors import UserError


def tensorboard_steps(directory):
    """(tag, step) pairs and session starts, read with the protocol buffers and not through the writer."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found, starts = [], []
    for path in sorted(directory.glob("events*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")  # length, crc, event, crc
            event = Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            if event.session_log.status == SessionLog.START:
                starts.append(event.step)
    return found, starts


def test_merge_is_the_mean_over_all_tokens_not_the_mean_of_means():
    a = {"kl": (np.float32(6.0), np.float32(2)), "reward": (1.0, 4)}
    b = {"kl": (np.float32(1.0), np.float32(8)), "loss": (3.0, 2)}
    merged = metrics.finalise(metrics.merge(a, b))
    assert merged == {"kl": 0.7, "reward": 0.25, "loss": 1.5}
    assert all(type(value) is float for value in merged.values())
    assert a == {"kl": (np.float32(6.0), np.float32(2)), "reward": (1.0, 4)}
    assert metrics.finalise({"kl": (0.0, 0), "loss": (1.0, 2)}) == {"loss": 0.5}
    assert metrics.merge() == {}


def test_writer_lines_and_tensorboard(tmp_path):
    with metrics.MetricWriter(tmp_path, None) as writer:
        writer.write(1, {"loss": np.float32(0.5), "accuracy": np.array(1)})
        # Flushed per line: readable before the writer is closed.
        assert (tmp_path / "metrics.jsonl").read_text() == '{"accuracy": 1.0, "loss": 0.5, "step": 1}\n'
        writer.write(2, {"loss": float("nan")})
    writer.close()
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0] == {"accuracy": 1.0, "loss": 0.5, "step": 1}
    assert rows[1]["step"] == 2 and math.isnan(rows[1]["loss"])
    found, _ = tensorboard_steps(tmp_path / "tensorboard")
    assert [(tag, step) for tag, step, _ in found] == [("loss", 1), ("accuracy", 1), ("loss", 2)]
    assert [value for _, _, value in found[:2]] == [0.5, 1.0]


def test_resume_removes_later_rows_and_a_broken_line(tmp_path):
    with metrics.MetricWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as handle:
        handle.write('{"loss": 5.0, "st')
    assert [row["step"] for row in metrics.read_metrics(path)] == [1, 2, 3, 4]
    with metrics.MetricWriter(tmp_path, 2) as writer:
        writer.write(3, {"loss": 30.0})
    assert path.read_text() == ('{"loss": 1.0, "step": 1}\n{"loss": 2.0, "step": 2}\n{"loss": 30.0, "step": 3}\n')
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    _, starts = tensorboard_steps(tmp_path / "tensorboard")
    assert 3 in starts  # TensorBoard drops what an earlier file says from step 3 on
    metrics.MetricWriter(tmp_path, None).close()
    assert len(metrics.read_metrics(path)) == 3
    metrics.MetricWriter(tmp_path, 0).close()
    assert metrics.read_metrics(path) == []


def test_write_json_atomic_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "summary.json"
    files.write_json_atomic(path, {"b": 1, "a": 0.1})
    assert files.read_json(path) == {"a": 0.1, "b": 1}
    with pytest.raises(TypeError):
        files.write_json_atomic(path, {"a": object()})

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(OSError):
        files.write_json_atomic(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 0.1, "b": 1}
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: no such file"):
        files.read_json(tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"cut\.json: not valid JSON"):
        files.read_json(tmp_path / "cut.json")


def test_jsonl_round_trip_with_awkward_text(tmp_path):
    path = tmp_path / "a" / "rows.jsonl"
    records = [{"t": "line\nbreak \u2028 \ud800 é"}, {"t": ""}]
    files.append_jsonl(path, records[:1])
    files.append_jsonl(path, [])
    files.append_jsonl(path, records[1:])
    assert files.read_jsonl_repaired(path) == (records, False)
    assert files.read_jsonl_repaired(tmp_path / "absent.jsonl") == ([], False)


@pytest.mark.parametrize("cut", range(1, 24))
def test_every_cut_of_the_last_line_is_repaired(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    files.append_jsonl(path, [{"a": 1}, {"name": "two"}, {"text": "é three", "x": 2}])
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    assert last >= 24
    path.write_bytes(whole[:-cut])
    records, repaired = files.read_jsonl_repaired(path)
    assert repaired
    if cut == 1:  # only the newline was lost: the record is whole
        assert records[-1] == {"text": "é three", "x": 2} and path.read_bytes() == whole
    else:
        assert records == [{"a": 1}, {"name": "two"}] and path.read_bytes() == whole[:-last]
    files.append_jsonl(path, [{"z": 0}])
    assert files.read_jsonl_repaired(path) == ([*records, {"z": 0}], False)


@pytest.mark.parametrize("tail", [b"\x00\x00\x00\n", b"\xff\xfe", b"[1, 2]\n", b'{"a": 2\n\n  \n'])
def test_rubbish_at_the_end_is_dropped(tmp_path, tail):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    assert files.read_jsonl_repaired(path) == ([{"a": 1}], True)
    assert path.read_bytes() == b'{"a": 1}\n'


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n{"a": 3}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3: not a JSON object"):
        files.read_jsonl_repaired(path)
    assert path.read_text() == '{"a": 1}\n\n{"a": \n{"a": 3}\n'
