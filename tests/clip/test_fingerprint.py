"""Fingerprints: rounding passes, another CLIP is refused and named."""

import base64
import json

import numpy as np
import pytest

from tests.clip.tiny import MODEL, PREPROCESS, write_clip
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.fingerprint import ClipMismatch, require_same
from unclip_pl.clip.frozen import FrozenCLIP


def test_fingerprint_is_plain_json_and_names_the_clip(tiny, clip):
    print_ = clip.fingerprint()
    again = json.loads(json.dumps(print_))
    assert again == print_ and len(json.dumps(print_)) < 3000
    assert CLIPConfig.of_fingerprint(again) == CLIPConfig(tiny)
    embedding = np.frombuffer(base64.b64decode(print_["text"]), "<f2")
    assert embedding.shape == (24,) and (
        print_["embed_dim"],
        print_["states_width"],
        print_["context_length"],
        print_["image_size"],
    ) == (24, 32, 16, 32)
    require_same(again, clip.fingerprint(), "The store")


@pytest.mark.parametrize("gain", [1.0, 3.0])
@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "fp16"])
def test_fingerprint_lets_rounding_and_another_folder_through(tmp_path, precision, gain):
    theirs, ours = (
        write_clip(tmp_path / "here", gain=gain),
        write_clip(tmp_path / "there", gain=gain),
    )
    require_same(
        FrozenCLIP(CLIPConfig(theirs)).fingerprint(),
        FrozenCLIP(CLIPConfig(ours, precision=precision)).fingerprint(),
        "The store",
    )


@pytest.mark.parametrize(
    "change, word",
    [
        ({"seed": 1}, "weights"),
        ({"gain": 1.1}, "weights"),
        ({"model_cfg": MODEL | {"quick_gelu": True}}, "activation (GELU there, QuickGELU here)"),
        ({"preprocess": PREPROCESS | {"mean": [0.48, 0.4, 0.3]}}, "preprocessing (mean)"),
        (
            {"preprocess": PREPROCESS | {"std": [0.5, 0.4, 0.29], "resize_mode": "squash"}},
            "preprocessing (std, resize_mode)",
        ),
        ({"model_cfg": MODEL | {"embed_dim": 16}}, "embed dim (24 there, 16 here)"),
        (
            {"model_cfg": MODEL | {"text_cfg": MODEL["text_cfg"] | {"context_length": 20}}},
            "context length",
        ),
    ],
)
def test_another_clip_is_refused_by_name_and_by_what_differs(tmp_path, clip, change, word):
    other = write_clip(tmp_path / "other", **change)
    with pytest.raises(ClipMismatch) as caught:
        require_same(
            clip.fingerprint(), FrozenCLIP(CLIPConfig(other)).fingerprint(), "The store /data"
        )
    message = str(caught.value)
    assert message.startswith("The store /data was made with the CLIP local-dir:")
    assert other in message
    assert word in message
    assert message.count("differs") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"preprocess": PREPROCESS | {"mean": [0.2, 0.4, 0.3]}},
        {"preprocess": PREPROCESS | {"resize_mode": "squash"}},
    ],
)
def test_preprocessing_shows_in_behaviour_too(tmp_path, clip, change):
    ours = FrozenCLIP(CLIPConfig(write_clip(tmp_path / "other", **change))).fingerprint()
    with pytest.raises(ClipMismatch, match="image embedding"):
        require_same(
            clip.fingerprint(),
            ours | {"preprocessing": clip.fingerprint()["preprocessing"]},
            "The store",
        )


def test_damaged_fingerprints_are_refused(clip):
    good = clip.fingerprint()
    nan = base64.b64encode(np.full(24, np.nan, "<f2").tobytes()).decode()
    with pytest.raises(ClipMismatch, match="incomplete"):
        require_same({k: v for k, v in good.items() if k != "image"}, good, "The store")
    with pytest.raises(ClipMismatch, match="weights"):
        require_same(good | {"image": nan}, good, "The store")
