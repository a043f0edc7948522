"""What a model with a head reads out of a text.

    sequence head ─► classify   the probability of each label        token head ─► tag, entities   a label for each word
    span head     ─► answer     the stretch of a text that answers

Shapes: B texts, T tokens, L labels.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ownlm.errors import UserError
from ownlm.models.decoder import Decoder
from ownlm.models.encoder import Encoder
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.examples import padded
from ownlm.tokens.framing import Framed, Offsets, first_tokens, frame_of, framed, joined, piece

BATCH_TOKENS = 8192  # of one forward pass, padding included
ANSWER_TOKENS = 30  # of the longest answer
OUTSIDE = "O"
# A link, a name or tag of social media, a word with what is tied to it, or one other sign.
WORD = re.compile(r"https?://\S+|[@#]?\w+(?:[-'’.]\w+)*|\S")
COMMANDS = {"sequence": "classify", "token": "classify", "span": "answer", "masked_lm": "embed", None: "generate"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    """A stretch text[start:end] and what it is."""

    text: str
    label: str
    start: int
    end: int
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A stretch context[start:end] that answers a question; `probability` is that of its first times that of its last token."""

    text: str
    start: int
    end: int
    probability: float


class Headed:
    """A model whose head reads; what it was trained with (tokens/tasks.py) frames its texts here too."""

    def __init__(self, model: Decoder | Encoder, tokenizer: Tokenizer, *, where: str) -> None:
        self.model, self.tokenizer, self.where = model, tokenizer, where
        self.frame = frame_of(tokenizer, encoder=isinstance(model, Encoder))
        self.limit = model.config.max_tokens

    @property
    def labels(self) -> tuple[str, ...]:
        return () if self.model.config.head is None else self.model.config.head.labels

    def need(self, *tasks: str) -> None:
        """UserError where the head is for none of these tasks."""
        task = self.model.task
        if task in tasks:
            return
        kind = "an encoder" if isinstance(self.model, Encoder) else "a decoder"
        head = "no head of a task" if task is None else f"a head for {task.replace('_', ' ')}"
        fits = "embed" if task is None and isinstance(self.model, Encoder) else COMMANDS[task]
        raise UserError(
            f"this is {kind} with {head}; a head for {' or '.join(tasks)} is needed.",
            where=self.where,
            cure=f"`ownlm {fits}` fits it; [finetune] with a task gives it another head.",
        )

    @torch.inference_mode()
    def classify(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[dict[str, float]]:
        """For each text (and its pair) the probability of each label, the likeliest first; a regression's numbers."""
        self.need("sequence")
        assert self.model.config.head is not None
        seconds: Sequence[str | None] = [None] * len(texts) if pairs is None else pairs
        if len(seconds) != len(texts):
            raise UserError(f"{len(texts)} texts and {len(seconds)} second texts.", where="pairs")
        rows = [
            framed(self.tokenizer, self.frame, text, pair, self.limit)
            for text, pair in zip(texts, seconds, strict=True)
        ]
        found: list[dict[str, float]] = [{} for _ in rows]
        problem = self.model.config.head.problem
        for chosen, logits_BL in self._outputs(rows):
            values_BL = (
                logits_BL.softmax(-1)
                if problem == "single"
                else logits_BL.sigmoid()
                if problem == "multi"
                else logits_BL
            )
            for index, values_L in zip(chosen, values_BL.tolist(), strict=True):
                pairs_ = zip(self.labels, values_L, strict=True)
                found[index] = dict(sorted(pairs_, key=lambda item: -item[1]) if problem != "regression" else pairs_)
        return found

    def tag(self, sentences: Sequence[Sequence[str]]) -> list[list[tuple[str, float]]]:
        """For each word of each sentence its likeliest label and that one's probability."""
        self.need("token")
        return self._labelled_all([joined(words) for words in sentences])

    def entities(self, texts: Sequence[str]) -> list[list[Entity]]:
        """What stands where in each text. Labels of the form B-x, I-x are joined to stretches; others are each word's own."""
        self.need("token")
        spans = [[match.span() for match in WORD.finditer(text)] for text in texts]
        tags = self._labelled_all(list(zip(texts, spans, strict=True)))
        by_word = not any(label.startswith("B-") for label in self.labels)
        return [
            _words(text, where, found) if by_word else joined_entities(text, where, found)
            for text, where, found in zip(texts, spans, tags, strict=True)
        ]

    @torch.inference_mode()
    def answer(self, question: str, context: str) -> Found:
        """The stretch of the context that answers best; a long context is read in windows that overlap by half."""
        self.need("span")
        asked, text = piece(self.tokenizer, question), piece(self.tokenizer, context)
        if not context.strip() or not text.ids:
            raise UserError("the text to answer from is empty.", where="context")
        room = self.frame.room(self.limit, pair=True)
        asked = asked.part(0, room // 2)
        width = room - len(asked.ids)
        last = max(0, len(text.ids) - width)
        begins = sorted({*range(0, last, max(1, width // 2)), last})
        rows = [self.frame.put(asked, text.part(begin, begin + width)) for begin in begins]
        best = (float("-inf"), 0.0, 0, 0)
        for chosen, (start_BT, end_BT) in self._outputs(rows):
            for row, start_T, end_T in zip(chosen, start_BT, end_BT, strict=True):
                first, count = rows[row].second, len(text.part(begins[row], begins[row] + width).ids)
                starts_T, ends_T = start_T[first : first + count], end_T[first : first + count]
                scores_TT = starts_T[:, None] + ends_T[None, :]
                near = torch.ones_like(scores_TT, dtype=torch.bool).triu().tril(ANSWER_TOKENS - 1)
                score, place = scores_TT.masked_fill(~near, float("-inf")).flatten().max(0)
                a, b = divmod(int(place), count)
                sure = float(start_T.softmax(-1)[first + a] * end_T.softmax(-1)[first + b])
                best = max(best, (float(score), sure, begins[row] + a, begins[row] + b))
        start, end = text.offsets[best[2]][0], text.offsets[best[3]][1]
        return Found(text=context[start:end], start=start, end=end, probability=best[1])

    @torch.inference_mode()
    def _labelled_all(self, texts: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> list[list[tuple[str, float]]]:
        room = self.frame.room(self.limit, pair=False)
        pieces = [piece(self.tokenizer, text) for text, _ in texts]
        # One at a time where a text has to be read in parts.
        whole = [index for index, one in enumerate(pieces) if 0 < len(one.ids) <= room]
        rows = [self.frame.put(pieces[index]) for index in whole]
        found: dict[int, list[tuple[str, float]]] = {}
        for chosen, logits_BTL in self._outputs(rows):
            for row, logits_TL in zip(chosen, logits_BTL, strict=True):
                index = whole[row]
                found[index] = self._of_words(logits_TL[rows[row].first :], pieces[index].offsets, texts[index][1])
        return [found[index] if index in found else self._labelled(*texts[index]) for index in range(len(texts))]

    def _labelled(self, text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, float]]:
        """The labels of a text's words; one that is too long is read in halves."""
        if not spans:
            return []
        one = piece(self.tokenizer, text)
        if len(one.ids) > self.frame.room(self.limit, pair=False) and len(spans) > 1:
            half = len(spans) // 2
            border = spans[half][0]
            after = [(start - border, end - border) for start, end in spans[half:]]
            return self._labelled(text[:border], spans[:half]) + self._labelled(text[border:], after)
        row = self.frame.put(one.part(0, self.frame.room(self.limit, pair=False)))
        ((_, logits_BTL),) = self._outputs([row])
        return self._of_words(logits_BTL[0][row.first :], one.offsets, spans)

    def _of_words(
        self, logits_TL: Tensor, offsets: Offsets, spans: Sequence[tuple[int, int]]
    ) -> list[tuple[str, float]]:
        values_T, best_T = (x.tolist() for x in logits_TL.softmax(-1).max(-1))
        places = first_tokens(offsets[: len(values_T)], spans)
        return [
            (self.labels[0], 0.0) if place is None else (self.labels[best_T[place]], values_T[place])
            for place in places
        ]

    def _outputs(self, rows: Sequence[Framed]) -> Iterator[tuple[list[int], Any]]:
        """(which rows, what the head says of them) in batches of like length."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
        device = next(self.model.parameters()).device
        while order:
            count = max(1, BATCH_TOKENS // max(1, len(rows[order[0]].ids)))
            chosen, order = order[:count], order[count:]
            if not rows[chosen[0]].ids:
                raise UserError("a text has no tokens.", where="input")
            tokens_BT, mask_BT = padded([rows[index].ids for index in chosen], self.tokenizer.pad_id)
            tokens_BT, mask_BT = tokens_BT.to(device), mask_BT.to(device)
            if isinstance(self.model, Encoder):
                types_BT = padded([rows[index].types for index in chosen], 0)[0].to(device)
                told = self.model.config.token_types > 1
                hidden_BTD = self.model(tokens_BT, mask_BT=mask_BT, types_BT=types_BT if told else None)
            else:
                hidden_BTD = self.model(tokens_BT)  # a causal model never sees what stands on the right
            assert self.model.head is not None
            out = self.model.head(hidden_BTD, mask_BT)
            yield chosen, tuple(x.cpu() for x in out) if isinstance(out, tuple) else out.cpu()


def joined_entities(text: str, spans: Sequence[tuple[int, int]], tags: Sequence[tuple[str, float]]) -> list[Entity]:
    """B-x begins a stretch, I-x goes on with one of the same x or begins one, as the CoNLL scorer reads it; the probability is that
    of its least certain word."""
    found: list[Entity] = []
    open_ = False
    for (start, end), (tag, sure) in zip(spans, tags, strict=True):
        mark, _, label = tag.partition("-")
        if not label:
            open_ = False
        elif mark == "I" and open_ and found[-1].label == label:
            first = found.pop()
            found.append(
                Entity(text=text[first.start : end], label=label, start=first.start, end=end, probability=min(sure, first.probability))
            )  # fmt: skip
        else:
            found.append(Entity(text=text[start:end], label=label, start=start, end=end, probability=sure))
            open_ = True
    return found


def _words(text: str, spans: Sequence[tuple[int, int]], tags: Sequence[tuple[str, float]]) -> list[Entity]:
    return [
        Entity(text=text[start:end], label=label, start=start, end=end, probability=sure)
        for (start, end), (label, sure) in zip(spans, tags, strict=True)
        if label != OUTSIDE
    ]
