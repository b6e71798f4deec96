"""What a run leaves behind for people to read: metrics.jsonl, TensorBoard files, run.json, and one line of progress.

Messages go through `logging.getLogger("benthic")`; no handler is installed here. Progress is shown when that logger
passes INFO, which the command line arranges unless `--quiet` is given. Only rank 0 writes.
"""

import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

from benthic.base.config import to_dict
from benthic.base.files import write_atomic, write_json

log = logging.getLogger("benthic")

Values = Mapping[str, float | list[float] | list[list[float]]]
PERIOD = 10.0  # seconds between progress lines where standard error is not a terminal
MB = 1_000_000
WORTH_SHOWING = 200 * MB  # less is read or written before anybody asks
VERSIONS = ("benthic", "torch", "numpy", "safetensors", "tokenizers", "tiktoken", "pyarrow")


class Run:
    """The log of one run in `folder`: rows of numbers by stage and step, and the facts needed to repeat them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writes = int(os.environ.get("RANK", "0")) == 0
        self._boards: dict[str, _Board] = {}  # by stage
        self._rows: TextIO | None = None
        if self.writes:
            folder.mkdir(parents=True, exist_ok=True)
            self._rows = self._reopen(lambda row: True)

    def header(self, config: Any, device: str = "cpu") -> None:
        """Write run.json: the resolved config (a dataclass), command line, git hash, versions, device, threads."""
        import torch

        if not self.writes:
            return
        on_gpu = device.startswith("cuda")
        facts = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "git": _git_hash(),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS},
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu ({platform.machine()})",
            "cuda": torch.version.cuda if on_gpu else None,
            "threads": torch.get_num_threads(),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "config": to_dict(config),
        }
        write_json(self.folder / "run.json", facts)

    def log(self, stage: str, step: int, values: Values) -> None:
        """Append one row. Lists (one number per layer or expert) go to metrics.jsonl only."""
        if self._rows is None:
            return
        row = {"stage": stage, "step": step, "time": round(time.time(), 3)}
        row |= {name: _finite(value) for name, value in values.items()}
        self._rows.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._rows.flush()
        if stage not in self._boards:
            self._boards[stage] = _Board(self.folder / "tensorboard" / stage)
        self._boards[stage].add(step, {name: v for name, v in values.items() if not isinstance(v, list)})

    def rewind(self, stage: str, step: int) -> None:
        """Drop the rows of `stage` after `step`: a resumed stage writes them again."""
        if self._rows is None:
            return
        self._rows.close()
        self._rows = self._reopen(lambda row: row["stage"] != stage or row["step"] <= step)
        if stage in self._boards:
            self._boards.pop(stage).close()
        if (self.folder / "tensorboard" / stage).exists():
            self._boards[stage] = _Board(self.folder / "tensorboard" / stage, first_step=step + 1)

    def _reopen(self, keep: Callable[[dict[str, Any]], bool]) -> TextIO:
        """Open metrics.jsonl for appending, without the rows not to keep and without a last line that a crash cut."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith(b"\n") and keep(json.loads(line))]
        if len(kept) < len(lines):
            write_atomic(path, b"".join(kept))
        return open(path, "a", encoding="utf-8")

    def progress(self, title: str, total: int) -> AbstractContextManager["Progress"]:
        """`progress` of this room, for the owner of a run."""
        return progress(title, total)

    def close(self) -> None:
        """Flush and close every file."""
        for board in self._boards.values():
            board.close()
        if self._rows is not None:
            self._rows.close()


@contextmanager
def progress(title: str, total: int) -> Iterator["Progress"]:
    """One line of progress on standard error: `with progress("pretrain", 100) as p: p.update(7, loss=2.1)`."""
    if int(os.environ.get("RANK", "0")) or not log.isEnabledFor(logging.INFO):
        yield _Silent()
    elif sys.stderr.isatty():
        with _bar(title, total) as bar:
            yield bar
    else:
        yield _Lines(title, total)


@contextmanager
def megabytes(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress through `total` bytes; what it yields is called with the bytes of each piece. Silent where it is little.

    `with megabytes("read", size) as add: add(len(piece))`.
    """
    if total < WORTH_SHOWING:
        yield lambda n: None
        return
    with progress(f"{title}, MB", total // MB) as line:
        done = shown = 0

        def add(n: int) -> None:
            nonlocal done, shown
            done += n
            if done // MB > shown:
                shown = done // MB
                line.update(shown)

        yield add


class Progress(Protocol):
    """What `progress` yields."""

    def update(self, done: int, **shown: float) -> None:
        """`done` of the total is finished; `shown` are a few numbers to print beside it (loss, tok_per_s)."""


class _Silent:
    def update(self, done: int, **shown: float) -> None:
        pass


class _Lines:
    """A plain line every PERIOD seconds and at the end, for log files."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.start = self.last = time.monotonic()
        self.first: int | None = None  # `done` at the first update: a resumed stage does not start at 0

    def update(self, done: int, **shown: float) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.start = done, now
        if now - self.last < PERIOD and done < self.total:
            return
        self.last = now
        rate = (done - self.first) / (now - self.start) if now > self.start else 0.0
        eta = f", {clock((self.total - done) / rate)} left" if rate and done < self.total else ""
        numbers = "".join(f", {name} {number(value)}" for name, value in shown.items())
        log.info("%s %s/%s%s%s", self.title, f"{done:,}", f"{self.total:,}", numbers, eta)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Progress]:
    """A live line for a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as live:
        task = live.add_task(title, total=total, numbers="")

        class Bar:
            def update(self, done: int, **shown: float) -> None:
                numbers = "  ".join(f"{name} {number(value)}" for name, value in shown.items())
                live.update(task, completed=done, numbers=numbers)

        yield Bar()


class _Board:
    """Scalars of one stage as TensorBoard events. A folder per stage, because a rewind discards whole folders."""

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder), flush_secs=10)
        if first_step is not None:  # TensorBoard then forgets what earlier files say about later steps
            mark = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=mark))

    def add(self, step: int, scalars: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def number(value: float) -> str:
    """A number for people: four significant digits, from a thousand on whole with separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _finite(value: float | list[float] | list[list[float]]) -> Any:
    """JSON has no NaN or infinity: they are written as the strings that `float` reads back."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value if math.isfinite(value) else str(float(value))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_hash() -> str | None:
    """Commit of the checkout that this package runs from (with "+changes"), or None outside of one."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    try:
        commit = _git(source, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(source, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
