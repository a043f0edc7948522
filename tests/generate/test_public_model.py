"""The public model: prompts of every kind, scores and embeddings against the plain forward, chat in the terminal."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ownlm.artifact import Workspace
from ownlm.checkpoints.weights import save_model
from ownlm.errors import ArtifactError, ContextTooLong, NotFound, UserError
from ownlm.generate.chat import chat
from ownlm.generate.model import Model
from ownlm.generate.opening import load
from ownlm.generate.runners import NativeRunner
from ownlm.generate.sampling import Sampling
from ownlm.kernels import native
from ownlm.kernels.native import NativeDecoder, unsupported
from ownlm.records import Completion, Message
from tiny import tiny_model

MODEL = tiny_model()
FREE = {"max_tokens": 12, "temperature": 1.0, "seed": 1, "stop_ids": frozenset()}


def same(first: Completion, second: Completion) -> None:
    """Equal up to the last bits of the log-probabilities, in which matrix products of different sizes differ."""
    assert first.tokens == second.tokens
    assert (first.text, first.finish_reason, first.prompt_tokens) == (
        second.text,
        second.finish_reason,
        second.prompt_tokens,
    )
    assert first.logprobs == pytest.approx(second.logprobs, abs=1e-4)


def test_generate_equals_stream_equals_batch() -> None:
    prompts = ["one", "two and three", "", "f" * 30]
    batch = MODEL.generate(prompts, **FREE)
    for prompt, expected in zip(prompts, batch, strict=True):
        same(MODEL.generate(prompt, **FREE), expected)
        assert "".join(MODEL.stream(prompt, **FREE)) == expected.text
        assert len(expected.tokens) == len(expected.logprobs) == 12
    assert batch[0].prompt_tokens == 3
    assert MODEL.generate([], **FREE) == []


def test_messages_go_through_the_template() -> None:
    messages = [{"role": "system", "content": "Be kind."}, Message(role="user", content="hello")]
    ids = MODEL.tokenizer.chat([Message(role="system", content="Be kind."), messages[1]], add_generation_prompt=True)[0]
    assert MODEL.prompt_ids(messages) == ids
    answer = MODEL.generate(messages, **FREE)
    assert answer.prompt_tokens == len(ids)
    for again in MODEL.generate([messages, messages], **FREE):
        same(again, answer)
    for wrong in ({"role": "user"}, {"role": "robot", "content": "x"}, {"role": "user", "content": "x", "name": "y"}):
        with pytest.raises(UserError, match="not a message"):
            MODEL.generate([wrong])


def test_several_answers_and_refusals() -> None:
    [answers] = MODEL.answers([MODEL.prompt_ids("a")], Sampling(n=3, temperature=1, seed=1, max_tokens=5))
    assert len(answers) == 3
    with pytest.raises(UserError, match="max_token"):
        MODEL.generate("a", max_token=3)
    with pytest.raises(UserError, match="answers"):
        MODEL.generate("a", n=2)
    with pytest.raises(UserError, match="events"):
        MODEL.generate("a", Sampling(logprobs=3))
    with pytest.raises(ContextTooLong):
        MODEL.generate(["a", "b" * 200])
    with pytest.raises(ContextTooLong):
        MODEL.logits([[1] * 129])


def test_the_best_of_several_answers() -> None:
    prompts = [MODEL.prompt_ids(text) for text in ("a", "bc")]
    # A stop token ends some answers early: the mean, not the sum, decides.
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 9, "stop_ids": frozenset(range(60))}
    every = MODEL.answers(prompts, Sampling(n=6, **settings))
    found = MODEL.answers(prompts, Sampling(n=2, best_of=6, **settings))
    assert len({len(one.tokens) for row in every for one in row}) > 2
    for row, chosen in zip(every, found, strict=True):
        means = sorted((sum(one.logprobs) / len(one.logprobs) for one in row), reverse=True)
        assert [sum(one.logprobs) / len(one.logprobs) for one in chosen] == means[:2]
    [one] = MODEL.generate(["bc"], best_of=6, **settings)
    assert one.tokens == found[1][0].tokens
    assert "".join(MODEL.stream("bc", best_of=6, **settings)) == one.text
    for wrong in ({"n": 3, "best_of": 2}, {"best_of": 5000}, {"n": 0}, {"n": 5000}):
        with pytest.raises(UserError, match="must be"):
            Sampling(**wrong)


def test_streams_may_run_side_by_side_and_be_left() -> None:
    alone = ["".join(MODEL.stream(prompt, **FREE)) for prompt in ("x", "y")]
    first, second, left = MODEL.stream("x", **FREE), MODEL.stream("y", **FREE), MODEL.stream("z", **FREE)
    texts = ["", ""]
    next(left)
    left.close()
    for _ in range(12):
        texts[0] += next(first, "")
        texts[1] += next(second, "")
    assert [texts[0] + "".join(first), texts[1] + "".join(second)] == alone
    assert MODEL._engine is not None
    assert MODEL._engine.idle
    assert not MODEL._events


def test_scores_equal_the_plain_forward() -> None:
    pairs = [
        ("the cat", " sat"),
        ("q", "a longer continuation"),
        ("", "from nothing"),
        ([{"role": "user", "content": "hi"}], "yo"),
    ]
    for (prompt, continuation), scores in zip(pairs, MODEL.scores(pairs), strict=True):
        context, rest = MODEL.prompt_ids(prompt), MODEL.tokenizer.encode(continuation)
        logprobs = MODEL.logits([[*context, *rest]])[0].log_softmax(-1)
        expected = [logprobs[len(context) - 1 + index, id].item() for index, id in enumerate(rest)]
        assert scores == pytest.approx(expected, abs=1e-4)
        assert MODEL.score(prompt, continuation) == pytest.approx(scores, abs=1e-4)
    with pytest.raises(ContextTooLong):
        MODEL.score("a" * 100, "b" * 30)


def test_spaces_at_the_end_of_a_prompt_belong_to_the_continuation() -> None:
    assert MODEL.continuation_ids("the ", "cat") == (MODEL.tokenizer.encode("the"), MODEL.tokenizer.encode(" cat"))


def test_embeddings_are_means_of_hidden_states() -> None:
    texts = ["short", "a rather longer text", "ü"]
    vectors = MODEL.embed(texts)
    assert vectors.dtype == torch.float32
    for text, vector in zip(texts, vectors, strict=True):
        mean = MODEL.hidden([MODEL.prompt_ids(text)])[0].mean(0).numpy()
        np.testing.assert_allclose(vector.numpy(), mean / np.linalg.norm(mean), atol=1e-5)
    assert MODEL.embed("short").shape == (1, 32)


def test_the_cache_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    token_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, their width, float32
    monkeypatch.setattr("ownlm.device.free_memory_bytes", lambda *_: token_bytes * 128 * 4 * 3 + 1)
    pool = MODEL.engine(8).pool
    assert 128 < pool.count * pool.size <= 3 * 128  # fewer where heads are padded


@pytest.mark.skipif(unsupported(MODEL.decoder) is not None, reason="no native kernels here")
def test_what_memory_has_no_room_for_is_told_with_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = NativeDecoder(MODEL.decoder).page_bytes()
    # A quarter is not enough for the context of four pages, three quarters are.
    monkeypatch.setattr("ownlm.device.free_memory_bytes", lambda *_: int(page_bytes * 5.5))
    monkeypatch.setattr("ownlm.kernels.native.packed_bytes", lambda model: 0)
    assert MODEL.engine(8).context == 128
    monkeypatch.setattr("ownlm.device.free_memory_bytes", lambda *_: int(page_bytes * 3))
    engine = MODEL.engine(8)
    assert (engine.context, engine.pool.count) == (64, 2)
    with pytest.raises(
        ContextTooLong, match=r"cache here holds 64 tokens .*context is 128\)\..* at most 4 new"
    ) as caught:
        engine.add([65] * 60, Sampling(max_tokens=5))
    assert caught.value.context == 64
    request = engine.add([65] * 60, Sampling(max_tokens=4, stop_ids=frozenset()))
    events = [event for _ in range(9) for event in engine.step()]
    assert [event.request for event in events] == [request] * 4
    monkeypatch.setattr("ownlm.device.free_memory_bytes", lambda *_: 0)
    assert MODEL.engine(8).context == 32


def test_keys_and_values_are_kept_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    if native.unsupported(model.decoder) is None:
        model.kv = "int8"
        runner = model.engine(2).runner
        assert isinstance(runner, NativeRunner)
        assert runner.cache.kv == "int8"
        assert model.generate("once upon a time", max_tokens=4, stop_ids=frozenset()).finish_reason == "length"
    without = tiny_model()
    without.kv = "int8"
    monkeypatch.setattr(native, "unsupported", lambda model: "there is no compiler")
    with pytest.raises(UserError, match=r"kv=int8.*there is no compiler"):
        without.engine(2)


def test_changed_weights_are_what_generates() -> None:
    """The kernels keep a copy of the weights; an edited model must not go on speaking with the old one."""
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    settings: dict[str, Any] = {"max_tokens": 12, "stop_ids": frozenset()}
    before, streamed = model.generate("x", **settings).text, "".join(model.stream("x", **settings))
    model.decoder.load_state_dict(other.decoder.state_dict())
    after = other.generate("x", **settings).text
    assert before == streamed != after
    assert model.generate("x", **settings).text == "".join(model.stream("x", **settings)) == after


def talk(model: Model, *lines: str) -> tuple[str, list[Message]]:
    waiting, out = list(lines), io.StringIO()

    def read(_: str) -> str:
        if not waiting:
            raise EOFError
        if waiting[0] == "^C":
            waiting.pop(0)
            raise KeyboardInterrupt
        return waiting.pop(0)

    return out, chat(model, system="Be brief.", read=read, out=out, sampling=Sampling(**FREE))  # type: ignore[return-value]


def test_terminal_chat_keeps_history_and_obeys_commands() -> None:
    out, messages = talk(MODEL, "hello", "", "^C", "/what", "again", "/quit", "never read")
    assert [message.role for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[2].content == MODEL.generate(messages[:2], **FREE).text
    assert messages[4].content == MODEL.generate(messages[:4], **FREE).text
    assert messages[2].content in out.getvalue()
    assert "tiny@1" in out.getvalue()
    _, messages = talk(MODEL, "hello", "/reset", "x" * 120)
    assert [message.role for message in messages] == ["system"]


def test_ctrl_c_stops_the_answer_not_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    stream = model.stream

    def interrupted(*args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        yield next(stream(*args, **kwargs))  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "stream", interrupted)
    out, messages = talk(model, "hello")
    assert "[stopped]" in out.getvalue()
    assert messages[-1].role == "assistant"
    assert model._engine is not None
    assert model._engine.idle


def test_load_from_a_folder_and_from_the_workspace(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        save_model(MODEL.decoder, folder)
        MODEL.tokenizer.save(folder)

    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder)
    workspace = Workspace(tmp_path / "home")
    with workspace.create("checkpoint", "demo", inputs={}, recipe=Sampling()) as draft:
        write(draft.path)
    for ref, name in ((folder, "mine"), ("demo", "demo"), ("demo@1", "demo")):
        model = load(ref, workspace=workspace, device="cpu")
        assert model.name == name
        same(model.generate("hello", **FREE), MODEL.generate("hello", **FREE))
    assert load("demo", workspace=workspace).ref == "demo@1"
    with pytest.raises(NotFound):
        load("nothing", workspace=workspace)
    damaged = draft.done.file("model.safetensors")
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum"):
        load("demo", workspace=Workspace(tmp_path / "home"))
