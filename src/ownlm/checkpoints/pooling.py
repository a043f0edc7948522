"""The files in which sentence-transformers says how one vector is made of a text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ownlm.errors import UserError
from ownlm.formats.settings import read_json, read_value, write_json
from ownlm.models.heads import Pooling, PoolingKind

MODES: dict[str, PoolingKind] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
MODULES, FOLDER = "modules.json", "1_Pooling"


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
