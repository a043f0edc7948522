"""Weights lent from their files are those that are read from them, part by part, and nothing of them stays."""

from pathlib import Path

import pytest
import torch
from block_files import WIDE, model, sized, write
from references import CONFIGS, save
from test_coded import made
from torch import Tensor

from ownlm.checkpoints.unread import Unread, open_unread
from ownlm.checkpoints.weights import load_model, save_codes, save_model
from ownlm.errors import ArtifactError
from ownlm.formats.ggml import DECODERS
from ownlm.formats.tensorfile import read_header, read_tensors, write_tensors
from ownlm.models.decoder import Decoder
from ownlm.models.encoder import Encoder
from ownlm.quantization.codes import QuantizedEmbedding, QuantizedLinear
from ownlm.quantization.recode import EXACT

IDS = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))


def opened(path: Path, dtype: torch.dtype = torch.float32) -> Unread:
    found = open_unread(path, dtype)
    assert found is not None
    return found


def parts(unread: Unread) -> list[str]:
    return ["", *(f"layers.{index}" for index in range(unread.model.config.num_layers))]


def lent(unread: Unread) -> dict[str, Tensor]:
    """Everything that is lent, as numbers; blocks under the names of weights."""
    found: dict[str, Tensor] = {}
    for part in parts(unread):
        with unread.lend(part):
            here = {name: tensor.clone() for name, tensor in unread.model.state_dict().items() if not tensor.is_meta}
            for name, module in unread.model.named_modules():
                if isinstance(module, QuantizedLinear | QuantizedEmbedding) and module.blocks is not None:
                    here[f"{name}.blocks"] = module.blocks.tensor()
        assert not found.keys() & here.keys()
        found |= here
        assert all(tensor.is_meta for tensor in unread.model.state_dict().values())
    return found


@torch.no_grad()
def logits(model: Decoder) -> Tensor:
    return model.logits(model(IDS))


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_of_every_family(name: str, tmp_path: Path) -> None:
    save(CONFIGS[name], tmp_path)
    unread = opened(tmp_path)
    wanted = load_model(tmp_path, dtype=torch.float32)
    found = lent(unread)
    assert found.keys() == wanted.state_dict().keys()
    assert all(torch.equal(found[key].float(), tensor) for key, tensor in wanted.state_dict().items())
    again = unread.read()
    assert torch.equal(logits(again), logits(wanted))
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert all(tensor.is_meta for tensor in unread.model.state_dict().values())


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "gemma3"])
def test_another_dtype_than_the_files(name: str, tmp_path: Path) -> None:
    save_model(model(name), tmp_path, dtype=torch.bfloat16)
    again = opened(tmp_path).read()
    assert again.dtype == torch.float32
    assert torch.equal(logits(again), logits(load_model(tmp_path, dtype=torch.float32)))
    half = opened(tmp_path, torch.bfloat16)
    assert half.model.dtype == half.read().dtype == torch.bfloat16
    assert torch.equal(logits(half.read()), logits(load_model(tmp_path, dtype=torch.bfloat16)))


@pytest.mark.parametrize("name", ["llama3", "mixtral", "gemma3"])
def test_codes_of_a_directory(name: str, tmp_path: Path) -> None:
    save_codes(made(name), tmp_path)
    unread = opened(tmp_path)
    wanted = load_model(tmp_path, dtype=torch.float32, codes=True)
    found = lent(unread)
    assert found.keys() == wanted.state_dict().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.state_dict().items())
    assert torch.equal(logits(unread.read()), logits(wanted))


@pytest.mark.parametrize("type", DECODERS)
def test_blocks_of_every_type(type: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", model("llama", **WIDE), lambda name: type)
    unread = opened(tmp_path / "model.gguf")
    numbers = load_model(tmp_path / "model.gguf", dtype=torch.float32)
    wanted, found = numbers.state_dict(), lent(unread)
    assert {key.replace(".blocks", ".weight") for key in found} == wanted.keys()
    assert all(torch.equal(found[key], wanted[key.replace(".blocks", ".weight")]) for key in found)
    assert sum(key.endswith(".blocks") for key in found) == 2 + 7 * 2
    apart = (logits(unread.read()) - logits(numbers)).norm() / logits(numbers).norm()
    assert apart < (1e-5 if type in EXACT else 2e-3 if type == "Q4_K" else 0.02)
    assert bool(unread.note) == (type not in EXACT)
    if type == "Q2_K":
        assert "model.gguf: weights in Q2_K run as int8" in unread.note
        assert unread.note.endswith("403 kB become 1.3 MB.")


def test_what_is_said_of_a_mixture(tmp_path: Path) -> None:
    def type_of(name: str) -> str:
        return "Q6_K" if "ffn_down" in name or name == "output.weight" else "Q5_K" if "attn_v" in name else "Q4_K"

    write(tmp_path / "mixed.gguf", model("llama", **WIDE), type_of)
    assert opened(tmp_path / "mixed.gguf").note == (
        "mixed.gguf: weights in Q4_K run as uint4, scales and minimums within 1/2048; "
        "weights in Q5_K, Q6_K run as int8, each within 1/254 of the largest of 32; 774 kB become 923 kB."
    )


@pytest.mark.parametrize("name", ["mixtral", "phi3", "gpt2", "gemma3", "gpt-oss"])
def test_experts_and_joined_matrices_stay_blocks(name: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", sized(name, WIDE), lambda name: "Q8_0")
    unread = opened(tmp_path / "model.gguf")
    numbers, found = load_model(tmp_path / "model.gguf", dtype=torch.float32), lent(unread)
    assert all(
        torch.equal(found[key], numbers.state_dict()[key.replace("proj.blocks", "proj")])
        for key in found
        if "experts" in key
    )
    assert any("experts" in key and key.endswith(".blocks") for key in found) == (name in ("mixtral", "gpt-oss"))
    assert not any("layers" in key and key.endswith("proj.weight") for key in found)
    torch.testing.assert_close(logits(unread.read()), logits(numbers), atol=1e-4, rtol=1e-4)


def test_what_is_no_decoder_is_read_at_once(tmp_path: Path) -> None:
    from encoder_references import save_encoder

    save_encoder("bert", "Model", tmp_path)
    assert open_unread(tmp_path, torch.float32) is None
    assert isinstance(load_model(tmp_path), Encoder)


def test_a_second_head_that_is_another(tmp_path: Path) -> None:
    """Told when the embedding is read, not before: the files are large."""
    save(CONFIGS["qwen3-tied"], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor, _ in read_tensors(path, read_header(path))}
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    write_tensors(path, [*tensors.items(), ("lm_head.weight", tensors[name])])
    with opened(tmp_path).lend(""):
        pass
    write_tensors(path, [*tensors.items(), ("lm_head.weight", tensors[name] + 1)])
    with (
        pytest.raises(ArtifactError, match=r"differs from the embed_tokens\.weight it is tied to"),
        opened(tmp_path).lend(""),
    ):
        pass


def test_files_may_be_deleted_or_replaced_once_they_are_open(tmp_path: Path) -> None:
    save_codes(made("llama3"), tmp_path)
    unread, wanted = opened(tmp_path), logits(load_model(tmp_path, codes=True))
    save_codes(made("llama3", "int8"), tmp_path)
    (tmp_path / "config.json").unlink()
    assert torch.equal(logits(unread.read()), wanted)
