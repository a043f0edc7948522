"""Adapters that PEFT trained, here; and ours, there: max|Δlogits| between the two libraries in fp32, on loud random weights.

    python benchmarks/peft_parity.py [--environment FOLDER]

PEFT is no dependency of ownlm, so a virtual environment is made for it (some minutes; kept when FOLDER is named). For
each shape: an adapter of PEFT is loaded by ownlm, saved again and loaded by PEFT, which must find the same tensors; and
one trained a few steps by ownlm is loaded by PEFT. Exits with 1 if any difference is above 1e-5 of the largest logit.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NEEDS = ("peft==0.21.2", "transformers>=5.20,<6")
BAR = 1e-5
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT: dict[str, Any] = SIZES | {"num_labels": 97}
NEOX = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "pad_token_id")}
# name -> (config, options of PEFT's LoraConfig, targets of ours)
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "llama, q and v": ({"model_type": "llama", **SIZES}, {"target_modules": ["q_proj", "v_proj"]}, ("q_proj", "v_proj")),
    "llama, all-linear, rsLoRA, head": (
        {"model_type": "llama", **SIZES},
        {"target_modules": "all-linear", "use_rslora": True, "modules_to_save": ["lm_head"], "rank_pattern": {"down_proj": 7},
         "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
        "all-linear",
    ),
    "gpt2, fused c_attn": (
        {"model_type": "gpt2", **GPT2}, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, ("q_proj", "v_proj")
    ),
    "gpt2, all-linear": (
        {"model_type": "gpt2", **GPT2}, {"target_modules": "all-linear", "fan_in_fan_out": True}, "all-linear"
    ),
    "phi3, fused qkv and gate_up": (
        {"model_type": "phi3", **SIZES}, {"target_modules": ["qkv_proj", "gate_up_proj"]}, ("q_proj", "up_proj")
    ),
    "gpt_neox, by head": (
        {"model_type": "gpt_neox", **NEOX}, {"target_modules": ["query_key_value", "dense"]}, ("k_proj", "o_proj")
    ),
    "bert, token classification, head": (
        {"model_type": "bert", **BERT}, {"target_modules": ["query", "value"], "task_type": "TOKEN_CLS"}, ("q_proj", "up_proj")
    ),
    "bert, all layers, head": (
        {"model_type": "bert", **BERT}, {"target_modules": ["query", "key", "value", "dense"], "task_type": "TOKEN_CLS"}, "all-linear"
    ),
}  # fmt: skip


def compare(name: str, root: Path) -> list[float]:
    """The differences of one shape, each in units of max(1, max|reference|)."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    from ownlm.adapters.lora import LoRA, add_lora, merge
    from ownlm.adapters.peft import TENSORS, load_adapter, save_adapter
    from ownlm.checkpoints.weights import load_model

    config, options, targets = SHAPES[name]
    bert = config["model_type"] == "bert"
    auto = AutoModelForTokenClassification if bert else AutoModelForCausalLM
    torch.manual_seed(0)
    ids = torch.randint(3, 97, (3, 40))

    def loud(module: Any, keep: Callable[[str], bool] = lambda name: True) -> Any:
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if keep(key):
                    norm = parameter.ndim == 1 and key.endswith("weight")
                    parameter.copy_(torch.randn(parameter.shape) * 0.2 + norm)
        return module.eval()

    def base() -> Any:
        return auto.from_pretrained(root / "base").eval()

    def logits_of(ours: Any) -> Any:
        return (ours.head if bert else ours.logits)(ours(ids))

    def difference(ours: Any, reference: Any) -> float:
        with torch.no_grad():
            mine, theirs = logits_of(ours), reference(ids).logits
        return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1))

    loud(auto.from_config(AutoConfig.for_model(**config)).float()).save_pretrained(root / "base")
    lora = LoraConfig(r=4, lora_alpha=8, **{"task_type": "CAUSAL_LM"} | options)
    theirs = loud(get_peft_model(base(), lora), lambda key: "lora_" in key or "modules_to_save.default" in key)
    theirs.save_pretrained(root / "theirs")
    ours = load_model(root / "base")
    load_adapter(ours, root / "theirs")
    found = [difference(ours, theirs)]
    save_adapter(ours, root / "again")
    first, second = load_file(root / "theirs" / "adapter_model.safetensors"), load_file(root / "again" / TENSORS)
    assert first.keys() == second.keys(), "a tensor was lost on the way"
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items()), "a tensor was changed"
    found.append(difference(ours, PeftModel.from_pretrained(base(), root / "again").eval()))

    ours = load_model(root / "base")
    heads = ("head",) if bert else () if ours.lm_head is None else ("lm_head",)
    add_lora(ours, LoRA(rank=3, targets=targets, train_also=heads), seed=1)
    before = logits_of(ours).detach()
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits_of(ours)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    assert (logits_of(ours) - before).abs().max() > 0.1, "nothing was learned"
    save_adapter(ours, root / "trained")
    there = PeftModel.from_pretrained(base(), root / "trained").eval()
    found.append(difference(ours, there))
    merge(ours)
    found.append(difference(ours, there.merge_and_unload()))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=None)
    options = parser.parse_args()
    if importlib.util.find_spec("peft") is None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.environment or Path(temporary)
            python = folder / "bin" / "python"
            if not python.exists():
                venv.create(folder, with_pip=True)
                subprocess.run([python, "-m", "pip", "install", "-q", str(ROOT), *NEEDS], check=True)
            return subprocess.run([python, __file__], env=os.environ | {"PYTHONPATH": str(ROOT / "src")}).returncode
    worst = 0.0
    print("max|Δlogits| / max(1, max|logits|)    PEFT -> ownlm   -> PEFT   ownlm -> PEFT   both merged")
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as root:
            found = compare(name, Path(root))
        print(f"{name:36}  {found[0]:13.1e}  {found[1]:8.1e}  {found[2]:14.1e}  {found[3]:12.1e}")
        worst = max(worst, *found)
    print(f"worst {worst:.1e}, bar {BAR:.0e}")
    return worst > BAR


if __name__ == "__main__":
    sys.exit(main())
