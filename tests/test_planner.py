"""The planner's counts equal closed forms, and what was counted by hand for the paper's stages."""

import functools
from dataclasses import replace

import pytest

from unclip_pl.cli import unclip as app
from unclip_pl.cli.plan import build_on_meta
from unclip_pl.planner import ResourceEstimate, estimate_resources, estimate_run

# Counted by walking GLIDE's and guided-diffusion's networks by hand: GFLOP per sample of a training
# step; parameters; H100 hours of the paper's run at MFU 0.5.
BY_HAND = {
    "decoder": (6660, 3446e6, 6130),
    "diffusion_prior": (1842.5, 1225e6, 2540),
    "ar_prior": (4743, 2012e6, 10900),
    "upsampler_256": (1594, 730e6, 920),
    "upsampler_1024": (3721, 282e6, 1070),
}


@functools.cache
def paper_run(name):
    """(estimate, batch size, steps, stage) of one of the paper's runs."""
    stage, data, steps = build_on_meta(f"stages/paper/{name}.yaml", [])
    estimate = estimate_resources(stage, getattr(data, "crop", None))
    return estimate, data.config.batch_size, steps, stage


@pytest.mark.parametrize("name", BY_HAND)
def test_operations_and_hours_of_the_papers_run_are_those_counted_by_hand(name):
    flops, parameters, hours = BY_HAND[name]
    estimate, batch, steps, stage = paper_run(name)
    # By hand, the AR prior's 576 tokens were counted as 577, and causal attention was not halved.
    assert estimate.flops / 1e9 == pytest.approx(flops, rel=0.015 if name == "ar_prior" else 0.003)
    tables = sum(
        p.numel()
        for key, p in stage.named_parameters()
        if "token_embedding" in key or key == "net.text_proj.weight"
    )
    # Counted by hand without the table of tokens.
    assert estimate.parameters - tables == pytest.approx(parameters, rel=0.02)
    run = estimate_run(estimate, 64, "fsdp", batch, steps, mfu=0.5, peak=989.4e12, memory=72e9)
    assert 64 * run.hours == pytest.approx(hours, rel=0.03)
    assert run.steps_per_hour * run.hours == pytest.approx(steps)


def test_activations_of_a_transformer_are_the_closed_form():
    activations = paper_run("diffusion_prior")[0].activations
    tokens, width, depth = 260, 2048, 24
    # A block saves its two LayerNorms' inputs (float32) and outputs, q, k, v, attention's output
    # and the MLP's two hidden layers (bfloat16).
    block = tokens * width * (2 * 4 + 2 * 2 + 3 * 2 + 2 + 2 * 4 * 2)
    assert activations["none"] == pytest.approx(depth * block, rel=0.1)
    assert activations["full"] == pytest.approx(depth * tokens * width * 4 + block, rel=0.2)
    # "selective" saves inputs of blocks, q, k, v, attention, its projection and both layers of the
    # MLP.
    products = tokens * width * (4 + 3 * 2 + 2 + 2 + 2 * 4 + 2)
    assert depth * products < activations["selective"] < depth * products + 1.2 * block


def test_selective_checkpointing_lies_between_none_and_full():
    for name in BY_HAND:
        activations = paper_run(name)[0].activations
        assert 0 < activations["full"] < activations["selective"] < activations["none"]


def test_state_is_20_bytes_per_parameter_and_fsdp_shards_it():
    activations = {"none": 1e9, "full": 1e8}
    estimate = ResourceEstimate(10**9, 10**8, 10**7, 1e12, activations, optimizer=8e9)
    ddp, fsdp = (
        estimate_run(estimate, 8, kind, 2048, 1000, mfu=0.4, peak=1e15, memory=20e9)
        for kind in ("ddp", "fsdp")
    )
    state = lambda run: run.weights + run.gradients + run.optimizer + run.ema
    assert state(ddp) == 20e9 and state(fsdp) == 20e9 / 8
    assert (fsdp.micro_batch, fsdp.accumulate) == (128, 2)
    assert fsdp.total <= 20e9 < fsdp.total + fsdp.micro_batch * 1e8
    assert ddp.steps_per_hour == pytest.approx(3600 * 8 * 0.4e15 / (2048 * 1e12))
    assert ddp.micro_batch == 0  # its state fills the whole memory


def test_a_network_that_is_not_trained_takes_no_gradients_and_no_optimizer_state():
    """The second network of Karlo's upsampler is as large as the first, and is not trained."""
    stage, data, _ = build_on_meta("stages/karlo/upsampler_256.yaml", [])
    estimate = estimate_resources(stage, data.crop)
    one = sum(parameter.numel() for parameter in stage.net.parameters())
    assert (estimate.parameters, estimate.frozen, estimate.idle) == (2 * one, one, one)
    for kind, shards in (("ddp", 1), ("fsdp", 4)):
        run = estimate_run(estimate, 4, kind, 128, 1000, mfu=0.4, peak=1e15, memory=72e9)
        assert run.weights == run.ema == 8 * one / shards  # the average holds both
        assert run.gradients == 4 * one / shards and run.optimizer == 8 * one / shards
    settings = {"mfu": 0.4, "peak": 1e15, "checkpointing": "none"}
    activations = estimate.activations["none"]
    needed = (28 + 2) * one + activations  # with autocast's copies of the trained network
    for memory, fitting in ((needed - 1, 0), (needed + 1, 1)):
        run = estimate_run(estimate, 1, "ddp", 1, 1000, memory=memory, **settings)
        assert run.micro_batch == fitting


