"""A loaded model with a fresh head, to be fine-tuned for another task."""

from collections.abc import Sequence
from typing import Any

import torch

from ownlm.errors import UserError
from ownlm.models.families import FAMILIES, Family, from_hf, to_hf
from ownlm.models.families.heads import headed
from ownlm.models.heads import init_normal
from ownlm.models.names import stored_tensors
from ownlm.models.specs import Problem, Task


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


def bare(name: str, family: Family) -> str:
    """What a file calls a tensor, without what begins the names of a body."""
    prefix = next((one for one in (family.prefix, family.span_prefix) if one and name.startswith(one)), "")
    return name.removeprefix(prefix)
