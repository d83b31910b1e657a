"""GLIDE's base model, imported: it draws what a plain restatement draws from the same noise."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.interop import glide_kit
from tests.oracles import glide
from unclip_pl.cli.unclip import main
from unclip_pl.diffusion.noise import Noise
from unclip_pl.pipeline.interop.importing import import_glide
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.pipeline.weights import load_stage, read_weights
from unclip_pl.stages.decoder import Decoder
from unclip_pl.utils.images import to_pil

CAPTIONS = ["a red apple on the table, by the cat", "An oil painting", ""]
SEEDS = [5, 6, 7]
STEPS, SIDE = 10, 16  # the networks know no size


def imported(folder, out, *options):
    return main(["import", "glide", str(folder), "--out", str(out), *options])


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The release of a small GLIDE, in float32."""
    folder = tmp_path_factory.mktemp("glide")
    return import_glide(glide_kit.write(folder / "in", glide_kit.weights()), folder / "out")


def tokens_of(folder, length):
    """Tokens and masks by transformers' tokenizer."""
    reference = glide_kit.reference_tokenizer(folder)
    rows = [reference(caption.lower())["input_ids"] for caption in CAPTIONS]
    return glide_kit.padded(rows, length, 299)


@pytest.mark.parametrize("size", glide_kit.SIZES)
def test_it_predicts_and_draws_what_glide_does(size, tmp_path, capsys):
    sizes = glide_kit.SIZES[size]
    held, depth = glide_kit.weights(**sizes), sizes.get("depth", 1)
    folder = glide_kit.write(tmp_path / "theirs", held)
    assert imported(folder, tmp_path / "ours", "--precision", "fp32") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'ours'}: ")
    decoder = load_stage(tmp_path / "ours", Decoder)
    exact = {name: value.double() for name, value in held.items()}
    tokens, mask = tokens_of(folder, 8)
    assert torch.equal(decoder.text.tokenize(CAPTIONS), tokens)
    assert mask.all(1).any() and not mask[2].any()  # one is cut, one is empty

    x, t = torch.randn(3, 3, SIDE, SIDE), torch.tensor([0, 400, 999])
    keep = torch.tensor([True, True, True])
    conditions = decoder.conditions({"text_tokens": tokens}, 3, keep, keep)
    with torch.no_grad():
        found = decoder.net(x, t, **conditions)
    expected = glide.predict(exact, x.double(), t, tokens, mask, depth)
    assert expected.std() > 0.1
    assert relative(found, expected) < 1e-5

    noise = Noise(SEEDS)
    expected = glide.draw(
        exact, tokens, mask, 299, lambda: noise((3, SIDE, SIDE)), STEPS, guidance=3.0, depth=depth
    )
    assert decoder.sampling.guidance_scale == 3.0 and decoder.sampling.steps == 100
    sampling = replace(decoder.sampling, steps=STEPS)
    draw = lambda captions, noise: decoder.sample(
        {"caption": captions}, noise, sampling, x_T=noise((3, SIDE, SIDE))
    )
    drawn = draw(CAPTIONS, Noise(SEEDS))
    assert expected.std() > 0.1
    assert relative(drawn, expected) < 1e-4
    other = draw(["two dogs", *CAPTIONS[1:]], Noise(SEEDS))
    assert relative(other[:1], drawn[:1]) > 1e-2
    torch.testing.assert_close(other[1:], drawn[1:], rtol=1e-3, atol=1e-3)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_float32_weights_are_kept_to_the_bit_and_float16_is_the_default(release, tmp_path):
    held = glide_kit.weights()
    folder = glide_kit.write(tmp_path / "in", held)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# GPT-2")  # of the tokenizer
    weights = read_weights(import_glide(folder, tmp_path / "out", precision="fp32")).tensors
    assert "mit" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split()
    table = weights["text.encoder.token_embedding.weight"]
    assert torch.equal(table, held["token_embedding.weight"])
    assert torch.equal(weights["net.conv_out.weight"], held["out.2.weight"])
    kinds = {tensor.dtype for tensor in load_file(release / "model.safetensors").values()}
    assert kinds == {torch.float16, torch.int32, torch.int64}


