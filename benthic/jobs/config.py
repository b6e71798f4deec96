"""Options of the small jobs. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from benthic.parallel.config import ParallelConfig

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]
Quantization = Literal["auto", "none", "fp8"]


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
    quantization: Quantization = "auto"
    """Weights of projections and experts: fp8, none (in dtype); auto: as they are stored, where the device has FP8."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AnswerConfig):
    """Options of `benthic generate`."""

    prompts: Positional[tuple[str, ...]] = ()
    """Texts to continue; without any and without --input, standard input is one."""
    input: Path | None = None
    """JSON lines, each with `prompt`, `messages` or `prompt_token_ids`; other keys are kept."""
    output: Path | None = None
    """Write the answers here instead: each line as it was, with text, token_ids, finish_reason, and the answer's
    logprob."""
    json: bool = False
    """Print such lines."""
    n: int = 1
    """Samples of each prompt; each has random numbers of its own."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """End an answer before this text; may be given several times."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely, compared with the likeliest."""
    parallel: Annotated[ParallelConfig, arg(name="")] = field(default_factory=ParallelConfig)
    """How processes share the model, under `torchrun --nproc-per-node N -m benthic generate ...`."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Options of `benthic bench`."""

    phase: Positional[Literal["decode", "prefill"]]
    """decode: answers, token by token; prefill: prompts up to their first token."""
    model: Positional[str]
    """A preset (v2-lite, tiny, ...), which gets random weights, or a folder with config.json and safetensors."""
    batch: tuple[int, ...] = (1, 8)
    """Requests at once; one row of the table for each number."""
    input_len: int = 256
    """Random tokens of each prompt."""
    output_len: int = 128
    """decode: tokens of each answer."""
    num_speculative_tokens: int = 0
    """decode: tokens that the model's first multi-token prediction module drafts per step, 0 to 8."""
    kv_cache_dtype: Literal["auto", "fp8", "int6"] = "auto"
    """How latents are kept: as computed, in 8 bits, or in 6."""
    device: Device = "auto"
    """auto: cuda where there is one, else cpu."""
    dtype: Dtype = "auto"
    """auto: what the folder's config.json names; for presets bfloat16 on a GPU, else float32."""
    quantization: Quantization = "auto"
    """Weights of projections and experts: fp8, none (in dtype); auto: as they are stored, where the device has FP8."""
    json: bool = False
    """Print the table as JSON."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig(AnswerConfig):
    """Options of `benthic chat`."""

    system: str = ""
    """System message; empty for none."""
    chat_template: str = ""
    """Chat format: a name (v1, v2, v3, r1, v3.1) or the path of a Jinja file; empty takes the model's own."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether the model thinks first, where its format has the choice (v3.1); auto is the format's own way."""


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
class ConvertConfig:
    """Options of `benthic convert`."""

    model: Positional[Path]
    """Folder to read: the Hugging Face layout, or DeepSeek's inference layout (model0-mp8.safetensors, ...)."""
    output: Positional[Path]
    """New folder to write: config.json, safetensors (shards with an index) and the tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = "auto"
    """How weights are stored; auto keeps every tensor bit for bit, fp8 quantises what the released V3 files do."""
    max_shard_size: str = "5GB"
    """Largest file, with a unit: MB or GB, or MiB or GiB."""
    config: Path | None = None
    """The config.json of the model, where the folder to read has none."""


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Options of `benthic experts`."""

    action: Positional[Literal["report", "merge", "prune"]]
    """report: which experts are alike or idle; merge: join the most alike; prune: drop the least used."""
    model: Positional[Path]
    """Folder of a mixture-of-experts model in the Hugging Face layout."""
    output: Positional[Path | None] = None
    """merge, prune: new folder for the smaller model."""
    keep: int = 0
    """merge, prune: routed experts that every layer keeps; a multiple of n_group."""
    corpus: tuple[Path, ...] = ()
    """Text files or folders on which load is measured; without them, experts are compared by their weights alone."""
    max_tokens: int = 100_000
    """Tokens of the corpus to measure on."""
    device: Device = "auto"
    """auto: cuda where there is one, else cpu."""
    json: bool = False
    """report: print every number as JSON."""


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
