"""How fast is a model that two GPUs share, and what do the sums between them cost?

    torchrun --nproc-per-node 2 benchmarks/parallel_serving.py --model v2-lite --output rows.json

Random weights and tokens, BF16. Every step runs on the whole model on one GPU, then on its shares: `sliced`, each
expert split, and `placed`, whole experts on either GPU. --check compares the hidden states of four layers first, of
`spare` too, which has more copies, before and after experts have moved. Times: decode steps (CUDA graphs: all layers,
output head, likeliest token), what the sums are of them (the same without, which computes nonsense), a step of prompts,
and the whole engine; sums through shared memory and through NCCL.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode import PAGE, decode_tokens, milliseconds, prompt_tokens, shape
from torch import Tensor

from benthic.inference.config import EngineConfig
from benthic.inference.engine import Engine
from benthic.inference.fused import Fused, Tokens
from benthic.inference.rebalance import better, move
from benthic.inference.rebalance import measured as measured_load
from benthic.inference.share import Share, ShareOf
from benthic.jobs.bench import cache_pages, measured, random_model
from benthic.model import hf
from benthic.model.cache import LatentCache
from benthic.model.config import ModelConfig
from benthic.model.transformer import Transformer
from benthic.parallel.config import ParallelConfig
from benthic.parallel.ranks import Ranks
from benthic.recipes.models import MODELS


def share(model: Transformer, parallel: ParallelConfig, ranks: Ranks) -> Share:
    """This rank's share of a model in memory."""
    part, whole = ShareOf(parallel, ranks), dict(hf.checkpoint_views(model))
    found = part.empty(model.config, str(model.embed_tokens.weight.device), model.dtype)
    with torch.no_grad():
        for name, view in part.places(found):
            view.copy_(whole[name][part.index(tuple(view.shape), tuple(whole[name].shape))])
    return found.eval()  # type: ignore[return-value]


def random_share(config: ModelConfig, parallel: ParallelConfig, ranks: Ranks) -> Share:
    """A share with random weights; what is whole everywhere is the same on all ranks."""
    mine = ShareOf(parallel, ranks).empty(config, f"cuda:{ranks.rank}", torch.bfloat16)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in mine.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)
    return mine.eval()


