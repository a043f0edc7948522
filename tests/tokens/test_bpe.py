"""Learning merges against the published reference of a course (Stanford CS336, assignment 1), and against the definition."""

import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import vector

from ownlm.tokens import train
from ownlm.tokens.bpe import learn
from ownlm.tokens.patterns import GPT2
from ownlm.tokens.stream import BYTE_OF

Pair = tuple[bytes, bytes]


def as_bytes(text: str) -> bytes:
    return bytes(BYTE_OF[each] for each in text)


def by_the_book(words: dict[bytes, int], count: int, least: int) -> list[Pair]:
    """Byte-pair encoding without any cleverness: the most frequent pair, of equally frequent ones the greater."""
    split = {word: [bytes([byte]) for byte in word] for word in words}
    merges: list[Pair] = []
    while len(merges) < count:
        pairs: Counter[Pair] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs or max(pairs.values()) < least:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            merged, at = [], 0
            while at < len(parts):
                step = 2 if tuple(parts[at : at + 2]) == best else 1
                merged.append(b"".join(parts[at : at + step]))
                at += step
            split[word] = merged
    return merges


def test_the_published_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    text = vector("cs336/corpus.en").read_text()
    published = [
        tuple(line.split(" ")) for line in vector("cs336/train-bpe-reference-merges.txt").read_text().splitlines()
    ]
    tokens = json.loads(vector("cs336/train-bpe-reference-vocab.json").read_text())
    monkeypatch.setattr(train, "QWEN2", GPT2)  # the course splits words as GPT-2 does
    one = train.build([text], kind="bpe", vocab_size=500 + 2)  # they have <|endoftext|>, we two more special tokens
    assert [tuple(pair) for pair in json.loads(one.backend.to_str())["model"]["merges"]] == published
    special = set(one.special) - {"<|endoftext|>"}
    assert set(one.backend.get_vocab(with_added_tokens=True)) - special == set(tokens)
    assert len(tokens) == 500


@given(
    words=st.dictionaries(st.text(alphabet="abcĠ", min_size=1, max_size=9), st.integers(1, 4), max_size=8),
    count=st.integers(0, 12),
    least=st.integers(1, 3),
)
def test_any_words_teach_what_the_definition_says(words: dict[str, int], count: int, least: int) -> None:
    vocabulary, merges = learn(words, 256 + count, least)
    ours = [(as_bytes(left), as_bytes(right)) for left, right in merges]
    assert ours == by_the_book({as_bytes(word): times for word, times in words.items()}, len(ours), least)
    # Two pairs may join to one token; only tokens fill a vocabulary.
    assert len(vocabulary) == 256 + len({left + right for left, right in merges})
    if len(vocabulary) < 256 + count:
        assert len(by_the_book({as_bytes(word): times for word, times in words.items()}, len(ours) + 1, least)) == len(
            ours
        )


def test_an_example() -> None:
    assert learn({"low": 5, "lowest": 2}, 259, 1)[1] == [("o", "w"), ("l", "ow"), ("s", "t")]
    assert learn({}, 300, 1)[1] == []
    assert learn({"aaaa": 1}, 300, 2)[1] == [("a", "a")]  # three times a pair; then only once
