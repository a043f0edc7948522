"""Adapters on disk as PEFT lays them out, so that either library loads what the other trained.

    adapter_config.json          rank, alpha, which modules; only plain LoRA is taken
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, I), .lora_B.weight (O, r); whole modules
    head.json                    of an adapter that brings a head: its task and labels, as config.json tells them. PEFT has no such
                                 file: its users name the class and the number of labels themselves

Modules carry the names of the family's checkpoint files. Where a file has q, k and v in one tensor (GPT-2's c_attn, Phi-3's
qkv_proj), one stored pair is three of ours: they share A, and B is split by rows. The other way round, pairs of ours that
don't share their A become one pair of higher rank with a block-diagonal B: exactly the same function.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ownlm.adapters.lora import (
    Adapted,
    Learned,
    Pair,
    adaptable,
    adapters,
    attach,
    check_name,
    copy_module,
    divisor,
    ends,
    use_adapter,
    wrappers,
)
from ownlm.errors import ArtifactError, UserError
from ownlm.formats.settings import read_json, write_json
from ownlm.formats.tensorfile import Entry, read_header, read_tensors, write_tensors
from ownlm.models.blank import blank
from ownlm.models.decoder import Decoder
from ownlm.models.families import FAMILIES, to_hf
from ownlm.models.families.heads import TOLD
from ownlm.models.names import LAYOUTS, Stored, stored_tensors
from ownlm.models.specs import Task

CONFIG, TENSORS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.json"
PREFIX = "base_model.model."
# Layouts that leave the rows of a linear layer whole. PEFT keeps B as (O, r) where the weight is stored transposed.
LINEAR = ("same", "transposed", "by_head", "pairs")
_VIT = (
    (r"encoder\.layer\.", "layers."), (r"attention\.attention\.(q|k|v)(uery|ey|alue)", r"attention.\1_proj"),
    (r"attention\.output\.dense", "attention.o_proj"), (r"intermediate\.dense", "mlp.fc1"), (r"\.output\.dense", ".mlp.fc2"),
)  # fmt: skip
_LLAVA = (
    (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."), (r"vision_tower\.vision_model\.", "vision_tower."),
)  # fmt: skip
# PEFT goes by transformers' modules. What they are called in memory where that isn't as in the files, by class.
MODULES: dict[str, tuple[tuple[str, str], ...]] = {
    "GPTNeoXForCausalLM": ((r"^embed_out\.", "lm_head."),),
    "ViTModel": ((r"^vit\.", ""), *_VIT),
    "ViTForImageClassification": _VIT,
    "CLIPTextModel": ((r"^text_model\.", ""),),
    "CLIPVisionModel": ((r"^vision_model\.", ""),),
    "LlavaForConditionalGeneration": _LLAVA,
    "Mistral3ForConditionalGeneration": _LLAVA,
}
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip  # of no consequence for what a finished adapter computes
READ = {"peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
TASK_TYPES: dict[str, Task] = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token", "QUESTION_ANS": "span"}
# The other initialisations (pissa, olora, …) leave an adapter to a base whose weights were changed.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


class Names:
    """The stored names of a model: of every tensor, and of those that belong to layers that can carry a pair."""

    def __init__(self, model: Any) -> None:
        hf = model.hf or to_hf(model.config)
        self.family = FAMILIES[hf["model_type"]]
        with blank():
            bare = self.family.build(model.config, model.hf)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in bare.named_parameters()}
        table = stored_tensors(self.family.names(model.config), dict(bare.named_parameters()))
        kind = (hf.get("architectures") or [self.family.architecture])[0]
        self.renames = MODULES.get(kind, ())
        self.all = {self._in_memory(stored.name): stored for stored in table}
        carrying = {f"{layer}.weight" for layer in adaptable(model)}
        self.layers = {
            name.removesuffix(".weight"): stored
            for name, stored in self.all.items()
            if name.endswith(".weight") and stored.layout in LINEAR and {part for part, _ in stored.parts} <= carrying
        }

    def named(self, name: str, among: Mapping[str, Stored]) -> Stored | None:
        """What this name means, also where the file or the model is the bare one without its head."""
        prefix = self.family.prefix
        for spelling in (name, self._in_memory(name)):
            for full in (spelling, prefix + spelling, spelling.removeprefix(prefix)):
                if full in among:
                    return among[full]
        return None

    def _in_memory(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


def save_adapter(model: Any, directory: Path | str, *, name: str = "default", base: str = "") -> None:
    """Write one adapter of the model. `base` is what the config will name as its base model.

    Raises UserError for layers that PEFT has no names for.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    if name not in adapters(model):
        raise UserError(f"there is no adapter {name!r} on this model.", where=str(root))
    names = Names(model)
    pairs: dict[str, Pair] = {}
    whole: dict[str, Tensor] = {}
    for layer, module in wrappers(model):
        if isinstance(module, Adapted):
            pairs |= {layer: cast(Pair, module.pairs[name])} if name in module.pairs else {}
        elif name in module.copies:
            whole |= {f"{layer}.{key}": value for key, value in module.copies[name].named_parameters()}
    rslora = any(pair.rslora for pair in pairs.values())
    tensors: dict[str, Tensor] = {}
    scaling: dict[str, tuple[int, float]] = {}
    for module_name, stored in names.layers.items():
        layers = [part.removesuffix(".weight") for part, _ in stored.parts]
        parts = [pairs.pop(layer, None) for layer in layers]
        if any(part is not None for part in parts):
            A, B, alpha = _joined(parts, [names.shapes[part][0] for part, _ in stored.parts])
            tensors[f"{PREFIX}{module_name}.lora_A.weight"] = A
            tensors[f"{PREFIX}{module_name}.lora_B.weight"] = _laid_out(B, stored, to_ours=False)
            scaling[module_name] = len(A), alpha
    saved = {key: stored for key, stored in names.all.items() if any(part in whole for part, _ in stored.parts)}
    lost = [*pairs, *(part for part in whole if not any((part, None) in one.parts for one in saved.values()))]
    if lost:
        raise UserError(f"PEFT's format has no name for an adapter of {lost[0]}.", where=str(root))
    for key, stored in saved.items():
        tensors[PREFIX + key] = stored.pack(whole)
    write_tensors(root / TENSORS, tensors.items())
    write_json(root / CONFIG, _config(model, names, scaling, rslora, list(saved), base))
    if any(part.startswith("head.") for part in whole):
        hf = model.hf or to_hf(model.config)
        write_json(root / HEAD, {key: hf[key] for key in ("architectures", *TOLD) if key in hf})


