"""A pipeline with a tiny decoder, and one whose decoder is the optimum for Gaussian pixels."""

import pytest
import torch

from tests.factories import package_decoder
from tests.manipulate.pictures import SPREAD
from unclip_pl.diffusion.process import Prediction
from unclip_pl.pipeline.unclip import UnCLIP


@pytest.fixture(scope="module")
def unclip():
    return UnCLIP(package_decoder())


@pytest.fixture
def gaussian(unclip, monkeypatch):
    """An UnCLIP whose decoder is the best there is for pixels of N(0, SPREAD^2)."""
    process = unclip.decoder.process

    def predict(x, t):
        abar = process.schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        x0 = abar.sqrt() * SPREAD**2 / (abar * SPREAD**2 + 1 - abar) * x
        log_variance = process.log_variance(torch.zeros_like(x), t, 4)
        return Prediction(x0, process.x0_to_eps(x0, x, t), log_variance)

    monkeypatch.setattr(unclip.decoder, "predictor", lambda *_: predict)
    return unclip
