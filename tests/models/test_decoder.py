"""Fresh weights, and the counts that a plan is made from."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ownlm.models.decoder import Decoder, count_parameters, uniform
from ownlm.models.specs import Attention, FeedForward, Norm, Rotary
from ownlm.train.fresh import init_weights
from ownlm.train.plan import flops_per_token

ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True)
PARTS: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_layers": 3, "max_tokens": 16, "attention": ATTENTION,
    "mlp": FeedForward(size=40), "rotary": Rotary(),
}  # fmt: skip
CONFIG = uniform(**PARTS)


def weights(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_equal_seeds_give_equal_weights() -> None:
    first, second, other = (weights(init_weights(Decoder(CONFIG), seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])
    rounded = weights(init_weights(Decoder(CONFIG).to(torch.bfloat16), seed=1))
    assert all(torch.equal(first[name].bfloat16(), rounded[name]) for name in first)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_model_predicts_nearly_uniformly(tied: bool) -> None:
    model = init_weights(Decoder(replace(CONFIG, tie_embeddings=tied)))
    logits = model.logits(model(torch.randint(0, 61, (4, 16))))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 61, (64,)))
    assert abs(loss.item() - torch.tensor(61.0).log().item()) < 0.05


def test_every_weight_gets_a_gradient() -> None:
    for config in (CONFIG, uniform(**PARTS | {"rotary": None, "norm": Norm(kind="layer"), "tie_embeddings": True})):
        model = init_weights(Decoder(config), zero_output=False)
        model.logits(model(torch.randint(0, 61, (4, 16)))).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            # Softmax is blind to what is added to all scores of a query; with q and k normalised nothing else is zero.
            assert parameter.grad.abs().sum() > 0, name


def test_zero_output_is_the_identity() -> None:
    model = init_weights(Decoder(CONFIG))
    ids = torch.randint(0, 61, (1, 16))
    assert torch.equal(model(ids), model.norm(model.embed_tokens(ids)))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"rotary": None}, {"norm": Norm(kind="layer")}])
def test_count_parameters(changes: dict[str, object]) -> None:
    config = uniform(**PARTS | changes)
    assert count_parameters(config) == sum(p.numel() for p in Decoder(config).parameters())


def test_flops_against_a_count_of_matrix_products() -> None:
    """Forward is a third; a row shorter than a tile forms its scores for all keys, twice the causal average."""
    from torch.utils.flop_counter import FlopCounterMode

    model, rows = init_weights(Decoder(CONFIG)), 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.randint(0, 61, (1, rows))))
    a = ATTENTION
    unseen = 2 * CONFIG.num_layers * a.num_heads * a.head_dim * rows
    assert counter.get_total_flops() / rows == pytest.approx(flops_per_token(CONFIG, rows) / 3 + unseen, rel=1e-6)


def test_a_distance_is_all_that_rotation_sees() -> None:
    model = init_weights(Decoder(CONFIG), zero_output=False)
    ids = torch.randint(0, 61, (1, 12))
    positions = torch.arange(12)[None]
    with torch.no_grad():
        near, far = (model(ids, positions_BT=positions + shift) for shift in (0, 1000))
    assert torch.allclose(near, far, atol=1e-4)
