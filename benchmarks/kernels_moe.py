"""How fast are the expert kernels, against the memory they must read and against sorted grouped products?

    python benchmarks/kernels_moe.py --tokens 1 4 8 32 128 256 1024 --output rows.json
    python benchmarks/kernels_moe.py --tokens 1 32 --routing uniform groups --sweep

V2-Lite's shape on one GPU. A CUDA graph runs several layers with weights of their own, so that none is found in L2;
a row is the median time of one layer: order, products and sum, without the router. Roof: the weights of the experts
that the tokens touch at the speed of a large copy, or the operations at the speed of a large product, whichever is
longer; in BF16 also where products run in FP8. Baseline in the same run: stable sort and
`torch.nn.functional.grouped_mm` in BF16, as the model computes, with offsets found without a copy to the host so that
it may stand in a graph too. Every row is checked first, against plain float32 with activations quantised where the way
quantises them.
"""

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.kernels.moe import ExpertWeights, Fp8Tiles, Rows, Tiles, Way, choose_tiles, moe, moe_ref
from benthic.kernels.quant import BLOCK

D, I, E, K, S = 2048, 1408, 64, 6, 2  # DeepSeek-V2-Lite
COPY, PRODUCT = 4.28e12, 730e12  # bytes per second, operations per second
TOLERANCE = 2e-2  # relative norm; BF16 rounds at five places


def random_weights(fp8: bool, seed: int) -> ExpertWeights:
    """One layer; with `fp8`, arbitrary E4M3 numbers and factors that give the products ordinary sizes."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        wide = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return wide.mul_(8).to(torch.float8_e4m3fn) if fp8 else wide.mul_(shape[-1] ** -0.5)

    def factors(columns: int, *shape: int) -> Tensor | None:
        size = columns**-0.5 / 8
        return (0.5 + torch.rand(shape, generator=generator, device="cuda")) * size if fp8 else None

    ni, nd, ns = (-(-n // BLOCK) for n in (I, D, S * I))
    return ExpertWeights(
        gate_up_proj=normal(E, 2 * I, D), gate_up_scale=factors(D, E, 2, ni, nd),
        down_proj=normal(E, D, I), down_scale=factors(I, E, nd, ni),
        shared_gate_proj=normal(S * I, D), shared_gate_scale=factors(D, ns, nd),
        shared_up_proj=normal(S * I, D), shared_up_scale=factors(D, ns, nd),
        shared_down_proj=normal(D, S * I), shared_down_scale=factors(S * I, nd, ns),
    )  # fmt: skip


def choice(n: int, routing: str, seed: int) -> tuple[Tensor, Tensor]:
    """K distinct experts per token; skewed: the r-th expert is as likely as 1 / r; groups: half of the tokens choose
    the same K experts, the others K more, as rows do that continue the same text."""
    generator = torch.Generator().manual_seed(seed)
    if routing == "groups":
        sets = torch.randperm(E, generator=generator)[: 2 * K].view(2, K)
        ids = sets[torch.randint(2, (n,), generator=generator)]
        return ids.int().cuda(), torch.rand(n, K, generator=generator).softmax(-1).cuda()
    gumbel = -torch.log(-torch.log(torch.rand(n, E, generator=generator)))
    if routing == "skewed":
        gumbel -= torch.arange(1, E + 1).log()[torch.randperm(E, generator=generator)]
    score = gumbel.topk(K, -1)
    return score.indices.int().cuda(), score.values.softmax(-1).cuda()


def grouped(x: Tensor, w: ExpertWeights, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """The baseline: copies sorted by expert, grouped products, gathered and summed, plus the shared experts."""
    flat, order = topk_ids.reshape(-1).sort(stable=True)
    offs = torch.searchsorted(flat, torch.arange(E, device=x.device, dtype=torch.int32), right=True).int()
    gate, up = F.grouped_mm(x[order // K], w.gate_up_proj.transpose(1, 2), offs=offs).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, w.down_proj.transpose(1, 2), offs=offs)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    routed = torch.einsum("nkd,nk->nd", y[back].view(len(x), K, D), topk_weights.to(x.dtype))
    assert w.shared_gate_proj is not None
    assert w.shared_up_proj is not None
    assert w.shared_down_proj is not None
    shared = F.silu(F.linear(x, w.shared_gate_proj)) * F.linear(x, w.shared_up_proj)
    return F.linear(shared, w.shared_down_proj) + routed


def microseconds(layer: Callable[[int], object], layers: int, repeats: int) -> float:
    """Median time of one of `layers` calls inside of one graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for number in range(layers):
            layer(number)
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for number in range(layers):
            layer(number)
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / layers)
    return statistics.median(times[3:])


