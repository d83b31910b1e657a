"""`make demo`: OpenMoji is drawn and embedded, a decoder trains for some minutes, held-out drawings are drawn from their embeddings."""

import sys
import time
from pathlib import Path

from unclip_pl import cli
from unclip_pl.errors import UserError

ROOT = Path("runs/demo")


def main() -> int:
    """Train briefly (going on where an earlier demo stopped), draw `runs/demo/demo.png`, print what was done and how to go on."""
    start = time.monotonic()
    code = cli.main([
        "fit", "-c", "stages/decoder.yaml", "-c", "lightning_config/demo.yaml", "--trainer.default_root_dir", str(ROOT), "--resume", "auto",
    ])  # fmt: skip
    if code:
        return code
    trained = time.monotonic()
    try:
        report = draw()
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(report)
    print(f"""
Data, embeddings and training took {trained - start:.0f} s, drawing {time.monotonic() - trained:.0f} s.
  {ROOT}/demo.png     held-out drawings, what the decoder in the package draws from their CLIP embeddings, and what yours does
  {ROOT}/pictures/    what yours drew while it trained

To go on (with `source .venv/bin/activate` first):
  unclip vary PICTURE.png --out out                            variations of a picture of your own
  lightning fit -c stages/decoder.yaml                         the same decoder, trained in earnest
  lightning fit -c stages/decoder.yaml --resume auto           go on where it stopped
  unclip vary PICTURE.png --decoder runs/decoder/checkpoints/newest-step=N.ckpt
  tensorboard --logdir runs""")
    return 0


def draw(count: int = 12) -> str:
    """Held-out drawings above what the package's decoder and the demo's draw from their embeddings; returns a report in words."""
    import torch

    from unclip_pl.clip import CLIPConfig
    from unclip_pl.data.modules import ImageEmbeddingData
    from unclip_pl.images import grid, save_png
    from unclip_pl.pipeline import DEFAULT_DECODER, UnCLIP
    from unclip_pl.training.checkpoint import newest_checkpoint

    data = ImageEmbeddingData(clip=CLIPConfig(), image_size=64)
    data.prepare_data()
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    images, embeds = batch["image"][:count], batch["image_embed"][:count]
    rows, lines = {"held out": images}, []
    for name, path in {"in the package": DEFAULT_DECODER, "yours": newest_checkpoint(ROOT)}.items():
        if path is None or not Path(path).exists():
            continue
        unclip = UnCLIP.load(path)
        rows[name] = unclip.decode(embeds, range(len(embeds)))
        with torch.no_grad():
            again = unclip.embed_images(rows[name])
            right = unclip.clip.similarity(again, embeds).argmax(1).eq(torch.arange(len(embeds))).sum()
        lines.append(f"{name}: of {len(embeds)} drawings, CLIP takes {int(right)} for the one that they were drawn from")
    save_png(grid(list(rows.values()), list(rows)), ROOT / "demo.png", source="OpenMoji, CC BY-SA 4.0, openmoji.org")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
