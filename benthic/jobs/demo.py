"""Raw text in, a reasoning model out: every stage of the system, small, through the code that large runs use.

Each stage leaves `<stage>/result.json` when it is done; stages that train leave checkpoints on the way. The same
command again goes on from there, and ends with the same bits as a run that was never interrupted.
"""

import dataclasses
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benthic.base.config import to_dict
from benthic.base.errors import CheckpointError, InputError
from benthic.base.files import make_folder, remove_folder, write_json
from benthic.base.log import Run
from benthic.base.signals import Stop
from benthic.data.loader import Loader
from benthic.data.shards import Shards
from benthic.eval import report
from benthic.eval.run import evaluate
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Output
from benthic.jobs import corpus, measure
from benthic.model import hf
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.posttrain.grpo import PolicyGradient, Questions, grpo
from benthic.posttrain.rollout import ask
from benthic.posttrain.sft import Demonstrations, prompt_ids
from benthic.recipes.demo import DemoConfig
from benthic.tasks.arithmetic import Sums
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.train import checkpoint
from benthic.train.config import TrainConfig
from benthic.train.loss import LanguageModelling
from benthic.train.trainer import Trainer
from benthic.train.validate import bits_per_byte, held_out_loss

log = logging.getLogger("benthic")
CONFIG = "config.json"


