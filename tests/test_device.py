"""What each stage must do on any device: learn with the gradients of a CPU, and sample.

The device is that of the `device` fixture, so on a machine with a GPU these are tests of the GPU.
What only a GPU can do is in test_gpu.py.
"""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from tests.factories import STAGES, on, randomise, tiny_batch, tiny_stage
from unclip_pl.diffusion.noise import Noise
from unclip_pl.training.ema import EMA

pytestmark = pytest.mark.timeout(120)


STEPS = 50


def gradients(stage: torch.nn.Module, name: str, device: str) -> dict[str, torch.Tensor]:
    """Gradients of the loss of one batch, the same noise each time; on the CPU."""
    stage = stage.to(device).train()
    loss = stage.loss(on(tiny_batch(name), device), torch.Generator().manual_seed(3))["loss"]
    loss.backward()
    grads = {key: p.grad.cpu() for key, p in stage.named_parameters() if p.grad is not None}
    return grads | {"loss": loss.detach().cpu()}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("name", STAGES)
def test_gradients_are_those_of_the_cpu_without_checkpointing(
    name, checkpointing, device, exact_float32
):
    plain = tiny_stage(name)
    randomise(plain)
    stage = tiny_stage(name, checkpointing)
    stage.load_state_dict(plain.state_dict())
    expected, actual = gradients(plain, name, "cpu"), gradients(stage, name, device)
    assert actual.keys() == expected.keys() and len(actual) > 10
    for key, value in expected.items():
        assert (value - actual[key]).norm() < 2e-4 * value.norm() + 1e-6, key


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_learns_a_batch_by_heart(name, precision, device, tmp_path):
    """Noise and timesteps differ at each step, so means of many losses are compared."""
    stage, losses = tiny_stage(name, dropout=0.1, parametrization="eps"), []
    batch = tiny_batch(name)

    class Diary(EMA):
        def on_train_batch_end(self, trainer, pl_module, outputs, *rest):
            losses.append(outputs["loss"].detach())
            super().on_train_batch_end(trainer, pl_module, outputs, *rest)

    trainer = Trainer(
        max_steps=STEPS,
        accelerator=device,
        devices=1,
        precision=precision,
        callbacks=[Diary(0.9)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(stage, DataLoader([batch] * STEPS, batch_size=None))
    curve = torch.stack(losses).float()
    assert curve.isfinite().all() and not stage.skipped_steps.item()
    assert curve[-15:].mean() < 0.75 * curve[:3].mean()
    assert all(parameter.dtype == torch.float32 for parameter in stage.parameters())


@pytest.mark.parametrize("name", STAGES)
def test_a_drawing_on_the_device_is_that_of_the_cpu(name, device, exact_float32):
    stage = tiny_stage(name).eval()
    randomise(stage)
    drawn = []
    for where in ("cpu", device):
        batch = on(tiny_batch(name, 2), where)
        batch.pop("image", None)
        drawn.append(stage.to(where).sample(batch, Noise([4, 9])).cpu())
    assert drawn[0].isfinite().all()
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-3, atol=2e-3)
