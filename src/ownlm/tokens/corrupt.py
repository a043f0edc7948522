"""What is hidden from a text, for a model to restore; arrays in, arrays out.

    masked_lm         the cat [MASK] on the mat           -> sat                       BERT, RoBERTa
    span_corruption   the cat <extra_id_0> mat </s>       -> <extra_id_0> sat on the … </s>   T5
    permutation_lm    order 0 1 4 5 | 3 2: token 3 from 0 1 4 5, token 2 from those and 3     XLNet

Every function takes the `numpy.random.Generator` that it draws from; `draw(seed, row)` makes one for each row of each epoch,
so that a row is hidden in a new way every time it comes (RoBERTa's dynamic masking, arXiv:1907.11692) and always in the same way
when a run is repeated.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ownlm.errors import UserError
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.stream import BYTE_OF

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
HIDDEN = -100  # the target of a token that is not asked for
SENTINEL = re.compile(r"<extra_id_(\d+)>")
MAX_SENTINELS = 100  # taken from the end of a vocabulary that names none


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedLM:
    """BERT's objective (arXiv:1810.04805, 3.1): `probability` of the tokens are asked for. Of these, `random` become any token,
    `keep` stay as they are, and the others become the mask. With `whole_words` all tokens of a word are asked for together."""

    kind: Literal["masked_lm"] = "masked_lm"
    probability: float = 0.15
    random: float = 0.1
    keep: float = 0.1
    whole_words: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1 or min(self.random, self.keep) < 0 or self.random + self.keep > 1:
            raise ValueError("probability lies between 0 and 1, and so do random, keep and their sum")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanCorruption:
    """T5's objective (arXiv:1910.10683, 3.1.4): spans of `mean_span` tokens, together `density` of the text, become a sentinel each;
    the decoder writes them."""

    kind: Literal["span_corruption"] = "span_corruption"
    density: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.density < 1 or self.mean_span < 1:
            raise ValueError("density lies between 0 and 1, and mean_span is at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PermutationLM:
    """XLNet's objective (arXiv:1906.08237, 2.3): the last `share` of a random factorisation order is predicted, in spans of up to
    `max_span` neighbours."""

    kind: Literal["permutation_lm"] = "permutation_lm"
    share: float = 1 / 6
    max_span: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.max_span < 1:
            raise ValueError("share lies between 0 and 1, and max_span is at least 1")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Marks:
    """What hiding needs to know of a vocabulary of V ids.

    special_V: never hidden and never put in; starts_V: begins a word; ordinary: the ids that are no special ones.
    sentinels: in the order of their use. before, after: what stands around every row.
    """

    special_V: Flags
    starts_V: Flags
    ordinary: Ints
    sentinels: Ints
    mask_id: int | None
    pad_id: int
    eos_id: int
    before: tuple[int, ...]
    after: tuple[int, ...]


def draw(seed: int, row: int) -> np.random.Generator:
    """The randomness of one row, counted over all epochs."""
    return np.random.default_rng([seed, row])


def marks(tokenizer: Tokenizer, *, vocab_size: int | None = None) -> Marks:
    """The marks of a tokenizer, in a vocabulary that may be larger than its own (models pad theirs).

    Sentinels are <extra_id_0>, <extra_id_1>, … where the vocabulary has them, and otherwise its last ids, backwards, as in T5.
    """
    size = max(vocab_size or 0, tokenizer.vocab_size)
    special = np.zeros(size, np.bool_)
    special[[*tokenizer.special.values()]] = True
    special[tokenizer.vocab_size :] = True
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    kind = json.loads(tokenizer.backend.to_str())["model"]["type"]
    starts = np.ones(size, np.bool_)
    for token, id in vocabulary.items():
        starts[id] = _starts_word(token, kind)
    starts |= special
    named = sorted((int(match[1]), id) for token, id in vocabulary.items() if (match := SENTINEL.fullmatch(token)))
    sentinels = np.asarray(
        [id for _, id in named] or range(size - 1, size - 1 - min(MAX_SENTINELS, size), -1), np.int64
    )
    if named:
        special[sentinels] = True
    cls, sep = _named(tokenizer, "cls_token"), _named(tokenizer, "sep_token")
    first = cls if cls is not None else tokenizer.bos_id
    before: tuple[int, ...] = () if first is None else (first,)
    after: tuple[int, ...] = (tokenizer.eos_id if sep is None else sep,)
    if cls is not None and tokenizer.backend.encode("a", add_special_tokens=True).ids[-1:] == [cls]:
        before, after = (), (*after, cls)  # XLNet's stands at the end
    return Marks(
        special_V=special,
        starts_V=starts,
        ordinary=np.flatnonzero(~special),
        sentinels=sentinels,
        mask_id=_named(tokenizer, "mask_token"),
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        before=before,
        after=after,
    )


def mask_tokens(ids_T: Ints, random: np.random.Generator, settings: MaskedLM, marks: Marks) -> tuple[Ints, Ints]:
    """(inputs, targets) of one row: the targets are the ids at the places that are asked for and -100 elsewhere.

    round(probability * tokens) of the tokens that are no special ones are asked for, one at least; whole words as many as fit.
    """
    assert marks.mask_id is not None, "masking needs a mask token"
    able = np.flatnonzero(~marks.special_V[ids_T])
    wanted = max(1, round(settings.probability * len(able)))
    order = _words(ids_T, able, wanted, random, marks) if settings.whole_words else random.permutation(able)[:wanted]
    dice = random.random(len(order))
    inputs, targets = ids_T.copy(), np.full_like(ids_T, HIDDEN)
    targets[order] = ids_T[order]
    swapped = order[dice < settings.random]
    inputs[swapped] = random.choice(marks.ordinary, len(swapped))
    inputs[order[dice >= settings.random + settings.keep]] = marks.mask_id
    return inputs, targets


def _words(ids_T: Ints, able: Ints, wanted: int, random: np.random.Generator, marks: Marks) -> Ints:
    """The places of whole words, `wanted` of them at most unless the first word alone is longer."""
    begins = marks.starts_V[ids_T]
    begins[1:] |= marks.special_V[ids_T[:-1]]  # a text's first word has no space before it
    word = np.cumsum(begins)[able]
    chosen: list[Ints] = []
    left = wanted
    for number in random.permutation(np.unique(word)):
        places = able[word == number]
        if len(places) <= left or not chosen:
            chosen.append(places)
            left -= len(places)
        if left <= 0:
            break
    return np.concatenate(chosen) if chosen else able


def hide_spans(length: int, random: np.random.Generator, settings: SpanCorruption) -> Flags:
    """Which of `length` tokens are hidden: runs of random lengths that begin after at least one token and end with the last.

    As random_spans_noise_mask of T5: both the hidden and the shown tokens are cut into equally many parts at random.
    """
    hidden, spans = span_counts(length, settings)
    parts = np.stack([_cut(length - hidden, spans, random), _cut(hidden, spans, random)], axis=1)
    return np.repeat(np.tile([False, True], spans), parts.ravel())


def span_counts(length: int, settings: SpanCorruption) -> tuple[int, int]:
    """(tokens hidden, spans) in a text of `length` tokens."""
    hidden = min(max(1, round(length * settings.density)), length - 1)
    return hidden, min(max(1, round(hidden / settings.mean_span)), hidden, length - hidden)


def span_text_length(context: int, settings: SpanCorruption) -> int:
    """The longest text that fits `context` once its spans are sentinels and the end token is there."""
    fitting = [n for n in range(2, 4 * context) if n - (c := span_counts(n, settings))[0] + c[1] + 1 <= context]
    if not fitting:
        raise UserError(f"a context of {context} is too short for span corruption.", cure="Set context to 4 or more.")
    return fitting[-1]


def splice(ids_T: Ints, hidden_T: Flags, sentinels: Ints) -> Ints:
    """The ids with each run of hidden ones replaced by the next sentinel; with ~hidden_T, what the decoder writes.

    splice([5, 6, 7, 8, 9], [0, 1, 1, 0, 1], [90, 91]) == [5, 90, 8, 91], and its counterpart [90, 6, 7, 91, 9].
    """
    first = hidden_T & ~np.concatenate([[False], hidden_T[:-1]])
    number = np.cumsum(first) - 1
    assert number[-1] < len(sentinels), "more spans than sentinels"
    spliced = np.where(first, sentinels[np.maximum(number, 0)], ids_T)
    kept: Ints = spliced[~hidden_T | first]
    return kept


def factorise(able: Ints, length: int, count: int, random: np.random.Generator, max_span: int) -> tuple[Ints, Flags]:
    """(targets_K, unseen_TT) of a random order: `count` places among the neighbours `able`, rising, and which places j each place
    i must not see.

    Targets come last in the order, so that the others see each other but no target, and a target sees all others and
    the targets before it in the order. Nobody sees itself here: that a token's own content stream does is the model's part.
    """
    lengths: list[int] = []
    while (left := count - sum(lengths)) > 0:
        lengths.append(min(left, int(random.integers(1, max_span + 1))))
    spans = np.asarray(lengths)
    # Where the shown tokens are cut so that a span stands between: gaps of any length, the first and last one included.
    gaps = np.diff([0, *np.sort(random.integers(0, len(able) - count + 1, len(spans)))])
    starts = np.cumsum(gaps) + np.concatenate([[0], np.cumsum(spans)[:-1]])
    targets = able[np.concatenate([np.arange(start, start + size) for start, size in zip(starts, spans, strict=True)])]
    rank = np.full(length, -1)
    rank[targets] = random.permutation(count)
    return targets, (rank >= 0) & (rank[:, None] <= rank)


def _cut(total: int, parts: int, random: np.random.Generator) -> Ints:
    """`parts` numbers of at least 1 that sum to `total`, every such cut equally likely."""
    return np.diff([0, *np.sort(random.permutation(total - 1)[: parts - 1] + 1), total])


def _named(tokenizer: Tokenizer, name: str) -> int | None:
    """The id of a special token by its role in tokenizer_config.json."""
    value: Any = tokenizer.config.get(name)
    text = value.get("content") if isinstance(value, Mapping) else value
    return tokenizer.special.get(text) if isinstance(text, str) else None


def _starts_word(token: str, kind: str) -> bool:
    """Whether a piece of a vocabulary begins a word: WordPiece marks those that don't by ##, SentencePiece those that do by ▁,
    byte-level vocabularies by a space; punctuation stands alone in all of them."""
    if kind == "WordPiece":
        return not token.startswith("##")
    byte = BYTE_OF.get(token[:1], 0)
    return byte < 0x80 and not (chr(byte) if byte else token[:1]).isalnum()  # from 0x80 on: part of a letter
