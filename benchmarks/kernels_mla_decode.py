"""How close does the absorbed decode attention come to reading the latent cache once?

    python benchmarks/kernels_mla_decode.py --output rows.json
    python benchmarks/kernels_mla_decode.py --case h16-b128-c1024 --format auto int6 --sweep

Every call of a CUDA graph attends to pages of its own, in random order, so that L2 serves no repeated read; a row is
the median time of one call with its combining kernel. Roof: the cache rows (and queries and outputs) at the speed of a
large copy, or the operations at the speed of a large product, whichever is longer. Every row is checked against plain
float32 first; with --sweep, every way to cut the work is a row, and the fastest comes last.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benthic.kernels.latent import Latents, bytes_per_token, quantise
from benthic.kernels.mla_decode import Tiles, choose_tiles, mla_decode, mla_decode_ref

R, P, PAGE = 512, 64, 64  # DeepSeek-V2-Lite, V2 and V3
SCALE = 192**-0.5
COPY, PRODUCT = 4.28e12, 730e12  # bytes per second, operations per second
L2 = 200e6  # bytes that must lie between two reads of a page: four times the cache
TOLERANCE = 1e-2  # relative norm
FORMATS = ("auto", "fp8", "int6")


@dataclass(frozen=True)
class Case:
    """B rows of `queries` tokens each and `heads` heads, with so much context."""

    heads: int
    rows: int
    context: int
    queries: int = 1

    @property
    def name(self) -> str:
        drafts = f"-q{self.queries}" if self.queries > 1 else ""
        return f"h{self.heads}-b{self.rows}-c{self.context}{drafts}"

    def bytes(self, format: str) -> float:
        """Read and written by one call, every cached token once."""
        n = self.rows * self.queries
        return self.rows * self.context * bytes_per_token(format, R, P) + 2 * n * self.heads * (2 * R + P)

    def operations(self) -> float:
        """Of both products."""
        return 2 * self.rows * self.queries * self.heads * self.context * (2 * R + P)


CASES = [
    *(Case(16, rows, 1024) for rows in (1, 8, 32, 128, 256)),
    Case(16, 128, 4096), Case(16, 128, 1024, queries=2), Case(128, 32, 4096),
]  # fmt: skip


class Problem:
    """A pool of pages that `copies` calls share, none of them a page of another."""

    def __init__(self, case: Case, format: str):
        self.case, self.format = case, format
        pages = -(-case.context // PAGE)
        self.copies = min(max(round(L2 / case.bytes(format)), 3), 64)
        total = self.copies * case.rows * pages
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        quantised = [quantise(format, normal(piece, R)) for piece in self._pieces(total * PAGE)]
        scales = [s for _, s in quantised if s is not None]
        self.latents = Latents(
            format=format, c_kv=torch.cat([c for c, _ in quantised]), scales=torch.cat(scales) if scales else None,
            k_rope=normal(total * PAGE, P),
        )  # fmt: skip
        order = torch.randperm(total, generator=generator, device="cuda", dtype=torch.int32)
        self.tables = order.view(self.copies, case.rows, pages)
        self.context = torch.full((case.rows,), case.context, dtype=torch.int32, device="cuda")
        n = case.rows * case.queries
        self.q_latent, self.q_rope = normal(case.heads, n, R), normal(n, case.heads, P)
        self.expected = mla_decode_ref(**self._inputs(0)).float()

    @staticmethod
    def _pieces(slots: int, size: int = 1 << 18) -> list[int]:
        return [min(size, slots - start) for start in range(0, slots, size)]

    def _inputs(self, copy: int) -> dict[str, Any]:
        return {
            "q_latent": self.q_latent, "q_rope": self.q_rope, "latents": self.latents, "table": self.tables[copy],
            "context": self.context, "page_size": PAGE, "scale": SCALE,
        }  # fmt: skip

    def chosen(self) -> Tiles:
        """What the wrapper would take."""
        c = self.case
        return choose_tiles(self.latents, c.rows, c.queries * c.heads, PAGE, self.tables.shape[2] * PAGE)

    def row(self, tiles: Tiles, repeats: int) -> dict[str, Any]:
        """One line of the table; `us` is None where the tiles do not fit into a multiprocessor."""
        row = {"case": self.case.name, "format": self.format, "tiles": asdict(tiles), "us": None}
        try:
            out = mla_decode(**self._inputs(0), tiles=tiles).float()
        except OutOfResources:
            return row
        error = ((out - self.expected).norm() / self.expected.norm()).item()
        if not error < TOLERANCE:
            raise SystemExit(f"{tiles} is wrong for {self.case.name} {self.format}: relative error {error:.2e}")
        us, size = self.microseconds(tiles, repeats), self.case.bytes(self.format)
        roof = max(size / COPY, self.case.operations() / PRODUCT) * 1e6
        return row | {
            "us": us, "error": error, "GB/s": size / us / 1e3, "TFLOP/s": self.case.operations() / us / 1e6,
            "roof us": roof, "of roof": roof / us,
        }  # fmt: skip

    def microseconds(self, tiles: Tiles, repeats: int) -> float:
        """Median time of one call inside of a graph of all copies."""

        def calls() -> None:
            for copy in range(self.copies):
                mla_decode(**self._inputs(copy), tiles=tiles)

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            calls()
        torch.cuda.synchronize()
        graph, times = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            calls()
        for _ in range(repeats + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / self.copies)
        return statistics.median(times[3:])


def variants(base: Tiles, format: str) -> Iterator[Tiles]:
    """Ways to cut the work, around those that the wrapper chose."""
    few = base.block_m < 64
    shapes = [  # block_n, swap, num_warps, num_stages
        *([(64, True, 4, 2), (64, True, 8, 2), (64, True, 8, 3)] if few else []),
        *([(32, False, 4, 2), (64, False, 4, 2), (64, False, 4, 3)] if few else []),
        (32, False, 4, 3), (64, False, 8, 2), (64, False, 8, 3), (32, False, 8, 3), (32, False, 8, 2),
    ]  # fmt: skip
    for block_n, swap, num_warps, num_stages in shapes:
        for parts in (1, 2, 4) if format == "auto" else (4,):
            for splits in sorted({1, base.splits, 2 * base.splits}):
                yield replace(
                    base, block_n=block_n, swap=swap, num_warps=num_warps, num_stages=num_stages, parts=parts,
                    splits=splits,
                )  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """One line; columns are named above the first."""
    t = row["tiles"]
    cut = f"{t['block_m']}x{t['block_n']} split {t['splits']} {'swap' if t['swap'] else '-':4}"
    cut += f" parts {t['parts']} warps {t['num_warps']} stages {t['num_stages']}"
    if row["us"] is None:
        print(f"{row['case']:18} {row['format']:5} does not fit{'':37} {cut}", flush=True)
    else:
        print(
            f"{row['case']:18} {row['format']:5} {row['us']:8.1f} {row['GB/s']:7.0f} {row['TFLOP/s']:8.1f} "
            f"{row['roof us']:8.1f} {row['of roof']:7.0%} {row['error']:9.1e}  {cut}",
            flush=True,
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--case", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    options.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS))
    options.add_argument("--sweep", action="store_true", help="time every way to cut the work")
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--output", type=Path, help="also write the rows as JSON")
    given = options.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here -> run this where torch.cuda.is_available()")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'case':18} {'cache':5} {'us':>8} {'GB/s':>7} {'TFLOP/s':>8} {'roof us':>8} {'of roof':>7} {'error':>9}")
    rows = []
    for case in [c for c in CASES if c.name in given.case]:
        for format in given.format:
            problem = Problem(case, format)
            base = problem.chosen()
            ways = dict.fromkeys([base, *variants(base, format)] if given.sweep else [base])
            tried = [problem.row(tiles, given.repeats) for tiles in ways]
            for row in sorted(tried, key=lambda row: -(row["us"] or float("inf"))):
                show(row)
            rows += tried
            if given.output:
                given.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
