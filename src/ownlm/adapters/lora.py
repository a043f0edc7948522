"""LoRA (arXiv:2106.09685): what a model learns kept beside its frozen weights, small enough to have many of.

    q_proj: Linear   ─►   q_proj: Adapted ─ base: the Linear (or a QuantizedLinear)
                                          └ pairs: {"default": Pair(A, B), …}         y = base(x) + scale B (A x)
    lm_head: Linear  ─►   lm_head: Copied ─ base: the Linear
                                          └ copies: {"default": a whole Linear, …}    for heads, which are trained whole

Several adapters may hang on one base; `use_adapter` says which one speaks, for all rows of a batch or for each.

Shapes: r rank, O outputs, I inputs, D delta of a weight (O, I).
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ownlm.errors import UserError
from ownlm.quantization.codes import QuantizedLinear, linears

Choice = str | tuple[str | None, ...] | None  # an adapter, one for each row, or none


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """A pair of rank `rank` beside each linear layer that `targets` names by the end of its name, times alpha / rank
    (with `rslora` alpha / sqrt(rank), arXiv:2312.03732). "all-linear" are those of the blocks, but for stacked experts."""

    rank: int = 8
    alpha: float = 16.0
    targets: Literal["all-linear"] | tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False
    train_also: tuple[str, ...] = ()  # modules that are trained whole, such as lm_head

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError("rank starts at 1, and alpha is more than 0")
        if not self.targets:
            raise ValueError("targets names at least one layer")


class Pair(nn.Module):
    """A (r, I) and B (O, r) in fp32; what they add is computed in the dtype of x."""

    def __init__(self, A: Tensor, B: Tensor, *, alpha: float, rslora: bool) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.alpha, self.rslora = alpha, rslora

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def scale(self) -> float:
        return self.alpha / divisor(self.rank, self.rslora)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale

    def delta(self) -> Tensor:
        """(O, I), what is added to the weight."""
        return (self.B.detach().float() @ self.A.detach().float()) * self.scale


def _add_rows(y: Tensor, x: Tensor, rows: Tensor, pair: nn.Module) -> Tensor:
    """y with what the pair makes of some rows of x."""
    return y.index_add(0, rows, pair(x[rows]).to(y.dtype))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learned:
    """An adapter by itself, not hung on a model: its pairs by the name of their layer, and what was trained whole by the name of
    the parameter."""

    pairs: Mapping[str, Pair]
    whole: Mapping[str, Tensor]

    @property
    def head(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the language model's head, where it was trained whole."""
        weight = self.whole.get("lm_head.weight")
        return None if weight is None else (weight, self.whole.get("lm_head.bias"))

    @property
    def memory_bytes(self) -> int:
        pairs = sum(pair.A.nbytes + pair.B.nbytes for pair in self.pairs.values())
        return pairs + sum(tensor.nbytes for tensor in self.whole.values())

    def to(self, device: torch.device) -> "Learned":
        pairs = {name: pair.to(device).requires_grad_(False) for name, pair in self.pairs.items()}
        return Learned(pairs=pairs, whole={name: tensor.to(device) for name, tensor in self.whole.items()})


