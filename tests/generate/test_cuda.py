"""What only a GPU can do: graphs of steps, a cache as large as the GPU has room for, shards on several GPUs, products of fp8. Skipped
without one."""

import gc
from pathlib import Path

import pytest
import torch
from references import difference
from test_cache import loud_decoder, tokens

from ownlm.checkpoints.weights import load_model, save_codes, save_model
from ownlm.generate.engine import Engine
from ownlm.generate.model import Model
from ownlm.generate.opening import load
from ownlm.generate.sampling import Sampling
from ownlm.generate.static import CAPTURED_AFTER
from ownlm.generate.torch_runner import PAGE, Line, TorchRunner
from ownlm.quantization import fp8
from ownlm.quantization.calibrate import quantize_decoder
from ownlm.quantization.codes import QuantizedLinear, quantize
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
FREE = {"max_tokens": 40, "stop_ids": frozenset[int]()}


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt2", "gpt-oss", "phi3-longrope"])
@torch.inference_mode()
def test_replayed_steps_equal_those_that_run(name: str) -> None:
    """Four texts and then three of them, beyond the use at which a bucket is captured, against the modules without graphs."""
    model = loud_decoder(name).cuda()
    graphs, plain = (TorchRunner(model, pages=40, page=8, static=static) for static in (True, False))
    ids = tokens(4, 60)
    for place in range(60):
        count = 4 if place < 50 else 3
        lines = [
            Line(tokens=[int(ids[row, place])], start=place, pages=[row + 4 * page for page in range(8)], wanted=1)
            for row in range(count)
        ]
        for one, other in zip(graphs.compute(lines), plain.compute(lines), strict=True):
            assert difference(one, other) <= 1e-4
    assert graphs.steps is not None
    captured = [bucket for bucket in graphs.steps.buckets.values() if bucket.graph is not None]
    assert captured
    assert all(bucket.uses < CAPTURED_AFTER for bucket in graphs.steps.buckets.values() if bucket.graph is None)


def test_the_engine_says_the_same_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWNLM_KERNELS", "off")
    on_cpu, on_gpu = tiny_model(), tiny_model()
    on_gpu.decoder.cuda()
    prompts = ["a", "once upon a time", "x" * 40]
    assert [one.text for one in on_gpu.generate(prompts, **FREE)] == [
        one.text for one in on_cpu.generate(prompts, **FREE)
    ]
    engine = on_gpu.engine(3)
    assert (engine.device.type, engine.runner.page_tokens) == ("cuda", PAGE)
    for _ in range(2):  # the second shares the beginning that the first has read
        engine.add([65] * 70, Sampling(max_tokens=3, stop_ids=frozenset()))
        while not engine.idle:
            engine.step()
    assert engine.reused_tokens == 64


def test_the_cache_takes_its_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(context=4096, slots=10_000)
    model.decoder.cuda()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000_000, 20_000_000))
    runner = model.engine().runner
    assert isinstance(runner, TorchRunner)
    assert 0.8 * 8_500_000 < runner.cache.memory_bytes <= 8_500_000 + runner.cache.memory_bytes // runner.pages


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_shards_on_two_gpus_say_the_same_as_one(tmp_path: Path) -> None:
    tiny = tiny_model()
    save_model(tiny.decoder, tmp_path)
    tiny.tokenizer.save(tmp_path)
    whole, model = load(tmp_path, dtype=torch.float32), load(tmp_path, dtype=torch.float32, tensor_parallel=2)
    assert isinstance(whole, Model)
    assert isinstance(model, Model)
    assert difference(model.logits([[65, 66, 67]]), whole.logits([[65, 66, 67]])) <= 1e-4
    assert model.generate("the", **FREE).text == whole.generate("the", **FREE).text
    assert model.ranks is not None
    model.ranks.close()
    gc.collect()


def needs_fp8() -> None:
    if not fp8.multiplies(torch.device("cuda")):
        pytest.skip(f"needs a GPU of compute capability {'.'.join(map(str, fp8.CAPABILITY))} or more (Ada, Hopper)")


@pytest.mark.parametrize("rows", [1, 17, 300])
@pytest.mark.parametrize("columns", [256, 200])
def test_products_of_fp8_are_those_of_the_rounded_numbers(rows: int, columns: int) -> None:
    needs_fp8()
    generator = torch.Generator().manual_seed(0)
    kept, bias = quantize(torch.randn(144, columns, generator=generator), "fp8"), torch.randn(144, generator=generator)
    x = torch.randn(rows, columns, generator=generator).bfloat16()
    expected = fp8.reference(x, kept.codes, kept.scales, bias).float()
    ours = fp8.product(x.cuda(), kept.codes.cuda(), kept.scales.cuda(), bias.cuda())
    assert (ours.dtype, ours.shape) == (torch.bfloat16, (rows, 144))
    torch.testing.assert_close(ours.cpu().float(), expected, atol=0.05, rtol=0.02)


def test_a_checkpoint_in_fp8_stays_so(tmp_path: Path) -> None:
    needs_fp8()
    tiny = tiny_model()
    quantize_decoder(tiny.decoder, "fp8")
    save_codes(tiny.decoder, tmp_path)
    tiny.tokenizer.save(tmp_path)
    model = load(tmp_path)
    assert isinstance(model, Model)
    layer = model.decoder.layers[0].mlp.down_proj
    assert isinstance(layer, QuantizedLinear)
    assert (layer.codes.dtype, layer.codes.device.type) == (fp8.E4M3, "cuda")
    numbers = load_model(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        expected = numbers.logits(numbers(torch.tensor([[65, 66, 67]])))[0, -1]
    assert torch.cosine_similarity(model.logits([[65, 66, 67]])[0, -1].cpu(), expected, dim=-1) > 0.98
    assert model.generate("the", **FREE).text


def test_an_engine_needs_no_more_memory_the_longer_it_runs() -> None:
    model = tiny_model()
    model.decoder.cuda()
    engine = Engine(model.decoder, model.tokenizer, slots=8)
    used = []
    for _ in range(6):
        for length in (3, 30, 60):
            engine.add([65] * length, Sampling(max_tokens=40, stop_ids=frozenset()))
        while not engine.idle:
            engine.step()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[2]