def load_adapter(model: Any, directory: Path | str, *, name: str = "default") -> None:
    """Hang an adapter in PEFT's format on the model and choose it. The base stays as it is. Raises what `read_adapter` does."""
    check_name(name)
    learned = read_adapter(model, directory)
    for layer, pair in learned.pairs.items():
        attach(model, layer, name, pair)
    with torch.no_grad():
        for key, tensor in learned.whole.items():
            module, _, parameter = key.rpartition(".")
            getattr(copy_module(model, module, name), parameter).copy_(tensor)
    use_adapter(model, name)


def read_adapter(model: Any, directory: Path | str) -> Learned:
    """An adapter in PEFT's format, for a model that isn't touched. In float32, on the CPU.

    Raises NotFound, UserError (a kind of adapter or an option we don't compute, by name) and ArtifactError (damaged
    file; tensors that don't fit the model).
    """
    root = Path(directory)
    config = read_config(root)
    entries = read_header(root / TENSORS)
    names = Names(model)
    found: dict[str, dict[str, str]] = {}  # module -> "A" or "B" -> its key in the file
    whole: dict[str, Stored] = {}
    faults = []
    for key, entry in entries.items():
        inner = key.removeprefix(PREFIX)
        module, _, end = inner.rpartition(".lora_")
        if key == inner or not entry.dtype.is_floating_point:
            faults.append(f"tensor {key} is not an adapter's")
        elif end in ("A.weight", "B.weight"):
            found.setdefault(module, {})[end[0]] = key
        elif not module and (stored := names.named(inner, names.all)) is not None:
            whole[key] = stored
            shape = stored.shape({part: torch.empty(names.shapes[part], device="meta") for part, _ in stored.parts})
            if entry.shape != shape:
                faults.append(f"tensor {key} has shape {entry.shape}, the model asks for {shape}")
        else:
            faults.append(f"tensor {key} is unexpected: the model has nothing of that name")
    for module, keys in found.items():
        faults += _faults(module, keys, entries, names, config)
    faults += [f"{module} is among target_modules, but not in the file" for module in _missing(config, found, names)]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise ArtifactError("; ".join(faults[:5]) + more + ".", where=str(root))
    tensors = {key: tensor.to(torch.float32, copy=True) for key, tensor, _ in read_tensors(root / TENSORS, entries)}
    pairs: dict[str, Pair] = {}
    for module, keys in found.items():
        stored = cast(Stored, names.named(module, names.layers))
        A, B = tensors[keys["A"]], _laid_out(tensors[keys["B"]], stored, to_ours=True)
        sizes = [names.shapes[part][0] for part, _ in stored.parts]
        alpha = float(_pattern(config, "alpha_pattern", module, "lora_alpha"))
        for (part, _), rows in zip(stored.parts, torch.split(B, sizes), strict=True):
            pair = Pair(A.clone(), rows.clone(), alpha=alpha, rslora=bool(config.get("use_rslora")))
            pairs[part.removesuffix(".weight")] = pair
    parameters: dict[str, Tensor] = {}
    for key, stored in whole.items():
        for part, index in stored.parts:
            if part not in parameters:
                # Of stacked experts the file may hold some only; the others stay as they are.
                own = torch.empty(names.shapes[part]) if index is None else model.get_parameter(part).detach()
                parameters[part] = own.to("cpu", torch.float32, copy=True)
        stored.place(tensors[key], parameters)
    return Learned(pairs=pairs, whole=parameters)


