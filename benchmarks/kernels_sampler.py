"""What does choosing the next tokens cost, beside the product that makes the logits?

    python benchmarks/kernels_sampler.py --rows 1 32 256 --output rows.json

V2-Lite's vocabulary, BF16 logits as the output head leaves them, one CUDA graph of ten calls, all rows with the same
controls. Roof: the logits, read once at the speed of a large copy. Baseline in the same run: the sampler in plain
torch on float32 logits, the conversion included. Tokens are compared first; where rows draw, the last bits of an
exponential may decide between two tokens, seldom.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benthic.inference import controls
from benthic.inference.config import SamplingParams
from benthic.inference.quick import QUICK
from benthic.inference.request import Seq
from benthic.inference.sampler import PLAIN, Choice, choose

VOCAB, COPY, CALLS = 102_400, 4.28e12, 10
KINDS = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9, "temperature": 0.7},
}


def microseconds(call: Callable[[], Choice]) -> float:
    """Median time of one of CALLS calls in one graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times[2:])


def row(count: int, kind: str) -> dict:
    """One line of the table."""
    logits = (torch.randn(count, 1, VOCAB, device="cuda") * 2.5).bfloat16()
    places = torch.arange(count, device="cuda")
    params = [SamplingParams(seed=i, **KINDS[kind]) for i in range(count)]
    seqs = [
        Seq(request_id=i, ids=[1], prompt_len=1, max_len=99, params=p, stop=frozenset()) for i, p in enumerate(params)
    ]
    asked = controls.build(seqs, "cuda")

    def quick() -> Choice:
        return choose(logits, asked, places, VOCAB, ways=QUICK)

    def plain() -> Choice:
        return choose(logits.float(), asked, places, VOCAB, ways=PLAIN)

    alike = (quick().tokens == plain().tokens).float().mean().item()
    if alike < (1 if kind == "greedy" else 0.99):
        raise SystemExit(f"{kind} at {count} rows: {alike:.0%} of the tokens are those of plain torch")
    us, roof = microseconds(quick), 2 * count * VOCAB / COPY * 1e6
    return {
        "rows": count, "kind": kind, "us": round(us, 1), "plain us": round(microseconds(plain), 1),
        "roof us": round(roof, 1), "alike": round(alike, 4),
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--kind", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")
    rows = []
    for count in options.rows:
        for kind in options.kind:
            rows.append(row(count, kind))
            print(" | ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if options.output:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        options.output.write_text(json.dumps([machine | row for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
