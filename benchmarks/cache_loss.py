"""What does a quantised latent cache cost, in loss on held-out text?

    python benchmarks/cache_loss.py --model runs/demo/model --text held/out/texts --output rows.json

The token stream of the texts is read in windows that do not overlap; every token is predicted from the tokens before it
in its window, whose latents, like its own, attention reads back from a cache of each format. All formats read the same
windows, so the difference to `auto` is taken window by window, and its interval (95%) is that of the differences.
Needs a model with a compressed latent of a width that the formats pack: a power of two from 64.
"""

import argparse
import dataclasses
import json
import math
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import benthic
from benthic.base.errors import BenthicError, InputError
from benthic.data import sources
from benthic.data.documents import Skips
from benthic.model.cache import CacheFormat, CacheView, LatentCache, bytes_per_token
from benthic.model.config import ModelConfig
from benthic.model.hf import read_config
from benthic.model.transformer import Transformer
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.train.loss import token_logprobs

FORMATS: tuple[CacheFormat, ...] = ("auto", "fp8", "int6")
QUERIES = 128  # tokens of a pass: attention weights are [rows, heads, QUERIES, window]


def check(config: ModelConfig, length: int) -> None:
    """InputError for a model whose latents the formats do not pack, or that has not so many positions."""
    width = config.kv_lora_rank
    if width is None or width < 64 or width & (width - 1):
        raise InputError(
            f"kv_lora_rank={width}: fp8 and int6 pack latents of a power of two from 64 "
            "-> train one, e.g. benthic demo --model.kv-lora-rank 64"
        )
    if not 1 <= length <= config.max_position_embeddings:
        raise InputError(f"--length {length} -> use 1 to max_position_embeddings={config.max_position_embeddings}")


def windows(tokenizer: Tokenizer, paths: list[Path], length: int, most: int) -> Tensor:
    """[windows, length + 1] of the texts' stream, each beginning with the last token of the one before it; of more than
    `most`, so many evenly spread ones."""
    texts = [document.text for document in sources.read(paths, Skips())]
    ids = [(tokenizer.bos_id, *one, tokenizer.eos_id) for one in tokenizer.encode_batch(texts)]
    stream = torch.tensor(list(chain.from_iterable(ids)))
    if len(stream) < 2 * length + 1:
        raise InputError(f"{len(stream)} tokens of text are less than two windows of {length} -> give more text")
    found = stream.unfold(0, length + 1, length)
    count = min(len(found), most)
    return found[torch.arange(count) * len(found) // count]


@torch.no_grad()
def losses(model: Transformer, tokens: Tensor, format: CacheFormat, rows: int) -> Tensor:
    """tokens [N, L + 1] -> mean nats per token of each window [N], float64, with all latents in `format`."""
    device, length = model.head.device, tokens.shape[1] - 1
    config = dataclasses.replace(model.config, num_nextn_predict_layers=0)
    cache = LatentCache(config, 1 + rows * length, device, model.dtype, format)
    slots = torch.arange(1, 1 + rows * length, device=device).view(rows, length)
    found = []
    for part in tokens.to(device).split(rows):
        total = torch.zeros(len(part), dtype=torch.float64, device=device)
        for a in range(0, length, QUERIES):
            b = min(a + QUERIES, length)
            view = CacheView(cache, write=slots[: len(part), a:b], table=slots[: len(part), :b])
            positions = torch.arange(a, b, device=device).expand(len(part), -1)
            hidden, _ = model.hidden(part[:, a:b], positions, cache=view)  # [rows, Q, d]
            labels = part[:, a + 1 : b + 1].flatten()
            logprobs = token_logprobs(hidden.flatten(0, 1), model.head, labels)
            total -= logprobs.double().view(len(part), -1).sum(1)
        found.append(total.cpu() / length)
    return torch.cat(found)


def compare(model: Transformer, tokens: Tensor, rows: int) -> list[dict[str, Any]]:
    """One row per format."""
    table, base = [], torch.zeros(0)
    for format in FORMATS:
        loss = losses(model, tokens, format, rows)
        base = loss if format == "auto" else base
        change = loss - base
        table.append(
            {
                "cache": format,
                "bytes per token": bytes_per_token(model.config, model.dtype.itemsize, format),
                "loss": loss.mean().item(),
                "change": change.mean().item(),
                "interval": 1.96 * change.std().item() / math.sqrt(len(change)),
                "perplexity change": math.expm1(change.mean().item()),
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained model with its tokenizer")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="texts that it was not trained on")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--max-windows", type=int, default=400)
    parser.add_argument("--rows", type=int, default=8, help="windows at once")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if min(options.rows, options.max_windows - 1) < 1:
        raise InputError("--rows from 1 and --max-windows from 2 -> use larger numbers")
    check(read_config(options.model), options.length)
    model, tokenizer = benthic.load(options.model, device=options.device, dtype=options.dtype)
    if tokenizer is None:
        raise InputError(f"{options.model} has no tokenizer -> add tokenizer.json")
    tokens = windows(tokenizer, options.text, options.length, options.max_windows)
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{options.model}, {dtype}: {len(tokens)} windows of {options.length} tokens")
    table = compare(model, tokens, options.rows)
    for row in table:
        print(
            f"{row['cache']:>5} {row['bytes per token']:>8,} bytes per token  {row['loss']:.5f} nats per token  "
            f"{row['change']:+.5f} +- {row['interval']:.5f}  perplexity {row['perplexity change']:+.4%}"
        )
    if options.output:
        facts = {"windows": len(tokens), "length": options.length, "dtype": dtype}
        options.output.write_text(json.dumps([facts | row for row in table], indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except BenthicError as error:
        sys.exit(f"cache_loss: error: {error}")
