"""An upsampler may have a second network that draws the last step, as Karlo's has."""

import pytest
import torch

from tests.stages.test_upsampler import FLAT, pictures, reduced, speaking
from unclip_pl.diffusion.noise import Noise
from unclip_pl.stages.upsampler import Upsampler256, UpsamplingConfig
from unclip_pl.utils.errors import UserError


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver_pp"])
def test_a_second_network_draws_the_last_step_only(sampler):
    stage = speaking(Upsampler256(net=FLAT, last_net=True))
    settings, low_res = UpsamplingConfig(sampler, steps=4), torch.rand(1, 3, 4, 4)
    stage.last_net.load_state_dict(stage.net.state_dict())
    same = stage.sample({"low_res": low_res}, Noise([0]), settings)
    plain = speaking(Upsampler256(net=FLAT))
    plain.net.load_state_dict(stage.net.state_dict())
    assert torch.equal(plain.sample({"low_res": low_res}, Noise([0]), settings), same)
    seen = {"net": [], "last_net": []}
    for name, calls in seen.items():
        getattr(stage, name).register_forward_hook(
            lambda module, args, out, calls=calls: calls.append(int(args[1][0]))
        )
    torch.nn.init.normal_(stage.last_net.conv_out.weight, std=0.2)
    for _ in range(2):  # a second drawing begins with the first network again
        other = stage.sample({"low_res": low_res}, Noise([0]), settings)
    assert seen == {"net": [999, 666, 333] * 2, "last_net": [0] * 2}
    assert not torch.allclose(other, same)


def test_training_leaves_the_second_network_as_it_is():
    stage = speaking(Upsampler256(net=FLAT, last_net=True))
    image = pictures(2)
    stage.loss({"image": image, "low_res": reduced(image)})["loss"].backward()
    assert all(parameter.grad is not None for parameter in stage.net.parameters())
    assert all(parameter.grad is None for parameter in stage.last_net.parameters())
    with pytest.raises(UserError, match="model.last_net is true, and that network is not trained"):
        stage.on_fit_start()
    torch.nn.init.normal_(stage.last_net.conv_out.weight)
    stage.on_fit_start()