def read_config(root: Path) -> dict[str, Any]:
    """adapter_config.json, with nothing in it that we wouldn't compute. UserError names every such option."""
    config = read_json(root / CONFIG)
    where = str(root / CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"peft_type {kind!r} can't be loaded.", where=where, cure="ownlm reads LORA.")
    faults = [f"{key} = {value!r}" for key, value in config.items() if key not in IGNORED | READ and value]
    if config.get("bias", "none") != "none":
        faults.append(f"bias = {config['bias']!r}")
    if (start := config.get("init_lora_weights", True)) not in INITIALISATIONS:
        faults.append(f"init_lora_weights = {start!r}")
    if faults:
        raise UserError(f"{', '.join(faults)}: not supported.", where=where, cure="ownlm reads plain LoRA.")
    for key, table, least in (("r", "rank_pattern", 1), ("lora_alpha", "alpha_pattern", 0)):
        for value in (config.get(key), *_table(config, table).values()):
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e6:
                raise UserError(f"{key} can't be {value!r}.", where=where)
    return config


def _config(
    model: Any,
    names: Names,
    scaling: Mapping[str, tuple[int, float]],
    rslora: bool,
    saved: Sequence[str],
    base: str,
) -> dict[str, Any]:
    (rank, alpha), _ = Counter(scaling.values() or [(1, 1.0)]).most_common(1)[0]
    targets = sorted({module.rpartition(".")[2] for module in scaling})
    # Ends of names suffice where they hit nothing else.
    hit = {name.removesuffix(".weight") for name in names.all}
    every = {module for module in hit if any(ends(module, target) for target in targets)}
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model, saved),
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "use_rslora": rslora,
        "target_modules": targets if every == set(scaling) else sorted(scaling),
        "rank_pattern": {module: r for module, (r, _) in scaling.items() if r != rank},
        "alpha_pattern": {module: _whole(a) for module, (_, a) in scaling.items() if a != alpha},
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}) or None,
        "bias": "none",
        "fan_in_fan_out": any(names.layers[module].layout == "transposed" for module in scaling),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _task_type(model: Any, saved: Sequence[str]) -> str | None:
    """PEFT's word for what the model is for. It adds a head to train for those that have labels, so only if there is one."""
    if isinstance(model, Decoder) and model.task is None:
        return "CAUSAL_LM"
    return next((theirs for theirs, ours in TASK_TYPES.items() if saved and ours == model.task), None)


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _joined(pairs: Sequence[Pair | None], rows: Sequence[int]) -> tuple[Tensor, Tensor, float]:
    """One pair (A, B, alpha) that computes all of `pairs` on the same x, their outputs of `rows` side by side."""
    present = [pair for pair in pairs if pair is not None]
    first = present[0]
    if all(pair.alpha == first.alpha and torch.equal(pair.A, first.A) for pair in present):
        zeros = [first.B.new_zeros(count, first.rank) for count in rows]
        blocks = [zero if pair is None else pair.B for pair, zero in zip(pairs, zeros, strict=True)]
        return first.A.detach(), torch.cat(blocks).detach(), first.alpha
    A = torch.cat([pair.A for pair in present])
    blocks = [
        torch.zeros(count, 0, device=A.device) if pair is None else pair.B * (pair.scale / first.scale)
        for pair, count in zip(pairs, rows, strict=True)
    ]
    B: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    alpha = first.alpha * (divisor(len(A), first.rslora) / divisor(first.rank, first.rslora))
    return A.detach(), B.detach(), alpha


