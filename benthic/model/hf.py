"""Models in and out of folders: `config.json` + safetensors + tokenizer files, under the names of the released files.

Inside, experts are stacked and the decoder has no prefix; outside, the layout is that of Hugging Face, or, only
inwards, that of DeepSeek's inference script.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benthic.base.errors import CheckpointError, InputError
from benthic.base.files import MANIFEST, verify_folder
from benthic.base.log import megabytes
from benthic.base.tensors import Spec
from benthic.model.config import ModelConfig
from benthic.model.export import CONFIG, SHARD_BYTES, Piece, in_blocks, is_quantised, plain, write_folder
from benthic.model.hf_config import FP8_SETTINGS, from_hf, to_hf
from benthic.model.native import BIAS
from benthic.model.native_config import from_native, is_native
from benthic.model.transformer import Transformer
from benthic.model.weights import WEIGHTS, Weights, cast
from benthic.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("benthic")
VOCABULARY = "tokenizer.json"
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


def repeated(config: ModelConfig) -> dict[str, str]:
    """Name of each copy of the embedding and head, which released files repeat in every MTP layer -> its original."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    originals = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": head}
    layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return {f"model.layers.{layer}.{copy}": original for layer in layers for copy, original in originals.items()}


def shared_copies(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the embedding and head that released files repeat in every MTP layer."""
    for copy, original in repeated(model.config).items():
        yield copy, model.embed_tokens.weight if original.startswith("model.embed") else model.head


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
    pieces = {name: _piece(name, t, fp8) for name, t in (*checkpoint_views(model), *shared_copies(model))}
    config = to_hf(model.config, str(model.head.dtype).removeprefix("torch."))
    config |= {"quantization_config": FP8_SETTINGS} if fp8 else {}

    def add_tokenizer(partial: Path) -> None:
        if tokenizer is not None:
            tokenizer.save(partial)

    return write_folder(folder, pieces, config, add_tokenizer, shard_bytes)


def _piece(name: str, tensor: Tensor, fp8: bool) -> Piece:
    spec = Spec.of(tensor)
    if fp8 and is_quantised(name, spec.shape):
        return in_blocks(name, spec.shape, lambda: tensor)
    return plain(name, spec, lambda: tensor)


def read_settings(path: Path) -> dict[str, Any]:
    """The table of keys in a `config.json`, unchecked."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing -> give a folder in the Hugging Face layout") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}) -> fetch it again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no table of keys -> fetch it again")
    return data


def read_config(folder: Path) -> ModelConfig:
    """The `config.json` of a model folder, in Hugging Face's names or those of DeepSeek's inference script."""
    data = read_settings(folder / CONFIG)
    return config_of(data, folder / CONFIG, Weights(folder)) if is_native(data) else from_hf(data, str(folder / CONFIG))


def config_of(data: Mapping[str, Any], path: Path, weights: Weights) -> ModelConfig:
    """The configuration that the settings in `path` and the weights beside them describe together.

    The script's names leave out whether gates are biased, and the ids that begin and end a text. MTP modules that the
    weights lack are left out with a warning: transformers drops them when it saves, and leaves them in `config.json`.
    """
    folder = weights.folder
    if is_native(data):
        config = from_native(data, any(name.endswith(BIAS) for name in weights.names), str(path))
        if (folder / VOCABULARY).is_file():
            tokenizer = Tokenizer.load(folder)
            config = dataclasses.replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    else:
        config = from_hf(data, str(path))
    first = f"model.layers.{config.num_hidden_layers}."
    if not config.num_nextn_predict_layers or any(name.startswith(first) for name in weights.names):
        return config
    log.warning("%s has no weights for its %d MTP modules: left out", folder, config.num_nextn_predict_layers)
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def stored_dtype(data: Mapping[str, Any]) -> str:
    """The dtype that settings name for weights that are not FP8."""
    return "bfloat16" if is_native(data) else data.get("torch_dtype") or data.get("dtype") or "float32"


Index = tuple[slice, ...]


class Whole:
    """What a process loads of a model: all of it. Processes that share one load subclasses of this."""

    checks = True  # whether it reads what is read only to be checked

    def empty(self, config: ModelConfig, device: str, dtype: torch.dtype) -> Transformer:
        """The model with uninitialised weights."""
        return empty(config, device, dtype)

    def places(self, model: Transformer) -> Iterator[tuple[str, Tensor]]:
        """(released name, tensor to fill with it or with a part of it)."""
        return checkpoint_views(model)

    def index(self, part: tuple[int, ...], whole: tuple[int, ...]) -> Index:
        """Which part of a released tensor of shape `whole` fills one of shape `part`."""
        return tuple(slice(0, size) for size in whole)


