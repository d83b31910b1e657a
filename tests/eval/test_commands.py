"""`python -m eval.fid` and `eval.clip_score`: figures that worsen with what people see, a JSON line
at the end, one sentence for what is wrong."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageFilter

from eval import clip_score, coco, compare, fid, sweep
from eval.evaluator import compute_distances
from eval.features import load_features
from tests.eval import tiny
from unclip_pl.cli import unclip
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.openmoji_drawings import draw, list_drawings
from unclip_pl.utils.commands import CommandParser

ROOT = Path(__file__).resolve().parent.parent.parent


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
    options = ["--device", "cpu", "--resamples", "0", "--features", "clip"]
    assert fid.main([*options, *map(str, arguments)]) == 0
    return last_line(capsys)


def pixels(images) -> torch.Tensor:
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


@pytest.mark.parametrize("how", ["blur", "noise", "others"])
def test_every_distance_worsens_step_by_step(how, drawings):
    """Precision is left out: noise moves all images to one place, which is within reach of the
    reference. Recall stays with wrong images, because outliers reach far."""
    images, _ = drawings
    network = load_features("clip")
    real, fake = network(pixels(images[::2])), images[1::2]
    found = []
    for step in range(3):
        if how == "blur":
            images = pixels([image.filter(ImageFilter.GaussianBlur(1.5 * step)) for image in fake])
        elif how == "noise":
            noise = torch.randn(40, 3, 48, 48, generator=torch.Generator().manual_seed(0))
            images = (pixels(fake) + 60 * step * noise).clamp(0, 255).to(torch.uint8)
        else:
            generator = torch.Generator().manual_seed(0)
            wrong = torch.randint(0, 256, (40, 3, 48, 48), dtype=torch.uint8, generator=generator)
            images = torch.cat([wrong[: 15 * step], pixels(fake[15 * step :])])
        found.append(compute_distances(network, real, network(images), resamples=0))
    for name in ("fd_clip", "kid", "cmmd"):
        values = [figures[name] for figures in found]
        assert values == sorted(set(values)), name
    assert how == "others" or found[0]["recall"] > found[-1]["recall"]


def test_a_folder_against_itself_is_at_no_distance(folder, capsys):
    found = run(capsys, "--images", folder, "--reference", folder)
    assert "fid" not in found and found["fd_clip"] == pytest.approx(0, abs=1e-4)
    assert found["cmmd"] == pytest.approx(0, abs=1e-9)
    assert (found["precision"], found["recall"], found["n_fake"], found["bad"]) == (1, 1, 80, 0)
    assert found["command"] == "fid" and "256 numbers" in found["notes"][0]
    assert "captions_from" not in found


def test_the_figures_are_written_and_their_interval_holds_the_value(folder, tmp_path, capsys):
    more = ["--resamples", "4", "--out", tmp_path / "out"]
    found = run(capsys, "--images", folder, "--reference", folder, *more)
    assert json.loads((tmp_path / "out" / "fid.json").read_text()) == found
    assert found["fd_clip_low"] <= found["fd_clip"] <= found["fd_clip_high"]
    assert found["fd_clip_infinity"] is None
    again = run(capsys, "--images", folder, "--reference", folder, *more, "--seed", "1")
    assert json.loads((tmp_path / "out" / "fid.json").read_text()) == found
    assert json.loads((tmp_path / "out" / "fid_2.json").read_text()) == again != found


def test_own_captions_score_above_others_and_the_file_gives_them_line_by_line(
    folder, drawings, tmp_path, capsys
):
    captions = drawings[1]

    def score(*more):
        words = ["--device", "cpu", "--images", str(folder), "--score-clip", "openmoji-judge"]
        assert clip_score.main([*words, *more]) == 0
        return last_line(capsys)

    own = score()
    clip = FrozenCLIP(CLIPConfig("openmoji-judge"))
    image_embed = clip.embed_images(pixels(drawings[0]) / 127.5 - 1)
    text_embed = clip.embed_text(clip.tokenize(captions)).embed
    expected = torch.cosine_similarity(image_embed, text_embed)
    assert own["clip_score"] == pytest.approx(100 * expected.clamp(min=0).mean().item(), rel=1e-4)
    file = tmp_path / "captions.txt"
    file.write_text("\n\n".join(captions) + "\n")
    from_file = score("--captions", str(file))
    assert from_file["clip_score"] == pytest.approx(own["clip_score"], rel=1e-9)
    assert "captions_from" not in own and from_file["captions_from"] == str(file)
    file.write_text("\n".join(captions[7:] + captions[:7]))
    others = score("--captions", str(file))
    assert others["clip_score_high"] < own["clip_score_low"]
    assert others["rank_mean"] > own["rank_mean"] and others["r1"] < own["r1"]


@pytest.mark.parametrize(
    ("module", "words", "keyword"),
    [
        (fid, "--images {empty} --reference {folder}", "no images"),
        (fid, "--images {folder} --reference {folder} --features inception", "inception-2015"),
        (fid, "--images {folder}", "--reference"),
        (fid, "--reference {folder}", "--images"),
        (fid, "--images {folder} --reference {folder} --device cuda:99", "cuda:99"),
        (clip_score, "--images {folder} --captions {captions}", "1 captions"),
        (clip_score, "--images {folder} --captions none.txt", "none.txt"),
        (fid, "--images {folder} --reference {folder} --out {captions}", "--out"),
        (fid, "--images {folder} --reference {folder} --overwrite", "--overwrite"),
        (fid, "--decoder gone", "no decoder gone"),
        (fid, "--decoder openmoji --captions gone", "give openmoji"),
        (fid, "--decoder openmoji --prior gone", "diffusion or ar"),
        (compare, "--text-decoder gone", "no decoder gone"),
        (compare, "--baseline gone", "--baseline is gone"),
        (compare, "--reference gone", "gone"),
        (sweep, "--floor gone", "gone"),
        (clip_score, "--images {folder} --score-clip local-dir:/nowhere", "/nowhere"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    module, words, keyword, folder, tmp_path, capsys, monkeypatch
):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    places = {"folder": folder, "empty": tmp_path / "empty", "captions": tmp_path / "captions.txt"}
    places["empty"].mkdir()
    places["captions"].write_text("a cat\n\n \n")
    assert module.main(words.format(**places).split()) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert keyword in error and error.startswith("python -m eval.")


@pytest.mark.parametrize(
    "words", ["--features foo", "--score-clip foo", "--features openmoji-juge"]
)
def test_a_judge_that_does_not_exist_is_named_with_the_choices(words, capsys):
    assert compare.main(words.split()) == 2
    error = capsys.readouterr().err
    assert words.replace(" ", ": ") in error and "openmoji-judge, " in error


def test_an_image_without_a_caption_is_named(folder, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "007.txt").write_text(" \n")
    words = ["--device", "cpu", "--images", str(copy)]
    assert clip_score.main(words) == 1
    assert "--score-clip (openmoji-judge for such drawings)" in capsys.readouterr().err
    assert clip_score.main([*words, "--score-clip", "openmoji-judge"]) == 1
    assert "Image 007 of" in capsys.readouterr().err


COMMANDS = [fid, clip_score, compare, sweep, coco]


@pytest.mark.parametrize("command", COMMANDS)
def test_options_have_the_names_and_kinds_of_those_of_generate(command):
    """An option of both programs is of one type and offers the same choices."""
    generate = CommandParser(unclip.COMMANDS["generate"], "unclip generate")
    theirs = {action.dest: action for action in generate._actions}
    ours = {action.dest: action for action in CommandParser(command.run, "eval")._actions}
    shared = {"decoder", "sampler", "steps", "eta", "seed", "batch_size", "out", "device"}
    shared |= {"precision", "compile", "prior_guidance_scale", "prior_steps", "prior_sampler"}
    shared |= {"prior_temperature", "prior_top_p"}
    assert shared <= ours.keys() and shared <= theirs.keys()
    for name in {"sampler", "steps", "eta", "seed", "prior", "guidance_scale"} & ours.keys():
        for attribute in ("option_strings", "_typehint", "nargs"):
            mine, other = (getattr(one[name], attribute, None) for one in (ours, theirs))
            assert mine == other, name


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        (fid, "--bootstrap", "--resamples"),
        (clip_score, "--clip", "--score-clip"),
        (compare, "--seeds", "--num-images"),
    ],
)
def test_an_old_option_says_its_new_name(command, old, new, capsys):
    assert command.main([old, "1"]) == 2
    assert new in capsys.readouterr().err


@pytest.mark.parametrize("command", [fid, coco])
@pytest.mark.parametrize("number", ["1", "-1", "-100"])
def test_halves_without_a_spread_are_refused(command, number, capsys):
    more = ["--annotations", "a"] if command is coco else []
    assert command.main([*more, "--images", "b", "--resamples", number]) == 2
    error = capsys.readouterr().err
    assert "--resamples" in error and f"{number} gives no interval: give 2 or more" in error
    for good in ("0", "2"):
        assert tiny.arguments(command, *more, "--images", "b", "--resamples", good)


PAGES = [ROOT / "docs" / "evaluation.md", ROOT / "docs" / "results.md"]
COMMAND_LINES = [
    line
    for page in PAGES
    for line in re.findall(r"-m (eval\.[^`)|]+)", page.read_text().replace("\\\n", " "))
    if "..." not in line
]


@pytest.mark.parametrize("line", [line.partition("\n")[0] for line in COMMAND_LINES])
def test_commands_of_the_documentation_parse(line):
    name, *words = shlex.split(line)
    commands = {f"eval.{command.__name__.rpartition('.')[2]}": command for command in COMMANDS}
    assert tiny.arguments(commands[name], *words)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_decoder_may_also_be_named_as_a_checkpoint(command):
    required = ["--annotations", "a", "--images", "b"] if command is coco else []
    found = tiny.arguments(command, *required, "--ckpt", "newest.ckpt")
    groups = {fid: "source", clip_score: "source", compare: "asked", coco: "drawing"}
    decoder = found["decoder"] if command is sweep else found[groups[command]].decoder
    assert decoder == "newest.ckpt"
