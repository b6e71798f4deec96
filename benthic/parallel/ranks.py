"""The processes that share one model: sums on their devices, messages from rank 0, and one end for all of them.

Two groups: one for tensors (NCCL between GPUs, gloo between CPUs), one of gloo for messages, on which a process may
wait for days. A rank that fails says so in the store before it leaves. Each rank looks there twice a second and ends,
with the message, if its own work does not end by itself: nobody is left waiting for a process that is gone.

Between GPUs of one machine that read each other's memory, small sums go through a buffer that all of them see, each
GPU reading all parts in one order (two H200, 32 tokens of width 2048: 8.7 us, NCCL 12.1). No multicast is used.
"""

import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from benthic.base.config import from_dict, to_dict
from benthic.base.errors import BenthicError, InputError
from benthic.parallel.config import ParallelConfig

T = TypeVar("T")
log = logging.getLogger("benthic")
WORK = timedelta(minutes=10)  # most that ranks may lie apart within a step: kernels are compiled in the first ones
IDLE = timedelta(days=365)  # most that a rank waits for a message; a process that ends is noticed at once
PEER_BYTES = 1 << 22  # most that a GPU reads from the others in one sum; where more is read, NCCL is faster
FAILED = "failed"  # key of the first failure in the store
LOOK_S, GRACE_S = 0.5, 10.0  # between two looks at the store; for the main thread to end by itself
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the same; torch 2.13 renamed it
FIRST = 4096  # bytes of a message that travel with its length


@dataclass(frozen=True)
class Launched:
    """What torchrun says in the environment."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def launched() -> Launched:
    """This process among those that torchrun started; without it, one process alone."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return Launched(*(int(os.environ.get(name, default)) for name, default in names.items()))


def shared_by(config: ParallelConfig) -> int:
    """How many processes share the model. InputError where torchrun has started another number of them."""
    there = launched().size
    asked = config.tensor_parallel_size or there
    if asked not in (1, there):
        raise InputError(
            f"tensor_parallel_size={asked} with {there} process{'es' * (there > 1)} -> start as many: "
            f"torchrun --nproc-per-node {asked} -m benthic ..."
        )
    return asked


def follows(config: ParallelConfig) -> bool:
    """Whether this process shares the model and leaves the talking to rank 0."""
    return shared_by(config) > 1 and launched().rank > 0


