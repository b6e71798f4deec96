"""One of several processes that share models: `python sharing.py RANK SIZE FOLDER CASE...`.

Each case runs in all of them; rank 0 compares with the whole model in one process and leaves what it found in FOLDER.
"""

import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore

from benthic.base import tensors
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Output, Request
from benthic.inference.share import Share, ShareOf
from benthic.model import hf
from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.parallel import ranks as module
from benthic.parallel.config import ParallelConfig
from benthic.parallel.ranks import Ranks

V3 = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64, moe_intermediate_size=32,
    n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, max_position_embeddings=96,
)  # fmt: skip
V2 = dataclasses.replace(
    V3, model_type="deepseek_v2", q_lora_rank=None, scoring_func="softmax", topk_method="group_limited_greedy",
    norm_topk_prob=False, n_shared_experts=2, num_nextn_predict_layers=0, vocab_size=61,
)  # fmt: skip
V1 = ModelConfig(
    model_type="llama", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, head_dim=8, kv_lora_rank=None, q_lora_rank=None, intermediate_size=48,
    n_routed_experts=0, first_k_dense_replace=2, num_nextn_predict_layers=0, max_position_embeddings=96,
)  # fmt: skip
QWEN = dataclasses.replace(V1, model_type="qwen2", tie_word_embeddings=True)
WIDE = dataclasses.replace(  # wide enough for the kernels
    V3, num_hidden_layers=2, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
)
BROAD = dataclasses.replace(  # whose slices are wider than a page of the disk
    V3, hidden_size=256, num_hidden_layers=2, moe_intermediate_size=2048, intermediate_size=2048, v_head_dim=512,
    q_lora_rank=None,
)  # fmt: skip
SLICED, PLACED = ParallelConfig(), ParallelConfig(enable_expert_parallel=True)
SPARE = dataclasses.replace(PLACED, num_redundant_experts=4)
GREEDY = SamplingParams(max_tokens=8, temperature=0)
DRAWN = [
    SamplingParams(max_tokens=6, seed=1),
    SamplingParams(max_tokens=6, seed=2, temperature=0.7, top_k=20, min_tokens=3, logit_bias={5: 2.5}),
    SamplingParams(max_tokens=6, seed=3, repetition_penalty=1.3, logprobs=2),
    GREEDY,
]


def whole(config: ModelConfig) -> Transformer:
    """Random weights whose answers depend on all of their context; gate biases of both signs."""
    model = initialise(Transformer(config), std=0.15, seed=0)
    generator = torch.Generator().manual_seed(0)
    for gate in model.gates():
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias.copy_(torch.randn(config.n_routed_experts, generator=generator) * 0.1)
    return model.eval()


def share(model: Transformer, parallel: ParallelConfig, ranks: Ranks) -> Share:
    """This rank's share of a model in memory, on its device."""
    part = ShareOf(parallel, ranks)
    found, views = part.empty(model.config, str(model.embed_tokens.weight.device), model.dtype), hf.checkpoint_views
    tensors = dict(views(model))
    with torch.no_grad():
        for name, view in part.places(found):
            view.copy_(tensors[name][part.index(tuple(view.shape), tuple(tensors[name].shape))])
    return found.eval()  # type: ignore[return-value]


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(2, 61) for _ in range(n)] for n in lengths]


def seen(outputs: list[Output]) -> list[Any]:
    return [[o.token_ids, [round(p, 3) for p in o.logprobs], o.finish_reason, prompt_of(o)] for o in outputs]


def prompt_of(output: Output) -> list[Any]:
    """What it says of its prompt."""
    places = [place for place in output.prompt_logprobs or [] if place is not None]
    return [[round(p.logprob, 3), p.rank, [[token, round(top, 3)] for token, top in p.top]] for p in places]