def run(config: DemoConfig, stop: Stop) -> dict[str, Any]:
    """Run or continue the job in `config.output_dir`; returns what also stands in results.json."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise InputError(f"WORLD_SIZE={processes} -> this job runs in one process; start it without torchrun")
    found = torch.cuda.is_available()
    if config.device == "cuda" and not found:
        raise InputError("device='cuda' but torch sees no GPU -> use --device cpu, or check `benthic doctor`")
    if config.device == "auto":
        config = dataclasses.replace(config, device="cuda" if found else "cpu")
    job = Demo(config, stop)
    try:
        return job.run_all()
    finally:
        job.run.close()


class Demo:
    """The stages in order. Every one reads what earlier ones left on disk, so that any of them may be the first to run
    in a process."""

    def __init__(self, config: DemoConfig, stop: Stop):
        self.config, self.stop, self.folder = config, stop, config.output_dir
        make_folder(self.folder)
        self._same_config()
        self.run = Run(self.folder)
        self.run.header(config, config.device)
        self.task = Sums(seed=config.seed)
        self.compute = hf.DTYPES[config.dtype]

    def run_all(self) -> dict[str, Any]:
        """All stages, then results.json and report.html."""
        done = {
            "corpus": self.once("corpus", self.corpus),
            "pretrain": self.once("pretrain", self.pretrain),
            "balance_off": self.once("balance_off", self.balance_off) if self.config.balance_off_steps else {},
            "sft": self.once("sft", lambda: self.fine_tune("sft", self.config.sft, "pretrain", 0.0)),
            "shortcut": self.once(
                "shortcut", lambda: self.fine_tune("shortcut", self.config.shortcut, "sft", self.config.direct_share)
            ),
            "before": self.once("before", lambda: self.examine("shortcut")),
            "grpo": self.once("grpo", self.reinforce),
            "after": self.once("after", lambda: self.examine("grpo")),
            "measure": self.once("measure", self.measure),
        }
        results = self.results(done)
        write_json(self.folder / "results.json", results)
        report.write(self.folder)
        print(summary(results, self.folder))
        return results

    def once(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a stage: from disk if it is done, else by running it now."""
        path = self.folder / name / "result.json"
        if path.is_file():
            return json.loads(path.read_bytes())
        self.stop.raise_if_requested(f"stopped before stage {name}")
        make_folder(path.parent)
        started = time.perf_counter()
        result = stage() | {"wall_seconds": round(time.perf_counter() - started, 2)}
        write_json(path, result)
        return result

    def corpus(self) -> dict[str, Any]:
        """Clean text, a tokenizer, and token shards."""
        folder = self.folder / "corpus"
        return corpus.build(folder, self.config.corpus, self.config.model.vocab_size, self.config.seed, self.run)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "corpus" / "tokenizer")

    def shards(self, split: str) -> Shards:
        return Shards.open(self.folder / "corpus" / split)

    def fresh(self) -> Transformer:
        """A model with its initial weights."""
        model = hf.empty(self.config.model, self.config.device, torch.float32, self.compute)
        return initialise(model, self.config.initializer_range, self.config.seed)

    def trained(self, stage: str, compute: torch.dtype | None = None) -> Transformer:
        """The model that a finished stage left, computing as configured or in `compute`."""
        saved = checkpoint.newest(self.folder / stage / "checkpoints")
        if saved is None:
            raise InputError(
                f"stage {stage!r} in {self.folder} left no checkpoint -> delete its folder to run it again"
            )
        step, last = saved.state["step"], saved.state["config"]["max_steps"]
        if step != last:
            raise CheckpointError(
                f"stage {stage!r} in {self.folder} ended at step {last}, but only step {step} is whole -> delete its "
                "result.json and those of later stages, and run again"
            )
        model = hf.empty(self.config.model, self.config.device, torch.float32, compute or self.compute)
        hf.read_weights(saved.folder / "model", model)
        return model.eval()

    def trainer(self, stage: str, config: TrainConfig, model: Transformer, objective: Any, cursor: Any) -> Trainer:
        """A trainer of this job, resumed where it was."""
        held_out = self.shards("heldout") if config.eval_steps else None
        trainer = Trainer(
            model, objective, config, cursor=cursor, stage=stage, folder=self.folder / stage / "checkpoints",
            run=self.run, stop=self.stop, tokenizer=self.tokenizer(),
            validate=None if held_out is None else lambda m: self.validate(m, held_out, windows=64),
        )  # fmt: skip
        trainer.resume()
        return trainer

    def validate(self, model: Transformer, held_out: Shards, windows: int) -> dict[str, float]:
        """Bits per byte of held-out text; of `windows` windows spread over it, or of all with 0."""
        length = self.config.pretrain.max_length
        values = held_out_loss(model, held_out, length, self.config.pretrain.per_device_train_batch_size, windows)
        known = json.loads((self.folder / "corpus" / "result.json").read_bytes())
        bytes_per_token = known["heldout_bytes"] / known["heldout_tokens"]
        size = int(values["heldout_tokens"] * bytes_per_token)
        bits = bits_per_byte(values["heldout_loss"], int(values["heldout_tokens"]), size)
        return {"heldout_bits_per_byte": bits, **{k: v for k, v in values.items() if k != "heldout_tokens"}}

    def pretrain(self) -> dict[str, Any]:
        """Next-token and multi-token prediction on the corpus."""
        model, settings, held_out = self.fresh(), self.config.pretrain, self.shards("heldout")
        untrained = self.validate(model, held_out, windows=0)
        loader = self.loader(settings)
        self.trainer("pretrain", settings, model, LanguageModelling(settings), loader).fit(loader)
        return {
            "untrained": untrained,
            "trained": self.validate(model, held_out, windows=0),
            "max_violation": self.mean_violation("pretrain"),
        }

    def loader(self, settings: TrainConfig) -> Loader:
        rows = settings.per_device_train_batch_size
        return Loader(self.shards("train"), settings.max_length, rows, seed=self.config.seed)

    def balance_off(self) -> dict[str, Any]:
        """The first steps of pretraining again, without the bias update: what happens to the load of the experts?"""
        changed = {
            "bias_update_speed": 0.0,
            "max_steps": self.config.balance_off_steps,
            "lr_scheduler_type": "constant",
            "eval_steps": 0,
        }
        settings = TrainConfig(**to_dict(self.config.pretrain) | changed)
        loader, model = self.loader(settings), self.fresh()
        self.trainer("balance_off", settings, model, LanguageModelling(settings), loader).fit(loader)
        return {"max_violation": self.mean_violation("balance_off")}

    def mean_violation(self, stage: str) -> float:
        """Batch-wise MaxVio, mean over layers and over the logged batches of the last fifth of a stage."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["stage"] == stage and "max_violation" in row]
        last = [row["max_violation"] for row in rows if row["step"] > 0.8 * rows[-1]["step"]]
        return sum(last) / len(last)

    def fine_tune(self, stage: str, settings: TrainConfig, base: str, direct_share: float) -> dict[str, Any]:
        """Supervised fine-tuning of what `base` left, on demonstrations."""
        demonstrations = Demonstrations(
            self.task, self.tokenizer(), rows=settings.per_device_train_batch_size, length=settings.max_length,
            seed=self.config.seed, direct_share=direct_share,
        )  # fmt: skip
        objective = LanguageModelling(settings)
        self.trainer(stage, settings, self.trained(base), objective, demonstrations).fit(demonstrations)
        return {"demonstrations": demonstrations.taken}

    def reinforce(self) -> dict[str, Any]:
        """GRPO from the shortcut model, which is also the reference."""
        config, tokenizer = self.config, self.tokenizer()
        questions = Questions(self.task.problems("rl"))
        objective = PolicyGradient(config.grpo, config.rl)
        trainer = self.trainer("grpo", config.rl, self.trained("shortcut"), objective, questions)
        reference = self.trained("shortcut")
        grpo(trainer, self.engine(trainer.model), reference, self.task, questions, tokenizer, config.grpo)
        final = self.folder / "model"
        if final.exists():  # written by a process that was stopped before it could say so
            remove_folder(final)
        hf.write_model(final, trainer.model, tokenizer)
        return {"questions": questions.asked}

    def engine(self, model: Transformer) -> Engine:
        """An engine for short answers. Whoever changes the weights under it calls its `update_weights`."""
        return Engine(model, self.tokenizer(), EngineConfig(max_model_len=self.config.rl.max_length, max_num_seqs=512))

    def examine(self, stage: str) -> dict[str, Any]:
        """Sample held-out problems and grade."""
        settings, tokenizer, engine = self.config.evaluation, self.tokenizer(), self.engine(self.trained(stage))
        params = SamplingParams(max_tokens=self.config.grpo.max_completion_length, temperature=settings.temperature)
        problems = self.task.problems("eval")[: settings.problems]
        with self.run.progress(f"examine {stage}", len(problems) * settings.samples) as progress:

            def generate(prompts: list[str], samples: int) -> list[list[Output]]:
                key = f"eval/{self.config.seed}"
                return ask(engine, tokenizer, prompts, samples, params, key, lambda done, _: progress.update(done))

            found = evaluate(generate, self.task, problems, samples=settings.samples, seed=self.config.seed)
        return found.to_dict()

    def measure(self) -> dict[str, Any]:
        """Speculative decoding, the latent cache, and the two forms of attention, on the finished models."""
        final, base, tokenizer = self.trained("grpo"), self.trained("pretrain"), self.tokenizer()
        count = self.config.evaluation.speculative_prompts
        held_out, length = self.shards("heldout"), 32
        text = [held_out.read(i * length, (i + 1) * length).tolist() for i in range(count)]
        sums = [prompt_ids(p.prompt, tokenizer) for p in self.task.problems("eval")[:count]]
        parts: dict[str, Callable[[], Any]] = {
            "speculative": lambda: measure.speculation(base, tokenizer, text, 64),
            "speculative_sums": lambda: measure.speculation(
                final, tokenizer, sums, self.config.grpo.max_completion_length
            ),
            "absorbed_error": lambda: measure.absorbed_error(self.trained("grpo", torch.float32), held_out, 128, 4),
            "cache": lambda: measure.cache_bytes(final),
            "model": lambda: measure.facts(final),
        }
        found = {}
        with self.run.progress("measure", len(parts)) as progress:
            for name, part in parts.items():
                found[name] = part()
                progress.update(len(found))
        return found

    def results(self, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Everything the report shows, in one table."""
        text, base, measured = done["corpus"], done["pretrain"], done["measure"]
        samples = [sample | {"when": when} for when in ("before", "after") for sample in done[when]["transcripts"][:4]]
        return {
            "recipe": self.config.recipe,
            "seed": self.config.seed,
            "config": to_dict(self.config),
            "machine": {
                "python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform(),
                "device": self.config.device, "threads": str(torch.get_num_threads()),
            },
            "wall_seconds": {name: result["wall_seconds"] for name, result in done.items() if result},
            "peak_memory_gb": measure.peak_memory_gb(),
            "corpus": text,
            "tokenizer": {
                "vocab_size": self.config.model.vocab_size,
                "bytes_per_token": text["heldout_bytes"] / text["heldout_tokens"],
            },
            "model": measured["model"],
            "bits_per_byte": {
                "model": base["trained"]["heldout_bits_per_byte"],
                "untrained": base["untrained"]["heldout_bits_per_byte"],
                "gzip": text["gzip_bits_per_byte"],
                "gzip_per_document": text["gzip_per_document_bits_per_byte"],
                "limit": self.config.evaluation.bits_per_byte_limit,
            },
            "balance": {
                "with_bias": base["max_violation"],
                "without_bias": done["balance_off"].get("max_violation"),
                "limit": self.config.evaluation.max_violation_limit,
            },
            "rl": {name: done[name] for name in ("before", "after")} | {
                "problems": done["before"]["problems"],
                "samples": done["before"]["samples"],
                "how": self.how(),
            },
            "speculative": measured["speculative"],
            "speculative_sums": measured["speculative_sums"],
            "cache": measured["cache"],
            "absorbed_error": measured["absorbed_error"],
            "samples": samples,
        }  # fmt: skip

    def how(self) -> str:
        """How the starting point of RL was made, in plain words."""
        c = self.config
        return (
            f"The model was fine-tuned for {c.sft.max_steps} steps on sums with worked reasoning, then for "
            f"{c.shortcut.max_steps} steps on a mixture in which {c.direct_share:.0%} of the demonstrations state the "
            "answer without reasoning. This second step is deliberate: it plants a bad habit, so that the model still "
            "can reason but often does not. GRPO sees only whether an answer is right and well formed."
        )

    def _same_config(self) -> None:
        """A folder belongs to one configuration: another one is refused by the first key that differs."""
        path, now = self.folder / CONFIG, to_dict(self.config)
        if not path.is_file():
            write_json(path, now)
            return
        then = json.loads(path.read_bytes())
        for key, old, new in _differences(then, now):
            if key != "output_dir":
                raise InputError(
                    f"{self.folder} was begun with {key}={old!r}, now it is {new!r} -> restore it, or choose another "
                    "--output-dir"
                )