def test_adapters_leave_weights_and_average_and_little_else(tmp_path):
    plain, tuned = (
        estimate_resources(build_on_meta("stages/karlo/decoder.yaml", overlays)[0])
        for overlays in ([], ["lightning_config/lora.yaml"])
    )
    adapters = tuned.parameters - plain.parameters
    # rank 16 of each layer's inputs and outputs: under 1 % of a network of this width
    assert 0 < adapters < 0.01 * plain.parameters
    assert tuned.frozen == plain.parameters and tuned.optimizer == 8 * adapters
    assert tuned.idle < 1e5  # what is frozen computes all the same
    assert tuned.activations["none"] < plain.activations["none"]


def test_the_state_is_that_of_the_optimizer(tmp_path):
    sizes = {}
    for name in ("adamw", "adamw8bit", "muon"):
        overlay = tmp_path / f"{name}.yaml"
        overlay.write_text(f"model: {{init_args: {{optimizer: {{name: {name}}}}}}}\n")
        stage, _, _ = build_on_meta("stages/karlo/diffusion_prior.yaml", [str(overlay)])
        sizes[name] = estimate_resources(stage).optimizer
    count = sum(parameter.numel() for parameter in stage.parameters())
    assert sizes["adamw"] == 8 * count
    # two bytes of a number, and two float32 scales of 256; float32 where a tensor is small
    assert sizes["adamw8bit"] == pytest.approx(count * (2 + 8 / 256), rel=0.001)
    assert 4 * count < sizes["muon"] < 4.2 * count  # almost all of it is in blocks


def test_a_clip_in_the_loop_takes_memory_and_time():
    """Its text tower computes token states at each step; LAION's ViT-H has 24 blocks of 1024."""
    overlays = ["lightning_config/clip/ViT-H-14.yaml"]
    stage, data, _ = build_on_meta("stages/diffusion_prior.yaml", overlays)
    assert data.text_states
    without, both = estimate_resources(stage), estimate_resources(stage, clip=data.clip.config)
    tokens, width, depth = 77, 1024, 24
    tower = depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    assert both.flops - without.flops == pytest.approx(tower, rel=0.01)
    assert both.clip == pytest.approx(4 * 986.1e6, rel=0.001) and without.clip == 0
    half = estimate_resources(stage, clip=replace(data.clip.config, precision="bf16"))
    assert half.clip == both.clip / 2
    for kind in ("ddp", "fsdp"):
        first, second = (
            estimate_run(estimate, 8, kind, 4096, 1000, mfu=0.4, peak=1e15, memory=4.3e9)
            for estimate in (without, both)
        )
        assert second.clip == both.clip  # on each GPU, whatever the strategy
        assert second.micro_batch < first.micro_batch and second.total <= 4.3e9
        assert second.hours / first.hours == pytest.approx(both.flops / without.flops)


@pytest.mark.parametrize(
    ("arguments", "clip"),
    [
        (["stages/diffusion_prior.yaml", "-c", "lightning_config/clip/ViT-H-14.yaml"], "3.94"),
        (["stages/paper/diffusion_prior.yaml"], "0.00"),
    ],
)
def test_the_command_counts_a_clip_only_where_it_runs(arguments, clip, capsys):
    assert app.main(["plan", *arguments, "--gpus", "8"]) == 0
    header, _, row = capsys.readouterr().out.splitlines()[4:7]
    assert dict(zip(header.split(" | "), row.split(" | ")))["CLIP"] == clip


def test_the_command_prints_a_row_for_each_number_of_gpus(capsys):
    stage = "stages/paper/ar_prior.yaml"
    assert app.main(["plan", stage, "--gpus", "1", "8", "--batch", "64"]) == 0
    output = capsys.readouterr().out
    assert output.count("| ddp |") == 2 and output.count("| fsdp |") == 1
    assert "1,000,000 steps of 64" in output
    for stage in ("stages/decoder.yaml", "stages/ar_prior.yaml"):
        assert app.main(["plan", stage, "--gpus", "8"]) == 0
        output = capsys.readouterr().out
        assert "| fsdp |" not in output and "fsdp is left out: optimizer.name muon" in output


def test_the_command_says_which_gpu_it_assumes_and_takes_another(capsys):
    def plan(*more: str) -> tuple[str, list[str]]:
        assert app.main(["plan", "stages/upsampler_256.yaml", "--gpus", "1", *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        return lines[0], lines[-2].split(" | ")

    assumed, h100 = plan()
    assert all(word in assumed for word in ("H100", "989", "40%", "80 GB", "--gpu", "A100"))
    assumed, a100 = plan("--gpu", "A100-40")
    assert "A100-40" in assumed and "312" in assumed and "40 GB" in assumed
    assert float(h100[11].replace(",", "")) / float(a100[11].replace(",", "")) == pytest.approx(
        989 / 312, rel=0.01
    )
    assumed, own = plan("--peak-tflops", "312", "--gpu-memory", "40")
    assert own == a100 and "of the type" not in assumed


@pytest.mark.parametrize(
    ("arguments", "keyword"),
    [
        ([], "--all"),
        (["stages/decoder.yaml", "--all"], "--all"),
        (["stages/decoder.yaml", "--mfu", "0"], "--mfu"),
        (["stages/paper/decodr.yaml"], "did you mean stages/paper/decoder.yaml"),
        (["stages/clip.yaml"], "CLIP"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(arguments, keyword, capsys):
    assert app.main(["plan", *arguments]) == 1
    assert keyword in capsys.readouterr().err
