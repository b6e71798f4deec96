"""Sums over processes, and nothing at all for one."""

import subprocess
import sys
from pathlib import Path

import torch

from benthic.base import dist

TWO = """
import os, sys, torch
from benthic.base import dist
import torch.distributed as td
rank = int(sys.argv[1])
os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
td.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
dist.init("cpu")
tensors = [torch.full((2, 3), rank + 1.0), torch.tensor(rank + 5), torch.tensor([1.5, 2.0])]
dist.sum_(tensors)
dist.barrier()
print(dist.rank(), dist.world_size(), [t.tolist() for t in tensors])
td.destroy_process_group()
"""


def test_one_process_needs_no_group_and_changes_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    dist.init("cpu")
    x = torch.tensor([1.0])
    dist.sum_([x])
    dist.barrier()
    assert (dist.rank(), dist.world_size(), x.item()) == (0, 1, 1.0)


def test_two_processes_both_hold_the_sum_of_every_dtype(tmp_path: Path):
    command = [sys.executable, "-c", TWO]
    ranks = [
        subprocess.Popen([*command, str(r), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True) for r in (0, 1)
    ]
    lines = [process.communicate(timeout=60)[0].strip() for process in ranks]
    total = [[[3.0] * 3] * 2, 11, [3.0, 4.0]]
    assert lines == [f"0 2 {total}", f"1 2 {total}"]
