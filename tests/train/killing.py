"""Children that save checkpoints and are killed: `python killing.py random|calls|control EMPTY_FOLDER COUNT SEED`.

Prints one JSON object per kill with what was found afterwards. One process with torch loaded forks them all: a fork
takes milliseconds, an import of torch seconds.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from disk import Os, content, save, small_model

from benthic.base import files
from benthic.train import checkpoint


def child(work: Callable[[], None]) -> int:
    """Fork, run `work` in the child, return its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def found(parent: Path) -> dict:
    """What the next process finds."""
    partial = len(list(parent.glob(f"{files.PARTIAL}*")))
    saved = checkpoint.newest(parent)
    return {
        "newest": saved.state["step"] if saved else 0,
        "content": sorted(content(saved)) if saved else [],
        "partial_before": partial,
        "left": sorted(p.name for p in parent.iterdir()),
    }


def at_random_moments(parent: Path, count: int, seed: int) -> None:
    """Kill after a random time; the next child goes on in the same folder."""
    rng, model, zygote, sealed = random.Random(seed), small_model(), os.getpid(), 0
    for _ in range(count):
        reader, writer = os.pipe()

        def work(writer: int = writer) -> None:
            saved = checkpoint.newest(parent)
            step = saved.state["step"] if saved else 0
            os.write(writer, b"ready\n")
            while os.getppid() == zygote:
                step += 1
                save(parent, step, model)
                os.write(writer, b"%d\n" % step)

        pid = child(work)
        os.read(reader, 6)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(writer)
        with os.fdopen(reader, "rb") as said:
            sealed = max([sealed, *(int(line) for line in said.read().split())])
        after = found(parent)
        print(json.dumps(after | {"sealed": sealed}))
        sealed = after["newest"]


def at_every_call(folder: Path, saver: Callable[[Path], None]) -> None:
    """Kill before the first call that touches the disk, then before the second, ... of a save that also prunes.

    Ends with the save that no kill reached, or with the first kill that left nothing.
    """
    model, two = small_model(), folder / "two"
    save(two, 1, model)
    save(two, 2, model)
    for at in range(1, 10_000):
        parent = folder / str(at)
        shutil.copytree(two, parent)

        def work(at: int = at, parent: Path = parent) -> None:
            files.os = Os(at, kill=True)  # type: ignore[assignment]
            saver(parent)

        _, status = os.waitpid(child(work), 0)
        after = found(parent) | {"killed": os.WIFSIGNALED(status)}
        print(json.dumps(after))
        shutil.rmtree(parent)
        if not after["killed"] or not after["newest"]:
            return


def careless(parent: Path) -> None:
    """A saver that makes room before the new checkpoint is whole."""
    for old in list(parent.iterdir()):
        files.remove_folder(old)
    save(parent, 3, small_model())


if __name__ == "__main__":
    torch.set_num_threads(1)
    verb, where, number, start = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if verb == "random":
        at_random_moments(where, number, start)
    else:
        at_every_call(where, careless if verb == "control" else lambda parent: save(parent, 3, small_model()))
