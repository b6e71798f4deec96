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
from benthic.model.fp8 import check_device, eligible, has_fp8, is_fp8, make_room, quantise_into
from benthic.model.hf_config import FP8_SETTINGS, from_hf, to_hf
from benthic.model.linear import FP8, SCALE
from benthic.model.native import BIAS
from benthic.model.native_config import from_native, is_native
from benthic.model.transformer import Transformer
from benthic.model.weights import WEIGHTS, Weights, cast
from benthic.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("benthic")
VOCABULARY = "tokenizer.json"
Quantization = Literal["auto", "none", "fp8"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def checkpoint_views(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(released name, tensor that shares the model's memory) for every parameter, gate bias and factors of FP8 blocks,
    MTP copies excluded."""
    for name, tensor in model.state_dict().items():
        name, factors = (name.removesuffix(SCALE), SCALE) if name.endswith(SCALE) else (name, "")
        name = re.sub(r"^(embed_tokens|layers|norm)\b", r"model.\1", name)
        if match := re.match(r"mtp\.(\d+)\.(.*)", name):
            layer = model.config.num_hidden_layers + int(match[1])
            name = f"model.layers.{layer}.{match[2].removeprefix('block.')}"
        if name.endswith("routed_experts.gate_up_proj"):
            for e, (gate, up) in enumerate(t if factors else t.chunk(2, 0) for t in tensor):
                prefix = name.replace("routed_experts.gate_up_proj", f"experts.{e}")
                yield f"{prefix}.gate_proj.weight{factors}", gate
                yield f"{prefix}.up_proj.weight{factors}", up
        elif name.endswith("routed_experts.down_proj"):
            for e, down in enumerate(tensor):
                yield name.replace("routed_experts.down_proj", f"experts.{e}.down_proj.weight") + factors, down
        else:
            yield name + factors, tensor


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
    the sha256 of each of the folder's files, for a manifest further out. A model that is computed in FP8 has lost its
    wider weights: InputError.
    """
    if is_fp8(model):
        raise InputError(f"the model for {folder} is FP8 already -> load it with quantization='none', or use convert")
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

    whole = True
    checks = True  # whether it reads what is read only to be checked

    def empty(self, config: ModelConfig, device: str, dtype: torch.dtype, *, fp8: bool = False) -> Transformer:
        """The model with uninitialised weights, in FP8 blocks what can be."""
        return empty(config, device, dtype, fp8=fp8)

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
    views = {name: tensor for name, tensor in checkpoint_views(model) if not name.endswith(SCALE)}
    copies = dict(shared_copies(model))
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
            if name in views and views[name][0].dtype == FP8:
                _copy_blocks(weights.stored(name), name, views[name][0], views[name + SCALE][0])
            elif name in views:
                first = views[name][0]
                index = part.index(tuple(first.shape), weights.shape(name))
                found = cast(name, weights.read(name, index), first.dtype)
                for view in views[name]:  # more than one where an expert has copies
                    view.copy_(found)
            if name in views or part.checks:
                add(weights.nbytes(name))


def _copy_blocks(stored: Mapping[str, Tensor], name: str, codes: Tensor, factors: Tensor) -> None:
    """A weight as stored into FP8 blocks: bit for bit if it is blocks, else quantised on the model's device."""
    if name + SCALE in stored:
        codes.copy_(stored[name])
        factors.copy_(stored[name + SCALE])
    else:
        quantise_into(codes, factors, stored[name].to(codes.device))


def load(
    path: str | Path,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    quantization: Quantization = "none",
    part: Whole = WHOLE,
) -> tuple[Transformer, Tokenizer | None]:
    """(model, tokenizer) of a folder in the Hugging Face layout or DeepSeek's own; no tokenizer.json, no tokenizer.

    `auto` takes CUDA when there is a GPU, and the dtype that the file's `config.json` names. Sealed folders are
    checked against their manifest first, so that altered weights are an error and not wrong numbers.

    `quantization`: fp8 computes with FP8 blocks, those of the files or made while loading; auto keeps blocks where the
    files have them and the device computes in FP8; none dequantises. No more than one tensor is ever held twice.
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
    if quantization == "fp8" and not part.whole:
        raise InputError("quantization='fp8' of a model that processes share -> use auto or none")
    with torch.device("meta"):
        check_shapes(weights, Transformer(config))
    if part.checks:
        check_copies(weights, config)
    model = part.empty(
        config, device, DTYPES[name], fp8=part.whole and _keeps_fp8(weights, config, quantization, device, name)
    )
    _copy(weights, model, part)
    tokenizer = Tokenizer.load(folder) if (folder / VOCABULARY).is_file() else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model vocab_size={config.vocab_size} "
            "-> use the tokenizer that belongs to the model"
        )
    return model.eval(), tokenizer


def _keeps_fp8(weights: Weights, config: ModelConfig, quantization: Quantization, device: str, dtype: str) -> bool:
    """Whether the model's matrices become FP8."""
    if quantization != "auto":
        if quantization == "fp8":
            check_device(device)
        return quantization == "fp8"
    shape = empty(config, "meta", torch.float32, fp8=True)
    blocks = {name.removesuffix(SCALE) for name, _ in checkpoint_views(shape) if name.endswith(SCALE)}
    held = [name for name in weights.names if weights.dtype(name) == FP8]
    if not held or (has_fp8(device) and blocks <= set(held)):
        return bool(held)
    reason = f"{device} has no FP8 arithmetic" if not has_fp8(device) else "some projections are not FP8"
    log.info("%s: FP8 weights are dequantised to %s, because %s", weights.folder, dtype, reason)
    return False


def empty(
    config: ModelConfig, device: str, dtype: torch.dtype, compute: torch.dtype | None = None, *, fp8: bool = False
) -> Transformer:
    """A model with uninitialised weights in `dtype` on `device`, computing in `compute` (default: `dtype`). `fp8`: what
    can be FP8 blocks, is."""
    with torch.device("meta"):
        model = Transformer(config, dtype=compute or dtype)
    return made(model, device, dtype, fp8=fp8)


def made(model: Transformer, device: str, dtype: torch.dtype, *, fp8: bool = False) -> Transformer:
    """The model, so far on the meta device, with memory of its own, uninitialised."""
    model = model.to(dtype)
    if fp8:
        for module, name in list(eligible(model)):
            make_room(module, name)
    return model.to_empty(device=device)
