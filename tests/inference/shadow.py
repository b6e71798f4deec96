"""The fake device of the simulation: memory in which every slot says what it was made from.

A slot holds a number that stands for its latents, made from the number before it, the token and the version of the
weights. A second array holds those of a drafting module, made from the first and the next token. Where it drafts beyond
the tokens of its step, it leaves provisional ones.
"""

import random
from dataclasses import dataclass, field

from benthic.inference.config import SamplingParams
from benthic.inference.pages import PagePool
from benthic.inference.request import Seq

VOCAB, STOP = 20, 7
MASK = (1 << 61) - 1
PROVISIONAL = -2
GREEDY, SCORED = SamplingParams(temperature=0), SamplingParams(temperature=0, prompt_logprobs=0)


class Broken(Exception):
    """An invariant does not hold."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)


def latent(before: int, token: int, version: int) -> int:
    """The fake model's layers."""
    return ((before ^ (version << 40)) * 1000003 + token * 8191 + 12345) & MASK


def draft_latent(value: int, next_token: int) -> int:
    """The fake drafting module."""
    return (value * 31 + next_token + 1) & MASK


def likeliest(value: int) -> int:
    """The fake model's choice after the token whose latent is `value`."""
    return (value >> 23) % VOCAB


def cold(ids: list[int], version: int) -> list[int]:
    """The latents of `ids` where nothing is cached."""
    values, value = [], 0
    for token in ids:
        value = latent(value, token, version)
        values.append(value)
    return values


@dataclass(eq=False)
class Life:
    """What the world and the device know of a request. `tokens` runs ahead of `seq.ids`, past a stop too."""

    seq: Seq
    version: int  # of the weights, when it arrived
    tokens: list[int]
    values: list[int] = field(default_factory=list)  # latents of tokens[:len(values)], which are on the device
    settled: int = 0  # tokens whose computation was committed
    drafts: list[int] = field(default_factory=list)
    failed: bool = False  # a step with it was lost


class Device:
    """Slots, and what executes rows on them. Every request knows what it must find where."""

    def __init__(self, rng: random.Random, pool: PagePool):
        self.rng, self.pool, self.page_size = rng, pool, pool.page_size
        count = 1 + pool.num_pages
        self.memory = [[0] * pool.page_size for _ in range(count)]
        self.draft_memory = [[0] * pool.page_size for _ in range(count)]
        self.settled = [False] * count  # the page's tokens were computed by committed steps
        self.salts = [""] * count  # of the last writer

    def execute(self, life: Life, start: int, count: int, decodes: bool, version: int, depth: int) -> list[int]:
        """Read the context of a row, write its latents, choose one token more than the drafts accepted, and draft."""
        seq = life.seq
        self.compare(self.memory, seq.pages, life.values, "a slot holds other latents than those of its context")
        feed = life.tokens[start : start + count]
        drafts = life.drafts[: count - len(feed)] if decodes else []
        require(len(feed) + len(drafts) == count, "more is computed than is known")
        value = life.values[-1] if life.values else 0
        values, chosen = [], []
        for token in feed + drafts:
            value = latent(value, token, version)
            values.append(value)
        if start + count >= len(life.tokens):
            chosen = [likeliest(values[len(feed) - 1])]
            for draft, value in zip(drafts, values[len(feed) :]):
                if draft != chosen[-1]:
                    break
                chosen.append(likeliest(value))
        after = chosen if decodes else life.tokens[start + 1 : start + count + 1] + chosen
        for offset, value in enumerate(values):
            self.write(seq, start + offset, value, after[offset] if offset < len(after) else -1)
        life.values += values[: len(chosen) if decodes else count]
        life.tokens += chosen
        if self.pool.lookahead and depth:
            drafted = list(map(draft_latent, life.values, life.tokens[1:]))
            self.compare(self.draft_memory, seq.pages, drafted, "the module's latents are those of other tokens")
        for position in range(len(life.values), len(life.values) + depth - 1):
            if position < len(seq.pages) * self.page_size:
                page = self.own(seq, position)
                self.draft_memory[page][position % self.page_size] = PROVISIONAL
        life.drafts = self.guess(life, version, depth)
        return chosen

    def guess(self, life: Life, version: int, depth: int) -> list[int]:
        """Each draft is right with probability 0.6."""
        value, drafts = latent(life.values[-1], life.tokens[-1], version), []
        for _ in range(depth):
            drafts.append(likeliest(value) if self.rng.random() < 0.6 else self.rng.randrange(VOCAB))
            value = latent(value, drafts[-1], version)
        return drafts

    def write(self, seq: Seq, position: int, value: int, next_token: int) -> None:
        page, offset = self.own(seq, position), position % self.page_size
        self.memory[page][offset] = value
        self.draft_memory[page][offset] = draft_latent(value, next_token)
        self.settled[page] = False
        self.salts[page] = seq.salt

    def own(self, seq: Seq, position: int) -> int:
        """The page of a position, to be written."""
        page = seq.pages[position // self.page_size]
        require(self.pool.refs[page] == 1, "a shared page is written")
        require(self.pool._keys[page] is None, "a findable page is written")
        return page

    def compare(self, memory: list[list[int]], table: list[int], values: list[int], what: str) -> None:
        """The slots of the context must hold `values`."""
        size = self.page_size
        read = [cell for page in table[: -(-len(values) // size)] for cell in memory[page]]
        require(read[: len(values)] == values, what)
