"""Muon next to torch's own for matrices, an exact SVD for kernels, torch's AdamW for the rest."""

import pytest
import torch
from torch import nn

from tests.factories import tiny_batch, tiny_stage
from unclip_pl.optim.muon import Muon, hidden_weights, orthogonalized
from unclip_pl.stages.base import OptimizerConfig


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 6, 6)])
def test_the_update_is_near_the_orthogonal_factor_of_the_svd(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    update = orthogonalized(matrices)
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    exact = u @ vh
    assert torch.linalg.svdvals(update.float()).sub(1).abs().max() < 0.4
    cosine = (update * exact).sum((1, 2)) / update.norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert cosine.min() > 0.97


def test_matrices_move_as_under_torch_s_own_muon() -> None:
    torch.manual_seed(0)
    start = [torch.randn(6, 12), torch.randn(12, 6)]
    ours, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    a = Muon([{"params": ours, "muon": True, "lr": 0.02}], weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, s in zip(ours, theirs, start):
        assert (p - q).norm() < 0.05 * (q - s).norm()  # torch's iterates in bfloat16


def test_the_other_weights_move_as_under_torch_s_adamw() -> None:
    ours, theirs = nn.Parameter(torch.randn(5)), nn.Parameter(torch.zeros(5))
    theirs.data.copy_(ours.data)
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    a, b = Muon([{"params": [ours]}], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        ours.grad = torch.randn(5)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_kernel_moves_as_its_matrix_and_a_step_that_is_not_finite_changes_nothing() -> None:
    kernel = nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    optimizers = [Muon([{"params": [p], "muon": True, "lr": 0.1}]) for p in (kernel, matrix)]
    grad = torch.randn(4, 27)
    kernel.grad, matrix.grad = grad.view(4, 3, 3, 3).clone(), grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=1e-3, atol=1e-4)
    before = kernel.detach().clone()
    optimizers[0].found_inf = torch.ones(())
    kernel.grad = torch.full_like(kernel, float("nan"))
    optimizers[0].step()
    assert torch.equal(kernel, before)


def test_hidden_weights_are_only_those_of_blocks() -> None:
    decoder = tiny_stage("decoder")
    hidden = {id(p) for p in hidden_weights(decoder)}
    named = {name for name, p in decoder.named_parameters() if id(p) in hidden}
    assert any(name.endswith("conv1.weight") for name in named)
    outer = ("net.conv_in", "net.conv_out", "net.time_embed", "null_", "norm")
    assert not [n for n in named if n.startswith(outer) or ".norm" in n or n.endswith("bias")]


@pytest.mark.parametrize("name", ["decoder", "diffusion_prior", "upsampler"])
def test_a_stage_learns_by_muon(name: str) -> None:
    stage = tiny_stage(name)
    stage.optimizer_config = OptimizerConfig(name="muon", lr=2e-3, muon_lr=0.01, warmup_steps=0)
    optimizer = stage.configure_optimizers()["optimizer"]
    batch, losses = tiny_batch(name), []
    for _ in range(30):
        loss = stage.loss(batch, torch.Generator().manual_seed(1))["loss"]
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