@contextmanager
def beside(model: nn.Module, chosen: Sequence[Learned | None]) -> Iterator[None]:
    """Within it row b of every batch is computed with the pairs of chosen[b]; the model itself is not changed."""
    hooks = []
    for learned in dict.fromkeys(one for one in chosen if one is not None):
        rows = torch.tensor([at for at, one in enumerate(chosen) if one is learned])
        for name, pair in learned.pairs.items():
            rows = rows.to(pair.A.device)

            def add(module: nn.Module, given: Any, y: Tensor, rows: Tensor = rows, pair: Pair = pair) -> Tensor:
                return _add_rows(y, given[0], rows, pair)

            hooks.append(model.get_submodule(name).register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def divisor(rank: int, rslora: bool) -> float:
    """What alpha is divided by."""
    return math.sqrt(rank) if rslora else rank


class Adapted(nn.Module):
    """A linear layer with pairs beside it, of which the chosen one is added."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.pairs = base, nn.ModuleDict()
        self.choice: Choice = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.choice is None:
            return y
        if isinstance(self.choice, str):
            return y + self.pairs[self.choice](x) if self.choice in self.pairs else y
        for name, pair in self.pairs.items():
            if name in self.choice:
                rows = torch.tensor([at for at, chosen in enumerate(self.choice) if chosen == name], device=x.device)
                y = _add_rows(y, x, rows, pair)
        return y


class Copied(nn.Module):
    """A module and whole copies of it, of which the chosen one computes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.copies = base, nn.ModuleDict()
        self.choice: str | None = None

    @property
    def chosen(self) -> nn.Module:
        return self.base if self.choice is None or self.choice not in self.copies else self.copies[self.choice]

    @property
    def weight(self) -> Any:
        return self.chosen.weight

    @property
    def bias(self) -> Any:
        return self.chosen.bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.chosen(*args, **kwargs)


def add_lora(model: nn.Module, lora: LoRA, *, seed: int, name: str = "default") -> tuple[str, ...]:
    """Hang a fresh adapter on the model, freeze all but it, and choose it; gives back the names of the adapted layers.

    A is uniform in ±1 / sqrt(I) and B zero, so that the model at first computes what it did before.
    Raises UserError for a target or a module to train that is not there.
    """
    layers = matching(model, lora.targets)
    copied = [leaf for end in lora.train_also for leaf in _leaves(model, end)]
    if both := [name for name in copied if name in layers]:
        raise UserError(f"{both[0]} can't be adapted and trained whole.", where="lora.train_also")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        base = base_of(model, layer)
        width: int = base.in_features
        A = (torch.rand(lora.rank, width, generator=generator) * 2 - 1) * width**-0.5
        B = torch.zeros(base.out_features, lora.rank)
        attach(model, layer, name, Pair(A, B, alpha=lora.alpha, rslora=lora.rslora))
    for leaf in copied:
        copy_module(model, leaf, name)
    train_only(model, name)
    use_adapter(model, name)
    return tuple(layers)


def use_adapter(model: nn.Module, choice: str | Sequence[str | None] | None) -> None:
    """Let this adapter speak from now on, one for each row of the batch, or None: the base alone."""
    names = [choice] if isinstance(choice, str) else [name for name in choice or () if name is not None]
    known = adapters(model)
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"there is no adapter {unknown[0]!r} on this model.", cure=f"It has: {', '.join(known)}.")
    chosen: Choice = choice if isinstance(choice, str) or choice is None else tuple(choice)
    for _, module in wrappers(model):
        if isinstance(module, Adapted) or not isinstance(chosen, tuple):
            module.choice = chosen
        elif any(name in module.copies for name in names):
            raise UserError(
                "adapters that hold whole modules can't be chosen row by row.", cure="Choose one for the batch."
            )


def merge(model: nn.Module) -> None:
    """Add the chosen adapter to the weights of the base, and take all adapters off: the model is a plain one again.

    Raises UserError when the base is quantised, whose integers can't take it, or when no single adapter is chosen.
    """
    found = list(wrappers(model))
    chosen = {module.choice for _, module in found}
    if len(chosen) != 1 or not isinstance(name := chosen.pop(), str):
        raise UserError("no one adapter is chosen that could be merged.", cure="Call use_adapter(model, name) first.")
    if any(isinstance(module.base, QuantizedLinear) for _, module in found):
        raise UserError("a quantised base can't take an adapter in.", cure="Load it unquantised and merge there.")
    with torch.no_grad():
        for _, module in found:
            if isinstance(module, Copied) and name in module.copies:
                for mine, other in zip(module.base.parameters(), module.copies[name].parameters(), strict=True):
                    mine.copy_(other)
            elif isinstance(module, Adapted) and name in module.pairs:
                pair, weight = module.pairs[name], module.base.weight
                assert isinstance(pair, Pair)
                assert isinstance(weight, Tensor)
                weight.copy_(weight.float() + pair.delta().to(weight.device))
    remove_adapters(model)


