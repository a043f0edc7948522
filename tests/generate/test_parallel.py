"""A model split over two processes says what the whole one says; and when one of them ends, there is one error and nothing is left."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from references import CONFIGS, difference

from ownlm.checkpoints.weights import save_model
from ownlm.cli import main
from ownlm.errors import UserError
from ownlm.generate import parallel
from ownlm.generate.model import Model
from ownlm.generate.opening import load
from ownlm.generate.parallel import RankLost
from ownlm.generate.sampling import Sampling
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from tiny import tiny_model, tiny_tokenizer

PROMPTS = ["once upon a time", "the village", "x" * 40, "né à Zürich"]
FREE = {"max_tokens": 12, "stop_ids": frozenset[int]()}


def saved(name: str, path: Path) -> Path:
    """A checkpoint of a family with loud weights and one token per byte."""
    tokenizer = tiny_tokenizer()
    hf = {**CONFIGS[name], "vocab_size": tokenizer.vocab_size, "tie_word_embeddings": name == "gpt2"}
    model = Decoder(from_hf(hf)[0], hf)
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and key.endswith("norm.weight")
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + norm)
    save_model(model, path)
    tokenizer.save(path)
    return path


def split(path: Path, dtype: torch.dtype | None = None) -> Model:
    model = load(path, tensor_parallel=2, dtype=dtype)
    assert isinstance(model, Model)
    return model


def end(model: Model) -> None:
    """Let its processes go before another test wants to split a model."""
    assert model.ranks is not None
    model.ranks.close()
    assert [process.returncode for process in model.ranks.processes] == [0] * len(model.ranks.processes)


@pytest.mark.parametrize(
    "name", ["llama3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "mixtral", "gpt2"))]
)
def test_a_split_model_is_the_whole_one(name: str, tmp_path: Path) -> None:
    whole = load(saved(name, tmp_path))
    assert isinstance(whole, Model)
    model = split(tmp_path)
    ids = torch.randint(0, 200, (3, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(60) < torch.tensor([[60], [9], [33]])
    for given in (None, mask, mask.flip(1)):  # whole rows; padding on the right, and on the left
        seen = torch.ones_like(mask) if given is None else given
        assert difference(model.logits(ids, given)[seen], whole.logits(ids, given)[seen]) <= 1e-5
    assert model.scores([("the", " mill"), ("a", "b")]) == [
        pytest.approx(score, abs=1e-4) for score in whole.scores([("the", " mill"), ("a", "b")])
    ]
    # Two engines at once, each with its own cache on every rank: one in the middle of an answer while the other writes four.
    stream = model.stream(PROMPTS[1], **FREE)
    began = next(stream)
    assert [one.text for one in model.generate(PROMPTS, **FREE)] == [
        one.text for one in whole.generate(PROMPTS, **FREE)
    ]
    assert began + "".join(stream) == whole.generate(PROMPTS[1], **FREE).text
    assert model.num_parameters == whole.num_parameters
    end(model)


def test_sampled_text_and_bfloat16(tmp_path: Path) -> None:
    tiny = tiny_model()
    save_model(tiny.decoder, tmp_path)
    tiny.tokenizer.save(tmp_path)
    model = split(tmp_path, torch.bfloat16)
    sampling = {**FREE, "temperature": 0.8, "seed": 5}
    assert model.generate(PROMPTS[0], **sampling).text == model.generate(PROMPTS[0], **sampling).text
    whole = load(tmp_path, dtype=torch.bfloat16)
    assert isinstance(whole, Model)
    ids = [[65, 66, 67, 68, 69]]
    assert difference(model.logits(ids), whole.logits(ids)) <= 0.05
    end(model)


def test_a_process_that_is_killed_is_one_error_at_once_and_ends_the_others(tmp_path: Path) -> None:
    model = split(saved("llama3", tmp_path))
    assert model.ranks is not None
    processes = model.ranks.processes
    engine = model.engine(2)
    engine.add([65, 66], Sampling(max_tokens=50, stop_ids=frozenset()))
    assert engine.step()
    os.kill(processes[0].pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RankLost, match=r"process 1 of 2 has ended: it was killed by signal 9\. Load the model again"):
        for _ in range(50):
            engine.step()
    with pytest.raises(RankLost):
        model.generate("a", **FREE)
    with pytest.raises(RankLost):
        model.logits([[65]])
    assert time.monotonic() - began < 30
    assert not torch.distributed.is_initialized()
    again = split(tmp_path)
    assert again.generate("a", **FREE).finish_reason == "length"
    end(again)


@pytest.mark.slow
def test_a_process_that_hangs_is_waited_for_no_longer_than_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "ANSWER_S", 3)
    model = split(saved("llama3", tmp_path))
    assert model.ranks is not None
    [process] = model.ranks.processes
    model.generate("a", **FREE)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(RankLost, match="no answer from each other within 3 s"):
        model.generate("a", **FREE)
    assert process.returncode == -signal.SIGKILL


def test_a_step_that_breaks_off_here_leaves_nobody_out_of_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = split(saved("llama3", tmp_path))
    engine = model.engine(2)
    monkeypatch.setattr(engine.runner.local, "compute", lambda lines: 1 / 0)  # type: ignore[attr-defined]
    engine.add([65, 66], Sampling(max_tokens=50))
    with pytest.raises(ZeroDivisionError):
        engine.step()
    with pytest.raises(RankLost, match="out of step"):
        model.generate("a", **FREE)


def test_followers_end_with_their_leader(tmp_path: Path) -> None:
    saved("llama3", tmp_path)
    code = (
        "import sys, time; from ownlm.generate.opening import load\n"
        "model = load(sys.argv[1], tensor_parallel=2); model.generate('a', max_tokens=3)\n"
        "print(model.ranks.processes[0].pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        follower = psutil.Process(int(leader.stdout.readline()))
        assert follower.is_running()
        leader.kill()
        follower.wait(timeout=20)


def test_what_cannot_be_split_is_told_before_anything_is_left_behind(tmp_path: Path) -> None:
    path = saved("llama3", tmp_path / "model")
    with pytest.raises(UserError, match="its 4 heads can't be divided among 3 processes"):
        load(path, tensor_parallel=3)
    with pytest.raises(UserError, match="0 is no number of processes"):
        load(path, tensor_parallel=0)
    with pytest.raises(UserError, match="an adapter isn't merged into a split model"):
        load(path, adapter="one", tensor_parallel=2)
    assert not psutil.Process().children()
    assert not torch.distributed.is_initialized()


def test_a_split_model_searches_over_beams_and_goes_without_adapters(tmp_path: Path) -> None:
    """The beams' pages are copied on every rank."""
    whole = load(saved("llama3", tmp_path))
    assert isinstance(whole, Model)
    model = split(tmp_path)
    search = {**FREE, "beams": 3}
    assert [one.tokens for one in model.generate(PROMPTS, **search)] == [
        one.tokens for one in whole.generate(PROMPTS, **search)
    ]
    assert model.loaded_adapters == []
    with pytest.raises(UserError, match="a split model goes without adapters"):
        model.adapters.load("one", tmp_path)
    with pytest.raises(UserError, match="a split model goes without adapters"):
        model.generate("a", adapter="one")
    model.kv = "int8"
    with pytest.raises(UserError, match=r"kv=int8.*the model is split over processes"):
        model.engine(1)
    end(model)


