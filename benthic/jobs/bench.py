"""`benthic bench`: how fast is the engine on this machine, scheduler, sampler, host and all?"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from benthic.base.errors import DoesNotFit, InputError
from benthic.base.log import number, progress
from benthic.inference.config import MAX_DRAFTS, EngineConfig, SamplingParams
from benthic.inference.engine import Engine, Step
from benthic.inference.request import Request
from benthic.jobs.config import BenchConfig
from benthic.jobs.inspect import find
from benthic.jobs.measure import peak_memory_gb
from benthic.model import hf
from benthic.model.cache import bytes_per_token
from benthic.model.config import ModelConfig
from benthic.model.count import parameters
from benthic.model.fp8 import check_device, is_fp8, to_fp8
from benthic.model.transformer import Transformer
from benthic.recipes.models import MODELS

STD = 0.02  # of random weights
COLUMNS = {
    "batch": "batch",
    "prompt_tokens_per_s": "prompt tokens/s",
    "ms_to_first_tokens": "ms to first tokens",
    "decode_tokens_per_s": "decode tokens/s",
    "ms_per_step": "ms per step",
    "tokens_per_step": "tokens per step and request",
    "peak_memory_gb": "peak memory, GB",
} | {f"accepted_{i}": f"accepted at depth {i}" for i in range(1, 1 + MAX_DRAFTS)}


def run(config: BenchConfig) -> None:
    """Measure each batch size, after a warm-up with the same work, and print the table."""
    answer = config.output_len if config.phase == "decode" else 1
    shape = find(config.model)
    limits = _limits(config, shape, answer)
    model = _model(config, shape)
    rows: list[dict[str, float]] = []
    with Engine(model, None, limits) as engine, progress("bench", len(config.batch)) as shown:
        for done, batch in enumerate(config.batch, 1):
            rows.append({"batch": batch} | measured(engine, batch, config.input_len, answer))
            shown.update(done)
    facts = {
        "model": config.model,
        "parameters": parameters(model.config).total,
        "device": torch.cuda.get_device_name() if _on_gpu(engine) else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": "fp8" if is_fp8(model) else "none",
        "kv_cache_dtype": config.kv_cache_dtype,
        "cache_bytes_per_token": bytes_per_token(model.config, model.dtype.itemsize, config.kv_cache_dtype),
        "input_len": config.input_len,
        "output_len": answer,
        "num_speculative_tokens": config.num_speculative_tokens,
    }
    print(json.dumps(facts | {"rows": rows}, indent=2) if config.json else table(facts, rows))


def measured(engine: Engine, batch: int, length: int, new: int, *, alike: bool = False) -> dict[str, float]:
    """`batch` random prompts of `length` tokens, `new` greedy tokens each, run twice: the second time counts. `alike`:
    the same prompt in all rows.

    The first compiles kernels and captures graphs. `new` = 1 measures prompts only. The engine must not cache prefixes.
    """
    if engine.config.enable_prefix_caching:
        raise InputError("a repeated workload would find its prompts cached -> use enable_prefix_caching=False")
    needed, there = cache_pages(batch, length, new, engine.config.page_size), engine.config.num_pages
    if needed > there:
        raise DoesNotFit(f"batch={batch} needs {needed} cache pages, there are {there} -> lower batch or lengths")
    prompts = random_prompts(engine.vocab_size, batch, length, alike=alike)
    _workload(engine, prompts, new)
    found = _workload(engine, prompts, new)
    memory = torch.cuda.max_memory_reserved() / 1e9 if _on_gpu(engine) else peak_memory_gb()
    return found | {"peak_memory_gb": memory}


def cache_pages(batch: int, length: int, new: int, page_size: int) -> int:
    """Cache pages with which all requests run at once: the scheduler lets a prompt in only where one page more is left
    for each of the others."""
    return batch * (1 + -(-(length + new) // page_size))


def random_prompts(vocab_size: int, batch: int, length: int, *, alike: bool = False) -> list[list[int]]:
    """Prompts of random tokens, the same ones for the same numbers."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, vocab_size, (batch, length), generator=generator)
    return (ids[:1].expand(batch, -1) if alike else ids).tolist()


