"""Schedulers with one bug each, and the invariant of the simulation that notices it."""

import inspect
import types

from benthic.inference import pages, scheduler

# name: (what stands in scheduler.py or pages.py, what replaces it, what the simulation says)
MUTANTS = {
    "page 0 is handed out": ("range(TRASH + 1, num_pages + 1)", "range(TRASH, num_pages)", "the trash page is held"),
    "pages are rounded down": (
        "return -(-tokens // self.page_size)",
        "return max(1, tokens // self.page_size)",
        "a token has no page",
    ),
    "pages are given and kept": ("        pages.clear()\n", "", "a finished request keeps pages"),
    "a hit is not counted as a holder": ("            self.refs[page] += 1\n", "", "references are not holders"),
    "a held page stays in the free list": (
        "                del self.free[page]\n",
        "                pass\n",
        "free and held pages are not all pages, once each",
    ),
    "a page is free as soon as one holder gives it": (
        "            if self.refs[page] == 0:\n                self.free[page] = None",
        "            if self.refs[page] >= 0:\n                self.free[page] = None",
        "free and held pages are not all pages, once each",
    ),
    "an evicted page can still be found": ("                del self._nodes[key]\n", "", "a findable page is lost"),
    "the newest is evicted": (
        "self.free.popitem(last=False)[0]",
        "self.free.popitem()[0]",
        "a cached page goes although another is empty",
    ),
    "a chain loses its beginning first": (
        "for page in reversed(pages):",
        "for page in pages:",
        "a cached page goes before an older one",
    ),
    "empty pages go last": (
        "self.free.move_to_end(page, last=False)",
        "self.free.move_to_end(page)",
        "a cached page goes although another is empty",
    ),
    "a whole prompt is cached": (
        "min(len(ids) - 1, most)",
        "min(len(ids), most)",
        "a whole prompt is cached, and nothing is left to compute",
    ),
    "a page is found whatever stands before it": (
        "return node, salt, array(",
        "return self.root, salt, array(",
        "a cached prefix is not what a cold run writes",
    ),
    "tokens are trusted to a weak hash": (
        'return node, salt, array("i", ids[begin : begin + self.page_size + self.lookahead]).tobytes()',
        "return node, salt, bytes([sum(ids[begin : begin + self.page_size + self.lookahead]) % 4])",
        "a cached prefix is not what a cold run writes",
    ),
    "the salt is ignored": (
        "return node, salt, array(",
        'return node, "", array(',
        "a page is found with another salt",
    ),
    "a page is drafted for another next token": (
        "+ self.lookahead]).tobytes()",
        "]).tobytes()",
        "the module's latents are those of other tokens",
    ),
    "old weights are kept after a reset": ("        self._nodes.clear()\n", "", "a page of other weights can be found"),
    "the root survives a reset": (
        "        self.root = self._next_node\n",
        "",
        "a cached prefix is not what a cold run writes",
    ),
    "a copy hides its original": (
        "        if entry is None:\n            entry = self._nodes[key]",
        "        if True:\n            entry = self._nodes[key]",
        "a findable page is lost",
    ),
    "findable before it is computed": (
        "full = seq.computed // self.pool.page_size",
        "full = min(len(seq.pages), -(-seq.computed // self.pool.page_size))",
        "a findable page is written",
    ),
    "findable before it is committed": (
        "full = seq.computed //",
        "full = seq.start //",
        "a page is found before it is computed",
    ),
    "a finished request keeps its pages": (
        "            if seq.finish_reason and not seq.flying:\n                self.pool.give(seq.pages)\n",
        "",
        "a finished request keeps pages",
    ),
    "a finished request frees its pages in flight": (
        "            if seq.finish_reason and not seq.flying:\n",
        "            if seq.finish_reason:\n",
        "a page in flight is given away",
    ),
    "an abort frees its pages in flight": (
        "        if not seq.flying:\n            self.pool.give(seq.pages)\n\n",
        "        self.pool.give(seq.pages)\n\n",
        "a page in flight is given away",
    ),
    "the earliest is preempted": (
        "seq = self.running.pop()",
        "seq = self.running.pop(0)",
        "not the last by rank is preempted",
    ),
    "a preempted request believes its latents": (
        "        seq.computed = seq.start = 0\n",
        "",
        "a waiting request owns something",
    ),
    "a preempted request goes to the end": (
        "        insort(self.waiting, seq, key=_rank)\n        self.preemptions",
        "        self.waiting.append(seq)\n        self.preemptions",
        "waiting requests are out of order",
    ),
    "preemption in flight": (
        "if self._flying:\n                        return False",
        "if False:\n                        return False",
        "a request is preempted in flight",
    ),
    "priority is ignored": (
        "    return seq.rank\n",
        "    return 0, seq.request_id\n",
        "running requests are out of order",
    ),
    "nobody makes way": ("self.waiting[0].rank < self.running[-1].rank", "False", "a later request overtakes"),
    "growth is one short": (
        "        need = self.pool.needed(tokens) - len(seq.pages)\n",
        "        need = self.pool.needed(tokens - 1) - len(seq.pages)\n",
        "a token has no page",
    ),
    "growth beyond the free pages": (
        "        if need > len(self.pool.free):\n            return False\n",
        "",
        "1 pages wanted, 0 free",
    ),
    "a draft is fed without a page": ("count = 1  # nobody", "pass  # nobody", "a draft of a draft has no page"),
    "a draft goes past the end": (
        "min(seq.made, seq.max_len - 1 - end)",
        "seq.made",
        "a token has no page",
    ),
    "a draft is verified that nobody made": (
        "min(seq.made, seq.max_len - 1 - end)",
        "min(seq.num_drafts, seq.max_len - 1 - end)",
        "a row has more queries than there is room for",
    ),
    "drafts of drafts get no page": (
        "min(room + self.num_drafts - 1, seq.max_len - 1)",
        "room",
        "a draft of a draft has no page",
    ),
    "queries are counted without the first": (
        "queries = 1 + max((seq.made for",
        "queries = max((seq.made for",
        "a row has more queries than there is room for",
    ),
    "tokens after a stop are kept": (
        '            seq.finish_reason = "stop"\n            return count\n',
        '            seq.finish_reason = "stop"\n',
        "commit counts other tokens than it should",
    ),
    "a stop ends too early": (" and len(seq.ids) > seq.min_len", "", "a request ends otherwise than it should"),
    "an answer is one too long": (
        "len(seq.ids) >= seq.max_len:\n            seq.finish_reason",
        "len(seq.ids) > seq.max_len:\n            seq.finish_reason",
        "a request ends otherwise than it should",
    ),
    "the budget is exceeded": (
        "counts.append(min(seq.fill - seq.start, budget))",
        "counts.append(seq.fill - seq.start)",
        "the budget is exceeded",
    ),
    "decode rows are not budgeted": (
        "self.config.max_num_batched_tokens - sum(counts)",
        "self.config.max_num_batched_tokens",
        "the budget is exceeded",
    ),
    "decode leaves prompts nothing": (
        "1 + (budget - self.share) // (1 + self.num_drafts)",
        "budget // (1 + self.num_drafts)",
        "prompts are starved",
    ),
    "decode is starved": (
        "while row < len(self.running):",
        "while row < len(self.running) - 1:",
        "a decode row is starved",
    ),
    "prompts starve decode": (
        "and self._plan_decode(seqs, counts)):",
        "and (any(s.start < s.fill for s in self.running) or self._plan_decode(seqs, counts))):",
        "a decode row is starved",
    ),
    "too many run": (
        "len(self.running) >= self.max_rows",
        "len(self.running) > self.max_rows",
        "more requests run than max_num_seqs",
    ),
    "admission is too shy": (
        "- revived - need < len(self.running)",
        "- revived - need < 2 * len(self.running) + 2",
        "a request waits although there is room",
    ),
    "revived pages are counted twice": (
        "len(self.pool.free) - revived - need",
        "len(self.pool.free) - need",
        "1 pages wanted, 0 free",
    ),
    "a page too many": (
        "self.pool.needed(len(seq.ids)) - len(known)",
        "self.pool.needed(len(seq.ids)) + 1 - len(known)",
        "more pages are held than used",
    ),
    "the stuck are never asked again": ("self.pool.given, len(self.running))", "0, 0)", "a step without work"),
    "the prompt share is forgotten": (
        "max(1 + self.num_drafts, budget // 4)",
        "1 + self.num_drafts",
        "prompts are starved",
    ),
    "a prompt is planned twice": ("unfinished.pop(0)", "unfinished[0]", "a request is planned twice"),
    "the last prompt goes first": ("unfinished.pop(0)", "unfinished.pop()", "the first by rank is not in the step"),
    "a page table is out of order": (
        "seq.pages += self.pool.take(max(0, need))",
        "seq.pages[:0] = self.pool.take(max(0, need))",
        "a slot holds other latents than those of its context",
    ),
    "more is computed than is known": ("min(seq.fill - seq.start, budget)", "budget", "more is computed than is known"),
    "the last token of a found prefix is computed again": (
        "= len(known) * self.pool.page_size\n",
        "= len(known) * self.pool.page_size - bool(known)\n",
        "a shared page is written",
    ),
    "the first token is booked twice": (
        "seq.ids.append(token)",
        "seq.ids.append(chosen[0])",
        "the answer is not the one given alone",
    ),
    "the unknown token is fed": (
        "seq.row if seq.start >= len(seq.ids) else -1",
        "-1",
        "a row starts elsewhere than its latents end",
    ),
    "a row of the wrong source": (
        "            seq.row = row\n",
        "            seq.row = max(0, row - 1)\n",
        "a row continues another request",
    ),
    "drafts in flight are forgotten": ("                seq.slack += count - 1\n", "", "a token has no page"),
    "an ended row goes on in flight": (
        " or seq.start + 1 >= seq.max_len",
        "",
        "a row goes on although it has surely ended",
    ),
    "a wasted row is booked": (
        "            if not seq.finish_reason:\n                if row",
        "            if True:\n                if row",
        "commit counts other tokens than it should",
    ),
    "the middle of a prompt answers": (
        "if seq.computed == seq.fill:",
        "if True:",
        "commit counts other tokens than it should",
    ),
    "a rejected draft counts as computed": (
        "                    seq.computed += new\n",
        "                    seq.computed += plan.counts[row]\n",
        "what is computed is counted wrong",
    ),
    "an accepted draft is forgotten": ("seq.start += new - 1", "seq.start += 0", "something is in flight that is not"),
    "slack is kept": (
        "                    seq.slack -= plan.counts[row] - 1\n",
        "",
        "something is in flight that is not",
    ),
    "a rollback keeps the start": (
        "seq.start, seq.slack, seq.flying = seq.computed, 0, 0",
        "seq.slack, seq.flying = 0, 0",
        "something is in flight that is not",
    ),
    "a rollback keeps the pages of the ended": (
        "                if seq.finish_reason:\n                    self.pool.give",
        "                if False:\n                    self.pool.give",
        "a finished request keeps pages",
    ),
    "cached tokens are counted again": (
        "        if seq.cached_tokens < 0:\n",
        "        if True:\n",
        "cached tokens are counted wrong",
    ),
    "a prompt to be scored takes what is cached": (
        "len(seq.scores) if seq.unscored else len(seq.ids)",
        "len(seq.ids)",
        "a place of a prompt is scored twice or not",
    ),
    "a prompt that steps back is scored again": (
        "max(seq.start, len(seq.scores))",
        "seq.start",
        "a place of a prompt is scored twice or not",
    ),
    "the last place of a prompt is not scored": (
        "seq.prompt_len - 1)",
        "seq.prompt_len - 2)",
        "a request answers, and its prompt is not scored",
    ),
    "a finished request runs on": (
        "self.running = [seq for seq in self.running if not seq.finish_reason]",
        "pass",
        "a request is lost or doubled",
    ),
    "an admitted request is not the one that runs": (
        "seq = unfinished.pop(0) if unfinished else self.running[-1]",
        "seq = unfinished.pop(0) if unfinished else self.running[0]",
        "a row does not advance",
    ),
    "prompts pass for decode rows": (
        "        decode = len(seqs)\n        self._plan_prefill(seqs, counts)\n",
        "        self._plan_prefill(seqs, counts)\n        decode = len(seqs)\n",
        "a prompt decodes",
    ),
    "what follows a chunk waits": (
        "            budget -= counts[-1]",
        "            budget = 0 if seq.start else budget - counts[-1]",
        "budget is left over, and a prompt waits",
    ),
}


def mutant(old: str, new: str) -> type[scheduler.Scheduler]:
    """The Scheduler with one place of scheduler.py or pages.py rewritten. The place must exist exactly once."""
    sources = {module: inspect.getsource(module) for module in (pages, scheduler)}
    if sum(source.count(old) for source in sources.values()) != 1:
        raise ValueError(f"{old!r} does not stand exactly once in pages.py and scheduler.py")
    built = {}
    for module, source in sources.items():
        built[module] = types.ModuleType(module.__name__)
        exec(source.replace(old, new), vars(built[module]))
    built[scheduler].PagePool = built[pages].PagePool
    return built[scheduler].Scheduler
