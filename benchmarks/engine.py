"""How fast is the whole engine: scheduler, kernels, sampler, host and all?

    python benchmarks/engine.py --model v2-lite --batch 1 32 256 --output rows.json

`benthic bench decode` with the shape that other engines were measured on: random weights and prompts of 1024 random
tokens, BF16 or with FP8 weights (--quantization fp8), greedy, 128 new tokens each, one GPU. Prefill: until all requests
have their first token; decode: the steps after that which all requests share. How many distinct experts a step touches
decides how many weights it must read: benchmarks/decode.py reports it beside the speed.
vLLM 0.26, same chip and shape: 289, 1,987, 6,710, 20,613 and
28,766 tokens/s at batch 1, 8, 32, 128, 256; 92,000 prompt tokens/s; 73 s from start to first token.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from decode import VLLM, shape

from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.jobs.bench import cache_pages, measured, random_model
from benthic.model.fp8 import to_fp8
from benthic.recipes.models import MODELS


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="v2-lite", choices=MODELS)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--quantization", default="none", choices=["none", "fp8"])
    parser.add_argument("--cache", default="auto", choices=["auto", "fp8", "int6"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model = random_model(shape(options.model, options.layers), "cuda", torch.bfloat16)
    if options.quantization == "fp8":
        to_fp8(model)
    config = EngineConfig(
        max_num_seqs=max(options.batch),
        max_model_len=options.length + options.new,
        kv_cache_dtype=options.cache,
        enable_prefix_caching=False,
        num_pages=cache_pages(max(options.batch), options.length, options.new, EngineConfig.page_size),
    )
    engine = Engine(model, None, config)
    engine.generate([[1] * options.length], SamplingParams(max_tokens=1, temperature=0))
    print(json.dumps({"start to first token, s": round(time.perf_counter() - began, 1)}), flush=True)
    rows = []
    for batch in options.batch:
        found = measured(engine, batch, options.length, options.new)
        rows.append(
            {"batch": batch, **{name: round(value, 3) for name, value in found.items()}, "vLLM ms": VLLM.get(batch)}
        )
        print(json.dumps(rows[-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
