"""`unclip generate`: pictures from captions through either prior, the three conditions, and what bad input is told."""

import json

import pytest
import torch
from PIL import Image

from unclip_pl.cli import unclip as app
from unclip_pl.clip.fingerprint import ClipMismatch
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline.release import Release
from unclip_pl.pipeline.unclip import DEFAULT_PRIORS, UnCLIP
from unclip_pl.stages.decoder import Decoder, SamplingConfig
from unclip_pl.utils.errors import UserError

NET = UNetConfig(
    image_size=16,
    width=32,
    mults=(1,),
    depth=1,
    attention=(),
    middle_attention=False,
    head_width=32,
    embed_dim=256,
)
PROMPTS = ["woman firefighter, dark skin tone", "waving hand"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder release with random weights."""
    torch.manual_seed(0)
    stage = Decoder(
        net=NET,
        sampling=SamplingConfig(sampler="ddim", steps=2),
        diffusion=DiffusionConfig(parametrization="v"),
    )
    for parameter in stage.net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    weights = Release(
        "Decoder", dict(stage.hparams), FrozenCLIP().fingerprint(), stage.state_dict(), 1
    )
    return release.write(tmp_path_factory.mktemp("decoder") / "release", weights, "# a card\n")


@pytest.fixture(scope="module", params=["diffusion", "ar"])
def unclip(request, folder):
    return UnCLIP.load(folder, request.param)


def test_both_priors_of_the_package_draw_from_captions(unclip):
    drawn = unclip.generate(PROMPTS, [3, 4])
    assert drawn.shape == (2, 3, 16, 16) and torch.isfinite(drawn).all() and drawn.abs().max() <= 1
    alone = unclip.generate(PROMPTS[1:], [4])
    torch.testing.assert_close(
        drawn[1], alone[0], rtol=1e-3, atol=1e-3
    )  # picture k depends on caption and seed k alone
    assert not torch.allclose(drawn[1], unclip.generate(PROMPTS[1:], [5])[0], atol=1e-2)


def test_a_drawn_embedding_is_nearer_to_its_caption_than_to_another(unclip):
    captions = [*PROMPTS, "bicycle", "green apple", "fox", "umbrella with rain drops"]
    drawn = unclip.sample_prior(captions, range(len(captions)))
    assert drawn.shape == (len(captions), 256)
    similarity = unclip.clip.similarity(drawn, unclip.embed_text(captions))
    assert similarity.argmax(1).tolist() == list(range(len(captions)))


def test_three_conditions_are_one_argument(unclip, monkeypatch):
    seen = []
    monkeypatch.setattr(unclip, "decode", lambda embed, *rest: seen.append(embed))
    for condition in ("prior", "text", "caption"):
        unclip.generate(PROMPTS, [0, 1], condition)
    torch.testing.assert_close(seen[0], unclip.sample_prior(PROMPTS, [0, 1]))
    assert torch.equal(seen[1], unclip.embed_text(PROMPTS)) and seen[2] is None
    with pytest.raises(ValueError, match="no condition"):
        unclip.generate(PROMPTS, [0, 1], "nothing")


def test_steps_are_told_by_stage(unclip):
    told = []
    unclip.generate(PROMPTS[:1], [0], callback=lambda *step: told.append(step))
    stages = [stage for stage, _, _ in told]
    assert stages == sorted(stages, reverse=True) and set(stages) == {
        "prior",
        "decoder",
    }  # the prior first
    assert all(told[i][1] == told[i][2] for i in (stages.index("decoder") - 1, -1))


def test_without_a_prior_captions_still_draw_and_the_prior_is_asked_for(folder):
    unclip = UnCLIP.load(folder)
    assert unclip.generate(PROMPTS, [0, 1], "text").shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="There is no prior"):
        unclip.generate(PROMPTS, [0, 1])


def test_prior_and_decoder_of_different_clips_are_refused(folder):
    unclip = UnCLIP.load(folder, "diffusion")
    unclip.prior.clip_fingerprint = unclip.prior.clip_fingerprint | {"embed_dim": 512}
    with pytest.raises(ClipMismatch, match="The prior"):
        UnCLIP(unclip.decoder, unclip.prior)
    unclip.prior.clip_fingerprint = None
    with pytest.raises(UserError, match="The prior does not say"):
        UnCLIP(unclip.decoder, unclip.prior)


def test_priors_of_the_package_are_small_and_have_cards():
    for path in DEFAULT_PRIORS.values():
        assert sum(file.stat().st_size for file in path.iterdir()) <= 8_000_000
        assert "OpenMoji" in (path / "README.md").read_text(encoding="utf-8")
        assert json.loads((path / "config.json").read_text())["clip_fingerprint"]


def test_generate_writes_pictures_named_by_prompt_and_seed(folder, tmp_path, capsys):
    (tmp_path / "more.txt").write_text("\ufeffbicycle\n\n", encoding="utf-8")
    arguments = [
        "generate",
        PROMPTS[0],
        "--file",
        str(tmp_path / "more.txt"),
        "--decoder",
        str(folder),
        "--num-images",
        "2",
        "--seed",
        "7",
    ]
    arguments += ["--steps", "2,1"]
    assert (
        app.main(
            [
                *arguments,
                "--prior-steps",
                "3",
                "--guidance-scale",
                "2",
                "--batch-size",
                "3",
                "--grid",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "bicycle-7.png",
        "bicycle-8.png",
        "grid.png",
        "woman-firefighter-dark-skin-tone-7.png",
        "woman-firefighter-dark-skin-tone-8.png",
    ]
    with Image.open(tmp_path / "out" / "bicycle-8.png") as image:
        assert (
            image.size == (16, 16)
            and image.text["prompt"] == "bicycle"
            and image.text["seed"] == "8"
        )
        assert "guidance_scale=2.0" in image.text["unclip"] and "steps=3" in image.text["unclip"]
        assert "steps=(2, 1)" in image.text["unclip"]
    assert "grid.png" in capsys.readouterr().out


def test_prompts_that_look_alike_have_files_of_their_own(folder, tmp_path):
    assert (
        app.main(
            [
                "generate",
                "fox",
                "fox!",
                "fox",
                "--decoder",
                str(folder),
                "--num-images",
                "1",
                "--condition",
                "text",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox-0.png", "fox-2-0.png"]


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999999", "x"])
def test_an_impossible_seed_is_refused(seed, capsys):
    with pytest.raises(SystemExit):
        app.main(["generate", "fox", f"--seed={seed}"])
    assert "--seed" in capsys.readouterr().err


def test_there_must_be_a_seed_for_each_caption(folder):
    with pytest.raises(ValueError, match="one seed a caption"):
        UnCLIP.load(folder).generate(PROMPTS, [0], "text")


def test_a_prompt_that_is_too_long_is_drawn_and_what_was_cut_is_named(folder, tmp_path, capsys):
    long = "a red apple " * 40 + "and a pear"
    arguments = [
        "generate",
        long,
        "--decoder",
        str(folder),
        "--condition",
        "text",
        "--num-images",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert app.main(arguments) == 0
    assert 'and a pear"' in capsys.readouterr().err
    clip = FrozenCLIP()
    kept = long[: -len(clip.truncated_text(long))]
    assert torch.equal(clip.tokenize([kept]), clip.tokenize([long])) and not torch.equal(
        clip.tokenize([kept[:-1]]), clip.tokenize([long])
    )
    assert clip.truncated_text("a red apple") == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "There is no prompt"),
        (["  "], "A prompt is empty"),
        (["--file", "gone.txt"], "gone.txt cannot be read"),
        (["--file", "latin.txt"], "is not UTF-8"),
        (["apple", "--num-images", "0"], "--num-images is 0"),
        (["apple", "--steps", "0"], "--steps is 0"),
        (["apple", "--steps", "1001"], "--steps is 1001"),
        (["apple", "--prior-steps", "1001"], "--prior-steps is 1001"),
        (["apple", "--prior-steps", "fast28"], "--prior-steps is fast28, and respacing"),
        (["apple", "--guidance-scale", "0.5"], "--guidance-scale is 0.5"),
        (["apple", "--prior-guidance-scale", "0"], "--prior-guidance-scale is 0.0"),
        (["apple", "--prior", "gone.ckpt"], "There is no checkpoint gone.ckpt"),
        (
            ["apple", "--prior", "ar", "--prior-steps", "5"],
            "--prior-steps is no setting of this stage",
        ),
        (["apple", "--prior", "ar", "--prior-top-p", "0"], "top_p of the AR prior is 0.0"),
        (
            ["apple", "--prior-temperature", "0.5"],
            "--prior-temperature is no setting of this stage",
        ),
        (["apple", "--prior-guidance-scale", "inf"], "--prior-guidance-scale is inf"),
        (["apple", "--condition", "text", "--prior-steps", "5"], "--condition text uses no prior"),
        (["apple", "--sampler", "ddpm", "--eta", "1"], "--eta is for the sampler ddim"),
        (["apple", "--device", "nothing"], "There is no device nothing"),
        (
            ["apple", "--condition", "text", "--num-images", "1", "--out", "latin.txt/out"],
            "cannot be used",
        ),
        (
            ["apple", "--prior", "DECODER"],
            "holds a Decoder, and a DiffusionPrior or ARPrior is needed",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert (
        app.main(
            [
                "generate",
                *(str(folder) if a == "DECODER" else a for a in arguments),
                "--decoder",
                str(folder),
            ]
        )
        == 1
    )
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("unclip: ") and words in error[0]
