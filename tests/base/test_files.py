"""Files are whole or absent, whatever call fails and wherever the power goes."""

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benthic.base import files
from benthic.base.errors import BenthicError, CheckpointError

OLD, NEW = b"old " * 100, b"new contents " * 100


# ---- a call that fails ------------------------------------------------------------------------------------------


class Failing:
    """`os`, except that call number `fail_at` to one of the functions that touch the disk raises `code`."""

    COUNTED = ("open", "write", "fsync", "close", "replace", "unlink", "rmdir")

    def __init__(self, fail_at: int, code: int = errno.ENOSPC, short: bool = False):
        self.calls, self.fail_at, self.code, self.short = 0, fail_at, code, short
        self.failed: str | None = None

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in self.COUNTED:
            return real

        def call(*arguments):
            self.calls += 1
            if self.calls == self.fail_at:
                self.failed = name
                if name == "close":
                    real(*arguments)
                if name == "write" and self.short:
                    return real(arguments[0], bytes(arguments[1])[:5])
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments)

        return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EROFS])
def test_every_failing_call_leaves_the_old_file_whole_and_names_the_path(tmp_path, monkeypatch, code):
    seen = []
    for i in itertools.count(1):
        path = tmp_path / f"{code}-{i}.json"
        path.write_bytes(OLD)
        failing = Failing(i, code)
        monkeypatch.setattr(files, "os", failing)
        if _succeeds(lambda path=path: files.write_atomic(path, NEW), path):
            assert failing.failed is None
            assert path.read_bytes() == NEW
            break
        renamed = "replace" in seen
        assert path.read_bytes() == (NEW if renamed else OLD)
        seen.append(failing.failed)
    assert seen == ["open", "write", "fsync", "close", "replace", "open", "fsync", "close"]


def _succeeds(write: Callable[[], None], path: Path) -> bool:
    """Whether `write` works; when it does not, the error must be ours and name the file or its folder."""
    try:
        write()
    except BenthicError as error:
        message = str(error)
        assert path.name in message or str(path.parent) in message, message
        assert "->" in message
        assert "\n" not in message
        return False
    return True


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    failing = Failing(2, short=True)
    monkeypatch.setattr(files, "os", failing)
    files.write_atomic(tmp_path / "a", NEW)
    assert failing.failed == "write"
    assert (tmp_path / "a").read_bytes() == NEW


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named():
    with pytest.raises(BenthicError, match=r"cannot write /dev/full: No space left"):
        files.write_file(Path("/dev/full"), [b"x"])


def test_every_failing_call_while_sealing_leaves_the_older_folder_and_no_broken_one(tmp_path, monkeypatch):
    for i in itertools.count(1):
        parent = tmp_path / str(i)
        parent.mkdir()
        _save(parent, 1)
        failing = Failing(i)
        monkeypatch.setattr(files, "os", failing)
        _succeeds(lambda parent=parent: _save(parent, 2), parent / "step-2")
        monkeypatch.setattr(files, "os", os)
        files.verify_folder(parent / "step-1")
        if (parent / "step-2").exists():
            files.verify_folder(parent / "step-2")
        files.remove_partial(parent)
        assert not list(parent.glob(f"{files.PARTIAL}*"))
        if failing.failed is None:
            break
    assert i > 15


# ---- a folder that was damaged ----------------------------------------------------------------------------------


def _contents(step: int) -> dict[str, bytes]:
    return {"model/weights": b"w%d" % step * 50, "trainer.json": b"t%d" % step * 20}


def _save(parent: Path, step: int, mkdir: Callable[[Path], None] = Path.mkdir) -> None:
    """A checkpoint in small: two files in two folders, sealed."""
    partial = parent / f"{files.PARTIAL}step-{step}"
    mkdir(partial)
    mkdir(partial / "model")
    digests = {name: files.write_file(partial / name, [data]) for name, data in _contents(step).items()}
    files.commit_folder(partial, parent / f"step-{step}", digests)


