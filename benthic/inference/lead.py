"""One engine over several processes: rank 0 decides, the others do what it does.

Rank 0 has the engine that users talk to. Its runner is wrapped: before each step it tells the others what the step
computes (the plan's integers, and of every request what they do not know yet), then all compute it together. The other
ranks have the runner alone: no scheduler, tokenizer or grammar, and so nothing that could decide otherwise. They never
wait for results; what rank 0 launches next tells them all of it that matters, and the tokens that a step takes over on
the device from the one before are rank 0's there too (`Ranks.agree`).

They cannot run away from rank 0 either: it launches a step only once the one before the last is done everywhere,
because a step's sums need everyone.
"""

import base64
import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor

from benthic.base.config import to_dict
from benthic.base.errors import BenthicError
from benthic.inference.config import SamplingParams, StructuredOutputsParams
from benthic.inference.rebalance import better, move
from benthic.inference.request import Seq
from benthic.inference.runner import Result, Runner
from benthic.inference.scheduler import Plan
from benthic.inference.share import Share
from benthic.parallel.eplb import placement_of

log = logging.getLogger("benthic")


@dataclasses.dataclass
class Told:
    """What the others know of a request."""

    seq: Seq
    ids: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)


class Leading:
    """The runner of rank 0: `runner`, with the other ranks beside it."""

    def __init__(self, runner: Runner, share: Share):
        self.runner, self.share, self.ranks = runner, share, share.ranks
        self.cache, self.ahead, self.routed = runner.cache, runner.ahead, runner.routed
        self.steps = 0
        self._told: dict[int, Told] = {}

    def launch(self, plan: Plan, bitmask: Tensor | None = None) -> Any:
        """Start a step everywhere. An error ends all ranks."""
        interval = self.share.parallel.eplb_step_interval
        if interval and self.steps and self.steps % interval == 0:
            self.rebalance()
        self.steps += 1

        def work() -> Any:
            self.ranks.tell(self._message(plan, bitmask))
            return self.runner.launch(plan, bitmask)

        return self.ranks.guarded(work)

    def collect(self, pending: Any) -> Result:
        """Wait for a step's results. Results that are wrong are an error of this step, any other ends all ranks."""

        def work() -> Result | BenthicError:
            try:
                return self.runner.collect(pending)
            except BenthicError as error:
                return error

        found = self.ranks.guarded(work)
        if isinstance(found, BenthicError):
            raise found
        return found

    def rebalance(self) -> None:
        """Place experts anew by their load since the last time. Answers stay the same."""
        old = self.share.placement
        if old is None:
            return

        def work() -> None:
            new = better(self.share, old)
            changed = int((new.physical_to_logical != old.physical_to_logical).sum())
            self.ranks.tell({"do": "rebalance", "physical": new.physical_to_logical.tolist()})
            move(self.share, old, new)
            log.info("experts placed anew: %d of %d slots changed", changed, old.physical_to_logical.size)

        self.ranks.guarded(work)

    def close(self) -> None:
        """Let the other ranks go, unless a failure has ended them."""
        if not self.ranks.failure:
            self.ranks.guarded(lambda: self.ranks.tell({"do": "close"}))

    def _message(self, plan: Plan, bitmask: Tensor | None) -> dict[str, Any]:
        gone = [number for number, told in self._told.items() if told.seq.finish_reason]
        for number in gone:
            del self._told[number]
        mask = None
        if bitmask is not None:
            mask = [list(bitmask.shape), base64.b64encode(bitmask.contiguous().numpy().tobytes()).decode()]
        return {
            "do": "launch",
            "gone": gone,
            "rows": [self._row(seq) for seq in plan.seqs],
            "plan": [plan.counts, plan.starts, plan.sources, plan.decode, plan.queries, plan.drafts, plan.scores],
            "mask": mask,
        }

    def _row(self, seq: Seq) -> list[Any]:
        """Number, what changed and what was added, and where the others see the request for the first time its params:
        [number, computed, fill, drafts, further ids, pages kept, further pages, params or nothing]."""
        first = seq.request_id not in self._told
        told = self._told.setdefault(seq.request_id, Told(seq))
        kept = len(told.pages) if seq.pages[: len(told.pages)] == told.pages else 0
        row = [seq.request_id, seq.computed, seq.fill, seq.drafts, seq.ids[told.ids :], kept, seq.pages[kept:]]
        if first:
            row.append([to_data(seq.params), seq.prompt_len, seq.max_len, sorted(seq.stop)])
        told.ids = len(seq.ids)
        if kept < len(seq.pages):
            told.pages = list(seq.pages)
        return row


