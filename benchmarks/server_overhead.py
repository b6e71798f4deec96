"""What does the HTTP layer add to the engine? Time to the first byte, and between tokens, at so many streams.

    python benchmarks/server_overhead.py --streams 64 --output rows.json

The tiny recipe's model with random weights, float32, on one thread of the CPU, once behind the bare engine and once
behind `benthic serve` in a process of its own, read by raw sockets here; both in one run, `--repeat` times in turn. All
but one of the streams answer without end; the last place takes probes one after the other, at random moments, which
meet a running step as clients do. First byte: from asking to the first token of a probe. Between tokens: the
steady streams' time per token. Floor: 5 ms and 0.3 ms a token more than the bare engine, which is each row's baseline.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.llm import LLM
from benthic.inference.request import Request
from benthic.model.hf import write_model
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.recipes import tiny
from benthic.tokenizer import bpe

LENGTH = 32  # tokens of a prompt
PAUSE = (0.02, 0.08)  # seconds between two probes


def make_model(folder: Path) -> None:
    """The tiny recipe's shape with room for long answers, random weights, and a tokenizer."""
    text = Path(__file__).read_text("utf-8")
    tokenizer = bpe.train([text * 4], 512)
    config = tiny.model()
    write_model(folder, initialise(Transformer(config), std=0.02, seed=0), tokenizer)


def prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(10, 250) for _ in range(LENGTH)]


def bare(folder: Path, streams: int, tokens: int, probes: int) -> dict[str, list[float]]:
    """Seconds to the first token of every probe, and between two tokens of the steady streams."""
    config = EngineConfig(max_num_seqs=streams, enable_prefix_caching=False)
    rng, lock, asked = random.Random(0), threading.Lock(), []
    firsts: list[float] = []
    with LLM(folder, device="cpu", config=config) as llm:
        engine = llm.engine
        endless = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        steady = {engine.add(Request(prompt_token_ids=prompt(rng), params=endless)) for _ in range(streams - 1)}
        waiting: dict[int, float] = {}
        answered = threading.Event()

        def ask() -> None:
            for _ in range(probes):
                time.sleep(rng.uniform(*PAUSE))
                answered.clear()
                with lock:
                    asked.append(time.perf_counter())
                answered.wait()

        begun: set[int] = set()
        while begun < steady:
            begun |= {delta.request_id for delta in engine.step().deltas}
        asking = threading.Thread(target=ask)
        start, steps = time.perf_counter(), 0
        asking.start()
        while asking.is_alive():
            with lock:
                taken, asked[:] = list(asked), []
            for when in taken:
                one = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
                waiting[engine.add(Request(prompt_token_ids=prompt(rng), params=one))] = when
            deltas = engine.step().deltas
            steps += 1
            for delta in deltas:
                if (when := waiting.pop(delta.request_id, None)) is not None:
                    firsts.append(time.perf_counter() - when)
                    answered.set()
        between = (time.perf_counter() - start) / steps
        for request in steady:
            engine.abort(request)
        while engine.busy:
            engine.step()
    return {"first": firsts, "between": [between]}


async def stream(port: int, ids: list[int], tokens: int, arrivals: list[float], begun: asyncio.Event) -> float:
    """One completion, read event by event: seconds to its first token."""
    fields = {"model": "tiny", "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = json.dumps(fields | {"stream": True}).encode()
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    first = 0.0
    try:
        while data := await reader.read(65536):
            if b'"text"' in data:
                now = time.perf_counter()
                first = first or now - start
                arrivals.append(now)
                begun.set()
            elif not first and not data.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"the server answered {data[:300]!r}")
    finally:
        writer.close()
    return first


async def served(port: int, streams: int, tokens: int, probes: int) -> dict[str, list[float]]:
    """The same through HTTP."""
    rng, firsts = random.Random(0), []
    arrivals: list[list[float]] = [[] for _ in range(streams - 1)]
    starts = [asyncio.Event() for _ in arrivals]
    steady = [
        asyncio.create_task(stream(port, prompt(rng), tokens, each, begun)) for each, begun in zip(arrivals, starts)
    ]
    await asyncio.gather(*(begun.wait() for begun in starts))
    start = time.perf_counter()
    for _ in range(probes):
        await asyncio.sleep(rng.uniform(*PAUSE))
        firsts.append(await stream(port, prompt(rng), 1, [], asyncio.Event()))
    end = time.perf_counter()
    if any(task.done() for task in steady):
        raise SystemExit("a steady stream ended before the last probe -> raise --tokens")
    for task in steady:
        task.cancel()
    await asyncio.wait(steady)
    seen = [[when for when in each if start <= when <= end] for each in arrivals]
    return {"first": firsts, "between": [(each[-1] - each[0]) / (len(each) - 1) for each in seen]}


def start_server(folder: Path, streams: int) -> tuple[subprocess.Popen[str], int]:
    """`benthic serve`, and its port once it listens."""
    command = [sys.executable, "-m", "benthic", "serve", str(folder), "--port", "0", "--served-model-name", "tiny"]
    server = subprocess.Popen(
        [*command, "--device", "cpu", "--max-num-seqs", str(streams)], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    for line in server.stderr:
        if "is served at" in line:
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return server, int(line.rstrip().rpartition(":")[2])
    raise SystemExit(f"the server ended with {server.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument(
        "--tokens", type=int, default=0, help="of a steady stream; 0: as many as the model's context has"
    )
    parser.add_argument("--probes", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print("streams  first byte, ms: engine  server  added   between tokens, ms: engine  server  added  ratio")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "tiny"
        make_model(folder)
        tokens = options.tokens or tiny.model().max_position_embeddings - LENGTH
        for _ in range(options.repeat):
            alone = bare(folder, options.streams, tokens, options.probes)
            server, port = start_server(folder, options.streams)
            try:
                asyncio.run(served(port, 2, 32, 1))  # warms up
                through = asyncio.run(served(port, options.streams, tokens, options.probes))
            finally:
                server.terminate()
                server.wait()
            ms = {
                f"{name} {who}": 1e3 * statistics.median(found[name])
                for name in ("first", "between")
                for who, found in (("engine", alone), ("server", through))
            }
            rows.append({"streams": options.streams, "probes": options.probes, "threads": 1, **ms})
            a, b, c, d = ms.values()
            print(
                f"{options.streams:7} {a:23.2f} {b:7.2f} {b - a:6.2f} {c:27.2f} {d:7.2f} {d - c:6.2f} {d / c:6.3f}",
                flush=True,
            )
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
