"""Checkpoints on disk: a folder `step-00000100` per save, whole or absent, each file checksummed.

model/               config.json, model.safetensors, tokenizer files: loads anywhere, sealed on its own
trainer.safetensors  optimiser moments and random-number states
trainer.json         step, tokens, data cursor, guard, configuration
manifest.json        sha256 and size of everything above
"""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benthic.base.errors import CheckpointError
from benthic.base.files import (
    MANIFEST,
    PARTIAL,
    commit_folder,
    json_bytes,
    make_folder,
    remove_folder,
    remove_partial,
    verify_folder,
    write_file,
)
from benthic.base.tensors import TensorFile, write_tensors
from benthic.model import hf
from benthic.model.transformer import Transformer
from benthic.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("benthic")


@dataclass
class Saved:
    """A verified checkpoint: its folder, tensors by name, and the plain state."""

    folder: Path
    tensors: TensorFile
    state: dict[str, Any]


def save(
    parent: Path,
    step: int,
    model: Transformer,
    tokenizer: Tokenizer | None,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `parent/step-N`, verify what the disk holds, then remove all but the newest `keep` up to this step.

    Where this very step was saved before, the contents are the same: whole, it stays; damaged, it is written again.
    """
    final = parent / f"step-{step:08d}"
    if final.exists() and _damage(final) is None:
        return final
    partial = parent / f"{PARTIAL}{final.name}"
    for useless in (final, partial):
        if useless.exists():
            remove_folder(useless)
    make_folder(partial)
    digests = {f"model/{n}": d for n, d in hf.write_model(partial / "model", model, tokenizer).items()}
    digests["trainer.safetensors"] = write_tensors(partial / "trainer.safetensors", tensors)
    digests["trainer.json"] = write_file(partial / "trainer.json", [json_bytes(state)])
    commit_folder(partial, final, digests)
    verify_folder(final)
    for old in [folder for folder in _steps(parent) if folder <= final][:-keep]:
        remove_folder(old)
    return final


def newest(parent: Path) -> Saved | None:
    """The newest whole checkpoint, or None where there is none. Clears away what interrupted processes left.

    A damaged checkpoint is reported and its predecessor offered; if all are damaged, CheckpointError.
    """
    if not parent.is_dir():
        return None
    remove_partial(parent)
    for folder in _steps(parent):
        if not (folder / MANIFEST).exists():  # a removal that was cut short
            remove_folder(folder)
    damaged: list[CheckpointError] = []
    for folder in reversed(_steps(parent)):
        if error := _damage(folder):
            log.warning("%s", error)
            damaged.append(error)
            continue
        state = json.loads((folder / "trainer.json").read_bytes())
        return Saved(folder, TensorFile(folder / "trainer.safetensors"), state)
    if damaged:
        raise CheckpointError(f"no whole checkpoint in {parent}; the newest: {damaged[0]}")
    return None


def _damage(folder: Path) -> CheckpointError | None:
    """What is wrong with a checkpoint, or None."""
    try:
        verify_folder(folder)
    except CheckpointError as error:
        return error
    return None


def _steps(parent: Path) -> list[Path]:
    return sorted(p for p in parent.iterdir() if p.is_dir() and re.fullmatch(r"step-\d{8}", p.name))
