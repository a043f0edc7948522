"""Images become the same numbers as in transformers' PIL processors; hostile ones become one sentence."""

import base64
import contextlib
import io
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ownlm.errors import NotFound, UserError
from ownlm.tokens import images
from ownlm.tokens.images import ImageProcessor, open_image, read_processor

SIZES = [(64, 64), (37, 91), (200, 50), (31, 30), (225, 224), (300, 301), (1, 1), (7, 640)]


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth waves and noise, so that filters and edges show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 5 + c) * np.cos(y / 7 - c) for c in range(3)], -1) * 80 + 128
    pixels = (waves + rng.normal(0, 25, waves.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (CLIPImageProcessorPil, {}),
    "clip-small": (CLIPImageProcessorPil, {"size": {"shortest_edge": 33}, "crop_size": {"height": 32, "width": 28}}),
    "clip-crop-larger": (CLIPImageProcessorPil, {"size": {"shortest_edge": 20}, "crop_size": {"height": 37, "width": 30}}),
    "clip-square": (CLIPImageProcessorPil, {"size": {"height": 40, "width": 24}, "do_center_crop": False, "resample": 2}),
    "clip-raw": (CLIPImageProcessorPil, {"do_normalize": False, "do_resize": False, "rescale_factor": 0.5}),
    "vit": (ViTImageProcessorPil, {}),
    "vit-small": (ViTImageProcessorPil, {"size": {"height": 32, "width": 32}, "image_mean": 0.4, "image_std": [0.1, 0.2, 0.3]}),
    "pixtral": (PixtralImageProcessorPil, {}),
    "pixtral-small": (PixtralImageProcessorPil, {"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_numbers_of_transformers(name: str, size: tuple[int, int]) -> None:
    kind, settings = CASES[name]
    theirs, image = kind(**settings), picture(*size)
    fields = json.loads(theirs.to_json_string())
    ours = read_processor(fields, default="CLIP", where="test")
    if name.startswith("pixtral"):
        patch = settings.get("patch_size", {"height": 16})["height"]
        ours = read_processor(fields, default="Pixtral", where="test").patches(patch)
        if size == (7, 640) and name == "pixtral-small":
            assert ours.target(640, 7) == (64, 8)  # transformers makes it 0 pixels wide, and fails
            return
    expected = np.asarray(theirs(image, return_tensors="np")["pixel_values"][0])
    out = ours(image)
    assert out.dtype == np.float32
    assert out.shape == expected.shape
    assert np.abs(out - expected).max() <= 1e-6


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = picture(50, 40, mode=mode)
    expected = CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(read_processor({}, default="CLIP", where="")(image) - expected).max() <= 1e-6


def encoded(image: Image.Image, format: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def test_sources(tmp_path: Path) -> None:
    image = picture(20, 10)
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (image, data, tmp_path / "a.png", str(tmp_path / "a.png"), uri):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image))


def test_the_camera_may_be_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = open_image(encoded(picture(20, 10), "JPEG", exif=exif))
    assert turned.size == (10, 20)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(7100, 7100), (10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)], ids=str)
def test_decompression_bombs(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"too many|exceeds limit|damaged"):
        open_image(bomb(*size))


def test_a_thin_image_may_not_grow_beyond_bounds() -> None:
    """1 × 60,000 pixels with the shorter edge at 224 would be 224 × 13,440,000."""
    with pytest.raises(UserError, match=r"scaled from 1 × 60000 pixels.*too many"):
        ImageProcessor(shortest=224)(Image.new("RGB", (1, 60_000)))


def test_damaged_and_wrong_files(tmp_path: Path) -> None:
    whole = encoded(picture(60, 60))
    for data in (whole[: len(whole) // 2], whole[:40], encoded(picture(60, 60), "JPEG")[:300]):
        with pytest.raises(UserError, match=r"damaged|not an image"):
            open_image(data)
    rng = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        data = bytearray(encoded(picture(30, 30), format))
        for _ in range(40):
            changed = bytearray(data)
            for place in rng.integers(0, len(data), 6):
                changed[place] = rng.integers(0, 256)
            with contextlib.suppress(UserError):  # some damage shows only in the pixels
                assert open_image(bytes(changed)).mode == "RGB"
    for data in (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"GIF89a", b"MZ" * 50):
        with pytest.raises(UserError):
            open_image(data)


def test_nothing_is_fetched_and_nothing_else_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ("http://127.0.0.1/a.png", "https://example.org/a.png", "file:///etc/hostname", "ftp://x/a.png"):
        with pytest.raises(UserError, match="not fetched"):
            open_image(source)
    with pytest.raises(NotFound, match="no such image"):
        open_image(tmp_path / "none.png")
    with pytest.raises(NotFound):
        open_image(tmp_path)
    with pytest.raises(NotFound):
        open_image("a\0b")
    with pytest.raises(NotFound):
        open_image("x" * 10_000)
    for uri in ("data:image/png,abc", "data:image/png;base64,???", "data:"):
        with pytest.raises(UserError, match="base64"):
            open_image(uri)
    with pytest.raises(UserError, match="int is not an image"):
        open_image(7)
    monkeypatch.setattr(images, "MAX_BYTES", 50)
    (tmp_path / "a.png").write_bytes(encoded(picture(20, 20)))
    for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), "data:image/png;base64," + "A" * 99):
        with pytest.raises(UserError, match="more than"):
            open_image(source)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "PIL"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r'pip install "ownlm\[images\]"'):
        open_image(b"")


def test_old_configs_and_faults() -> None:
    old = read_processor(
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 30, "crop_size": 20}, default="CLIP", where=""
    )
    assert (old.shortest, old.size, old.crop) == (30, None, (20, 20))
    vit = read_processor({"feature_extractor_type": "ViTFeatureExtractor", "size": 30}, default="CLIP", where="")
    assert (vit.shortest, vit.size, vit.crop) == (None, (30, 30), None)
    for fields, match in [
        ({"image_processor_type": "SamImageProcessor"}, "SamImageProcessor"),
        ({"size": {"shortest_edge": 0}}, "size.shortest_edge"),
        ({"size": "large"}, "size.height"),
        ({"size": {"shortest_edge": 4, "longest_edge": 9}}, "longest_edge"),
        ({"crop_size": {"height": 9}}, "crop_size.width"),
        ({"resample": 9}, "resample"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": 0}, "image_std"),
        ({"do_pad": True}, "do_pad"),
        ({"image_processor_type": "PixtralImageProcessor", "size": {"height": 9, "width": 9}}, "longest_edge"),
    ]:
        with pytest.raises(UserError, match=match):
            read_processor(fields, default="CLIP", where="preprocessor_config.json")