def compare(
    ranks: Ranks, config: ModelConfig, parallel: ParallelConfig, asked: list[list[int]], params: Any = GREEDY,
    more: Callable[[Engine], Any] | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Logits of one text, then the answers of the engine, of the whole model and of the shared one."""
    model = whole(config)
    mine = share(model, parallel, ranks)
    ids = torch.tensor(prompts(30))
    with torch.no_grad():
        apart = (mine(ids) - model(ids)).abs().max().item()
    settings = {"page_size": 8, "max_model_len": 80, "max_num_seqs": 4, "num_pages": 60} | settings
    # The others have settings of their own, which do not count.
    engine = Engine(mine, None, EngineConfig(**settings) if ranks.rank == 0 else None)
    if ranks.rank:
        engine.follow()
        return {}
    plain = Engine(model, None, EngineConfig(**settings | {"backend": "plain"}))
    facts = {"apart": apart, "expected": seen(plain.generate(asked, params))}
    facts |= {"found": seen(engine.generate(asked, params))}
    if more is not None:
        facts["more"] = more(engine)
        facts["again"] = seen(engine.generate(asked, params))
    facts |= {"preemptions": engine.stats.preemptions, "accepted": engine.stats.accepted}
    facts |= {"plain": [plain.stats.preemptions, plain.stats.accepted]}
    engine.close()
    return facts


def rebalanced(engine: Engine) -> Any:
    """Place experts anew while a request runs; -> its answer, and what the measured load had to do with it."""
    model: Share = engine.model  # type: ignore[assignment]
    before = model.placement
    (prompt,) = prompts(20)
    engine.add(Request(prompt_token_ids=prompt, params=GREEDY))
    outputs, steps = [], 0
    load = None
    while engine.busy:
        outputs += engine.step().outputs
        steps += 1
        if steps == 3:
            load = torch.stack([mixture.load for mixture in model.mixtures]).numpy()
            engine.rebalance()
    after = model.placement
    assert before is not None and after is not None and load is not None  # noqa: PT018
    return {
        "answer": seen(outputs),
        "moved": int((before.physical_to_logical != after.physical_to_logical).sum()),
        "imbalance": [before.imbalance(load).mean(), after.imbalance(load).mean()],
        "load": int(load.sum()),
    }


def kernels(ranks: Ranks, parallel: ParallelConfig) -> dict[str, Any]:
    """The runner on kernels, where there is no GPU in Triton's interpreter and without graphs."""
    os.environ["TRITON_INTERPRET"] = "1"
    from test_fused_runner import Host

    from benthic.inference import fused_runner

    fused_runner.Cuda = Host  # type: ignore[assignment]
    settings = {"page_size": 16, "num_pages": 20, "max_model_len": 64, "num_speculative_tokens": 1}
    short = dataclasses.replace(GREEDY, max_tokens=3)
    return compare(ranks, WIDE, parallel, prompts(4, 18), short, backend="fused", **settings)


def primitives(ranks: Ranks) -> dict[str, Any]:
    """What every rank gets of each kind of exchange. Messages are shorter and longer than what travels at once."""
    mine, n = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * 10**ranks.rank, ranks.size
    heard = []
    for length in (3, module.FIRST, 100_000):
        message = {"do": "x" * length}
        if ranks.rank == 0:
            ranks.tell(message)
        heard.append((message if ranks.rank == 0 else ranks.hear()) == message)
    to, source = (ranks.rank + 1) % n, (ranks.rank - 1) % n
    got = torch.empty(2, 2)
    ranks.exchange([(mine, to)], [(got, source)])
    return {
        "sum": ranks.sum(mine.clone()).tolist(),
        "gather": ranks.gather(mine).tolist(),
        "agree": ranks.agree(mine.T).tolist(),
        "least": ranks.least(7 - ranks.rank),
        "same": ranks.same(ParallelConfig(enable_expert_parallel=ranks.rank == 0)).enable_expert_parallel,
        "heard": heard,
        "got": got.tolist(),
    }


def loading(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Every rank reads its part of a checkpoint, in BF16-like slices and in FP8 blocks, and counts what it read."""
    facts: dict[str, Any] = {}
    for kind, parallel in (("sliced", SLICED), ("placed", SPARE), ("fp8", SLICED)):
        read = [0]
        true = tensors.TensorFile._read

        def counted(self, name, start, stride, found, read=read, true=true):
            found = list(found)
            read[0] += sum(t.nbytes for t in found)
            true(self, name, start, stride, found)

        path = folder / ("checkpoint-fp8" if kind == "fp8" else "checkpoint")
        model, _ = hf.load(path, device="cpu")
        tensors.TensorFile._read = counted  # type: ignore[method-assign]
        mine, _ = hf.load(path, device="cpu", part=ShareOf(parallel, ranks))
        tensors.TensorFile._read = true  # type: ignore[method-assign]
        expected = share(model, parallel, ranks).state_dict()
        facts[kind] = {
            "same": all(torch.equal(t, expected[name]) for name, t in mine.state_dict().items()),
            "read": read[0],
            "file": sum(file.stat().st_size for file in path.glob("*.safetensors")),
            "checks": 4 * model.embed_tokens.weight.nbytes,
            "held": sum(t.nbytes for t in mine.parameters()),
        }
    return facts


def run(case: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    some, drafting = prompts(5, 21, 1, 33, 16), {"num_speculative_tokens": 1}
    match case:
        case "v3":
            return compare(ranks, V3, SLICED, some, **drafting)
        case "v3 placed":
            return compare(ranks, V3, PLACED, some, **drafting)
        case "v3 chunks":
            of_prompt = dataclasses.replace(GREEDY, prompt_logprobs=2)
            return compare(ranks, V3, PLACED, some, of_prompt, max_num_batched_tokens=16)
        case "v2":
            return compare(ranks, V2, SLICED, some)
        case "v2 placed":
            return compare(ranks, V2, PLACED, some)
        case "v1":
            return compare(ranks, V1, SLICED, some)
        case "qwen":
            return compare(ranks, QWEN, SLICED, some)
        case "drawn":
            return compare(ranks, V3, PLACED, prompts(9, 18, 4, 12), DRAWN, **drafting)
        case "prefix":
            (start,) = prompts(40)
            return compare(ranks, V3, PLACED, [start] + [start + tail for tail in prompts(3, 9, 20)])
        case "preempted":
            longer = dataclasses.replace(GREEDY, max_tokens=30)
            return compare(ranks, V2, PLACED, prompts(15, 14, 15, 13), longer, num_pages=14)
        case "rebalanced":
            return compare(ranks, V3, SPARE, some, more=rebalanced, **drafting)
        case "every third step":
            return compare(ranks, V3, dataclasses.replace(SPARE, eplb_step_interval=3), some)
        case "kernels":
            return kernels(ranks, SLICED)
        case "kernels placed":
            return kernels(ranks, SPARE)
        case "primitives":
            return primitives(ranks)
        case "loading":
            return loading(ranks, folder)
        case "leader fails":
            return leader_fails(ranks)
        case "raises":
            return raises(ranks)
        case "killed":
            return raises(ranks, kill=True)
    raise ValueError(case)


def raises(ranks: Ranks, kill: bool = False) -> dict[str, Any]:
    """The last rank fails in its third pass, or is gone without a word. Nobody may hang."""
    mine = share(whole(V3), PLACED, ranks)
    engine = Engine(mine, None, EngineConfig(page_size=8, max_model_len=80, num_pages=60))
    if ranks.rank == ranks.size - 1:
        passes, true = [0], mine.hidden

        def hidden(*args: Any, **kwargs: Any) -> Any:
            passes[0] += 1
            if passes[0] == 3:
                if kill:
                    os._exit(9)
                raise RuntimeError("the third pass is one too many")
            return true(*args, **kwargs)

        mine.hidden = hidden  # type: ignore[method-assign]
    if ranks.rank:
        engine.follow()
        return {}
    try:
        engine.generate(prompts(5, 9), GREEDY)
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": "", "message": "nothing was raised"}


def leader_fails(ranks: Ranks) -> dict[str, Any]:
    """Rank 0 fails before it tells the others of its step, and lives on until they have ended."""
    module.GRACE_S = 0.5
    engine = Engine(share(whole(V3), PLACED, ranks), None, EngineConfig(page_size=8, max_model_len=80, num_pages=60))
    if ranks.rank:
        engine.follow()
        return {}

    def tell(message: dict[str, Any]) -> None:
        raise RuntimeError("before anything was told")

    ranks.tell = tell  # type: ignore[method-assign]
    try:
        engine.generate(prompts(5), GREEDY)
    except RuntimeError:
        time.sleep(2)
    return {}


def main(rank: int, size: int, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    store = FileStore(str(folder / "store"), size)
    ranks = Ranks(store, rank, size, local_size=size, device=torch.device("cpu"))
    for case in cases:
        facts = run(case, ranks, folder)
        (folder / f"{case}-{rank}.json").write_text(json.dumps(facts))
    ranks.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
