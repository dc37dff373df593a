import ast
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import rgfast
from rgfast import cli
from rgfast.commands import errors
from rgfast.files import (
    append_bytes,
    as_json,
    clear_leftovers,
    leftovers,
    write_bytes,
    write_folder_atomically,
    write_stream,
    write_text,
)
from rgfast.probing import checkpoint


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_text(tmp_path):
    write_text(tmp_path / "a.txt", "ξ\n")
    assert (tmp_path / "a.txt").read_bytes() == "ξ\n".encode()
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_gets_what_the_umask_leaves(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o666])
def test_an_existing_file_keeps_its_mode_and_is_private_at_no_time_public(mode, tmp_path):
    write_text(tmp_path / "a.txt", "old")
    (tmp_path / "a.txt").chmod(mode)
    seen = []

    def fill(file):
        seen.append(os.fstat(file.fileno()).st_mode & ~mode & 0o777)
        file.write(b"new")

    write_stream(tmp_path / "a.txt", fill)
    assert seen == [0]
    assert (tmp_path / "a.txt").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


def test_a_link_stays_a_link_and_the_file_behind_it_is_replaced(tmp_path):
    for name in ("links", "files"):
        (tmp_path / name).mkdir()
    (tmp_path / "files" / "a.txt").write_text("old")
    (tmp_path / "links" / "near").symlink_to("../files/a.txt")
    (tmp_path / "links" / "far").symlink_to(tmp_path / "links" / "near")
    (tmp_path / "links" / "new").symlink_to("../files/b.txt")
    places = []
    for name in ("far", "new"):
        write_stream(
            tmp_path / "links" / name,
            lambda file: (places.append(Path(file.name).parent), file.write(b"new")),
        )
        assert (tmp_path / "links" / name).is_symlink()
    assert places == [tmp_path / "files"] * 2  # a rename from another file system would fail
    assert [(tmp_path / "files" / name).read_text() for name in ("a.txt", "b.txt")] == ["new", "new"]
    assert (names(tmp_path / "files"), names(tmp_path / "links")) == (
        ["a.txt", "b.txt"],
        ["far", "near", "new"],
    )


