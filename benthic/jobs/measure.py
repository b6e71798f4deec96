"""What the demo measures on its own models."""

import resource
import sys
from typing import Any

import torch

from benthic.data.shards import Shards
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.model.cache import CacheView, LatentCache
from benthic.model.count import cache_elements_per_token, parameters
from benthic.model.transformer import Transformer
from benthic.tokenizer.tokenizer import Tokenizer

DRAFTS = 3  # tokens drafted per step


def speculation(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Greedy answers with and without MTP drafts: are they the same, and how many drafts were right? `acceptance` is
    that of first drafts, `acceptance_at` of the first, second and third, which a wrong one before makes wrong."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    longest = max(map(len, prompts)) + max_tokens
    plain = Engine(model, tokenizer, EngineConfig(max_model_len=longest))
    limits = EngineConfig(max_model_len=longest, num_speculative_tokens=DRAFTS, adaptive_speculation=False)
    drafting = Engine(model, tokenizer, limits)
    expected, got = plain.generate(prompts, params), drafting.generate(prompts, params)
    return {
        "identical": [o.token_ids for o in expected] == [o.token_ids for o in got],
        "requests": len(prompts),
        "tokens": sum(len(o.token_ids) for o in got),
        "acceptance": drafting.stats.acceptance_at[0] if drafting.stats.drafted else 0.0,
        "acceptance_at": drafting.stats.acceptance_at,
        "tokens_per_step": drafting.stats.tokens_per_row,
    }


@torch.no_grad()
def absorbed_error(model: Transformer, shards: Shards, length: int, rows: int) -> float:
    """Largest difference in any logit between cached absorbed decoding, token by token, and one expanded pass."""
    device = next(model.parameters()).device
    tokens = torch.from_numpy(shards.read(0, rows * length).astype("int64")).view(rows, length).to(device)
    cache = LatentCache(model.config, 1 + rows * length, device, model.dtype)
    slots = torch.arange(1, 1 + rows * length, device=device).view(rows, length)
    expanded, worst = model(tokens), 0.0
    for t in range(length):
        view = CacheView(cache, write=slots[:, t : t + 1], table=slots[:, : t + 1])
        hidden, _ = model.hidden(tokens[:, t : t + 1], torch.full((rows, 1), t, device=device), cache=view)
        worst = max(worst, (model.logits(hidden)[:, 0] - expanded[:, t]).abs().max().item())
    return worst


def facts(model: Transformer) -> dict[str, Any]:
    """Sizes of the model."""
    count = parameters(model.config)
    return {
        "parameters": count.total,
        "active_parameters": count.active,
        "mtp_parameters": count.mtp,
        "layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
        "experts": model.config.n_routed_experts,
    }


def cache_bytes(model: Transformer) -> dict[str, int]:
    """Bytes of cache per token: ours and what other attentions of the same shape would need."""
    size = 2 if model.dtype == torch.bfloat16 else 4
    return {kind: size * elements for kind, elements in cache_elements_per_token(model.config).items()}


def peak_memory_gb() -> float:
    """Largest resident size this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6 / 1.024)
