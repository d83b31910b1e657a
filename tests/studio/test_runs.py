"""Training runs: found, read on while they go on, shown in the page."""

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from tests.factories import write_checkpoint, write_release
from tests.studio.browser import chromium, served
from unclip_pl.studio.models import Models
from unclip_pl.studio.plot import limits, plot
from unclip_pl.studio.runs import Runs
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import save_png


def write(folder, first, last, picture=True):
    """Steps of a run: losses that fall, a picture, a checkpoint."""
    with SummaryWriter(str(folder)) as log:
        for step in range(first, last):
            log.add_scalar("train/loss", 1 / (step + 1), step)
            log.add_scalar("val/psnr", step, step)
    if picture:
        save_png(torch.rand(3, 40, 120) * 2 - 1, folder / "pictures" / f"step-{last:07d}.png")
    checkpoint = folder / "checkpoints" / f"newest-step={last}.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": last}, checkpoint)


def test_a_run_is_read_on_while_it_goes_on(tmp_path):
    (tmp_path / "a" / "pictures").mkdir(parents=True)
    write(tmp_path / "a", 0, 5)
    runs = Runs(tmp_path)
    run = runs.read("a")
    assert run.step == 4 and run.curves["train/loss"][1] == (1, 0.5)
    assert run.picture.name == "step-0000005.png"
    assert run.checkpoint == tmp_path / "a" / "checkpoints" / "newest-step=5.ckpt"
    write(tmp_path / "a", 5, 8)
    run = runs.read("a")
    assert run.step == 7 and len(run.curves["val/psnr"]) == 8
    assert run.picture.name == "step-0000008.png" and "step=8" in run.checkpoint.name


def test_only_runs_are_found_and_only_in_the_folder(tmp_path):
    (tmp_path / "runs" / "group" / "b" / "pictures").mkdir(parents=True)
    write(tmp_path / "runs" / "group" / "b", 0, 2)
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("a: 1\n")
    runs = Runs(tmp_path / "runs")
    assert runs.names() == ["group/b"]
    for name in ("../other", "notes", "/etc"):
        with pytest.raises(UserError, match="There is no run"):
            runs.read(name)


def test_curves_leave_out_what_is_far_above_the_rest():
    curve = [(0, 50.0), (1, float("nan")), *[(k, 1 / k) for k in range(2, 100)]]
    low, high = limits({"train/loss": curve})
    assert low < 1 / 99 and 0.3 < high < 1  # of 50
    shown = plot({"train/loss": curve, "val/<loss>": [(0, 0.1), (99, 0.2)]})
    assert shown.count("<polyline") == 2 and "val/&lt;loss&gt;" in shown and "nan" not in shown
    assert 'points="0,' in shown and " 1000," in shown
    assert "<polyline" not in plot({})


def test_curves_show_what_lies_above_another_or_rises_at_the_end():
    train, val = [(k, 1.0) for k in range(500)], [(100 * k, 2.0 + k) for k in range(5)]
    assert limits({"train/loss": train, "val/loss": val})[1] > 6
    assert limits({"val/loss": [(k, float(k)) for k in range(10)]})[1] > 9


@pytest.mark.slow
def test_the_page_draws_with_a_checkpoint_of_a_run(models, tmp_path):
    pytest.importorskip("gradio", reason='needs the extra "web"')
    first = write_release(tmp_path / "first", models.plain.decoder)
    write(tmp_path / "runs" / "mine", 0, 2)
    checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "newest-step=2.ckpt"
    write_checkpoint(checkpoint, models.plain.decoder)
    own = Models.load(first, "diffusion")
    with chromium() as browser, served(own, runs=tmp_path / "runs") as (address, _):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(address)
        page.get_by_role("tab", name="Training").click()
        page.get_by_text("weights that the studio was started with").wait_for()
        page.get_by_role("button", name="Draw with its newest checkpoint").click()
        page.get_by_text("drawn with the decoder of mine, newest-step=2.ckpt").wait_for()
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
        page.get_by_role("button", name="Draw with its newest checkpoint").click()
        page.get_by_role("alert").wait_for()
        page.get_by_role("button", name="Draw with the first weights again").click()
        page.get_by_text("weights that the studio was started with").wait_for()


@pytest.mark.slow
def test_the_page_shows_a_run_while_it_trains(models, tmp_path):
    pytest.importorskip("gradio", reason='needs the extra "web"')
    (tmp_path / "decoder" / "pictures").mkdir(parents=True)
    write(tmp_path / "decoder", 0, 5)
    with chromium() as browser, served(models, runs=tmp_path) as (address, _):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)
        page.goto(address)
        page.get_by_role("tab", name="Training").click()
        page.get_by_text("decoder: step 4. Newest checkpoint:").wait_for()
        assert "newest-step=5.ckpt" in page.get_by_text("Newest checkpoint:").inner_text()
        picture = page.get_by_alt_text("Pictures of decoder, step-0000005")
        assert picture.evaluate("image => image.naturalWidth") == 120
        page.locator(".plot polyline").nth(0).wait_for()
        write(tmp_path / "decoder", 5, 9)
        page.get_by_text("decoder: step 8. Newest checkpoint:").wait_for()
        page.get_by_alt_text("Pictures of decoder, step-0000009").wait_for()
