"""The image tower of FrozenCLIP: what open_clip's gives, from less where only the class token is read."""

import numpy as np
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from tests.test_clip import MODEL, PREPROCESS, written
from unclip_pl.clip import CLIPConfig, FrozenCLIP, fitted

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def towers(folder, vision: dict, kind: type) -> FrozenCLIP:
    cfg = MODEL | {"vision_cfg": MODEL["vision_cfg"] | vision}
    return FrozenCLIP(CLIPConfig(written(folder / "c", model_cfg=cfg | ({"custom_text": True} if kind is CustomTextCLIP else {}), kind=kind, gain=3.0)))


def operations(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize(("vision", "less"), [
    ({}, True), ({"layers": 1}, True), ({"ls_init_value": 0.5}, True), ({"no_ln_pre": True}, True), ({"final_ln_after_pool": True}, True),
    ({"pool_type": "avg"}, False), ({"attentional_pool": True, "attn_pooler_heads": 4}, False), ({"scale_heads": True, "block_type": "custom"}, False),
    ({"layers": [1, 1, 1, 1], "width": 16, "head_width": 8, "patch_size": None}, False),
])  # fmt: skip
def test_embedding_is_that_of_encode_image(tmp_path, vision, less, kind):
    clip = towers(tmp_path, vision, kind)
    cfg = clip.model.visual.preprocess_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    given = ((IMAGES + 1) / 2 - mean) / std
    with torch.no_grad():
        expected = clip.model.encode_image(given)
    got = clip.embed_images(IMAGES)
    assert got.dtype == torch.float32 and not got.requires_grad and got.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with torch.enable_grad():  # without gradients attention takes a fused path that the counter does not see
        assert (operations(lambda: clip._image_tower(given)) < operations(lambda: clip.model.encode_image(given))) == less


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (20, 20), (90, 50), (50, 97), (31, 33)])
@pytest.mark.parametrize("mode", [{}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}])
def test_tensor_preprocessing_is_that_of_pil(size, mode):
    noise = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(noise, size, mode="bicubic").clamp(0, 1)
    pixels = (smooth[0] * 255).round().byte().permute(1, 2, 0).numpy()
    theirs = image_transform_v2(PreprocessCfg(**(PREPROCESS | mode | {"mean": [0.5] * 3, "std": [0.5] * 3})), is_train=False)(Image.fromarray(pixels))
    picture = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    ours = fitted(picture, 32, mode.get("resize_mode", "shortest"), mode.get("interpolation", "bicubic"))[0]
    assert ours.shape == (3, 32, 32)
    difference = (ours - theirs).abs()
    # five levels of 255 where an overshoot is clipped between PIL's two passes, a third of a level (its rounding) elsewhere
    assert difference.max() < 0.045 and difference.mean() < 0.003
