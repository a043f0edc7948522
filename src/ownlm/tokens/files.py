"""Reading a tokenizer's directory, within bounds: its small files as data, and its settings from wherever they stand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ownlm.errors import UserError

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
MAX_BYTES = 256 * 2**20  # of one file; the largest tokenizer.json in use has 35 MB
RESTORE = "Restore the file from its source."


def settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json with what other files say: names of special tokens and chat template."""
    config = {**read_json(path / "special_tokens_map.json"), **read_json(path / "tokenizer_config.json")}
    if (template := path / "chat_template.jinja").is_file():
        config["chat_template"] = read_text(template)
    elif isinstance(source := read_json(path / "chat_template.json").get("chat_template"), str):
        config.setdefault("chat_template", source)
    if isinstance(several := config.get("chat_template"), list):  # named templates: "default" is the one for chat
        config["chat_template"] = {item["name"]: item["template"] for item in several}.get("default")
    return config


def declared_tokens(path: Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens beside the vocabulary, by id: added_tokens.json, then added_tokens_decoder of tokenizer_config.json."""
    found = {int(id): {"content": token} for token, id in read_json(path / "added_tokens.json").items()}
    for id, token in (config.get("added_tokens_decoder") or {}).items():
        found[int(id)] = token
    return dict(sorted(found.items()))


def token_text(value: Any) -> str | None:
    """Settings write a token as its text or as {"content": text, ...}."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def read_bytes(file: Path) -> bytes:
    """The content of a file that isn't absurdly large."""
    if file.stat().st_size > MAX_BYTES:
        raise UserError(f"larger than {MAX_BYTES >> 20} MB.", where=str(file), cure=RESTORE)
    return file.read_bytes()


def read_text(file: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError as fault:
        raise UserError(f"not text: {fault}.", where=str(file), cure=RESTORE) from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no file or no object in it."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(read_text(file))
    except (ValueError, RecursionError) as fault:
        raise UserError(f"not JSON: {fault}.", where=str(file), cure=RESTORE) from None
    return data if isinstance(data, dict) else {}
