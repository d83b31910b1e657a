"""Loading a CLIP without a network: every refusal is one sentence that says what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch

import unclip_pl
from tests.clip.tiny import CAPTIONS, MODEL, PREPROCESS, refusal, write_clip
from unclip_pl.clip import config as clip_config
from unclip_pl.clip.checks import check_model
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.errors import UserError


def test_a_local_checkpoint_of_a_named_model(named, clip):
    weights = {f"module.{key}": value for key, value in clip.model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": weights}, named / "epoch_3.pt")
    local = FrozenCLIP(CLIPConfig("tiny", str(named / "epoch_3.pt")))
    tokens = local.tokenize(CAPTIONS)
    assert torch.equal(local.embed_text(tokens).embed, clip.embed_text(tokens).embed)


def test_openais_own_file_needs_quick_gelu_and_then_loads(named, clip):
    file = named / "OpenAI.pt"
    torch.jit.save(
        torch.jit.trace_module(clip.model, {"encode_image": torch.zeros(1, 3, 32, 32)}), file
    )
    refusal(CLIPConfig("tiny", str(file)), "QuickGELU", "use tiny-quickgelu")
    tokens = clip.tokenize(CAPTIONS)
    for quick in (
        CLIPConfig("tiny-quickgelu", str(file)),
        CLIPConfig("tiny", str(file), force_quick_gelu=True),
    ):
        loaded = FrozenCLIP(quick)
        assert loaded.fingerprint()["activation"] == "QuickGELU"
        assert not torch.equal(loaded.embed_text(tokens).embed, clip.embed_text(tokens).embed)
        assert all(
            torch.equal(a, b)
            for a, b in zip(loaded.model.state_dict().values(), clip.model.state_dict().values())
        )


def test_every_tag_with_the_wrong_activation_is_an_error_that_names_the_right_model():
    wrong = 0
    for name, tag in open_clip.list_pretrained():
        wants = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
        has = (open_clip.get_model_config(name) or {}).get("quick_gelu", False)
        if wants and not has:
            wrong += 1
            with pytest.raises(
                UserError, match="QuickGELU.*(use .*-quickgelu|with force_quick_gelu)"
            ):
                check_model(CLIPConfig(name, tag))
            check_model(CLIPConfig(name, tag, force_quick_gelu=True))
        elif not wants and not has:
            with pytest.raises(UserError, match="GELU.*remove force_quick_gelu"):
                check_model(CLIPConfig(name, tag, force_quick_gelu=True))
            check_model(CLIPConfig(name, tag))
    assert wrong > 15


def test_wrong_activations_by_name():
    assert "use ViT-L-14-quickgelu" in refusal(CLIPConfig("ViT-L-14", "openai"))
    assert "use ViT-B-16-quickgelu" in refusal(CLIPConfig("ViT-B-16", "dfn2b"))
    assert "use ViT-B-32-quickgelu" in refusal(CLIPConfig("ViT-B-32", "metaclip-400m"))
    refusal(
        CLIPConfig("ViT-L-14-quickgelu", "laion2b_s32b_b82k"), "trained with GELU", "use ViT-L-14."
    )


def test_a_hub_file_given_by_its_path_is_known(named, tmp_path):
    folder = tmp_path / "models--timm--vit_large_patch14_clip_224.openai" / "snapshots" / "0"
    folder.mkdir(parents=True)
    (folder / "open_clip_model.safetensors").write_bytes(b"")
    refusal(
        CLIPConfig("ViT-L-14", str(folder / "open_clip_model.safetensors")),
        "use ViT-L-14-quickgelu",
    )


def test_without_network_it_says_where_to_put_the_files():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    refusal(
        CLIPConfig("ViT-B-32", "laion2b_s34b_b79k"),
        "could not be downloaded as HF_HUB_OFFLINE is set",
        "local-dir:",
        "huggingface.co/laion/CLIP-ViT-B-32",
    )


def test_names_that_do_not_exist(tmp_path):
    refusal(CLIPConfig("vit-l-14-quickgelo", "openai"), "did you mean ViT-L-14-quickgelu")
    refusal(CLIPConfig("zzzzzzzz", "openai"), "list_models")
    refusal(CLIPConfig(str(tmp_path), "openai"), f"a folder is given as local-dir:{tmp_path}")
    refusal(CLIPConfig("ViT-B-32", "opanai"), "neither a file nor a tag", "laion2b_s34b_b79k")
    refusal(CLIPConfig("ViT-B-32"), "needs weights", "laion2b_s34b_b79k")
    with pytest.raises(UserError, match="precision is fp8"):
        CLIPConfig(precision="fp8")


def test_folders_that_are_not_whole(tmp_path, tiny, monkeypatch):
    refusal(
        CLIPConfig(f"local-dir:{tmp_path}/none"),
        "no open_clip folder",
        "open_clip_model.safetensors",
    )
    refusal(CLIPConfig(tiny, "openai"), "brings its own weights")
    (tmp_path / "open_clip_config.json").write_text("{")
    refusal(CLIPConfig(f"local-dir:{tmp_path}"), "not JSON")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS})
    )
    refusal(CLIPConfig(f"local-dir:{tmp_path}"), "holds no weights")
    monkeypatch.setattr(clip_config, "EMBEDDED", tmp_path)
    refusal(CLIPConfig(), "lightning fit -c stages/clip.yaml")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"garbage" * 100)
    refusal(CLIPConfig(f"local-dir:{tmp_path}"), "cannot be loaded", "right file")


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_files_of_garbage_and_of_code(named, monkeypatch, clip):
    monkeypatch.setenv("EVIL", str(named / "evil"))
    (named / "text.pt").write_bytes(b"not a checkpoint" * 100)
    (named / "empty.pt").write_bytes(b"")
    torch.save({"state_dict": {"logit_scale": torch.ones(())}}, named / "other.pt")
    torch.save({"state_dict": clip.model.state_dict(), "extra": Evil()}, named / "evil.pt")
    torch.save(clip.model, named / "whole.pt")
    for file in ("text.pt", "empty.pt", "other.pt"):
        refusal(
            CLIPConfig("tiny", str(named / file)), "cannot be loaded", file, "get the right file"
        )
    for file in ("evil.pt", "whole.pt"):
        refusal(CLIPConfig("tiny", str(named / file)), "Python objects that could run code")
    assert not (named / "evil").exists()
    refusal(CLIPConfig("tiny", str(named / "missing.pt")), "neither a file nor a tag")


@pytest.mark.parametrize(
    "text", [{"pool_type": "last"}, {"pool_type": "first"}, {"pool_type": "none"}]
)
def test_text_towers_without_an_end_token_are_refused(tmp_path, text):
    cfg = MODEL | {"text_cfg": MODEL["text_cfg"] | text}
    config = CLIPConfig(write_clip(tmp_path / "c", model_cfg=cfg))
    refusal(config, "end token", "use another")


def test_import_is_light_and_loading_silent(tiny):
    code = (
        "import logging, sys\n"
        "from unclip_pl.clip.config import CLIPConfig\n"
        "from unclip_pl.clip.frozen import FrozenCLIP\n"
        "assert not {'open_clip', 'torchvision', 'timm'} & set(sys.modules)\n"
        f"clip = FrozenCLIP(CLIPConfig({tiny!r}))\n"
        "clip.fingerprint()\n"
        "root = logging.getLogger()\n"
        "assert not root.handlers and root.level == logging.WARNING\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", code],
        cwd=Path(unclip_pl.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
