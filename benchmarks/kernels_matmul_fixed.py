"""How fast are products in a fixed order, against the library's, and do they keep their promise?

    python benchmarks/kernels_matmul_fixed.py --output rows.json [--sweep 0 1 2]

BF16 on one GPU. Every shape is first computed for 8192 tokens, and then for fewer of them: the rows must agree bit for
bit. Times are medians of CUDA graph replays, over weights that do not fit in L2. Roof: bytes of the matrix over the
speed of a large copy, or operations over the speed of a large product.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benthic.kernels.matmul_fixed import Tiles, products, products_ref

COPY, PRODUCT = 4.28e12, 730e12  # bytes per second, operations per second
SHAPES = {"q, kv_a": (1, 3648, 2048), "o": (1, 2048, 2048), "W_UK": (16, 512, 128), "head": (1, 102400, 2048)}
SWEEP = [
    Tiles(),
    Tiles(num_stages=6),
    Tiles(depth=128, num_stages=3),
    Tiles(tokens=128),
    Tiles(stretch=512),
    Tiles(stretch=512, num_stages=6),
    Tiles(stretch=512, depth=128, num_stages=3),
    Tiles(stretch=512, tokens=128),
]


def timed(call: Callable[[int], object], copies: int) -> float:
    """Median milliseconds of one call, among `copies` with weights of their own in one graph."""
    for i in range(copies):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / copies)
    return statistics.median(times[1:])


def same(x: torch.Tensor, w: torch.Tensor, tiles: Tiles) -> bool:
    """Rows of a large call against rows of small ones, and stretches apart against stretches in turn."""
    whole = products(x, w, tiles=tiles)
    error = (whole.float() - products_ref(x, w).float()).norm() / products_ref(x, w).float().norm()
    if error > 1e-2:
        raise AssertionError(f"relative error {error:.3g}")
    cuts = [(0, 1), (77, 78), (100, 132), (5, 262), (8000, 8190)]
    parts = [products(x[:, a:b], w, tiles=tiles, apart=apart) for a, b in cuts for apart in (False, True)]
    return all(torch.equal(part, whole[:, a:b]) for part, (a, b) in zip(parts, [c for c in cuts for _ in range(2)]))


def measure(name: str, tiles: Tiles, tokens: list[int]) -> dict:
    """One shape with one kind of tiles: whether it keeps its promise, and its times beside the library's."""
    g, m, d = SHAPES[name]
    copies = max(1, min(16, 200_000_000 // (g * m * d * 2)))
    torch.manual_seed(0)
    weights = [torch.randn(g, m, d, device="cuda", dtype=torch.bfloat16) * d**-0.5 for _ in range(copies)]
    x = torch.randn(g, 8192, d, device="cuda", dtype=torch.bfloat16)
    row: dict = {"shape": name, "tiles": str(dataclasses.astuple(tiles)), "same": same(x, weights[0], tiles)}
    for n in tokens:
        own, few = x[:, :n], copies if n <= 256 else 2
        ours = timed(lambda i: products(own, weights[i], tiles=tiles), few)  # noqa: B023
        theirs = timed(lambda i: torch.bmm(own, weights[i].transpose(1, 2)), few)  # noqa: B023
        roof = max(g * m * d * 2 / COPY, 2 * g * n * m * d / PRODUCT) * 1e3
        row[f"us at {n}"] = f"{ours * 1e3:.1f} ({100 * roof / ours:.0f}%, library {theirs * 1e3:.1f})"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES)[:3], choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 256, 8192])
    parser.add_argument("--sweep", type=int, nargs="*", default=[0], help="which of SWEEP")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.shapes:
        for tiles in [SWEEP[i] for i in options.sweep]:
            rows.append(measure(name, tiles, options.tokens))
            print(*rows[-1].values(), sep=" | ", flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
