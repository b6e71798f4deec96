"""One of two processes that train together: `python two_ranks.py RANK FOLDER`. Leaves what it found in FOLDER."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from training_example import Stream, copy, same, settings, tensors, trainer

from benthic.base.errors import Interrupted
from benthic.train.trainer import Trainer


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    bad = {3: float("inf")} if rank == 1 else {}
    stream = Stream(rank=rank, ranks=2, factors=bad)
    subject = trainer(folder / "checkpoints", settings(adam_epsilon=1e-3), cursor=stream)

    def keep(name: str, more: dict | None = None) -> None:
        save_file(copy(tensors(subject) | (more or {})), folder / f"{name}-{rank}.safetensors")

    metrics, load = subject.parallel.forward_backward(stream.batch(0))
    gradients = {f"grad.{n}": p.grad.clone() for n, p in subject.model.named_parameters() if p.grad is not None}
    subject.optimizer.zero_grad()
    for _ in range(3):
        subject.step(next(stream))
    facts = {"first": {n: v.item() for n, v in metrics.items()}, "load": load.tolist(), "tokens": subject.tokens}
    keep("after-3", gradients)
    keep("before-bad")
    subject.step(next(stream))
    keep("after-bad")
    subject.step(next(stream))
    keep("after-5")
    facts |= {"skipped": subject.skipped, "steps": subject.steps, "taken": stream.taken}
    facts["interrupted"] = interrupted(subject, rank)
    keep("interrupted")
    again = trainer(folder / "checkpoints", subject.config, cursor=Stream(rank=rank, ranks=2))
    facts["resumed"] = again.resume() and same(tensors(subject), tensors(again))
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


def interrupted(subject: Trainer, rank: int) -> dict:
    """Go on with `fit`; a signal reaches rank 1 only, in step 8."""
    take = subject.cursor.batch  # type: ignore[attr-defined]

    def signalled(i: int):
        if rank == 1 and i == 7:
            subject.stop.requested = signal.SIGINT
        return take(i)

    subject.cursor.batch = signalled  # type: ignore[attr-defined]
    try:
        subject.fit(subject.cursor)  # type: ignore[arg-type]
    except Interrupted as error:
        return {"step": subject.steps, "code": error.exit_code}
    return {}


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
