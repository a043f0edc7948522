"""Directories of integers: opened as such, or as the numbers they stand for; damaged ones refused in one sentence."""

import json
from pathlib import Path

import pytest
import torch
from references import CONFIGS, make_loud
from torch import Tensor

from ownlm.adapters.lora import LoRA, add_lora
from ownlm.checkpoints.weights import load_model, save_codes, save_model
from ownlm.errors import ArtifactError
from ownlm.formats.ggml import Blocks
from ownlm.formats.tensorfile import read_header, read_tensors, write_tensors
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.quantization.calibrate import quantize_decoder
from ownlm.quantization.codes import QuantizedLinear, Scheme
from ownlm.quantization.recode import from_blocks

DECODERS = ["gpt2", "llama3", "qwen3-tied", "mixtral", "phi2", "gemma3", "gpt-oss"]
IDS = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))


def made(name: str, to: Scheme = "int4") -> Decoder:
    config, family = from_hf(CONFIGS[name])
    model = family.build(config, CONFIGS[name])
    make_loud(model)
    assert isinstance(model, Decoder)
    quantize_decoder(model.eval(), to)
    return model


@torch.no_grad()
def logits(model: Decoder) -> Tensor:
    return model.logits(model(IDS))


@pytest.mark.parametrize("to", ["int8", "int4", "uint4", "fp8"])
@pytest.mark.parametrize("name", DECODERS)
def test_what_is_opened_computes_what_was_saved(name: str, to: Scheme, tmp_path: Path) -> None:
    model = made(name, to)
    save_codes(model, tmp_path, eos_token_id=[1, 2])
    kept, numbers = load_model(tmp_path, codes=True), load_model(tmp_path)
    assert torch.equal(logits(kept), logits(model))
    torch.testing.assert_close(logits(numbers), logits(model), atol=1e-5, rtol=1e-5)
    assert numbers.config == kept.config == model.config
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    assert all(parameter.requires_grad for parameter in numbers.parameters())
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.bfloat16, codes=True).dtype == torch.bfloat16


def test_numbers_can_be_saved_and_trained_as_any_checkpoint(tmp_path: Path) -> None:
    save_codes(made("llama3"), tmp_path / "codes")
    numbers = load_model(tmp_path / "codes")
    save_model(numbers, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(load_model(tmp_path / "plain")), logits(numbers))
    adapted = load_model(tmp_path / "codes", codes=True)
    add_lora(adapted, LoRA(), seed=0)
    torch.testing.assert_close(logits(adapted), logits(numbers), atol=1e-5, rtol=1e-5)
    adapted.logits(adapted(IDS)).sum().backward()
    assert any(parameter.grad is not None for parameter in adapted.parameters())


def test_codes_are_mapped_not_copied(tmp_path: Path) -> None:
    save_codes(made("llama3"), tmp_path)
    model = load_model(tmp_path, codes=True)
    layer = model.layers[0].mlp.down_proj
    assert isinstance(layer, QuantizedLinear)
    entry = read_header(tmp_path / "model.safetensors")["layers.0.mlp.down_proj.codes"]
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system doesn't tell what is mapped where")
    for line in maps.read_text().splitlines():
        if line.endswith(str(tmp_path / "model.safetensors")):
            first, last = (int(number, 16) for number in line.split()[0].split("-"))
            if first <= layer.codes.data_ptr() < last:
                assert layer.codes.data_ptr() - first == entry.start
                return
    raise AssertionError("the codes lie outside of the mapped file")


def rewritten(folder: Path, change: dict[str, Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor, _ in read_tensors(path, read_header(path))} | change
    write_tensors(path, [(name, tensor) for name, tensor in tensors.items() if tensor is not None])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layers.0.mlp.up_proj.scales": None}, "tensor layers.0.mlp.up_proj.scales is missing"),
        ({"layers.0.mlp.up_proj.codes": None}, "tensor layers.0.mlp.up_proj.codes is missing"),
        ({"layers.0.mlp.gate.codes": torch.zeros(2, 32, dtype=torch.int8)}, "layers.0.mlp.gate.codes is unexpected"),
        ({"lm_head.scales": torch.zeros(97, 3).half()}, "lm_head.scales has shape (97, 3), the config asks for (97,"),
        ({"lm_head.scales": torch.zeros(97, 1)}, "lm_head.scales holds torch.float32"),
        ({"lm_head.codes": torch.zeros(97, 32)}, "lm_head.codes"),
        ({"norm.weight": torch.zeros(32, dtype=torch.int32)}, "norm.weight holds torch.int32"),
    ],
)
def test_a_damaged_file_is_one_sentence(change: dict[str, Tensor | None], sentence: str, tmp_path: Path) -> None:
    save_codes(made("llama"), tmp_path)
    rewritten(tmp_path, change)
    for codes in (True, False):
        with pytest.raises(ArtifactError) as fault:
            load_model(tmp_path, codes=codes)
        assert sentence in str(fault.value)


def test_another_format_is_refused(tmp_path: Path) -> None:
    save_codes(made("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["group"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="another format"):
        load_model(tmp_path)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_blocks_of_ggml_become_the_same_values(type: str) -> None:
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)).numpy()
    raw = torch.from_numpy(gguf.quants.quantize(weight, getattr(gguf.GGMLQuantizationType, type)))
    assert torch.equal(from_blocks(type, raw, (6, 96)).tensor(), Blocks(type, raw, (6, 96)).tensor())  # type: ignore[arg-type]
