"""AdamW with a state of 8 bits: bitsandbytes' own where it is, and a stand-in for what is ours."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.factories import tiny_batch, tiny_stage
from unclip_pl.optim.adamw8bit import adamw_8bit, bytes_8bit
from unclip_pl.stages.optimization import OptimizerConfig, build_optimizer
from unclip_pl.utils.errors import UserError

SETTINGS = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


class StandIn(torch.optim.Optimizer):
    """Goes down the gradient, and as bitsandbytes does, knows nothing of `found_inf`."""

    def __init__(self, params, lr, betas, eps, weight_decay):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])


@pytest.fixture
def stand_in(monkeypatch):
    """A bitsandbytes without its kernels."""
    optim = SimpleNamespace(AdamW8bit=StandIn)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)


def test_a_step_whose_gradients_are_not_finite_changes_nothing(stand_in):
    weight = nn.Parameter(torch.ones(3))
    optimizer = adamw_8bit([{"params": [weight]}], **SETTINGS)
    assert isinstance(optimizer, StandIn)

    def closure():
        assert torch.is_grad_enabled()
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer.found_inf = torch.ones(())
    assert optimizer.step(closure) == 3 and torch.equal(weight, torch.ones(3))
    optimizer.found_inf = torch.zeros(())
    assert optimizer.step(closure) == 3 and (weight < 1).all()


def test_groups_and_settings_reach_it(stand_in):
    stage = tiny_stage("diffusion_prior").to("meta")
    config = OptimizerConfig("adamw8bit", lr=3e-4, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    optimizer = build_optimizer(stage, config)
    matrices, vectors = optimizer.param_groups
    assert (matrices["lr"], matrices["betas"], matrices["eps"]) == (3e-4, (0.8, 0.9), 1e-6)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.2, 0.0)
    trained = {id(parameter) for parameter in stage.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained


def test_where_it_cannot_work_a_sentence_says_so(monkeypatch):
    stage = tiny_stage("decoder")
    with pytest.raises(UserError, match="needs a GPU"):
        build_optimizer(stage, OptimizerConfig("adamw8bit"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # not installed
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        build_optimizer(stage.to("meta"), OptimizerConfig("adamw8bit"))
    with pytest.raises(ValueError, match='use one of "adamw", "adamw8bit", "muon"'):
        OptimizerConfig("adamw4bit")


@pytest.mark.parametrize("name", ["decoder", "diffusion_prior"])
def test_a_stage_learns_by_it_and_goes_on_from_its_state(name, device):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes has the optimizer")
    stage = tiny_stage(name).to(device)
    groups = [{"params": list(stage.parameters())}]
    try:  # older versions have no kernels for a CPU
        optimizer = adamw_8bit(groups, **SETTINGS)
        batch, losses = tiny_batch(name), []
        batch = {key: v.to(device) if torch.is_tensor(v) else v for key, v in batch.items()}
        for step in range(30):
            loss = stage.loss(batch, torch.Generator().manual_seed(1))["loss"]
            losses.append(float(loss))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == 15:
                state = optimizer.state_dict()
                optimizer = adamw_8bit(groups, **SETTINGS)
                optimizer.load_state_dict(state)
    except (RuntimeError, NotImplementedError) as error:
        if device == "cpu":
            pytest.skip(f"this bitsandbytes does not work on a CPU: {error}")
        raise
    assert losses[-1] < 0.5 * losses[0]
    for parameter, state in optimizer.state.items():
        kept = ("state1", "state2", "absmax1", "absmax2")
        size = sum(state[key].nbytes for key in kept if key in state)
        assert size == bytes_8bit(parameter.numel())
