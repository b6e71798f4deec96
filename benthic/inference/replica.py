"""What an engine computes with, where that is not the model as its owner holds it: wider masters, or another format.

A replica is the same tree of modules. Of what differs in dtype or format it has tensors of its own; all else it shares,
parameter by parameter. What the plain pass reads in float32 (norms, gates) is never copied, so that both passes see the
same numbers there. `refresh` writes into the same storage: graphs that read it stay valid.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from benthic.model.fp8 import eligible, make_room, quantise_into
from benthic.model.linear import FP8, SCALE, Quantisable
from benthic.model.moe import MoE
from benthic.model.transformer import Transformer


class Replica:
    """`model` computes what `master` computes: its matrices in FP8 (`quantization` fp8), none of them in FP8 (none), or
    as they are (auto); with `cast`, all others and the embedding in the dtype of the computation. Where nothing
    differs, `model` is `master`. It knows of changes in place, and of none that replace a parameter."""

    def __init__(self, master: Transformer, quantization: Literal["auto", "none", "fp8"], *, cast: bool):
        self.model = master
        self._derived: list[tuple[nn.Module, nn.Module, str]] = []  # module of the master, of the replica, parameter
        matrices = {(module, name) for module, name in eligible(master)}
        changes: list[tuple[str, str, torch.dtype]] = []
        for path, module in master.named_modules():
            if not isinstance(module, Quantisable | nn.Embedding):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                wanted = parameter.dtype
                if wanted == FP8:
                    wanted = master.dtype if quantization == "none" else FP8
                elif quantization == "fp8" and (module, name) in matrices:
                    wanted = FP8
                elif cast:
                    wanted = master.dtype
                if wanted != parameter.dtype:
                    changes.append((path, name, wanted))
        if changes:
            self.model = _twin(master)
            for path, name, dtype in changes:
                target = self.model.get_submodule(path)
                self._derived.append((master.get_submodule(path), target, name))
                _give_own(target, name, dtype)
            self.refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are its own."""
        tensors = (getattr(module, part, None) for _, module, name in self._derived for part in (name, name + SCALE))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive everything anew from what the master holds now."""
        for source, target, name in self._derived:
            into: Tensor = getattr(target, name)
            if into.dtype == FP8:
                quantise_into(into, getattr(target, name + SCALE), getattr(source, name))
            elif isinstance(source, Quantisable) and name in source.PARTS:
                into.copy_(source.matrix(name, into.dtype))
            else:
                into.copy_(getattr(source, name))


def _twin(model: Transformer) -> Transformer:
    """The same modules anew, over the same parameters, buffers and dispatchers."""
    shared = [*model.parameters(), *model.buffers()]
    shared += [module.dispatcher for module in model.modules() if isinstance(module, MoE)]
    return copy.deepcopy(model, {id(thing): thing for thing in shared})


def _give_own(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Put an unwritten parameter of this dtype in the place of one that is shared."""
    if dtype == FP8 and isinstance(module, Quantisable):
        make_room(module, name)
        return
    shape, device = getattr(module, name).shape, getattr(module, name).device
    setattr(module, name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False))
    if getattr(module, name + SCALE, None) is not None:
        setattr(module, name + SCALE, None)
