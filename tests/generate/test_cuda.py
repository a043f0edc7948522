"""What only a GPU can do: graphs of steps, a cache as large as the GPU has room for, shards on several GPUs. Skipped without one."""

import gc
from pathlib import Path

import pytest
import torch
from references import difference
from test_cache import loud_decoder, tokens

from ownlm.checkpoints.weights import save_model
from ownlm.generate.engine import Engine
from ownlm.generate.model import Model
from ownlm.generate.opening import load
from ownlm.generate.sampling import Sampling
from ownlm.generate.static import CAPTURED_AFTER
from ownlm.generate.torch_runner import PAGE, Line, TorchRunner
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