def _workload(engine: Engine, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Prompts: until each request has its first token. Answers: from then until the first one ends, so that every step
    that counts has all the rows."""
    batch, length = len(prompts), len(prompts[0])
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    if _on_gpu(engine):
        torch.cuda.synchronize()
    start = time.perf_counter()
    requests = [engine.add(Request(prompt_token_ids=prompt, params=params)) for prompt in prompts]
    waiting, ended = set(requests), False
    while waiting:
        step = engine.step()
        waiting -= {delta.request_id for delta in step.deltas}
        ended = ended or bool(step.outputs)
    first = time.perf_counter()
    found = {"prompt_tokens_per_s": batch * length / (first - start), "ms_to_first_tokens": (first - start) * 1e3}
    if new > 1:
        if ended:
            raise InputError(
                f"output_len={new} at batch={batch}: an answer ended before the last prompt was computed "
                "-> raise output_len, or lower batch or input_len"
            )
        found |= _decode(engine, batch)
    for request in requests:
        engine.abort(request)
    while engine.busy:
        engine.step()
    return found


def _decode(engine: Engine, batch: int) -> dict[str, float]:
    """Steps of `batch` rows each, up to the first end of an answer."""
    drafted = _drafted(engine)
    start, steps, tokens = time.perf_counter(), 0, 0
    step = Step([], [])
    while not step.outputs:
        step = engine.step()
        steps += 1
        tokens += sum(len(delta.token_ids) for delta in step.deltas)
    seconds = time.perf_counter() - start
    return {
        "decode_tokens_per_s": tokens / seconds,
        "ms_per_step": seconds / steps * 1e3,
        "tokens_per_step": tokens / steps / batch,
        **{
            f"accepted_{i}": (right - right_before) / max(1, made - made_before)
            for i, ((made, right), (made_before, right_before)) in enumerate(zip(_drafted(engine), drafted), 1)
        },
    }


def _drafted(engine: Engine) -> list[tuple[int, int]]:
    """Drafts made and right so far, at each depth that the engine may draft to."""
    none = [0] * engine.config.num_speculative_tokens
    made, right = [*engine.stats.drafted_at, *none], [*engine.stats.accepted_at, *none]
    return list(zip(made, right))[: len(none)]


def _on_gpu(engine: Engine) -> bool:
    """Whether the engine's model lies on a GPU."""
    return engine.model.embed_tokens.weight.is_cuda


def random_model(config: ModelConfig, device: str, dtype: torch.dtype, std: float = STD, seed: int = 0) -> Transformer:
    """Weights ~ N(0, std^2), norms 1, biases 0, made on the device itself, which a large model needs."""
    try:
        model = hf.empty(config, device, dtype).eval()
    except RuntimeError as error:  # what torch raises when the device cannot give the memory
        count = parameters(config)
        size = (count.total + count.mtp) * dtype.itemsize / 1e9
        raise DoesNotFit(f"no memory on {device} for {size:,.0f} GB of weights -> take a smaller model") from error
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0 if name.endswith(".bias") else 1)
                continue
            for part in parameter if parameter.dim() == 3 else [parameter]:  # expert by expert
                part.normal_(0, std, generator=generator)
        for gate in model.gates():
            if gate.e_score_correction_bias is not None:
                gate.e_score_correction_bias.zero_()
    return model


def table(facts: dict[str, Any], rows: list[dict[str, float]]) -> str:
    """What was measured on, then one line per batch size."""
    drafts = facts["num_speculative_tokens"]
    head = (
        f"{facts['model']}: {facts['parameters']:,} parameters, {facts['dtype']}"
        + (", FP8 weights" if facts["quantization"] == "fp8" else "")
        + f", {facts['device']}\n"
        f"prompts of {facts['input_len']} random tokens, answers of {facts['output_len']}"
        + (f", {drafts} drafted per step" if drafts else "")
        + f"; cache {facts['kv_cache_dtype']}: {facts['cache_bytes_per_token']:,} bytes per token\n"
    )
    columns = [[COLUMNS[name], *(number(row[name]) for row in rows)] for name in rows[0]]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)) for line in zip(*columns)]
    return "\n".join((head, *lines))


def _limits(config: BenchConfig, shape: ModelConfig, answer: int) -> EngineConfig:
    """Room for the largest batch. InputError for options that the model's shape or this machine refuses."""
    least = 2 if config.phase == "decode" else 1
    for name, values, low in (
        ("batch", config.batch, 1), ("input-len", (config.input_len,), 1), ("output-len", (answer,), least)
    ):  # fmt: skip
        if not values or min(values) < low:
            given = " ".join(map(str, values)) or "without a number"
            raise InputError(f"--{name} {given} -> use whole numbers from {low}")
    if config.input_len + answer > shape.max_position_embeddings:
        raise InputError(
            f"--input-len {config.input_len} and an answer of {answer} are longer than "
            f"max_position_embeddings={shape.max_position_embeddings} of {config.model} -> shorten them"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here -> see benthic doctor, or use --device cpu")
    limits = EngineConfig(
        max_num_seqs=max(config.batch),
        max_model_len=config.input_len + answer,
        num_speculative_tokens=config.num_speculative_tokens,
        adaptive_speculation=False,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        enable_prefix_caching=False,
        num_pages=cache_pages(max(config.batch), config.input_len, answer, EngineConfig.page_size),
    )
    modules = shape.num_nextn_predict_layers if shape.mtp_type == "sequential" else 0
    return limits.resolve(shape.max_position_embeddings, modules)


def _model(config: BenchConfig, shape: ModelConfig) -> Transformer:
    """The folder's model, or the preset's shape with random weights; prediction modules only where they draft."""
    if config.model not in MODELS:
        return hf.load(Path(config.model), config.device, config.dtype, config.quantization)[0]
    gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    dtype = hf.DTYPES[("bfloat16" if gpu else "float32") if config.dtype == "auto" else config.dtype]
    if not config.num_speculative_tokens:
        shape = dataclasses.replace(shape, num_nextn_predict_layers=0)
    model = random_model(shape, "cuda" if gpu else "cpu", dtype)
    if config.quantization == "fp8":
        check_device(model.embed_tokens.weight.device)
        to_fp8(model)
    return model
