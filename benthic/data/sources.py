"""Reads documents from folders, text files, JSON lines and Parquet, and from the running Python's own library."""

import ast
import io
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from benthic.base.errors import InputError
from benthic.data.documents import Document, Skips
from benthic.tokenizer.encoder import whole_characters

MAX_BYTES = 64_000_000  # of one document
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
NOT_CODE_OR_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}

Reader = Callable[[Path, str, str, Skips], Iterator[Document]]


def read(paths: Iterable[Path | str], skips: Skips) -> Iterator[Document]:
    """Documents of files and folders, folders in sorted order; what cannot be used goes to `skips`.

    `.jsonl` lines give their key `text`, `.parquet` rows their column `text`, other files are one text each; `.gz` and
    `.zst` are unpacked. InputError for a path that does not exist, and at the end if no document was found.
    """
    roots: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"input {path} does not exist -> check the path")
        name = path.resolve().name
        if name in roots:
            raise InputError(f"inputs {roots[name]} and {path} have the same name -> rename one, or give their parent")
        roots[name] = path
    return _not_empty(roots, skips)


def standard_library(skips: Skips) -> Iterator[Document]:
    """Source code and documentation of the running Python, in sorted order: a corpus that every machine has.

    Tests and installed packages are left out; the language reference in pydoc_data is read as prose, topic by topic.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    for path in _files(folder, NOT_CODE_OR_PROSE):
        inside = path.relative_to(folder).as_posix()
        if inside == "pydoc_data/topics.py":
            yield from _topics(path, skips)
        elif path.suffix in (".py", ".txt", ".rst", ".md"):
            source = "python-code" if path.suffix == ".py" else "python-prose"
            yield from _guarded(_text, path, f"stdlib/{inside}", source, skips)


def _not_empty(roots: dict[str, Path], skips: Skips) -> Iterator[Document]:
    found = False
    for name, root in roots.items():
        for path in _files(root, set()) if root.is_dir() else [root]:
            inside = path.relative_to(root).as_posix()
            for document in _documents(path, name if inside == "." else f"{name}/{inside}", name, skips):
                found = True
                yield document
    if not found:
        given = ", ".join(map(str, roots.values())) or "nothing"
        raise InputError(f"no document in {given} ({skips.summary()}) -> give text, .jsonl or .parquet files")


def _files(folder: Path, left_out: set[str]) -> Iterator[Path]:
    """Regular files below `folder`, sorted by path; hidden names and links to folders are not followed."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in left_out and not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(root, name).is_file():
                yield Path(root, name)


def _documents(path: Path, id: str, source: str, skips: Skips) -> Iterator[Document]:
    plain = path.with_suffix("") if path.suffix in COMPRESSED else path
    reader = {".jsonl": _json_lines, ".parquet": _parquet}.get(plain.suffix, _text)
    yield from _guarded(reader, path, id, source, skips)


def _guarded(reader: Reader, path: Path, id: str, source: str, skips: Skips) -> Iterator[Document]:
    """`reader`'s documents, up to the place where the file cannot be read any further."""
    try:
        yield from reader(path, id, source, skips)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        skips.add(f"{id} ({error})", "unreadable")


def _text(path: Path, id: str, source: str, skips: Skips) -> Iterator[Document]:
    with _open(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        skips.add(id, "too large")
    elif b"\0" in data:
        skips.add(id, "binary")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            skips.add(id, "not UTF-8")
            return
        yield from _checked(Document(id, text, source), skips)


def _json_lines(path: Path, id: str, source: str, skips: Skips) -> Iterator[Document]:
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_BYTES + 1):
            number += 1
            where = f"{id}#{number}"
            if len(line) > MAX_BYTES:
                skips.add(where, "too large")
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_BYTES)
            elif line.strip():
                text = _json_text(line)
                if text is None:
                    skips.add(where, "broken json line")
                else:
                    yield from _checked(Document(where, text, source), skips)


def _json_text(line: bytes) -> str | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    text = value.get("text") if isinstance(value, dict) else None
    return whole_characters(text) if isinstance(text, str) else None


def _parquet(path: Path, id: str, source: str, skips: Skips) -> Iterator[Document]:
    from pyarrow import parquet  # slow to import, and few corpora need it

    with parquet.ParquetFile(path) as file:
        if "text" not in file.schema_arrow.names:
            skips.add(id, "no column 'text'")
            return
        row = 0
        for batch in file.iter_batches(columns=["text"], batch_size=1000):
            for value in batch.column(0).to_pylist():
                row += 1
                where = f"{id}#{row}"
                if not isinstance(value, str):
                    skips.add(where, "no text")
                elif len(value) > MAX_BYTES:
                    skips.add(where, "too large")
                else:
                    yield from _checked(Document(where, value, source), skips)


def _topics(path: Path, skips: Skips) -> Iterator[Document]:
    """The texts of `topics = {name: text}`, read without running the file."""
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "topics" for t in node.targets):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield from _checked(Document(f"stdlib/topics/{name}", topics[name], "python-prose"), skips)


def _checked(document: Document, skips: Skips) -> Iterator[Document]:
    if document.text.strip():
        yield document
    else:
        skips.add(document.id, "empty")


def _open(path: Path) -> IO[bytes]:
    if path.suffix not in COMPRESSED:
        return open(path, "rb")
    import pyarrow

    stream: Any = pyarrow.input_stream(str(path), compression=COMPRESSED[path.suffix])
    return io.BufferedReader(stream)
