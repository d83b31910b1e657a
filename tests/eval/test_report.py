"""Reports: a page that needs nothing else, tables and plots that hold the values, events that TensorBoard reads, figures while a stage trains."""

import re
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from eval import report
from eval.callback import Evaluate
from eval.features import named
from eval.metrics import CLIPScore, FrechetDistance
from unclip_pl.diffusion.noise import Noise
from unclip_pl.utils.images import to_uint8


def test_page_is_whole_by_itself_and_names_settings_versions_and_command(tmp_path):
    plot = report.plot({"a <b>": [(1, 2.0), (2, 3.0)]}, "x & y", "z")
    parts = [
        report.table(["name", "<value>"], [["a&b", "1"]]),
        plot,
        report.picture(Image.new("RGB", (4, 4), "red"), 'the "red"'),
    ]
    page = report.write_page(tmp_path / "page.html", "A <title>", parts, {"steps": 25}).read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page) and "<script" not in page
    assert "A &lt;title&gt;" in page and "a&amp;b" in page and "&lt;value&gt;" in page
    assert (
        all(word in page for word in ("steps", "25", "unclip_pl", torch.__version__))
        and "<pre>" in page
    )
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_plot_puts_points_where_their_values_are():
    root = ElementTree.fromstring(
        report.plot(
            {"up": [(0, 0.0), (1, 10.0), (2, 20.0)], "flat": [(0, 5.0), (2, 5.0)]}, "x", "y"
        )
    )
    circles = [
        (float(node.get("cx")), float(node.get("cy")))
        for node in root.iter("{http://www.w3.org/2000/svg}circle")
    ]
    (x0, y0), (x1, y1), (x2, y2), (_, f0), (_, f2) = circles
    assert (
        x0 < x1 < x2
        and x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
        and y0 > y1 > y2
        and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    )
    assert f0 == f2 == pytest.approx((y0 + y1) / 2, abs=0.2)
    words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"up", "flat", "x", "y"} <= set(words) and {"0", "10", "20"} <= set(words)


@pytest.mark.parametrize("line", [[(1, 3.0)], [(1, 0.0), (2, 0.0)], [(1.0, -4e-5), (1.5, 3e-5)]])
def test_plot_of_little_is_still_a_plot(line):
    root = ElementTree.fromstring(report.plot({"one": line}, "x", "y"))
    sides = [float(root.get(side)) for side in ("width", "height")]
    for node in root.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 < float(node.get("cx")) < sides[0] and 0 < float(node.get("cy")) < sides[1]


def test_markdown_is_a_table():
    lines = report.markdown(["a", "b"], [["x|y", "1"]]).splitlines()
    assert lines == ["| a | b |", "| :-- | --: |", "| x\\|y | 1 |"]


def test_events_hold_scalars_and_pictures(tmp_path):
    report.write_tensorboard(
        tmp_path,
        {"fid/guidance": [(1.0, 5.0), (1.5, 4.0)], "fid/steps": [(10, 3.0)]},
        {"side": Image.new("RGB", (4, 4))},
    )
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("fid/guidance")] == [
        (100, 5.0),
        (150, 4.0),
    ]
    assert [(event.step, event.value) for event in read.Scalars("fid/steps")] == [
        (10, 3.0)
    ] and read.Tags()["images"] == ["side"]


class Toy(LightningModule):
    """Draws what it is told to, as a stage does."""

    def __init__(self, draws) -> None:
        super().__init__()
        self.weight, self.draws, self.logged = nn.Parameter(torch.zeros(1)), draws, {}

    def sample(self, batch, noise):
        return self.draws(batch, noise)

    def log_dict(self, values, **_):
        self.logged |= values


def validate(callback: Evaluate, stage: Toy, batches: list[dict], step: int) -> None:
    trainer = SimpleNamespace(sanity_checking=False, global_step=step, global_rank=0)
    callback.on_validation_epoch_start(trainer, stage)
    for number, batch in enumerate(batches):
        callback.on_validation_batch_end(trainer, stage, None, batch, number)
    callback.on_validation_epoch_end(trainer, stage)


def batches(count: int = 3, size: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(size, *shape, generator=generator)
    return [
        {
            "key": ["x"] * size,
            "image": make(3, 16, 16).clamp(-1, 1),
            "image_embed": make(8),
            "text_embed": make(8),
        }
        for _ in range(count)
    ]


def test_callback_has_the_figures_of_the_pictures_and_keeps_metrics_out_of_the_stage():
    given = batches()
    stage, callback = (
        Toy(lambda batch, noise: noise((3, 16, 16)).clamp(-1, 1)),
        Evaluate(10, count=10),
    )
    validate(callback, stage, given, 10)
    network, metric = named("clip"), FrechetDistance(256)
    real = torch.cat([batch["image"] for batch in given])[:10]
    metric.update(network(to_uint8(real)), real=True)
    metric.update(network(to_uint8(Noise(range(10))((3, 16, 16)).clamp(-1, 1))), real=False)
    assert stage.logged["eval/fd_clip"] == pytest.approx(metric.compute()["fd"], rel=1e-4)
    assert {"eval/kid", "eval/precision", "eval/recall"} < set(
        stage.logged
    ) and "eval/clip_score" not in stage.logged
    assert list(stage.state_dict()) == ["weight"] and len(list(stage.modules())) == 1


def test_callback_judges_a_priors_embeddings_and_scores_them_with_their_captions():
    given = batches(3, 8)
    stage, callback = Toy(lambda batch, noise: batch["image_embed"]), Evaluate(1, count=24)
    validate(callback, stage, given, 1)
    score = CLIPScore()
    for batch in given:
        score.update(batch["image_embed"], batch["text_embed"])
    assert (
        stage.logged["eval/fd_clip"] == pytest.approx(0, abs=1e-5)
        and stage.logged["eval/recall"] == 1
    )
    assert stage.logged["eval/clip_score"] == pytest.approx(score.compute()["clip_score"], rel=1e-5)


def test_callback_waits_for_its_steps_also_after_a_resume():
    stage, callback = Toy(lambda batch, noise: batch["image_embed"]), Evaluate(10, count=12)
    for step, evaluated in ((5, False), (12, True), (20, False), (22, True)):
        stage.logged = {}
        validate(callback, stage, batches(), step)
        assert bool(stage.logged) == evaluated, step
        state, callback = callback.state_dict(), Evaluate(10, count=12)
        callback.load_state_dict(state)
    with pytest.raises(ValueError, match="at least 1"):
        Evaluate(0)


def test_callback_is_one_of_lightnings_and_its_yaml_builds():
    from unclip_pl.cli.lightning_cli import build_cli

    flag = [
        "--trainer.callbacks+",
        '{"class_path": "eval.callback.Evaluate", "init_args": {"every_n_train_steps": 7}}',
    ]
    trainer: Trainer = build_cli(
        ["-c", "stages/decoder.yaml", "--trainer.accelerator", "cpu", *flag], run=False
    ).trainer
    assert [
        callback.every_n_train_steps
        for callback in trainer.callbacks
        if isinstance(callback, Evaluate)
    ] == [7]
