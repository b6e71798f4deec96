"""Every equation that the code stands on is cited where it is computed, and docs/paper.md says so."""

import importlib.util
import re

import pytest
from test_floors import ROOT

SPEC = importlib.util.spec_from_file_location("make_paper", ROOT / "docs" / "make_paper.py")
make_paper = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_paper)

V3 = {
    "multi-head latent attention": range(1, 12),
    "gating": range(12, 17),
    "sequence-wise balance loss": range(17, 21),
    "multi-token prediction": range(21, 26),
}
REQUIRED = [("V3", "Eq", str(number)) for numbers in V3.values() for number in numbers] + [
    ("V3", "Sec", "2.1.2"),  # bias update, node-limited routing
    ("Loss-Free", "Alg", "1"),
    ("DeepSeekMath", "Eq", "3"),  # GRPO
    ("DeepSeekMath", "Eq", "4"),  # its KL estimate
    ("RoFormer", "Eq", "34"),
]


@pytest.fixture(scope="module")
def sources():
    return make_paper.package()


@pytest.fixture(scope="module")
def places(sources):
    return make_paper.places(sources)


def test_the_page_is_what_the_sources_say(sources):
    fresh = make_paper.PAGE.read_text(encoding="utf-8") == make_paper.page(sources)
    assert fresh, "docs/paper.md is stale: run `make docs`"


@pytest.mark.parametrize("citation", REQUIRED, ids=" ".join)
def test_every_equation_that_the_code_stands_on_is_cited(citation, places):
    assert citation in places


def test_ranges_and_lists_of_numbers_are_single_citations():
    text = "# q, V3 Eq 7-8 and (V3 Eq 2, 5; Loss-Free\nAlg 1), V3 Sec 2.1.2, V30 Eq 9"
    assert list(make_paper.citations(text)) == [
        ("V3", "Eq", "7"),
        ("V3", "Eq", "8"),
        ("V3", "Eq", "2"),
        ("V3", "Eq", "5"),
        ("Loss-Free", "Alg", "1"),
        ("V3", "Sec", "2.1.2"),
    ]


def test_a_citation_belongs_to_the_innermost_function_and_not_to_code():
    source = '''"""Top (V3 Eq 1-2)."""
class A:
    def f(self):
        x = 1  # V3 Eq 2
        return "V3 Eq 3"
'''
    assert make_paper.places({"a.py": source}) == {
        ("V3", "Eq", "1"): [("a.py", "")],
        ("V3", "Eq", "2"): [("a.py", "A.f")],
    }


def test_an_equation_that_loses_its_citation_is_missed(sources):
    without = {file: re.sub(r"V3\s+Eq (6|1-11)", "", text) for file, text in sources.items()}
    assert ("V3", "Eq", "6") not in make_paper.places(without)
