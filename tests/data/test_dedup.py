import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.base.errors import InputError
from benthic.data import dedup
from benthic.data.dedup import exact, jaccard, near, ngrams
from benthic.data.documents import Document

words = st.lists(st.sampled_from("ab"), min_size=1, max_size=12)


def documents_of(texts):
    return [Document(f"d{i}", text, "test") for i, text in enumerate(texts)]


def components(texts, threshold):
    """Connected components by comparing every pair."""
    grams = [ngrams(text) for text in texts]
    group = list(range(len(texts)))
    for a in range(len(texts)):
        for b in range(a):
            if jaccard(grams[a], grams[b]) >= threshold:
                group = [group[a] if g == group[b] else g for g in group]
    return group


def corpus(rng, base_count=5, copies=5):
    vocabulary = [f"w{i}" for i in range(200)]
    texts = []
    for _ in range(base_count):
        base = rng.choices(vocabulary, k=rng.randint(3, 80))
        texts.append(" ".join(base))
        for _ in range(copies):
            changed = [rng.choice(vocabulary) if rng.random() < rng.choice([0.0, 0.01, 0.05, 0.3]) else w for w in base]
            texts.append(" ".join(changed))
    return texts


@pytest.mark.parametrize("seed", range(12))
def test_near_equals_brute_force_jaccard(seed):
    """With 64 bands of 2 a pair at 0.8 is missed once in 10^28, so that LSH is no excuse."""
    texts = corpus(random.Random(seed))
    group = components(texts, 0.8)
    result = near(documents_of(texts), num_perm=128, bands=64)
    assert len(result.documents) == len(set(group))
    assert {group[int(d.id[1:])] for d in result.documents} == set(group)


def test_a_proposed_pair_below_the_threshold_stays_apart():
    a, b = "one two three four five six", "one two three four five seven"
    assert 0 < jaccard(ngrams(a), ngrams(b)) < 0.8
    assert near(documents_of([a, b]), num_perm=128, bands=128).removed == 0


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(words.map(" ".join), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_what_stays_does_not_depend_on_the_order(texts, seed):
    documents = documents_of(texts)
    shuffled = random.Random(seed).sample(documents, len(documents))
    for method in (exact, near):
        assert {d.id for d in method(documents).documents} == {d.id for d in method(shuffled).documents}


def test_two_chinese_texts_that_differ_by_one_character_are_found():
    text = (
        "深度求索公司发布了新的语言模型，它在数学与编程任务上表现出色，并且训练成本很低，"
        "引起了研究者的广泛关注和讨论。我们复现了它的方法。"
    )
    other = text.replace("新", "旧")
    result = near(documents_of([text, other]))
    assert result.removed == 1
    assert near(documents_of([text, text[::-1]])).removed == 0


def test_the_longest_of_a_cluster_stays_and_the_cluster_is_reported():
    base = " ".join(f"word{i}" for i in range(60))
    documents = documents_of([base, base + " and more", "something else entirely here now"])
    result = near(documents)
    assert [d.id for d in result.documents] == ["d1", "d2"]
    assert (result.removed, result.largest) == (1, [["d1", "d0"]])


def test_a_thousand_copies_are_one_cluster_at_once():
    result = near(documents_of(["the same words again and again in here"] * 1000))
    assert (len(result.documents), result.removed) == (1, 999)


def test_exact_ignores_blanks_and_unicode_form_and_nothing_else():
    documents = documents_of(["a  café\n", "a cafe\u0301", "A café", "a cafe"])
    assert [d.id for d in exact(documents).documents] == ["d0", "d2", "d3"]


def test_texts_without_words_are_no_duplicates_of_each_other():
    assert near(documents_of(["!!!", "???", ""])).removed == 0


def test_texts_of_fewer_than_five_words_compare_as_a_whole():
    assert near(documents_of(["hello world", "Hello, world!", "hello moon"])).removed == 1


def test_signatures_are_the_same_on_every_run():
    """A changed hash would change which borderline pairs are proposed, and so the data of a resumed run."""
    texts = {ngrams("one two three four five six"): 0, ngrams("one two three four five six seven"): 1}
    assert list(dedup._proposals(texts, 128, 64)) == list(dedup._proposals(texts, 128, 64)) != []


@pytest.mark.parametrize("options", [{"bands": 7}, {"bands": 0}, {"threshold": 0.0}, {"threshold": 1.5}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(InputError):
        near([], **options)