def summary(results: dict[str, Any], folder: Path) -> str:
    """What to tell a person when the run is over: the figures, and what to do with the model."""
    bits, balance, rl, drafts = (results[name] for name in ("bits_per_byte", "balance", "rl", "speculative"))
    before, after = rl["before"], rl["after"]
    return f"""
held-out text   {bits["model"]:.3f} bits per byte (gzip -9: {bits["gzip"]:.3f}, untrained: {bits["untrained"]:.2f})
expert load     MaxVio {balance["with_bias"]:.2f} (limit {balance["limit"]:g})
reasoning       pass@1 {before["pass@1"][0]:.3f} -> {after["pass@1"][0]:.3f} by GRPO, \
pass@8 {before["pass@8"][0]:.3f} -> {after["pass@8"][0]:.3f}, on {rl["problems"]} held-out problems
MTP drafts      {" ".join(f"{share:.0%}" for share in drafts["acceptance_at"])} accepted at depth \
{" ".join(str(1 + i) for i in range(len(drafts["acceptance_at"])))}, {drafts["tokens_per_step"]:.2f} tokens per step

report          {folder / "report.html"}
talk to it      benthic chat {folder / "model"}
serve it        benthic serve {folder / "model"}"""


def _differences(then: Any, now: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every leaf that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(then.keys() | now.keys())
        found = (_differences(then.get(k), now.get(k), f"{prefix}.{k}" if prefix else k) for k in keys)
        return [difference for some in found for difference in some]
    return [] if then == now else [(prefix, then, now)]
