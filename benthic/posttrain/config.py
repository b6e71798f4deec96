"""Settings of post-training beyond those of the trainer. Names as in TRL. Imports no torch."""

from dataclasses import dataclass

from benthic.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Group relative policy optimisation with rule rewards (DeepSeekMath Sec 4.1)."""

    prompts_per_generation: int = 16
    """Questions in one exploration stage."""
    num_generations: int = 16
    """Answers sampled per question: the group, G."""
    max_completion_length: int = 48
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Sampling temperature of the exploration."""
    steps_per_generation: int = 1
    """Updates per exploration stage, each on its own share of the questions."""
    epsilon: float = 0.2
    """Clip the probability ratio to 1 - epsilon .. 1 + epsilon."""
    beta: float = 0.001
    """Weight of the KL term against the reference model."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("prompts_per_generation", "max_completion_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} -> use 1 or more")
        if self.num_generations < 2:
            raise InputError(f"num_generations={self.num_generations} -> a group needs 2 or more answers")
        if self.steps_per_generation < 1 or self.prompts_per_generation % self.steps_per_generation:
            raise InputError(
                f"steps_per_generation={self.steps_per_generation} must divide "
                f"prompts_per_generation={self.prompts_per_generation}"
            )
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature} -> exploration needs a value above 0")
