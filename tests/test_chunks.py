"""Append-only files of sampling stages: a half-written chunk is dropped, whole ones are kept."""

import pytest

from sdzero_jax.chunks import ChunkLog


def test_chunks_come_back_in_order(tmp_path):
    log = ChunkLog(tmp_path / "a.jsonl")
    log.append([{"x": 1}, {"x": 2}], {"tokens": 5})
    log.append([], {"tokens": 0})
    again = ChunkLog(tmp_path / "a.jsonl")
    assert again.records == [{"x": 1}, {"x": 2}] and again.done == 2
    assert [closing["tokens"] for closing in again.closings] == [5, 0]


@pytest.mark.parametrize("cut", [2, 5, 12, 20, 30])
def test_a_cut_anywhere_in_the_last_chunk_keeps_the_first(tmp_path, cut, capsys):
    path = tmp_path / "a.jsonl"
    log = ChunkLog(path)
    log.append([{"x": 1}], {"tokens": 5})
    whole = path.read_bytes()
    log.append([{"x": 2}, {"x": 3}], {"tokens": 6})
    path.write_bytes(path.read_bytes()[:-cut])
    again = ChunkLog(path)
    assert again.records == [{"x": 1}] and again.done == 1
    assert path.read_bytes() == whole
    assert "half written" in capsys.readouterr().err
    again.append([{"x": 2}], {"tokens": 1})
    assert ChunkLog(path).done == 2


def test_a_missing_last_newline_loses_nothing(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    ChunkLog(path).append([{"x": 1}], {"tokens": 5})
    path.write_bytes(path.read_bytes()[:-1])
    again = ChunkLog(path)
    assert again.done == 1 and capsys.readouterr().err == ""
    again.append([{"x": 2}], {"tokens": 1})
    assert ChunkLog(path).records == [{"x": 1}, {"x": 2}]


def test_a_cut_in_the_very_first_chunk_leaves_an_empty_file(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    ChunkLog(path).append([{"x": 1}, {"x": 2}], {"tokens": 5})
    path.write_bytes(path.read_bytes()[:-3])
    again = ChunkLog(path)
    assert again.done == 0 and again.records == []
    assert "half written" in capsys.readouterr().err and path.read_bytes() == b""
    again.append([{"x": 1}], {"tokens": 1})
    assert ChunkLog(path).records == [{"x": 1}]
