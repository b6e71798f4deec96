"""Files that are either whole or absent: write beside, sync, rename, sync the folder.

Every system call that changes the disk goes through this module's `os`, so that a test can fail or record any of them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benthic.base.errors import BenthicError, CheckpointError

MANIFEST = "manifest.json"
PARTIAL = ".partial-"  # prefix of folders that are being written; leftovers are removed by `remove_partial`


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write and fsync a new file; returns the sha256 of its bytes. Not atomic by itself."""
    digest = hashlib.sha256()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for chunk in chunks:
                digest.update(chunk)
                view = memoryview(chunk).cast("B")
                while view:
                    view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise BenthicError(
            f"cannot write {path}: {error.strerror} ({_free(path)}) -> free disk space or choose another output folder"
        ) from error
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` with `data` so that a reader sees the old bytes or the new ones, never a mixture."""
    beside = path.with_name(f"{PARTIAL}{path.name}")
    write_file(beside, [data])
    _rename(beside, path)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of readable JSON."""
    write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """UTF-8 JSON, indented, one trailing newline. NaN and infinities are refused."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; one that exists is fine."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise BenthicError(f"cannot create {folder}: {error.strerror} -> choose another output folder") from error


def commit_folder(partial: Path, final: Path, digests: dict[str, str]) -> None:
    """Seal a folder written file by file: manifest with checksums, sync, then one rename makes it visible."""
    sizes = {name: (partial / name).stat().st_size for name in digests}
    manifest = {"files": {name: {"sha256": digests[name], "bytes": sizes[name]} for name in sorted(digests)}}
    write_file(partial / MANIFEST, [json_bytes(manifest)])
    for folder in sorted({(partial / name).parent for name in digests} | {partial}, reverse=True):
        _sync_folder(folder)
    _rename(partial, final)


def verify_folder(folder: Path) -> None:
    """Raise CheckpointError naming the first file that is missing, cut short or altered."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {name: (entry["sha256"], entry["bytes"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is unreadable ({error}) -> use another checkpoint") from error
    for name, (sha256, size) in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing -> use another checkpoint")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, not {size} -> use another checkpoint")
        if sha256_file(path) != sha256:
            raise CheckpointError(f"{path} does not match its checksum -> use another checkpoint")


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def remove_folder(folder: Path) -> None:
    """Delete a sealed folder, manifest first, so that a crash in between leaves something that cannot be mistaken."""
    try:
        if (folder / MANIFEST).exists():
            os.unlink(folder / MANIFEST)
            _sync_folder(folder)
        for root, folders, names in os.walk(folder, topdown=False):
            for name in names:
                os.unlink(Path(root, name))
            for name in folders:
                os.rmdir(Path(root, name))
        os.rmdir(folder)
    except OSError as error:
        raise BenthicError(f"cannot remove {folder}: {error.strerror} -> check its permissions") from error


def remove_partial(parent: Path) -> None:
    """Remove what an interrupted writer left behind in `parent`."""
    for path in parent.glob(f"{PARTIAL}*"):
        if path.is_dir():
            remove_folder(path)
        else:
            os.unlink(path)


def _rename(old: Path, new: Path) -> None:
    try:
        os.replace(old, new)
        _sync_folder(new.parent)
    except OSError as error:
        raise BenthicError(f"cannot rename {old} to {new}: {error.strerror} -> check the output folder") from error


def _sync_folder(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise BenthicError(f"cannot sync {folder}: {error.strerror} -> check the disk") from error


def _free(path: Path) -> str:
    return f"{shutil.disk_usage(path.parent).free / 1e6:,.0f} MB free" if path.parent.exists() else "folder is gone"