def test_a_small_model_drafts_for_a_split_one(tmp_path: Path) -> None:
    """The same text; it runs in the first process alone, and its drafts are read by all."""
    model = load(saved("llama3", tmp_path), tensor_parallel=2, draft=tmp_path)
    whole = load(tmp_path)
    assert isinstance(model, Model)
    assert isinstance(whole, Model)
    engine = model.engine(2)
    drafter, costs = engine.speculation.drafter, engine.speculation.costs
    assert drafter is not None
    costs.saw = lambda rows, seconds, drafted=False: 1.0  # type: ignore[method-assign]  # as if rows cost nothing
    costs.pace, costs.alone = 1.0, dict.fromkeys(range(1, 50), 1.0)
    drafter.costs.saw = lambda rows, seconds, drafted=False: 1e-6  # type: ignore[method-assign]
    drafter.costs.pace, drafter.costs.alone = 1.0, {1: 1e-6}
    prompt = model.prompt_ids(PROMPTS[0])
    engine.add(prompt, Sampling(max_tokens=40, stop_ids=frozenset()))
    said = [event.token.id for _ in range(40) for event in engine.step() if event.token]
    assert tuple(said) == whole.generate(PROMPTS[0], max_tokens=40, stop_ids=frozenset()).tokens
    assert engine.speculation.accepted_tokens > 20
    end(model)


@pytest.mark.slow
def test_the_command_line_splits_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(saved("llama3", tmp_path))
    said = []
    for size in ("1", "2"):
        assert main(["generate", path, "the mill", "--tensor-parallel", size, "max_tokens=9"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    gc.collect()
    assert main(["generate", path, "the mill", "--tensor-parallel", "3"]) == 2
    assert "its 4 heads can't be divided among 3 processes" in capsys.readouterr().err