WHOLE = Whole()


def check_fit(weights: Weights, model: Transformer) -> None:
    """CheckpointError listing missing, extra and misshapen tensors, or naming an MTP copy that differs from its
    original. `model` may be on the meta device."""
    check_shapes(weights, model)
    check_copies(weights, model.config)


def check_shapes(weights: Weights, model: Transformer) -> None:
    """The first half of `check_fit`, which reads no data."""
    views, copies = dict(checkpoint_views(model)), dict(shared_copies(model))
    problems = weights.misfits(*({name: tuple(t.shape) for name, t in part.items()} for part in (views, copies)))
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"{weights.folder} does not fit {CONFIG}: {'; '.join(problems[:5])}{more}")


def check_copies(weights: Weights, config: ModelConfig) -> None:
    """The second half of `check_fit`."""
    for copy, original in repeated(config).items():
        if copy in weights.names and not _same(weights[copy], weights[original]):
            raise CheckpointError(
                f"{weights.folder}: {copy} differs from {original} -> prediction modules share it with the model; "
                "fetch the files again"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float())


def read_weights(folder: Path, model: Transformer) -> None:
    """Copy the weights of `folder` into `model`, tensor by tensor. Lists missing, extra and misshapen tensors."""
    weights = Weights(folder)
    check_fit(weights, model)
    _copy(weights, model, WHOLE)


def _copy(weights: Weights, model: Transformer, part: Whole) -> None:
    """Fill the model: the memory besides it is one tensor."""
    views: dict[str, list[Tensor]] = {}
    for name, view in part.places(model):
        views.setdefault(name, []).append(view)
    size = sum(weights.nbytes(name) for name in weights.names if name in views)
    with torch.no_grad(), megabytes(f"read {weights.folder.name}", size) as add:
        for name in weights.names:
            if name in views:
                first = views[name][0]
                index = part.index(tuple(first.shape), weights.shape(name))
                found = cast(name, weights.read(name, index), first.dtype)
                for view in views[name]:  # more than one where an expert has copies
                    view.copy_(found)
                add(weights.nbytes(name))


def load(
    path: str | Path,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    part: Whole = WHOLE,
) -> tuple[Transformer, Tokenizer | None]:
    """(model, tokenizer) of a folder in the Hugging Face layout or DeepSeek's own; no tokenizer.json, no tokenizer.

    `auto` takes CUDA when there is a GPU, and the dtype that the file's `config.json` names. Sealed folders are
    checked against their manifest first, so that altered weights are an error and not wrong numbers.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"model folder {folder} does not exist -> give a folder with {CONFIG} and {WEIGHTS}")
    data = read_settings(folder / CONFIG)
    weights = Weights(folder)
    config = config_of(data, folder / CONFIG, weights)
    if part.checks and (folder / MANIFEST).is_file():
        verify_folder(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = stored_dtype(data) if dtype == "auto" else dtype
    if name not in DTYPES:
        raise InputError(f"dtype={name!r} -> use one of {', '.join(DTYPES)}")
    with torch.device("meta"):
        check_shapes(weights, Transformer(config))
    if part.checks:
        check_copies(weights, config)
    model = part.empty(config, device, DTYPES[name])
    _copy(weights, model, part)
    tokenizer = Tokenizer.load(folder) if (folder / VOCABULARY).is_file() else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model vocab_size={config.vocab_size} "
            "-> use the tokenizer that belongs to the model"
        )
    return model.eval(), tokenizer


def empty(config: ModelConfig, device: str, dtype: torch.dtype, compute: torch.dtype | None = None) -> Transformer:
    """A model with uninitialised weights in `dtype` on `device`, computing in `compute` (default: `dtype`)."""
    with torch.device("meta"):
        model = Transformer(config, dtype=compute or dtype)
    return made(model, device, dtype)


def made(model: Transformer, device: str, dtype: torch.dtype) -> Transformer:
    """The model, so far on the meta device, with memory of its own, uninitialised."""
    return model.to(dtype).to_empty(device=device)
