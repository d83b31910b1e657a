"""Reports: tables, curves and settings in files, and events that TensorBoard reads."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval import report
from eval.report import Panel
from unclip_pl.utils.outputs import OutputFolder


def test_markdown_is_a_table():
    lines = report.markdown(["a", "b"], [["x|y", "1"]]).splitlines()
    assert lines == ["| a | b |", "| :-- | --: |", "| x\\|y | 1 |"]


def test_a_report_has_its_body_pictures_settings_versions_and_command(tmp_path):
    pictures, out = {"Curves": tmp_path / "curves.png"}, OutputFolder(tmp_path)
    report.write_report(out, "report.md", "A title", "A body.\n", pictures, {"steps": 25})
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# A title\n\nA body.\n")
    assert "![Curves](curves.png)" in text and "| steps | 25 |" in text
    assert f"| torch | {torch.__version__} |" in text and "\npython " in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_curves_hold_the_points_of_their_lines(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    plotted = {}
    plot = Axes.plot

    def keep(self, x, y, label, **options):
        plotted[label] = (x, y)
        return plot(self, x, y, label=label, **options)

    monkeypatch.setattr(Axes, "plot", keep)
    lines = {"up": [(1, 2.0), (2, 3.0)], "flat": [(1, 1.0), (2, 1.0)]}
    report.write_curves(OutputFolder(tmp_path), "curves.png", [Panel("x", "y", lines)])
    assert plotted == {"up": ((1, 2), (2.0, 3.0)), "flat": ((1, 2), (1.0, 1.0))}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("line", [[(1, 3.0)], [(1, 0.0), (2, 0.0)], [(1.0, -4e-5), (1.5, 3e-5)]])
def test_curves_of_few_points_are_a_picture_too(line, count, tmp_path):
    panels = [Panel("x", "y", {"one": line})] * count
    report.write_curves(OutputFolder(tmp_path), "curves.png", panels)
    with Image.open(tmp_path / "curves.png") as picture:
        darkest, _ = picture.convert("L").getextrema()
        assert darkest < 50  # axes and text
        assert picture.width >= 400 * min(count, 3) and picture.height >= 300 * -(-count // 3)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_events_hold_scalars_and_pictures(tmp_path):
    scalars = {"fid/guidance": [(1.0, 5.0), (1.5, 4.0)], "fid/steps": [(10, 3.0)]}
    for _ in range(2):  # the second time there is nothing new
        report.write_tensorboard(
            OutputFolder(tmp_path), Path("a.md"), scalars, {"side": Image.new("RGB", (4, 4))}
        )
    events = EventAccumulator(str(tmp_path / "tensorboard" / "a")).Reload()
    assert len(list((tmp_path / "tensorboard" / "a").iterdir())) == 1

    def points(name):
        return [(event.step, event.value) for event in events.Scalars(name)]

    assert points("fid/guidance") == [(100, 5.0), (150, 4.0)]
    assert points("fid/steps") == [(10, 3.0)]
    assert events.Tags()["images"] == ["side"]
