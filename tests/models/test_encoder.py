"""Encoders and their heads equal transformers' in fp32, on loud weights; each of a list of deliberate mistakes is noticed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from encoder_references import CASES, answer, batch, real, save_encoder
from references import difference
from safetensors.torch import load_file
from torch import Tensor

from ownlm.models.encoder import Encoder
from ownlm.models.weights import load_model

BAR = 1e-5
VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "hf-tiny"
Checkpoints = Callable[[str, str], tuple[Path, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """By family and class: a directory that transformers wrote, and what its model says of `batch`."""
    made: dict[tuple[str, str], tuple[Path, dict[str, Tensor]]] = {}

    def get(name: str, kind: str) -> tuple[Path, dict[str, Tensor]]:
        if (name, kind) not in made:
            path = tmp_path_factory.mktemp(name)
            reference = save_encoder(name, kind, path)
            made[name, kind] = path, answer(reference, batch(reference.config.model_type))
        return made[name, kind]

    return get


def say(model: Encoder, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that a model of ours says, real tokens only. Padding is noise in the input as well."""
    mask = given["attention_mask"]
    hidden = model(given["input_ids"], mask_BT=mask, types_BT=given.get("token_type_ids"))
    said: dict[str, Tensor] = {"hidden": hidden}
    if model.pooler is not None:
        said["pooled"] = model.pooler(hidden)
    if model.next_sentence is not None:
        said["follows"] = model.follows(hidden)
    if model.task == "masked_lm":
        said["logits"] = model.logits(hidden)
    elif model.task == "span":
        said["start"], said["end"] = model.head(hidden, mask)
    elif model.task is not None:
        said["logits"] = model.head(hidden, mask)
    return {key: real(value, mask) for key, value in said.items()}


def worst(model: Encoder, expected: dict[str, Tensor]) -> float:
    said = say(model, batch(model.hf["model_type"]))
    assert expected.keys() <= said.keys()
    return max(difference(said[key].detach(), value) for key, value in expected.items())


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_parity(name: str, kind: str, training: bool, checkpoints: Checkpoints) -> None:
    path, expected = checkpoints(name, kind)
    with torch.set_grad_enabled(training):
        assert worst(load_model(path), expected) <= BAR
    assert max(value.abs().max() for value in expected.values()) > 1  # loud


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_vectors(name: str) -> None:
    if not VECTORS.exists():
        pytest.skip("the shared test vectors lie beside the repository, and are not there")
    vectors = load_file(VECTORS / name / "ref.safetensors")
    model = load_model(VECTORS / name)
    with torch.inference_mode():
        logits = model.logits(model(vectors["in.input_ids"]))
    assert difference(logits, vectors["out"]) <= BAR
