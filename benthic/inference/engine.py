"""The engine: requests in, tokens out, one `step()` at a time.

A trainer may change the parameters in place whenever no request is unfinished, and then calls `update_weights`: latents
are derived from them, and so is, where the engine computes in another format than the trainer's, a replica of the
weights. Not thread-safe: one thread owns an engine.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, Self

import torch

from benthic.base.errors import BenthicError, DoesNotFit, InputError
from benthic.inference import drafting, routed
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.grammar import Grammars, Matcher, bitmask
from benthic.inference.lead import Following, Leading, shared
from benthic.inference.replica import Replica
from benthic.inference.request import Delta, FinishReason, Output, Request, Seq
from benthic.inference.runner import PlainRunner, Runner
from benthic.inference.scheduler import Plan, Scheduler
from benthic.inference.share import Share, ranks_of
from benthic.inference.stats import Stats
from benthic.inference.stop import Transcript
from benthic.model.cache import bytes_per_token
from benthic.model.fp8 import check_device
from benthic.model.transformer import Transformer
from benthic.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("benthic")


class Decoder(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str: ...


class Step(NamedTuple):
    """What one step brought: new tokens of every request that got some, and whole outputs of those that ended."""

    deltas: list[Delta]
    outputs: list[Output]


class Engine:
    """Runs requests on `model`. With a tokenizer, outputs carry text, end at its end of sentence, and hold only ids
    that it knows: released models have embedding rows beyond the tokenizer's last id.

    Of a model that processes share, each makes an engine in the same order. Rank 0's is used as any other and closed at
    the end; the others' `follow`. The config is rank 0's.
    """

    def __init__(self, model: Transformer, tokenizer: Decoder | None, config: EngineConfig | None = None):
        c = model.config
        modules = c.num_nextn_predict_layers if c.mtp_type == "sequential" else 0  # others cannot draft one by one
        asked = ranks_of(model).same(config or EngineConfig())
        if isinstance(model, Share) and (asked.quantization == "fp8" or asked.deterministic):
            name = "deterministic=True" if asked.deterministic else "quantization='fp8'"
            raise InputError(f"{name} is for a model that one process holds -> leave it out, or use one process")
        if asked.quantization == "fp8":
            check_device(model.embed_tokens.weight.device)
        fused = on_kernels(model, asked)
        # Before the cache is measured: what a replica holds of its own is memory that the cache cannot have.
        self.replica = Replica(model, asked.quantization, cast=fused)
        self.config = fitted(asked.resolve(c.max_position_embeddings, modules), model, asked.num_pages)
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size = min(c.vocab_size, c.vocab_size if tokenizer is None else tokenizer.vocab_size)
        self.runner: Runner = make_runner(self.replica.model, self.config, self.vocab_size, fused)
        self.drafting = drafting.make(self.config.num_speculative_tokens, self.config.adaptive_speculation)
        self.scheduler = Scheduler(self.config, self.drafting)
        self.stats = Stats()
        store = self.runner.routed
        self._routing = None if store is None else routed.Routing(store, self.config.page_size)
        self._seqs: dict[int, Seq] = {}  # unfinished
        self._matchers: dict[int, Matcher] = {}  # of those whose answer must have a form
        self._transcripts: dict[int, Transcript] = {}  # of those that end with a stop string
        self._grammars: Grammars | None = None  # made when the first request needs it
        self._flying: deque[tuple[Plan, Any]] = deque()  # steps launched and not collected
        self._aborted: list[Seq] = []  # to be reported by the next step
        self._next_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what runs beside this process: the one that compiles the forms of answers, if a request needed it. Only
        a later request for a form starts it again. For the thread that owns the engine, with nobody compiling. The
        other processes of a shared model are let go; no step comes after that."""
        if self._grammars is not None:
            self._grammars.close()
            self._grammars = None
        if isinstance(self.runner, Leading):
            self.runner.close()

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do or to report."""
        return bool(self._seqs or self._aborted or self._flying)

    def add(self, request: Request) -> int:
        """Queue a request; returns its id. Raises InputError for what cannot be run."""
        prompt, params = request.prompt_token_ids, request.params
        self._check(prompt, params)
        max_len = min(self.config.max_model_len, len(prompt) + params.max_tokens)
        matcher = self.grammars.matcher(params.structured_outputs) if params.guided else None
        transcript = Transcript(self._need_tokenizer("stop"), params) if params.stop else None
        end = [] if self.tokenizer is None or params.ignore_eos else [self.tokenizer.eos_id]
        seq = Seq(
            request_id=self._next_id,
            ids=list(prompt),
            prompt_len=len(prompt),
            max_len=max_len,
            params=params,
            priority=request.priority,
            salt=request.cache_salt,
            num_drafts=0 if params.guided else self.config.num_speculative_tokens,
            stop=frozenset((*params.stop_token_ids, *end)),
        )
        self._next_id += 1
        self._seqs[seq.request_id] = seq
        if matcher is not None:
            self._matchers[seq.request_id] = matcher
        if transcript is not None:
            self._transcripts[seq.request_id] = transcript
        self.scheduler.add(seq)
        return seq.request_id

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        if params.n != 1:
            raise InputError(f"n={params.n} in one request -> add one request for each of params.samples()")
        if not isinstance(prompt, list) or not prompt:
            raise InputError(f"prompt_token_ids={prompt!r:.40} -> give a list with at least one token id")
        if len(prompt) >= self.config.max_model_len:
            raise InputError(
                f"prompt_token_ids has {len(prompt)} tokens, max_model_len={self.config.max_model_len} "
                f"-> use at most {self.config.max_model_len - 1}"
            )
        for token in params.logit_bias:
            if token >= self.vocab_size:
                raise InputError(f"logit_bias has token {token} -> use integers from 0 to {self.vocab_size - 1}")
        for i, token in enumerate(prompt):
            if type(token) is not int or not 0 <= token < self.vocab_size:
                last = self.vocab_size - 1
                raise InputError(f"prompt_token_ids[{i}]={token!r} is no token -> use integers from 0 to {last}")

    @property
    def grammars(self) -> Grammars:
        """The forms of answers, compiled. Another thread may compile a form before its request is added."""
        if self._grammars is None:
            self._grammars = Grammars(self._need_tokenizer("structured_outputs"), self.vocab_size)
        return self._grammars

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if not isinstance(self.tokenizer, Tokenizer):
            raise InputError(f"{what} needs a tokenizer, the engine has none -> use stop_token_ids and token ids alone")
        return self.tokenizer

    def abort(self, request_id: int) -> None:
        """End a request now; the next step reports it. One that has ended already is left alone."""
        if not 0 <= request_id < self._next_id:
            raise InputError(f"request {request_id} does not exist -> use an id that add() returned")
        if seq := self._seqs.pop(request_id, None):
            if self._routing:
                self._routing.keep([(seq, seq.pages, seq.computed)])
            self.scheduler.finish(seq, "abort")
            self._aborted.append(seq)
            self._forget(seq)

    def update_weights(self) -> None:
        """The model's parameters have changed in place: what is derived from them is derived anew, and latents computed
        with the old ones are not used for new requests."""
        self.replica.refresh()
        self.scheduler.reset_cache()

    def follow(self) -> None:
        """On a rank that is not 0: do what rank 0 does, until it closes or one of the ranks fails."""
        if not isinstance(self.runner, Following):
            raise BenthicError("follow() is for ranks other than 0 of a model that processes share")
        self.runner.run()

    def rebalance(self) -> None:
        """Place the experts of a model that processes share anew, by their load since the last time."""
        if isinstance(self.runner, Leading):
            self.runner.rebalance()

    def step(self) -> Step:
        """Run one batch. Without anything to do, the step is empty. After an error it has not happened; where it fails
        again, abort its requests."""
        finished = list(self._aborted)
        deltas = [Delta.of(seq, 0) for seq in finished]
        if self._seqs or self._flying:
            try:
                self._launch()
                plan, pending = self._flying.popleft()
                result = self.runner.collect(pending)
            except BaseException:
                self.scheduler.rollback()
                self._flying.clear()
                raise
            pages = [list(seq.pages) for seq in plan.seqs] if self._routing else []
            gained = self.scheduler.commit(plan, result.tokens)
            self.stats.count(plan, result.tokens, gained)
            alone = plan.decode if plan.decode == len(plan.seqs) else 0
            self.drafting.observe(alone, plan.queries - 1, plan.drafts, sum(gained))
            self.stats.preemptions = self.scheduler.preemptions
            for seq, scores in zip(plan.seqs, result.scores):
                seq.scores += scores
            for row, (seq, new) in enumerate(zip(plan.seqs, gained)):
                if not new:
                    continue
                seq.logprobs += result.logprobs[row][:new]
                seq.tops += result.tops[row][:new]
                seq.drafts = result.drafts[row]
                new -= self._follow(seq, new)
                deltas.append(Delta.of(seq, new))
                if seq.finish_reason:
                    finished.append(self._seqs.pop(seq.request_id))
            if self._routing:
                ended = [row for row, seq in enumerate(plan.seqs) if gained[row] and seq.finish_reason]
                self._routing.keep([(plan.seqs[row], pages[row], plan.seqs[row].computed) for row in ended])
        self._aborted.clear()  # only now: a step that fails has reported nothing
        return Step(deltas, [self._output(seq) for seq in finished])

    def _launch(self) -> None:
        """Keep as many steps in flight as the runner takes; answers of a given form need every token at once."""
        ahead = 0 if self._matchers else self.runner.ahead
        while len(self._flying) <= ahead:
            plan = self.scheduler.plan()
            if self._routing:
                self._routing.keep(self.scheduler.stepped_back)
            if not plan.seqs:
                return
            guided = [self._matchers[seq.request_id] for seq in plan.seqs if seq.params.guided]
            mask = bitmask(guided, self.vocab_size) if guided else None
            self._flying.append((plan, self.runner.launch(plan, mask)))

    def _follow(self, seq: Seq, new: int) -> int:
        """Tell grammar and stop strings of the new tokens; how many of them a stop string cuts off."""
        tokens = seq.ids[-new:]
        dropped = 0
        if transcript := self._transcripts.get(seq.request_id):
            dropped = new - transcript.feed(tokens)
            if dropped:
                del seq.ids[-dropped:], seq.logprobs[-dropped:]
                del seq.tops[len(seq.logprobs) :]
            if transcript.hit:
                self._end(seq, "stop")
        if matcher := self._matchers.get(seq.request_id):
            matcher.accept(tokens[: new - dropped])
            if matcher.slow:
                self._end(seq, "abort")
        return dropped

    def _end(self, seq: Seq, reason: FinishReason) -> None:
        if not seq.finish_reason:
            self.scheduler.finish(seq, reason)
        seq.finish_reason = reason

    def _forget(self, seq: Seq) -> Transcript | None:
        self._matchers.pop(seq.request_id, None)
        return self._transcripts.pop(seq.request_id, None)

    def _text(self, seq: Seq, transcript: Transcript | None) -> str:
        if self.tokenizer is None or transcript is not None:
            return transcript.finish() if transcript else ""
        return self.tokenizer.decode(seq.ids[seq.prompt_len :], skip_special=True)

    def _output(self, seq: Seq) -> Output:
        if not seq.finish_reason:
            raise RuntimeError(f"request {seq.request_id} has not finished")
        answer = seq.ids[seq.prompt_len :]
        return Output(
            request_id=seq.request_id,
            prompt_token_ids=seq.ids[: seq.prompt_len],
            token_ids=answer,
            logprobs=seq.logprobs,
            text=self._text(seq, self._forget(seq)),
            finish_reason=seq.finish_reason,
            num_cached_tokens=max(0, seq.cached_tokens),
            top_logprobs=seq.tops,
            prompt_logprobs=seq.prompt_logprobs,
            routed_experts=self._routing.take(seq) if self._routing else None,
        )

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Output]:
        """Run all prompts to the end: `params` for all, or one per prompt. The outputs stand in the order of the
        prompts, the n samples of one prompt together. `on_progress` gets (finished, all) after every step.

        The same seed for many prompts gives them the same random numbers; give each its own where that matters.
        Whatever ends this call early, by error or interrupt, also aborts its requests.
        """
        if self.busy:
            raise BenthicError("generate() on an engine with unfinished requests -> step() until it is not busy")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InputError(f"{len(each)} sampling params for {len(prompts)} prompts -> give one, or one per prompt")
        requests = [
            Request(prompt_token_ids=prompt, params=sample)
            for prompt, p in zip(prompts, each)
            for sample in p.samples()
        ]
        sample = [k for p in each for k in range(p.n)]
        outputs: dict[int, Output] = {}
        ids: dict[int, int] = {}  # place in the result -> request id
        try:
            # The first sample of each prompt first, the others then find it cached; among them the longest first.
            for place in sorted(range(len(requests)), key=lambda i: (sample[i], -len(requests[i].prompt_token_ids))):
                ids[place] = self.add(requests[place])
            while self.busy:
                outputs |= {output.request_id: output for output in self.step().outputs}
                if on_progress is not None:
                    on_progress(len(outputs), len(requests))
        finally:
            for request_id in list(self._seqs):
                self.abort(request_id)
            while self._flying:
                self.step()
            self._aborted.clear()
        return [outputs[ids[place]] for place in range(len(requests))]


def on_kernels(model: Transformer, config: EngineConfig) -> bool:
    """Whether the model runs on kernels: where they can compute it and it lies on a GPU, unless `backend` decides."""
    if config.backend != "auto" or not model.embed_tokens.weight.is_cuda:
        return config.backend == "fused"
    from benthic.inference import fused  # needs triton

    if reason := fused.unfit(model):
        log.warning("%s: the plain forward pass is used, which is slower", reason)
    return not reason


def make_runner(model: Transformer, config: EngineConfig, vocab_size: int, on_kernels: bool) -> Runner:
    """The runner on kernels or the plain one; of a model that several processes share, one for this process's part."""
    if on_kernels:
        from benthic.inference import fused_runner  # needs triton

        runner = fused_runner.FusedRunner(model, config, vocab_size)
    else:
        runner = PlainRunner(model, config, vocab_size)
    return shared(runner, model) if isinstance(model, Share) else runner


