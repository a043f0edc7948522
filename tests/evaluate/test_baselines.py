"""The n-gram model against a dictionary of counts; what xz gains from training text."""

import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ownlm.evaluate import baselines

TEXTS = st.lists(st.text(alphabet="abcé ", max_size=30), min_size=1, max_size=6)


def reference_bits(train: list[str], heldout: list[str]) -> list[float]:
    """Witten-Bell, as the paper states it, one byte at a time."""
    counts: dict[bytes, Counter[int]] = defaultdict(Counter)
    text = baselines.join(train) + bytes(5)
    for at in range(len(text)):
        for length in range(6):
            # Contexts begin inside the training text, before the zeros that end it.
            if at - length >= 0 and at - length < len(text) - 5:
                counts[text[at - length : at]][text[at]] += 1

    def probability(context: bytes, byte: int) -> float:
        lower = probability(context[1:], byte) if context else 1 / 256
        seen = counts[context]
        n, t = seen.total(), len(seen)
        return (seen[byte] + t * lower) / (n + t) if n else lower

    found = []
    for document in heldout:
        data = bytes(5) + document.encode()
        found.append(sum(-math.log2(probability(data[at - 5 : at], data[at])) for at in range(5, len(data))))
    return found


@given(TEXTS, TEXTS)
def test_ngram_equals_the_dictionary(train: list[str], heldout: list[str]) -> None:
    assert baselines.ngram_bits(train, heldout) == pytest.approx(reference_bits(train, heldout), rel=1e-9, abs=1e-9)


def test_probabilities_of_the_next_byte_sum_to_one() -> None:
    train = ["the cat sat on the mat", "the dog sat"]
    model = baselines.Ngrams.count(baselines.join(train))
    total = 0.0
    for byte in range(1, 256):
        total += 2 ** -model.bits(b"\0\0\0\0\0the c" + bytes([byte]))[5]
    end = reference_probability_of_the_end(train)
    assert total + end == pytest.approx(1.0, abs=1e-9)


def reference_probability_of_the_end(train: list[str]) -> float:
    """P(separator | "the c") by hand: every order above 0 has seen "c" before "a" only, order 0 knows the separator."""
    text = baselines.join(train)
    grams = Counter(text)
    n, t = len(text), len(grams)
    # Zeros past the end are part of the count of order 0 only through the text's own bytes.
    p = (grams[0] + t / 256) / (n + t)
    for order in range(1, 6):
        context = b"the c"[5 - order :]
        seen = [text[i + order] for i in range(n - order) if text[i : i + order] == context]
        p = (0 + len(set(seen)) * p) / (len(seen) + len(set(seen)))
    return p


def test_training_text_helps() -> None:
    known, other = "a rose is a rose is a rose. ", "0123456789 98765 43210. "
    assert baselines.ngram_bits([known * 20], [known])[0] < 0.2 * baselines.ngram_bits([other * 20], [known])[0]
    after, alone = baselines.xz_bits([known * 20], [known * 3])
    assert 0 <= after < alone


def test_join_cuts_at_documents() -> None:
    assert baselines.join(["ab", "cd"]) == b"\0\0\0\0\0ab\0\0\0\0\0cd\0\0\0\0\0"
    assert baselines.join(["ab", "cd"], 13) == baselines.join(["ab"])
