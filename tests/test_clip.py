"""FrozenCLIP on tiny random models in local folders: against open_clip's own functions, without a network."""

import base64
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

import unclip_pl
from unclip_pl.clip import loading as _open_clip
from unclip_pl.clip.frozen import (
    CPU_BATCH,
    CLIPConfig,
    ClipMismatch,
    FrozenCLIP,
    build_clip,
    fitted,
    require_same,
    save_clip,
)
from unclip_pl.utils.errors import UserError

MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {
    "size": 32,
    "mode": "RGB",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.5, 0.4, 0.3],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
CAPTIONS = ["a cat", "a red apple on a very blue table, by a window", ""]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def written(
    folder: Path,
    seed: int = 0,
    model_cfg: dict = MODEL,
    kind: type = CLIP,
    preprocess: dict = PREPROCESS,
    gain: float = 1.0,
) -> str:
    torch.manual_seed(seed)
    model = kind(**{key: value for key, value in model_cfg.items() if key != "custom_text"})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(gain)
    save_clip(model, folder, model_cfg, preprocess)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return written(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def clip(tiny):
    return FrozenCLIP(CLIPConfig(tiny))


@pytest.fixture
def named(tmp_path, monkeypatch):
    """open_clip names "tiny" and "tiny-quickgelu", as long as the test runs."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(
        open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS)
    )
    for name, more in (("tiny", {}), ("tiny-quickgelu", {"quick_gelu": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps(MODEL | more))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    return tmp_path


def refusal(config: CLIPConfig, *words: str) -> str:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        FrozenCLIP(config).model
    message = str(caught.value)
    assert time.monotonic() - start < 60  # no waiting for a network
    assert message.endswith(".") and "\n" not in message and len(message) < 700, message
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize(
    "text",
    [
        {},
        {"pool_type": "eos", "eos_id": 49407},
        {"proj_bias": True},
        {"proj_type": "none", "width": 24},
        {"no_causal_mask": True},
    ],
)
def test_embedding_is_that_of_encode_text(tmp_path, kind, text):
    cfg = MODEL | {"text_cfg": MODEL["text_cfg"] | text}
    clip = FrozenCLIP(
        CLIPConfig(
            written(
                tmp_path / "c",
                model_cfg=cfg | ({"custom_text": True} if kind is CustomTextCLIP else {}),
                kind=kind,
            )
        )
    )
    tokens = clip.tokenize(CAPTIONS)
    got = clip.embed_text(tokens)
    with torch.no_grad():
        torch.testing.assert_close(got.embed, clip.model.encode_text(tokens))
        full = clip.tokenize(
            [*CAPTIONS, "word " * 100]
        )  # nothing to cut: the same arithmetic, bit for bit
        assert torch.equal(clip.embed_text(full).embed, clip.model.encode_text(full))
    assert type(clip.model) is kind
    assert got.states.shape == (3, 16, clip.states_width)
    assert got.embed.shape == (3, 24) == (3, clip.embed_dim)
    assert got.embed.dtype == got.states.dtype == torch.float32 and not got.embed.requires_grad
    assert not torch.allclose(got.embed.norm(dim=-1), torch.ones(3), atol=0.01)


def test_the_end_token_of_eos_pooling_need_not_be_the_highest(tmp_path):
    cfg = MODEL | {"text_cfg": MODEL["text_cfg"] | {"pool_type": "eos", "eos_id": 7}}
    clip = FrozenCLIP(CLIPConfig(written(tmp_path / "c", model_cfg=cfg)))
    tokens = torch.tensor([[49406, 500, 7] + [0] * 13, [49406, 900, 300, 200, 7] + [0] * 11])
    got = clip.embed_text(tokens)
    with torch.no_grad():
        torch.testing.assert_close(got.embed, clip.model.encode_text(tokens))
    assert got.mask.sum(-1).tolist() == [3, 5]


def test_states_up_to_the_end_token_do_not_depend_on_the_padding(clip):
    tokens = clip.tokenize(CAPTIONS)
    before = clip.embed_text(tokens)
    after = clip.embed_text(torch.where(before.mask, tokens, 123))
    assert torch.equal(before.embed, after.embed)
    assert torch.equal(before.states, after.states) and before.states[~before.mask].abs().max() == 0
    assert before.states[before.mask].abs().sum(-1).min() > 0
    assert (tokens[before.mask] == 49407).sum() == 3 and before.mask[:, 0].all()


def test_short_captions_run_through_as_many_positions_as_they_need(clip, monkeypatch):
    seen, plain = [], clip.model.transformer.forward
    monkeypatch.setattr(
        clip.model.transformer,
        "forward",
        lambda x, **kwargs: seen.append(x.shape[1]) or plain(x, **kwargs),
    )
    tokens = clip.tokenize(CAPTIONS)
    got = clip.embed_text(tokens)
    assert seen == [int(got.mask.sum(-1).max())] and seen[0] < 16
    for i in range(3):  # the neighbours do not matter
        torch.testing.assert_close(clip.embed_text(tokens[i : i + 1]).states[0], got.states[i])


def test_large_batches_keep_their_order(clip):
    """On a CPU they go through in parts, captions sorted by length."""
    count = 2 * CPU_BATCH + 3
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = clip.tokenize(["a " * (k * 7 % 13) + "cat" for k in range(count)])
    text = clip.embed_text(tokens)
    embeds = clip.embed_images(images)
    assert torch.equal(text.mask, clip.caption_mask(tokens))
    for k in (0, 1, CPU_BATCH, count - 1):
        alone = clip.embed_text(tokens[k : k + 1])
        torch.testing.assert_close(text.embed[k], alone.embed[0])
        torch.testing.assert_close(text.states[k], alone.states[0])
        torch.testing.assert_close(embeds[k], clip.embed_images(images[k : k + 1])[0])


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_states_of_short_captions_are_those_of_the_full_length(tmp_path, kind):
    cfg = MODEL | ({"custom_text": True} if kind is CustomTextCLIP else {})
    clip = FrozenCLIP(CLIPConfig(written(tmp_path / "c", model_cfg=cfg, kind=kind)))
    tokens = clip.tokenize(CAPTIONS)
    got = clip.embed_text(tokens)
    assert got.mask.sum(-1).max() < 16
    with torch.no_grad():
        full = clip.model.forward_intermediates(text=tokens, normalize_intermediates=True)
    torch.testing.assert_close(got.states[got.mask], full["text_intermediates"][-1][got.mask])


def test_long_captions_are_cut_and_keep_their_end_token(clip):
    tokens = clip.tokenize(["word " * 100])
    assert (
        tokens.shape == (1, clip.context_length) == (1, 16)
        and tokens.dtype == torch.int64
        and tokens[0, -1] == 49407
    )


def test_context_length_of_the_config_wins(tiny):
    short = FrozenCLIP(CLIPConfig(tiny, context_length=8))
    assert short.tokenize(CAPTIONS).shape == (3, 8)
    assert short.embed_text(short.tokenize(CAPTIONS)).states.shape == (3, 8, 32)


def test_image_embedding_is_that_of_open_clips_own_pipeline(tiny, clip):
    model, _, transform = open_clip.create_model_and_transforms(tiny)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        theirs = model.eval().encode_image(transform(Image.fromarray(pixels))[None])
    ours = clip.embed_images(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (20, 20), (90, 50), (50, 97), (31, 33)])
@pytest.mark.parametrize("mode", [{}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}])
def test_tensor_preprocessing_is_that_of_pil(size, mode):
    noise = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(noise, size, mode="bicubic").clamp(0, 1)
    pixels = (smooth[0] * 255).round().byte().permute(1, 2, 0).numpy()
    settings = PREPROCESS | mode | {"mean": [0.5] * 3, "std": [0.5] * 3}
    transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    theirs = transform(Image.fromarray(pixels))
    picture = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    ours = fitted(picture, 32, settings["resize_mode"], settings["interpolation"])[0]
    assert ours.shape == (3, 32, 32)
    difference = (ours - theirs).abs()
    # five levels of 255 where an overshoot is clipped between PIL's two passes, a third of a level
    # (its rounding) elsewhere
    assert difference.max() < 0.045 and difference.mean() < 0.003


def test_images_must_be_floats_of_three_channels(clip):
    for wrong in (
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(3, 32, 32),
        torch.zeros(1, 1, 32, 32),
    ):
        with pytest.raises(ValueError, match="give floats"):
            clip.embed_images(wrong)


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "fp16"])
def test_low_precision_and_autocast_give_float32_near_the_exact(tiny, clip, precision):
    low = FrozenCLIP(CLIPConfig(tiny, precision=precision))
    images, tokens = torch.rand(2, 3, 40, 40) * 2 - 1, clip.tokenize(CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [
            (low.embed_images(images), clip.embed_images(images)),
            (low.embed_text(tokens).embed, clip.embed_text(tokens).embed),
        ]
    assert torch.equal(pairs[0][1], clip.embed_images(images))  # autocast changes nothing
    for a, b in pairs:
        assert a.dtype == torch.float32 and torch.cosine_similarity(a, b).min() > 0.999


def test_similarity_is_the_cosine(clip):
    a, b = torch.randn(2, 24), torch.randn(3, 24)
    torch.testing.assert_close(
        clip.similarity(a, b), torch.cosine_similarity(a[:, None], b[None], dim=-1)
    )


def test_it_is_no_module_loads_late_and_pickles_without_weights(tiny, clip):
    late = FrozenCLIP(CLIPConfig("local-dir:/nowhere"))
    assert not isinstance(late, torch.nn.Module) and late.to("cpu") is late
    clip.model
    again = pickle.loads(pickle.dumps(clip))
    assert len(pickle.dumps(clip)) < 1000 and again.config == clip.config
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(again.embed_images(images), clip.embed_images(images))
    tokenizer_only = FrozenCLIP(CLIPConfig(tiny))
    tokenizer_only.tokenize(["a"])
    assert tokenizer_only._model is None
    assert not clip.model.training and not any(p.requires_grad for p in clip.model.parameters())


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
    theirs, ours = written(tmp_path / "here", gain=gain), written(tmp_path / "there", gain=gain)
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
    other = written(tmp_path / "other", **change)
    with pytest.raises(ClipMismatch) as caught:
        require_same(
            clip.fingerprint(), FrozenCLIP(CLIPConfig(other)).fingerprint(), "The store /data"
        )
    message = str(caught.value)
    assert (
        message.startswith("The store /data was made with the CLIP local-dir:")
        and other in message
        and word in message
        and message.count("differs") == 1
    )


@pytest.mark.parametrize(
    "change",
    [
        {"preprocess": PREPROCESS | {"mean": [0.2, 0.4, 0.3]}},
        {"preprocess": PREPROCESS | {"resize_mode": "squash"}},
    ],
)
def test_preprocessing_shows_in_behaviour_too(tmp_path, clip, change):
    ours = FrozenCLIP(CLIPConfig(written(tmp_path / "other", **change))).fingerprint()
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
    assert (
        model_cfg["text_cfg"]["vocab_size"] == 49408
        and model_cfg["text_cfg"]["context_length"] == 32
        and preprocess_cfg["size"] == 64
    )
    save_clip(model, tmp_path / "c", model_cfg, preprocess_cfg)
    assert sum(file.stat().st_size for file in (tmp_path / "c").iterdir()) <= 16e6
    clip = FrozenCLIP(CLIPConfig(f"local-dir:{tmp_path / 'c'}"))
    assert clip.embed_images(torch.zeros(1, 3, 64, 64)).shape == (1, 256) and clip.image_size == 64
    assert clip.tokenize(["a"]).shape == (1, 32)


def test_a_local_checkpoint_of_a_named_model(named, clip):
    weights = {f"module.{key}": value for key, value in clip.model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": weights}, named / "epoch_3.pt")
    local = FrozenCLIP(CLIPConfig("tiny", str(named / "epoch_3.pt")))
    tokens = local.tokenize(CAPTIONS)
    assert torch.equal(local.embed_text(tokens).embed, clip.embed_text(tokens).embed)


def test_openais_own_file_needs_quick_gelu_and_then_loads(named, clip):
    file = named / "OpenAI.pt"
    torch.jit.save(
        torch.jit.trace_module(clip.model, {"encode_image": torch.zeros(1, 3, 32, 32)}), file
    )
    refusal(CLIPConfig("tiny", str(file)), "QuickGELU", "use tiny-quickgelu")
    tokens = clip.tokenize(CAPTIONS)
    for config in (
        CLIPConfig("tiny-quickgelu", str(file)),
        CLIPConfig("tiny", str(file), force_quick_gelu=True),
    ):
        loaded = FrozenCLIP(config)
        assert loaded.fingerprint()["activation"] == "QuickGELU"
        assert not torch.equal(loaded.embed_text(tokens).embed, clip.embed_text(tokens).embed)
        assert all(
            torch.equal(a, b)
            for a, b in zip(loaded.model.state_dict().values(), clip.model.state_dict().values())
        )


def test_every_tag_with_the_wrong_activation_is_an_error_that_names_the_right_model():
    wrong = 0
    for name, tag in open_clip.list_pretrained():
        wants = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
        has = (
            open_clip.get_model_config(name).get("quick_gelu", False)
            if open_clip.get_model_config(name)
            else False
        )
        if wants and not has:
            wrong += 1
            with pytest.raises(
                UserError, match="QuickGELU.*(use .*-quickgelu|with force_quick_gelu)"
            ):
                _open_clip._checked(CLIPConfig(name, tag))
            _open_clip._checked(CLIPConfig(name, tag, force_quick_gelu=True))
        elif not wants and not has:
            with pytest.raises(UserError, match="GELU.*remove force_quick_gelu"):
                _open_clip._checked(CLIPConfig(name, tag, force_quick_gelu=True))
            _open_clip._checked(CLIPConfig(name, tag))
    assert wrong > 15


def test_wrong_activations_by_name():
    assert "use ViT-L-14-quickgelu" in refusal(CLIPConfig("ViT-L-14", "openai"))
    assert "use ViT-B-16-quickgelu" in refusal(CLIPConfig("ViT-B-16", "dfn2b"))
    assert "use ViT-B-32-quickgelu" in refusal(CLIPConfig("ViT-B-32", "metaclip-400m"))
    refusal(
        CLIPConfig("ViT-L-14-quickgelu", "laion2b_s32b_b82k"), "trained with GELU", "use ViT-L-14."
    )


def test_a_hub_file_given_by_its_path_is_known(named, tmp_path):
    folder = tmp_path / "models--timm--vit_large_patch14_clip_224.openai" / "snapshots" / "0"
    folder.mkdir(parents=True)
    (folder / "open_clip_model.safetensors").write_bytes(b"")
    refusal(
        CLIPConfig("ViT-L-14", str(folder / "open_clip_model.safetensors")),
        "use ViT-L-14-quickgelu",
    )


def test_without_network_it_says_where_to_put_the_files():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    refusal(
        CLIPConfig("ViT-B-32", "laion2b_s34b_b79k"),
        "could not be downloaded as HF_HUB_OFFLINE is set",
        "local-dir:",
        "huggingface.co/laion/CLIP-ViT-B-32",
    )


def test_names_that_do_not_exist(tmp_path):
    refusal(CLIPConfig("vit-l-14-quickgelo", "openai"), "did you mean ViT-L-14-quickgelu")
    refusal(CLIPConfig("zzzzzzzz", "openai"), "list_models")
    refusal(CLIPConfig(str(tmp_path), "openai"), f"a folder is given as local-dir:{tmp_path}")
    refusal(CLIPConfig("ViT-B-32", "opanai"), "neither a file nor a tag", "laion2b_s34b_b79k")
    refusal(CLIPConfig("ViT-B-32"), "needs weights", "laion2b_s34b_b79k")
    with pytest.raises(UserError, match="precision is fp8"):
        CLIPConfig(precision="fp8")


def test_folders_that_are_not_whole(tmp_path, tiny, monkeypatch):
    refusal(
        CLIPConfig(f"local-dir:{tmp_path}/none"),
        "no open_clip folder",
        "open_clip_model.safetensors",
    )
    refusal(CLIPConfig(tiny, "openai"), "brings its own weights")
    (tmp_path / "open_clip_config.json").write_text("{")
    refusal(CLIPConfig(f"local-dir:{tmp_path}"), "not JSON")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS})
    )
    refusal(CLIPConfig(f"local-dir:{tmp_path}"), "holds no weights")
    monkeypatch.setattr(_open_clip, "EMBEDDED", tmp_path)
    refusal(CLIPConfig(), "lightning fit -c stages/clip.yaml")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"garbage" * 100)
    refusal(CLIPConfig(f"local-dir:{tmp_path}"), "cannot be loaded", "right file")


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_files_of_garbage_and_of_code(named, monkeypatch, clip):
    monkeypatch.setenv("EVIL", str(named / "evil"))
    (named / "text.pt").write_bytes(b"not a checkpoint" * 100)
    (named / "empty.pt").write_bytes(b"")
    torch.save({"state_dict": {"logit_scale": torch.ones(())}}, named / "other.pt")
    torch.save({"state_dict": clip.model.state_dict(), "extra": Evil()}, named / "evil.pt")
    torch.save(clip.model, named / "whole.pt")
    for file in ("text.pt", "empty.pt", "other.pt"):
        refusal(
            CLIPConfig("tiny", str(named / file)), "cannot be loaded", file, "get the right file"
        )
    for file in ("evil.pt", "whole.pt"):
        refusal(CLIPConfig("tiny", str(named / file)), "Python objects that could run code")
    assert not (named / "evil").exists()
    refusal(CLIPConfig("tiny", str(named / "missing.pt")), "neither a file nor a tag")


@pytest.mark.parametrize(
    "text", [{"pool_type": "last"}, {"pool_type": "first"}, {"pool_type": "none"}]
)
def test_text_towers_without_an_end_token_are_refused(tmp_path, text):
    refusal(
        CLIPConfig(
            written(tmp_path / "c", model_cfg=MODEL | {"text_cfg": MODEL["text_cfg"] | text})
        ),
        "end token",
        "use another",
    )


def test_import_is_light_and_loading_silent(tiny):
    code = (
        "import logging, sys\n"
        "from unclip_pl.clip.frozen import CLIPConfig, FrozenCLIP\n"
        "assert not {'open_clip', 'torchvision', 'timm'} & set(sys.modules)\n"
        f"clip = FrozenCLIP(CLIPConfig({tiny!r}))\n"
        "clip.fingerprint()\n"
        "root = logging.getLogger()\n"
        "assert not root.handlers and root.level == logging.WARNING\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", code],
        cwd=Path(unclip_pl.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