@dataclasses.dataclass(eq=False)  # hashed by identity
class Case:
    """So many tokens, one choice of experts per layer."""

    layers: list[ExpertWeights]
    x: Tensor
    choices: list[tuple[Tensor, Tensor]]
    repeats: int

    @functools.cache  # noqa: B019  as many cases as lines of the table
    def expected(self, quantised: bool) -> Tensor:
        """What the first layer must give."""
        return moe_ref(self.x, self.layers[0], *self.choices[0], quantised=quantised)

    def time(self, tiles: Way) -> float:
        """Microseconds per layer, after the first layer was found right."""
        out = moe(self.x, self.layers[0], *self.choices[0], tiles=tiles).float()
        expected = self.expected(isinstance(tiles, Fp8Tiles))
        error = ((out - expected).norm() / expected.norm()).item()
        if not error < TOLERANCE:
            raise SystemExit(f"{tiles} at {len(self.x)} tokens is wrong: relative error {error:.2e}")
        return microseconds(
            lambda i: moe(self.x, self.layers[i], *self.choices[i], tiles=tiles), len(self.layers), self.repeats
        )

    def baseline(self) -> float:
        """The same of the sorted grouped products."""
        return microseconds(lambda i: grouped(self.x, self.layers[i], *self.choices[i]), len(self.layers), self.repeats)

    def touched(self) -> float:
        """Distinct routed experts per layer."""
        return statistics.mean(len(ids.unique()) for ids, _ in self.choices)

    def bytes(self) -> float:
        """Of the weights that must be read per layer."""
        return (self.touched() + S) * 3 * D * I * self.layers[0].down_proj.element_size()

    def operations(self) -> float:
        """Of the products per layer."""
        return len(self.x) * (K + S) * 6 * D * I

    def row(self, tiles: Way, us: float) -> dict[str, Any]:
        """One line of the table."""
        roof = max(self.bytes() / COPY, self.operations() / PRODUCT) * 1e6
        return {
            "us": round(us, 1), "experts": round(self.touched(), 1), "GB/s": round(self.bytes() / us / 1e3),
            "TFLOP/s": round(self.operations() / us / 1e6, 1), "roof us": round(roof, 1),
            "of roof": f"{roof / us:.0%}", "tiles": str(tiles),
        }  # fmt: skip


def changes(start: Way) -> Iterator[list[dict[str, int]]]:
    """What a sweep tries, one list per kernel: the two are independent, so the best of one is kept for the other."""
    if isinstance(start, Rows):
        for part in ("up", "down"):
            shapes = [(2, 2048, 1), (4, 2048, 1), (8, 2048, 1), (4, 1024, 1), (8, 512, 3), (16, 512, 3), (8, 256, 4)]
            names = [f"{part}_block", f"{part}_chunk", f"{part}_stages"]
            yield [dict(zip(names, shape)) for shape in shapes]
        yield [{"num_warps": n} for n in (1, 2, 4, 8)]
        return
    if not isinstance(start, Tiles | Fp8Tiles):
        return
    yield [{"block_m": m} for m in (16, 32, 64, 128) if start.block_m // 2 <= m <= start.block_m * 2]
    if isinstance(start, Fp8Tiles):
        yield [{"up_warps": w, "up_stages": s} for w in (4, 8) for s in (3, 4, 5, 6)]
        yield [{"down_n": n, "down_warps": w, "down_stages": s} for n in (64, 128) for w in (4, 8) for s in (2, 3, 4)]
        return
    for part in ("up", "down"):
        columns = (16, 32, 64, 128) if part == "up" else (32, 64, 128, 256)
        yield [{f"{part}_n": n, f"{part}_k": k} for n in columns for k in (64, 128)]
    shapes = [(m, n) for m in (64, 128) for n in (32, 64)]
    yield [{"shared_m": m, "shared_up_n": n, "shared_down_n": 2 * n} for m, n in shapes]
    yield [{"num_warps": w, "num_stages": s} for w in (4, 8) for s in (2, 3, 4)]


def sweep(case: Case, start: Way) -> tuple[Way, float]:
    """The fastest tiles found by changing one kernel's at a time; what does not fit the chip is passed over aloud."""
    from triton.runtime.errors import OutOfResources

    best, fastest = start, case.time(start)
    for options in changes(start):
        kept = best
        for change in options:
            tiles = dataclasses.replace(kept, **change)
            try:
                us = case.time(tiles)
            except OutOfResources as error:
                print(f"    {change}: {error}", flush=True)
                continue
            print(f"    {change}: {us:.1f} us", flush=True)
            if us < fastest:
                best, fastest = tiles, us
    return best, fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 32, 128, 256, 1024])
    parser.add_argument(
        "--routing", nargs="+", default=["uniform", "skewed", "groups"], choices=["uniform", "skewed", "groups"]
    )
    parser.add_argument("--weights", nargs="+", default=["bf16", "fp8"], choices=["bf16", "fp8"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="try other tiles around the defaults")
    parser.add_argument("--way", choices=["chosen", "rows", "tiles"], default="chosen", help="which defaults to take")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")
    rows = []
    for weights in options.weights:
        layers = [random_weights(weights == "fp8", seed) for seed in range(options.layers)]
        for n in options.tokens:
            x = torch.randn(n, D, generator=torch.Generator("cuda").manual_seed(n), device="cuda").bfloat16()
            for routing in options.routing:
                case = Case(layers, x, [choice(n, routing, seed) for seed in range(len(layers))], options.repeats)
                chosen = choose_tiles(n, K, E, layers[0].down_proj.dtype)
                by_expert = Fp8Tiles() if layers[0].fp8 else Tiles()
                tiles = {"chosen": chosen, "rows": Rows(), "tiles": by_expert}[options.way]
                tiles, us = sweep(case, tiles) if options.sweep else (tiles, case.time(tiles))
                baseline = round(case.baseline(), 1) if weights == "bf16" else None
                head = {"weights": weights, "tokens": n, "routing": routing, "grouped_mm us": baseline}
                rows.append(head | case.row(tiles, us))
                print(" | ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        del layers
    if options.output:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        options.output.write_text(json.dumps([machine | row for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
