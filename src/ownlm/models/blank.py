"""Modules as shapes alone, before their weights are read: on the meta device, and without the time that filling them would take."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

FILLS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, torch.Tensor.normal_, torch.Tensor.uniform_)


class _Unfilled(TorchFunctionMode):
    """Random numbers for a tensor that has none yet are left out: on the meta device they are made of torch's compiler, which takes a
    second to import."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return (args[0] if args else kwargs["tensor"]) if func in FILLS else func(*args, **kwargs)


@contextmanager
def blank() -> Iterator[None]:
    """What is built inside has no memory."""
    with torch.device("meta"), _Unfilled():
        yield