class Following:
    """The runner of another rank, and `run`, which is all it does."""

    def __init__(self, runner: Runner, share: Share):
        self.runner, self.share, self.ranks = runner, share, share.ranks
        self.cache, self.ahead, self.routed = runner.cache, runner.ahead, runner.routed
        self._seqs: dict[int, Seq] = {}

    def launch(self, plan: Plan, bitmask: Tensor | None = None) -> Any:
        """Only rank 0 runs requests."""
        raise BenthicError(f"this is rank {self.ranks.rank}, requests are rank 0's -> call follow() here")

    def collect(self, pending: Any) -> Result:
        """Only rank 0 runs requests."""
        return self.launch(pending)

    def run(self) -> None:
        """Do what rank 0 does until it closes. Raises what failed first, here or elsewhere."""
        while self.ranks.guarded(self._next):
            pass

    def _next(self) -> bool:
        message = self.ranks.hear()
        match message["do"]:
            case "launch":
                self._launch(message)
            case "rebalance":
                self._rebalance(message["physical"])
            case "close":
                return False
        return True

    def _launch(self, message: dict[str, Any]) -> None:
        for number in message["gone"]:
            del self._seqs[number]
        mask = None
        if message["mask"]:
            shape, data = message["mask"]
            mask = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.int32).view(shape)
        seqs = [self._seq(*row) for row in message["rows"]]
        self.runner.launch(Plan(seqs, *message["plan"]), mask)

    def _seq(
        self, number: int, computed: int, fill: int, drafts: list[int], ids: list[int], kept: int, pages: list[int],
        first: list[Any] | None = None,
    ) -> Seq:  # fmt: skip
        if first is not None:
            params, prompt_len, max_len, stop = first
            self._seqs[number] = Seq(
                request_id=number, ids=[], prompt_len=prompt_len, max_len=max_len, params=from_data(params),
                stop=frozenset(stop),
            )  # fmt: skip
        seq = self._seqs[number]
        seq.computed, seq.fill, seq.drafts = computed, fill, drafts
        seq.ids += ids
        seq.pages[kept:] = pages
        return seq

    def _rebalance(self, physical: list[list[int]]) -> None:
        old = self.share.placement
        if old is None:
            raise BenthicError("rank 0 moves experts, this rank has none -> start all ranks with the same options")
        slots = torch.tensor(physical).numpy()
        move(self.share, old, placement_of(slots, old.replica_counts.shape[1], old.devices, old.nodes))


def to_data(params: SamplingParams) -> dict[str, Any]:
    """What JSON carries; of the form of an answer only that there is one, because rank 0 makes the masks."""
    form = StructuredOutputsParams(json_object=params.guided)
    data = to_dict(dataclasses.replace(params, structured_outputs=form))
    return data | {"logit_bias": list(params.logit_bias.items())}


def from_data(data: dict[str, Any]) -> SamplingParams:
    """The inverse of `to_data`."""
    form = StructuredOutputsParams(json_object=data["structured_outputs"]["json_object"])
    return SamplingParams(**data | {"logit_bias": dict(data["logit_bias"]), "structured_outputs": form})


def shared(runner: Runner, share: Share) -> Leading | Following:
    """The runner of this rank."""
    return Leading(runner, share) if share.ranks.rank == 0 else Following(runner, share)
