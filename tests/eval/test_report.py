"""The report is safe to open, says only what the data says, and refuses what it cannot read."""

import json
from html.parser import HTMLParser
from pathlib import Path

import example_run as example
import pytest

from benthic.base.errors import InputError
from benthic.eval import plots, report
from benthic.eval.record import read

VOID = {"meta", "br"}
ALLOWED = set(
    "html head meta title style body main header section div p span h1 h2 h3 figure figcaption details summary "
    "table tr th td svg g path defs use text clippath rect image".split()
)


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on a tag that is closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: Path) -> Page:
    return Page(report.write(folder).read_text())


def outcome_only(folder: Path, **changes) -> Page:
    """The page of results without metrics: fast, because few charts are drawn."""
    return page_of(example.write_run(folder, [], example.results() | changes))


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return report.write(example.write_run(tmp_path_factory.mktemp("run"))).read_text()


def test_the_page_is_one_file_that_fetches_and_runs_nothing(html):
    page = Page(html)
    assert page.tags <= ALLOWED
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in {"src", "srcset", "action", "ping"}
        if name.endswith("href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert "http" not in html.replace("http-equiv", "")
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert len(html.encode()) < 2_000_000


def test_charts_take_their_colours_and_font_from_the_page(html):
    body = html.split("</style>")[1]
    assert "var(--blue)" in body
    assert not [color for color in plots.LIGHT.values() if color in body]
    assert "DejaVu" not in body
    assert "<metadata" not in body


def test_the_same_files_give_the_same_bytes(html, tmp_path):
    assert report.write(example.write_run(tmp_path / "again")).read_text() == html


def test_other_numbers_give_another_picture(tmp_path):
    """Control of the test above."""
    rewards = [[{"stage": "grpo", "step": s, "reward": r * s} for s in (1, 2, 3)] for r in (1, -1)]
    charts = [plots.reward_chart(read(example.write_run(tmp_path / f"r{i}", r))) for i, r in enumerate(rewards)]
    assert plots.chart(charts[0]) != plots.chart(charts[1])


def test_every_part_of_a_finished_run_is_there(html):
    text = Page(html).text
    for title in (
        "Bits per byte of unseen text",
        "Training loss",
        "Load of every expert over time",
        "Imbalance",
        "Problems solved",
        "Reward while learning",
        "What changed meanwhile",
        "Cache per token, all layers",
        "Wall time by stage",
        "Machine and versions",
        "Configuration",
    ):
        assert title in text
    assert "gzip -9" in text
    assert "untrained model" in text
    assert "not UTF-8" in text
    assert "not finished" not in text


def test_the_rounding_of_a_constant_is_not_magnified(tmp_path):
    rows = [{"stage": "grpo", "step": step, "reward": 0.02} for step in range(60)]
    drawing = plots.chart(plots.reward_chart(read(example.write_run(tmp_path, rows))))
    assert max(len(label) for label in Page(drawing).words if label.strip()) <= len("mean reward")
    assert "0.020" in Page(drawing).text


BITS = example.results()["bits_per_byte"]
BALANCE = example.results()["balance"]
RL = example.results()["rl"]
FAST = example.results()["speculative"]


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, 0),
        ({"bits_per_byte": BITS | {"limit": 1.5}}, 1),
        ({"balance": BALANCE | {"with_bias": 0.6}}, 1),
        ({"rl": RL | {"after": RL["before"]}}, 1),
        ({"speculative": FAST | {"identical": False}}, 1),
        ({"bits_per_byte": BITS | {"model": 2.0}, "balance": BALANCE | {"limit": 0.1}}, 2),
    ],
)
def test_met_and_missed_follow_from_the_data(tmp_path, changes, missed):
    text = outcome_only(tmp_path, **changes).text
    assert text.count("✗ missed:") == missed
    assert text.count("✓ met:") == 4 - missed