def fitted(config: EngineConfig, model: Transformer, asked: int) -> EngineConfig:
    """On a GPU, no more cache pages than its memory holds beside the weights; fewer than `asked` for is an error."""
    device = model.embed_tokens.weight.device
    if device.type != "cuda":
        return config
    free, total = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room -= int(total * (1 - config.gpu_memory_utilization))
    per_token = 8 + bytes_per_token(model.config, model.dtype.itemsize, config.kv_cache_dtype)
    if config.return_routed_experts:
        per_token += routed.bytes_per_token(model)
    per_page = config.page_size * per_token
    pages = ranks_of(model).least(min(config.num_pages, max(0, room // per_page)))
    longest = -(-config.max_model_len // config.page_size)
    if pages < longest:
        raise DoesNotFit(
            f"max_model_len={config.max_model_len} needs {longest} cache pages of {config.page_size} tokens, the "
            f"memory of {device} has room for {pages} -> lower max_model_len, or raise gpu_memory_utilization"
        )
    if pages < asked:
        raise DoesNotFit(f"num_pages={asked} on {device}, which has room for {pages} -> use {pages} or fewer, or 0")
    size = pages * per_page / 1e9
    log.info("cache: %s tokens in %s pages, %.1f GB", f"{pages * config.page_size:,}", f"{pages:,}", size)
    return replace(config, num_pages=pages)
