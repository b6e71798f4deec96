"""Many clients at once, written by hand on sockets, and what a server under them must keep."""

import asyncio
import contextlib
import json
import os
import random
import struct
import threading
import time
from socket import SO_LINGER, SOL_SOCKET

from benthic.inference.config import EngineConfig
from benthic.inference.engine import Engine
from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer

PHASES = ("connect", "head", "body", "sent", "decode", "half close", "reset", "slow")


def tiny_engine(tokenizer, rows: int = 8) -> Engine:
    """A small random model on the CPU, float32: answers differ by prompt and are the same in any company."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=None,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64,
        first_k_dense_replace=2, max_position_embeddings=256,
    )  # fmt: skip
    model = initialise(Transformer(config), std=0.15, seed=1)
    return Engine(model, tokenizer, EngineConfig(max_num_seqs=rows, deterministic=True))


def post(prompt: str, stream: bool = True, **fields) -> bytes:
    """A completion request as bytes."""
    ask = {"model": "tiny", "prompt": prompt, "temperature": 0, "stream": stream, **fields}
    body = json.dumps(ask).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def read_all(port: int, data: bytes) -> tuple[int, str, float, str]:
    """(status, text of the streamed answer, seconds to its first byte, Retry-After) of a request."""
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        first = time.perf_counter() - begun
        status = int(head.split()[1])
        retry = next((line.split(":")[1].strip() for line in head.splitlines() if line.startswith("retry-after")), "")
        text = ""
        while status == 200 and (line := await reader.readline()).strip() != b"data: [DONE]":
            if not line:
                raise ConnectionError("the stream ended early")
            if line.startswith(b"data: "):
                text += "".join(choice["text"] for choice in json.loads(line[6:]).get("choices", []))
        return status, text, first, retry
    finally:
        writer.close()


async def cut(port: int, rng: random.Random, prompt: str, phase: str) -> None:
    """A client that leaves in `phase`."""
    data = post(prompt, rng.random() < 0.7, max_tokens=rng.randint(5, 200))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        at = {"connect": 0, "head": rng.randint(1, 40), "body": len(data) - rng.randint(1, 20)}.get(phase, len(data))
        writer.write(data[:at])
        await writer.drain()
        if phase in ("decode", "half close", "reset", "slow"):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(rng.choice([1, 50, 2000])), rng.choice([0.002, 0.02, 0.1]))
        if phase == "half close":
            writer.write_eof()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), 0.02)
        if phase == "slow":
            writer.transport.pause_reading()
            await asyncio.sleep(rng.choice([0.01, 0.05]))
        if phase == "reset":
            writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


def resident() -> float:
    """Megabytes of memory that this process has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Stalls:
    """How late the server's event loop is at most, and how late a thread that does nothing is meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop_late = self.thread_late = 0.0
        self._loop, self._done = loop, threading.Event()
        self._thread = threading.Thread(target=self._idle)

    def __enter__(self):
        self._thread.start()
        self._loop.call_soon_threadsafe(self._tick, None)
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _tick(self, due: float | None) -> None:
        now = time.perf_counter()
        self.loop_late = max(self.loop_late, now - (due or now))
        if not self._done.is_set():
            self._loop.call_later(0.01, self._tick, time.perf_counter() + 0.01)

    def _idle(self) -> None:
        while not self._done.is_set():
            due = time.perf_counter() + 0.01
            self._done.wait(0.01)
            self.thread_late = max(self.thread_late, time.perf_counter() - due)
