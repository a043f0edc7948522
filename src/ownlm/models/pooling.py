"""One vector of a text from its hidden states, and the files in which sentence-transformers says how.

Shapes: B texts, T tokens, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from ownlm.errors import UserError
from ownlm.formats.settings import read_json, read_value, write_json
from ownlm.models.heads import last_token

PoolingKind = Literal["mean", "cls", "last"]
MODES: dict[str, PoolingKind] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
MODULES, FOLDER = "modules.json", "1_Pooling"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How a text's vector is made: the mean of its tokens, its first or its last one; scaled to length 1 or not."""

    kind: PoolingKind = "mean"
    normalize: bool = True


def pool(
    hidden_BTD: Tensor, mask_BT: Tensor | None = None, *, kind: PoolingKind = "mean", normalize: bool = True
) -> Tensor:
    """(B, D) float32; `mask_BT` is True for real tokens, None: all are."""
    hidden_BTD = hidden_BTD.float()
    if kind == "cls":
        x_BD = hidden_BTD[:, 0] if mask_BT is None else hidden_BTD[range(len(mask_BT)), mask_BT.int().argmax(1)]
    elif kind == "last":
        x_BD = last_token(hidden_BTD, mask_BT)
    elif mask_BT is None:
        x_BD = hidden_BTD.mean(1)
    else:
        # Not a product with the mask: noise at padding may be infinite.
        total_BD = hidden_BTD.masked_fill(~mask_BT[..., None], 0.0).sum(1)
        x_BD = total_BD / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return F.normalize(x_BD, dim=-1) if normalize else x_BD


def read_pooling(directory: Path) -> Pooling | None:
    """What modules.json asks for; None where there is none. UserError for a step that we don't compute."""
    file = directory / MODULES
    if not file.is_file():
        return None
    modules = read_value(file)
    if not isinstance(modules, list) or not all(isinstance(module, Mapping) for module in modules):
        raise UserError("this is no list of modules.", where=str(file))
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UserError(
            f"the steps {', '.join(kinds)[:200]} are not supported (only Transformer, Pooling, Normalize).",
            where=str(file),
        )
    folder = str(modules[1].get("path"))
    if not folder or Path(folder).name != folder:
        raise UserError(f"{folder!r} is not the name of a folder beside it.", where=str(file))
    file = directory / folder / "config.json"
    fields = read_json(file)
    # Newer files name the mode, older ones have a flag for each.
    flags = [
        key[13:].removesuffix("_token").removesuffix("_tokens") for key, on in fields.items() if _is_mode(key) and on
    ]
    mode = fields.get("pooling_mode", "+".join(flags))
    if not isinstance(mode, str) or mode not in MODES:
        raise UserError(
            f"pooling {str(mode)[:200]!r} is not supported (supported: {', '.join(MODES)}).", where=str(file)
        )
    return Pooling(kind=MODES[mode], normalize=kinds[2:] == ["Normalize"])


def write_pooling(pooling: Pooling, directory: Path, hidden_size: int) -> None:
    """The files that `read_pooling` and sentence-transformers read."""
    steps = [("", "Transformer"), (FOLDER, "Pooling")] + [("2_Normalize", "Normalize")] * pooling.normalize
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(steps)
    ]
    write_json(directory / MODULES, modules)
    (directory / FOLDER).mkdir(exist_ok=True)
    flags = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
    config: dict[str, Any] = {"word_embedding_dimension": hidden_size}
    config |= {flag: kind == pooling.kind for flag, kind in flags.items()}
    write_json(directory / FOLDER / "config.json", config)


def _is_mode(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("pooling_mode_")
