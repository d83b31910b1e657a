"""FrozenCLIP on tiny random models: against open_clip's own functions."""

import pickle

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from tests.clip.tiny import CAPTIONS, MODEL, PREPROCESS, write_clip
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import CPU_BATCH, FrozenCLIP, resize_and_crop
from unclip_pl.clip.loading import tokenize_bpe


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
    if kind is CustomTextCLIP:
        cfg |= {"custom_text": True}
    clip = FrozenCLIP(CLIPConfig(write_clip(tmp_path / "c", model_cfg=cfg, kind=kind)))
    tokens = clip.tokenize(CAPTIONS)
    got = clip.embed_text(tokens)
    with torch.no_grad():
        torch.testing.assert_close(got.embed, clip.model.encode_text(tokens))
        # nothing to cut: the same arithmetic, bit for bit
        full = clip.tokenize([*CAPTIONS, "word " * 100])
        assert torch.equal(clip.embed_text(full).embed, clip.model.encode_text(full))
    assert type(clip.model) is kind
    assert got.states.shape == (3, 16, clip.states_width)
    assert got.embed.shape == (3, 24) == (3, clip.embed_dim)
    assert clip.vocab_size == MODEL["text_cfg"]["vocab_size"]
    assert got.embed.dtype == got.states.dtype == torch.float32 and not got.embed.requires_grad
    assert not torch.allclose(got.embed.norm(dim=-1), torch.ones(3), atol=0.01)


def test_the_end_token_of_eos_pooling_need_not_be_the_highest(tmp_path):
    cfg = MODEL | {"text_cfg": MODEL["text_cfg"] | {"pool_type": "eos", "eos_id": 7}}
    clip = FrozenCLIP(CLIPConfig(write_clip(tmp_path / "c", model_cfg=cfg)))
    tokens = torch.tensor([[49406, 500, 7] + [0] * 13, [49406, 900, 300, 200, 7] + [0] * 11])
    got = clip.embed_text(tokens)
    with torch.no_grad():
        torch.testing.assert_close(got.embed, clip.model.encode_text(tokens))
    assert got.mask.sum(-1).tolist() == [3, 5]


def test_a_caption_cannot_hold_marks_of_the_tokenizer(clip):
    for mark in ("<end_of_text>", "<START_of_text>", "&lt;end_of_text&gt;"):
        caption = [f"a cat {mark} on a mat"]
        for tokens in (clip.tokenize(caption)[0], tokenize_bpe(caption, 16)[0]):
            used = tokens[: int(tokens.argmax()) + 1].tolist()
            assert used.count(49406) == used.count(49407) == 1 and len(used) > 8


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
    clip = FrozenCLIP(CLIPConfig(write_clip(tmp_path / "c", model_cfg=cfg, kind=kind)))
    tokens = clip.tokenize(CAPTIONS)
    got = clip.embed_text(tokens)
    assert got.mask.sum(-1).max() < 16
    with torch.no_grad():
        full = clip.model.forward_intermediates(text=tokens, normalize_intermediates=True)
    torch.testing.assert_close(got.states[got.mask], full["text_intermediates"][-1][got.mask])


def test_long_captions_are_cut_and_keep_their_end_token(clip):
    tokens = clip.tokenize(["word " * 100])
    assert tokens.shape == (1, clip.context_length) == (1, 16)
    assert tokens.dtype == torch.int64 and tokens[0, -1] == 49407


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
    ours = resize_and_crop(picture, 32, settings["resize_mode"], settings["interpolation"])[0]
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
