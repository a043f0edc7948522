"""What a family of models is: a way to read its config.json and the names of its tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from ownlm.formats.ggml import Blocks
from ownlm.formats.tensorfile import Entry
from ownlm.models.families.fields import Fields
from ownlm.models.heads import Pooling
from ownlm.models.names import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of FAMILIES.

    architecture  the class of transformers that its files name first
    read          config.json -> our config; faults go into the fields
    spelled       Llama's name of a field -> the name in its files
    defaults      what its files leave out, or may leave out
    build         our config -> the module
    names         our config -> the table of tensor names
    prefix        begins every name but the head's, and is left out in files of the bare model
    span_prefix   begins them instead where a head for spans follows; empty: the family has no such head, or no other names
    derived       matches stored tensors that are no weights
    spellings     (pattern, replacement) for stored names of older files
    copies        stored tensors that some files hold beside the one they are tied to: the end of the name, and ours
    """

    architecture: str
    read: Callable[[Fields], Any]
    build: Callable[[Any, Mapping[str, Any] | None], nn.Module]
    names: Callable[[Any], Table]
    spelled: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    span_prefix: str = ""
    derived: str = r"(?!)"
    spellings: tuple[tuple[str, str], ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)


# (name, tensor, give_back): to be copied before the next is asked for; `give_back(rows)` says how far that got.
Tensors: TypeAlias = tuple[str, Tensor | Blocks, Callable[[int], None]]


class Held(Protocol):
    """A file of tensors, mapped. `give_back()`: what was looked at need not stay in memory."""

    def tensor(self, name: str) -> Tensor | Blocks: ...
    def stream(self) -> Iterator[Tensors]: ...
    def give_back(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A checkpoint before its weights are read: its config.json, what it means, the tensors of each file, and the files themselves
    in the same order."""

    hf: Mapping[str, Any]
    config: Any
    family: Family
    files: Mapping[Path, Mapping[str, Entry]]
    maps: Sequence[Held]
    pooling: Pooling | None = None

    def tensors(self) -> Iterator[Tensors]:
        for one in self.maps:
            yield from one.stream()
