"""Upsamplers in a row, after the decoder and without it: sizes, seeds, batches, memory."""

import pytest
import torch

from tests.factories import package_cascade, write_release
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.pipeline.cascade import Cascade
from unclip_pl.pipeline.locate import DEFAULT_UPSAMPLERS
from unclip_pl.pipeline.seeds import PRIOR_OFFSET, UPSAMPLER_256_OFFSET
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.pipeline.weights import load_upsamplers
from unclip_pl.stages.upsampler import UpsamplingConfig
from unclip_pl.utils.errors import UserError

PROMPTS = ["red heart", "waving hand"]


@pytest.fixture(scope="module")
def three():
    return package_cascade()


@pytest.fixture(scope="module")
def releases(three, tmp_path_factory):
    """Folders of the three, by name."""
    root = tmp_path_factory.mktemp("releases")
    names = ("decoder", "256", "1024")
    return {name: write_release(root / name, stage) for name, stage in zip(names, three)}


@pytest.fixture(scope="module")
def unclip(three):
    decoder, low, high = three
    return UnCLIP(decoder, upsamplers=(low, high))


@pytest.fixture
def picture():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_size_is_drawn_and_a_larger_one_begins_with_the_smaller(unclip):
    assert unclip.sizes == (64, 256, 1024)
    steps = []
    report = lambda *step: steps.append(step)
    drawn = {
        size: unclip.generate(PROMPTS, [3, 4], "text", size=size, callback=report)
        for size in unclip.sizes
    }
    for size, images in drawn.items():
        assert images.shape == (2, 3, size, size)
    assert torch.equal(unclip.upsample(drawn[64], [3, 4], 4), drawn[256])
    assert torch.equal(unclip.upsample(drawn[256], [3, 4], 4), drawn[1024])
    assert drawn[1024].abs().max() <= 1 and torch.isfinite(drawn[1024]).all()
    # two steps of the decoder; of the first upsampler two for both pictures together; of the second
    # two for each picture
    assert steps[-8:] == [
        *(("decoder", step, 2) for step in (1, 2)),
        *(("upsampler 256", step, 2) for step in (1, 2)),
        *(("upsampler 1024", step, 4) for step in (1, 2, 3, 4)),
    ]


def test_upsamplers_take_other_settings_by_their_size(unclip):
    steps, one = [], UpsamplingConfig(steps=1)
    report = lambda *step: steps.append(step)
    unclip.generate(PROMPTS[:1], [3], "text", upsampling={256: one, 1024: one}, callback=report)
    assert steps[-2:] == [("upsampler 256", 1, 1), ("upsampler 1024", 1, 1)]