def test_an_effect_that_is_not_there_is_not_claimed(tmp_path):
    assert "rewards raised the share" in outcome_only(tmp_path / "a").text
    text = outcome_only(tmp_path / "b", rl=RL | {"after": RL["before"]}).text
    assert "rewards did not reliably change the share" in text
    assert "the same answers as without" in outcome_only(tmp_path / "c").text
    assert (
        "not the same answers as without" in outcome_only(tmp_path / "d", speculative=FAST | {"identical": False}).text
    )


def test_the_funnel_adds_up(tmp_path):
    text = outcome_only(tmp_path).text
    for shown in ("1,843 documents, 10.3 MB", "1,782 (−61)", "1,678 (−104)", "1,569 (−109)", "1,491 documents"):
        assert shown in text


PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style></title><iframe src=//evil.test>",
    "<!--",
    "]]><b>&lt;",
    "\x00\x07\ud800\u202e",
    "$\\frac{a}{0}$ {x} %s",
    "<think></think></div></section>",
]


def poisoned(value, payload):
    """Every text, key of a free table included, replaced by the payload."""
    if isinstance(value, dict):
        return {key: poisoned(item, payload) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, payload) for item in value]
    return payload if isinstance(value, str) else value


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_text_from_data_becomes_markup(tmp_path, payload):
    data = poisoned(example.results(), payload)
    data["wall_seconds"] = {payload: 1.0}
    data["corpus"]["rejected"] = {payload: 2}
    data["machine"] = {payload: payload}
    data["config"] = {payload: {payload: [payload, None, True]}}
    page = page_of(example.write_run(tmp_path, [{"stage": payload, "step": 1, payload: 1.0}], data))
    assert page.tags <= ALLOWED
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert page.open == []


def test_the_escape_is_what_keeps_markup_out(tmp_path, monkeypatch):
    """Control: with escaping off the same check fails."""
    monkeypatch.setattr(report, "esc", lambda text, longest=0: str(text))
    page = outcome_only(tmp_path, samples=[], rl=RL | {"how": "<iframe></iframe>"})
    assert not page.tags <= ALLOWED


def test_the_thought_is_set_apart_and_a_malformed_answer_shown_as_it_is(html):
    assert '<div class="thought">3\n7\n12\n21\n22</div><div class="answer">22</div>' in html
    assert '<div class="text">&lt;think&gt;1\n2</div>' in html


@pytest.mark.parametrize("name", sorted({*example.results()} - {"recipe", "seed"}))
def test_a_missing_part_is_left_out(tmp_path, name):
    data = example.results()
    del data[name]
    assert page_of(example.write_run(tmp_path, [], data)).text


def test_an_unfinished_run_says_so(tmp_path):
    folder = example.write_run(tmp_path, [row for row in example.rows() if row["stage"] == "pretrain"][:40])
    (folder / "results.json").unlink()
    text = page_of(folder).text
    assert "This run has not finished" in text
    assert "No reinforcement learning step has been logged yet." in text
    assert "Training loss" in text


GOOD = json.dumps({"stage": "pretrain", "step": 1, "loss": 2.0})


