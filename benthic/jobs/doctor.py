"""`benthic doctor`: what this machine has, what is broken, and how to mend it."""

import ctypes
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benthic.base.errors import BenthicError
from benthic.base.files import write_atomic
from benthic.jobs.config import DoctorConfig

Status = Literal["ok", "note", "broken"]  # a note costs a feature, broken costs the run
PORT = 8000
NEEDED = "torch numpy safetensors tokenizers tiktoken rensa pyarrow tyro rich tensorboard matplotlib jinja2".split()
OPTIONAL = dict.fromkeys(
    ("fastapi", "pydantic", "uvicorn", "prometheus-client", "markdown-it-py", "pygments", "latex2mathml", "nh3"),
    "benthic[server]",
)
LANDLOCK_CREATE_RULESET, LANDLOCK_VERSION = 444, 1  # system call number (the same on x86-64 and arm64), flag


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def run(config: DoctorConfig) -> int:
    """Print every finding; returns 1 if anything is broken, else 0."""
    findings = [finding for check in CHECKS for finding in check()]
    if config.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            fix = f" -> {finding.fix}" if finding.fix else ""
            print(f"{finding.status:6}  {finding.name:{width}}  {finding.detail}{fix}")
    return int(any(finding.status == "broken" for finding in findings))


def versions() -> Iterator[Finding]:
    """Python and the libraries."""
    yield Finding(name="python", status="ok", detail=f"{platform.python_version()} on {platform.platform()}")
    for name in (*NEEDED, *OPTIONAL):
        try:
            yield Finding(name=name, status="ok", detail=importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if name in OPTIONAL:
                yield Finding(name=name, status="note", detail="absent", fix=f'pip install "{OPTIONAL[name]}" to serve')
            else:
                yield Finding(name=name, status="broken", detail="absent", fix="pip install benthic")


def devices() -> Iterator[Finding]:
    """What torch can compute on, proved by a small product."""
    try:
        import torch
    except ImportError as error:
        yield Finding(name="import torch", status="broken", detail=str(error), fix="reinstall torch")
        return
    yield Finding(name="cpu", status="ok", detail=f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    if not torch.cuda.is_available():
        yield Finding(name="cuda", status="note", detail="none", fix="the tiny recipe needs none")
    for i in range(torch.cuda.device_count()):
        name, total = torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory
        try:
            ones = torch.ones(16, 16, device=f"cuda:{i}")
            works = (ones @ ones).sum().item() == 16**3
        except RuntimeError as error:
            works, name = False, f"{name}: {' '.join(str(error).split())[:100]}"
        yield Finding(
            name=f"cuda:{i}",
            status="ok" if works else "broken",
            detail=f"{name}, {total / 2**30:.0f} GiB",
            fix="" if works else "reinstall torch for this driver, see nvidia-smi",
        )


def processes() -> Iterator[Finding]:
    """Two processes add a number over gloo, the transport of runs with several CPU processes."""
    with tempfile.TemporaryDirectory() as folder:
        program = "import sys; from benthic.jobs.doctor import loopback; loopback(int(sys.argv[1]), sys.argv[2])"
        command = [sys.executable, "-c", program]
        started = time.monotonic()
        home = Path(__file__).resolve().parents[2]  # where `import benthic` finds this package, installed or not
        ranks = [
            subprocess.Popen(
                [*command, str(rank), f"{folder}/store"], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for rank in (0, 1)
        ]
        try:
            outputs = [rank.communicate(timeout=60) for rank in ranks]
            problem = (
                b"" if all(out == b"3.0" for out, _ in outputs) else outputs[0][1] or outputs[1][1] or b"wrong sum"
            )
        except subprocess.TimeoutExpired:
            problem = b"no answer within 60 s"
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    if problem:
        last = problem.decode(errors="replace").strip().splitlines()[-1]
        fix = "let the hostname resolve to this machine (/etc/hosts), or set GLOO_SOCKET_IFNAME=lo"
        yield Finding(name="gloo", status="broken", detail=last[:200], fix=fix)
    else:
        yield Finding(name="gloo", status="ok", detail=f"all-reduce of 2 processes, {time.monotonic() - started:.1f} s")


def loopback(rank: int, store: str) -> None:
    """One of the two processes of `processes`; prints the sum 1 + 2."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    value = torch.tensor(rank + 1.0)
    dist.all_reduce(value)
    print(value.item(), end="")
    dist.destroy_process_group()


def space() -> Iterator[Finding]:
    """Memory, shared memory, and a folder that can be written."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield _room("memory", memory, 2**32, "the tiny recipe needs about 4 GB")
    if Path("/dev/shm").exists():
        yield _room("/dev/shm", shutil.disk_usage("/dev/shm").free, 2**26, "start the container with --shm-size=1g")
    here = Path.cwd()
    yield _room("disk", shutil.disk_usage(here).free, 2**30, f"free space in {here}, or choose another --output-dir")
    probe = here / ".benthic-doctor"
    try:
        write_atomic(probe, b"probe")
        probe.unlink()
        yield Finding(name="folder", status="ok", detail=f"{here} can be written")
    except BenthicError as error:
        yield Finding(
            name="folder", status="broken", detail=str(error).partition(" -> ")[0], fix="choose a folder of yours"
        )


def _room(name: str, size: int, enough: int, fix: str) -> Finding:
    short = size < enough
    return Finding(
        name=name, status="note" if short else "ok", detail=f"{size / 2**30:.1f} GiB", fix=fix if short else ""
    )


def sandbox() -> Iterator[Finding]:
    """What the kernel offers to shut in the code that a model writes."""
    path = shutil.which("bwrap")
    yield _feature("bwrap", path is not None, path or "", "install bubblewrap")
    namespaces = _runs(["unshare", "--user", "--map-root-user", "true"])
    fix = "allow them: sysctl kernel.unprivileged_userns_clone=1 (or the container's security options)"
    yield _feature("user namespaces", namespaces, "allowed", fix)
    abi = landlock_abi()
    yield _feature("landlock", abi > 0, f"ABI {abi}", "use Linux 5.13 or newer with Landlock enabled")


def _feature(name: str, there: bool, detail: str, fix: str) -> Finding:
    if there:
        return Finding(name=name, status="ok", detail=detail)
    return Finding(name=name, status="note", detail="absent: generated code cannot be shut in this way", fix=fix)


def _runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def landlock_abi() -> int:
    """Version of the kernel's Landlock interface; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_VERSION))


def network() -> Iterator[Finding]:
    """Whether the server's default port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
            yield Finding(name=f"port {PORT}", status="ok", detail="free")
        except OSError as error:
            fix = f"benthic serve --port {PORT + 1}"
            yield Finding(name=f"port {PORT}", status="note", detail=error.strerror or "in use", fix=fix)


def clock() -> Iterator[Finding]:
    """A clock that is far off spoils logs and certificates; one that runs backwards spoils timings."""
    now, source = time.time(), Path(__file__).stat().st_mtime
    if now < source - 86400:
        detail = f"{time.strftime('%Y-%m-%d')} is before this program was written"
        yield Finding(name="clock", status="broken", detail=detail, fix="set the clock, for example with NTP")
    else:
        yield Finding(name="clock", status="ok", detail=time.strftime("%Y-%m-%d %H:%M:%S %z"))


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    versions, devices, processes, space, sandbox, network, clock,
)  # fmt: skip
