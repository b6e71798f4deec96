"""How fast is the whole engine: scheduler, kernels, sampler, host and all?

    python benchmarks/engine.py --model v2-lite --batch 1 32 256 --output rows.json

Random weights and prompts of 1024 random tokens, BF16, greedy, 128 new tokens each, one GPU. Prefill: prompts per
second until the first tokens are there; decode: tokens per second after that. How many distinct experts a step touches
decides how many weights it must read: benchmarks/decode.py reports it beside the speed. vLLM 0.26, same chip and shape: 289, 1,987, 6,710, 20,613 and 28,766 tokens/s at
batch 1, 8, 32, 128, 256; 92,000 prompt tokens/s; 73 s from start to first token.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from decode import VLLM, random_model

from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Request
from benthic.recipes.models import MODELS


def run(engine: Engine, batch: int, length: int, new: int) -> dict[str, float]:
    """One batch from start to end."""
    vocab = engine.vocab_size
    generator = torch.Generator().manual_seed(batch)
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    for _ in range(batch):
        ids = torch.randint(0, vocab, (length,), generator=generator).tolist()
        engine.add(Request(prompt_token_ids=ids, params=params))
    torch.cuda.synchronize()
    start = time.perf_counter()
    first: set[int] = set()
    decoding, steps, tokens = 0.0, 0, 0
    while engine.busy:
        if len(first) == batch and not decoding:
            decoding = time.perf_counter()
        step = engine.step()
        if decoding:
            steps += 1
            tokens += sum(len(delta.token_ids) for delta in step.deltas)
        first |= {delta.request_id for delta in step.deltas}
    end = time.perf_counter()
    return {
        "prompt tokens/s": batch * length / (decoding - start), "tokens/s": tokens / (end - decoding),
        "ms per step": (end - decoding) / steps * 1e3,
    }  # fmt: skip


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="v2-lite", choices=MODELS)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--cache", default="auto", choices=["auto", "fp8", "int6"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model = random_model(options.model, options.layers, 0.02)
    config = EngineConfig(max_model_len=options.length + options.new, page_size=64, kv_cache_dtype=options.cache)
    engine = Engine(model, None, config)
    run(engine, 1, options.length, 2)
    print(json.dumps({"start to first token, s": round(time.perf_counter() - began, 1)}), flush=True)
    rows = []
    for batch in options.batch:
        run(engine, batch, options.length, 4)  # compiles and captures what this size needs
        found = {name: round(value, 3) for name, value in run(engine, batch, options.length, options.new).items()}
        rows.append({"batch": batch, **found, "vLLM ms": VLLM.get(batch)})
        print(json.dumps(rows[-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
