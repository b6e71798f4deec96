"""One page that tells a stranger what a run did: report.html, from metrics.jsonl and results.json alone.

Every verdict is computed from the data. A part that the run does not have is left out with a sentence in its place.
The same files give the same bytes.
"""

import re
from pathlib import Path
from statistics import median
from typing import Any

from benthic.base.files import write_atomic
from benthic.base.log import clock, number
from benthic.eval import page, plots
from benthic.eval.page import Bar, amount, esc, size
from benthic.eval.plots import Chart, Line
from benthic.eval.record import Record, read

MOST_QUESTIONS, MOST_ANSWERS = 12, 4  # shown; answers per question
THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
SMOOTHED = "Thin: every logged step; thick: mean over neighbouring steps."


def write(folder: Path) -> Path:
    """Write folder/report.html. Raises InputError for a line or key of the run's files that cannot be used."""
    record = read(folder)
    parts = (_head, _corpus, _pretraining, _experts, _reasoning, _inference, _samples, _repeat)
    path = folder / "report.html"
    title = f"Benthic: {record.results.get('recipe', record.name)}"
    write_atomic(path, page.document(title, "\n".join(part(record) for part in parts)).encode())
    return path


def _head(record: Record) -> str:
    results = record.results
    seed = f", seed {results['seed']}" if "seed" in results else ""
    state = "" if results else page.missing("This run has not finished: it has no results.json yet.")
    tiles = [*_model_tiles(results), *_reasoning_tiles(results), *_inference_tiles(results)]
    return (
        f'<header><p class="eyebrow">Benthic run report{esc(seed)}</p>'
        f"<h1>{esc(results.get('recipe', record.name))}</h1>"
        f'<p class="lead">{esc(_story(record))}</p>{state}</header><div class="tiles">{"".join(tiles)}</div>'
    )


def _story(record: Record) -> str:
    """What happened, in a few sentences; only what is known."""
    results, said = record.results, []
    if corpus := results.get("corpus"):
        said.append(f"{amount(corpus['documents'])} documents ({size(corpus['bytes'])}) of raw text went in.")
    tokens = record.curve("pretrain", "tokens")
    if model := results.get("model"):
        seen = f" by reading {amount(tokens.values[-1])} tokens" if tokens else ""
        said.append(
            f"A language model of {amount(model['parameters'])} parameters, of which each token uses "
            f"{amount(model['active_parameters'])}, learned from nothing to predict text{seen}."
        )
    if rl := results.get("rl"):
        before, after = rl["before"]["pass@1"], rl["after"]["pass@1"]
        change = f"{before[0]:.0%} before, {after[0]:.0%} after"
        effect = "raised" if _raised(rl) else "did not reliably change"
        said.append(
            "After examples of how to answer questions, reinforcement learning with exact rewards "
            f"{effect} the share of problems solved at the first try: {change}."
        )
    if wall := results.get("wall_seconds"):
        said.append(f"All of it took {clock(sum(wall.values()))} (h:mm:ss).")
    return " ".join(said) or "What this run has measured so far."


def _raised(rl: dict[str, Any]) -> bool:
    """Whether pass@1 rose beyond what chance explains: the 95% intervals do not touch."""
    return rl["after"]["pass@1"][1] > rl["before"]["pass@1"][2]


def _model_tiles(results: dict[str, Any]) -> list[str]:
    tiles = []
    if bits := results.get("bits_per_byte"):
        note = f"gzip -9 needs {bits['gzip']:.2f}, the untrained model {bits['untrained']:.2f}"
        met, limit = bits["model"] <= bits["limit"], f"at most {bits['limit']:.2f}"
        tiles.append(page.tile("Bits per byte of unseen text", f"{bits['model']:.2f}", note, met, limit))
    if balance := results.get("balance"):
        without = balance["without_bias"]
        control = "" if without is None else f"; {without:.2f} without the balancing bias"
        note = f"fullest expert above the even share{control}"
        met, limit = balance["with_bias"] <= balance["limit"], f"at most {balance['limit']:.2f}"
        tiles.append(page.tile("Expert imbalance (MaxVio)", f"{balance['with_bias']:.2f}", note, met, limit))
    return tiles


