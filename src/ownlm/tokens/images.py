"""Images: a file, a data URI or a PIL image -> the array of numbers that a vision tower reads.

    source ─► open (checked, RGB) ─► resize ─► crop the centre ─► × 1/255 ─► (x - mean) / std ─► (3, H, W) float32

The steps are those of preprocessor_config.json, and each gives what transformers' PIL processors give. An image is input from
outside: its format is one of a few, its size is known to be sane before it is decoded, and nothing is ever fetched from
the network. Pillow comes with `pip install "ownlm[images]"`.
"""

import base64
import binascii
import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ownlm.errors import NotFound, UserError

Source: TypeAlias = "str | Path | bytes | Any"  # a path, a data URI, the bytes of a file, or a PIL image
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 50_000_000  # 150 MB once decoded; cameras make half of that
MAX_BYTES = 100_000_000
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def open_image(source: Source) -> Any:
    """A PIL image in RGB, turned as its camera was held. Raises UserError for what isn't an image, is damaged, or is too
    large, and NotFound."""
    pil = _pillow()
    if isinstance(source, pil.Image.Image):
        _check_pixels(source.size, "an image")
        return source.convert("RGB")
    where, data = _read(source)
    fault = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes that are refused below, and odd metadata
            with pil.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_pixels(image.size, where)
                return pil.ImageOps.exif_transpose(image).convert("RGB")
    except (UserError, MemoryError):
        raise
    except pil.UnidentifiedImageError:
        fault = f"this is not an image that can be read ({', '.join(FORMATS)})."
    except Exception as error:  # noqa: BLE001  (decoders of damaged files raise almost anything)
        fault = f"the image is damaged: {error}."
    raise UserError(fault, where=where)


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise UserError("images need Pillow.", cure='Install it with: pip install "ownlm[images]"') from None
    return PIL


def _check_pixels(size: tuple[int, int], where: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{width} × {height} pixels are too many (at most {MAX_PIXELS / 1e6:.0f} million).",
            where=where,
            cure="Scale the image down.",
        )


