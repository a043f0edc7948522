"""Reading a tokenizer's directory, within bounds: its small files as data, and its settings from wherever they stand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ownlm.documents.clean import well_formed
from ownlm.errors import UserError

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
MAX_BYTES = 256 * 2**20  # of one file; the largest tokenizer.json in use has 35 MB
RESTORE = "Restore the file from its source."
SWITCHES = (
    "add_bos_token",
    "add_prefix_space",
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
    "keep_accents",
)


def settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json with what other files say: names of special tokens and chat template.

    What decides ids has the right type afterwards; UserError names what hasn't.
    """
    file = path / "tokenizer_config.json"
    config = {**read_json(path / "special_tokens_map.json"), **read_json(file)}
    if (template := path / "chat_template.jinja").is_file():
        config["chat_template"] = read_text(template)
    elif isinstance(source := read_json(path / "chat_template.json").get("chat_template"), str):
        config.setdefault("chat_template", source)
    if isinstance(several := config.get("chat_template"), list):  # named templates: "default" is the one for chat
        named = {item.get("name"): item.get("template") for item in several if isinstance(item, dict)}
        config["chat_template"] = named.get("default")
    for name in NAMED:
        if config.get(name) is not None and token_text(config[name]) is None:
            raise _wrong(file, name, "the text of a token")
    for name in ("chat_template", "tokenizer_class", "pat_str"):
        if not isinstance(config.get(name, ""), str | None):
            raise _wrong(file, name, "text")
    for name in SWITCHES:
        if not isinstance(config.get(name, False), bool | None):
            raise _wrong(file, name, "true or false")
    extra = config.get("extra_ids", 0)
    if not isinstance(extra, int) or not 0 <= extra <= 100_000:
        raise _wrong(file, "extra_ids", "a number of tokens")
    return config


def declared_tokens(path: Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens beside the vocabulary, by id: added_tokens.json, then added_tokens_decoder of tokenizer_config.json. Each has its
    `content`, and flags only where they are true or false."""
    file = path / "added_tokens.json"
    found: dict[int, dict[str, Any]] = {
        id: {"content": token} for token, id in read_json(file).items() if isinstance(id, int)
    }
    declared = config.get("added_tokens_decoder")
    for id, token in (declared if isinstance(declared, Mapping) else {}).items():
        content = token_text(token)
        if not id.isdecimal() or content is None:
            raise _wrong(path / "tokenizer_config.json", f"added_tokens_decoder.{id}", "a token under its id")
        flags = dict(token) if isinstance(token, Mapping) else {}
        found[int(id)] = {name: value for name, value in flags.items() if isinstance(value, bool)} | {
            "content": content
        }
    return dict(sorted(found.items()))


def _wrong(file: Path, name: str, right: str) -> UserError:
    return UserError(f"{name} is not {right}.", where=str(file), cure=RESTORE)


def token_text(value: Any) -> str | None:
    """Settings write a token as its text or as {"content": text, ...}."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value and well_formed(value) == value else None


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
