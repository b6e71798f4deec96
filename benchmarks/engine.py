"""How fast is the whole engine: scheduler, kernels, sampler, host and all?

    python benchmarks/engine.py --batch 1 32 256 --prompts distinct alike --quantization none fp8 --output rows.json

`benthic bench decode` with the shape that other engines were measured on: random weights and prompts of 1024 random
tokens, BF16 or FP8 weights, greedy, 128 new tokens each, one GPU. Prefill: until all requests have their first token,
and `--new 1` measures prompts alone; decode: the steps after that which all requests share.

How many distinct experts a step touches decides how many weights it must read, so it is reported beside the speed, from
a second run of the same requests. Prompts that differ touch nearly all experts from 32 rows on. vLLM 0.26 on the same
chip and shape (289, 1,987, 6,710, 20,613 and 28,766 tokens/s at batch 1, 8, 32, 128, 256; 92,000 prompt tokens/s; 73 s
from start to first token) had its dummy weights, and its times are less than reading all experts takes.
`--weights dummy --prompts alike` is such a run: every parameter uniform between -0.001 and 0.001 from the same seed, so
that the output head equals the embedding and answers soon alternate between two tokens.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import VLLM, shape

from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Request
from benthic.jobs.bench import cache_pages, measured, random_model, random_prompts
from benthic.model.fp8 import to_fp8
from benthic.model.transformer import Transformer
from benthic.recipes.models import MODELS


def touched(model: Transformer, config: EngineConfig, batch: int, length: int, alike: bool) -> float:
    """Distinct experts per mixture layer and step, on average over 32 decode steps of all rows. Rows are at different
    places of their answers, because their prompts were not computed at once."""
    new, steps = 33 + batch * length // config.max_num_batched_tokens * 2, []
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    pages = cache_pages(batch, length, new, config.page_size)
    with Engine(model, None, replace(config, max_model_len=length + new, num_pages=pages)) as engine:
        prompts = random_prompts(engine.vocab_size, batch, length, alike=alike)
        given = {engine.add(Request(prompt_token_ids=prompt, params=params)): 0 for prompt in prompts}
        experts = {}
        while engine.busy:
            step = engine.step()
            if len(step.deltas) == batch and len(steps) < 32 and all(given.values()):
                steps.append({delta.request_id: length + given[delta.request_id] - 1 for delta in step.deltas})
            for delta in step.deltas:
                given[delta.request_id] += len(delta.token_ids)
            experts |= {output.request_id: output.routed_experts for output in step.outputs}
    chosen = [np.stack([experts[row][place] for row, place in step.items()], 1) for step in steps]  # [L, B, K] each
    return float(np.mean([len(np.unique(layer)) for step in chosen for layer in step]))


def dummy(model: Transformer) -> None:
    """vLLM's dummy weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            generator = torch.Generator(parameter.device).manual_seed(1234)
            parameter.uniform_(-1e-3, 1e-3, generator=generator)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="v2-lite", choices=MODELS)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prompts", nargs="+", default=["distinct"], choices=["distinct", "alike"])
    parser.add_argument("--weights", default="normal", choices=["normal", "dummy"])
    parser.add_argument("--quantization", nargs="+", default=["none"], choices=["none", "fp8"])
    parser.add_argument("--cache", default="auto", choices=["auto", "fp8", "int6"])
    parser.add_argument("--no-touched", action="store_true", help="leave the experts uncounted")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model = random_model(shape(options.model, options.layers), "cuda", torch.bfloat16)
    if options.weights == "dummy":
        dummy(model)
    rows: list[dict[str, Any]] = []
    for format in options.quantization:
        if format == "fp8":
            to_fp8(model)
        limits = {
            "max_num_seqs": max(options.batch), "max_model_len": options.length + options.new,
            "kv_cache_dtype": options.cache, "enable_prefix_caching": False,
            "num_pages": cache_pages(max(options.batch), options.length, options.new, EngineConfig.page_size),
        }  # fmt: skip
        with Engine(model, None, EngineConfig(**limits)) as engine:
            engine.generate([[1] * options.length], SamplingParams(max_tokens=1, temperature=0))
            if not rows:
                print(json.dumps({"start to first token, s": round(time.perf_counter() - began, 1)}), flush=True)
            for prompts in options.prompts:
                for batch in options.batch:
                    found = measured(engine, batch, options.length, options.new, alike=prompts == "alike")
                    row = {"weights": format, "prompts": prompts, "batch": batch, "vLLM ms": VLLM.get(batch)}
                    rows.append(row | {name: round(value, 3) for name, value in found.items()})
                    print(json.dumps(rows[-1]), flush=True)
        del engine
        torch.cuda.empty_cache()
        if options.no_touched or format == "fp8":
            continue
        for row in rows:
            config = EngineConfig(**limits, return_routed_experts=True)
            row["experts touched"] = touched(model, config, row["batch"], options.length, row["prompts"] == "alike")
            print(json.dumps({name: row[name] for name in ("prompts", "batch", "experts touched")}), flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
