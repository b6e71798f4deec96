"""Does a request's company change its answer, and what does it cost that it does not?

    python benchmarks/deterministic.py --model v2-lite --output rows.json

Random BF16 weights, one GPU. First every request alone, without cached prefixes; then all at once, with prompts in
chunks, prefixes found in the cache, too few pages, and drafts where the model has a module for them. Counted are the
requests whose tokens, log-probabilities or experts differ in any bit; the engine in its ordinary mode is the negative
control. Then steps of decode rows and steps of prompts, as `benchmarks/engine.py` times them: deterministic, ordinary,
and ordinary with the experts of every token returned.
"""

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path

import numpy as np
import torch

from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Output, Request
from benthic.jobs.bench import cache_pages, measured, random_model
from benthic.model.config import ModelConfig
from benthic.model.transformer import Transformer
from benthic.recipes.models import MODELS


def shape(name: str, layers: int, modules: int) -> ModelConfig:
    """A preset of so many layers (0: all) and prediction modules."""
    config = MODELS[name]()
    layers = layers or config.num_hidden_layers
    return dataclasses.replace(config, num_hidden_layers=layers, num_nextn_predict_layers=modules)


def work(count: int, vocab_size: int) -> list[Request]:
    """Prompts of 1 to 700 tokens, some of which begin alike; greedy and drawn answers of 40 to 80 tokens. Some rank
    before others, which step back for them where pages are short."""
    rng = random.Random(0)
    begin = [rng.randrange(vocab_size) for _ in range(300)]
    requests = []
    for i in range(count):
        own = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 400))]
        drawn = {"top_p": 0.9, "repetition_penalty": 1.2} if i % 4 == 1 else {}
        params = SamplingParams(max_tokens=rng.randint(40, 80), temperature=i % 2, logprobs=2, seed=i, **drawn)
        prompt = begin[: rng.randint(64, 300)] + own if i % 3 else own
        requests.append(Request(prompt_token_ids=prompt, params=params, priority=rng.randrange(4)))
    return requests


def answers(engine: Engine, requests: list[Request], together: bool) -> list[Output]:
    """Outputs in the order of the requests; the engine gets them in another, one per step."""
    if not together:
        return [engine.generate([r.prompt_token_ids], r.params)[0] for r in requests]
    order = random.Random(1).sample(range(len(requests)), len(requests))
    ids, found, left = {}, {}, list(order)
    while left or engine.busy:
        if left:
            place = left.pop()
            ids[engine.add(requests[place])] = place
        found |= {ids[output.request_id]: output for output in engine.step().outputs}
    return [found[place] for place in range(len(requests))]


def differing(one: list[Output], other: list[Output]) -> int:
    """Requests with any bit of tokens, log-probabilities, reports or experts changed."""
    return sum(
        (a.token_ids, a.logprobs, a.top_logprobs) != (b.token_ids, b.logprobs, b.top_logprobs)
        or not np.array_equal(a.routed_experts, b.routed_experts)  # type: ignore[arg-type]
        for a, b in zip(one, other, strict=True)
    )


def check(model: Transformer, requests: list[Request], deterministic: bool) -> dict:
    """Alone against several kinds of company."""
    limits = EngineConfig(
        max_model_len=1024, num_pages=1200, max_num_seqs=64, deterministic=deterministic, return_routed_experts=True
    )
    alone = answers(Engine(model, None, dataclasses.replace(limits, enable_prefix_caching=False)), requests, False)
    kinds = {
        "whole prompts": limits,
        "chunks of 300": dataclasses.replace(limits, max_num_batched_tokens=300),
        "short of pages": dataclasses.replace(limits, num_pages=40, max_num_batched_tokens=1000),
    }
    if model.config.num_nextn_predict_layers:
        kinds["drafts"] = dataclasses.replace(limits, num_speculative_tokens=1)
    row: dict = {"deterministic": deterministic, "requests": len(requests)}
    for name, config in kinds.items():
        engine = Engine(model, None, config)
        row[name] = differing(alone, answers(engine, requests, True))
        if name == "short of pages":
            row["preemptions"] = engine.stats.preemptions
        if name == "drafts":
            row["acceptance"] = round(engine.stats.acceptance, 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="v2-lite", choices=MODELS)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--modules", type=int, default=0, help="multi-token prediction modules")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32, 256])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model = random_model(shape(options.model, options.layers, options.modules), "cuda", torch.bfloat16)
    rows, start = [], time.perf_counter()

    def report(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), f"{time.perf_counter() - start:.0f} s", flush=True)

    for deterministic in (True, False):
        if options.requests:
            few = options.requests if deterministic else min(16, options.requests)
            report(check(model, work(few, model.config.vocab_size), deterministic))
    most = max(options.batch, default=0)
    config = EngineConfig(
        max_num_seqs=max(most, 1), max_model_len=options.length + options.new, enable_prefix_caching=False,
        num_pages=cache_pages(max(most, 1), options.length, options.new, EngineConfig.page_size),
    )  # fmt: skip
    for mode in ({"deterministic": True}, {}, {"return_routed_experts": True}) if most else ():
        engine = Engine(model, None, dataclasses.replace(config, **mode))
        for batch in options.batch:
            found = measured(engine, batch, options.length, options.new)
            names = ("ms_per_step", "prompt_tokens_per_s")
            report(mode | {"batch": batch} | {name: round(found[name], 3) for name in names})
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
