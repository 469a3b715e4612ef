"""Files that are whole or absent, and reads that no FIFO holds up."""

from __future__ import annotations

import os

import pytest

from shard_tools.core.files import atomic_path, open_regular, read_bounded, write_atomically


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, b"one")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_bytes(b"tw")
        raise RuntimeError
    assert path.read_bytes() == b"one" and [found.name for found in path.parent.iterdir()] == ["file"]


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bounded(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_bounded(tmp_path / "file", 4)
