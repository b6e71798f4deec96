"""A checkpoint rewritten: out of either layout into Hugging Face's, in another precision, in other shards.

Weights go from the source to their shard one by one. Whatever can be checked from headers is checked before the first
byte is written.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benthic.base.errors import InputError
from benthic.base.files import MANIFEST, verify_folder, write_file
from benthic.base.log import megabytes
from benthic.base.tensors import Spec
from benthic.jobs.config import ConvertConfig
from benthic.model import hf
from benthic.model.config import ModelConfig
from benthic.model.export import CONFIG, Piece, in_blocks, is_quantised, plain, write_folder
from benthic.model.hf_config import FP8_SETTINGS, to_hf
from benthic.model.linear import FP8
from benthic.model.native import BIAS
from benthic.model.native_config import is_native
from benthic.model.weights import Weights, cast

UNITS = {"mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json tokenizer_checksums.json tokenizer.model special_tokens_map.json "
    "added_tokens.json vocab.json merges.txt chat_template.jinja generation_config.json"
).split()


def run(options: ConvertConfig) -> None:
    """Write the folder `options.output` and print one line about it."""
    shard_bytes = size(options.max_shard_size)
    if options.output.exists():
        raise InputError(f"model folder {options.output} already exists -> choose another, or remove it first")
    if not options.model.is_dir():
        raise InputError(f"model folder {options.model} does not exist -> give a folder with safetensors files")
    path = options.config or options.model / CONFIG
    if not path.is_file():
        raise InputError(f"{path} is missing -> name the model's config.json with --config")
    data, weights = hf.read_settings(path), Weights(options.model)
    config = hf.config_of(data, path, weights)
    hf.check_fit(weights, hf.empty(config, "meta", torch.float32))
    if (options.model / MANIFEST).is_file():
        verify_folder(options.model)
    pieces = plan(weights, config, options.dtype)
    settings = describe(data, config, weights, pieces, options.dtype)
    with megabytes(f"write {options.output.name}", sum(piece.nbytes for piece in pieces.values())) as add:
        digests = write_folder(options.output, pieces, settings, _copier(options.model), shard_bytes, add)
    shards = sum(name.endswith(".safetensors") for name in digests)
    print(summary(options.output, pieces, shards))


def size(text: str) -> int:
    """Bytes of "5GB", "500 MB", "1.5GiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]+)", text.strip().lower())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise InputError(f"--max-shard-size {text!r} -> give a number above 0 with MB, GB, MiB or GiB, as in 5GB")
    return max(1, int(float(match[1]) * UNITS[match[2]]))


def plan(weights: Weights, config: ModelConfig, dtype: str) -> dict[str, Piece]:
    """Name in the destination -> what is written there. MTP copies that the source lacks are made from the originals.

    `dtype` as in the options: `auto` and FP8 that stays FP8 keep the stored bytes.
    """
    sources = hf.repeated(config) | {name: name for name in weights.names}
    return {name: _piece(weights, name, source, dtype) for name, source in sources.items()}


def _piece(weights: Weights, name: str, source: str, dtype: str) -> Piece:
    shape = weights.shape(source)
    if dtype in hf.DTYPES:
        target = torch.float32 if name.endswith(BIAS) else hf.DTYPES[dtype]
        return plain(name, Spec(target, shape), lambda: cast(source, weights[source], target))
    if dtype == "fp8" and weights.dtype(source) != FP8 and is_quantised(name, shape):
        return in_blocks(name, shape, lambda: weights[source])

    def renamed(part: str) -> str:
        return name + part.removeprefix(source)

    return Piece(
        specs={renamed(part): spec for part, spec in weights.specs(source).items()},
        make=lambda: {renamed(part): tensor for part, tensor in weights.stored(source).items()},
    )


def describe(
    data: Mapping[str, Any], config: ModelConfig, weights: Weights, pieces: Mapping[str, Piece], dtype: str
) -> dict[str, Any]:
    """The `config.json` to write: that of the source, true of what is written. `auto_map` goes: no code is copied."""
    stored = dtype if dtype in hf.DTYPES else hf.stored_dtype(data)
    if is_native(data):
        settings, blocks = to_hf(config, stored), dict(FP8_SETTINGS)
        blocks |= {"scale_fmt": data["scale_fmt"]} if data.get("scale_fmt") else {}
    else:
        settings, blocks = dict(data), dict(data.get("quantization_config") or FP8_SETTINGS)
        keys = [key for key in ("torch_dtype", "dtype") if key in data] or ["torch_dtype"]
        settings |= dict.fromkeys(keys, stored)
        if config.model_type == "deepseek_v3":
            settings["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    for key in ("auto_map", "quantization_config"):
        settings.pop(key, None)
    if any(weights.dtype(name) != FP8 and FP8 in _dtypes(pieces[name]) for name in weights.names):
        blocks.pop("scale_fmt", None)  # our own factors are no powers of two
    if any(FP8 in _dtypes(piece) for piece in pieces.values()):
        settings["quantization_config"] = blocks
    return settings


def _dtypes(piece: Piece) -> set[torch.dtype]:
    return {spec.dtype for spec in piece.specs.values()}


def _copier(source: Path) -> Callable[[Path], None]:
    """Copies the tokenizer's files, where there are any, into the folder that it is given."""

    def copy(folder: Path) -> None:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                write_file(folder / name, [(source / name).read_bytes()])

    return copy


def summary(folder: Path, pieces: Mapping[str, Piece], shards: int) -> str:
    """One line: what was written, the dtype that holds most first."""
    specs = [spec for piece in pieces.values() for spec in piece.specs.values()]
    held: dict[str, int] = {}
    for spec in specs:
        name = str(spec.dtype).removeprefix("torch.")
        held[name] = held.get(name, 0) + spec.nbytes
    total, dtypes = sum(held.values()), " + ".join(sorted(held, key=lambda name: -held[name]))
    amount = f"{total / 1e9:,.2f} GB" if total >= 1e9 else f"{total / 1e6:,.1f} MB"
    files = "1 file" if shards == 1 else f"{shards:,} shards"
    return f"{folder}: {len(specs):,} tensors, {amount}, {files}, {dtypes}"
