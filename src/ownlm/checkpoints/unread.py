"""Decoders whose weights are still in their files: what only passes through, on its way to the kernels, never is in memory as a whole.

    unread = open_unread(path, dtype)        config, shapes: nothing is read
    with unread.lend("layers.3"): …          the weights of one part are in its modules, as they lie in the file where that is possible
    unread.read()                            a model with weights of its own

A directory of numbers gives numbers; one that `ownlm quantize` wrote its codes; a quantised GGUF file codes where its matrices are
blocks (`recode.py`). While they are lent, blocks are the `blocks` of their module.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ownlm.checkpoints import coded, weights
from ownlm.errors import ArtifactError
from ownlm.formats.ggml import Blocks
from ownlm.formats.settings import read_json
from ownlm.formats.tensorfile import Mapped
from ownlm.gguf import byte_size
from ownlm.models.blank import blank
from ownlm.models.blocks import Stack
from ownlm.models.decoder import Decoder
from ownlm.models.families.family import Held
from ownlm.models.names import LAYOUTS, Stored
from ownlm.quantization.calibrate import matrices
from ownlm.quantization.codes import Codes, Scheme, empty, quantized
from ownlm.quantization.recode import EXACT, recode, scheme_of
from ownlm.report import size

Value: TypeAlias = Tensor | Blocks
WHOLE_ROWS = ("same", "pairs")  # layouts that leave each row as it is
EXPERTS = ("gate_proj", "up_proj", "down_proj")
SMALL = 2**20  # numbers
# What is lost of blocks that no codes hold exactly, and the type of GGUF that takes as much as those codes.
ROUNDED: dict[Scheme, str] = {
    "uint4": "scales and minimums within 1/2048",
    "int8": "each within 1/254 of the largest of 32",
}
SAME_SIZE: dict[Scheme, str] = {"uint4": "Q4_1", "int8": "Q8_0"}


class Unread:
    """`model` has the shapes alone, in the dtype that was asked for; its weights come from `take(part)`, by their names in the model,
    blocks by the name of their module; `read()` makes a model of its own. `note` tells what is rounded on the way."""

    def __init__(
        self,
        model: Decoder,
        maps: list[Held],
        take: Callable[[str], Iterator[tuple[str, Value]]],
        read: Callable[[], Decoder],
        note: str = "",
    ) -> None:
        self.model, self.maps, self.take, self.read, self.note = model, maps, take, read, note
        self._shapes = model.state_dict()

    @contextmanager
    def lend(self, part: str) -> Iterator[None]:
        """The weights of a layer ("layers.3"), or "" for all that is in no layer, for as long as the context lasts."""
        here = self.model.get_submodule(part)  # of a whole model each call would look at all its modules
        start = len(f"{part}." if part else "")
        tensors: dict[str, Tensor] = {}
        modules: list[nn.Module] = []
        try:
            for name, value in self.take(part):
                if isinstance(value, Blocks):
                    modules.append(self.model.get_submodule(name))
                    modules[-1].blocks = value  # type: ignore[assignment]
                else:
                    tensors[name[start:]] = value
            here.load_state_dict(tensors, assign=True, strict=False)
            yield
        finally:
            blanks = {name: self._shapes[f"{part}.{name}" if part else name] for name in tensors}
            here.load_state_dict(blanks, assign=True, strict=False)
            tensors.clear()
            for module in modules:
                module.blocks = None  # type: ignore[assignment]
            for one in self.maps:
                one.give_back()


def open_unread(path: Path, dtype: torch.dtype) -> Unread | None:
    """The decoder of a directory or a GGUF file; None where it is another kind of model. What is no matrix in codes is in `dtype`.
    Raises what `load_model` raises."""
    if path.is_dir() and coded.is_quantised(hf := read_json(path / "config.json")):
        return _codes(path, hf, dtype)
    described = weights.describe(path)
    if not isinstance(described.model, Decoder) or described.model.task is not None:
        return None
    return _Files(described, dtype).unread()


def _codes(root: Path, hf: Mapping[str, object], dtype: torch.dtype) -> Unread | None:
    files = weights.read_headers(root)
    model = coded.describe(root, hf, files)
    if not isinstance(model, Decoder):
        return None
    maps = [Mapped(path, held) for path, held in files.items()]

    def take(part: str) -> Iterator[tuple[str, Value]]:
        yield from ((name, one.tensor(name)) for one in maps for name in one.entries if part_of(name) == part)

    def read() -> Decoder:
        made = copy.deepcopy(model)
        coded.fill(made, maps, dtype)
        return made

    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return Unread(model, list(maps), take, read)


def part_of(name: str) -> str:
    """part_of("layers.3.mlp.up_proj.weight") == "layers.3", part_of("norm.weight") == ""."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "layers" else ""


