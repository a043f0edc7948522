"""Several adapters over one base in one batch: each answer is the merged model's, and none sees another's cache."""

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ownlm.adapters.peft import CONFIG, TENSORS
from ownlm.artifact import Workspace
from ownlm.checkpoints.weights import save_model
from ownlm.errors import ArtifactError, NotFound, UserError
from ownlm.generate.adapters import Adapter
from ownlm.generate.engine import Engine
from ownlm.generate.model import Model
from ownlm.generate.opening import load
from ownlm.generate.runners import NativeRunner
from ownlm.generate.sampling import Sampling
from ownlm.generate.sequence import Event
from ownlm.generate.torch_runner import PAGE, TorchRunner
from ownlm.kernels import library, native
from tiny import tiny_adapter, tiny_merged, tiny_model

needs_kernels = pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")
TEXTS = ("once upon a time", "the village", "né à Zürich", "x" * 40)
SAMPLING = Sampling(max_tokens=12, temperature=0.9, seed=3, stop_ids=frozenset(), echo=True)


@dataclass(frozen=True)
class Recipe:
    name: str = "made"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of every layer, one of a rank beyond a group, one with a head of its own."""
    root, model = tmp_path_factory.mktemp("adapters"), tiny_model()
    return {
        "a": tiny_adapter(model, root / "a", seed=1),
        "b": tiny_adapter(model, root / "b", seed=2, rank=20),
        "head": tiny_adapter(model, root / "head", seed=3, train_also=("lm_head",)),
    }


@pytest.fixture(params=[pytest.param("native", marks=needs_kernels), "modules", "pages"])
def loaded(request: pytest.FixtureRequest, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Model:
    """The model with all adapters loaded, on the kernels and on PyTorch: as on a CPU, and over pages with steps on steady tensors."""
    if request.param != "native":
        monkeypatch.setattr(native, "unsupported", lambda model: "not here")
    if request.param == "pages":
        monkeypatch.setattr(
            "ownlm.generate.model.torch_runner",
            lambda model, **_: TorchRunner(model, pages=64, page=PAGE, static=True),
        )
    model = tiny_model()
    for name, folder in folders.items():
        model.adapters.load(name, folder)
    assert isinstance(model.engine().runner, NativeRunner if request.param == "native" else TorchRunner)
    return model


def run(engine: Engine, requests: Sequence[tuple[list[int], Adapter | None]]) -> list[list[Event]]:
    """The events of each request, all of them added at once."""
    ids = [engine.add(prompt, SAMPLING, adapter=adapter) for prompt, adapter in requests]
    events: dict[int, list[Event]] = {id: [] for id in ids}
    while not engine.idle:
        for event in engine.step():
            events[event.request].append(event)
    return [events[id] for id in ids]


def logprobs(events: list[Event]) -> list[float]:
    seen = [*events[0].prompt[1:], *(event.token for event in events if event.token)]
    return [token.logprob for token in seen if token.logprob is not None]


def test_each_answer_of_a_mixed_batch_is_the_merged_models(loaded: Model, folders: dict[str, Path]) -> None:
    names = [None, *folders]
    prompts = [loaded.prompt_ids(text) for text in TEXTS]
    requests = [(prompt, name and loaded.adapters[name]) for prompt in prompts for name in names]
    found = run(loaded.engine(16), requests)
    reference = {name: tiny_merged(loaded, folders[name]) if name else loaded for name in names}
    said = set()
    for (prompt, _), name, events in zip(requests, names * len(prompts), found, strict=True):
        ids = [*prompt, *(event.token.id for event in events if event.token)]
        wanted = reference[name].logits([ids])[0].log_softmax(-1)
        told = [wanted[at, id].item() for at, id in enumerate(ids[1:])]
        assert logprobs(events) == pytest.approx(told, abs=1e-4), name
        said.add((tuple(prompt), tuple(ids)))
    assert len(said) == len(requests), "adapters that say the same test nothing"
    texts = loaded.generate(list(TEXTS), adapter=["a", None, "b", "head"], max_tokens=9)
    for text, name, completion in zip(TEXTS, ("a", None, "b", "head"), texts, strict=True):
        assert completion.text == reference[name].generate(text, max_tokens=9).text
    assert (
        "".join(loaded.stream(TEXTS[0], adapter="b", max_tokens=9))
        == reference["b"].generate(TEXTS[0], max_tokens=9).text
    )
    # The model itself was never touched.
    assert loaded.logits([prompts[0]]).equal(tiny_model().logits([prompts[0]]))


@needs_kernels
def test_adapters_wait_beside_a_base_that_is_read_later(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no memory for packed weights, the modules get theirs when the first answer is asked for."""
    made = tiny_model()
    save_model(made.decoder, tmp_path)
    made.tokenizer.save(tmp_path)
    monkeypatch.setattr(native, "packed_bytes", lambda model: 2**60)
    model = load(tmp_path, device="cpu")
    assert isinstance(model, Model)
    model.adapters.load("a", folders["a"])
    assert next(model.shapes.parameters()).is_meta
    found = model.generate(TEXTS[0], adapter="a", max_tokens=9)
    assert found.text == tiny_merged(made, folders["a"]).generate(TEXTS[0], max_tokens=9).text


