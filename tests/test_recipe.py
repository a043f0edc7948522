from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from ownlm import recipe
from ownlm.errors import NotFound, RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    kind: Literal["adamw"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Muon:
    kind: Literal["muon"] = "muon"
    momentum: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str
    steps: int
    optimizer: AdamW | Muon = AdamW()
    folder: Path | None = None


def test_file_then_overrides_over_defaults(tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text('name = "tiny"\nsteps = 5\n[optimizer]\nbetas = [0.8, 0.9]\n')
    made = recipe.read(Recipe, file, ["optimizer.lr=1e-2", "folder=a/b"], {"name": "default", "steps": 1})
    assert made == Recipe(name="tiny", steps=5, optimizer=AdamW(lr=1e-2, betas=(0.8, 0.9)), folder=Path("a/b"))


def test_union_member_is_chosen_by_its_kind():
    made = recipe.read(Recipe, None, ["name=x", "steps=1", "optimizer.kind=muon", "optimizer.momentum=0.9"])
    assert made.optimizer == Muon(momentum=0.9)


def test_all_faults_at_once_each_with_its_cure():
    with pytest.raises(RecipeError) as caught:
        recipe.read(Recipe, None, ["steps='x'", "optimizer.leer=3", "optmizer.lr=3", "optimizer.betas=3"])
    text = str(caught.value)
    assert "name is missing." in text
    assert 'steps should be a valid integer, not "x".' in text
    assert "optimizer.leer is not a field. Did you mean lr? Fields here: betas, kind, lr." in text
    assert "optmizer is not a field. Did you mean optimizer?" in text
    assert "optimizer.betas should be a valid array, not 3." in text
    assert len(text.splitlines()) == 5


def test_faults_are_told_of_the_union_member_that_was_meant():
    with pytest.raises(RecipeError) as caught:
        recipe.read(Recipe, None, ["name=x", "steps=1", "optimizer.kind=muon", "optimizer.momentun=1"])
    assert str(caught.value) == (
        "settings: optimizer.momentun is not a field. Did you mean momentum? Fields here: kind, momentum."
    )


@pytest.mark.parametrize("value", ["2.5", "true", "'3'"])
def test_types_are_not_coerced(value):
    with pytest.raises(RecipeError, match=r"steps should be"):
        recipe.read(Recipe, None, ["name=x", f"steps={value}"])


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "village.toml").touch()
    with pytest.raises(NotFound, match=r"Did you mean .*village\.toml"):
        recipe.read(Recipe, tmp_path / "vilage.toml")


def test_broken_toml_and_broken_override(tmp_path):
    (tmp_path / "bad.toml").write_text("name = \n")
    with pytest.raises(RecipeError, match="not a TOML file"):
        recipe.read(Recipe, tmp_path / "bad.toml")
    with pytest.raises(RecipeError, match="is not key=value"):
        recipe.read(Recipe, None, ["steps"])
    with pytest.raises(RecipeError, match="name is a value, not a table"):
        recipe.read(Recipe, None, ["name=x", "name.first=y"])


def test_resolve_gives_what_validate_takes():
    made = Recipe(name="x", steps=2, optimizer=Muon(), folder=Path("a"))
    assert recipe.validate(Recipe, recipe.resolve(made), where="manifest") == made
