"""A file is the old one or the new one, never a part."""

import os

import pytest

from dla_train.durable import write_atomically


@pytest.mark.parametrize("contents", ["new, ü", b"\x00\xff"])
def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path, contents):
    path = tmp_path / "file"
    path.write_text("old")
    write_atomically(path, contents)
    assert path.read_bytes() == (contents if isinstance(contents, bytes) else contents.encode())
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_was_there_stays_where_writing_ends_early(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
