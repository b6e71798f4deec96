"""What `benthic serve` can be told. Imports no torch."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from benthic.base.errors import InputError
from benthic.parallel.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One server for one model. Raises InputError for a value outside its range."""

    model: Positional[str]
    """Folder with config.json, safetensors and tokenizer.json."""
    served_model_name: str = ""
    """Name by which clients ask for the model; empty takes the folder's name."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than a loopback address needs a key."""
    port: int = 8000
    """0 takes any free port."""
    api_key: UseAppendAction[tuple[str, ...]] = field(default=(), repr=False)
    """Key that clients must send, or name:key; repeat it for more. Other users can read flags: prefer the file."""
    api_key_file: str = ""
    """File with a key, or name:key, on each line. Names stand in the log; keys of one name are one client."""
    allowed_origins: UseAppendAction[tuple[str, ...]] = ()
    """Origin of web pages that may use the server beside its own, as https://app.example; repeat it for more."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation; auto takes what the model's config.json names."""
    quantization: Literal["auto", "none", "fp8"] = "auto"
    """Weights of projections and experts: fp8, none (in dtype); auto: as they are stored, where the device has FP8."""
    chat_template: str = ""
    """Chat format: a name (v1, v2, v3, r1, v3.1) or the path of a Jinja file; empty takes the model's own."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether the model thinks first where a request leaves it open and the format has the choice (v3.1)."""
    max_model_len: int = 0
    """Longest prompt and answer together, in tokens; 0 takes the model's max_position_embeddings."""
    max_num_seqs: int = 256
    """Most requests that run at once."""
    max_queued_requests: int = 256
    """Most requests that wait; one more is answered with 429."""
    max_queued_tokens: int = 2**22
    """Most prompt tokens that wait together; with more, too, the answer is 429."""
    request_timeout: float = 3600.0
    """Seconds that a request may take, waiting included; a client may ask for fewer."""
    shutdown_timeout: float = 30.0
    """Seconds that accepted requests get to finish after SIGTERM."""
    parallel: Annotated[ParallelConfig, arg(name="")] = field(default_factory=ParallelConfig)
    """How processes share the model, under `torchrun --nproc-per-node N -m benthic serve ...`."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("max_model_len", 0, math.inf),
            ("max_num_seqs", 1, math.inf),
            ("max_queued_requests", 0, math.inf),
            ("max_queued_tokens", 0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(
                    f"{name} is {value} -> use {low} or more" + (f", at most {high}" if high < 1e9 else "")
                )
        if not (math.isfinite(self.shutdown_timeout) and self.shutdown_timeout >= 0):
            raise InputError(f"shutdown_timeout is {self.shutdown_timeout} -> use a number of seconds, 0 or more")
        if not (math.isfinite(self.request_timeout) and self.request_timeout > 0):
            raise InputError(f"request_timeout is {self.request_timeout} -> use a number of seconds above 0")
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]-]+", origin):
                raise InputError(f"allowed_origins has {origin[:80]!r} -> write origins as https://app.example, or *")
        if not self.host:
            raise InputError("host is empty -> use 127.0.0.1, or 0.0.0.0 with an API key")

    @property
    def name(self) -> str:
        """The model's name as clients see it."""
        return self.served_model_name or Path(self.model).resolve().name