def _laid_out(B: Tensor, stored: Stored, *, to_ours: bool) -> Tensor:
    """The rows of B in the order of the stored tensor, or from it in ours."""
    return B if stored.layout == "transposed" else LAYOUTS[stored.layout][to_ours](B, stored.count)


def _faults(
    module: str, keys: Mapping[str, str], entries: Mapping[str, Entry], names: Names, config: Mapping[str, Any]
) -> list[str]:
    """What is wrong with one pair."""
    stored = names.named(module, names.layers)
    if stored is None:
        return [f"{module} is no linear layer of this model that could be adapted"]
    if keys.keys() != {"A", "B"}:
        return [f"{module} has only one of lora_A and lora_B"]
    inputs = names.shapes[stored.parts[0][0]][1]
    outputs = sum(names.shapes[part][0] for part, _ in stored.parts)
    rank = _pattern(config, "rank_pattern", module, "r")
    held, wanted = [entries[keys[side]].shape for side in "AB"], [(rank, inputs), (outputs, rank)]
    return [f"{module} has a pair of shapes {held} instead of {wanted}"] if held != wanted else []


def _missing(config: Mapping[str, Any], found: Mapping[str, Any], names: Names) -> list[str]:
    """Layers that the config names as targets and the file leaves out; patterns and choices of layers are not followed."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return []
    held = {names.named(module, names.layers) for module in found}
    return [
        module
        for module, stored in names.layers.items()
        if stored not in held and any(ends(module, str(target)) for target in targets)
    ]


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{key} is not a table.", where=CONFIG)
    return value


def _pattern(config: Mapping[str, Any], table: str, module: str, otherwise: str) -> Any:
    """The value of the first key that the module's name ends in. PEFT takes keys for regular expressions; names are ones."""
    for key, value in _table(config, table).items():
        if ends(module, key.removeprefix("^").replace("\\.", ".")):
            return value
    return config[otherwise]
