"""POST /v1/chat/completions and /v1/completions: prompts in, answers out, whole or in server-sent events."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benthic.server.answer import Answer
from benthic.server.asgi import Receive, Scope, Send
from benthic.server.calls import reader
from benthic.server.deliver import Reading, attended, patient, send_events, send_whole
from benthic.server.gate import caller
from benthic.server.prepare import Job, for_chat, for_completion
from benthic.server.replies import ChatReplies, CompletionReplies, Replies, Spelled
from benthic.server.route import Route, post
from benthic.server.service import Service
from benthic.server.stream import Stream
from benthic.server.types.chat import ChatRequest
from benthic.server.types.completions import CompletionRequest
from benthic.server.types.replies import ChatReply, CompletionReply
from benthic.server.types.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Generation:
    """An ASGI app for one request, so that one block owns the place in the worker to the last byte."""

    service: Service
    ask: Sampling
    prepare: Callable[[], Awaitable[Job]]
    replies: Replies
    parallel: bool = True
    """Whether an answer may hold several tool calls."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.service.worker.open(caller(scope)) as stream:
            await attended(receive, self._answer(stream, patient(send)))

    async def _answer(self, stream: Stream, send: Send) -> None:
        job = await self.prepare()
        stream.start(job.requests, deadline=self.ask.timeout)
        spelling = self.service.tokenizer
        answers = [
            Answer(spelling, job.style, reader(spelling, self.parallel) if job.calls else None, len(prompt.text))
            for prompt in job.prompts
            for _ in range(job.n)
        ]
        reading = Reading(stream, job, answers)
        options = self.ask.stream_options
        try:
            if self.ask.stream:
                await send_events(reading, self.replies, options is not None and options.include_usage, send)
            else:
                await send_whole(reading, self.replies, send)
        except TimeoutError:
            return  # a client that does not read loses its answer


@dataclass(frozen=True)
class Generating:
    """The routes that generate."""

    service: Service

    async def chat(self, ask: ChatRequest) -> Generation:
        """An answer to a conversation."""
        self.service.check_model(ask.model)
        spelled = Spelled(self.service.tokenizer, ask.return_tokens_as_token_ids)
        return Generation(
            service=self.service,
            ask=ask,
            prepare=lambda: for_chat(self.service, ask),
            replies=ChatReplies(self.service.name, spelled, ask.logprobs, ask.prompt_logprobs),
            parallel=ask.parallel_tool_calls,
        )

    async def completion(self, ask: CompletionRequest) -> Generation:
        """Continuations of prompts."""
        self.service.check_model(ask.model)
        spelled = Spelled(self.service.tokenizer, ask.return_tokens_as_token_ids)
        return Generation(
            service=self.service,
            ask=ask,
            prepare=lambda: for_completion(self.service, ask),
            replies=CompletionReplies(self.service.name, spelled, ask.logprobs is not None, ask.prompt_logprobs),
        )


def routes(service: Service) -> list[Route]:
    """Both."""
    to = Generating(service)
    return [
        post("/v1/chat/completions", to.chat, ChatRequest.read, ChatReply, "Answer a conversation"),
        post("/v1/completions", to.completion, CompletionRequest.read, CompletionReply, "Go on with prompts"),
    ]