class _Files:
    """Tensors under the names of a family or of GGUF, which are not always ours one to one."""

    def __init__(self, described: weights.Described, dtype: torch.dtype) -> None:
        self.described, self.dtype = described, dtype
        self.model: Decoder = described.model.to(dtype).eval()
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self.spelled = {described.names.spelling[name]: name for name in described.names.spelling}
        files = described.opened.files.values()
        self.held = {name: one for one, entries in zip(described.opened.maps, files, strict=True) for name in entries}
        self.coded = self._coded()

    def unread(self) -> Unread:
        if self.coded:
            with blank():
                for name in {module_of(each) for each in self.coded}:
                    make = partial(self._empty, name)
                    self.model.set_submodule(name, quantized(self.model.get_submodule(name), make))
            self.model.requires_grad_(False)
        return Unread(self.model, list(self.described.opened.maps), self.take, self.read, self._note())

    def read(self) -> Decoder:
        if not self.coded:
            fresh = weights.Described(
                root=self.described.root, opened=self.described.opened, names=self.described.names,
                model=copy.deepcopy(self.model),
            )  # fmt: skip
            filled: Decoder = weights.fill(fresh, dtype=self.dtype, device="cpu")
            return filled
        made, state = copy.deepcopy(self.model), dict[str, Tensor]()
        for place in ["", *(f"layers.{index}" for index in range(self.model.config.num_layers))]:
            for name, value in self.take(place):
                if isinstance(value, Blocks):
                    state |= {f"{name}.{part}": tensor for part, tensor in recode(value).tensors().items()}
                else:
                    state[name] = value.to(self.dtype, copy=True)
            for one in self.described.opened.maps:
                one.give_back()
        made.load_state_dict(state, assign=True)
        return made.requires_grad_(False)

    def _coded(self) -> dict[str, str]:
        """Our weight -> the type of the blocks that it is kept in, for matrices that can stay codes."""
        types: dict[str, str] = {}
        for spelling, stored in self.described.names.table.items():
            value = self.held[self.spelled[spelling]].tensor(self.spelled[spelling])
            if isinstance(value, Blocks) and stored.layout in WHOLE_ROWS:
                types |= {name: value.type for name, expert in stored.parts if expert is None}
        found: dict[str, str] = {}
        for name in matrices(self.model):
            experts = isinstance(self.model.get_submodule(name), Stack)
            names = [f"{name}.{each}" for each in EXPERTS] if experts else [f"{name}.weight"]
            if all(each in types for each in names):
                found |= {each: types[each] for each in names}
        return found

    def _note(self) -> str:
        """What becomes of matrices for which there are no codes of the same values."""
        rounded = {name: type for name, type in self.coded.items() if type not in EXACT}
        said = []
        for scheme, how in ROUNDED.items():
            if types := sorted({type for type in rounded.values() if scheme_of(type) == scheme}):
                said.append(f"weights in {', '.join(types)} run as {scheme}, {how}")
        if not said:
            return ""
        before = sum(byte_size(type, self.shapes[name]) for name, type in rounded.items())
        after = sum(byte_size(SAME_SIZE[scheme_of(type)], self.shapes[name]) for name, type in rounded.items())
        return f"{self.described.root.name}: {'; '.join(said)}; {size(before)} become {size(after)}."

    def _empty(self, module: str, weight: Tensor, part: str) -> Codes:
        return empty(scheme_of(self.coded[f"{module}.{part or 'weight'}"]), tuple(weight.shape))

    def take(self, part: str) -> Iterator[tuple[str, Value]]:
        names = self.described.names
        stacks: dict[str, Tensor] = {}
        for spelling, stored in names.table.items():
            if part_of(stored.parts[0][0]) != part:
                continue
            value = self.held[self.spelled[spelling]].tensor(self.spelled[spelling])
            if stored.parts[0][0] in self.coded:
                assert isinstance(value, Blocks)
                yield from self._as_blocks(stored, value)
                continue
            for (name, expert), tensor in self._as_numbers(stored, value):
                if expert is None:
                    # Large ones stay as they lie: whoever takes them rounds them, if they have to be.
                    yield name, tensor if tensor.numel() > SMALL else tensor.to(self.dtype)
                else:
                    if name not in stacks:
                        stacks[name] = torch.empty(self.shapes[name], dtype=tensor.dtype)
                    stacks[name][expert].copy_(tensor)
        yield from stacks.items()
        if part == "":
            self._check_copies()

    def _as_blocks(self, stored: Stored, value: Blocks) -> Iterator[tuple[str, Value]]:
        if stored.layout == "pairs":
            value = value.by_row(lambda rows: LAYOUTS["pairs"][1](rows, stored.count))
        first = 0
        for name, _ in stored.parts:
            count = self.shapes[name][0]
            yield module_of(name) if name.endswith(".weight") else name, value[first : first + count]
            first += count

    def _as_numbers(self, stored: Stored, value: Value) -> Iterator[tuple[tuple[str, int | None], Tensor]]:
        whole = LAYOUTS[stored.layout][1](value.tensor() if isinstance(value, Blocks) else value, stored.count)
        counts = [self.shapes[name][0] if expert is None else self.shapes[name][1] for name, expert in stored.parts]
        yield from zip(stored.parts, torch.split(whole, counts), strict=True)

    def _check_copies(self) -> None:
        """A tied head that is stored a second time must be the same."""
        names = self.described.names
        for name, one in self.held.items():
            twin = None if names.find(name) or names.derived(name) else names.copy_of(name, self.shapes)
            if twin is None:
                continue
            (theirs,) = [key for key, stored in names.table.items() if stored.parts == ((twin, None),)]
            pair = one.tensor(name), self.held[self.spelled[theirs]].tensor(self.spelled[theirs])
            first, second = (value.tensor() if isinstance(value, Blocks) else value for value in pair)
            if not torch.equal(first.to(self.dtype), second.to(self.dtype)):
                raise ArtifactError(
                    f"tensor {name} differs from the {twin} it is tied to.", where=str(self.described.root)
                )


def module_of(weight: str) -> str:
    """module_of("lm_head.weight") == "lm_head"; of experts the stack: "…mlp.experts" of "…mlp.experts.up_proj"."""
    return weight.rpartition(".")[0]