def remove_adapters(model: nn.Module) -> None:
    """Take all adapters off; the base was never changed by them."""
    for name, module in list(wrappers(model)):
        model.set_submodule(name, module.base)


def train_only(model: nn.Module, name: str) -> None:
    """Let gradients flow into this adapter and into nothing else."""
    model.requires_grad_(False)
    for _, module in wrappers(model):
        mine = module.pairs if isinstance(module, Adapted) else module.copies
        if name in mine:
            mine[name].requires_grad_(True)


def adapters(model: nn.Module) -> list[str]:
    """The names of all adapters on the model."""
    held = (module.pairs if isinstance(module, Adapted) else module.copies for _, module in wrappers(model))
    return sorted({name for names in held for name in names})


def wrappers(model: nn.Module) -> Iterator[tuple[str, Adapted | Copied]]:
    for name, module in model.named_modules():
        if isinstance(module, Adapted | Copied):
            yield name, module


def adaptable(model: nn.Module, *, everywhere: bool = True) -> list[str]:
    """The names of the layers that can carry a pair, whether they do or not."""
    names = (name.removesuffix(".base") for name in linears(model, everywhere=everywhere) if ".copies." not in name)
    return [name for name in names if not isinstance(model.get_submodule(name), Copied)]


def base_of(model: nn.Module, name: str) -> Any:
    """The layer itself, under whatever adapters."""
    module = model.get_submodule(name)
    return module.base if isinstance(module, Adapted | Copied) else module


def matching(model: nn.Module, targets: Literal["all-linear"] | tuple[str, ...]) -> list[str]:
    """The layers whose names end so. UserError names a target that no layer has."""
    known = adaptable(model, everywhere=targets != "all-linear")
    if isinstance(targets, str):
        return known
    for target in targets:
        if not any(ends(name, target) for name in known):
            ends_known = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
            stacked = any(ends(name, target) for name, _ in model.named_parameters())
            why = " as a layer of its own: the experts of this model are stacked in one tensor" if stacked else ""
            raise UserError(
                f"no linear layer is called {target!r}{why}.",
                where="lora.targets",
                cure=f"There are: {ends_known}. Other modules can be trained whole: train_also.",
            )
    return [name for name in known if any(ends(name, target) for target in targets)]


def ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def attach(model: nn.Module, layer: str, name: str, pair: Pair) -> None:
    """Put a pair beside a layer."""
    check_name(name)
    module = model.get_submodule(layer)
    if not isinstance(module, Adapted):
        module = Adapted(module)
        model.set_submodule(layer, module)
    if name in module.pairs:
        raise UserError(f"there is an adapter {name!r} on this model already.", cure="Give this one another name.")
    module.pairs[name] = pair.to(next(_tensors(module.base)).device)


def copy_module(model: nn.Module, leaf: str, name: str) -> nn.Module:
    """Put a copy beside a module and give it back."""
    check_name(name)
    module = model.get_submodule(leaf)
    if not isinstance(module, Copied):
        module = Copied(module)
        model.set_submodule(leaf, module)
    if name not in module.copies:
        module.copies[name] = copy.deepcopy(module.base)
    return module.copies[name]


def check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name) or hasattr(nn.ModuleDict, name):
        raise UserError(f"an adapter can't be called {name!r}.", cure="Use letters, digits, '_' and '-'.")


def _leaves(model: nn.Module, end: str) -> list[str]:
    """The modules with parameters of their own within those whose names end so."""
    found = []
    for name, module in model.named_modules():
        if not ends(name, end) or ".base" in name or ".copies." in name:
            continue
        for inner, leaf in [(name, module)] if isinstance(module, Copied) else module.named_modules(prefix=name):
            own = isinstance(leaf, Copied) or next(leaf.parameters(recurse=False), None) is not None
            if own and next(leaf.children(), None) is not None and not isinstance(leaf, Copied):
                raise UserError(f"{inner} has parameters beside modules of its own.", where="lora.train_also")
            found += [inner] if own else []
    if not found:
        raise UserError(f"no module with parameters is called {end!r}.", where="lora.train_also")
    return found


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