def test_any_flipped_byte_any_missing_or_shorter_file_is_found_and_named(tmp_path):
    _save(tmp_path, 1)
    folder = tmp_path / "step-1"
    for name in _contents(1):
        path = folder / name
        good = path.read_bytes()
        for i in range(len(good)):
            path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                files.verify_folder(folder)
        path.write_bytes(good[:-1])
        with pytest.raises(CheckpointError, match=path.name):
            files.verify_folder(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            files.verify_folder(folder)
        path.write_bytes(good)
    files.verify_folder(folder)


@pytest.mark.parametrize("manifest", [b"", b"{", b"[]", b'{"files": 3}', b'{"files": {"a": {}}}', b"\xff"])
def test_an_unreadable_manifest_is_a_checkpoint_error(tmp_path, manifest):
    (tmp_path / files.MANIFEST).write_bytes(manifest)
    with pytest.raises(CheckpointError, match=r"manifest\.json is unreadable"):
        files.verify_folder(tmp_path)


# ---- a power cut ------------------------------------------------------------------------------------------------
# Every call is recorded against a model of a disk: file contents and folder entries reach it only with an fsync of
# that file or folder; before it, any subset of the pending changes may be there, and a write may be cut in half.


class Recorder:
    """`os` that also writes down what each call changes, in terms of inodes and folder entries."""

    def __init__(self, root: Path, sync: bool = True):
        self.root, self.sync = root, sync
        self.ops: list[tuple] = []
        self.inodes = {root: 0}  # path -> inode, as the running system sees it
        self.open_files: dict[int, int] = {}
        self.next = itertools.count(1)

    def __getattr__(self, name: str):
        return getattr(os, name)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)
        self._enter("mkdir", path)

    def _enter(self, kind: str, path: Path) -> None:
        self.inodes[path] = next(self.next)
        self.ops.append((kind, self.inodes[path.parent], path.name, self.inodes[path]))

    def open(self, path, flags, mode=0o777):
        path = Path(path)
        if flags & os.O_CREAT and path not in self.inodes:
            self._enter("create", path)
        elif flags & os.O_TRUNC:
            self.ops.append(("truncate", self.inodes[path]))
        fd = os.open(path, flags, mode)
        self.open_files[fd] = self.inodes[path]
        return fd

    def write(self, fd, data):
        written = os.write(fd, data)
        self.ops.append(("write", self.open_files[fd], bytes(data[:written])))
        return written

    def fsync(self, fd):
        os.fsync(fd)
        if self.sync:
            self.ops.append(("fsync", self.open_files[fd]))

    def replace(self, old, new):
        os.replace(old, new)
        inode = self.inodes[old]
        moved = {p: n for p, n in self.inodes.items() if p == old or old in p.parents}
        for path in moved:
            del self.inodes[path]
        self.inodes |= {new / path.relative_to(old): n for path, n in moved.items()}
        self.ops.append(("rename", self.inodes[old.parent], old.name, new.name, inode))

    def unlink(self, path):
        os.unlink(path)
        self._leave(Path(path))

    def rmdir(self, path):
        os.rmdir(path)
        self._leave(Path(path))

    def _leave(self, path: Path) -> None:
        del self.inodes[path]
        self.ops.append(("remove", self.inodes[path.parent], path.name))


def _where(op: tuple) -> int:
    """Inode whose fsync makes the change durable: the file's own, or the folder that holds the entry."""
    return op[1]


