"""Sharpness-aware minimisation: the closed form on a quadratic, and in the training of a CLIP, with
accumulation, clipping and gradients that are not finite."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from tests.stages.test_clip_stage import batch
from tests.training.toy import trainer
from unclip_pl.optim.sam import climb, descend
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.clip import CLIP

RHO = 0.1


def test_the_gradient_on_a_quadratic_is_the_closed_form():
    """L = w A w / 2 has the gradient A w, and A (w + rho A w / |A w|) with SAM."""
    torch.manual_seed(0)
    root = torch.randn(7, 7, dtype=torch.float64)
    matrix = root @ root.T
    parts = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (4, 3)]  # one vector
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    start = torch.cat([p.detach() for p in parts])

    def loss() -> torch.Tensor:
        w = torch.cat(parts)
        return w @ matrix @ w / 2

    before = climb(loss, [*parts, unused], RHO)
    assert all(p.grad is None for p in parts) and torch.equal(unused, torch.ones_like(unused))
    moved = torch.cat([p.detach() for p in parts]) - start
    torch.testing.assert_close(moved.norm(), torch.tensor(RHO, dtype=torch.float64))
    loss().backward()
    descend([*parts, unused], before)
    assert torch.equal(torch.cat([p.detach() for p in parts]), start)  # to the last bit
    uphill = matrix @ start
    expected = matrix @ (start + RHO * uphill / uphill.norm())
    torch.testing.assert_close(torch.cat([p.grad for p in parts]), expected)


def test_at_a_flat_point_or_a_broken_gradient_the_weights_come_back():
    w = nn.Parameter(torch.zeros(3))
    before = climb(lambda: w.square().sum(), [w], RHO)
    assert torch.equal(w, torch.zeros(3))  # nothing is uphill
    descend([w], before)
    before = climb(lambda: w.sum() * torch.nan, [w], RHO)
    assert w.isnan().all()  # so that the loss there is not finite, and the step is skipped
    descend([w], before)
    assert torch.equal(w, torch.zeros(3))


def test_under_autocast_the_moved_weights_are_used():
    """Autocast keeps bfloat16 copies of the weights, which must not be those from before."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    parameters, exact = list(layer.parameters()), nn.Linear(8, 8)
    exact.load_state_dict(layer.state_dict())
    climb(lambda: exact(x).square().sum(), list(exact.parameters()), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lambda: layer(x).float().square().sum()
        start = loss().item()
        before = climb(loss, parameters, 0.5)
        uphill = loss().item()
        descend(parameters, before)
        assert loss().item() == start
    assert uphill == pytest.approx(exact(x).square().sum().item(), rel=0.02)
    assert uphill > 1.2 * start


class Pairs(LightningDataModule):
    """Batches of pairs, in this order."""

    image_size = 64

    def __init__(self, batches: list[dict]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)


def stage(sam_rho: float, clip_norm: float = 1e9) -> CLIP:
    torch.manual_seed(0)
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=1, clip_norm=clip_norm)
    return CLIP(augment=0.0, sam_rho=sam_rho, optimizer=optimizer)


def gradients(model: CLIP, batches: list[dict], tmp_path) -> torch.Tensor:
    """The gradient of the first step of a run that accumulates all batches."""
    seen: list[torch.Tensor] = []
    step = torch.optim.AdamW.step

    def watched(optimizer, closure=None):
        closure()
        seen.append(torch.cat([p.grad.flatten() for p in model.net.parameters()]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        run = trainer(tmp_path, steps=1, accumulate_grad_batches=len(batches))
        run.fit(model, datamodule=Pairs(batches))
    assert torch.optim.AdamW.step is step
    return seen[0]


def by_hand(batches: list[dict], rho: float = RHO) -> torch.Tensor:
    """The mean over batches of the gradient at each batch's own w + rho g / |g|."""
    total = 0
    for pairs in batches:
        model = stage(0.0)
        parameters = list(model.net.parameters())
        uphill = torch.autograd.grad(model.contrast(pairs), parameters)
        norm = torch.cat([g.flatten() for g in uphill]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, uphill):
                parameter += rho * gradient / norm
        sharp = torch.autograd.grad(model.contrast(pairs), parameters)
        total = total + torch.cat([g.flatten() for g in sharp]) / len(batches)
    return total


def batches(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    noise = [torch.rand(6, 3, 64, 64, generator=generator) for _ in range(count)]
    return [batch() | {"image": 2 * image - 1} for image in noise]


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_steps_by_the_gradient_uphill_whatever_it_accumulates(count, tmp_path):
    pairs, model = batches(count), stage(RHO)
    before = [p.detach().clone() for p in model.net.parameters()]
    actual, expected = gradients(model, pairs, tmp_path), by_hand(pairs)
    assert (actual - expected).norm() < 1e-3 * expected.norm()
    assert (actual - by_hand(pairs, 0.0)).norm() > 0.01 * actual.norm()  # it is another gradient
    after = list(model.net.parameters())  # nobody stepped
    assert all(torch.equal(*pair) for pair in zip(before, after))


def test_both_passes_drop_the_same_patches(tmp_path):
    """What the climb draws at random the step draws as well, and the next batch draws other."""
    model, contrast, drawn = stage(RHO), CLIP.contrast, []

    def watched(batch, rank=0, world=1):
        drawn.append(torch.rand(1).item())
        return contrast(model, batch, rank, world)

    model.contrast = watched
    trainer(tmp_path, steps=2).fit(model, datamodule=Pairs(batches(2)))
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3] and len(drawn) == 4


def test_the_gradient_uphill_is_clipped(tmp_path):
    pairs, limit = batches(1), 0.01
    clipped, whole = gradients(stage(RHO, limit), pairs, tmp_path), by_hand(pairs)
    assert whole.norm() > 2 * limit
    assert (clipped - whole * limit / whole.norm()).norm() < 1e-3 * limit


def test_a_batch_that_is_not_finite_is_skipped_and_leaves_the_weights(tmp_path):
    model, pairs = stage(RHO), batches(1)
    pairs[0]["image"][0, 0, 0, 0] = torch.nan
    before = [p.detach().clone() for p in model.net.parameters()]
    trainer(tmp_path, steps=1).fit(model, datamodule=Pairs(pairs))
    assert model.skipped_steps == 1
    assert all(torch.equal(*pair) for pair in zip(before, model.net.parameters()))


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_an_impossible_rho_is_a_sentence(rho):
    with pytest.raises(ValueError, match="sam_rho"):
        CLIP(sam_rho=rho)
