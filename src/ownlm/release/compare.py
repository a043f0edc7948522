"""The same input through a model and through what was made of it: how far their numbers are apart.

    sample(model, tokenizer) ─► Sample (tokens, images) ─┬─► numbers(model, sample) ─────────┐
                                                         └─► numbers(other model, sample) ───┴─► compare ─► Comparison

Shapes: B rows, T tokens, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ownlm.models.decoder import Decoder
from ownlm.models.dual import DualTower, TextConfig, TextTower
from ownlm.models.encoder import Encoder
from ownlm.models.encoder_decoder import EncoderDecoder
from ownlm.models.two_stream import TwoStream
from ownlm.models.vision import VisionConfig, VisionTower
from ownlm.models.vision_language import VisionLanguage
from ownlm.tokens.codec import Tokenizer

MOST_TOKENS = 256
NUM_IMAGES = 2
CHOICES = ("logits", "labels")  # numbers of which the largest is what the model says
# What both models read where they have a tokenizer: prose, numbers, code, and a little of other languages.
TEXT = """The lighthouse keeper wrote down the weather every evening: wind from the west, 14 knots, rain by night. On the third of
March 1911 she added a sentence that nobody understood for sixty years. "Today," it said, "the sea was quiet, and I counted 27 ships."

def count(ships: list[str]) -> dict[str, int]:
    return {name: ships.count(name) for name in set(ships)}

Il fait beau. Это было давно. 海は静かだった。 The answer is 3 * (7 + 12) = 57, isn't it?
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What is read: tokens, images as the tower takes them, or both."""

    ids: tuple[int, ...] = ()
    images: tuple[Tensor, ...] = ()

    def first(self, tokens: int) -> "Sample":
        """No more than so many tokens of it."""
        return replace(self, ids=self.ids[:tokens])


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The largest difference of a number beside the largest number. `agreement` is the share of places where both models choose the
    same token or label; where they choose nothing (`chooses`), the mean cosine between their vectors."""

    max_difference: float
    max_value: float
    agreement: float
    chooses: bool


def sample(model: Any, tokenizer: Tokenizer | None) -> Sample:
    """Something to read for a model of any kind: a text, or any tokens where there is no tokenizer; noise for images."""
    config = model.config
    match model:
        case VisionTower():
            return Sample(images=_images(config))
        case TextTower():
            return Sample(ids=_ended(config, tokenizer))
        case DualTower():
            return Sample(ids=_ended(config.text, tokenizer), images=_images(config.vision))
        case VisionLanguage():
            images, token = _images(config.vision, config.merge or 1), config.image_token
            with torch.inference_mode():
                seen = sum(map(len, model.image_features(images)))
            ids = _ids(config.text.vocab_size, max(1, config.text.max_tokens - seen), tokenizer)
            return Sample(ids=(*[token] * seen, *(id for id in ids if id != token)), images=images)
        case TwoStream():
            return Sample(ids=_ids(config.vocab_size, MOST_TOKENS, tokenizer))
    return Sample(ids=_ids(config.vocab_size, config.max_tokens, tokenizer))


@torch.inference_mode()
def numbers(model: Any, read: Sample) -> dict[str, Tensor]:
    """All that a model makes of it, by name, in float32: a row for each place, text or image."""
    ids_BT = torch.tensor([read.ids], dtype=torch.int64)
    match model:
        case VisionTower(config=config):
            if not config.class_token:
                return {"hidden": model(read.images).flatten(0, 1).float()}
            features = model.features(torch.stack(read.images)).float()
            return {"labels" if config.labels else "vectors": features}
        case TextTower():
            return {"hidden": model(ids_BT)[0].float(), "vectors": model.features(ids_BT).float()}
        case DualTower():
            images, texts = model.image_features(torch.stack(read.images)), model.text_features(ids_BT)
            scores = model.similarity(images, texts).T
            return {"image vectors": images.float(), "text vectors": texts.float(), "scores": scores.float()}
        case VisionLanguage():
            hidden_BTD = model(ids_BT, images=read.images)
            return {"logits": model.logits(hidden_BTD)[0]}
        case EncoderDecoder():
            # The decoder writes the text that the encoder reads: any will do.
            start = torch.tensor([[model.config.start_token]])
            return {"logits": model.logits(model(ids_BT, torch.cat([start, ids_BT[:, :-1]], 1)))[0]}
    return _of_text(model, ids_BT)


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Comparison:
    """Of what both have, that which differs most; the last, which is made of the others, if none does."""
    found = [_compared(name, ours[name], theirs[name]) for name in reversed(list(ours)) if name in theirs]
    return max(found, key=lambda one: one.max_difference / max(one.max_value, 1e-30))


def _compared(name: str, ours: Tensor, theirs: Tensor) -> Comparison:
    chooses = name in CHOICES
    if chooses:
        agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    else:
        agreement = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean()
    return Comparison(
        max_difference=float((theirs - ours).abs().max()),
        max_value=float(ours.abs().max()),
        agreement=float(agreement),
        chooses=chooses,
    )


def _of_text(model: Any, ids_BT: Tensor) -> dict[str, Tensor]:
    """Of a decoder, an encoder or two streams: what its head says, and the hidden states where a file may lack that head."""
    hidden_BTD = model(ids_BT)
    found = {"hidden": hidden_BTD[0].float()}
    if isinstance(model, Encoder) and model.pooler is not None:
        found["pooled"] = model.pooler(hidden_BTD).float()
        if model.next_sentence is not None:
            found["follows"] = model.follows(hidden_BTD)
    if model.head is not None and model.task != "masked_lm":
        said = model.head(hidden_BTD)
        spans = isinstance(said, tuple)  # where an answer starts and where it ends, a row each
        return found | {"labels": torch.cat(said) if spans else said.reshape(-1, said.shape[-1])}
    if isinstance(model, Encoder):
        return found if model.head is None else found | {"logits": model.logits(hidden_BTD)[0]}
    writes = isinstance(model, Decoder) or model.config.lm_head
    return {"logits": model.logits(hidden_BTD)[0]} if writes else found


def _ids(vocab_size: int, limit: int, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    most = min(MOST_TOKENS, limit)
    if tokenizer is not None:
        return tuple(tokenizer.document(TEXT)[:-1][:most])
    return tuple(torch.randint(0, vocab_size, (most,), generator=torch.Generator().manual_seed(0)).tolist())


def _ended(config: TextConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """With the token that a text tower reads its vector at behind the text, and nowhere before."""
    end = config.decoder.vocab_size - 1 if config.eos_id is None else config.eos_id
    ids = _ids(config.decoder.vocab_size, config.decoder.max_tokens - 1, tokenizer)
    return (*(id for id in ids if id != end), end)


def _images(config: VisionConfig, merge: int = 1) -> tuple[Tensor, ...]:
    """Of the one size that a tower with learned positions reads; else of different sizes, `merge` patches at least."""
    sizes = [(config.image_size, config.image_size)] * NUM_IMAGES
    if config.rotary is not None:
        most, side = config.image_size // config.patch_size, config.patch_size
        sizes = [
            (min(rows * merge, most) * side, min(columns * merge, most) * side) for rows, columns in ((3, 5), (4, 2))
        ]
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(config.channels, height, width, generator=generator) for height, width in sizes)
