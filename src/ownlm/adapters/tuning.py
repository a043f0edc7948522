"""A loaded model with another head: a fresh one, to be fine-tuned for another task, or the one that an adapter brings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ownlm.adapters import peft
from ownlm.errors import UserError
from ownlm.formats.settings import read_json
from ownlm.formats.tensorfile import read_header
from ownlm.models.families import FAMILIES, Family, from_hf, to_hf
from ownlm.models.families.heads import TOLD, headed
from ownlm.models.names import stored_tensors
from ownlm.models.specs import Head, Problem, Task


def with_head(
    model: Any, task: Task | None, labels: Sequence[str] = (), *, problem: Problem = "single", seed: int = 0
) -> Any:
    """A copy of a model with a new last layer for `task`, its labels in order of the logits; None: without a head.

    All that files of both models call by the same name is kept: the body, and what stands before the last layer (BERT's
    pooler). `transformers` makes its heads by the same rule. The rest begins as BERT did. UserError: the family has no such head.
    """
    hf = model.hf or to_hf(model.config)
    family = FAMILIES[hf["model_type"]]
    new_hf = headed(hf, family.architecture, task, tuple(labels), problem)
    config, _ = from_hf(new_hf)
    if (config.head and config.head.task) != task:
        raise UserError(f"{hf['model_type']} models have no head for the task {task}.", where="task")
    weight = next(model.parameters())
    new = family.build(config, new_hf).to(weight.device, weight.dtype)
    old, ours = dict(model.named_parameters()), dict(new.named_parameters())
    held = {bare(stored.name, family): stored for stored in stored_tensors(family.names(model.config), old)}
    fresh = dict(ours)
    with torch.no_grad():
        for stored in stored_tensors(family.names(config), ours):
            source = held.get(bare(stored.name, family))
            if source is not None and not stored.parts[0][0].startswith("head.out."):
                stored.place(source.pack(old), ours)
                for name, _ in stored.parts:
                    fresh.pop(name, None)
    assert all(name.startswith(("head.", "pooler.")) for name in fresh), sorted(fresh)
    init_normal(fresh.items(), seed=seed)
    return new.eval()


def with_head_of(model: Any, folder: Path) -> Any:
    """The model with the head that the adapter in this folder brings, for its weights to go into: as head.json tells, else as PEFT's
    task type and the shape of the last layer do. The model itself where it has that head, or the adapter brings none."""
    hf = model.hf or to_hf(model.config)
    if (folder / peft.HEAD).is_file():
        told = {key: value for key, value in read_json(folder / peft.HEAD).items() if key in ("architectures", *TOLD)}
        plain = {key: value for key, value in hf.items() if key not in TOLD}
        head = from_hf(plain | told, where=str(folder / peft.HEAD))[0].head
    else:
        head = _untold(model, folder, hf)
    if head is None or head == model.config.head:
        return model
    return with_head(model, head.task, head.labels, problem=head.problem)


def _untold(model: Any, folder: Path, hf: Mapping[str, Any]) -> Head | None:
    """The head of an adapter from elsewhere: its labels are the model's own if they are as many, else LABEL_0 and so on."""
    task = peft.TASK_TYPES.get(str(peft.read_config(folder).get("task_type")))
    if task is None:
        return None
    family, label = FAMILIES[hf["model_type"]], () if task == "span" else ("LABEL_0",)
    config, _ = from_hf(headed(hf, family.architecture, task, label, "single"))
    if config.head is None:
        return None  # `load_adapter` tells which tensors have no place
    with torch.device("meta"):
        ours = dict(family.build(config, None).named_parameters())
    stored = next(one for one in stored_tensors(family.names(config), ours) if one.parts[0][0] == "head.out.weight")
    ends = (bare(stored.name, family), stored.name)
    entries = read_header(folder / peft.TENSORS).items()
    rows = [entry.shape[0] for key, entry in entries if key.removeprefix(peft.PREFIX) in ends and entry.shape]
    held: Head | None = model.config.head
    if not rows or (held is not None and held.task == task and len(held.labels) in (rows[0], 0)):
        return held
    fresh: Head = config.head
    return replace(fresh, labels=() if task == "span" else tuple(f"LABEL_{index}" for index in range(rows[0])))


def init_normal(parameters: Iterable[tuple[str, nn.Parameter]], *, seed: int = 0, std: float = 0.02) -> None:
    """Fresh weights as BERT's began: matrices normal with `std`, norms one, biases zero (arXiv:1810.04805)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def bare(name: str, family: Family) -> str:
    """What a file calls a tensor, without what begins the names of a body."""
    prefix = next((one for one in (family.prefix, family.span_prefix) if one and name.startswith(one)), "")
    return name.removeprefix(prefix)
