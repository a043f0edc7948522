"""What is loaded speaks from weights that were in memory once: the kernels' own; modules come when they are asked for."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from references import CONFIGS
from torch import Tensor

from ownlm.checkpoints.weights import load_model, save_codes, save_model
from ownlm.generate.checkpoint import _multiplies_codes
from ownlm.generate.model import Model
from ownlm.generate.opening import load
from ownlm.generate.runners import NativeRunner
from ownlm.generate.torch_runner import TorchRunner
from ownlm.kernels import library
from ownlm.models.blank import blank
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.quantization import fp8
from ownlm.quantization.calibrate import matrices, quantize_decoder
from ownlm.quantization.codes import Codes, QuantizedLinear, empty, quantized
from ownlm.release.export import export
from tiny import tiny_model, tiny_tokenizer

needs_kernels = pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")
FREE: dict[str, Any] = {"max_tokens": 12, "stop_ids": frozenset()}


def saved(folder: Path, kind: str) -> Path:
    """The tiny model as numbers, as codes, or as a GGUF file."""
    model = tiny_model(seed=1)
    assert isinstance(model.decoder, Decoder)
    save_model(model.decoder, folder)
    model.tokenizer.save(folder)
    if kind == "gguf":
        export(folder, out=folder / "model.gguf", quantization="Q8_0")
        return folder / "model.gguf"
    if kind in ("codes", "fp8"):
        quantize_decoder(model.decoder, "int8" if kind == "codes" else "fp8")
        save_codes(model.decoder, folder)
    return folder


def loaded(path: Path, **fields: Any) -> Model:
    found = load(path, device="cpu", **fields)
    assert isinstance(found, Model)
    return found


@needs_kernels
@pytest.mark.parametrize("kind", ["numbers", "codes", "fp8", "gguf"])
def test_generation_leaves_the_modules_unread(kind: str, tmp_path: Path) -> None:
    model = loaded(saved(tmp_path, kind))
    first = model.generate("hello", **FREE)
    assert first == model.generate("hello", **FREE)
    assert "".join(model.stream("hello", **FREE)) == first.text
    assert (model.context, model.num_parameters) == (128, tiny_model().num_parameters)
    assert all(tensor.is_meta for tensor in model.shapes.state_dict().values())
    # Asked for, they are there, and nothing is packed again or forgotten.
    native, engine = model._native, model._engine
    decoder = model.decoder
    assert not any(tensor.is_meta for tensor in decoder.state_dict().values())
    assert decoder is model.decoder is model.shapes
    assert model.generate("hello", **FREE) == first
    assert "".join(model.stream("hello", **FREE)) == first.text
    assert model._native is native
    assert model._engine is engine
    wanted = load_model(tmp_path if kind != "gguf" else tmp_path / "model.gguf", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(ids), wanted.logits(wanted(ids)), atol=1e-4, rtol=1e-4)
    plain = Model(load_model(tmp_path, dtype=torch.float32, codes=True), model.tokenizer)
    if kind != "gguf":
        assert plain.generate("hello", **FREE).tokens == first.tokens


def test_what_a_gpu_multiplies_stays_in_codes_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which directories; what happens to them on a GPU is in test_cuda.py."""
    folders = {kind: saved(tmp_path / kind, kind) for kind in ("numbers", "codes", "fp8", "gguf")}
    for capable in (True, False):
        monkeypatch.setattr(fp8, "multiplies", lambda device, capable=capable: capable)
        kept = {kind for kind, path in folders.items() if _multiplies_codes(path, torch.device("cuda"))}
        assert kept == ({"fp8"} if capable else set())


