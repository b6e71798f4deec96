"""Weights in and out, in the Hugging Face layout of the family: `config.json` + `model.safetensors` + tokenizer files.

Inside, experts are stacked and the decoder has no prefix; outside, the names are those of the released checkpoints.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benthic.base.errors import CheckpointError, InputError
from benthic.base.files import (
    MANIFEST,
    PARTIAL,
    commit_folder,
    json_bytes,
    make_folder,
    remove_folder,
    sha256_file,
    verify_folder,
    write_file,
)
from benthic.base.tensors import write_tensors
from benthic.kernels.quant import BLOCK, quantise_blocks
from benthic.model.config import ModelConfig
from benthic.model.hf_config import FP8_SETTINGS, from_hf, to_hf
from benthic.model.transformer import Transformer
from benthic.model.weights import INDEX, SCALE, WEIGHTS, Weights
from benthic.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("benthic")
CONFIG = "config.json"
SHARD_BYTES = 5_000_000_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def checkpoint_views(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(released name, tensor that shares the model's memory) for every parameter and gate bias, MTP copies excluded."""
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^(embed_tokens|layers|norm)\b", r"model.\1", name)
        if match := re.match(r"mtp\.(\d+)\.(.*)", name):
            layer = model.config.num_hidden_layers + int(match[1])
            name = f"model.layers.{layer}.{match[2].removeprefix('block.')}"
        if name.endswith("routed_experts.gate_up_proj"):
            for e, (gate, up) in enumerate(t.chunk(2, 0) for t in tensor):
                prefix = name.replace("routed_experts.gate_up_proj", f"experts.{e}")
                yield f"{prefix}.gate_proj.weight", gate
                yield f"{prefix}.up_proj.weight", up
        elif name.endswith("routed_experts.down_proj"):
            for e, down in enumerate(tensor):
                yield name.replace("routed_experts.down_proj", f"experts.{e}.down_proj.weight"), down
        else:
            yield name, tensor


def shared_copies(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The embedding and head that released files repeat in every MTP layer."""
    for k in range(model.config.num_nextn_predict_layers):
        layer = f"model.layers.{model.config.num_hidden_layers + k}"
        yield f"{layer}.embed_tokens.weight", model.embed_tokens.weight
        yield f"{layer}.shared_head.head.weight", model.head


def write_model(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer | None,
    *,
    fp8: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write a sealed model folder at `folder`, which must not exist: everything or nothing appears.

    `fp8` quantises what the released V3 files quantise. More than `shard_bytes` become shards with an index. Returns
    the sha256 of each of the folder's files, for a manifest further out.
    """
    if folder.exists():
        raise InputError(f"model folder {folder} already exists -> choose another, or remove it first")
    partial = folder.with_name(PARTIAL + folder.name)
    if partial.exists():  # left by a process that was stopped while writing
        remove_folder(partial)
    make_folder(partial)
    tensors = dict(checkpoint_views(model)) | dict(shared_copies(model))
    digests = _write_weights(partial, tensors, fp8, shard_bytes)
    config = to_hf(model.config, str(model.head.dtype).removeprefix("torch."))
    config |= {"quantization_config": FP8_SETTINGS} if fp8 else {}
    digests[CONFIG] = write_file(partial / CONFIG, [json_bytes(config)])
    if tokenizer is not None:
        tokenizer.save(partial)
        digests |= {p.name: sha256_file(p) for p in partial.iterdir() if p.name not in digests}
    commit_folder(partial, folder, digests)
    return digests | {MANIFEST: sha256_file(folder / MANIFEST)}


def _write_weights(folder: Path, tensors: dict[str, Tensor], fp8: bool, shard_bytes: int) -> dict[str, str]:
    """One file, or shards filled in order of the names, each quantised only when its turn comes."""
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name in sorted(tensors):
        size = _stored_bytes(name, tensors[name], fp8)
        if filled + size > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [WEIGHTS]
    digests, held = {}, {}
    for file, names in zip(files, shards):
        content = {k: t for name in names for k, t in _stored(name, tensors[name], fp8).items()}
        digests[file] = write_tensors(folder / file, content)
        held |= dict.fromkeys(content, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(held.items()))}
        digests[INDEX] = write_file(folder / INDEX, [json_bytes(index)])
    return digests