def test_the_tokenizer_is_part_of_the_release(release, tmp_path):
    assert {file.name for file in release.iterdir()} == {
        *("config.json", "model.safetensors", "README.md")
    }
    card = (release / "README.md").read_text(encoding="utf-8")
    assert "unclip import glide" in card and "text.encoder.merges" in card
    assert "- CLIP: none" in card
    decoder = load_stage(release, Decoder)
    assert decoder.clip_fingerprint is None and not decoder.reads_clip
    assert decoder.text.tokenize(["a red apple"]).shape == (1, 8)
    long = "a red apple on the table with cats and dogs"
    assert long.endswith(cut := decoder.text.truncated_text(long)) and cut
    assert decoder.text.truncated_text("a red") == ""


@pytest.mark.parametrize("form", ["hugging face", "glide", "gpt-2"])
@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_files_and_tokenizers_of_each_form(form, place, release, tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "tokenizer"
    folder.mkdir()
    elsewhere.mkdir()
    glide_kit.write_tokenizer(folder if place == "beside" else elsewhere, 300, form)
    save_file(glide_kit.weights(), folder / "base.safetensors")
    options = [] if place == "beside" else ["--tokenizer", str(elsewhere)]
    given = folder / "base.safetensors" if place == "beside" else folder
    assert imported(given, tmp_path / "out", *options) == 0
    found, expected = read_weights(tmp_path / "out"), read_weights(release)
    assert found.hyper_parameters == expected.hyper_parameters
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in found.tensors)


def test_unclip_generate_draws_with_it(release, tmp_path, capsys):
    words = ["generate", "a red apple", "--decoder", str(release), "--out", str(tmp_path)]
    quick = ["--steps", "2", "--num-images", "2"]
    assert main([*words, *quick, "--condition", "caption"]) == 0
    files = [tmp_path / f"a-red-apple-{k}.png" for k in (0, 1)]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    unclip = UnCLIP.load(release)
    sampling = replace(unclip.decoder.sampling, steps=2)
    images = unclip.generate(["a red apple"] * 2, [0, 1], "caption", sampling=sampling)
    for file, image in zip(files, images):
        assert Image.open(file).tobytes() == to_pil(image).tobytes()
    long = "a red apple on the table with cats and dogs"
    words[1] = long
    assert main([*words, *quick, "--condition", "caption"]) == 0
    assert 'longer than the decoder reads (8 tokens), cut: "' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("generate apple", "has no use for a prior"),
        ("generate apple --condition text", "takes no embedding"),
        ("vary {picture}", "takes no embedding"),
        ("interpolate {picture} {picture}", "takes no embedding"),
        ("edit {picture} --to apple", "takes no embedding"),
        ("probe pca {picture}", "takes no embedding"),
    ],
)
def test_what_needs_an_embedding_is_a_sentence(command, said, release, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    words = command.format(picture=picture).split()
    words += ["--decoder", str(release), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert main(words) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("unclip: ")]
    assert said in lines[-1] and "Traceback" not in error


def test_a_whole_model_can_be_saved_and_loaded(release, tmp_path):
    unclip = UnCLIP.load(release)
    unclip.save_pretrained(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {
        *("decoder", "config.json", "README.md")
    }
    again = UnCLIP.from_pretrained(tmp_path / "whole")
    sampling = replace(unclip.decoder.sampling, steps=2)
    draw = lambda one: one.generate(["two cats"], [3], "caption", sampling=sampling)
    assert torch.equal(draw(again), draw(unclip))


def test_diffusers_has_no_such_decoder(release, tmp_path, capsys):
    words = ["export", str(release), "--to", "diffusers", "--out", str(tmp_path / "out")]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "condition none" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