def _read(source: Source) -> tuple[str, bytes]:
    """(what to call it, its bytes)."""
    if isinstance(source, bytes):
        where, data = "an image", source
    elif isinstance(source, str) and source[:5].lower() == "data:":
        where = "a data URI"
        head, _, body = source.partition(",")
        if not head.lower().endswith(";base64"):
            raise UserError("only data:image/…;base64,… can be read.", where=where)
        if len(body) > MAX_BYTES * 4 // 3 + 4:
            raise UserError(f"more than {MAX_BYTES / 1e6:.0f} MB.", where=where)
        try:
            data = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            raise UserError("what follows base64, is not base64.", where=where) from None
    elif isinstance(source, str) and "://" in source:
        raise UserError(
            "images are not fetched from the network.", where=source[:80], cure="Download it and give the file."
        )
    elif isinstance(source, str | Path):
        path = Path(source)
        where = str(path)[:200]
        try:
            if path.is_file() and path.stat().st_size > MAX_BYTES:
                raise UserError(f"more than {MAX_BYTES / 1e6:.0f} MB.", where=where)
            data = path.read_bytes() if path.is_file() else b""
            missing = not path.is_file()
        except (OSError, ValueError):
            missing = True
        if missing:
            raise NotFound("there is no such image.", where=where)
    else:
        raise UserError(
            f"{type(source).__name__} is not an image.", cure="Give a path, a data URI, bytes or a PIL image."
        )
    if len(data) > MAX_BYTES:
        raise UserError(f"more than {MAX_BYTES / 1e6:.0f} MB.", where=where)
    return where, data


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageProcessor:
    """What happens to an image before a tower reads it.

    shortest    the shorter edge becomes this long; longest: the longer one at most; size: (height, width) exactly
    multiple    with `longest`: both edges grow to a multiple of this
    crop        (height, width) of the centre that is kept; black where the image is smaller
    resample    PIL's number of the filter: 3 is bicubic, 2 bilinear
    """

    shortest: int | None = None
    longest: int | None = None
    size: tuple[int, int] | None = None
    multiple: int = 1
    crop: tuple[int, int] | None = None
    resample: int = 3
    scale: float | None = 1 / 255
    mean: tuple[float, ...] | None = OPENAI[0]
    std: tuple[float, ...] | None = OPENAI[1]

    def __call__(self, source: Source) -> NDArray[np.float32]:
        """(3, H, W). Raises UserError as `open_image` does."""
        image = open_image(source)
        height, width = self.target(image.height, image.width)
        _check_pixels((width, height), f"the image, scaled from {image.width} × {image.height} pixels,")
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), resample=self.resample)
        pixels = np.asarray(image).transpose(2, 0, 1)
        if self.crop is not None:
            pixels = _centre(pixels, *self.crop)
        x = (pixels.astype(np.float64) * (1.0 if self.scale is None else self.scale)).astype(np.float32)
        if self.mean is not None and self.std is not None:
            mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (self.mean, self.std))
            x = (x - mean) / std
        return np.ascontiguousarray(x)

    def patches(self, side: int) -> "ImageProcessor":
        """The same for a tower of any image size, whose patches have `side` pixels."""
        return replace(self, multiple=side)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing."""
        if self.size is not None:
            return self.size
        if self.shortest is not None:
            short, long = min(height, width), max(height, width)
            long = int(self.shortest * long / short)
            return (long, self.shortest) if width <= height else (self.shortest, long)
        if self.longest is not None:
            ratio = max(height / self.longest, width / self.longest)
            if ratio > 1:
                height, width = max(1, math.floor(height / ratio)), max(1, math.floor(width / ratio))
            return -(-height // self.multiple) * self.multiple, -(-width // self.multiple) * self.multiple
        return height, width


def _centre(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """The middle of (3, H, W); zeros where there is none. Odd rests are cut as transformers cuts them."""
    full = np.zeros((3, max(height, pixels.shape[1]), max(width, pixels.shape[2])), pixels.dtype)
    top, left = (-(-(full.shape[axis] - pixels.shape[axis]) // 2) for axis in (1, 2))
    full[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    top += (pixels.shape[1] - height) // 2
    left += (pixels.shape[2] - width) // 2
    return full[:, top : top + height, left : left + width]


KINDS: dict[str, tuple[ImageProcessor, bool]] = {
    "CLIP": (ImageProcessor(shortest=224, crop=(224, 224)), True),
    "ViT": (ImageProcessor(size=(224, 224), resample=2, mean=(0.5,) * 3, std=(0.5,) * 3), False),
    "Pixtral": (ImageProcessor(longest=1024, multiple=16), False),
    "Llava": (ImageProcessor(shortest=224, crop=(224, 224)), True),
}  # by the beginning of image_processor_type: the defaults, and whether a plain number means the shortest edge


def read_processor(fields: Mapping[str, Any], *, default: str, where: str) -> ImageProcessor:
    """What a preprocessor_config.json describes; `default` is the kind where it doesn't say. UserError for what we don't do."""
    name = str(fields.get("image_processor_type", fields.get("feature_extractor_type", default)))
    kind = next((kind for kind in KINDS if name.startswith(kind)), None)
    faults = [] if kind else [f"image_processor_type {name!r} is not supported (supported: {', '.join(KINDS)})"]
    base, edge = KINDS[kind or default]

    def count(value: Any, field: str) -> int:
        if type(value) is not int or not 1 <= value <= 2**14:
            faults.append(f"{field} must be a whole number from 1 to {2**14}, got {value!r}")
            return 1
        return value

    def pair(value: Any, field: str) -> tuple[int, int]:
        table = value if isinstance(value, Mapping) else {"height": value, "width": value}
        return count(table.get("height"), f"{field}.height"), count(table.get("width"), f"{field}.width")

    def numbers(field: str, old: tuple[float, ...] | None) -> tuple[float, ...]:
        value = fields.get(field, old)
        value = [value] * 3 if type(value) in (int, float) else value
        good = isinstance(value, list | tuple) and len(value) == 3 and all(type(x) in (int, float) for x in value)
        if not good or (field == "image_std" and not all(value)):
            faults.append(f"{field} must be three numbers, got {value!r}")
            return (1.0,) * 3
        return tuple(map(float, value))

    size = fields.get("size")
    if not fields.get("do_resize", True):
        base = replace(base, shortest=None, longest=None, size=None)
    elif isinstance(size, Mapping) and "shortest_edge" in size:
        base = replace(base, shortest=count(size["shortest_edge"], "size.shortest_edge"), longest=None, size=None)
        if size.get("longest_edge") is not None:
            faults.append("size.longest_edge beside shortest_edge is not supported")
    elif isinstance(size, Mapping) and "longest_edge" in size and kind == "Pixtral":
        base = replace(base, longest=count(size["longest_edge"], "size.longest_edge"))
    elif type(size) is int and edge:
        base = replace(base, shortest=count(size, "size"))
    elif size is not None:
        base = replace(base, size=pair(size, "size"), shortest=None, longest=None)
        if kind == "Pixtral":
            faults.append("size must name the longest_edge")
    crops = fields.get("do_center_crop", base.crop is not None)
    crop = pair(fields.get("crop_size", {"height": 224, "width": 224}), "crop_size") if crops else None
    resample = fields.get("resample", base.resample)
    if type(resample) is not int or not 0 <= resample <= 5:
        faults.append(f"resample must be a number from 0 to 5, got {resample!r}")
    factor = fields.get("rescale_factor", 1 / 255)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
        faults.append(f"rescale_factor must be a number, got {factor!r}")
    if fields.get("do_pad") and kind != "Pixtral":
        faults.append("do_pad is not supported")
    normal = fields.get("do_normalize", True)
    mean, std = numbers("image_mean", base.mean), numbers("image_std", base.std)
    if faults:
        raise UserError("; ".join(faults) + ".", where=where)
    return replace(
        base,
        crop=crop,
        resample=resample,
        scale=float(factor) if fields.get("do_rescale", True) else None,
        mean=mean if normal else None,
        std=std if normal else None,
    )
