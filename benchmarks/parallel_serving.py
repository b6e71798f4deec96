"""How fast is a model that two GPUs share, and what do the sums between them cost?

    torchrun --nproc-per-node 2 benchmarks/parallel_serving.py --model v2-lite --output rows.json

Random weights and tokens, BF16. Every step runs on the whole model on one GPU, then on its shares: `sliced`, each
expert split, and `placed`, whole experts on either GPU (--spare copies more). First the hidden states are compared, and
the greedy answers of the engines; then the times of decode steps (CUDA graphs: all layers, output head, likeliest
token), the same without the sums, which computes nonsense and shows what they cost, and of a step of prompts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from decode import PAGE, decode_tokens, milliseconds, prompt_tokens, shape
from torch import Tensor

from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.fused import Fused, Tokens
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
    """Hidden states and answers of shares beside those of the whole model."""
    model = random_model(config, "cuda", torch.bfloat16)
    settings = EngineConfig(max_num_seqs=8, max_model_len=512, num_pages=80)
    params = SamplingParams(max_tokens=24, temperature=0)
    generator = torch.Generator().manual_seed(4)
    asked = [torch.randint(2, 1000, (n,), generator=generator).tolist() for n in (5, 130, 64, 300, 17, 90)]
    steps = [(decode_tokens, b, 200) for b in (1, 4, 16, 40, 256)] + [(prompt_tokens, 3, 256), (prompt_tokens, 8, 1024)]
    forward = forward_of(model, PAGE * 2000)
    expected = [forward.hidden(seeded(make, model, *numbers)).clone() for make, *numbers in steps]
    answers = [o.token_ids for o in Engine(model, None, settings).generate(asked, params)]
    rows = []
    for name, parallel in kinds.items():
        mine = share(model, parallel, ranks)
        forward, errors, same = forward_of(mine, PAGE * 2000), [], True
        for (make, *numbers), right in zip(steps, expected):
            hidden = forward.hidden(seeded(make, mine, *numbers))
            errors.append(((hidden - right).float().norm() / right.float().norm()).item())
            same = same and torch.equal(ranks.agree(hidden.clone()), hidden)
        row: dict[str, Any] = {"check": name, "errors": [round(e, 4) for e in errors], "ranks alike": same}
        del forward
        engine = Engine(mine, None, settings)
        if ranks.rank:
            engine.follow()
        else:
            found = [o.token_ids for o in engine.generate(asked, params)]
            pairs = [(a, b) for x, y in zip(answers, found) for a, b in zip(x, y)]
            row["tokens alike"] = round(statistics.mean(a == b for a, b in pairs), 3)
            if parallel.enable_expert_parallel:
                engine.rebalance()
                again = [o.token_ids for o in engine.generate(asked, params)]
                pairs = [(a, b) for x, y in zip(answers, again) for a, b in zip(x, y)]
                row["after moving"] = round(statistics.mean(a == b for a, b in pairs), 3)
            engine.close()
        rows.append(row)
        del engine, mine
    return rows


def engine_rows(name: str, model: Transformer, ranks: Ranks, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole engines: scheduler, messages, sampler and all."""
    length, new = 512, 64
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
    row: dict[str, Any] = {"microseconds": "sum"}
    for n in (1, 32, 256, 8192):
        x = torch.ones(n, 2048, dtype=torch.bfloat16, device="cuda")
        graph = graph_of(fifty(lambda x=x: ranks.sum(x)))
        row[str(n)] = round(milliseconds(graph.replay, 20) / 50 * 1e3, 2)
        del graph
    row["one shot"] = peer_sums(ranks)
    start = time.perf_counter()
    for _ in range(200):
        ranks.tell({"do": "nothing", "rows": list(range(200))}) if ranks.rank == 0 else ranks.hear()
    ranks.least(0)
    row["message"] = round((time.perf_counter() - start) / 200 * 1e6, 1)
    return row


def peer_sums(ranks: Ranks) -> dict[str, float] | str:
    """The same through memory that both GPUs see, in one shot (no multicast)."""
    import torch.distributed._symmetric_memory as symmetric

    try:
        found, group = {}, dist.group.WORLD.group_name  # type: ignore[union-attr]
        for n in (1, 32, 256):
            x = symmetric.empty(n, 2048, dtype=torch.bfloat16, device=torch.device("cuda", ranks.rank))
            symmetric.rendezvous(x, group)
            graph = graph_of(fifty(lambda x=x: torch.ops.symm_mem.one_shot_all_reduce(x, "sum", group)))
            found[str(n)] = round(milliseconds(graph.replay, 20) / 50 * 1e3, 2)
        return found
    except RuntimeError as error:
        return str(error)[:200]


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
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    ranks, rows = Ranks.join("cuda"), []
    placed = ParallelConfig(enable_expert_parallel=True)
    spare = ParallelConfig(enable_expert_parallel=True, num_redundant_experts=options.spare)
    kinds = {"sliced": ParallelConfig(), "placed": placed, f"placed + {options.spare}": spare}

    def show(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        for row in more if ranks.rank == 0 else []:
            print(json.dumps(row), flush=True)
        if options.output and ranks.rank == 0:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")

    show(compare(shape(options.model, 4), ranks, kinds))
    show([messages(ranks)])
    config = shape(options.model, options.layers)
    model = random_model(config, "cuda", torch.bfloat16)
    show([times("one GPU", model, options)])
    shares = {name: share(model, parallel, ranks) for name, parallel in list(kinds.items())[:2]}
    show(engine_rows("one GPU", model, ranks, options))
    del model
    torch.cuda.empty_cache()
    for name, mine in shares.items():
        show([times(name, mine, options)])
        show(engine_rows(name, mine, ranks, options))
    ranks.leave()


if __name__ == "__main__":
    main()