@needs_kernels
def test_an_answer_is_the_same_bit_by_bit_alone_and_beside_others(folders: dict[str, Path]) -> None:
    model = tiny_model(slots=16)
    adapters = [None, *(model.adapters.load(name, folder) for name, folder in folders.items())]
    requests = [(model.prompt_ids(f"{number} {TEXTS[number % 4]}"), adapters[number % 4]) for number in range(16)]
    together = run(model.engine(16), requests)
    for request, events in zip(requests, together, strict=True):
        (alone,) = run(model.engine(1), [request])
        assert logprobs(alone) == logprobs(events)
        assert [event.text for event in alone] == [event.text for event in events]


@needs_kernels
def test_what_was_read_with_one_adapter_is_never_used_with_another(folders: dict[str, Path]) -> None:
    model = tiny_model(context=256)
    a, b = (model.adapters.load(name, folders[name]) for name in "ab")
    prompt = model.prompt_ids("the beginning that all of them share, longer than two pages of the cache are: so it is")
    sampling = Sampling(max_tokens=4, stop_ids=frozenset())

    def answer(engine: Engine, adapter: Adapter | None) -> tuple[list[float | None], int]:
        before = engine.reused_tokens
        engine.add(prompt, sampling, adapter=adapter)
        told = [event.token.logprob for _ in range(9) if not engine.idle for event in engine.step() if event.token]
        assert engine.idle
        return told, engine.reused_tokens - before

    engine = model.engine()
    fresh = {adapter: answer(model.engine(), adapter)[0] for adapter in (None, a, b)}
    assert len({tuple(told) for told in fresh.values()}) == 3
    for adapter in (None, a, b):
        assert answer(engine, adapter) == (fresh[adapter], 0)
        assert answer(engine, adapter) == (fresh[adapter], 64)
    # Other weights under the same name are another adapter.
    again = model.adapters.load("a", folders["b"], replace=True)
    assert answer(engine, again) == (fresh[b], 0)
    assert answer(engine, a) == (fresh[a], 64)


def test_loading_and_unloading_while_others_write(loaded: Model, folders: dict[str, Path]) -> None:
    wanted = {name: loaded.generate(TEXTS[0], adapter=name, max_tokens=20).text for name in (None, "a", "b")}
    used = loaded.adapters.used_bytes
    streams = {name: loaded.stream(TEXTS[0], adapter=name, max_tokens=20) for name in (None, "a")}
    texts = {name: next(stream) for name, stream in streams.items()}
    loaded.adapters.load("late", folders["b"])
    late = loaded.stream(TEXTS[0], adapter="late", max_tokens=20)
    texts["b"] = next(late)
    loaded.adapters.unload("a")
    loaded.adapters.unload("late")
    assert sorted(adapter.name for adapter in loaded.adapters.all()) == ["b", "head"]
    for name in ("a", "late"):
        with pytest.raises(NotFound, match="there is no adapter"):
            loaded.generate(TEXTS[0], adapter=name)
    assert loaded.adapters.used_bytes > used  # both are still being spoken with
    for name, stream in {**streams, "b": late}.items():
        assert texts[name] + "".join(stream) == wanted[name]
    gc.collect()
    assert loaded.adapters.used_bytes < used


