"""The JSON files beside a model's tensors: config.json and its like, read within a limit of size."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ownlm.errors import ArtifactError, NotFound

SETTINGS_BYTES = 10_000_000


def read_json(path: Path) -> dict[str, Any]:
    value = read_value(path)
    if not isinstance(value, dict):
        raise ArtifactError("this is not a JSON object.", where=str(path))
    return value


def read_value(path: Path) -> Any:
    try:
        if path.stat().st_size > SETTINGS_BYTES:
            raise ArtifactError(f"it has more than {SETTINGS_BYTES} bytes, which no settings need.", where=str(path))
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFound("there is no such file.", where=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"this is not JSON: {error}.", where=str(path)) from None


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