def _reasoning_tiles(results: dict[str, Any]) -> list[str]:
    if not (rl := results.get("rl")):
        return []
    tiles = []
    for key, name in (("pass@1", "Solved at the first try"), ("pass@8", "Solved within eight tries")):
        before, (after, low, high) = rl["before"][key], rl["after"][key]
        note = f"95% interval {low:.0%} to {high:.0%}; {before[0]:.0%} before reinforcement learning"
        met = _raised(rl) if key == "pass@1" else None  # the claim is about pass@1; pass@8 may start near 1
        tiles.append(page.tile(name, f"{after:.0%}", note, met, "a rise beyond chance"))
    return tiles


def _inference_tiles(results: dict[str, Any]) -> list[str]:
    tiles = []
    if fast := results.get("speculative"):
        note = f"{fast['tokens_per_step']:.2f} tokens per step instead of 1"
        limit = "answers unchanged"
        tiles.append(page.tile("First guesses accepted", f"{fast['acceptance']:.0%}", note, fast["identical"], limit))
    if cache := results.get("cache"):
        note = f"{size(cache['mla'])} per token, where multi-head attention would keep {size(cache['mha'])}"
        tiles.append(page.tile("Attention cache", f"{cache['mla'] / cache['mha']:.1%}", note))
    return tiles


def _corpus(record: Record) -> str:
    lead = (
        "Copies teach nothing new and text that is mostly noise teaches the wrong thing, so both go. Part of the "
        "documents is held out: never trained on, only used to measure."
    )
    if not (corpus := record.results.get("corpus")):
        return page.section("Corpus", lead, page.missing("The corpus has not been described yet."))
    distinct = corpus["documents"] - corpus["exact_duplicates"]
    different = distinct - corpus["near_duplicates"]
    good = different - sum(corpus["rejected"].values())
    funnel = [
        Bar("read", corpus["documents"], f"{number(corpus['documents'])} documents, {size(corpus['bytes'])}"),
        Bar("not an exact copy", distinct, f"{number(distinct)} (−{number(corpus['exact_duplicates'])})"),
        Bar("not a near copy", different, f"{number(different)} (−{number(corpus['near_duplicates'])})"),
        Bar("good enough", good, f"{number(good)} (−{number(different - good)})"),
    ]
    for key, name in (("train", "for training"), ("heldout", "held out")):
        count, held = corpus[f"{key}_documents"], corpus[f"{key}_bytes"]
        funnel.append(Bar(name, count, f"{number(count)} documents, {size(held)}", strong=True))
    parts = [page.bars(funnel)]
    if words := record.results.get("tokenizer"):
        text = (
            f"The tokenizer knows {number(words['vocab_size'])} tokens; one stands for {words['bytes_per_token']:.2f}"
        )
        parts.append(f"<p>{text} bytes of text on average.</p>")
    if rejected := corpus["rejected"]:
        rows = sorted(((rule, number(n)) for rule, n in rejected.items()), key=lambda row: (-rejected[row[0]], row[0]))
        parts.append(page.details(f"Rejected by rule: {number(different - good)}", page.table(rows)))
    if skipped := corpus["skipped"]:
        rows = [(entry["path"], entry["reason"]) for entry in skipped]
        parts.append(page.details(f"Files skipped: {number(len(rows))}", page.table(rows)))
    return page.section("Corpus", lead, *parts)


def _pretraining(record: Record) -> str:
    lead = (
        "The model reads text and learns to predict the next token. Bits per byte says how well: the bits it would "
        "need to store one byte of text that it has never seen. Knowing nothing costs 8; a general compressor such as "
        "gzip is the line that a language model should cross."
    )
    bits = plots.bits_chart(record)
    loss = [
        Line(label="next token", curve=record.curve("pretrain", "loss"), smooth=True),
        Line(label="MTP", curve=record.curve("pretrain", "mtp_loss"), color="violet", smooth=True),
        Line(label="MTP, held out", curve=record.curve("pretrain", "heldout_mtp_loss"), color="green", dots=True),
    ]
    drawn = []
    if bits.lines[0].curve:
        caption = "On held-out documents; lower is better."
        if known := record.results.get("bits_per_byte"):
            alone = f"{known['gzip_per_document']:.2f}"
            caption += f" gzip -9 compresses them as one file; one by one it needs {alone}."
        drawn.append(page.figure(plots.chart(bits), "Bits per byte of unseen text", caption))
    if loss[0].curve:
        caption = f"A second head predicts one token further ahead (multi-token prediction, MTP). {SMOOTHED}"
        drawn.append(page.figure(plots.chart(Chart(lines=loss, y="nats per token")), "Training loss", caption))
    body = page.figures(*drawn) if drawn else page.missing("No pretraining step has been logged yet.")
    return page.section("Pretraining", lead, body)