def test_links_that_lead_nowhere_are_errors_that_name_them(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "lost").symlink_to("absent/a.txt")
    for name in ("circle", "lost"):
        with pytest.raises(OSError, match=name) as error:
            write_text(tmp_path / name, "a")
        assert error.value.filename == str(tmp_path / name)
    assert names(tmp_path) == ["circle", "lost"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    for error in (RuntimeError("disk"), KeyboardInterrupt()):

        def fail(file, error=error):
            file.write(b"half")
            raise error

        with pytest.raises(type(error)):
            write_stream(tmp_path / "a.txt", fail)
        assert (tmp_path / "a.txt").read_text() == "old"
        assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_what_only_fsync_finds_out_is_an_error_of_the_file(code, tmp_path, monkeypatch):
    """File systems over a network, and quotas, may refuse bytes long after they took them."""

    def fail(_):
        raise OSError(code, os.strerror(code))

    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"a\.txt") as error:
        write_text(tmp_path / "a.txt", "new")
    assert (error.value.errno, error.value.filename) == (code, str(tmp_path / "a.txt"))
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_the_file_and_then_the_folder_reach_the_disk(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def watch(opened):
        synced.append((stat.S_ISDIR(os.fstat(opened).st_mode), (tmp_path / "a.txt").exists()))
        sync(opened)

    monkeypatch.setattr(os, "fsync", watch)
    write_text(tmp_path / "a.txt", "new")
    assert synced == [(False, False), (True, True)]


def test_a_device_is_written_to_and_not_replaced():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("/dev/full is of Linux")
    with pytest.raises(OSError, match="/dev/full") as error:
        write_bytes(full, bytes(100_000))
    assert error.value.errno == errno.ENOSPC
    write_text("/dev/null", "a")
    assert stat.S_ISCHR(full.stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_pipe_is_written_to(tmp_path):
    if not Path("/dev/stdout").exists():
        pytest.skip("/dev/stdout is of Unix")
    code = "from rgfast.files import write_text; write_text('/dev/stdout', 'ξ')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == "ξ".encode()


def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path):
    name = "ξ" * 125 + ".nc"
    write_text(tmp_path / name, "a")
    assert names(tmp_path) == [name]


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    (tmp_path / "a.txt").chmod(0o444)
    # To root nothing is protected.
    monkeypatch.setattr(os, "access", lambda path, kind: Path(path).name != "a.txt")
    with pytest.raises(PermissionError, match=r"a\.txt"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@contextmanager
def no_file_above(size):
    """Writing beyond ``size`` bytes fails as on a full disk, halfway."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def result():
    stack = rgfast.ResidualStack(8, 3, mixing="none", generator=torch.Generator().manual_seed(0))
    return rgfast.probe(
        stack, torch.randn(64, 3, 8, generator=torch.Generator().manual_seed(1)), progress=False
    )


def draw(result, path):
    from rgfast.report.figures import plot_order_parameter, save_figure

    save_figure(plot_order_parameter(result), path)


WRITERS = {
    "a.nc": lambda result, path: result.save(path),
    "bare.nc": lambda result, path: result.save(path, moments=False),
    "a.html": lambda result, path: result.report(path),
    "b.html": lambda result, path: rgfast.report.write_report(result, path),
    "a.png": draw,
    "a.json": lambda result, path: write_text(path, as_json(list(range(5000)))),
    "state": lambda result, path: checkpoint.write(path, {}, {"a": np.zeros(9999), "b": np.ones(9)}),
    "model.safetensors": lambda result, path: rgfast.MaskedTokenModel(5, 4, width=32, depth=2).save(
        path.parent
    ),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_names_its_file_where_there_is_no_room_and_leaves_nothing(name, old, result, tmp_path):
    path, write = tmp_path / name, WRITERS[name]
    if old:
        path.write_text("old")
    with no_file_above(4000), pytest.raises(OSError, match="too large") as error:
        write(result, path)
    assert error.value.filename == str(path)
    assert names(tmp_path) == ([name] if old else [])
    assert not old or path.read_text() == "old"
    write(result, path)  # the result has lived through it
    assert path.stat().st_size > 4000


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_names_its_file_where_nothing_can_be_written(name, result, tmp_path):
    if name != "model.safetensors":
        with pytest.raises(FileNotFoundError, match="there is no folder") as error:
            WRITERS[name](result, tmp_path / "absent" / name)
        assert error.value.filename == str(tmp_path / "absent" / name)
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError) as error:
        WRITERS[name](result, tmp_path / name)
    assert error.value.filename == str(tmp_path / name)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_names_its_file_in_a_read_only_folder(name, result, tmp_path, monkeypatch):
    """To root nothing is read-only, so the system's answer is made up."""
    path, create = tmp_path / name, os.open

    def refuse(file, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
        return create(file, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="Read-only") as error:
        WRITERS[name](result, path)
    assert error.value.filename == str(path)
    assert names(tmp_path) == []


def test_a_full_disk_is_a_sentence_and_the_process_lives(result, tmp_path):
    if sys.platform != "linux" or os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs root")
    mounted = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", tmp_path]
    if subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root outside of a container")
    try:
        (tmp_path / "other").write_bytes(bytes(50_000))
        for name in ("a.nc", "bare.nc", "a.html"):
            with pytest.raises(OSError, match="No space left") as error:
                WRITERS[name](result, tmp_path / name)
            assert error.value.filename == str(tmp_path / name)
            assert names(tmp_path) == ["other"]
        (tmp_path / "other").unlink()
        result.save(tmp_path / "bare.nc", moments=False)
        assert rgfast.ProbeResult.load(tmp_path / "bare.nc").layers == result.layers
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_command_says_so_in_one_sentence(result, tmp_path, capsys):
    result.save(tmp_path / "a.nc")
    with no_file_above(4000):
        assert cli.main(["report", str(tmp_path / "a.nc")]) == errors.WRONG
    assert capsys.readouterr().err == f"rgfast: {tmp_path / 'a.html'}: File too large\n"
    assert names(tmp_path) == ["a.nc"]


def test_a_truncated_result_is_a_sentence_with_its_name(result, tmp_path):
    result.save(tmp_path / "a.nc")
    whole = (tmp_path / "a.nc").read_bytes()
    for part in (0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.nc").write_bytes(whole[:part])
        with pytest.raises(ValueError, match=r"a\.nc is truncated"):
            rgfast.ProbeResult.load(tmp_path / "a.nc")
        with pytest.raises(ValueError, match=r"a\.nc is truncated"):
            rgfast.flow.judge(tmp_path / "a.nc")
        with pytest.raises(ValueError, match=r"a\.nc is damaged"):
            rgfast.report.write_report(tmp_path / "a.nc")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_truncated_weights_are_a_sentence_with_their_name(name, tmp_path):
    rgfast.MaskedTokenModel(5, 4, width=8, depth=2).save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for part in (0, 4, len(whole) // 2, len(whole) - 3):
        (tmp_path / name).write_bytes(whole[:part])
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            rgfast.MaskedTokenModel.load(tmp_path)


def test_what_is_added_to_a_file_is_there_or_the_error_names_the_file(tmp_path):
    append_bytes(tmp_path / "a", b"one\n")
    append_bytes(tmp_path / "a", b"two\n")
    assert (tmp_path / "a").read_bytes() == b"one\ntwo\n"
    with pytest.raises(OSError, match="/nowhere/a"):
        append_bytes(tmp_path / "nowhere" / "a", b"")
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="/dev/full"):
            append_bytes("/dev/full", b"one")


def test_no_module_writes_a_file_by_itself():
    """Whatever is written goes through rgfast/files.py."""
    writers = {"to_netcdf", "write_text", "write_bytes", "save_file", "tofile", "mkstemp"}
    package, own = Path(rgfast.__file__).parent, {"files.py"}
    found = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or path.name in own:
                continue
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            words = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if (isinstance(called, ast.Attribute) and name in writers) or (
                name == "open" and any(set(word) & set("wxa") and len(word) < 4 for word in words)
            ):
                found.append(f"{path.name}:{node.lineno} {name}")
    assert found == []


def test_leftovers_are_temporary_files_of_an_hour_ago_and_nothing_else(tmp_path):
    names = []
    write_stream(tmp_path / "a.json", lambda file: (names.append(Path(file.name).name), file.write(b"{}")))
    (temporary,) = names
    old = time.time() - 3700
    for name in (temporary, "a.tmp-1", ".hidden", "b.json"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))
    (tmp_path / f"{temporary}x").touch()
    assert [path.name for path in leftovers(tmp_path / "a.json")] == [temporary, f"{temporary}x"]
    clear_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["a.json", "b.json", "a.tmp-1", ".hidden", f"{temporary}x"]
    )
    clear_leftovers(tmp_path / "absent")


def test_a_folder_is_complete_or_not_there(tmp_path):
    out = tmp_path / "new" / "out"
    write_folder_atomically(out, lambda folder: write_text(folder / "a.txt", "a"))
    assert (names(out), names(out.parent)) == (["a.txt"], ["out"])

    def fail(folder):
        write_text(folder / "b.txt", "b")
        with no_file_above(100):
            write_bytes(folder / "c.txt", bytes(4000))

    with pytest.raises(OSError, match="too large") as error:
        write_folder_atomically(tmp_path / "full", fail)
    assert error.value.filename == str(tmp_path / "full" / "c.txt")
    assert names(tmp_path) == ["new"]


def test_an_empty_folder_keeps_its_mode_and_a_link_to_one_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o750)
    (tmp_path / "link").symlink_to("there")
    write_folder_atomically(tmp_path / "link", lambda folder: write_text(folder / "a.txt", "a"))
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "there") == ["a.txt"]
    assert stat.S_IMODE((tmp_path / "there").stat().st_mode) == 0o750
    assert names(tmp_path) == ["link", "there"]


def test_folders_of_killed_writers_go_with_the_next(tmp_path):
    old = time.time() - 3700
    for name in (".out.tmp-abcd1234", ".other.tmp-abcd1234", ".out.tmp-young"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").touch()
        if "young" not in name:
            os.utime(tmp_path / name, (old, old))
    write_folder_atomically(tmp_path / "out", lambda folder: None)
    assert names(tmp_path) == [".other.tmp-abcd1234", ".out.tmp-young", "out"]


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
