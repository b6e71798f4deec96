"""Does drafting pay? Tokens per second of a trained model at every depth of drafting.

    python benchmarks/speculative.py RUN --drafts 0 1 2 3 --output rows.json

RUN is the folder of a `benthic demo` run: the model that `--stage` left, or RUN/model, continues windows of its own
held-out text, one request after the other (`--batch` 1) or several at once; BF16 weights, greedy, or sampled with
`--temperature`. The first line of each batch is the baseline, without drafts: same engine, same prompts. Every answer
is compared with it; in BF16 two likeliest tokens that tie may fall either way where the shape of a step differs, so
the share of tokens before the first difference is reported.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benthic.data.shards import Shards
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.stats import Stats
from benthic.model import hf
from benthic.model.transformer import Transformer
from benthic.train import checkpoint


def load(run: Path, stage: str, device: str) -> Transformer:
    """The model of a run, cast to BF16 on a GPU as kernels want it."""
    saved = checkpoint.newest(run / stage / "checkpoints") if stage else None
    folder = run / "model" if saved is None else saved.folder / "model"
    return hf.load(folder, device, "bfloat16" if device == "cuda" else "float32")[0]


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of tokens before the first difference of each pair."""
    same = 0
    for a, b in zip(ours, theirs):
        same += next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
    return same / sum(map(len, ours))


def measured(engine: Engine, prompts: list[list[int]], batch: int, params: SamplingParams) -> dict[str, Any]:
    """All prompts, `batch` at once, twice: the first time compiles kernels and captures graphs."""
    seconds, answers = 0.0, []
    for _ in range(2):
        engine.stats = Stats()
        answers = []
        begin = time.perf_counter()
        for at in range(0, len(prompts), batch):
            answers += [output.token_ids for output in engine.generate(prompts[at : at + batch], params)]
        seconds = time.perf_counter() - begin
    stats = engine.stats
    return {
        "tokens_per_s": sum(map(len, answers)) / seconds,
        "us_per_step": 1e6 * seconds / stats.steps,
        "tokens_per_step": stats.tokens_per_row,
        "accepted_at": stats.acceptance_at,
        "answers": answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", default="pretrain", help="'' takes RUN/model")
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--adaptive", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model = load(options.run, options.stage, "cuda" if torch.cuda.is_available() else "cpu")
    text = Shards.open(options.run / "corpus" / "heldout")
    apart = max(options.length, (text.num_tokens - options.length) // options.prompts)
    prompts = [text.read(i * apart, i * apart + options.length).tolist() for i in range(options.prompts)]
    params = SamplingParams(max_tokens=options.new, temperature=options.temperature, seed=1)
    rows: list[dict[str, Any]] = []
    print("batch  drafts  tokens/s  ratio  us/step  tokens/step  accepted at 1, 2, ...  agreement")
    for batch in options.batch:
        base: dict[str, Any] = {}
        for drafts in options.drafts:
            config = EngineConfig(
                max_num_seqs=batch, max_model_len=options.length + options.new, num_speculative_tokens=drafts,
                adaptive_speculation=options.adaptive, enable_prefix_caching=False,
            )  # fmt: skip
            found = measured(Engine(model, None, config), prompts, batch, params)
            base = base or found
            row = {"batch": batch, "drafts": drafts} | found
            row |= {
                "ratio": found["tokens_per_s"] / base["tokens_per_s"],
                "agreement": agreement(base["answers"], row.pop("answers")),
            }
            rows.append(row)
            accepted = " ".join(f"{share:.0%}" for share in row["accepted_at"])
            print(
                f"{batch:5}  {drafts:6}  {row['tokens_per_s']:8.0f}  {row['ratio']:5.2f}  {row['us_per_step']:7.0f}  "
                f"{row['tokens_per_step']:11.2f}  {accepted:21}  {row['agreement']:.0%}",
                flush=True,
            )
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
