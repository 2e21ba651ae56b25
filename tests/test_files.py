"""Whether a place can be written, asked before any work and without leaving a trace."""

import errno
import os

import pytest

from sdzero_jax import files
from sdzero_jax.errors import UserError


def test_a_place_below_a_file_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x: cannot be written \(Not a directory\); give another folder"):
        files.check_writable(tmp_path / "file" / "x", "give another folder")


def test_a_place_that_can_be_made_is_left_unmade(tmp_path):
    files.check_writable(tmp_path / "some" / "new" / "folder", "")
    files.check_writable(tmp_path, "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("kept")
    files.check_writable(tmp_path / "file", "")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_is_no_wrong_place(tmp_path, monkeypatch):
    def full(dir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        files.check_writable(tmp_path / "x", "give another folder")


def test_a_folder_in_the_place_of_json_is_one_line(tmp_path):
    with pytest.raises(UserError, match="a folder; wanted a file"):
        files.read_json(tmp_path)
    (tmp_path / "file").write_text("{}")
    with pytest.raises(UserError, match="no such file"):
        files.read_json(tmp_path / "file" / "x.json")
