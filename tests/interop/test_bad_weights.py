"""Weights that cannot be imported: one sentence says why, nothing in them runs, nothing is left."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.interop import kit, originals
from tests.interop.broken import Touch, cut
from unclip_pl.cli.unclip import main
from unclip_pl.clip.config import CONFIG_FILE
from unclip_pl.pipeline.interop.towers import convert_towers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    home = tmp_path_factory.mktemp("whole")
    generate, vary = kit.pipelines(64, 64, side=64, dim=64)
    kit.save(home / "diffusers", generate, vary)
    originals.save(home / "own", generate)
    convert_towers(home / "diffusers/text_encoder", home / "diffusers/image_encoder", home / "clip")
    return home


@pytest.fixture
def folders(whole, tmp_path):
    """Links to break: `own_copy` of a file first."""
    shutil.copytree(whole, tmp_path / "in", copy_function=os.symlink)
    return tmp_path / "in"


def own_copy(file: Path) -> Path:
    """The file, no longer a link to the one that all tests share."""
    if file.is_symlink():
        shared = file.resolve()
        file.unlink()
        shutil.copy(shared, file)
    return file


def refused(folder: Path, capsys, *options: str) -> str:
    """The sentence with which an import is refused; asserts that it is one and leaves nothing."""
    out = folder.parent.parent / "out" / "karlo"
    capsys.readouterr()
    assert main(["import", "karlo", str(folder), "--out", str(out), *options]) == 1
    said = capsys.readouterr().err
    assert said.startswith("unclip: ") and said.count("\n") == 1 and "Traceback" not in said
    assert not out.parent.exists() or not list(out.parent.iterdir())
    return said


def weights(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return own_copy(file)


@pytest.mark.parametrize("part", ["prior", "decoder", "super_res_last", "text_encoder"])
def test_a_file_that_is_cut_off(folders, capsys, part):
    cut(weights(folders / "diffusers" / part))
    said = refused(folders / "diffusers", capsys)
    assert "damaged or cut off" in said and f"{part}/" in said


@pytest.mark.parametrize("lost", ["a shard", "half a shard"])
def test_a_shard_that_is_lost(folders, capsys, lost):
    prior = folders / "diffusers" / "prior"
    tensors = load_file(weights(prior))
    weights(prior).unlink()
    names = sorted(tensors)
    places = {}
    for i in range(2):
        shard = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[i::2]}, prior / shard)
        places |= dict.fromkeys(names[i::2], shard)
    index = {"metadata": {}, "weight_map": places}
    (prior / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (prior / shard).unlink() if lost == "a shard" else cut(prior / shard)
    assert shard in refused(folders / "diffusers", capsys)


@pytest.mark.parametrize(
    "lost", ["decoder", "text_proj", "text_encoder", "prior_scheduler", "super_res_last", "prior"]
)
def test_a_part_that_is_missing(folders, capsys, lost):
    shutil.rmtree(folders / "diffusers" / lost)
    said = refused(folders / "diffusers", capsys)
    assert f"{lost} is missing" in said or f"{lost}/scheduler_config.json is missing" in said


def test_weights_that_are_missing(folders, capsys):
    weights(folders / "diffusers" / "decoder").unlink()
    assert "decoder has no weights" in refused(folders / "diffusers", capsys)


def test_another_pipeline(folders, capsys):
    index = own_copy(folders / "diffusers" / "model_index.json")
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    said = refused(folders / "diffusers", capsys)
    assert "holds a StableDiffusionPipeline, and Karlo is a UnCLIPPipeline" in said


def test_a_file_of_another_model(folders, capsys):
    source = folders / "diffusers"
    shutil.copy(weights(source / "super_res_first"), weights(source / "decoder"))
    assert "another model" in refused(source, capsys)


def test_a_network_of_other_sizes(folders, capsys):
    file = weights(folders / "diffusers" / "prior")
    tensors = load_file(file)
    tensors["proj_in.weight"] = tensors["proj_in.weight"][:, :-1].contiguous()
    save_file(tensors, file)
    said = refused(folders / "diffusers", capsys)
    assert "proj_in.weight of shape (128, 63), which gives no (128, 64)" in said


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        ("prior", "norm_in_type", "layer"),
        ("decoder", "class_embed_type", "projection"),
        ("super_res_first", "add_attention", True),
        ("decoder", "down_block_types", ["CrossAttnDownBlock2D"] * 4),
    ],
)
def test_settings_that_karlo_does_not_have(folders, capsys, part, setting, value):
    file = own_copy(folders / "diffusers" / part / "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    said = refused(folders / "diffusers", capsys)
    assert f"{part}/config.json has {setting} {value}" in said


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        ("prior", "num_layers", "two"),
        ("prior", "num_attention_heads", 0),
        ("decoder", "block_out_channels", [33, 66, 99, 132]),
        ("decoder", "sample_size", None),
        ("super_res_last", "layers_per_block", -1),
        ("text_encoder", "num_hidden_layers", None),
        ("text_encoder", "num_attention_heads", 0),
        ("image_encoder", "patch_size", "x"),
        ("image_encoder", "hidden_size", {}),
    ],
)
def test_settings_that_make_no_network(folders, capsys, part, setting, value):
    file = own_copy(folders / "diffusers" / part / "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    refused(folders / "diffusers", capsys)


def test_code_in_a_pickle_does_not_run(folders, capsys):
    prior = folders / "diffusers" / "prior"
    tensors = load_file(weights(prior))
    weights(prior).unlink()
    torch.save(tensors, prior / "diffusion_pytorch_model.bin")
    assert main(["import", "karlo", str(folders / "diffusers"), "--out", str(folders / "a")]) == 0
    evil = tensors | {"proj_in.bias": Touch(folders / "ran")}
    torch.save(evil, prior / "diffusion_pytorch_model.bin")
    said = refused(folders / "diffusers", capsys)
    assert "could run code when loaded" in said and not (folders / "ran").exists()


@pytest.mark.slow
def test_another_clip(folders, capsys):
    shutil.rmtree(folders / "diffusers" / "image_encoder")
    given = ["--clip", f"local-dir:{folders / 'clip'}"]
    words = ["import", "karlo", str(folders / "diffusers"), "--out", str(folders / "a")]
    assert main([*words, *given]) == 0
    for name, tower in zip(("text_encoder", "image_encoder"), kit.towers(64, seed=8)):
        tower.save_pretrained(folders / "other" / name)
    convert_towers(folders / "other/text_encoder", folders / "other/image_encoder", folders / "b")
    said = refused(folders / "diffusers", capsys, "--clip", f"local-dir:{folders / 'b'}")
    assert "is not the one whose text tower is in" in said
    file = own_copy(folders / "clip" / CONFIG_FILE)  # the right weights with another activation
    config = json.loads(file.read_text())
    config["model_cfg"]["quick_gelu"] = False
    file.write_text(json.dumps(config))
    assert "is not the one whose text tower" in refused(folders / "diffusers", capsys, *given)
    assert "name the CLIP (--clip" in refused(folders / "diffusers", capsys)
    kit.towers(32)[1].save_pretrained(folders / "diffusers" / "image_encoder")
    said = refused(folders / "diffusers", capsys)
    assert "projection_dim 64" in said and "towers of different CLIPs" in said


@pytest.mark.parametrize("file", ["prior*.ckpt", "decoder*.ckpt", "*sr*.ckpt", "*stats*.th"])
def test_karlos_own_files_broken(folders, capsys, file):
    given = ["--clip", f"local-dir:{folders / 'clip'}"]
    path = own_copy(next((folders / "own").glob(file)))
    held = torch.load(path)
    cut(path)
    assert path.name in refused(folders / "own", capsys, *given)
    torch.save({"state_dict": Touch(folders / "ran")}, path)
    said = refused(folders / "own", capsys, *given)
    assert "could run code when loaded" in said and not (folders / "ran").exists()
    for other in ({"weights": 1}, (1.0, 2.0), {"state_dict": {"a": 1}}):
        torch.save(other, path)
        assert path.name in refused(folders / "own", capsys, *given)
    if isinstance(held, dict):
        prefix = next(iter(held["state_dict"])).split(".")[0]
        torch.save({"state_dict": {f"{prefix}.conv.weight": torch.ones(2)}}, path)
        assert "another model" in refused(folders / "own", capsys, *given)
    path.unlink()
    assert f"must have one file {file}" in refused(folders / "own", capsys, *given)


def test_a_folder_that_is_none_and_one_that_exists(folders, capsys):
    assert "There is no folder" in refused(folders / "nowhere", capsys)
    assert "model_index.json is missing" in refused(folders / "clip", capsys)
    words = ["import", "karlo", str(folders / "diffusers"), "--out", str(folders / "clip")]
    assert main(words) == 1
    assert "exists already" in capsys.readouterr().err
    said = refused(folders / "diffusers", capsys, "--clip-weights", "openai")
    assert "--clip-weights are those of --clip" in said
