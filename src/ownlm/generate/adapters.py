"""Adapters that wait beside one base, by name: loaded and unloaded while others write, several of them in one batch.

    load(name, ref) ─► read, checked against the base ─► packed for what computes ─► chosen by requests ─► unload(name)

What a request chose it keeps: an adapter that is unloaded, or replaced by another of its name, stays in memory until the last
answer that is written with it has ended.
"""

import itertools
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ownlm import device as machine
from ownlm.adapters import peft
from ownlm.adapters.lora import Learned
from ownlm.artifact import Workspace
from ownlm.errors import NotFound, UserError
from ownlm.generate.checkpoint import adapter_folder
from ownlm.kernels.adapters import NativeAdapter
from ownlm.kernels.native import NativeDecoder
from ownlm.models.decoder import Decoder
from ownlm.report import size

SHARE = 0.1  # of the free memory, for all adapters together
HEAD = {"lm_head.weight", "lm_head.bias"}


def for_each(names: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """A name, or none, for each of `count` prompts. Raises UserError where there are more or fewer."""
    if names is None or isinstance(names, str):
        return [names] * count
    if len(names) != count:
        raise UserError(f"there are {len(names)} adapters for {count} prompts.", where="adapter")
    return list(names)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Adapter:
    """One that is loaded. `number` is never given twice over one base: what was computed with another is not of use to it."""

    name: str
    number: int
    ref: str
    weights: NativeAdapter | Learned  # for the native kernels, or for the modules
    memory_bytes: int


class Adapters:
    """The adapters over one base. May be used by several threads."""

    def __init__(
        self,
        base: Decoder,
        kernels: Callable[[], NativeDecoder | None],
        *,
        name: str = "",
        ref: str = "",
        digest: str = "",
        memory_bytes: int | None = None,
    ) -> None:
        """`kernels`: the native decoder that computes, None where the modules do. `name`, `ref` and `digest`: of the base.
        `memory_bytes`: for all adapters together; None: SHARE of what is free now."""
        self.base, self.kernels, self.name, self.ref, self.digest = base, kernels, name, ref, digest
        self.memory_bytes = (
            int(machine.free_memory_bytes(base.device) * SHARE) if memory_bytes is None else memory_bytes
        )
        self._by_name: dict[str, Adapter] = {}
        self._alive: weakref.WeakSet[Adapter] = weakref.WeakSet()
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def load(self, name: str, ref: str | Path, *, workspace: Workspace | None = None, replace: bool = False) -> Adapter:
        """Make the adapter of a reference, or of a folder that PEFT wrote, ready under a name. With `replace` it may take the place
        of one of that name.

        Raises NotFound, ArtifactError (damaged, or of another base) and UserError (a name that is taken, no room, a kind of
        adapter that can only be merged).
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise UserError(
                f"an adapter can't be called {name[:100]!a}.", cure="Use letters, digits, '.', '_' and '-'."
            )
        self._free(name, replace)
        workspace = workspace or Workspace(machine.home())
        folder, full_ref = adapter_folder(ref, workspace, base_ref=self.ref, base_digest=self.digest)
        peft.read_config(folder)
        file = folder / peft.TENSORS
        if file.is_file():
            self._room(name, file.stat().st_size)  # before it is read
        learned = peft.read_adapter(self.base, folder)
        if others := sorted(set(learned.whole) - HEAD):
            raise UserError(
                f"this adapter holds {others[0]} whole, which can't run beside the base.",
                where=str(ref),
                cure="Merge it instead: ownlm.load(…, adapter=…), `ownlm serve BASE --adapter REF`.",
            )
        native = self.kernels()
        weights: NativeAdapter | Learned
        if native is None:
            # A base whose weights are still in its files is going to have them on the CPU.
            device = self.base.device
            weights = learned.to(torch.device("cpu") if device.type == "meta" else device)
        else:
            weights = NativeAdapter(native, learned)
        adapter = Adapter(
            name=name,
            number=next(self._numbers),
            ref=full_ref,
            weights=weights,
            memory_bytes=weights.memory_bytes,
        )
        with self._lock:
            self._free(name, replace)
            self._room(name, adapter.memory_bytes)
            self._by_name[name] = adapter
            self._alive.add(adapter)
        return adapter

    def unload(self, name: str) -> Adapter:
        """Take a name away; answers that are being written with it go on to their end. Raises NotFound."""
        with self._lock:
            adapter = self[name]
            del self._by_name[name]
        return adapter

    def __getitem__(self, name: str) -> Adapter:
        found = self._by_name.get(name)
        if found is None:
            loaded = ", ".join(self._by_name) or "none"
            raise NotFound(f"there is no adapter {name[:100]!r}.", cure=f"Loaded are: {loaded}.")
        return found

    def find(self, name: str) -> Adapter | None:
        return self._by_name.get(name)

    def all(self) -> list[Adapter]:
        return list(self._by_name.values())

    @property
    def used_bytes(self) -> int:
        """What they take, those included that only answers under way still hold."""
        return sum(adapter.memory_bytes for adapter in self._alive)

    def _free(self, name: str, replace: bool) -> None:
        taken = name in self._by_name and not replace
        if taken or name in (self.name, self.ref):
            what = "an adapter" if taken else "the model itself"
            raise UserError(f"{what} is called {name!r} already.", cure="Unload that one, or take another name.")

    def _room(self, name: str, more: int) -> None:
        used = self.used_bytes
        if used + more > self.memory_bytes:
            raise UserError(
                f"the adapter takes {size(more)}, and {size(max(0, self.memory_bytes - used))} are left for adapters.",
                where=name,
                cure="Unload another one first.",
            )
