"""open_clip folders: written whole, read by stock open_clip."""

import open_clip
import pytest
import torch
from open_clip.model import CLIP

from tests.clip.tiny import MODEL, PREPROCESS
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.folder import build_clip, save_clip
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.errors import UserError


def test_saved_folder_is_loaded_by_stock_open_clip_in_float16(tmp_path):
    torch.manual_seed(0)
    model = CLIP(**MODEL).eval()
    save_clip(model, tmp_path / "c", MODEL, PREPROCESS, card="# A CLIP\n")
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [
        "README.md",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    assert (tmp_path / "c" / "open_clip_model.safetensors").stat().st_size < 2.1 * sum(
        p.numel() for p in model.parameters()
    )
    stock, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'c'}")
    assert all(
        torch.equal(a, b.half().float())
        for a, b in zip(stock.state_dict().values(), model.state_dict().values())
    )
    assert transform.transforms[-1].mean == PREPROCESS["mean"]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_saving_never_overwrites_and_refuses_what_is_not_finite(tmp_path, tiny):
    model = CLIP(**MODEL)
    with pytest.raises(UserError, match="exists already"):
        save_clip(model, tiny.removeprefix("local-dir:"), MODEL, PREPROCESS)
    with torch.no_grad():
        model.ln_final.weight[0] = 1e6
    with pytest.raises(UserError, match=r"not finite in float16 \(ln_final.weight\)"):
        save_clip(model, tmp_path / "c", MODEL, PREPROCESS)
    assert not list(tmp_path.iterdir())


def test_the_embedded_model_is_small_enough(tmp_path):
    model, model_cfg, preprocess_cfg = build_clip("openmoji")
    assert sum(p.numel() for p in model.parameters()) <= 7.8e6
    assert model_cfg["text_cfg"]["vocab_size"] == 49408
    assert model_cfg["text_cfg"]["context_length"] == 32
    assert preprocess_cfg["size"] == 64
    save_clip(model, tmp_path / "c", model_cfg, preprocess_cfg)
    assert sum(file.stat().st_size for file in (tmp_path / "c").iterdir()) <= 16e6
    clip = FrozenCLIP(CLIPConfig(f"local-dir:{tmp_path / 'c'}"))
    assert clip.embed_images(torch.zeros(1, 3, 64, 64)).shape == (1, 256) and clip.image_size == 64
    assert clip.tokenize(["a"]).shape == (1, 32)
