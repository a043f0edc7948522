"""One vector of a text, against numpy; sentence-transformers' files, old and new."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ownlm.checkpoints.pooling import read_pooling, write_pooling
from ownlm.errors import UserError
from ownlm.models.heads import Pooling, PoolingKind, pool

HIDDEN = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(0))
LENGTHS = (9, 5, 2, 1)


@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pool(kind: PoolingKind, normalize: bool, side: str) -> None:
    lengths, places = torch.tensor(LENGTHS)[:, None], torch.arange(9)
    mask = places < lengths if side == "right" else places >= 9 - lengths
    noisy = HIDDEN.masked_fill(~mask[..., None], float("nan"))
    pooled = pool(noisy, mask, kind=kind, normalize=normalize).numpy()
    for row, keep, vector in zip(HIDDEN.numpy(), mask.numpy(), pooled, strict=True):
        real = row[keep]
        expected = {"mean": real.mean(0), "cls": real[0], "last": real[-1]}[kind]
        expected = expected / np.linalg.norm(expected) if normalize else expected
        np.testing.assert_allclose(vector, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
def test_no_mask_means_all_tokens_are_real(kind: PoolingKind) -> None:
    everything = torch.ones(4, 9, dtype=torch.bool)
    assert torch.allclose(pool(HIDDEN, kind=kind), pool(HIDDEN, everything, kind=kind))
    assert pool(HIDDEN.bfloat16(), kind=kind).dtype == torch.float32


def files(
    path: Path, config: Any, types: tuple[str, ...] = ("Transformer", "Pooling"), folder: str = "1_Pooling"
) -> Path:
    modules = [
        {"idx": i, "path": folder if i else "", "type": f"sentence_transformers.models.{t}"}
        for i, t in enumerate(types)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return path


FLAGS = {
    f"pooling_mode_{name}": False
    for name in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (FLAGS | {"pooling_mode_mean_tokens": True}, "mean"),
        (FLAGS | {"pooling_mode_cls_token": True}, "cls"),
        (FLAGS | {"pooling_mode_lasttoken": True}, "last"),
        ({"embedding_dimension": 6, "pooling_mode": "lasttoken", "include_prompt": True}, "last"),
        ({"embedding_dimension": 6, "pooling_mode": "mean"}, "mean"),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_read(config: dict[str, Any], kind: PoolingKind, normalize: bool, tmp_path: Path) -> None:
    types = ("Transformer", "Pooling", *(["Normalize"] if normalize else []))
    assert read_pooling(files(tmp_path, config, types)) == Pooling(kind=kind, normalize=normalize)


def test_nothing_to_read(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None


@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_written_comes_back(kind: PoolingKind, normalize: bool, tmp_path: Path) -> None:
    pooling = Pooling(kind=kind, normalize=normalize)
    write_pooling(pooling, tmp_path, 6)
    assert read_pooling(tmp_path) == pooling


MEAN = FLAGS | {"pooling_mode_mean_tokens": True}
BAD: dict[str, tuple[Any, tuple[str, ...], str, str]] = {
    "a dense layer": (MEAN, ("Transformer", "Pooling", "Dense"), "1_Pooling", "Transformer, Pooling, Dense are not"),
    "max": (FLAGS | {"pooling_mode_max_tokens": True}, ("Transformer", "Pooling"), "1_Pooling", "pooling 'max'"),
    "mean by the root": (FLAGS | {"pooling_mode_mean_sqrt_len_tokens": True}, ("Transformer", "Pooling"), "1_Pooling", "sqrt"),
    "two at once": (MEAN | {"pooling_mode_cls_token": True}, ("Transformer", "Pooling"), "1_Pooling", r"cls\+mean"),
    "two by name": ({"pooling_mode": ["cls", "mean"]}, ("Transformer", "Pooling"), "1_Pooling", "not supported"),
    "none": (FLAGS, ("Transformer", "Pooling"), "1_Pooling", "pooling ''"),
    "a list": ([], ("Transformer", "Pooling"), "1_Pooling", "not a JSON object"),
    "another folder": (MEAN, ("Transformer", "Pooling"), "../1_Pooling", "not the name of a folder"),
    "missing folder": (MEAN, ("Transformer", "Pooling"), "2_Pooling", "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_clear_error(name: str, tmp_path: Path) -> None:
    config, types, folder, message = BAD[name]
    with pytest.raises(UserError, match=message):
        read_pooling(files(tmp_path, config, types, folder))


def test_modules_that_are_no_list(tmp_path: Path) -> None:
    for text, message in (
        ("{", "not JSON"),
        ("{}", "no list"),
        ("[1]", "no list"),
        ("[" * 10**5, "not JSON"),
    ):
        (tmp_path / "modules.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_pooling(tmp_path)
