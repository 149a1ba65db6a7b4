"""Writing is atomic: whatever stops it, the old file or the new one is there, and nothing else."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import small

from fairseq_qn.artifact import container, replacing
from fairseq_qn.artifact.container import read, write
from fairseq_qn.errors import UnsupportedError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small, whole file."""
    path = tmp_path / "m.qn.safetensors"
    write(path, small(), {"old": True})
    return path


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "f", {}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_the_data_are_on_disk_before_the_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the whole file, then the move, then fsync of the directory."""
    calls: list[tuple[Any, ...]] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        calls.append(("fsync", stat.S_ISDIR(status.st_mode) or status.st_size))
        fsync(descriptor)

    def watched_replace(source: Any, target: Any) -> None:
        calls.append(("replace", Path(source).parent == Path(target).parent))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    size = write(path, small(), {})
    assert calls == [("fsync", size), ("replace", True), ("fsync", True)]


@pytest.mark.parametrize("where", ["fsync", "replace", "sha256", "open"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_an_exception_leaves_the_old_file_alone(
    where: str, error: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    owner = {"fsync": os, "replace": os, "sha256": container.hashlib, "open": replacing}[where]
    if where == "sha256":  # between the tensors: the header has been made, the file is half written
        real = hashlib.sha256
        monkeypatch.setattr(owner, where, lambda raw: fail() if type(raw) is not bytes else real(raw))
    else:
        monkeypatch.setattr(owner, where, fail, raising=False)
    with pytest.raises(type(error)) as caught:
        write(path, small(), {"new": True})
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    if isinstance(error, OSError):
        assert f"cannot write {path}: No space left on device; choose" in str(caught.value)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target, error in [
        (tmp_path / "none" / "f", FileNotFoundError),
        (tmp_path / "file" / "f", NotADirectoryError),
        (tmp_path, OSError),
        (Path("/dev/null"), OSError),
        (tmp_path / ("x" * 300), OSError),
    ]:
        with pytest.raises(error, match="cannot write") as caught:
            write(target, small(), {})
        assert "\n" not in str(caught.value) and str(target) in str(caught.value)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any directory")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match="cannot write .*f: Permission denied; choose"):
            write(tmp_path / "f", small(), {})
    finally:
        tmp_path.chmod(0o755)


def test_a_refusal_of_the_system_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, for those who run the tests as root."""

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/secret/temporary/name")

    monkeypatch.setattr(replacing, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match="cannot write .*f: Permission denied; choose") as caught:
        write(tmp_path / "f", small(), {})
    assert "temporary" not in str(caught.value)


def test_a_link_keeps_pointing(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "f")
    assert write(tmp_path / "link", small(), {}) == (tmp_path / "disk" / "f").stat().st_size
    assert (tmp_path / "link").is_symlink() and read(tmp_path / "link")[0].keys() == small().keys()


def test_a_relative_path_and_a_directory_that_cannot_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write("f", small(), {})
    assert read("f")[0].keys() == small().keys()


KILLER = """
    import os, signal, sys, torch
    from fairseq_qn.artifact import container, header, replacing
    torch.set_num_threads(1)
    target, ours, steps = sys.argv[1], {module.__file__ for module in (container, header, replacing)}, 0
    left = int(sys.argv[2])

    def trace(frame, event, arg):
        global left
        if frame.f_code.co_filename not in ours:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    while True:
        if not (child := os.fork()):
            sys.settrace(trace)
            container.write(target, {"a": torch.full((3000,), 2.0), "b": torch.zeros(2)}, {"new": True})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        tensors, manifest = container.read(target)  # whole, at each moment
        new = manifest.get("new", False)
        assert tensors["a"].tolist() == [2.0 if new else 1.0] * 3000, left
        print(int(killed), int(new), flush=True)
        if not killed:
            assert status == 0
            break
        if new:
            container.write(target, {"a": torch.ones(3000)}, {})
        left += 1
"""


def test_a_kill_at_any_line_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    """A child is killed before its first line of our code, its second, and so on, until one lives to the
    end.
    """
    path = tmp_path / "f"
    write(path, {"a": torch.ones(3000)}, {})
    script = [sys.executable, "-c", textwrap.dedent(KILLER), str(path), "0"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert rows[-1] == (0, 1) and all(killed for killed, _ in rows[:-1])
    assert (1, 0) in rows and (1, 1) in rows and len(rows) > 50  # some before the move and some after it
    assert [new for _, new in rows] == sorted(new for _, new in rows)  # one move, from old to new
    assert os.listdir(tmp_path) == ["f"]  # what the killed left behind was swept by the next


def left_behind(path: Path) -> Path:
    """What a writer to `path` leaves that is killed in the middle."""
    before = {*path.parent.iterdir()}
    child = os.fork()
    if not child:
        with replacing.replacing(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (temporary,) = {*path.parent.iterdir()} - before
    assert temporary.read_bytes() == b"half"
    return temporary


def test_the_next_write_to_a_path_sweeps_what_a_killed_one_left(path: Path) -> None:
    """Of that path only, and never what a live process still writes."""
    other = path.with_name("other")
    mine, others = left_behind(path), left_behind(other)
    with replacing.replacing(path) as file:
        file.write(b"slow")
        assert not mine.exists() and others.exists()
        size = write(path, small(), {"fast": True})
        assert path.stat().st_size == size and read(path)[1]["fast"]
    assert path.read_bytes() == b"slow" and others.exists()
    write(other, {}, {})
    assert sorted(os.listdir(path.parent)) == sorted([path.name, other.name])


def test_a_file_that_is_swept_before_it_is_locked_is_made_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, swept = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        if how == fcntl.LOCK_EX and not swept:
            swept.append(file.name)
            write(path, small(), {"sweeps": True})
            assert not os.path.exists(file.name)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write(path, small(), {"new": True})
    assert swept and read(path)[1]["new"] and os.listdir(path.parent) == [path.name]


def test_many_writers_of_one_path_all_stay_whole(path: Path) -> None:
    """Each in a thread, which locks apart as a process does."""
    failed: list[BaseException] = []

    def writer(value: float) -> None:
        try:
            for _ in range(30):
                write(path, {"a": torch.full((300,), value)}, {})
                assert len(set(read(path)[0]["a"].tolist())) == 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=writer, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and os.listdir(path.parent) == [path.name]


def test_the_longest_name_that_a_folder_takes(tmp_path: Path) -> None:
    write(tmp_path / ("x" * 255), small(), {})
    assert os.listdir(tmp_path) == ["x" * 255]


def test_a_file_is_not_written_over_what_it_is_made_from(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("mine")
    (tmp_path / "link").symlink_to("in")
    os.link(tmp_path / "in", tmp_path / "hard")
    for output in ("in", "link", "hard", "../" + tmp_path.name + "/in"):
        with pytest.raises(UnsupportedError, match="is the input .* itself"):
            replacing.refuse_same(tmp_path / output, None, tmp_path / "none", tmp_path / "in")
    replacing.refuse_same(tmp_path / "new", tmp_path / "in")
