from typing import Any

import pytest
import torch
from references import CONFIGS
from torch import Tensor, nn

from ownlm.adapters.lora import (
    Adapted,
    LoRA,
    Pair,
    adapters,
    add_lora,
    merge,
    remove_adapters,
    use_adapter,
    wrappers,
)
from ownlm.errors import UserError
from ownlm.models.blocks import project
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.quantization.codes import quantize_linears
from ownlm.train.fresh import init_weights

IDS = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))


def model(name: str = "llama") -> Decoder:
    made = Decoder(from_hf(CONFIGS[name])[0], CONFIGS[name])
    init_weights(made, seed=3, zero_output=False, embedding_std=0.5)
    if made.lm_head is not None:
        nn.init.normal_(made.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    return made.eval()


def logits(decoder: Decoder, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return decoder.logits(decoder(ids))


def loud(decoder: Decoder, name: str, seed: int = 0) -> None:
    """Give an adapter, whose B starts at zero, something to say."""
    generator = torch.Generator().manual_seed(seed)
    for _, module in wrappers(decoder):
        if isinstance(module, Adapted) and name in module.pairs:
            nn.init.normal_(module.pairs[name].B, std=0.3, generator=generator)  # type: ignore[arg-type]


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapted_layer_computes_the_formula(rslora: bool) -> None:
    decoder = model()
    layers = add_lora(decoder, LoRA(rank=3, alpha=5, rslora=rslora), seed=0)
    assert layers == tuple(f"layers.{n}.self_attn.{x}_proj" for n in range(2) for x in "qv")
    loud(decoder, "default")
    layer: Any = decoder.get_submodule(layers[0])
    x, A, B = torch.randn(4, 32), layer.pairs["default"].A, layer.pairs["default"].B
    wanted = x @ (layer.base.weight + 5 / (3**0.5 if rslora else 3) * B @ A).T
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral"])
def test_merged_equals_unmerged_and_fresh_equals_none(name: str) -> None:
    decoder = model(name)
    before = logits(decoder)
    plain = {key: value.clone() for key, value in decoder.state_dict().items()}
    add_lora(decoder, LoRA(rank=4, targets="all-linear"), seed=0)
    assert torch.equal(logits(decoder), before)
    loud(decoder, "default")
    adapted = logits(decoder)
    assert (adapted - before).abs().max() > 0.1
    merge(decoder)
    assert list(decoder.state_dict()) == list(plain)
    assert (logits(decoder) - adapted).abs().max() <= 1e-5 * adapted.abs().max().clamp(min=1)


def test_the_fused_projection_of_training_sees_the_adapter() -> None:
    decoder = model()
    add_lora(decoder, LoRA(rank=2, targets=("q_proj", "gate_proj")), seed=0)
    loud(decoder, "default")
    quiet = logits(decoder)
    with torch.enable_grad():
        torch.testing.assert_close(decoder.logits(decoder(IDS)), quiet, atol=1e-5, rtol=1e-5)
    plain = [nn.Linear(8, 4), nn.Linear(8, 6)]
    x = torch.randn(2, 8, requires_grad=True)
    fused = project(x, *plain)[0].grad_fn
    assert "Split" in type(fused).__name__  # the plain path is still one product


def test_gradients_reach_the_adapter_and_nothing_else() -> None:
    decoder = model("qwen3")
    add_lora(decoder, LoRA(train_also=("lm_head",)), seed=0)
    decoder.logits(decoder(IDS)).square().sum().backward()
    graded = {name for name, parameter in decoder.named_parameters() if parameter.grad is not None}
    assert graded == {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert all(".pairs.default." in name or name.startswith("lm_head.copies.default") for name in graded)
    assert len(graded) == 2 * 2 * 2 + 1


def test_several_adapters_on_one_base_switched_and_by_row() -> None:
    decoder = model()
    before = logits(decoder)
    add_lora(decoder, LoRA(rank=2), seed=1, name="one")
    add_lora(decoder, LoRA(rank=5, targets=("o_proj", "v_proj")), seed=2, name="two")
    loud(decoder, "one", 1)
    loud(decoder, "two", 2)
    assert adapters(decoder) == ["one", "two"]
    spoken = {}
    for name in ("one", "two", None):
        use_adapter(decoder, name)
        spoken[name] = logits(decoder)
    assert torch.equal(spoken[None], before)
    assert (spoken["one"] - spoken["two"]).abs().max() > 0.1
    use_adapter(decoder, ["two", None, "one"])
    rows = logits(decoder)
    for row, name in enumerate(("two", None, "one")):
        torch.testing.assert_close(rows[row], spoken[name][row], atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="no one adapter is chosen"):
        merge(decoder)
    remove_adapters(decoder)
    assert torch.equal(logits(decoder), before)


def test_a_copied_head_is_switched_and_merged() -> None:
    decoder = model()
    before = logits(decoder)
    add_lora(decoder, LoRA(train_also=("lm_head", "norm")), seed=0)
    copied: Any = decoder.lm_head
    copied.copies["default"].weight.data.add_(1.0)
    adapted = logits(decoder)
    assert (adapted - before).abs().max() > 0.1
    use_adapter(decoder, None)
    assert torch.equal(logits(decoder), before)
    use_adapter(decoder, "default")
    merge(decoder)
    torch.testing.assert_close(logits(decoder), adapted)


def test_full_rank_learns_any_update() -> None:
    """With r = min(O, I), least squares on A and B finds an arbitrary change of the weight."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(6, 4, bias=False)
    wanted = torch.randn(4, 6, generator=generator)
    layer = Adapted(base)
    pair = Pair(torch.randn(4, 6, generator=generator) * 0.4, torch.zeros(4, 4), alpha=8, rslora=False)
    layer.pairs["default"], layer.choice = pair, "default"
    x = torch.randn(64, 6, generator=generator)
    optimizer = torch.optim.LBFGS(pair.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (layer(x) - base(x).detach() - x @ wanted.T).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(pair.delta(), wanted, atol=1e-3, rtol=1e-3)


def test_faults_are_told() -> None:
    with pytest.raises(UserError, match=r"no linear layer is called 'qproj'.*There are: down_proj"):
        add_lora(model(), LoRA(targets=("qproj",)), seed=0)
    with pytest.raises(UserError, match="experts of this model are stacked"):
        add_lora(model("mixtral"), LoRA(targets=("gate_proj",)), seed=0)
    with pytest.raises(UserError, match="no linear layer is called 'lm_head'"):
        add_lora(model(), LoRA(targets=("lm_head",)), seed=0)
    with pytest.raises(UserError, match="no module with parameters is called 'score'"):
        add_lora(model(), LoRA(train_also=("score",)), seed=0)
    with pytest.raises(UserError, match="can't be adapted and trained whole"):
        add_lora(model(), LoRA(train_also=("q_proj",)), seed=0)
    with pytest.raises(UserError, match="can't be called 'a b'"):
        add_lora(model(), LoRA(), seed=0, name="a b")
    decoder = model()
    add_lora(decoder, LoRA(), seed=0)
    with pytest.raises(UserError, match="'default' on this model already"):
        add_lora(decoder, LoRA(), seed=0)
    with pytest.raises(UserError, match=r"no adapter 'x'.*It has: default"):
        use_adapter(decoder, "x")
    quantised = model()
    quantize_linears(quantised, "int8")
    add_lora(quantised, LoRA(), seed=0)
    with pytest.raises(UserError, match="quantised base"):
        merge(quantised)
