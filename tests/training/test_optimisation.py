"""What `Stage` does around a step: learning rate, clipping, steps that are not finite, seeds."""

import math

import pytest
import torch
from lightning.pytorch import Callback

from tests.training.toy import Toy, loader, trainer
from unclip_pl.stages import base
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.optimization import build_optimizer
from unclip_pl.stages.settings import as_config, plain
from unclip_pl.utils.errors import SharedError, UserError


class Watch(Callback):
    def __init__(self):
        self.freed, self.rates, self.weights, self.draws = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_start(self, *_):
        self.draws.append(torch.rand(()).item())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.freed.append(all(p.grad is None for p in pl_module.parameters()))
        self.weights.append(pl_module.net.weight.detach().clone())


def test_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    module, watch = Toy(), Watch()
    trainer(tmp_path, watch, steps=6).fit(module, loader(bad=9))  # in the third batch of four
    assert module.skipped_steps == 1
    assert torch.equal(watch.weights[2], watch.weights[1])
    assert not torch.equal(watch.weights[3], watch.weights[2])
    assert all(torch.isfinite(weight).all() for weight in watch.weights)


def test_a_run_of_which_every_step_is_skipped_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "MAX_SKIPPED_STEPS", 10)
    module = Toy(optimizer=OptimizerConfig(lr=0.1, warmup_steps=2))
    flaw = SpoilFrom(module, 5)
    with pytest.raises(SharedError, match="last 10 steps were all skipped"):
        trainer(tmp_path, flaw, steps=99).fit(module, loader())
    assert 15 <= module.global_step <= 30
    often = Toy()  # half of the steps count
    trainer(tmp_path, steps=40).fit(often, loader(bad=3, size=8))
    assert often.skipped_steps == 20


class SpoilFrom(Callback):
    """Makes a weight infinite before a step, as a step that was too long does."""

    def __init__(self, module: Toy, step: int):
        self.module, self.step = module, step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            with torch.no_grad():
                self.module.net.weight.fill_(torch.inf)


def test_muon_without_weights_that_it_trains_is_a_sentence():
    with pytest.raises(UserError, match="the Toy has none: set it to adamw"):
        build_optimizer(Toy(), OptimizerConfig(name="muon"))


def test_gradients_are_clipped_to_the_norm(tmp_path):
    module = Toy(optimizer=OptimizerConfig(lr=0.0, clip_norm=0.01, warmup_steps=1))
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module.log_dict = lambda *_, **__: None
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.configure_gradient_clipping(optimizer)
    norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
    assert abs(norm.item() - 0.01) < 1e-5


def test_gradients_do_not_outlive_the_step_that_used_them(tmp_path):
    watch = Watch()
    trainer(tmp_path, watch, steps=3, accumulate_grad_batches=2).fit(Toy(), loader())
    assert watch.freed == [False, True] * 3
    # The initial weights, and those after each step.
    assert len({weight.sum().item() for weight in watch.weights}) == 4


def test_rate_rises_linearly_then_falls_as_a_half_cosine(tmp_path):
    watch = Watch()
    module = Toy(optimizer=OptimizerConfig(lr=1.0, warmup_steps=4, decay="cosine"))
    trainer(tmp_path, watch, steps=12).fit(module, loader())
    expected = [0.25, 0.5, 0.75, 1.0]
    expected += [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert watch.rates == pytest.approx(expected)


def test_cosine_without_an_end_is_a_sentence(tmp_path):
    module = Toy(optimizer=OptimizerConfig(warmup_steps=100, decay="cosine"))
    endless = trainer(tmp_path, steps=-1, limit_train_batches=3)
    with pytest.raises(UserError, match="max_steps"):
        endless.fit(module, loader())
    assert endless.global_step == 0  # not at the end of the warm-up


def test_random_draws_depend_only_on_the_step(tmp_path):
    first, second = Watch(), Watch()
    torch.manual_seed(1)
    trainer(tmp_path, first, steps=5).fit(Toy(), loader())
    torch.manual_seed(2)
    trainer(tmp_path, second, steps=5).fit(Toy(), loader())
    # The callback draws before the stage seeds the step, so its draw k follows step k-1's noise.
    assert first.draws[1:] == second.draws[1:] and len(set(first.draws)) == 5


def test_gains_and_biases_are_not_decayed():
    for decay in (0.0, 0.5):
        stage = Toy(optimizer=OptimizerConfig(weight_decay=decay))
        groups = stage.configure_optimizers()["optimizer"].param_groups
        assert [group["weight_decay"] for group in groups] == [decay, 0.0]
        assert [len(group["params"]) for group in groups] == [1, 1]


def test_configs_survive_the_way_through_plain_values():
    config = OptimizerConfig(betas=(0.8, 0.9))
    assert as_config(OptimizerConfig, plain(config)) == config


@pytest.mark.parametrize(
    ("seed", "expected"),
    [(0, 65_537), (280_000_000, 280_000_000 * 1_000_003 * 65_537 + 65_537), (2**32 - 1, None)],
)
def test_every_seed_that_lightning_takes_gives_numbers_of_its_own(seed, expected, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
    stage = Toy()
    monkeypatch.setattr(Toy, "global_step", 1)
    stage.on_train_batch_start({}, 0)
    assert torch.initial_seed() > 0 if expected is None else torch.initial_seed() == expected
