"""What a family of models is: a way to read its config.json and the names of its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ownlm.models.families.fields import Fields
from ownlm.models.names import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of FAMILIES.

    architecture  the class of transformers that its files name first
    read          config.json -> our config; faults go into the fields
    build         our config -> the module
    names         our config -> the table of tensor names
    prefix        begins every name but the head's, and is left out in files of the bare model
    derived       matches stored tensors that are no weights
    spellings     (pattern, replacement) for stored names of older files
    copies        stored tensors that some files have beside the one they repeat, and which of ours that is
    """

    architecture: str
    read: Callable[[Fields], Any]
    build: Callable[[Any, Mapping[str, Any] | None], nn.Module]
    names: Callable[[Any], Table]
    prefix: str = ""
    derived: str = r"(?!)"
    spellings: tuple[tuple[str, str], ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