class Alone:
    """One process that holds the whole model: nothing to add up, nobody to tell."""

    rank, size, nodes = 0, 1, 1

    def sum(self, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def agree(self, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def least(self, number: int) -> int:
        """As it is."""
        return number

    def same(self, config: T) -> T:
        """As it is."""
        return config


class Ranks:
    """`size` processes, of which this is number `rank`. Whatever computes is called by all of them in one order."""

    def __init__(self, store: Store, rank: int, size: int, *, local_size: int, device: torch.device):
        self.rank, self.size, self.nodes = rank, size, -(-size // local_size)
        self._store = store
        backend, where = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(
            backend, store=PrefixStore("work", store), rank=rank, world_size=size, timeout=WORK, device_id=where
        )
        self._messages: Any = dist.new_group(backend="gloo", timeout=IDLE)
        self.shared: Tensor | None = None
        if device.type == "cuda" and self.nodes == 1 and size in (2, 4, 8) and _see_each_other(size):
            self.shared = symmetric.empty(PEER_BYTES // 2 // (size - 1), dtype=torch.bfloat16, device=device)
            symmetric.rendezvous(self.shared, _everyone())  # type: ignore[arg-type]
        self.failure = ""  # what ended the work of all ranks
        self._done = threading.Event()
        threading.Thread(target=self._watch, name="benthic-ranks", daemon=True).start()

    @classmethod
    def join(cls, device: str) -> "Ranks":
        """Meet the processes that torchrun has started. `device` is "cpu", or "cuda" for the GPU of the local rank."""
        me = launched()
        where = torch.device("cpu")
        if device.startswith("cuda"):
            there = torch.cuda.device_count()
            if me.local_size > there:
                raise InputError(f"{me.local_size} processes on this machine, which has {there} GPUs -> start {there}")
            where = torch.device("cuda", me.local_rank)
            torch.cuda.set_device(where)
        if me.local_size == me.size and any(name == "lo" for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on one machine, whose name need not be known
        store, _, _ = next(iter(rendezvous("env://", timeout=WORK)))
        return cls(store, me.rank, me.size, local_size=me.local_size, device=where)

    # Tensors

    def sum(self, x: Tensor) -> Tensor:
        """x, added up over all ranks: the same bits on each. x itself may be overwritten."""
        n = x.numel()
        if self.shared is None or x.dtype != self.shared.dtype or n > len(self.shared) or n % 8:
            dist.all_reduce(x)
            return x
        part = self.shared[:n]  # not the op that copies by itself: it lets others read before all is written
        part.copy_(x.view(-1))
        return torch.ops.symm_mem.one_shot_all_reduce(part, "sum", _everyone()).view_as(x)

    def gather(self, x: Tensor) -> Tensor:
        """x [..., w] of each rank, side by side [..., size w]."""
        parts = x.new_empty(self.size * x.numel())
        ALL_GATHER(parts, x.flatten())
        return parts.view(self.size, *x.shape).movedim(0, -2).flatten(-2)

    def agree(self, x: Tensor) -> Tensor:
        """Rank 0's x."""
        x = x.contiguous()
        dist.broadcast(x, 0)
        return x

    def exchange(self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> None:
        """Send each tensor to a rank and fill each other one from a rank; both lists in one order on all ranks."""
        ops = [dist.P2POp(dist.isend, _bytes(tensor), rank) for tensor, rank in sends]
        ops += [dist.P2POp(dist.irecv, _bytes(tensor), rank) for tensor, rank in receives]
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()

    # Numbers and messages

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self._messages)
        return int(found)

    def same(self, config: T) -> T:
        """Rank 0's config, a frozen dataclass."""
        if self.rank == 0:
            self.tell(to_dict(config))
            return config
        return from_dict(type(config), self.hear())

    def tell(self, message: dict[str, Any]) -> None:
        """From rank 0 to all others."""
        data = json.dumps(message, separators=(",", ":")).encode()
        first = torch.zeros(8 + FIRST, dtype=torch.uint8)
        text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        first[:8] = torch.tensor([len(data)]).view(torch.uint8)
        first[8 : 8 + len(data)] = text[:FIRST]
        dist.broadcast(first, 0, group=self._messages)
        if len(data) > FIRST:
            dist.broadcast(text[FIRST:], 0, group=self._messages)

    def hear(self) -> dict[str, Any]:
        """What rank 0 tells next."""
        first = torch.zeros(8 + FIRST, dtype=torch.uint8)
        dist.broadcast(first, 0, group=self._messages)
        length = int(first[:8].view(torch.int64))
        data = first[8 : 8 + min(length, FIRST)]
        if length > FIRST:
            rest = torch.empty(length - FIRST, dtype=torch.uint8)
            dist.broadcast(rest, 0, group=self._messages)
            data = torch.cat((data, rest))
        return json.loads(data.numpy().tobytes())

    # The end

    def leave(self) -> None:
        """The work is done, on every rank."""
        self._done.set()
        if not self.failure:
            dist.destroy_process_group()

    def guarded(self, work: Callable[[], T]) -> T:
        """`work`; an error in it ends the work of all ranks. What is raised names the rank that failed first."""
        if self.failure:
            raise BenthicError(self.failure)
        try:
            return work()
        except BaseException as error:
            self._done.set()
            if found := self._found():  # ours is what comes of another's
                self.failure = found
                raise BenthicError(found) from error
            text = " ".join(str(error).split())
            self.failure = f"rank {self.rank} of {self.size} failed ({type(error).__name__}: {text}) -> start all again"
            self._store.set(FAILED, self.failure)
            raise

    def _found(self) -> str:
        """The failure that another rank has reported; "" without one."""
        try:
            return self._store.get(FAILED).decode() if self._store.check([FAILED]) else ""
        except RuntimeError:  # what torch raises when nobody answers
            return "rank 0, which holds the store, has gone -> see its last message, and start all again"

    def _watch(self) -> None:
        while not self._done.wait(LOOK_S):
            if found := self._found():
                if not self._done.wait(GRACE_S):
                    log.critical("%s", found)
                    os._exit(1)  # the main thread waits for a rank that will never answer
                return


def _everyone() -> str:
    """The name of the group for tensors."""
    return dist.group.WORLD.group_name  # type: ignore[union-attr]


def _see_each_other(count: int) -> bool:
    """Whether the first GPUs of this machine can read each other's memory."""
    pairs = ((a, b) for a in range(count) for b in range(count) if a != b)
    return all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory."""
    return tensor.flatten().view(torch.uint8)
