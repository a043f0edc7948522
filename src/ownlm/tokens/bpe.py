"""Byte-pair encoding by its definition (Sennrich et al. 2016, algorithm 1): which merges a set of words teaches.

    words ─► pairs of neighbours, counted ─► the most frequent pair becomes a token ─► … until the vocabulary is full

Of equally frequent pairs the greater in bytes is merged first, the left token deciding before the right one. So the result is a
matter of the words alone: no order of a hash map, no version of a library. It equals the published reference of Stanford's CS336.
"""

from collections import defaultdict
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise

from ownlm.tokens.stream import BYTE_OF


def learn(
    words: Mapping[str, int], vocab_size: int, min_frequency: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of at most `vocab_size` tokens, the 256 bytes first. `words` are in the characters that stand for
    bytes, with their frequencies; no pair seen fewer than `min_frequency` times is merged.

    learn({"low": 5, "lowest": 2}, 259, 1)[1] == [("o", "w"), ("l", "ow"), ("s", "t")]
    """
    texts = sorted(BYTE_OF)
    vocabulary = {text: id for id, text in enumerate(texts)}
    order = [_descending(text) for text in texts]
    split = [[vocabulary[character] for character in word] for word in words]
    frequency = list(words.values())
    counts: defaultdict[tuple[int, int], int] = defaultdict(int)
    places: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # the words that held a pair once
    for at, parts in enumerate(split):
        for pair in pairwise(parts):
            counts[pair] += frequency[at]
            places[pair].add(at)
    heap = [(-count, order[pair[0]], order[pair[1]], pair) for pair, count in counts.items()]
    heapify(heap)
    merges = []
    while len(texts) < vocab_size and heap:
        negative, _, _, best = heappop(heap)
        count = counts[best]
        if count != -negative:  # it became rarer since
            heappush(heap, (-count, order[best[0]], order[best[1]], best))
            continue
        if count < max(1, min_frequency):
            break
        left, right = texts[best[0]], texts[best[1]]
        merges.append((left, right))
        new = vocabulary.setdefault(left + right, len(texts))
        if new == len(texts):
            texts.append(left + right)
            order.append(_descending(left + right))
        risen = set()
        for at in places.pop(best):
            parts, times = split[at], frequency[at]
            for pair in pairwise(parts):
                counts[pair] -= times
            split[at] = parts = _merged(parts, best, new)
            for pair in pairwise(parts):
                counts[pair] += times
                if new in pair:
                    places[pair].add(at)
                    risen.add(pair)
        for pair in risen:
            heappush(heap, (-counts[pair], order[pair[0]], order[pair[1]], pair))
    return vocabulary, merges


def _merged(parts: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """_merged([1, 2, 3, 1, 2], (1, 2), 4) == [4, 3, 4]"""
    left, right = pair
    found = []
    at, last = 0, len(parts) - 1
    while at <= last:
        if parts[at] == left and at < last and parts[at + 1] == right:
            found.append(new)
            at += 2
        else:
            found.append(parts[at])
            at += 1
    return found


def _descending(text: str) -> str:
    """A key that sorts greater bytes first, and a longer token before its beginning."""
    return "".join(chr(255 - BYTE_OF[character]) for character in text) + "\u0100"