@needs_kernels
def test_adapters_take_no_more_memory_than_they_may(folders: dict[str, Path]) -> None:
    model = tiny_model()
    adapters = model.adapters
    first = adapters.load("a", folders["a"])
    adapters.memory_bytes = 2 * first.memory_bytes
    with pytest.raises(UserError, match="are left for adapters"):
        adapters.load("b", folders["b"])
    adapters.load("again", folders["a"])
    with pytest.raises(UserError, match=r"0 B are left for adapters|are left for adapters"):
        adapters.load("third", folders["a"])
    stream = model.stream("x", adapter="again", max_tokens=5)
    next(stream)
    adapters.unload("again")
    with pytest.raises(UserError, match="are left for adapters"):
        adapters.load("third", folders["a"])  # the stream still holds it
    stream.close()
    gc.collect()
    assert adapters.load("third", folders["a"]).memory_bytes == first.memory_bytes


def test_an_adapter_knows_its_base(tmp_path: Path, folders: dict[str, Path]) -> None:
    workspace, model = Workspace(tmp_path), tiny_model()

    def made(kind: str, name: str, inputs: dict[str, object]) -> object:
        with workspace.create(kind, name, inputs=inputs, recipe=Recipe(name)) as draft:  # type: ignore[arg-type]
            source = folders["a"] if kind == "adapter" else None
            for file in source.iterdir() if source else ():
                (draft.path / file.name).write_bytes(file.read_bytes())
            (draft.path / "note.txt").write_text(name)
        return draft.done

    base, other = made("checkpoint", "base", {}), made("checkpoint", "other", {})
    small = made("checkpoint", "base-int8", {"checkpoint": base})
    made("adapter", "tuned", {"checkpoint": base})
    for ours in (base, small):
        over = Model(model.writer(), model.tokenizer, name=ours.name, ref=ours.ref, digest=ours.digest)  # type: ignore[attr-defined]
        assert over.adapters.load("x", "tuned", workspace=workspace).ref == "tuned@1"
    over = Model(model.writer(), model.tokenizer, name="other", ref=other.ref, digest=other.digest)  # type: ignore[attr-defined]
    with pytest.raises(ArtifactError, match=r"tuned@1 was trained on another base, base@1"):
        over.adapters.load("x", "tuned", workspace=workspace)
    with pytest.raises(ArtifactError, match="a checkpoint artifact, but a adapter artifact is needed"):
        over.adapters.load("x", "base", workspace=workspace)


def test_bad_adapters_are_one_clear_error(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = tiny_model()
    tensors, config = load_file(folders["a"] / TENSORS), json.loads((folders["a"] / CONFIG).read_text())

    def folder(name: str, tensors: dict[str, torch.Tensor] | None, **changes: object) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).write_text(json.dumps(config | changes))
        if tensors is not None:
            save_file(tensors, tmp_path / name / TENSORS)
        return tmp_path / name

    wide = {key: torch.cat([tensor, tensor], -1) if "lora_A" in key else tensor for key, tensor in tensors.items()}
    cases = [
        (folder("rank", tensors, r=5), "has a pair of shapes"),
        (folder("shape", wide), "has a pair of shapes"),
        (folder("half", {key: t for key, t in tensors.items() if "lora_A" in key}), "only one of lora_A and lora_B"),
        (folder("kind", tensors, peft_type="IA3"), "can't be loaded"),
        (folder("pickled", None), "adapter_model.safetensors"),
        (tiny_adapter(model, tmp_path / "table", seed=1, train_also=("embed_tokens",)), "can't run beside the base"),
        (tmp_path / "nowhere", "nowhere"),
    ]
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04never read")
    for path, sentence in cases:
        with pytest.raises(UserError, match=sentence) as caught:
            model.adapters.load("x", path, workspace=Workspace(tmp_path / "home"))
        assert "\n" not in str(caught.value)
    for name, sentence in (("", "can't be called"), ("a b", "can't be called"), ("tiny", "the model itself is called")):
        with pytest.raises(UserError, match=sentence):
            model.adapters.load(name, folders["a"])
    model.adapters.load("x", folders["a"])
    with pytest.raises(UserError, match="an adapter is called 'x' already"):
        model.adapters.load("x", folders["b"])
    with pytest.raises(NotFound, match="there is no adapter 'y'"):
        model.generate("hi", adapter="y")
    with pytest.raises(UserError, match="2 adapters for 1 prompts"):
        model.generate(["hi"], adapter=["x", "x"])
    assert model.adapters.unload("x").name == "x"
    with pytest.raises(NotFound):
        model.adapters.unload("x")
    assert not model.adapters.all()
