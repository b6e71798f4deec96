"""Does reinforcement learning lift pass@1 in every seed? Runs the whole demo once per seed and prints one table.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --recipe tiny --output-dir runs/seeds

Baseline of each row: the model that RL starts from, on the same held-out problems. Rows also go to
benchmarks/results/demo_seeds-<recipe>.json.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def row(folder: Path, seconds: float) -> dict[str, object]:
    """What one finished run says about itself."""
    found = json.loads((folder / "results.json").read_text())
    before, after = found["rl"]["before"], found["rl"]["after"]
    return {
        "seed": found["seed"],
        "pass@1 before": before["pass@1"],
        "pass@1 after": after["pass@1"],
        "gain": after["pass@1"][0] - before["pass@1"][0],
        "pass@8 before": before["pass@8"],
        "pass@8 after": after["pass@8"],
        "bits per byte": found["bits_per_byte"]["model"],
        "gzip": found["bits_per_byte"]["gzip"],
        "MaxVio": found["balance"]["with_bias"],
        "MaxVio without bias": found["balance"]["without_bias"],
        "MTP acceptance": found["speculative"]["acceptance"],
        "seconds": round(seconds),
        "peak GB": round(found["peak_memory_gb"], 2),
        "torch": found["machine"]["torch"],
        "platform": platform.platform(),
    }


def cell(value: object) -> str:
    """Estimates as their value; numbers short."""
    if isinstance(value, list):
        value = value[0]
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--recipe", default="tiny")
    options.add_argument("--output-dir", type=Path, default=Path("runs/seeds"))
    chosen = options.parse_args()
    rows = []
    for seed in chosen.seeds:
        folder = chosen.output_dir / f"{chosen.recipe}-{seed}"
        start = time.perf_counter()
        command = ["demo", "--recipe", chosen.recipe, "--seed", str(seed), "--output-dir", str(folder)]
        subprocess.run([sys.executable, "-m", "benthic", *command], check=True)
        rows.append(row(folder, time.perf_counter() - start))
    columns = [name for name in rows[0] if name not in ("torch", "platform")]
    print(" | ".join(columns))
    for values in rows:
        print(" | ".join(cell(values[name]) for name in columns))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"demo_seeds-{chosen.recipe}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