def _quantised(name: str, tensor: Tensor) -> bool:
    """Whether the released V3 files hold this weight as FP8: projections do; embedding, head, gate, eh_proj do not."""
    return tensor.dim() == 2 and bool(re.search(r"_proj(_with_mqa)?\.weight$", name)) and "eh_proj" not in name


def _stored(name: str, tensor: Tensor, fp8: bool) -> dict[str, Tensor]:
    if not (fp8 and _quantised(name, tensor)):
        return {name: tensor}
    weight, scale = quantise_blocks(tensor)
    return {name: weight, name + SCALE: scale}


def _stored_bytes(name: str, tensor: Tensor, fp8: bool) -> int:
    if not (fp8 and _quantised(name, tensor)):
        return tensor.numel() * tensor.element_size()
    n, k = tensor.shape
    return n * k + 4 * -(-n // BLOCK) * -(-k // BLOCK)


def read_config(folder: Path) -> ModelConfig:
    """The `config.json` of a model folder."""
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing -> give a folder in the Hugging Face layout") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}) -> fetch it again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no table of keys -> fetch it again")
    return from_hf(data, str(path))


def read_weights(folder: Path, model: Transformer) -> None:
    """Copy the weights of `folder` into `model`, tensor by tensor. Lists missing, extra and misshapen tensors."""
    file = Weights(folder)
    views, copies = dict(checkpoint_views(model)), dict(shared_copies(model))
    wanted = {name: tuple(t.shape) for name, t in (views | copies).items()}
    problems = [f"missing {n} {wanted[n]}" for n in sorted(views.keys() - set(file.names))]
    problems += [f"unexpected {n} {file.shape(n)}" for n in sorted(set(file.names) - wanted.keys())]
    problems += [
        f"{n} has shape {file.shape(n)}, expected {wanted[n]}"
        for n in file.names
        if n in wanted and file.shape(n) != wanted[n]
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder} does not fit {CONFIG}: {'; '.join(problems[:5])}{more}")
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(file[name])


def load(
    path: str | Path,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> tuple[Transformer, Tokenizer | None]:
    """(model, tokenizer) of a folder in the Hugging Face layout; the tokenizer is None where the folder has none.

    `auto` takes CUDA when there is a GPU, and the dtype that the file's `config.json` names. Sealed folders are
    checked against their manifest first, so that altered weights are an error and not wrong numbers.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"model folder {folder} does not exist -> give a folder with {CONFIG} and {WEIGHTS}")
    config = read_config(folder)
    if (folder / MANIFEST).is_file():
        verify_folder(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        dtype = data.get("torch_dtype") or data.get("dtype") or "float32"
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} -> use one of {', '.join(DTYPES)}")
    model = empty(_without_absent_mtp(config, folder), device, DTYPES[dtype])
    read_weights(folder, model)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model vocab_size={config.vocab_size} "
            "-> use the tokenizer that belongs to the model"
        )
    return model.eval(), tokenizer


def _without_absent_mtp(config: ModelConfig, folder: Path) -> ModelConfig:
    """Folders that transformers saved promise MTP modules in `config.json` and hold none: load the rest, and say so."""
    modules = config.num_nextn_predict_layers
    first = f"model.layers.{config.num_hidden_layers}."
    if not modules or any(name.startswith(first) for name in Weights(folder).names):
        return config
    log.warning("%s has no weights for its %d MTP modules: loaded without them", folder, modules)
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def empty(config: ModelConfig, device: str, dtype: torch.dtype, compute: torch.dtype | None = None) -> Transformer:
    """A model with uninitialised weights in `dtype` on `device`, computing in `compute` (default: `dtype`)."""
    with torch.device("meta"):
        model = Transformer(config, dtype=compute or dtype)
    return model.to(dtype).to_empty(device=device)
