"""A base and its adapters behind one address: chosen by `model`, loaded and unloaded by who may."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Model as ModelCard

from live import http, running, slow
from ownlm.adapters.peft import CONFIG
from ownlm.errors import UserError
from ownlm.generate.model import Model
from ownlm.model_commands import _adapters
from tiny import tiny_adapter, tiny_merged, tiny_model

MESSAGES: Any = [{"role": "user", "content": "hello"}]
SETTINGS: Any = {"messages": MESSAGES, "temperature": 1, "seed": 3, "max_tokens": 20}
KEY, ADMIN = "an-api-key-of-the-tests", "an-admins-key-of-the-tests"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, base = tmp_path_factory.mktemp("adapters"), tiny_model(context=512)
    return {name: tiny_adapter(base, root / name, seed=seed) for seed, name in enumerate("ab", start=1)}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, Model]:
    """What each name should say: the base, and the adapters in its weights."""
    base = tiny_model(context=512)
    return {"tiny": base, **{name: tiny_merged(base, folder) for name, folder in folders.items()}}


@pytest.fixture(scope="module")
def address(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tiny_model(context=512), tmp_path_factory.mktemp("home"), adapters=folders) as address:
        yield address


def post(address: str, path: str, key: str = "", **body: Any) -> Any:
    return http.post(address + path, json=body, headers={"authorization": f"Bearer {key}"} if key else {})


def test_they_are_models_with_a_parent(address: str, folders: dict[str, Path]) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        listed = client.models.list().data
        assert [(card.id, getattr(card, "parent", None)) for card in listed] == [
            ("tiny", None),
            ("a", "tiny"),
            ("b", "tiny"),
        ]
        card = client.models.retrieve("b")
        assert isinstance(card, ModelCard)
        assert card.model_extra == {"max_model_len": 512, "ref": str(folders["b"]), "parent": "tiny"}
        with pytest.raises(openai.NotFoundError, match=r"'c' does not exist here. This server has 'tiny', 'a', 'b'"):
            client.chat.completions.create(model="c", messages=MESSAGES)


def test_one_batch_answers_as_each_merged_model(address: str, references: dict[str, Model]) -> None:
    names = ["tiny", "a", "b", "a", "b", "tiny"]

    def ask(name: str) -> str:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            reply = client.chat.completions.create(model=name, **SETTINGS)
            assert reply.model == name
            return reply.choices[0].message.content or ""

    with ThreadPoolExecutor(len(names)) as pool:
        texts = list(pool.map(ask, names))
    expected = {
        name: model.generate(MESSAGES, temperature=1, seed=3, max_tokens=20).text for name, model in references.items()
    }
    assert texts == [expected[name] for name in names]
    assert len(set(texts)) == 3
    completion = post(address, "/v1/completions", model="b", prompt="once", max_tokens=9, temperature=0).json()
    assert completion["choices"][0]["text"] == references["b"].generate("once", max_tokens=9).text
    refused = post(address, "/v1/embeddings", model="b", input="x")
    assert refused.status_code == 400
    assert "Embeddings are made by 'tiny'" in refused.json()["error"]["message"]


def test_replicate_finds_them_by_name_and_by_version(address: str, references: dict[str, Model]) -> None:
    versions = {
        name: http.get(f"{address}/v1/models/ownlm/{name}").json()["latest_version"]["id"] for name in references
    }
    assert len(set(versions.values())) == 3
    inputs = {"prompt": "hello", "max_tokens": 9, "temperature": 0}
    for name, model in references.items():
        expected = model.generate(MESSAGES, max_tokens=9).text
        for path, body in (
            (f"/v1/models/ownlm/{name}/predictions", {"input": inputs}),
            ("/v1/predictions", {"input": inputs, "version": versions[name]}),
        ):
            made = http.post(address + path, json=body, headers={"prefer": "wait"}).json()
            assert ("".join(made["output"]), made["model"]) == (expected, f"ownlm/{name}")
    assert post(address, "/v1/models/ownlm/c/predictions", input=inputs).status_code == 404


def test_a_search_over_beams_goes_without_adapters(address: str) -> None:
    refused = post(address, "/v1/completions", model="a", prompt="x", n=2, use_beam_search=True)
    assert refused.status_code == 400
    assert "goes without adapters" in refused.json()["error"]["message"]


def test_loading_and_unloading_beside_a_stream(
    folders: dict[str, Path], tmp_path: Path, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    base = tiny_model(context=512)
    with running(slow(base, 0.01), tmp_path) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:

            def stream(name: str) -> Any:
                return client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=60, stream=True)

            plain = iter(stream("tiny"))
            next(plain)
            done = post(address, "/v1/load_lora_adapter", lora_name="late", lora_path=str(folders["a"]))
            assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'late' added successfully.")
            spoken = iter(stream("late"))
            next(spoken)
            # The stream goes on to its end with what is gone for others.
            done = post(address, "/v1/unload_lora_adapter", lora_name="late")
            assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'late' removed successfully.")
            assert [card.id for card in client.models.list().data] == ["tiny"]
            with pytest.raises(openai.NotFoundError):
                stream("late")
            for each in (plain, spoken):
                assert list(each)[-1].choices[0].finish_reason == "length"
        wait_until(lambda: base.adapters.used_bytes == 0)
        for inplace, status in ((False, 200), (False, 400), (True, 200)):
            body = {"lora_name": "late", "lora_path": str(folders["b"]), "load_inplace": inplace}
            assert post(address, "/v1/load_lora_adapter", **body).status_code == status


def test_what_can_not_be_loaded_is_told(address: str, folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text((folders["a"] / CONFIG).read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04never read")
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    cases: list[tuple[str, dict[str, Any], int, str]] = [
        (load, {"lora_name": "x", "lora_path": "nowhere"}, 404, "nowhere"),
        (load, {"lora_name": "x", "lora_path": str(tmp_path)}, 404, "adapter_model.safetensors"),
        (load, {"lora_name": "x", "lora_path": "hf:owner/name"}, 400, "not downloaded"),
        (load, {"lora_name": "a", "lora_path": str(folders["b"])}, 400, "an adapter is called 'a' already"),
        (load, {"lora_name": "tiny", "lora_path": str(folders["b"])}, 400, "the model itself"),
        (load, {"lora_name": "a/b", "lora_path": str(folders["b"])}, 400, "can't be called"),
        (load, {"lora_name": "x"}, 400, "Missing field lora_path"),
        (load, {"lora_name": "x", "lora_path": "y", "lora_int_id": 1}, 400, "Unknown field lora_int_id"),
        (unload, {"lora_name": "x"}, 404, "there is no adapter 'x'"),
        (unload, {"lora_name": "a", "lora_int_id": 1}, 400, "lora_int_id is not supported"),
    ]
    for path, body, status, sentence in cases:
        answer = post(address, path, **body)
        assert answer.status_code == status, answer.text
        assert sentence in answer.json()["error"]["message"]
    form = http.post(address + load, content=b'{"lora_name": "x"}', headers={"content-type": "text/plain"})
    assert form.status_code == 415  # what a page in a browser may send without asking


@pytest.mark.parametrize("admin_keys", [(), (ADMIN,)])
def test_only_administrators_change_what_is_served(
    admin_keys: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    body = {"lora_name": "x", "lora_path": str(folders["a"])}
    with running(tiny_model(context=512), tmp_path, api_keys=(KEY,), admin_keys=admin_keys) as address:
        for key in ("", KEY, "wrong" * 5):
            refused = post(address, "/v1/load_lora_adapter", key, **body)
            code = "invalid_admin_key" if admin_keys else "no_admin_keys"
            assert (refused.status_code, refused.json()["error"]["code"]) == (401 if admin_keys else 403, code)
        assert post(address, "/v1/chat/completions", ADMIN, model="tiny", **SETTINGS).status_code == 401
        if admin_keys:
            assert post(address, "/v1/load_lora_adapter", ADMIN, **body).status_code == 200
            assert post(address, "/v1/chat/completions", KEY, model="x", **SETTINGS).status_code == 200
            assert post(address, "/v1/unload_lora_adapter", ADMIN, lora_name="x").status_code == 200


def test_the_command_line_tells_what_is_merged_from_what_is_named() -> None:
    assert _adapters([]) == (None, {})
    assert _adapters(["demo-lora"]) == ("demo-lora", {})
    assert _adapters(["a=demo-lora", "b=./x=y"]) == (None, {"a": "demo-lora", "b": "./x=y"})
    assert _adapters(["./x=y", "a=b@2"]) == ("./x=y", {"a": "b@2"})
    for words in (["x", "y"], ["a=x", "a=y"]):
        with pytest.raises(UserError):
            _adapters(words)
