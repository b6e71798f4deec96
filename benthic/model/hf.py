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
from benthic.base.tensors import TensorFile, write_tensors
from benthic.model.config import ModelConfig
from benthic.model.hf_config import from_hf, to_hf
from benthic.model.transformer import Transformer
from benthic.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("benthic")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
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


def write_model(folder: Path, model: Transformer, tokenizer: Tokenizer | None) -> dict[str, str]:
    """Write a sealed model folder at `folder`, which must not exist: everything or nothing appears.

    Returns the sha256 of each of its files, for a manifest further out.
    """
    if folder.exists():
        raise InputError(f"model folder {folder} already exists -> choose another, or remove it first")
    partial = folder.with_name(PARTIAL + folder.name)
    if partial.exists():  # left by a process that was stopped while writing
        remove_folder(partial)
    make_folder(partial)
    tensors = dict(checkpoint_views(model)) | dict(shared_copies(model))
    dtype = str(model.head.dtype).removeprefix("torch.")
    digests = {
        WEIGHTS: write_tensors(partial / WEIGHTS, tensors),
        CONFIG: write_file(partial / CONFIG, [json_bytes(to_hf(model.config, dtype))]),
    }
    if tokenizer is not None:
        tokenizer.save(partial)
        digests |= {p.name: sha256_file(p) for p in partial.iterdir() if p.name not in digests}
    commit_folder(partial, folder, digests)
    return digests | {MANIFEST: sha256_file(folder / MANIFEST)}


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
    file = TensorFile(folder / WEIGHTS)
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
        raise CheckpointError(f"{file.path} does not fit {CONFIG}: {'; '.join(problems[:5])}{more}")
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
    if not modules or any(name.startswith(first) for name in TensorFile(folder / WEIGHTS).names):
        return config
    log.warning("%s has no weights for its %d MTP modules: loaded without them", folder, modules)
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def empty(config: ModelConfig, device: str, dtype: torch.dtype, compute: torch.dtype | None = None) -> Transformer:
    """A model with uninitialised weights in `dtype` on `device`, computing in `compute` (default: `dtype`)."""
    with torch.device("meta"):
        model = Transformer(config, dtype=compute or dtype)
    return model.to(dtype).to_empty(device=device)
