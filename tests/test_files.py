import json
import os
import stat
import time

import numpy as np
import pytest

from rgfast.files import as_json, clear_leftovers, write_atomically, write_text


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


def test_leftovers_are_temporary_files_of_an_hour_ago_and_nothing_else(tmp_path):
    names = []
    write_atomically(tmp_path / "a.json", lambda path: (names.append(path.name), path.write_text("{}")))
    (temporary,) = names
    old = time.time() - 3700
    for name in (temporary, "a.tmp-1", ".hidden", "b.json"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))
    (tmp_path / f"{temporary}x").touch()
    clear_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["a.json", "b.json", "a.tmp-1", ".hidden", f"{temporary}x"]
    )
    clear_leftovers(tmp_path / "absent")


def test_an_error_of_the_system_names_the_file_that_was_to_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent to write it to") as missing:
        write_text(tmp_path / "absent" / "a.txt", "a")
    assert missing.value.filename == str(tmp_path / "absent" / "a.txt")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as inside:
        write_text(tmp_path / "file" / "a.txt", "a")
    assert inside.value.filename == str(tmp_path / "file" / "a.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as taken:
        write_text(tmp_path / "folder", "a")
    assert taken.value.filename == str(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_json_holds_what_arrays_hold_and_null_for_what_is_undefined():
    document = {
        "a": np.array([1.0, np.nan]),
        2: (np.int64(3), np.float32(0.5), np.bool_(True)),
        "b": [float("inf")],
    }
    assert json.loads(as_json(document), parse_constant=pytest.fail) == {
        "a": [1.0, None],
        "2": [3, 0.5, True],
        "b": [None],
    }
