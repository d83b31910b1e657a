"""Whole models as folders, and as repositories of the Hugging Face hub.

config.json              names the parts
README.md                the card
decoder/, prior/, upsampler-256/, upsampler-1024/    releases
clip/                    their CLIP, an open_clip folder; none where it is the one in the package
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from unclip_pl import __version__
from unclip_pl.clip.config import CLIPConfig, folder_of, read_folder_config
from unclip_pl.clip.folder import save_clip
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.clip.loading import import_open_clip
from unclip_pl.pipeline import release
from unclip_pl.pipeline.release import Release
from unclip_pl.stages.base import Stage
from unclip_pl.stages.upsampler import Upsampler
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_folder
from unclip_pl.utils.outputs import require_new

FORMAT = 1
PART = re.compile(r"prior|decoder|upsampler-\d+")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
SIBLING_CLIP = "local-dir:../clip"
"""How a release names a CLIP in the folder next to its own."""
IN_PACKAGE = "openmoji", "openmoji-judge"


class Pretrained:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of an `UnCLIP`."""

    clip: FrozenCLIP

    @property
    def stages(self) -> list[Stage]:
        """Prior (if any), decoder and upsamplers."""
        raise NotImplementedError

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> Self:
        """Build the pipeline from release folders."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **settings: Any,
    ) -> Self:
        """A whole model, from a folder or from the hub.

        Args:
            model: a folder that `save_pretrained` or `unclip import` wrote, or "org/name".
            revision: a branch, tag or commit of the hub.
            cache_dir: where downloads are kept; None: huggingface_hub's own folder.
            token: for private models; None: the one that you are logged in with.
            local_files_only: use only what is in the cache.
            settings: as for `load`: device, offload, precision, compile, cuda_graphs, clip.

        Raises:
            UserError: there is no such folder or model, or the hub cannot be reached.
        """
        folder = Path(model)
        if not folder.is_dir():
            folder = download(str(model), revision, cache_dir, token, local_files_only)
        parts = read_parts(folder)
        prior = folder / "prior" if "prior" in parts else None
        upsamplers = [folder / part for part in parts if part.startswith("upsampler-")]
        return cls.load(folder / "decoder", prior, upsamplers=upsamplers, **settings)

    def save_pretrained(self, folder: str | os.PathLike, card: str | None = None) -> Path:
        """Write the whole model as a new folder, in float16; all of it or nothing.

        Args:
            folder: the new folder.
            card: its README.md; None: a short one.

        Raises:
            UserError: `folder` exists, or weights are not finite in float16.
        """
        folder = Path(folder)
        require_new(folder)
        with atomic_folder(folder) as temporary:
            own_clip = self.clip.config.model not in IN_PACKAGE
            if own_clip:
                copy_clip(self.clip, temporary / "clip")
            parts = []
            for stage in self.stages:
                parts.append(_part_of(stage))
                _write_stage(stage, temporary / parts[-1], own_clip)
            write_parts(temporary, parts, card or model_card(folder.name, parts))
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a model of unclip_pl",
        card: str | None = None,
    ) -> str:
        """Save the model into a repository of the hub, which is made if there is none.

        Args:
            repo_id: "org/name".
            revision: the branch; None: main.
            private: of a new repository.
            token: with the right to write; None: the one that you are logged in with.
            commit_message: of the upload.
            card: as in `save_pretrained`.

        Returns:
            the address of the commit.

        Raises:
            UserError: the hub cannot be reached, or refuses.
        """
        _require_name(repo_id)
        with tempfile.TemporaryDirectory() as home, _explained(repo_id):
            from huggingface_hub import HfApi

            folder = self.save_pretrained(Path(home) / repo_id.rpartition("/")[2], card)
            api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
            )
        return str(done.commit_url)


def _part_of(stage: Stage) -> str:
    if isinstance(stage, Upsampler):
        return f"upsampler-{stage.net_config.image_size}"
    return "decoder" if type(stage).__name__ == "Decoder" else "prior"


def _write_stage(stage: Stage, folder: Path, own_clip: bool) -> None:
    """A release of a stage whose CLIP is in the folder next to it, or in the package."""
    fingerprint = stage.clip_fingerprint
    if fingerprint is not None and own_clip:
        config = asdict(CLIPConfig(SIBLING_CLIP))
        fingerprint = fingerprint | {"config": config}
    steps = stage.global_step or stage.trained_steps  # of a trainer, if it has been in one
    name, tensors = type(stage).__name__, dict(stage.state_dict())
    made = Release(name, dict(stage.hparams), fingerprint, tensors, steps)
    card = f"{FRONT_MATTER}# {folder.name}\n\nA {made.stage}, part of the model one folder up.\n"
    release.write(folder, made, card, exact=[name for name, _ in stage.named_buffers()])


def copy_clip(clip: FrozenCLIP, out: Path) -> None:
    """Write a CLIP as an open_clip folder, in float16."""
    place = folder_of(clip.config.model)
    if place:
        config = read_folder_config(place)["model_cfg"]
    else:
        config = import_open_clip().get_model_config(clip.config.model.replace("/", "-"))
    if clip.config.force_quick_gelu:
        config = config | {"quick_gelu": True}
    save_clip(clip.model, out, config, clip.model.visual.preprocess_cfg)


FRONT_MATTER = "---\nlibrary_name: unclip_pl\ntags: [unclip, text-to-image]\n---\n"


def model_card(name: str, parts: list[str]) -> str:
    """A short README.md of a whole model, with the front matter that model hubs read."""
    lines = [
        f"{FRONT_MATTER}# {name}",
        "",
        f"An unCLIP (DALL-E 2) for unclip_pl {__version__}: {', '.join(parts)}.",
        "",
        "```python",
        "from unclip_pl import UnCLIP",
        "",
        f'unclip = UnCLIP.from_pretrained("{name}")  # this folder, or org/name',
        'images = unclip.generate(["a red apple"], seeds=[0])',
        "```",
    ]
    return "\n".join(lines) + "\n"


def write_parts(folder: Path, parts: list[str], card: str) -> None:
    """`config.json` and `README.md` of a model whose parts are below `folder`."""
    config = {"format": FORMAT, "unclip_pl": __version__, "model": "UnCLIP", "parts": parts}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def read_parts(folder: Path) -> list[str]:
    """The parts that a model's folder names, upsamplers by their sizes.

    Raises:
        UserError: it is no folder of a whole model, or was made by a newer version.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        parts, version = list(config["parts"]), int(config["format"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} is no whole model (its config.json names no parts): give a folder that "
            "`save_pretrained` or `unclip import` wrote, or use UnCLIP.load for single releases."
        ) from None
    if version > FORMAT:
        raise UserError(
            f"{folder} has format {version}, and this version reads up to {FORMAT}: update "
            "unclip_pl."
        )
    known = [part for part in parts if isinstance(part, str) and PART.fullmatch(part)]
    if len(known) != len(parts) or "decoder" not in known:
        raise UserError(f"{folder} names the parts {parts}, which make no model: get it again.")
    return sorted(known, key=lambda part: int("0" + re.sub(r"\D", "", part)))


