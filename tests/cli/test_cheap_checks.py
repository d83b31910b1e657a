"""What the command line shows to be wrong is refused before torch is imported, which takes seconds.

So nothing is loaded or drawn for a mistake.
"""

import json
import subprocess
import sys

import pytest
from PIL import Image

from tests.conftest import ROOT
from unclip_pl.cli import lightning, unclip

WRONG = """
generate fox --out file/out
generate fox --out file
generate fox --decoder gone
generate fox --prior gone
generate fox --size 256 --upsampler-256 gone
generate fox --init gone.png
generate fox --init file
generate fox --init latent.safetensors
upsample latent.safetensors
generate fox --init a.png --strength 1.5
generate fox --steps 0
generate fox --steps 10,0
generate fox --prior-steps fast28
generate fox --size 256 --upsampler-steps ddim0
generate fox --guidance-scale 0.5
generate fox --prior-guidance-scale 0
generate fox --eta 1.5
generate fox --eta 0.5 --sampler ddpm
generate fox --prior-top-p 0
generate fox --prior-temperature=-1
generate fox --prior-temperature 0.5
generate fox --prior ar --prior-steps 5
generate fox --device gpu
generate fox --decoder run
vary a.png --device gpu
upsample a.png --device gpu:0
vary gone.png
vary folder
vary file
vary a.png --out file/out
vary a.png --eta 1.5
vary a.png --eta 0.5 --sampler ddpm
vary a.png --decoder gone
vary a.png --steps 0
vary a.png --size 1024 --upsampler-1024 gone
interpolate a.png gone.png
interpolate a.png a.png --num-images 1
interpolate a.png a.png --num-rows 2
interpolate a.png a.png --out file
edit a.png --to fox --theta 1.5
edit a.png --to fox --out file
edit a.png
inpaint a.png --mask gone.png
inpaint gone.png --mask a.png
inpaint a.png fox --mask a.png --prior gone
invert latent.safetensors
invert a.png --guidance-scale 0
upsample gone.png
upsample a.png --upsampler-256 gone
upsample a.png --steps 0
upsample a.png --out file
probe pca a.png --components 0
probe pca gone.png
probe pca a.png --store gone
probe typographic a.png --object fox --label Fox
probe typographic a.png --object fox --label " "
serve --runs gone
serve --decoder gone
serve --prior gone
serve --device gpu
export gone.ckpt --out new
export file --out folder
export file --out file/new
export file --out new --card gone.md
export file --out new --adapters gone
export file file --out new
import karlo gone --out new
import karlo folder --out folder
import karlo folder --out new --clip-weights openai
import kandinsky-prior gone --out new
import kandinsky-prior folder --out file/new
plan stages/gone.yaml
plan stages/decoder.yaml -c gone.yaml
plan stages/decoder.yaml --gpus 0
plan
submit stages/gone.yaml
data verify gone
data verify folder
data import gone --store store --shards gone.tar
"""
CODE = """
import json, shlex, sys
from unclip_pl.cli.unclip import main
slow = []
for line in json.load(sys.stdin):
    code = main(shlex.split(line))
    if not code or "torch" in sys.modules:
        slow.append((line, code))
        if "torch" in sys.modules:
            break
print(json.dumps(slow))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a picture, a file that is no picture, a latent's name, a folder and a run."""
    place = tmp_path_factory.mktemp("place")
    Image.new("RGB", (8, 8)).save(place / "a.png")
    (place / "file").write_text("no picture")
    (place / "latent.safetensors").write_text("")
    (place / "folder").mkdir()
    (place / "run" / "checkpoints").mkdir(parents=True)
    (place / "run" / "checkpoints" / "newest-step=4.ckpt").write_text("")
    return place


def test_what_is_wrong_costs_no_import_of_torch_and_leaves_nothing(place):
    before = sorted(path.name for path in place.iterdir())
    lines = WRONG.strip().splitlines()
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps(lines),
        cwd=place,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(place)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    errors = done.stderr.strip().splitlines()
    assert len(errors) == len(lines) and all(error.startswith("unclip") for error in errors)
    assert sorted(path.name for path in place.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "error"),
    [
        *((name, f"write unclip {name.split()[0]}.") for name in unclip.COMMANDS),
        ("draw fox", "There is no command draw: give fit, validate or predict."),
        ("-c stages/decoder.yaml fit", "-c stands before the command"),
    ],
)
def test_lightning_knows_its_commands_and_those_of_unclip(words, error, capsys):
    assert lightning.main(words.split()) == 1
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
