"""The rows of FAMILIES: nothing in them that no reader asks for, and no config.json that is anything but read or refused."""

import json
from functools import cache
from typing import Any

import pytest
from test_grok import CONFIG as GROK
from transformers import AutoConfig

from ownlm.errors import UserError
from ownlm.models.families import FAMILIES, from_hf
from ownlm.models.families.fields import Fields

# Values that some field of some file could hold by mistake, and some that change what is asked for.
WRONG: list[Any] = [
    None,
    "bad",
    0,
    -1,
    7,
    10**30,
    0.5,
    float("nan"),
    True,
    [],
    [[1, 2]],
    {},
    {"rope_type": "yarn"},
    "gelu",
]
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")


@cache
def default(kind: str) -> dict[str, Any]:
    """What transformers writes for a fresh config, with few layers."""
    if kind == "grok-1":
        return GROK
    config: dict[str, Any] = json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False))

    def small(part: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in part.items() if key not in ("layer_types", "attention_types")}
        kept |= {name: 2 for name in COUNTS if part.get(name)}
        return {key: small(value) if key.endswith("_config") and value else value for key, value in kept.items()}

    return small(config)


KINDS = [kind for kind in FAMILIES if kind != "ownlm"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_spelling_and_default_is_asked_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, get = set(), Fields.get

    def listening(self: Fields, name: str, *args: Any, **others: Any) -> Any:
        asked.add(name)
        return get(self, name, *args, **others)

    monkeypatch.setattr(Fields, "get", listening)
    family = FAMILIES[kind]
    # A window is asked for where the file says that there are any.
    from_hf(default(kind) | {"use_sliding_window": True, "max_window_layers": 1})
    assert set(family.defaults) | set(family.spelled) <= asked


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_leaves_out_is_known(kind: str) -> None:
    """A field that equals a family's default may be missing, and one without a default may not change anything unseen."""
    config = default(kind)
    family, whole = FAMILIES[kind], from_hf(config)[0]
    for name, value in family.defaults.items():
        spelled = family.spelled.get(name, name)
        if config.get(spelled) == value:
            assert from_hf({key: one for key, one in config.items() if key != spelled})[0] == whole, name


@pytest.mark.parametrize("kind", KINDS)
def test_any_value_is_read_or_refused(kind: str) -> None:
    config = default(kind)
    places = [(key, None) for key in [*config, "rope_scaling", "rope_theta", "id2label", "quantization_config"]]
    places += [(key, inner) for key, part in config.items() if isinstance(part, dict) for inner in part]
    faults = []
    for key, inner in places:
        for value in WRONG:
            changed = config | {key: value if inner is None else config[key] | {inner: value}}
            try:
                from_hf(changed)
            except UserError as fault:
                faults.append(fault.where)
    assert len(faults) > 50
    assert set(faults) == {"config.json"}
