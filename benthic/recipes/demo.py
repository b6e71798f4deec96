"""What a run of `benthic demo` is made of. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benthic.base.errors import InputError
from benthic.model.config import ModelConfig
from benthic.posttrain.config import GRPOConfig
from benthic.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """From files to token shards."""

    paths: tuple[Path, ...] = ()
    """Folders and files of text, .jsonl (optionally .gz or .zst) or .parquet; none: this Python's standard library."""
    near_duplicate_threshold: float = 0.8
    """Documents whose word 5-grams overlap this much (Jaccard) count as the same."""
    held_out_share: float = 0.05
    """Share of the documents that is never trained on."""
    max_bytes: int = 0
    """Stop reading after this much text; 0 reads everything."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the model is examined before and after reinforcement learning."""

    problems: int = 400
    """Held-out problems; at most as many as the task has."""
    samples: int = 8
    """Answers per problem."""
    temperature: float = 1.0
    """Sampling temperature."""
    speculative_prompts: int = 64
    """Prompts on which speculative decoding is compared with plain decoding."""
    bits_per_byte_limit: float = 2.15
    """The report calls held-out text well predicted up to here."""
    max_violation_limit: float = 0.5
    """The report calls the load of the experts balanced up to here (MaxVio)."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Raw text to a reasoning model: every number of every stage."""

    model: ModelConfig
    """The architecture."""
    corpus: CorpusConfig
    """What is read."""
    pretrain: TrainConfig
    """Next-token and multi-token prediction on the corpus."""
    balance_off_steps: int
    """Length of a control run without the bias update; 0 leaves it out."""
    sft: TrainConfig
    """Cold start: demonstrations that reason."""
    shortcut: TrainConfig
    """A short second fine-tuning in which many demonstrations skip the reasoning: the habit RL has to undo."""
    direct_share: float
    """Share of such demonstrations in `shortcut`."""
    rl: TrainConfig
    """The trainer's side of GRPO."""
    grpo: GRPOConfig
    """The exploration side of GRPO."""
    evaluation: EvaluationConfig
    """Held-out problems."""
    initializer_range: float
    """Standard deviation of the initial weights."""
    recipe: str
    """Name of the recipe these numbers come from."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto: cuda where there is one, else cpu."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward and backward pass; master weights stay float32."""
    seed: int = 0
    """Seed of the split, the weights, the data order, the problems and the sampling."""
    output_dir: Path = Path("runs/demo")
    """Where everything goes. The same command again continues what is there."""

    def __post_init__(self) -> None:
        """Refuse stages that do not fit together."""
        longest = max(self.pretrain.max_length, self.sft.max_length, self.shortcut.max_length, self.rl.max_length)
        if longest > self.model.max_position_embeddings:
            raise InputError(
                f"max_length={longest} exceeds max_position_embeddings={self.model.max_position_embeddings}"
            )
        if not 0 < self.corpus.held_out_share < 1:
            raise InputError(f"held_out_share={self.corpus.held_out_share} -> use a share between 0 and 1")
        if not 0 <= self.direct_share <= 1:
            raise InputError(f"direct_share={self.direct_share} -> use a share from 0 to 1")
