"""A chat with images in it -> the tokens and vectors that a decoder reads.

    {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is this?"}]}
        ─► chat template ─► … [IMG] … ─► an image token for each vector of the image ─► embeddings, the image's among them

Shapes: T tokens, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ownlm.errors import ContextTooLong, UserError
from ownlm.formats.settings import read_json
from ownlm.generate.vision import processor_of
from ownlm.models.vision_language import VisionLanguage
from ownlm.records import Message, to_json
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.images import ImageProcessor, Source

PLACES = ("image", "path", "url", "image_url")  # where a message keeps its image


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt as the engine takes it. `embeds_TD` stands in for the embedding of the ids, where there are images."""

    ids: list[int]
    embeds_TD: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """How a model reads the images of a chat.

    breaks  (after each row of an image but the last, after the last): the tokens that tell a decoder the shape of images of
            any size (Pixtral); None where all have one size
    """

    model: VisionLanguage
    processor: ImageProcessor
    breaks: tuple[int, int] | None

    @classmethod
    def load(cls, model: VisionLanguage, path: Path, tokenizer: Tokenizer) -> "Sight":
        """From preprocessor_config.json and processor_config.json beside the model. Raises UserError."""
        vision = model.config.vision
        if model.config.image_token not in tokenizer.special.values():
            raise UserError(f"the image token {model.config.image_token} is no special token.", where=str(path))
        if vision.rotary is None:
            return cls(model=model, processor=processor_of(path, "Llava"), breaks=None)
        side = vision.patch_size * (model.config.merge or 1)
        file = path / "processor_config.json"
        names = read_json(file) if file.is_file() else {}
        found = []
        for field, default in (("image_break_token", "[IMG_BREAK]"), ("image_end_token", "[IMG_END]")):
            name = names.get(field, default)
            if name not in tokenizer.special:
                raise UserError(f"the tokenizer has no special token {name!r}.", where=str(path))
            found.append(tokenizer.special[name])
        return cls(model=model, processor=processor_of(path, "Pixtral").patches(side), breaks=(found[0], found[1]))

    @torch.inference_mode()
    def read(self, messages: Sequence[Message | Mapping[str, Any]], tokenizer: Tokenizer) -> Reading:
        """The prompt for the assistant's answer. Raises UserError for messages of another shape and images that can't be
        read, and ContextTooLong."""
        sources: list[Source] = []
        turns = [self._turn(message, sources) for message in messages]
        ids, _ = tokenizer.chat(turns, add_generation_prompt=True)
        shown = ids.count(self.model.config.image_token)
        if shown != len(sources):
            raise UserError(f"the chat template shows {shown} of {len(sources)} images.", where="prompt")
        if not sources:
            return Reading(ids)
        device, context = self.model.head_weight.device, self.model.config.text.max_tokens
        images: list[Tensor] = []
        left, expanded = iter(sources), []
        for id in ids:
            if id == self.model.config.image_token:
                images.append(torch.from_numpy(self.processor(next(left))).to(device))
                expanded += self.tokens(*self.model.vision.sizes(images[-1:])[0])
            else:
                expanded.append(id)
            if len(expanded) > context:  # before more images are opened, or any is looked at
                raise ContextTooLong(len(expanded), 0, context)
        return Reading(expanded, self.model.embed(torch.tensor([expanded], device=device), images)[0])

    def _turn(self, message: Message | Mapping[str, Any], sources: list[Source]) -> dict[str, Any]:
        """The message as the template takes it; its images are added to `sources`."""
        turn = dict(to_json(message) if isinstance(message, Message) else message)
        content = turn.get("content")
        if not isinstance(turn.get("role"), str) or not isinstance(content, str | list):
            raise UserError(
                f"{str(turn)[:200]} is not a message.",
                where="prompt",
                cure='A message is {"role": …, "content": text or a list of {"type": "text", "text": …} and '
                '{"type": "image", "image": …}}.',
            )
        if isinstance(content, str):
            # Pixtral's templates take texts; those of other models show nothing of a content that is no list.
            return turn if self.breaks else turn | {"content": [{"type": "text", "text": content}]}
        parts: list[dict[str, str]] = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append(
                    {"type": "text", "text": part["text"], "content": part["text"]}
                )  # old templates read content
            elif kind in ("image", "image_url") and (places := [place for place in PLACES if place in part]):
                value = part[places[0]]
                sources.append(value.get("url") if isinstance(value, Mapping) else value)
                parts.append({"type": "image"})
            else:
                raise UserError(
                    f"{str(part)[:200]} is neither a text nor an image.",
                    where="prompt",
                    cure='Give {"type": "text", "text": …} or {"type": "image", "image": a path, a data URI or a PIL image}.',
                )
        return turn | {"content": parts}

    def tokens(self, rows: int, columns: int) -> list[int]:
        """What stands in the prompt for an image of so many patches: an image token for each of its vectors."""
        config = self.model.config
        rows, columns = rows // (config.merge or 1), columns // (config.merge or 1)
        if self.breaks is None:
            return [config.image_token] * (rows * columns + config.class_token)
        row = [config.image_token] * columns
        return [*row, *([self.breaks[0], *row] * (rows - 1)), self.breaks[1]]
