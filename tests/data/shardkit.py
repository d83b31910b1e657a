"""Small shards and pictures and a fake CLIP for the tests of data."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unclip_pl.clip.fingerprint import require_same
from unclip_pl.clip.frozen import TextFeatures


def picture(number: int, size: int = 16, kind: str = "PNG") -> bytes:
    """A picture of one colour, which tells the number."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (number % 256, number // 256, 128)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_shards(folder: Path, counts: list[int], bad: set[int] = frozenset()) -> list[str]:
    """Shards with `counts` samples, numbered through. Images of those in `bad` do not decode."""
    shards, number = [], 0
    for index, count in enumerate(counts):
        files = {}
        for n in range(number, number + count):
            files[f"{n:06d}.png"] = b"no picture" if n in bad else picture(n)
            files[f"{n:06d}.txt"] = f"caption {n}".encode()
            files[f"{n:06d}.json"] = b"{}"
        shards.append(write_tar(folder / f"{index:05d}.tar", files))
        number += count
    return shards


class FakeCLIP:
    """FrozenCLIP's methods with results that can be checked.

    They are a fixed projection of the pixels and of the letters. `seen` counts the images.
    """

    image_size, embed_dim, states_width, context_length, vocab_size = 8, 6, 5, 12, 256
    device = torch.device("cpu")

    def __init__(self, seed: int = 0, die_after: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.seed, self.die_after, self.seen = seed, die_after, 0
        self.matrix = torch.randn(3 * 64, 6, generator=generator)

    def to(self, device: object) -> "FakeCLIP":
        return self

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        if self.die_after is not None and self.seen > self.die_after:
            raise KeyboardInterrupt
        return images.flatten(1) @ self.matrix

    def embed_text(self, tokens: torch.Tensor) -> TextFeatures:
        embed = torch.stack([tokens.float().sin().mean(1) * k for k in range(1, 7)], 1)
        return TextFeatures(
            embed, tokens.float()[..., None].expand(-1, -1, 5).clone(), self.caption_mask(tokens)
        )

    def caption_mask(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens > 0

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        return torch.tensor([[*caption.encode()[-12:], *[0] * 12][:12] for caption in captions])

    def fingerprint(self) -> dict:
        import base64

        def pack(values: torch.Tensor) -> str:
            return base64.b64encode(values.numpy().astype("<f2").tobytes()).decode()

        return {
            "config": {
                "model": f"fake-{self.seed}",
                "pretrained": None,
                "precision": "fp32",
                "force_quick_gelu": False,
                "context_length": None,
            },
            "embed_dim": 6,
            "states_width": 5,
            "context_length": 12,
            "image_size": 8,
            "activation": "GELU",
            "preprocessing": {},
            "image": pack(self.matrix[0]),
            "text": pack(self.matrix[1]),
        }


assert require_same(FakeCLIP().fingerprint(), FakeCLIP().fingerprint(), "the kit") is None


def pixels(value: int) -> np.ndarray:
    return np.full((16, 16), value, np.uint16)
