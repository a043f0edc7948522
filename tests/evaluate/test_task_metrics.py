"""Metrics of labelled tasks against values worked out by hand, and the baseline against the minimum it must reach."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ownlm.evaluate.linear import Linear, text_features, word_features
from ownlm.evaluate.task_metrics import (
    chrf,
    chrf_counts,
    class_counts,
    entities,
    entity_counts,
    f1,
    interval,
    macro_f1,
    rouge_l,
    span_scores,
)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        (["B-PER", "I-PER", "O", "B-LOC"], {("PER", 0, 2), ("LOC", 3, 4)}),
        (["I-PER", "I-PER", "I-LOC"], {("PER", 0, 2), ("LOC", 2, 3)}),  # seqeval: an I after another type begins one
        (["B-PER", "B-PER", "I-LOC"], {("PER", 0, 1), ("PER", 1, 2), ("LOC", 2, 3)}),
        (["O", "I-PER", "O", "I-PER"], {("PER", 1, 2), ("PER", 3, 4)}),
        (["B-creative-work", "I-creative-work"], {("creative-work", 0, 2)}),
        ([], set()),
    ],
)
def test_entities_are_those_of_the_conll_scorer(tags: list[str], found: set[tuple[str, int, int]]) -> None:
    assert entities(tags) == found


def test_entity_f1_counts_whole_entities() -> None:
    truth = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    given = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    value, low, high = interval(entity_counts(truth, given), f1)
    assert value == 0.5  # the example of seqeval's own page
    assert low <= value <= high


def test_macro_f1_gives_each_class_one_voice() -> None:
    # a: F1 of 2 right, 3 said, 2 there = 0.8; b: 0 right, 0 said, 1 there = 0.
    assert macro_f1(class_counts(["a", "a", "b"], ["a", "a", "a"]).sum(0)) == pytest.approx(0.4)


def test_span_scores_as_squad_compares() -> None:
    assert span_scores("the Eiffel  tower!", ["Eiffel Tower"]) == (1.0, 1.0)
    assert span_scores("tall tower", ["Eiffel tower", "iron"]) == (0.0, 0.5)


def test_rouge_l_and_chrf_on_small_texts() -> None:
    assert rouge_l("a cat sat", "a cat ran") == pytest.approx(2 / 3)
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)  # Lin 2004, section 3
    assert chrf(chrf_counts("the same", "the same")) == 1.0
    # "ab" for "ac": of single characters 1 of 2, of pairs none; F2 of them 0.5 and 0.
    assert chrf(chrf_counts("ab", "ac")) == pytest.approx(0.25)
    assert chrf(chrf_counts("", "x")) == 0.0


def test_the_linear_baseline_reaches_the_one_minimum_of_its_loss() -> None:
    texts = ["a good film", "a very good one", "bad film", "very bad", "an odd one", "odd film"]
    labels = ["pos", "pos", "neg", "neg", "odd", "odd"]
    model = Linear([text_features(text) for text in texts], labels)
    features, weights, begins = model.tfidf.rows([text_features(text) for text in texts])
    dense = torch.zeros(6, len(model.tfidf.index))
    ends = [*begins.tolist()[1:], len(features)]
    for row, (start, end) in enumerate(zip(begins.tolist(), ends, strict=True)):
        dense[row, features[start:end]] = weights[start:end]
    assert torch.allclose(dense.norm(dim=-1), torch.ones(6))
    W, b = model.weight_FC.detach().requires_grad_(True), model.bias_C.detach().requires_grad_(True)
    truth = torch.tensor([model.labels.index(label) for label in labels])
    (F.cross_entropy(dense @ W + b, truth, reduction="sum") + W.square().sum() / 2).backward()  # type: ignore[no-untyped-call]
    assert W.grad is not None
    assert float(W.grad.abs().max()) < 1e-3  # a convex function has one place where its gradient is nothing
    assert model.predict([text_features("good"), text_features("bad one")]) == ["pos", "neg"]


def test_word_features_see_the_neighbours() -> None:
    found = word_features(["In", "Brook42"])
    assert "1:brook42" in found[0]
    assert "-1:in" in found[1]
    assert "shape:Xx0" in found[1]


def test_intervals_are_drawn_by_item() -> None:
    counts = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]] * 50)
    value, low, high = interval(counts, f1)
    assert value == 0.5
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65
