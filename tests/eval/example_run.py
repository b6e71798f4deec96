"""A run that never was: the files of a finished run with believable numbers, for tests of the report."""

import json
from pathlib import Path

import numpy as np

STEPS = 300


def rows(seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    out: list[dict] = []
    start = rng.normal(0, 0.6, (2, 8))
    for step in range(1, STEPS + 1):
        loss = 3.1 + 5.2 * np.exp(-step / 35) + rng.normal(0, 0.06)
        skew = 1 + start * np.exp(-step / 45) + rng.normal(0, 0.06, (2, 8))
        load = np.maximum(skew, 0.02)
        row = {"stage": "pretrain", "step": step, "time": 1000.0 + step, "loss": float(loss)}
        row |= {"mtp_loss": float(loss + 0.9), "balance_loss": 1.0, "lr": 3e-3, "grad_norm": 0.7, "tokens": 2048 * step}
        row |= {"tokens_per_s": 7100.0, "max_violation": float((load / load.mean(1, keepdims=True)).max() - 1)}
        if step % 5 == 0 or step == 1:
            row["expert_load"] = (load / load.sum(1, keepdims=True)).tolist()
        out.append(row)
        if step % 20 == 0 or step == 1:
            bits = 1.86 + 2.6 * np.exp(-step / 40)
            out.append({"stage": "pretrain", "step": step, "heldout_bits_per_byte": bits, "heldout_mtp_loss": loss + 1})
    for step in range(1, 201):
        vio = 1.9 - 1.0 * np.exp(-step / 30) + rng.normal(0, 0.15)
        out.append({"stage": "balance_off", "step": step, "loss": 4.0, "max_violation": float(vio)})
    for step in range(1, 61):
        out.append({"stage": "sft", "step": step, "loss": float(0.4 + 2 * np.exp(-step / 15))})
    for step in range(1, 41):
        right = 0.25 + 0.45 / (1 + np.exp(-(step - 16) / 5)) + rng.normal(0, 0.03)
        form = 0.93 + 0.06 * (1 - np.exp(-step / 8)) + rng.normal(0, 0.006)
        row = {"stage": "grpo", "step": step, "reward": right + form, "accuracy": right, "format": form}
        row |= {"length": 8 + 7 / (1 + np.exp(-(step - 14) / 5)), "kl": 0.002 * step, "clip_fraction": 0.02}
        out.append(row | {"zero_std_groups": 0.2 + 0.005 * step, "entropy": 0.5 * float(np.exp(-step / 30))})
    return out


def sample(prompt: str, thought: str, said: str, answer: str, when: str) -> dict:
    text = f"<think>{thought}</think>{said}"
    return {"prompt": prompt, "text": text, "answer": answer, "correct": said == answer, "when": when}


def results() -> dict:
    return {
        "recipe": "tiny",
        "seed": 0,
        "machine": {"cpu": "2 cores", "python": "3.11.2", "torch": "2.13.0", "git": "95aaec4", "threads": "2"},
        "config": {"model": {"hidden_size": 128, "num_hidden_layers": 3, "rope_scaling": None}, "seed": 0, "tags": []},
        "wall_seconds": {"data": 9.1, "tokenizer": 5.2, "pretrain": 112.0, "balance": 41.0, "sft": 38.5, "grpo": 62.0},
        "corpus": {
            "documents": 1843,
            "bytes": 10_312_441,
            "exact_duplicates": 61,
            "near_duplicates": 104,
            "rejected": {"too short": 93, "long lines": 12, "mostly not text": 4},
            "skipped": [{"path": "lib/test/bad_coding.py", "reason": "not UTF-8"}],
            "train_documents": 1491,
            "train_bytes": 8_211_001,
            "heldout_documents": 78,
            "heldout_bytes": 402_114,
        },
        "tokenizer": {"vocab_size": 4096, "bytes_per_token": 3.41},
        "model": {"parameters": 1_494_016, "active_parameters": 880_128, "layers": 3, "hidden_size": 128},
        "bits_per_byte": {"model": 1.86, "untrained": 3.52, "gzip": 1.94, "gzip_per_document": 2.03, "limit": 1.94},
        "balance": {"with_bias": 0.12, "without_bias": 1.91, "limit": 0.5},
        "rl": {
            "problems": 400,
            "samples": 8,
            "how": "Fine-tuned for 500 steps on worked reasoning, then for 60 on a mixture that often skips it.",
            "before": {
                "pass@1": [0.251, 0.223, 0.279],
                "pass@8": [0.84, 0.80, 0.87],
                "length": 8.4,
                "well_formed": 0.93,
            },
            "after": {
                "pass@1": [0.683, 0.655, 0.71],
                "pass@8": [0.98, 0.96, 0.99],
                "length": 15.1,
                "well_formed": 0.99,
            },
        },
        "speculative": {"identical": True, "acceptance": 0.66, "tokens_per_step": 1.66, "requests": 64},
        "speculative_sums": {"identical": True, "acceptance": 0.41, "tokens_per_step": 1.41, "requests": 64},
        "cache": {"mla": 768, "mha": 2304, "gqa": 1152, "mqa": 576},
        "absorbed_error": 2.4e-6,
        "samples": [
            sample("3+4+5+9+1=", "", "21", "22", "before"),
            sample("3+4+5+9+1=", "3\n7\n12\n21\n22", "22", "22", "after"),
            sample("9+9+0+6+2=", "9\n18\n18\n24\n26", "26", "26", "before"),
            sample("9+9+0+6+2=", "9\n18\n18\n24\n26", "26", "26", "after"),
            {"prompt": "1+1+1+1+1=", "text": "<think>1\n2", "answer": "5", "correct": False, "when": "before"},
            sample("1+1+1+1+1=", "1\n2\n3\n4\n5", "5", "5", "after"),
        ],
    }


def write_run(folder: Path, lines: list[dict] | None = None, outcome: dict | None = None) -> Path:
    """The files of a run in `folder`; defaults are the example's."""
    folder.mkdir(parents=True, exist_ok=True)
    written = rows() if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    (folder / "results.json").write_text(json.dumps(results() if outcome is None else outcome))
    return folder