def _experts(record: Record) -> str:
    lead = (
        "Each token is sent to a few experts, and routers left alone play favourites. A bias per expert, raised when "
        "it gets too little and lowered when it gets too much, is there to keep the work even."
    )
    parts = []
    steps, loads = record.loads("pretrain")
    if steps:
        caption = (
            'Each row is one expert. Load against an even share: none<span class="key"></span>double or more. '
            "No colour is exactly even."
        )
        parts.append(page.figure(plots.heat(steps, loads), "Load of every expert over time", caption))
    lines = [
        Line(label="with bias", curve=record.curve("pretrain", "max_violation"), smooth=True),
        Line(label="without bias", curve=record.curve("balance_off", "max_violation"), color="orange", smooth=True),
    ]
    if lines[0].curve:
        balance = record.results.get("balance")
        marks = [("limit", balance["limit"])] if balance else []
        drawing = plots.chart(Chart(lines=lines, y="MaxVio", marks=marks, zero=True), width=10.4, height=2.8)
        caption = f"MaxVio: how far the fullest expert is above the even share; 0 is even, 1 is double. {SMOOTHED}"
        parts.append(page.figure(drawing, "Imbalance", caption))
    return page.section("Experts", lead, *(parts or [page.missing("No expert load has been logged yet.")]))


def _reasoning(record: Record) -> str:
    lead = (
        "The model samples several answers to each question. Exact rules score them: one point for the right answer, "
        "one for the right form, none for thinking as such. Answers better than their siblings become more likely, "
        "worse ones less (GRPO)."
    )
    parts, drawn = [], []
    if rl := record.results.get("rl"):
        parts.append(f"<p>{esc(rl['how'])}</p>")
        caption = (
            f"{number(rl['problems'])} held-out problems, {number(rl['samples'])} samples each. "
            "Whiskers: 95% intervals over problems. pass@8: at least one of eight tries is right."
        )
        drawn.append(page.figure(plots.pass_bars(rl["before"], rl["after"]), "Problems solved", caption))
    reward = plots.reward_chart(record)
    if reward.lines[0].curve:
        caption = f"Mean over the sampled answers of a step, accuracy plus format. {SMOOTHED}"
        drawn.append(page.figure(plots.chart(reward), "Reward while learning", caption))
    if not drawn:
        return page.section("Reasoning", lead, page.missing("No reinforcement learning step has been logged yet."))
    parts.append(page.figures(*drawn))
    parts += _learning(record)
    if rl:
        parts.append(page.details("All figures before and after", _outcomes(rl)))
    return page.section("Reasoning", lead, *parts)


def _learning(record: Record) -> list[str]:
    """What else moved while the policy was trained; the diagnostics are folded away."""

    def small(*wanted: tuple[str, str, str, str]) -> list[Chart]:
        found = [(record.curve(stage, key), key, title, color) for stage, key, title, color in wanted]
        return [Chart(lines=[Line(label=k, curve=c, color=color, smooth=True)], y=t) for c, k, t, color in found if c]

    shown = small(
        ("grpo", "length", "tokens per answer", "violet"),
        ("grpo", "accuracy", "share right", "green"),
        ("grpo", "format", "share well formed", "green"),
        ("grpo", "kl", "KL to the reference (nats)", "blue"),
    )
    folded = small(
        ("sft", "loss", "fine-tuning loss (nats)", "grey"),
        ("grpo", "entropy", "entropy (nats)", "grey"),
        ("grpo", "clip_fraction", "share clipped", "grey"),
        ("grpo", "zero_std_groups", "groups without signal", "grey"),
    )
    caption = "Length shows whether the model takes to thinking; KL how far it has moved from the reference model."
    parts = [page.figure(plots.row(shown), "What changed meanwhile", caption)] if shown else []
    return parts + ([page.details("Fine-tuning and health of the updates", plots.row(folded))] if folded else [])