def test_a_picture_depends_only_on_itself_and_its_seed(unclip, picture):
    both = unclip.upsample(picture, [5, 6], 4)
    alone = unclip.upsample(picture[1:], [6], 4)
    torch.testing.assert_close(alone[0], both[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(unclip.upsample(picture[1:], [7], 4)[0], both[1], atol=1e-2)


def test_batches_that_are_split_equal_whole_ones(three, picture):
    sizes = []
    whole, split = Cascade(three[1:], batch_pixels=1 << 30), Cascade(three[1:], batch_pixels=1)
    expected = whole.upsample(picture, [5, 6], 4)
    hook = lambda _, arguments: sizes.append(len(arguments[0]))
    handle = three[1].net.register_forward_pre_hook(hook)
    torch.testing.assert_close(split.upsample(picture, [5, 6], 4), expected, rtol=1e-4, atol=1e-4)
    whole.upsample(picture, [5, 6], 4)
    handle.remove()
    assert sizes == [1, 1, 1, 1, 2, 2]


def test_stages_share_no_random_numbers(three, monkeypatch):
    """For the same seeds, each stage reads generators that no other stage reads."""
    used = {}

    def record(stage):
        original = stage.sample

        def sample(batch, noise, *rest):
            seeds = {generator.initial_seed() for generator in noise.generators}
            used.setdefault(stage, set()).update(seeds)
            return original(batch, noise, *rest)

        monkeypatch.setattr(stage, "sample", sample)

    for stage in three:
        record(stage)
    seeds = [0, 1, 2, 3, UPSAMPLER_256_OFFSET - 1]
    unclip = UnCLIP(three[0], upsamplers=three[1:])
    one = {1024: UpsamplingConfig(steps=1)}
    unclip.generate(["fox"] * len(seeds), seeds, "caption", upsampling=one)
    sets = [*used.values(), {seed + PRIOR_OFFSET for seed in seeds}]
    assert len(sets) == 4 and all(len(numbers) == len(seeds) for numbers in sets)
    together = set.union(*sets)
    assert len(together) == 4 * len(seeds) and max(together) < 1 << 32


def test_offloading_draws_the_same_and_keeps_one_part_on_the_device(monkeypatch):
    """The device is the CPU by another name, cpu:0, to tell it from where the stages wait."""
    decoder, low, high = package_cascade()
    expected = UnCLIP(decoder, upsamplers=(low, high)).generate(PROMPTS[:1], [3], "text")
    clip = FrozenCLIP()
    where, crowd = {}, []
    for part in (decoder, low, high, clip):

        def moved(device, part=part, to=part.to):
            where[part] = str(device)
            crowd.append(sum(place == "cpu:0" for place in where.values()))
            return to(device)

        monkeypatch.setattr(part, "to", moved)
    offloaded = UnCLIP(decoder, clip=clip, device="cpu:0", upsamplers=(low, high), offload=True)
    assert set(where.values()) == {"cpu"} and len(where) == 4
    assert torch.equal(offloaded.generate(PROMPTS[:1], [3], "text"), expected)
    assert max(crowd) == 1 and crowd.count(1) >= 4 and set(where.values()) == {"cpu"}
    UnCLIP(decoder, clip=clip, device="cpu:0", upsamplers=(low, high))
    assert set(where.values()) == {"cpu:0"}


@pytest.mark.parametrize(
    ("side", "times", "sizes"),
    [
        (64, 4, [256]),
        (1, 4, [256]),
        (127, 4, [256]),
        (129, 4, [1024]),
        (256, 4, [1024]),
        (3000, 4, [1024]),
        (64, 16, [256, 1024]),
        (256, 16, [256, 1024]),
        (64, None, [256, 1024]),
        (256, None, [1024]),
    ],
)
def test_a_picture_goes_to_the_upsampler_made_for_the_nearest_size(unclip, side, times, sizes):
    route = unclip.cascade.route(side, times)
    assert [stage.net_config.image_size for stage in route] == sizes


@pytest.mark.parametrize(("height", "width"), [(2, 3), (7, 70), (65, 33)])
def test_any_shape_keeps_its_shape(unclip, height, width):
    drawn = unclip.upsample(torch.zeros(1, 3, height, width), [0], 4)
    assert drawn.shape == (1, 3, 4 * height, 4 * width)


def test_upsamplers_where_they_do_not_belong_are_refused(three, releases):
    decoder, low, high = three
    with pytest.raises(UserError, match="1024 pixels cannot follow"):
        UnCLIP(decoder, upsamplers=(high,))
    with pytest.raises(UserError, match="256 pixels cannot follow"):
        Cascade((high, low))
    with pytest.raises(UserError, match="1024 pixels cannot follow"):
        UnCLIP.load(releases["decoder"], upsamplers=(releases["1024"], releases["256"]))
    with pytest.raises(UserError, match="holds a Decoder"):
        load_upsamplers([releases["decoder"]])


def test_a_size_without_its_upsampler_is_refused_before_anything_is_drawn(three, monkeypatch):
    decoder, low, _ = three
    unclip, picture = UnCLIP(decoder, upsamplers=(low,)), torch.zeros(1, 3, 64, 64)
    monkeypatch.setattr(decoder, "sample", lambda *_: pytest.fail("drawn"))
    with pytest.raises(UserError, match="64 or 256"):
        unclip.generate(PROMPTS, [0, 1], "text", size=1024)
    with pytest.raises(UserError, match="those to 256 loaded"):
        unclip.upsample(picture, [0], 16)
    with pytest.raises(UserError, match="none loaded"):
        UnCLIP(decoder).upsample(picture, [0])
    with pytest.raises(ValueError, match="seed"):
        unclip.upsample(picture, [0, 1])


def test_a_package_without_an_upsampler_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(DEFAULT_UPSAMPLERS, "256", tmp_path / "upsampler-256-openmoji")
    with pytest.raises(UserError, match="upsampler-256-openmoji is missing"):
        load_upsamplers(["256"])


def test_too_little_memory_is_a_sentence_before_anything_is_drawn(three, monkeypatch):
    cascade = Cascade(three[1:])
    monkeypatch.setattr(three[1], "sample", lambda *_: pytest.fail("drawn"))
    huge = torch.zeros(1, 3, 1, 1).expand(1, 3, 100_000, 200_000)
    with pytest.raises(UserError, match=r"at least \d+ GB of memory at 800000x400000"):
        cascade.upsample(huge, [0], 4)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(three[1], "sample", fail)
    with pytest.raises(UserError, match="memory on cpu for 2 pictures of 256x256"):
        cascade.upsample(torch.zeros(2, 3, 64, 64), [0, 1], 4)