@pytest.mark.parametrize(
    "line",
    [
        '{"stage": "pretrain", "step": 2, "lo',
        "",
        "[]",
        "7",
        '{"step": 2}',
        '{"stage": "sft"}',
        '{"stage": "sft", "step": "2"}',
        '{"stage": "sft", "step": true}',
        '{"stage": 3, "step": 2}',
        '{"stage": "sft", "step": 2, "loss": NaN}',
        '{"stage": "sft", "step": 2, "loss": 1e999}',
        '{"stage": "sft", "step": 2, "loss": "low"}',
        '{"stage": "sft", "step": 2, "loss": null}',
        '{"stage": "sft", "step": 2, "loss": {}}',
        '{"stage": "pretrain", "step": 2, "expert_load": [0.5, 0.5]}',
        '{"stage": "pretrain", "step": 2, "expert_load": [[0.5, "x"]]}',
        '{"stage": "pretrain", "step": 2, "expert_load": [[]]}',
        '{"stage": "pretrain", "step": 2, "expert_load": {}}',
        "\xff",
    ],
)
def test_a_malformed_line_is_an_error_that_names_it(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(f"{GOOD}\n{line}\n{GOOD}\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2 .* -> "):
        report.write(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("bits_per_byte", "gzip"), None, "bits_per_byte.gzip"),
        (("bits_per_byte",), [], "bits_per_byte"),
        (("rl", "after", "pass@1"), [0.1, 0.2], "rl.after.pass@1"),
        (("rl", "how"), 3, "rl.how"),
        (("balance", "without_bias"), "none", "balance.without_bias"),
        (("speculative", "identical"), 1, "speculative.identical"),
        (("corpus", "skipped"), [{"path": "a"}], r"corpus.skipped\[0\].reason"),
        (("corpus", "rejected"), {"short": "many"}, "corpus.rejected.short"),
        (("wall_seconds",), {"sft": "long"}, "wall_seconds.sft"),
        (("samples",), [{"prompt": "a"}], r"samples\[0\].text"),
        (("samples",), {}, "samples"),
        (("absorbed_error",), "small", "absorbed_error"),
        (("recipe",), 3, "recipe"),
    ],
)
def test_a_result_of_the_wrong_kind_is_an_error_that_names_it(tmp_path, path, value, said):
    data = example.results()
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError, match=rf"results\.json: {said} .* -> "):
        report.write(example.write_run(tmp_path, [], data))


def test_what_was_not_measured_is_not_shown(tmp_path):
    rows = [{"stage": "pretrain", "step": step, "loss": 2.0, "expert_load": []} for step in (1, 2)]  # a dense model
    data = example.results() | {"balance": BALANCE | {"without_bias": None}}
    text = page_of(example.write_run(tmp_path, rows, data)).text
    assert "No expert load has been logged yet." in text
    assert "fullest expert above the even share" in text
    assert "without the balancing bias" not in text


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl does not exist -> "):
        report.write(tmp_path)


def test_a_step_logged_twice_counts_once_and_what_is_not_finite_is_a_gap(tmp_path):
    lines = [(1, 5.0), (2, 4.0), (3, "nan"), (2, 3.5), (4, 3.0), (5, "inf")]
    rows = [{"stage": "sft", "step": step, "loss": loss} for step, loss in lines]
    curve = read(example.write_run(tmp_path, rows)).curve("sft", "loss")
    assert curve.steps == [1, 2, 4]
    assert curve.values == [5.0, 3.5, 3.0]


def test_load_is_relative_to_an_even_share(tmp_path):
    rows = [{"stage": "pretrain", "step": 1, "expert_load": [[1, 3], [0, 0]]}]
    assert read(example.write_run(tmp_path, rows)).loads("pretrain") == ([1], [[[0.5, 1.5], [0.0, 0.0]]])
    rows.append({"stage": "pretrain", "step": 2, "expert_load": [[1, 3]]})
    with pytest.raises(InputError, match="expert_load of shapes"):
        read(example.write_run(tmp_path, rows))


def test_a_huge_run_makes_a_page_under_two_megabytes(tmp_path):
    rows = [
        {"stage": stage, "step": step, "loss": 1 / (step + 1), "reward": step % 7, "heldout_bits_per_byte": 2.0}
        for stage in ("pretrain", "grpo")
        for step in range(8_000)
    ]
    rows += [{"stage": "pretrain", "step": s, "expert_load": [[1.0 + s % 3] * 64] * 12} for s in range(500)]
    data = example.results()
    data["corpus"]["skipped"] = [{"path": "p" * 5000, "reason": "<" * 5000}] * 3000
    data["samples"] = [example.sample(f"q{i % 40}", "<" * 50_000, "1", "1", "after") for i in range(200)]
    data["config"] = {f"key{i}": "&" * 1000 for i in range(2000)}
    path = report.write(example.write_run(tmp_path, rows, data))
    assert path.stat().st_size < 2_000_000
    assert "and 2,800 more" in Page(path.read_text()).text


def test_the_overview_is_a_picture_and_always_the_same(tmp_path):
    folder = example.write_run(tmp_path)
    first = plots.overview(folder).read_bytes()
    assert first.startswith(b"\x89PNG")
    assert plots.overview(folder).read_bytes() == first