def graph_of(step: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    """`step` captured, after it has run twice."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph


def forward_of(model: Transformer, slots: int) -> Fused:
    """The kernels over a cache that is full of the same random latents on every rank."""
    torch.manual_seed(2)
    cache = LatentCache(model.config, slots, "cuda", torch.bfloat16)
    for layer in cache.layers:
        c_kv = torch.randn(slots, layer.width, device="cuda")
        layer.write(torch.arange(slots, device="cuda"), c_kv, torch.randn_like(layer.k_rope))
    return Fused(model, cache, PAGE)


def seeded(make: Callable[..., Tokens], *arguments: Any) -> Tokens:
    """The same random tokens on every rank."""
    torch.manual_seed(3)
    return make(*arguments)


def without_sums(forward: Fused) -> None:
    """Computes nonsense, in the time that computing takes."""

    class Silent:
        size = 2

        def sum(self, x: Tensor) -> Tensor:
            return x

    forward.ranks = Silent()  # type: ignore[assignment]


def times(name: str, model: Transformer, options: argparse.Namespace) -> dict[str, Any]:
    """ms of decode steps and of a step of prompts."""
    widest = max(*options.batch, 1) * -(-options.context // PAGE) + 2 + options.prompts * 1024 // PAGE
    forward = forward_of(model, PAGE * widest)
    row: dict[str, Any] = {"model": name}
    for batch in options.batch:
        tokens = seeded(decode_tokens, model, batch, options.context)

        def step(tokens: Tokens = tokens) -> Tensor:
            return model.logits(forward.hidden(tokens)).argmax(-1)

        graph = graph_of(step)
        row[f"decode {batch}"] = milliseconds(graph.replay, 50)
        del graph
    tokens = seeded(prompt_tokens, model, options.prompts, 1024)
    forward.hidden(tokens)
    row[f"{options.prompts} x 1024"] = milliseconds(lambda: forward.hidden(tokens), 5)
    if isinstance(model, Share):
        without_sums(forward)
        for batch in options.batch:
            tokens = seeded(decode_tokens, model, batch, options.context)
            graph = graph_of(lambda tokens=tokens: model.logits(forward.hidden(tokens)).argmax(-1))
            alone = milliseconds(graph.replay, 50)
            row[f"sums {batch}"] = row[f"decode {batch}"] - alone
            del graph
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def compare(config: ModelConfig, ranks: Ranks, kinds: dict[str, ParallelConfig]) -> list[dict[str, Any]]:
    """Hidden states of shares beside those of the whole model, before and after experts have moved."""
    model = random_model(config, "cuda", torch.bfloat16)
    steps = [(decode_tokens, 1, 200), (decode_tokens, 256, 200), (prompt_tokens, 2, 256)]
    forward = forward_of(model, PAGE * 2000)
    expected = [forward.hidden(seeded(make, model, *numbers)).clone() for make, *numbers in steps]
    rows = []
    for name, parallel in kinds.items():
        mine = share(model, parallel, ranks)

        def errors(mine: Share = mine) -> list[float]:
            forward, found = forward_of(mine, PAGE * 2000), []  # a new cache: the prompts have written into the old one
            for (make, *numbers), right in zip(steps, expected):
                hidden = forward.hidden(seeded(make, mine, *numbers))
                if not torch.equal(ranks.agree(hidden.clone()), hidden):
                    raise RuntimeError("ranks differ")
                found.append(round(((hidden - right).float().norm() / right.float().norm()).item(), 4))
            return found

        row: dict[str, Any] = {"check": name, "errors": errors()}
        if mine.placement is not None:
            before = mine.placement
            after = better(mine, before)
            row["imbalance"] = [round(float(p.imbalance(measured_load(mine)).mean()), 3) for p in (before, after)]
            move(mine, before, after)
            row["after moving"] = errors()
        rows.append(row)
    return rows


def engine_rows(name: str, model: Transformer, ranks: Ranks, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole engines: scheduler, messages, sampler and all."""
    length, new = 128, 64  # all prompts in one step
    pages = cache_pages(max(options.engine), length, new, EngineConfig.page_size)
    config = EngineConfig(
        max_num_seqs=max(options.engine), max_model_len=length + new, enable_prefix_caching=False, num_pages=pages
    )
    if ranks.rank and not isinstance(model, Share):
        return []
    engine = Engine(model, None, config)
    if ranks.rank:
        engine.follow()
        return []
    rows = []
    for batch in options.engine:
        found = measured(engine, batch, length, new)
        rows.append({"engine": name, "batch": batch} | {key: round(value, 2) for key, value in found.items()})
    engine.close()
    return rows


def fifty(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same 50 times over."""

    def all() -> Tensor:
        for _ in range(49):
            work()
        return work()

    return all


def messages(ranks: Ranks) -> dict[str, Any]:
    """Microseconds of one sum inside a graph of 50, by tokens of V2-Lite's width; and of one message."""
    row: dict[str, Any] = {"microseconds": "NCCL" if ranks.shared is None else "shared memory"}
    for n in (1, 32, 256, 1000, 8192):
        x = torch.zeros(n, 2048, dtype=torch.bfloat16, device="cuda")
        graph = graph_of(fifty(lambda x=x: ranks.sum(x)))
        row[str(n)] = round(milliseconds(graph.replay, 20) / 50 * 1e3, 2)
        del graph
    start = time.perf_counter()
    for _ in range(200):
        ranks.tell({"do": "nothing", "rows": list(range(200))}) if ranks.rank == 0 else ranks.hear()
    ranks.least(0)
    row["message"] = round((time.perf_counter() - start) / 200 * 1e6, 1)
    return row


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="v2-lite", choices=MODELS)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--engine", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, default=1088)
    parser.add_argument("--prompts", type=int, default=8, help="prompts of 1024 tokens in one step")
    parser.add_argument("--spare", type=int, default=8, help="redundant experts")
    parser.add_argument("--check", nargs="*", default=[], help="compare these shares of four layers with the whole")
    parser.add_argument("--skip-one", action="store_true", help="leave out the whole model on one GPU")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    ranks, rows = Ranks.join("cuda"), []
    placed = ParallelConfig(enable_expert_parallel=True)
    spare = ParallelConfig(enable_expert_parallel=True, num_redundant_experts=options.spare)
    kinds = {"sliced": ParallelConfig(), "placed": placed, "spare": spare}

    def show(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        for row in more if ranks.rank == 0 else []:
            print(json.dumps(row), flush=True)
        if options.output and ranks.rank == 0:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")

    config, buffer = shape(options.model, options.layers), ranks.shared
    if options.check:
        show(compare(shape(options.model, 4), ranks, {name: kinds[name] for name in options.check}))
    show([messages(ranks)])
    if not options.skip_one:
        model = random_model(config, "cuda", torch.bfloat16)
        show([times("one GPU", model, options)])
        show(engine_rows("one GPU", model, ranks, options))
        del model
        torch.cuda.empty_cache()
    part = {name: kinds[name] for name in ("sliced", "placed")}
    for name, parallel in part.items():
        mine = random_share(config, parallel, ranks)
        show([times(name, mine, options)])
        show(engine_rows(name, mine, ranks, options))
        ranks.shared = None
        show([times(f"{name}, NCCL", mine, options)])
        ranks.shared = buffer
        del mine
        torch.cuda.empty_cache()
    ranks.shared = None
    show([messages(ranks)])
    ranks.leave()


if __name__ == "__main__":
    main()
