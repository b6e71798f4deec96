"""How long does one decode step take, and one step of prompts, without a scheduler around it?

    python benchmarks/decode.py --model v2-lite --batch 1 8 32 128 256 --output rows.json

Random weights and random tokens, BF16 or with FP8 weights (--quantization fp8), one GPU. A decode step is a CUDA graph:
all layers, output head, likeliest token. Roof: the bytes that a step cannot avoid (weights of the experts that this
step really touches, all others, latents) over the speed of a large copy.
vLLM 0.26 on the same chip and shape, prompts of 1024: 3.462 ms at batch 1,
4.027 at 8, 4.769 at 32, 6.210 at 128, 8.899 at 256; 92,000 prompt tokens per second.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benthic.inference import fused
from benthic.inference.fused import Decode, Fused, Prefill, Tokens
from benthic.jobs.bench import random_model
from benthic.kernels.latent import bytes_per_token
from benthic.model.cache import LatentCache
from benthic.model.config import ModelConfig
from benthic.model.fp8 import to_fp8
from benthic.model.transformer import Transformer
from benthic.recipes.models import MODELS

PAGE = 64
COPY = 4.28e12  # bytes per second, read plus written
VLLM = {1: 3.462, 8: 4.027, 32: 4.769, 128: 6.210, 256: 8.899}


def shape(name: str, layers: int) -> ModelConfig:
    """A preset without its prediction modules; `layers` > 0 keeps only so many."""
    config = MODELS[name]()
    return dataclasses.replace(config, num_hidden_layers=layers or config.num_hidden_layers, num_nextn_predict_layers=0)


def decode_tokens(model: Transformer, batch: int, context: int) -> Tokens:
    """One new token in each of `batch` rows whose pages lie anywhere."""
    width = -(-context // PAGE)
    pages = 1 + torch.randperm(batch * width, device="cuda").view(batch, width)
    last = context - 1
    slots = pages[:, last // PAGE] * PAGE + last % PAGE
    table = pages.to(torch.int32)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    ids = torch.randint(0, model.config.vocab_size, (batch,), device="cuda")
    positions = torch.full((batch,), last, device="cuda")
    return Tokens(ids, positions, slots, Decode(batch, 1, table, lengths), None)


def prompt_tokens(model: Transformer, rows: int, length: int) -> Tokens:
    """Whole prompts without context."""
    n = rows * length
    ids = torch.randint(0, model.config.vocab_size, (n,), device="cuda")
    first = torch.arange(0, n + 1, length, dtype=torch.int32, device="cuda")
    positions = torch.arange(length, device="cuda").repeat(rows)
    return Tokens(ids, positions, PAGE + torch.arange(n, device="cuda"), None, Prefill(first, length, []))


def captured(step: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    """`step` as a graph, after it has run twice."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median time between events."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def touched(step: Callable[[], Tensor]) -> float:
    """Distinct experts per layer in one step, on average."""
    seen, true = [], fused.route.choose

    def spy(*args, **kwargs):
        ids, weights = true(*args, **kwargs)
        seen.append(len(ids.unique()))
        return ids, weights

    fused.route.choose = spy
    try:
        step()
    finally:
        fused.route.choose = true
    return statistics.mean(seen) if seen else 0.0


def least_bytes(model: Transformer, batch: int, context: int, experts: float, format: str) -> float:
    """What a decode step must move."""
    c = model.config
    held = sum(p.nbytes for p in model.parameters()) - model.embed_tokens.weight.nbytes  # the embedding is looked up
    routed = sum(p.nbytes for name, p in model.named_parameters() if "routed_experts" in name)
    weights = held - routed * (1 - experts / c.n_routed_experts)
    row = bytes_per_token(format, c.kv_lora_rank or 0, c.qk_rope_head_dim)
    return weights + batch * context * row * c.num_hidden_layers


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="v2-lite", choices=MODELS)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--std", type=float, default=0.02)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--context", type=int, default=1088)
    parser.add_argument("--prompts", type=int, nargs="*", default=[8], help="prompts of 1024 tokens in one step")
    parser.add_argument("--quantization", default="none", choices=["none", "fp8"])
    parser.add_argument("--format", default="auto", choices=["auto", "fp8", "int6"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model = random_model(shape(options.model, options.layers), "cuda", torch.bfloat16, options.std)
    if options.quantization == "fp8":
        to_fp8(model)
    rows = []
    slots = (1 + max(options.batch) * -(-options.context // PAGE)) * PAGE
    slots = max([slots, *(PAGE + 1024 * n for n in options.prompts)])
    cache = LatentCache(model.config, slots, "cuda", torch.bfloat16, options.format)
    for layer in cache.layers:
        c_kv = torch.randn(slots, layer.width, device="cuda")
        layer.write(torch.arange(slots, device="cuda"), c_kv, torch.randn_like(layer.k_rope))
    forward = Fused(model, cache, PAGE)
    for batch in options.batch:
        tokens = decode_tokens(model, batch, options.context)

        def step(tokens: Tokens = tokens) -> Tensor:
            return model.logits(forward.hidden(tokens)).argmax(-1)

        experts = touched(step)
        graph = captured(step)
        ms = milliseconds(graph.replay, 50)
        roof = least_bytes(model, batch, options.context, experts, options.format) / COPY * 1e3
        rows.append(
            {
                "decode batch": batch, "ms": round(ms, 3), "tokens/s": round(batch / ms * 1e3),
                "experts touched": round(experts, 1), "roof ms": round(roof, 3), "of roof": f"{roof / ms:.0%}",
                "vLLM ms": VLLM.get(batch),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    for count in options.prompts:
        tokens = prompt_tokens(model, count, 1024)
        run = lambda tokens=tokens: forward.hidden(tokens)  # noqa: E731
        run()
        ms = milliseconds(run, 5)
        rows.append({"prompts of 1024": count, "ms": round(ms, 2), "tokens/s": round(count * 1024 / ms * 1e3)})
        print(json.dumps(rows[-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
