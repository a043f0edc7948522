"""ownlm: the whole life of a language model on machines you control.

Importing this package is light; each public name loads what it needs when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "Completion": "ownlm.records",
    "Conversation": "ownlm.records",
    "Document": "ownlm.records",
    "Message": "ownlm.records",
    "Question": "ownlm.records",
    "Score": "ownlm.records",
    "UserError": "ownlm.errors",
    "Workspace": "ownlm.artifact",
    "Model": "ownlm.generate.model",
    "build": "ownlm.api",
    "convert": "ownlm.formats.convert",
    "export": "ownlm.release.export",
    "finetune": "ownlm.api",
    "load": "ownlm.generate.opening",
    "pretrain": "ownlm.api",
    "quantize": "ownlm.api",
    "show": "ownlm.api",
}
PACKAGES = ("evaluate", "serve")  # packages that are functions too
__all__ = sorted([*PUBLIC, *PACKAGES])


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        return import_module(f"ownlm.{name}")
    if name not in PUBLIC:
        raise AttributeError(f"module 'ownlm' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