def _require_name(name: str) -> None:
    if not REPOSITORY.fullmatch(name):
        raise UserError(
            f"There is no folder {name}, and models of the hub are named org/name: give one of the "
            "two."
        )


def download(
    name: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a hub's model in the local cache, filled if need be.

    The hub is that of the environment variable HF_ENDPOINT, if it is set.

    Raises:
        UserError: there is no such model or revision, or the hub cannot be reached.
    """
    _require_name(name)
    with _explained(name, revision):
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
        )


@contextmanager
def _explained(name: str, revision: str | None = None) -> Iterator[None]:
    """What huggingface_hub raises becomes one sentence."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise UserError(
            f"{name} is on the hub, and the package huggingface_hub is missing: install it, or "
            "give a folder."
        ) from None
    at = f"{name} at revision {revision}" if revision else name
    try:
        yield
    except UserError:
        raise
    except errors.HFValidationError as error:
        raise UserError(
            f"There is no folder {name}, and no model of the hub can be named so "
            f"({str(error).rstrip('.')}): give a folder, or org/name."
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is given only to those who accept its terms: do so on its page, log in with "
            "`hf auth login`, and try again."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"The hub has no revision {revision} of {name}: give a branch, tag or commit that it "
            "has."
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"The hub has no model {name}, or it is private: check the name, or log in with "
            "`hf auth login`."
        ) from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{at} is not in the cache, and the hub is not asked or cannot be reached: connect "
            "once, or give a folder."
        ) from None
    except errors.HfHubHTTPError as error:
        said = str(error.server_message or error).strip().splitlines()[0]
        raise UserError(
            f"The hub refuses {at} ({said[:160].rstrip('.')}): check the name, your token and its "
            "rights."
        ) from error
    except Exception as error:
        network = type(error).__module__.startswith(("httpx", "requests"))  # its libraries
        if not network and not isinstance(error, (errors.OfflineModeIsEnabled, OSError)):
            raise
        raise UserError(
            f"{at} cannot be had from the hub ({str(error).splitlines()[0][:120].rstrip('.')}): "
            "connect, or give a folder."
        ) from error
