"""`python -m eval.fid` and `eval.clip_score`: figures that worsen with what people see, a JSON line
at the end, one sentence for what is wrong.
"""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import ImageFilter

from eval import clip_score, fid
from eval.features import named
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.openmoji_drawings import draw, list_drawings


@pytest.fixture(scope="module")
def drawings():
    """80 drawings of 48 px, every fifth of the first, with their captions."""
    chosen = list_drawings()[:400:5]
    return [draw(drawing, 48) for drawing in chosen], [drawing.caption for drawing in chosen]


@pytest.fixture(scope="module")
def folder(drawings, tmp_path_factory):
    where = tmp_path_factory.mktemp("drawings")
    for n, (image, caption) in enumerate(zip(*drawings, strict=True)):
        image.save(where / f"{n:03d}.png")
        (where / f"{n:03d}.txt").write_text(caption + "\n")
    return where


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def run(capsys, *arguments: object) -> dict:
    assert (
        fid.main(
            ["--device", "cpu", "--bootstrap", "0", "--features", "clip", *map(str, arguments)]
        )
        == 0
    )
    return last_line(capsys)


def pixels(images) -> torch.Tensor:
    return torch.from_numpy(
        np.stack([np.asarray(image.convert("RGB")) for image in images])
    ).permute(0, 3, 1, 2)


@pytest.mark.parametrize("how", ["blur", "noise", "others"])
def test_every_distance_worsens_step_by_step(how, drawings):
    """Precision is left out: noise draws all images to one place, which is within reach of the
    reference; and strays reach far, which keeps recall.
    """
    images, _ = drawings
    network = named("clip")
    real, fake = network(pixels(images[::2])), images[1::2]
    found = []
    for step in range(3):
        if how == "blur":
            made = pixels([image.filter(ImageFilter.GaussianBlur(1.5 * step)) for image in fake])
        elif how == "noise":
            noise = (
                60 * step * torch.randn(40, 3, 48, 48, generator=torch.Generator().manual_seed(0))
            )
            made = (pixels(fake) + noise).clamp(0, 255).to(torch.uint8)
        else:
            wrong = torch.randint(
                0,
                256,
                (40, 3, 48, 48),
                dtype=torch.uint8,
                generator=torch.Generator().manual_seed(0),
            )
            made = torch.cat([wrong[: 15 * step], pixels(fake[15 * step :])])
        found.append(fid.judge(network, real, network(made), bootstrap=0))
    for name in ("fd_clip", "kid", "cmmd"):
        assert all(a[name] < b[name] for a, b in pairwise(found)), (
            name,
            [each[name] for each in found],
        )
    assert how == "others" or found[0]["recall"] > found[-1]["recall"]


def test_a_folder_against_itself_is_at_no_distance(folder, capsys):
    found = run(capsys, "--images", folder, "--reference", folder)
    assert (
        "fid" not in found
        and found["fd_clip"] == pytest.approx(0, abs=1e-4)
        and found["cmmd"] == pytest.approx(0, abs=1e-9)
    )
    assert (found["precision"], found["recall"], found["n_fake"], found["bad"]) == (1, 1, 80, 0)
    assert found["command"] == "fid" and "256 numbers" in found["said"][0]


def test_the_figures_are_written_and_their_interval_holds_the_value(folder, tmp_path, capsys):
    arguments = [
        "--device",
        "cpu",
        "--images",
        str(folder),
        "--reference",
        str(folder),
        "--bootstrap",
        "4",
        "--features",
        "clip",
        "--out",
        str(tmp_path / "out"),
    ]
    assert fid.main(arguments) == 0
    found = last_line(capsys)
    assert json.loads((tmp_path / "out" / "fid.json").read_text()) == found
    assert (
        found["fd_clip_low"] <= found["fd_clip"] <= found["fd_clip_high"]
        and found["fd_clip_infinity"] is None
    )


def test_own_captions_score_above_others_and_the_file_gives_them_line_by_line(
    folder, drawings, tmp_path, capsys
):
    captions = drawings[1]
    assert clip_score.main(["--device", "cpu", "--images", str(folder)]) == 0
    own = last_line(capsys)
    clip = FrozenCLIP(CLIPConfig("openmoji-judge"))
    expected = torch.cosine_similarity(
        clip.embed_images(pixels(drawings[0]) / 127.5 - 1),
        clip.embed_text(clip.tokenize(captions)).embed,
    )
    assert own["clip_score"] == pytest.approx(100 * expected.clamp(min=0).mean().item(), rel=1e-4)
    file = tmp_path / "captions.txt"
    file.write_text("\n\n".join(captions) + "\n")
    assert (
        clip_score.main(["--device", "cpu", "--images", str(folder), "--captions", str(file)]) == 0
    )
    assert last_line(capsys)["clip_score"] == pytest.approx(own["clip_score"], rel=1e-9)
    file.write_text("\n".join(captions[7:] + captions[:7]))
    assert (
        clip_score.main(["--device", "cpu", "--images", str(folder), "--captions", str(file)]) == 0
    )
    others = last_line(capsys)
    assert (
        others["clip_score_high"] < own["clip_score_low"]
        and others["rank_mean"] > own["rank_mean"]
        and others["r1"] < own["r1"]
    )


def test_what_is_wrong_is_one_sentence(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    (tmp_path / "empty").mkdir()
    captions = tmp_path / "captions.txt"
    captions.write_text("a cat\n\n \n")
    cases = [
        (fid, ["--images", tmp_path / "empty", "--reference", folder], "There are no images in"),
        (
            fid,
            ["--images", folder, "--reference", folder, "--features", "inception"],
            "inception-2015-12-05.pt",
        ),
        (fid, ["--images", folder], "--reference"),
        (fid, ["--reference", folder], "--images"),
        (
            fid,
            ["--images", folder, "--reference", folder, "--device", "cuda:99"],
            "There is no device cuda:99",
        ),
        (
            clip_score,
            ["--images", folder, "--captions", captions],
            "There are 1 captions and 80 images",
        ),
        (clip_score, ["--images", folder, "--captions", tmp_path / "none.txt"], "none.txt"),
        (clip_score, ["--images", folder, "--clip", "local-dir:/nowhere"], "/nowhere"),
    ]
    for module, arguments, said in cases:
        assert module.main(list(map(str, arguments))) == 1, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in error and error.startswith("python -m eval."), error


def test_an_image_without_a_caption_is_named(folder, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "007.txt").write_text(" \n")
    assert clip_score.main(["--device", "cpu", "--images", str(copy)]) == 1
    assert "Image 007 of" in capsys.readouterr().err
