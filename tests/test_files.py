import os
import stat

import pytest

from rgfast.files import write_atomically, write_text


def test_writes_text(tmp_path):
    write_text(tmp_path / "a.txt", "ξ\n")
    assert (tmp_path / "a.txt").read_bytes() == "ξ\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_replaces_and_is_readable_by_others_as_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "a.txt", "old")
        write_text(tmp_path / "a.txt", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "old")

    def fail(path):
        path.write_text("half")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write_atomically(tmp_path / "a.txt", fail)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
