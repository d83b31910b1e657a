"""The plan's counts are those of the closed forms, and of what others counted by hand for the
paper's networks."""

import functools
from dataclasses import replace

import pytest

from unclip_pl import planner as plan
from unclip_pl.cli import unclip as app
from unclip_pl.cli.plan import build_on_meta

# Counted by walking GLIDE's and guided-diffusion's networks by hand: GFLOP of a training step a
# sample; parameters; H100 hours of the paper's run at MFU 0.5.
BY_HAND = {
    "decoder": (6660, 3446e6, 6130), "diffusion_prior": (1842.5, 1225e6, 2540), "ar_prior": (4743, 2012e6, 10900),
    "upsampler_256": (1594, 730e6, 920), "upsampler_1024": (3721, 282e6, 1070),
}  # fmt: skip


@functools.cache
def planned(name):
    stage, data, steps = build_on_meta(f"stages/paper/{name}.yaml", [])
    return plan.count(stage, getattr(data, "crop", None)), data.config.batch_size, steps, stage


@pytest.mark.parametrize("name", BY_HAND)
def test_operations_and_hours_of_the_papers_run_are_those_counted_by_hand(name):
    flops, parameters, hours = BY_HAND[name]
    needs, batch, steps, stage = planned(name)
    # the AR prior's 576 tokens were counted as 577, and half of a causal attention not left out
    assert needs.flops / 1e9 == pytest.approx(flops, rel=0.015 if name == "ar_prior" else 0.003)
    tables = sum(
        p.numel()
        for key, p in stage.named_parameters()
        if "token_embedding" in key or key == "net.text_proj.weight"
    )
    assert needs.parameters - tables == pytest.approx(
        parameters, rel=0.02
    )  # by hand without the table of tokens
    row = plan.row(needs, 64, "fsdp", batch, steps, mfu=0.5, peak=989.4e12, memory=72e9)
    assert 64 * row.hours == pytest.approx(hours, rel=0.03)
    assert row.steps_an_hour * row.hours == pytest.approx(steps)


def test_activations_of_a_transformer_are_the_closed_form():
    needs = planned("diffusion_prior")[0]
    tokens, width, depth = 260, 2048, 24
    # a block keeps its two LayerNorms' inputs (float32) and outputs, q, k, v, attention's output
    # and the MLP's two hidden layers (bfloat16)
    block = tokens * width * (2 * 4 + 2 * 2 + 3 * 2 + 2 + 2 * 4 * 2)
    assert needs.activations["none"] == pytest.approx(depth * block, rel=0.1)
    assert needs.activations["full"] == pytest.approx(depth * tokens * width * 4 + block, rel=0.2)
    # selective keeps inputs of blocks, q, k, v, attention, its projection and both layers of the
    # MLP
    products = tokens * width * (4 + 3 * 2 + 2 + 2 + 2 * 4 + 2)
    assert depth * products < needs.activations["selective"] < depth * products + 1.2 * block


def test_selective_checkpointing_lies_between_none_and_full():
    for name in BY_HAND:
        kept = planned(name)[0].activations
        assert 0 < kept["full"] < kept["selective"] < kept["none"]


def test_state_is_20_bytes_a_parameter_and_fsdp_shares_it_out():
    needs = plan.Needs(10**9, 10**8, 10**7, 1e12, {"none": 1e9, "full": 1e8})
    ddp, fsdp = (
        plan.row(needs, 8, kind, 2048, 1000, mfu=0.4, peak=1e15, memory=20e9)
        for kind in ("ddp", "fsdp")
    )
    state = lambda row: row.weights + row.gradients + row.optimizer + row.ema
    assert state(ddp) == 20e9 and state(fsdp) == 20e9 / 8
    assert (fsdp.micro_batch, fsdp.accumulate) == (
        128,
        2,
    ) and fsdp.total <= 20e9 < fsdp.total + fsdp.micro_batch * 1e8
    assert ddp.steps_an_hour == pytest.approx(3600 * 8 * 0.4e15 / (2048 * 1e12))
    assert ddp.micro_batch == 0  # its state alone is all of the memory


def test_a_clip_in_the_loop_takes_memory_and_time():
    """Its text tower gives token states at each step; LAION's ViT-H has 24 x 1024 for 77 tokens."""
    overlays = ["lightning_config/clip/ViT-H-14.yaml"]
    stage, data, _ = build_on_meta("stages/diffusion_prior.yaml", overlays)
    assert data.text_states
    alone, both = plan.count(stage), plan.count(stage, clip=data.clip.config)
    tokens, width, depth = 77, 1024, 24
    tower = depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    assert both.flops - alone.flops == pytest.approx(tower, rel=0.01)
    assert both.clip == pytest.approx(4 * 986.1e6, rel=0.001) and alone.clip == 0
    half = plan.count(stage, clip=replace(data.clip.config, precision="bf16"))
    assert half.clip == both.clip / 2
    for kind in ("ddp", "fsdp"):
        rows = [
            plan.row(needs, 8, kind, 4096, 1000, mfu=0.4, peak=1e15, memory=4.3e9)
            for needs in (alone, both)
        ]
        assert rows[1].clip == both.clip  # on each GPU, whatever the strategy
        assert rows[1].micro_batch < rows[0].micro_batch and rows[1].total <= 4.3e9
        assert rows[1].hours / rows[0].hours == pytest.approx(both.flops / alone.flops)


@pytest.mark.parametrize(
    ("arguments", "clip"),
    [
        (["stages/diffusion_prior.yaml", "-c", "lightning_config/clip/ViT-H-14.yaml"], "3.94"),
        (["stages/paper/diffusion_prior.yaml"], "0.00"),
    ],
)
def test_the_command_counts_a_clip_only_where_it_runs(arguments, clip, capsys):
    assert app.main(["plan", *arguments, "--gpus", "8"]) == 0
    header, _, row = capsys.readouterr().out.splitlines()[2:5]
    assert dict(zip(header.split(" | "), row.split(" | ")))["CLIP"] == clip


def test_the_command_prints_a_row_for_each_number_of_gpus(capsys):
    assert app.main(["plan", "stages/upsampler_256.yaml", "--gpus", "1", "8", "--batch", "64"]) == 0
    said = capsys.readouterr().out
    assert (
        said.count("| ddp |") == 2 and said.count("| fsdp |") == 1 and "10,000 steps of 64" in said
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "takes a stage's YAML"), (["stages/decoder.yaml", "--all"], "give one of the two"), (["stages/decoder.yaml", "--mfu", "0"], "--mfu above 0"),
        (["stages/paper/decodr.yaml"], "did you mean stages/paper/decoder.yaml"), (["stages/clip.yaml"], "trains a CLIP, which cannot be planned"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_a_sentence(arguments, says, capsys):
    assert app.main(["plan", *arguments]) == 1
    assert says in capsys.readouterr().err
