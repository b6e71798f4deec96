"""Options of the small jobs. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How a model is loaded and how it answers."""

    model: Positional[str]
    """Folder with config.json, safetensors and tokenizer.json."""
    max_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.6
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Keep the likeliest tokens up to this probability mass."""
    seed: int = 0
    """The same seed and prompt give the same answer."""
    device: Device = "auto"
    """auto: cuda where there is one, else cpu."""
    dtype: Dtype = "auto"
    """Precision of the computation; auto takes what the model's config.json names."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AnswerConfig):
    """Options of `benthic generate`."""

    prompts: Positional[tuple[str, ...]] = ()
    """Texts to continue; without any, standard input is one."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig(AnswerConfig):
    """Options of `benthic chat`."""

    system: str = ""
    """System message; empty for none."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Options of `benthic inspect`."""

    model: Positional[str]
    """A preset (v1-7b, moe-16b, v2-lite, v2, v3, r1-distill-qwen-7b, tiny, ...) or a folder with config.json."""
    sequence_length: int = 4096
    """Length at which compute per token is counted."""
    plot: Path | None = None
    """Also draw the tables into this .png, .svg or .pdf file."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Options of `benthic doctor`."""

    json: bool = False
    """Print the findings as JSON."""


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Options of `benthic env`: none."""


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Options of `benthic completion`."""

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """The shell to complete in."""
