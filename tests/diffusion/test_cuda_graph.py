"""A recorded denoising step gives what the plain one gives; elsewhere nothing is recorded."""

import pytest
import torch

from unclip_pl.diffusion.cuda_graph import CUDAGraphPredict
from unclip_pl.diffusion.process import Prediction

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def predictor(weight: torch.Tensor):
    def predict(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        x0 = torch.tanh(x @ weight) + t[:, None] / 1000
        return Prediction(x0, x - x0, x0.square())

    return predict


def test_on_a_cpu_every_step_is_computed_plainly():
    predict = CUDAGraphPredict(predictor(torch.randn(4, 4)))
    for step in range(4):
        x, t = torch.randn(2, 4), torch.full((2,), step)
        for ours, plain in zip(predict(x, t), predict.predict(x, t), strict=True):
            assert torch.equal(ours, plain)
    assert predict.graph is None


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_later_steps_come_from_the_recording(dtype):
    weight = torch.randn(256, 256, device="cuda")
    predict = CUDAGraphPredict(predictor(weight))
    before = []
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for step in range(6):
            x, t = torch.randn(2, 256, device="cuda"), torch.full((2,), step, device="cuda")
            ours, plain = predict(x, t), predict.predict(x, t)
            for a, b in zip(ours, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
            before.append((ours.x0, plain.x0))
        assert predict.graph is not None
        for ours, plain in before:  # later replays do not overwrite what was returned
            torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-2)


@needs_gpu
def test_on_a_gpu_other_shapes_and_gradients_are_computed_plainly():
    predict = CUDAGraphPredict(predictor(torch.randn(8, 8, device="cuda")))
    t = torch.zeros(2, dtype=torch.int64, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            predict(torch.randn(2, 8, device="cuda"), t)
        assert predict.graph is not None
        assert predict(torch.randn(1, 8, device="cuda"), t[:1]).x0.shape == (1, 8)
    x = torch.randn(2, 8, device="cuda", requires_grad=True)
    predict(x, t).x0.sum().backward()
    assert x.grad.any()