def _outcomes(rl: dict[str, Any]) -> str:
    def show(key: str, value: Any) -> str:
        if key.startswith("pass@"):
            return f"{value[0]:.1%} ({value[1]:.1%} to {value[2]:.1%})"
        return f"{value:.1f} tokens" if key == "length" else f"{value:.1%}"

    names = {"pass@1": "pass@1", "pass@8": "pass@8", "well_formed": "well formed", "length": "length"}
    return page.table((name, f"{show(k, rl['before'][k])} → {show(k, rl['after'][k])}") for k, name in names.items())


def _inference(record: Record) -> str:
    lead = (
        "The same weights then serve requests. Attention keeps one small latent per token instead of keys and values "
        "per head (MLA), and the second head guesses a token ahead, which the model checks in the same step."
    )
    parts = []
    if cache := record.results.get("cache"):
        names = {"mla": "MLA, this model", "mqa": "multi-query", "gqa": "grouped-query", "mha": "multi-head"}
        rows = [
            Bar(name, cache[kind], f"{size(cache[kind])}, {cache[kind] / cache['mha']:.1%}", strong=kind == "mla")
            for kind, name in names.items()
        ]
        parts.append(f"<h3>Cache per token, all layers</h3>{page.bars(rows)}")
    else:
        parts.append(page.missing("The size of the cache has not been measured."))
    parts += [
        _guesses(record.results[key], name)
        for key, name in (("speculative", "On held-out text"), ("speculative_sums", "On the questions of the task"))
        if key in record.results
    ] or [page.missing("Guessing ahead has not been tried.")]
    if (error := record.results.get("absorbed_error")) is not None:
        parts.append(
            "<p>Decoding folds the up-projections of keys and values into the query and the output. Against the plain "
            f"form of the same attention the largest difference in any logit was {error:.1e}.</p>"
        )
    return page.section("Inference", lead, *parts)


def _guesses(fast: dict[str, Any], where: str) -> str:
    same = "the same answers as" if fast["identical"] else "not the same answers as"
    return (
        f"<p>{where}: with guesses, {number(fast['requests'])} requests got {same} without. {fast['acceptance']:.1%} "
        f"of the first guesses of a step were accepted; it made {fast['tokens_per_step']:.2f} tokens.</p>"
    )


def _samples(record: Record) -> str:
    lead = "Answers as they were sampled; the thought is set apart from the answer. The right answer is in grey."
    asked: dict[str, list[dict[str, Any]]] = {}
    for sample in record.results.get("samples", []):
        asked.setdefault(sample["prompt"], []).append(sample)
    if not asked:
        return page.section("Samples", lead, page.missing("There are no samples yet."))
    groups = []
    for prompt, given in list(asked.items())[:MOST_QUESTIONS]:
        question = f'<p class="question">{esc(prompt)} <span class="missing">{esc(given[0]["answer"])}</span></p>'
        cards = "".join(_sample(sample) for sample in given[:MOST_ANSWERS])
        groups.append(f'<div>{question}<div class="pair">{cards}</div></div>')
    return page.section("Samples", lead, f'<div class="samples">{"".join(groups)}</div>')


def _sample(sample: dict[str, Any]) -> str:
    kind, mark = ("met", "✓ right") if sample["correct"] else ("missed", "✗ wrong")
    if found := THOUGHT.fullmatch(sample["text"]):
        thought = esc(found[1].strip()) or "(no thought)"
        body = f'<div class="thought">{thought}</div><div class="answer">{esc(found[2].strip())}</div>'
    else:
        body = esc(sample["text"])
    return (
        f'<div class="sample"><span class="badge {kind}">{mark}</span> '
        f'<span class="when">{esc(sample["when"])} reinforcement learning</span><div class="text">{body}</div></div>'
    )


def _repeat(record: Record) -> str:
    results, parts = record.results, []
    if wall := results.get("wall_seconds"):
        rows = [Bar(stage, seconds, clock(seconds), strong=True) for stage, seconds in wall.items()]
        parts.append(f"<h3>Wall time by stage (h:mm:ss)</h3>{page.bars(rows)}")
    if speed := record.curve("pretrain", "tokens_per_s"):
        parts.append(f"<p>Pretraining read {number(median(speed.values))} tokens per second (median over steps).</p>")
    for key, name in (("model", "Model"), ("machine", "Machine and versions"), ("config", "Configuration")):
        if results.get(key):
            parts.append(page.details(name, page.table(page.flat(results[key]))))
    if not results:
        parts.append(page.missing("Times by stage, machine and configuration are written when the run ends."))
    return page.section("Repeat it", "Where the time went, and what it takes to do it again.", *parts)