@needs_kernels
@pytest.mark.parametrize("early", [True, False])
def test_edited_weights_are_what_speaks(early: bool, tmp_path: Path) -> None:
    """Whether the modules were looked at before the first answer or after it."""
    path = saved(tmp_path, "numbers")
    model, other = loaded(path), tiny_model(seed=2)
    wanted = other.generate("x", **FREE)
    before = None if early else model.generate("x", **FREE)
    model.decoder.load_state_dict(other.decoder.state_dict())
    assert model.generate("x", **FREE) == wanted != before
    assert "".join(model.stream("x", **FREE)) == wanted.text
    codes = loaded(saved(tmp_path, "codes"))
    before = None if early else codes.generate("x", **FREE)
    layer = codes.decoder.get_submodule("layers.0.mlp.down_proj")
    assert isinstance(layer, QuantizedLinear)
    layer.codes.neg_()
    if before is None:
        before = loaded(tmp_path).generate("x", **FREE)
    assert codes.generate("x", **FREE) != before


@needs_kernels
def test_the_files_of_a_model_that_speaks_may_be_replaced(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path, "codes"))
    first = model.generate("hello", **FREE)
    for file in tmp_path.iterdir():
        file.unlink()
    assert model.score("hello", " you")
    assert model.generate("hello", **FREE) == first


@needs_kernels
def test_without_memory_for_packed_weights_the_modules_speak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(saved(tmp_path, "codes"))
    assert isinstance(model.engine(1).runner, NativeRunner)
    again = loaded(tmp_path)
    monkeypatch.setattr("ownlm.device.free_memory_bytes", lambda *_: 0)
    assert isinstance(again.engine(1).runner, TorchRunner)
    assert again.generate("hello", **FREE).text


def test_without_kernels_it_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library", lambda: None)
    for kind in ("numbers", "codes", "gguf"):
        model = loaded(saved(tmp_path / kind, kind))
        assert not any(tensor.is_meta for tensor in model.shapes.state_dict().values())
        assert model.generate("hello", **FREE).text


MEASURE = """
import sys
from pathlib import Path
import torch
from ownlm import device
from ownlm.generate.opening import load
def ask(path):
    model = load(path, device="cpu", dtype=torch.bfloat16)
    model.generate("hello", max_tokens=2, stop_ids=frozenset())
    return model
ask(sys.argv[1])  # what is imported on the way is no memory of the weights
Path("/proc/self/clear_refs").write_text("5")  # the peak is now
before = device.peak_memory_bytes()
model = ask(sys.argv[2])
print(device.peak_memory_bytes() - before, model._native.memory_bytes)
"""
ALLOCATOR = 16 << 20  # bytes that it may keep of what is needed for one layer, however many there are
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 8, "head_dim": 64}  # fmt: skip


def by_chance(weight: Tensor, _: str) -> Codes:
    made = empty("int8", tuple(weight.shape))
    made.codes.random_(-127, 128)
    made.scales.fill_(1e-3)
    return made


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is reset as on Linux")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["codes", "numbers", "experts", "gguf"])
def test_a_model_that_speaks_is_in_memory_once(kind: str, tmp_path: Path) -> None:
    name = "mixtral" if kind == "experts" else "llama3"
    vocabulary = {"vocab_size": tiny_tokenizer().vocab_size, "max_position_embeddings": 64}
    more = {"intermediate_size": 512} if kind == "experts" else {}
    for folder, sizes in (("small", {}), ("large", LARGE | more)):
        hf = CONFIGS[name] | sizes | vocabulary
        config, family = from_hf(hf)
        with blank():
            model = family.build(config, hf)
            assert isinstance(model, Decoder)
        model = model.to_empty(device="cpu").bfloat16()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
        if kind == "codes":
            for matrix in matrices(model):
                model.set_submodule(matrix, quantized(model.get_submodule(matrix), by_chance))
            save_codes(model, tmp_path / folder)
        else:
            save_model(model, tmp_path / folder)
        tiny_tokenizer().save(tmp_path / folder)
        if kind == "gguf":
            export(tmp_path / folder, out=tmp_path / folder / "model.gguf", quantization="Q8_0")
    paths = [str(tmp_path / folder / ("model.gguf" if kind == "gguf" else "")) for folder in ("small", "large")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)
    grown, weights = map(int, done.stdout.split())
    assert 0.9 * weights < grown <= 1.15 * weights + ALLOCATOR
