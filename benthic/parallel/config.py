"""How processes share a model that serves. Names are vLLM's. Imports no torch."""

from dataclasses import dataclass

from benthic.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Which part of the model each process holds. torchrun starts the processes."""

    tensor_parallel_size: int = 0
    """Processes that share the model; 0 takes all that torchrun has started."""
    enable_expert_parallel: bool = False
    """Each process holds whole routed experts; without, a slice of every one."""
    num_redundant_experts: int = 0
    """With expert parallelism: further copies of busy experts in each layer, over all processes."""
    eplb_step_interval: int = 0
    """With expert parallelism: steps after which experts are placed anew by their measured load; 0 for never."""

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "num_redundant_experts", "eplb_step_interval"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise InputError(f"{name}={value!r} is out of bounds -> use a whole number, 0 or more")
        if not self.enable_expert_parallel:
            for name in ("num_redundant_experts", "eplb_step_interval"):
                if value := getattr(self, name):
                    raise InputError(
                        f"{name}={value} without expert parallelism -> use enable_expert_parallel=True too"
                    )
