"""What a model is made of, from its configuration alone: parameters, compute, cache, memory."""

from pathlib import Path

from benthic.base.errors import InputError, did_you_mean
from benthic.jobs.config import InspectConfig
from benthic.model import count
from benthic.model.config import ModelConfig
from benthic.recipes.models import MODELS

TRAINING_BYTES = 4 + 4 + 2 + 2  # float32 master and gradient, BF16 moments (V3 Sec 3.3.3)


def run(options: InspectConfig) -> None:
    """Print the tables; with `plot`, also draw them."""
    config = find(options.model)
    print(describe(options.model, config, options.sequence_length))
    if options.plot:
        draw(options.plot, options.model, config)
        print(f"\npicture {options.plot}")


def find(model: str) -> ModelConfig:
    """The configuration of a preset, or of a folder with a `config.json`."""
    if model in MODELS:
        return MODELS[model]()
    if not (Path(model) / "config.json").is_file():
        raise InputError(f"{model!r} is neither a preset nor a folder with config.json{did_you_mean(model, MODELS)}")
    from benthic.model.hf import read_config  # needs torch, which a preset does not

    return read_config(Path(model))


def describe(name: str, config: ModelConfig, length: int) -> str:
    """The tables as text."""
    total, lines = count.parameters(config), [f"{name} ({config.model_type})", ""]
    lines += table(
        "parameters", [(part, f"{n:,}", f"{n / total.total:.1%}") for part, n in count.parts(config).items()]
    )
    lines += table("", [("total", f"{total.total:,}", ""), ("active per token", f"{total.active:,}", "")])
    if total.mtp:
        lines += table("", [(f"{config.num_nextn_predict_layers} MTP module(s) beside", f"{total.mtp:,}", "")])
    flops = count.training_flops_per_token(config, length)
    lines += table(
        f"training compute per token at {length:,} tokens",
        [
            ("exact count, causal attention, MTP", f"{flops / 1e9:,.2f} GFLOPs", ""),
            ("the papers' M (72 n d^2 + 12 n d l)", f"{count.model_scale(config, length) / 1e9:,.2f} GFLOPs", ""),
        ],
    )
    elements = count.cache_elements_per_token(config)
    own = config.cache_width * config.num_hidden_layers
    rows = [(kind.upper(), f"{2 * n:,} B", f"{n / own:.1f}x") for kind, n in elements.items()]
    if config.kv_lora_rank is not None:
        quantised = list(count.latent_bytes_per_token(config).items())[1:]
        rows += [(f"MLA, {kind}", f"{n:,} B", f"{n / own / 2:.2f}x") for kind, n in quantised]
    lines += table("cache per token (BF16 unless said), against this model's own", rows)
    stored = total.total + total.mtp
    memory = {"train (float32 master and gradient, BF16 moments)": TRAINING_BYTES, "serve BF16": 2, "serve FP8": 1}
    lines += table("memory for weights and states", [(k, f"{stored * b / 1e9:,.1f} GB", "") for k, b in memory.items()])
    return "\n".join(lines).rstrip()


def table(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    """Aligned lines under a title, then an empty one."""
    head = [title] if title else []
    return [*head, *(f"  {name:<50}{value:>22}{note:>9}" for name, value, note in rows), ""]


def draw(path: Path, name: str, config: ModelConfig) -> None:
    """Two bar charts: parameters by part, cache per token by attention."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    parts, elements = count.parts(config), count.cache_elements_per_token(config)
    left.barh(list(parts)[::-1], [n / 1e9 for n in parts.values()][::-1], color="#1f63c6")
    left.set_title(f"{name}: parameters (billions)", loc="left")
    right.barh([kind.upper() for kind in elements], [2 * n / 1024 for n in elements.values()], color="#14806a")
    right.set_title("cache per token, BF16 (KiB)", loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {path} -> use a name that ends in .png, .svg or .pdf")
    figure.savefig(path)
