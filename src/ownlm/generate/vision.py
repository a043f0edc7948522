"""What models that see without generating are for: CLIP compares images with texts, ViT names what an image shows.

    load("clip").classify_image("cat.png", ["cat", "dog"])   # {"cat": 0.98, "dog": 0.02}
    load("vit").classify_image("cat.png")                    # {"tabby, tabby cat": 0.61, …}

Shapes: I images, N texts, F features.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ownlm.errors import ContextTooLong, UserError
from ownlm.formats.settings import read_json
from ownlm.models.dual import DualTower
from ownlm.models.vision import VisionTower
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.images import ImageProcessor, Source, read_processor

BATCH = 32  # images or texts of one forward
TEMPLATE = "a photo of a {}."  # of CLIP's paper (section 3.1.4)


def processor_of(path: Path, default: str) -> ImageProcessor:
    """How the model in this directory wants its images; of the kind `default` where no file says so. Raises UserError."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path / name).is_file():
            fields = read_json(path / name)
            fields = fields if name.startswith("pre") else fields.get("image_processor", {})
            return read_processor(fields, default=default, where=str(path / name))
    return read_processor({}, default=default, where=str(path))


def _batches(sources: Sequence[Source], processor: ImageProcessor, device: torch.device) -> Iterator[Tensor]:
    """(≤ BATCH, 3, H, W) of all images in their order."""
    arrays = (torch.from_numpy(processor(source)) for source in sources)
    while batch := list(islice(arrays, BATCH)):
        if len({image.shape for image in batch}) > 1:
            raise UserError(
                "the images keep different sizes.",
                where="preprocessor_config.json",
                cure="It must resize or crop them.",
            )
        yield torch.stack(batch).to(device)


def _probabilities(logits: Tensor, names: Sequence[str]) -> dict[str, float]:
    """By name, the likeliest first."""
    pairs = zip(names, logits.float().softmax(-1).tolist(), strict=True)
    return dict(sorted(pairs, key=lambda pair: -pair[1]))


class ImageText:
    """CLIP and its tokenizer: images and texts in one space."""

    def __init__(
        self,
        model: DualTower,
        tokenizer: Tokenizer,
        processor: ImageProcessor,
        *,
        name: str = "model",
        ref: str = "",
        digest: str = "",
    ) -> None:
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor
        self.name, self.ref, self.digest = name, ref or name, digest

    @classmethod
    def load(cls, model: DualTower, path: Path, *, name: str = "model", ref: str = "", digest: str = "") -> "ImageText":
        """With the tokenizer and the preprocessor_config.json beside the model."""
        return cls(model, Tokenizer.load(path), processor_of(path, "CLIP"), name=name, ref=ref, digest=digest)

    @property
    def context(self) -> int:
        """Tokens that a text may have, its begin and end included."""
        return self.model.config.text.decoder.max_tokens

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Source]) -> Tensor:
        """(I, F) float32, each of length 1. An image is a path, a data URI, bytes, or a PIL image."""
        device = self.model.logit_scale.device
        rows = [self.model.image_features(batch).float().cpu() for batch in _batches(images, self.processor, device)]
        return F.normalize(torch.cat(rows), dim=-1) if rows else torch.empty(0, self.model.config.vision.head or 0)

    @torch.inference_mode()
    def embed(self, texts: str | Sequence[str]) -> Tensor:
        """(N, F) float32, each of length 1. Raises ContextTooLong."""
        ids = [self.tokenizer.document(text) for text in ([texts] if isinstance(texts, str) else texts)]
        for row in ids:
            if len(row) > self.context:
                raise ContextTooLong(len(row), 0, self.context)
        rows = []
        for start in range(0, len(ids), BATCH):
            batch = ids[start : start + BATCH]
            width = max(map(len, batch))
            # What follows the end token is never seen.
            padded = [row + [0] * (width - len(row)) for row in batch]
            tokens_BT = torch.tensor(padded, device=self.model.logit_scale.device)
            rows.append(self.model.text_features(tokens_BT).float().cpu())
        return F.normalize(torch.cat(rows), dim=-1) if rows else torch.empty(0, self.model.config.text.head or 0)

    @torch.inference_mode()
    def similarity(self, images: Sequence[Source], texts: Sequence[str]) -> Tensor:
        """(I, N) float32: cosines times the model's scale. Their softmax over the texts says which one describes an image."""
        scale = self.model.logit_scale.exp().float().cpu()
        return scale * self.embed_images(images) @ self.embed(texts).T

    def classify_image(self, image: Source, labels: Sequence[str], template: str = TEMPLATE) -> dict[str, float]:
        """The probability of each label, the likeliest first; `template` makes a text of it. No training (zero-shot)."""
        return self.classify_images([image], labels, template)[0]

    def classify_images(
        self, images: Sequence[Source], labels: Sequence[str], template: str = TEMPLATE
    ) -> list[dict[str, float]]:
        """`classify_image` of each. Raises UserError."""
        if isinstance(labels, str) or not labels or len(set(labels)) != len(labels):
            raise UserError("give different labels, at least one.", where="labels")
        if "{}" not in template:
            raise UserError(
                f"{template!r} has no place for the label.", where="template", cure=f"Such as {TEMPLATE!r}."
            )
        logits_IN = self.similarity(images, [template.replace("{}", label) for label in labels])
        return [_probabilities(row, labels) for row in logits_IN]


class ImageClassifier:
    """A vision tower that names what an image shows, or describes it as a vector."""

    def __init__(
        self, model: VisionTower, processor: ImageProcessor, *, name: str = "model", ref: str = "", digest: str = ""
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.name, self.ref, self.digest = name, ref or name, digest

    @classmethod
    def load(
        cls, model: VisionTower, path: Path, *, name: str = "model", ref: str = "", digest: str = ""
    ) -> "ImageClassifier":
        """With the preprocessor_config.json beside the model. Raises UserError for a tower that has no class token."""
        if not model.config.class_token:
            raise UserError("this vision tower gives no single vector for an image.", where=ref or name)
        kind = "CLIP" if model.config.first_norm else "ViT"
        return cls(model, processor_of(path, kind), name=name, ref=ref, digest=digest)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.model.config.labels

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Source]) -> Tensor:
        """(I, F) float32: the vectors that the classifier would see, each of length 1."""
        device = self.model.patches.weight.device
        rows = [self.model.pooled(batch).float().cpu() for batch in _batches(images, self.processor, device)]
        return F.normalize(torch.cat(rows), dim=-1) if rows else torch.empty(0, self.model.config.hidden_size)

    def classify_image(self, image: Source) -> dict[str, float]:
        """The probability of each label, the likeliest first."""
        return self.classify_images([image])[0]

    @torch.inference_mode()
    def classify_images(self, images: Sequence[Source]) -> list[dict[str, float]]:
        """`classify_image` of each. Raises UserError for a tower without a classifier."""
        if not self.labels:
            raise UserError("this model has no classifier.", where=self.ref, cure="Use embed_images.")
        device = self.model.patches.weight.device
        logits = [self.model.features(batch).float().cpu() for batch in _batches(images, self.processor, device)]
        return [_probabilities(row, self.labels) for batch in logits for row in batch]
