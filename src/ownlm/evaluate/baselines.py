"""Two baselines for bits per byte that anybody can check, given the same training text as the model.

    n-gram   order 5: the next byte from the five before it, all orders interpolated (Witten and Bell 1991, method C)
    xz       how much longer the compressed training text gets when the held-out text follows it (lzma, preset 9 extreme)

Counting an n-gram model needs one sort. Six bytes make a number, first byte first; in the sorted list every sequence of up to six
bytes is one unbroken range, so that two binary searches count it, and a running sum over the range counts its distinct followers.
"""

import lzma
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ORDER = 5
# Stands between documents, so that no context reaches from one into the next and the first bytes have one of their own.
SEPARATOR = b"\0" * ORDER
NGRAM_BYTES = 64_000_000  # about 10 s and 1 GB; more training text than this is cut, with a note
XZ_BYTES = 8_000_000  # about 10 s

Words = NDArray[np.uint64]
Counts = NDArray[np.int64]


def join(texts: Sequence[str], max_bytes: int | None = None) -> bytes:
    """The documents as bytes, each between separators, at most `max_bytes` long (whole documents from the beginning)."""
    parts, total = [SEPARATOR], len(SEPARATOR)
    for text in texts:
        part = text.encode() + SEPARATOR
        total += len(part)
        if max_bytes is not None and total > max_bytes:
            break
        parts.append(part)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Ngrams:
    """Every six-byte sequence of a text, sorted, as numbers, with how often it stands there."""

    grams: Words
    counts_before: Counts  # running sum: counts_before[i] is how many stand before grams[i]; one longer than grams

    @classmethod
    def count(cls, text: bytes) -> "Ngrams":
        """The model of a training text made by `join`."""
        grams = _grams(text)
        grams.sort()
        first = np.flatnonzero(np.concatenate(([True], grams[1:] != grams[:-1])))
        return cls(grams[first], np.append(first, len(grams)))

    def bits(self, text: bytes) -> NDArray[np.float64]:
        """-log2 P of each byte of a text made by `join`, from the second document separator's end on; separators cost 0.

        P_k(b | c) = (n(c b) + t(c) P_{k-1}(b | c without its first byte)) / (n(c) + t(c)), where n counts occurrences and t the
        distinct bytes seen after c; P_{-1} = 1/256.
        """
        grams, place = np.unique(_grams(text)[: len(text) - ORDER], return_inverse=True)
        probability = np.full(len(grams), 1 / 256)
        for order in range(ORDER + 1):
            # The last order + 1 of the six bytes, moved to the front: context, then the byte to predict.
            shifted = grams << np.uint64(8 * (ORDER - order))
            seen, kinds = self._context(shifted, order)
            both = self._range(shifted, order + 1)
            hits = self.counts_before[both[1]] - self.counts_before[both[0]]
            known = np.maximum(seen + kinds, 1)
            probability = np.where(seen > 0, (hits + kinds * probability) / known, probability)
        bits: NDArray[np.float64] = -np.log2(probability)[place]
        bits[np.frombuffer(text, np.uint8)[ORDER:] == 0] = 0.0
        return bits

    def _range(self, grams: Words, length: int) -> tuple[Counts, Counts]:
        """Where the six-byte sequences that begin with the first `length` bytes stand: [start, end) each."""
        if length == 0:
            return np.zeros(len(grams), np.int64), np.full(len(grams), len(self.grams))
        low_bits = np.uint64(8 * (ORDER + 1 - length))
        low = (grams << np.uint64(16)) >> np.uint64(16) >> low_bits << low_bits
        high = low | np.uint64((1 << int(low_bits)) - 1)
        return np.searchsorted(self.grams, low, "left"), np.searchsorted(self.grams, high, "right")

    def _context(self, grams: Words, length: int) -> tuple[Counts, Counts]:
        """How often the first `length` bytes stand in the text, and before how many different bytes."""
        start, end = self._range(grams, length)
        with_follower = self.grams >> np.uint64(8 * (ORDER - length))
        new = np.concatenate(([0], np.cumsum(np.append(True, with_follower[1:] != with_follower[:-1]))))
        return self.counts_before[end] - self.counts_before[start], new[end] - new[start]


def ngram_bits(train: Sequence[str], heldout: Sequence[str], max_bytes: int = NGRAM_BYTES) -> list[float]:
    """The bits that the n-gram model, counted on `train`, needs for each held-out document."""
    bits = Ngrams.count(join(train, max_bytes)).bits(join(heldout))
    lengths = [len(text.encode()) + ORDER for text in heldout]
    ends = np.cumsum(lengths)
    return [float(bits[end - length : end].sum()) for end, length in zip(ends, lengths, strict=True)]


def xz_bits(train: Sequence[str], heldout: Sequence[str], max_bytes: int = XZ_BYTES) -> tuple[int, int]:
    """The bits xz adds for the held-out text after the training text, and the bits it needs for the held-out text alone."""
    before, after = join(train, max_bytes), join(heldout)
    with ThreadPoolExecutor(3) as pool:  # lzma leaves the interpreter's lock while it works
        known, both, alone = pool.map(_xz_bytes, (before, before + after, after))
    return 8 * (both - known), 8 * alone


def _xz_bytes(data: bytes) -> int:
    # Preset 9 asks for 674 MB whatever the input; a dictionary as long as the input gives the same bytes out.
    dictionary = max(4096, 1 << (len(data) - 1).bit_length())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": min(dictionary, 1 << 26)}]
    return len(lzma.compress(data, lzma.FORMAT_XZ, filters=filters))


def _grams(text: bytes) -> Words:
    """The number made of the six bytes from each position on; past the end stand zeros."""
    data = np.frombuffer(text + SEPARATOR, np.uint8)
    grams = np.zeros(len(text), np.uint64)
    for offset in range(ORDER + 1):
        grams <<= np.uint64(8)
        grams |= data[offset : offset + len(text)]
    return grams
