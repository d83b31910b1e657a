"""`lightning fit --init` on imported weights: the loss falls from where they left it, with all
weights or with adapters, and what comes out draws in diffusers."""

import random
from pathlib import Path

import pytest
import torch
import yaml

from tests.interop import kit
from unclip_pl.cli.configs import find_configs
from unclip_pl.cli.lightning import expand_resume, main
from unclip_pl.cli.lightning_cli import build_cli
from unclip_pl.cli.unclip import main as unclip
from unclip_pl.data import openmoji
from unclip_pl.networks.lora import merged
from unclip_pl.pipeline.interop.importing import import_karlo
from unclip_pl.pipeline.weights import load_stage, read_weights
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.training.lora import LoRA
from unclip_pl.utils.errors import UserError

STAGES = {"prior": ("diffusion_prior", DiffusionPrior), "decoder": ("decoder", Decoder)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small Karlo that draws 64 pixels, imported; and shards of a few drawings."""
    folder = tmp_path_factory.mktemp("tune")
    kit.save(folder / "theirs", *kit.pipelines(side=64))
    import_karlo(folder / "theirs", folder / "karlo", precision="fp32")
    train, val = openmoji.composition_split(openmoji.list_drawings())
    draw = random.Random(0)
    shards = (draw.sample(train, 12), draw.sample(val, 4))
    openmoji.write_shards(folder, *shards, 64, progress=False)
    return folder


def run(home: Path, name: str, out: Path, *flags: str) -> list[str]:
    """The command line of a short run from the imported weights."""
    overlay = out.parent / f"{name}.yaml"
    overlay.parent.mkdir(exist_ok=True, parents=True)
    settings = read_weights(home / "karlo" / name).hyper_parameters
    changed = {"name": "adamw", "lr": 2e-3, "warmup_steps": 0, "decay": "constant"}
    settings |= {"optimizer": settings["optimizer"] | changed}
    settings |= {"sampling": settings["sampling"] | {"steps": 2}}
    overrides = {"model": {"init_args": settings}}
    if name == "prior":
        # In place of the stage's own, of which the variance alone would take ten seconds.
        monitor = {"class_path": "unclip_pl.training.prior_monitor.PriorMonitor"}
        variance = {"class_path": "unclip_pl.training.variance.AnalyticVariance"}
        overrides["trainer"] = {"callbacks": [monitor, variance | {"init_args": {"draws": 1}}]}
    overlay.write_text(yaml.safe_dump(overrides))
    return [
        *("fit", "-c", f"stages/{STAGES[name][0]}.yaml", "-c", str(overlay)),
        *("--data.train", str(home / "train-*.tar"), "--data.val", str(home / "val-*.tar")),
        *("--data.store", str(out.parent / "store"), "--data.loader.batch_size", "4"),
        *("--data.clip.model", f"local-dir:{home / 'karlo' / 'clip'}"),
        *("--trainer.default_root_dir", str(out), "--trainer.max_steps", "6"),
        *("--trainer.val_check_interval", "6", "--trainer.limit_val_batches", "1"),
        *("--newest.every_n_train_steps", "3", "--ema.decay", "0", "--pictures.count", "0"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--trainer.logger", "false", "--init", str(home / "karlo" / name), *flags),
    ]


def fit(words: list[str]) -> None:
    build_cli(expand_resume(find_configs(words)))


def loss(stage, name: str) -> float:
    """On fixed data and noise, with no caption dropped."""
    torch.manual_seed(0)
    batch = {"image": torch.rand(4, 3, 64, 64) * 0.2 + 0.8, "image_embed": torch.randn(4, 32)}
    batch |= {"text_embed": torch.randn(4, 32), "text_states": torch.randn(4, 77, 32)}
    batch["text_mask"] = torch.arange(77).expand(4, -1) < 5
    generator = torch.Generator().manual_seed(0)
    return stage.loss(batch, generator, cond_dropout=0.0)["loss"].item()


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_training_goes_on_from_the_imported_weights(home, name, tmp_path):
    kind = STAGES[name][1]
    fit(run(home, name, tmp_path / "run"))
    before = load_stage(home / "karlo" / name, kind)
    (newest,) = (tmp_path / "run" / "checkpoints").glob("newest-step=6.ckpt")
    after = load_stage(newest, kind)
    assert any(not torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters()))
    if name == "decoder":
        assert loss(after, name) < 0.97 * loss(before, name)
    else:  # mean and std of the weights are kept, whatever those of the new data are
        assert torch.equal(after.normalizer.mean, before.normalizer.mean)
        assert torch.equal(after.normalizer.std, before.normalizer.std)
        assert torch.equal(after.net.empty_states, before.net.empty_states)
    others = [home / "karlo" / other for other in ("prior", "decoder") if other != name]
    words = ["export", str(newest), *map(str, others), str(home / "karlo" / "upsampler-256")]
    out = tmp_path / "diffusers"
    assert unclip([*words, "--to", "diffusers", "--out", str(out), "--precision", "fp32"]) == 0
    pipeline = kit.loaded(out, "UnCLIPPipeline")
    sampling = {"prompt": ["a red apple"], "decoder_num_inference_steps": 2}
    drawn = pipeline(
        prior_num_inference_steps=2, super_res_num_inference_steps=2, output_type="np", **sampling
    )
    assert drawn.images.shape == (1, 256, 256, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_adapters_train_resume_and_are_merged(home, name, tmp_path, capsys):
    kind = STAGES[name][1]
    lora = ["-c", "lightning_config/lora.yaml", "--model.optimizer.lr", "0.01"]
    lora += ["--model.optimizer.warmup_steps", "0"]
    words = run(home, name, tmp_path / "run", *lora)
    fit(words)
    checkpoint = tmp_path / "run" / "checkpoints" / "newest-step=6.ckpt"
    held = torch.load(checkpoint, weights_only=True)
    adapters = [key for key in held["state_dict"] if ".lora_" in key]
    assert adapters and held["lora_scale"] == 1
    before = load_stage(home / "karlo" / name, kind)
    after = load_stage(checkpoint, kind)
    changed = {
        key
        for key, value in after.state_dict().items()
        if not torch.equal(value, before.state_dict()[key])
    }
    adapted = {key.split(".lora_")[0] + ".weight" for key in adapters}
    if name == "prior":  # its variance is estimated when training ends, with the adapters
        assert after.x0_error.isfinite().all()
        changed -= {"x0_error"}
    assert changed == adapted
    assert all(key.split(".")[-2] in ("qkv", "context_kv", "proj") for key in changed)
    assert loss(after, name) < loss(before, name)
    out = tmp_path / "release"
    assert unclip(["export", str(checkpoint), "--out", str(out)]) == 0
    assert load_stage(out, kind).state_dict().keys() == before.state_dict().keys()

    more = ["--trainer.max_steps", "8", "--resume", "auto"]
    fit([*words, *more])
    assert (tmp_path / "run" / "checkpoints" / "newest-step=8.ckpt").exists()
    plain = run(home, name, tmp_path / "run")
    assert main([*plain, *more]) == 1
    assert "The checkpoint has adapters (LoRA)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_merged_weights_compute_what_adapters_do(kind):
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    torch.manual_seed(0)
    if kind == "linear":
        layer, x = torch.nn.Linear(6, 10), torch.randn(3, 6)
    else:
        layer, x = torch.nn.Conv2d(6, 10, 3, padding=1), torch.randn(3, 6, 5, 5)
    net = torch.nn.Sequential(layer)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    peft.inject_adapter_in_model(config, net)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    plain = torch.nn.Sequential(type(layer)(6, 10, *((3,) if kind == "convolution" else ())))
    if kind == "convolution":
        plain[0].padding = (1, 1)
    plain.load_state_dict(merged(net.state_dict(), 6 / 2))
    torch.testing.assert_close(plain(x), net(x), rtol=1e-4, atol=1e-4)


def test_adapters_that_cannot_be_are_refused(home):
    pytest.importorskip("peft", reason="adapters are peft's")
    stage = Decoder(**read_weights(home / "karlo" / "decoder").hyper_parameters)
    with pytest.raises(UserError, match="finds no layers nowhere in the network: set targets to"):
        LoRA(targets=["nowhere"]).setup(None, stage, "fit")
    with pytest.raises(ValueError, match="give a rank of 1 or more"):
        LoRA(rank=0)
    muon = stage.optimizer_config.__class__(name="muon")
    stage.optimizer_config = muon
    with pytest.raises(UserError, match="set it to adamw"):
        LoRA().setup(None, stage, "fit")
