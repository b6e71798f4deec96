"""How close does attention over whole prompts come to what the tensor cores can do?

    python benchmarks/kernels_mla_prefill.py --output rows.json
    python benchmarks/kernels_mla_prefill.py --case 16x8x1024 --sweep

A case is heads x prompts x tokens; causal, decompressed keys and values of V2 and V3 (192 and 128 wide). Operations are
those below the diagonal. Roof: 730 TFLOP/s. Baseline in the same run: torch's scaled_dot_product_attention on queries
and keys laid out whole, without the log-sum-exp. Every row is checked against it first.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benthic.kernels.mla_prefill import mla_prefill

D, P, V = 128, 64, 128  # DeepSeek-V2-Lite, V2 and V3
SCALE = (D + P) ** -0.5
PRODUCT = 730e12  # operations per second
TOLERANCE = 1e-2  # relative norm
DEFAULT = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}
SHAPES = [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (128, 128, 8, 2), (128, 32, 8, 4)]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def rows_of(heads: int, prompts: int, length: int, sweep: bool) -> list[dict]:
    """One case with the defaults, or with every shape."""
    n = prompts * length
    q, q_rope, kv, k_rope = random(n, heads, D + P), random(n, heads, P), random(n, heads, D + V), random(n, P)
    first = torch.arange(0, n + 1, length, dtype=torch.int32, device="cuda")
    query = torch.cat((q[..., :D], q_rope), -1)
    keys = torch.cat((kv[..., :D], k_rope.unsqueeze(1).expand(n, heads, P)), -1)
    laid = [t.view(prompts, length, heads, -1).transpose(1, 2) for t in (query, keys, kv[..., D:])]

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(*laid, is_causal=True, scale=SCALE)

    expected = plain().transpose(1, 2).reshape(n, heads, V).float()
    baseline = triton.testing.do_bench(plain, return_mode="median") * 1e3
    operations, rows = heads * prompts * length**2 * (D + P + V), []
    for shape in SHAPES if sweep else SHAPES[:1]:
        tiles = dict(zip(DEFAULT, shape))

        def run(tiles: dict = tiles) -> Tensor:
            return mla_prefill(
                q[..., :D], q_rope, kv, k_rope, first, first, length, SCALE, causal=True, **tiles
            )[0]  # fmt: skip

        try:
            error = ((run().float() - expected).norm() / expected.norm()).item()
        except OutOfResources as reason:
            print(f"    {tiles}: {reason}", flush=True)
            continue
        if not error < TOLERANCE:
            raise SystemExit(f"{tiles} is wrong: relative error {error:.2e}")
        us = triton.testing.do_bench(run, return_mode="median") * 1e3
        rows.append(
            {
                "case": f"{heads}x{prompts}x{length}", **tiles, "us": round(us, 1), "sdpa us": round(baseline, 1),
                "TFLOP/s": round(operations / us / 1e6), "of roof": f"{operations / PRODUCT / us * 1e6:.0%}",
            }
        )  # fmt: skip
        print(" | ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--case", nargs="+", default=["16x8x1024", "16x1x8192", "128x2x2048"], help="HxBxT")
    parser.add_argument("--sweep", action="store_true", help="every shape of blocks")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")
    rows = [row for case in options.case for row in rows_of(*map(int, case.split("x")), options.sweep)]
    if options.output:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        options.output.write_text(json.dumps([machine | row for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