def _states(ops: list[tuple]) -> Iterator[tuple[dict, dict]]:
    """Every state that a disk may legally be in when the power goes after the last of `ops`."""
    pending = []
    for i, op in enumerate(ops):
        if op[0] != "fsync" and ("fsync", _where(op)) not in ops[i + 1 :]:
            pending.append(i)
    assert len(pending) <= 12, "too many unsynced changes at once to try them all"
    for kept in itertools.product((True, False), repeat=len(pending)):
        lost = {i for i, keep in zip(pending, kept) if not keep}
        yield _replay([op for i, op in enumerate(ops) if i not in lost])
    for cut in (i for i in pending if ops[i][0] == "write"):
        yield _replay([(*op[:2], op[2][: len(op[2]) // 2]) if i == cut else op for i, op in enumerate(ops)])


def _replay(ops: list[tuple]) -> tuple[dict, dict]:
    """(entries: (folder, name) -> inode, contents: inode -> bytes, or None for a folder) after `ops`."""
    entries, contents = {}, {0: None}
    for op in ops:
        match op:
            case ("mkdir", folder, name, inode):
                entries[folder, name], contents[inode] = inode, None
            case ("create", folder, name, inode):
                entries[folder, name] = inode
                contents.setdefault(inode, b"")
            case ("truncate", inode):
                contents[inode] = b""
            case ("write", inode, data):
                contents[inode] = contents.get(inode, b"") + data
            case ("rename", folder, old, new, inode):
                entries.pop((folder, old), None)
                entries[folder, new] = inode
            case ("remove", folder, name):
                entries.pop((folder, name), None)
    return entries, contents


def _build(target: Path, entries: dict, contents: dict, folder: int = 0) -> None:
    target.mkdir()
    for (parent, name), inode in entries.items():
        if parent != folder:
            continue
        if any(op_parent == inode for op_parent, _ in entries) or contents.get(inode, b"") is None:
            _build(target / name, entries, contents, inode)
        else:
            (target / name).write_bytes(contents.get(inode, b""))


def _crashes(recorder: Recorder, tmp_path: Path) -> Iterator[Path]:
    """A folder for each distinct state after a power cut between any two calls."""
    seen = set()
    for k in range(len(recorder.ops) + 1):
        for entries, contents in _states(recorder.ops[:k]):
            key = (tuple(sorted(entries.items())), tuple(sorted((i, c) for i, c in contents.items() if c is not None)))
            if key not in seen:
                seen.add(key)
                _build(tmp_path / f"crash-{len(seen)}", entries, contents)
                yield tmp_path / f"crash-{len(seen)}"


def _record(tmp_path: Path, monkeypatch, action: Callable[[Path, Recorder], None], sync: bool = True) -> Recorder:
    root = tmp_path / "root"
    root.mkdir()
    recorder = Recorder(root, sync)
    monkeypatch.setattr(files, "os", recorder)
    action(root, recorder)
    monkeypatch.setattr(files, "os", os)
    return recorder


def _three_saves_and_a_prune(root: Path, recorder: Recorder) -> None:
    _save(root, 1, recorder.mkdir)
    _save(root, 2, recorder.mkdir)
    files.remove_folder(root / "step-1")
    _save(root, 3, recorder.mkdir)


def _damage(crash: Path, older: set[str]) -> str | None:
    """What is wrong with a folder of checkpoints after a crash; `older` collects the steps that were sealed before."""
    whole = set()
    for step in (1, 2, 3):
        folder = crash / f"step-{step}"
        try:
            files.verify_folder(folder)
        except CheckpointError:
            continue
        if any((folder / name).read_bytes() != data for name, data in _contents(step).items()):
            return f"{folder.name} verifies but is not what was saved"
        whole.add(folder.name)
    newest = max(whole, default="")
    if newest < max(older, default=""):
        return f"{max(older)} was sealed and is gone; newest is {newest or 'none'}"
    return None


def _first_damage(recorder: Recorder, tmp_path: Path) -> str | None:
    """The first wrong state over all crashes. A step counts as sealed once the sync after its rename has returned."""
    for k in range(len(recorder.ops) + 1):
        sealed = {
            op[3]
            for i, op in enumerate(recorder.ops[:k])
            if op[0] == "rename" and (not recorder.sync or ("fsync", 0) in recorder.ops[i + 1 : k])
        }
        for n, (entries, contents) in enumerate(_states(recorder.ops[:k])):
            crash = tmp_path / f"crash-{k}-{n}"
            _build(crash, entries, contents)
            if damage := _damage(crash, sealed):
                return damage
    return None


def test_after_any_power_cut_the_newest_sealed_checkpoint_verifies_and_none_is_wrong(tmp_path, monkeypatch):
    recorder = _record(tmp_path, monkeypatch, _three_saves_and_a_prune)
    assert len(recorder.ops) > 40
    assert _first_damage(recorder, tmp_path) is None


def test_the_power_cut_test_fails_for_a_writer_that_never_syncs(tmp_path, monkeypatch):
    recorder = _record(tmp_path, monkeypatch, lambda root, r: _save(root, 1, r.mkdir), sync=False)
    assert _first_damage(recorder, tmp_path) is not None


def test_after_any_power_cut_an_atomic_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    def twice(root: Path, recorder: Recorder) -> None:
        files.write_atomic(root / "a", OLD)
        files.write_atomic(root / "a", NEW)

    recorder = _record(tmp_path, monkeypatch, twice)
    assert {_read(crash / "a") for crash in _crashes(recorder, tmp_path)} == {None, OLD, NEW}


def test_the_atomic_file_test_fails_without_a_sync_before_the_rename(tmp_path, monkeypatch):
    recorder = _record(tmp_path, monkeypatch, lambda root, _: files.write_atomic(root / "a", NEW), sync=False)
    assert b"" in {_read(crash / "a") for crash in _crashes(recorder, tmp_path)}


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def test_removing_a_folder_that_has_lost_its_manifest_works(tmp_path):
    _save(tmp_path, 1)
    (tmp_path / "step-1" / files.MANIFEST).unlink()
    files.remove_folder(tmp_path / "step-1")
    assert not (tmp_path / "step-1").exists()


def test_json_refuses_numbers_that_json_has_not():
    with pytest.raises(ValueError):
        files.json_bytes({"loss": float("nan")})
