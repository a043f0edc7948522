import pytest
import torch

from ownlm.models.decoder import Decoder
from ownlm.train.fresh import init_weights
from ownlm.train.optimizers import Optimizer, Update, orthogonalize
from ownlm.train.parameters import Parameters
from ownlm.train.schedule import Schedule, factor
from train.worlds import SHAPE


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 8), (2, 8, 24)])
def test_orthogonalize_finds_the_nearest_orthogonal_matrix(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices, torch.float32)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.2
    cosine = (found * (u @ vh)).sum((1, 2)) / (found.norm(dim=(1, 2)) * (u @ vh).norm(dim=(1, 2)))
    assert cosine.min() > 0.97


def test_a_batch_of_matrices_is_the_same_as_one_by_one() -> None:
    matrices = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([orthogonalize(matrix[None], torch.float32) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices, torch.float32), alone, rtol=1e-4, atol=1e-5)


def test_adamw_over_flat_buffers_equals_torch() -> None:
    ours, theirs = (init_weights(Decoder(SHAPE.config(32, 16)), seed=1) for _ in range(2))
    settings = Optimizer(
        kind="adamw", lr=1e-2, embedding_lr=1e-2, head_lr=1e-2, vector_lr=1e-2, weight_decay=0.1, eps=1e-8, clip=None
    )
    parameters = Parameters(ours, torch.float32)
    update = Update(settings, parameters, torch.float32)
    matrices = [p for name, p in theirs.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in theirs.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=settings.betas, eps=1e-8)
    tokens = torch.arange(16).view(1, 16)
    for number in range(4):
        for model in (ours, theirs):
            model.logits(model(tokens)).square().mean().backward()
        parameters.collect()
        update.step(number, 1.0, parameters.norm())
        reference.step()
        reference.zero_grad()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_the_flat_buffers_hold_every_parameter_once_and_the_model_sees_updates() -> None:
    model = init_weights(Decoder(SHAPE.config(32, 16)), seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = Parameters(model, torch.bfloat16)
    assert sorted(parameters.places) == sorted(before)
    assert sum(group.stop - group.start for group in parameters.groups) == len(parameters.master)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    parameters.master.mul_(2)
    parameters.publish()
    parameters.release(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name] * 2), name


def test_the_gradient_is_clipped() -> None:
    model = init_weights(Decoder(SHAPE.config(32, 16)), seed=1)
    parameters = Parameters(model, torch.float32)
    settings = Optimizer(kind="adamw", lr=0, embedding_lr=0, head_lr=0, vector_lr=0, betas=(0.0, 0.0), clip=1.0)
    update = Update(settings, parameters, torch.float32)
    parameters.gradient.fill_(3.0)
    update.step(0, 1.0, parameters.norm())
    assert update.moments["first"].norm().item() == pytest.approx(1.0, rel=1e-4)


def test_schedules() -> None:
    wsd = Schedule(kind="wsd", warmup=0.1, decay=0.5, floor=0.1)
    values = [factor(wsd, step, 100) for step in range(100)]
    assert values[0] == pytest.approx(1 / 11)
    assert values[20] == values[49] == 1.0
    assert values[99] == pytest.approx(0.1 + 0.9 / 50)
    cosine = [factor(Schedule(kind="cosine", warmup=0.0), step, 100) for step in range(100)]
    assert cosine[0] == 1.0
    assert cosine[50] == pytest.approx(0.5)
    assert 0 < cosine[99] < 0.01
