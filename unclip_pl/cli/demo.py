"""`make demo`: the decoder in the package learns to draw in blue, in a few minutes.

The drawings are drawn and embedded, and the decoder goes on from the package's weights, but with
the drawings in blue, as on Delft tiles. Captions are drawn by both decoders: the same prior serves
either style. One caption is drawn at 64, 256 and 1024 pixels as well.
"""

import sys
import time
from pathlib import Path

from unclip_pl.cli import lightning as cli
from unclip_pl.utils.errors import UserError

ROOT = Path("runs/demo")
RUN = ROOT / "delft"
PROMPTS = [
    "woman firefighter",
    "couple with heart",
    "man police officer, dark skin tone",
    "man scientist, medium skin tone",
    "woman teacher, medium skin tone",
    "woman cook, medium-light skin tone",
    "woman pilot",
    "man health worker, light skin tone",
]
SOURCE = "OpenMoji, CC BY-SA 4.0, openmoji.org"


def main() -> int:
    """Train briefly, or go on where an earlier demo stopped; draw pictures; report."""
    start = time.monotonic()
    if code := train():
        return code
    trained = time.monotonic()
    try:
        report = "\n".join([draw_held_out(), draw_prompts(), draw_cascade()])
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    training, drawing = trained - start, time.monotonic() - trained
    print(report)
    print(f"""
Data, embeddings and training took {training:.0f} s, drawing {drawing:.0f} s.
  {ROOT}/demo.png     held-out drawings in blue, and what yours draws from their CLIP embeddings
  {ROOT}/prompts.png  captions as the package draws them, and as yours does
  {ROOT}/cascade.png  one caption at 64, 256 and 1024 pixels, shown at one size
  {RUN}/pictures/    what yours drew while it trained

To go on (with `source .venv/bin/activate` first):
  pictures of your own caption
    unclip generate "man cook, dark skin tone" --grid
  through both upsamplers
    unclip generate "man cook, dark skin tone" --size 1024 --num-images 1
  with your decoder, and from your own picture
    unclip generate "man cook, dark skin tone" --decoder {newest()} --prior diffusion
    unclip vary PICTURE.png --decoder {newest()} --out out
  your own picture, drawn larger
    unclip upsample PICTURE.png --size 1024
  variations of your own picture
    unclip vary PICTURE.png --out out
  train a decoder from scratch, or go on where it stopped
    lightning fit -c stages/decoder.yaml
    lightning fit -c stages/decoder.yaml --resume auto
  watch it
    tensorboard --logdir runs""")
    return 0


def train() -> int:
    """`lightning fit` from the package's decoder on drawings in blue; its exit code."""
    from unclip_pl.pipeline.locate import DEFAULT_DECODER
    from unclip_pl.utils.precision import supported_precision

    configs = ["-c", "stages/decoder.yaml", "-c", "lightning_config/demo.yaml"]
    command = ["fit", *configs, "--init", str(DEFAULT_DECODER)]
    print(f"\nlightning {' '.join(command)}", file=sys.stderr)
    precision = supported_precision("bf16-mixed", fallback="32-true")
    folder = ["--trainer.default_root_dir", str(RUN), "--trainer.precision", precision]
    return cli.main([*command, *folder, "--resume", "auto"])


def newest() -> Path:
    """The newest checkpoint of the demo's own training."""
    from unclip_pl.cluster.checkpoint_io import newest_checkpoint

    checkpoint = newest_checkpoint(RUN)
    if checkpoint is None:
        raise UserError(f"{RUN} holds no checkpoint: run the demo again.")
    return checkpoint


def steps() -> str:
    """How long the demo's own decoder was trained: "200 steps"."""
    return f"{newest().stem.split('=')[1]} steps"


def draw_held_out(count: int = 8) -> str:
    """Held-out drawings in blue, and what each decoder draws from their embeddings; a report.

    The drawings lie evenly in the held-out ones: some of each kind.
    """
    import torch

    from unclip_pl.datamodules.delft import DelftData
    from unclip_pl.pipeline.locate import DEFAULT_DECODER
    from unclip_pl.pipeline.unclip import UnCLIP
    from unclip_pl.utils.images import grid, save_png

    data = DelftData()
    data.prepare_data()
    data.setup("validate")
    batches = list(data.val_dataloader())
    images = torch.cat([batch["image"] for batch in batches])
    embeds = torch.cat([batch["image_embed"] for batch in batches])
    chosen = torch.linspace(0, len(images) - 1, count).long()
    images, embeds = images[chosen], embeds[chosen]
    rows = {"held out": images}
    package, unclip = UnCLIP.load(DEFAULT_DECODER), UnCLIP.load(newest())
    rows["package"] = package.decode(embeds, range(count))
    yours = rows[f"yours: {steps()}"] = unclip.decode(embeds, range(count))
    with torch.no_grad():
        drawn, real = unclip.embed_images(yours), unclip.embed_images(images)
        right = unclip.clip.similarity(drawn, real).argmax(1).eq(torch.arange(len(real))).sum()
    save_png(grid(list(rows.values()), list(rows)), ROOT / "demo.png", source=SOURCE)
    return f"Yours: of {len(real)} held-out drawings in blue, CLIP takes {int(right)} for its own"


def draw_prompts() -> str:
    """`PROMPTS` through the package's prior, by its decoder and by the demo's; a report."""
    import torch

    from unclip_pl.pipeline.unclip import UnCLIP
    from unclip_pl.utils.images import grid, save_png

    package = UnCLIP.load(prior="diffusion")
    yours = UnCLIP.load(newest(), prior="diffusion")
    numbers = range(len(PROMPTS))
    rows = {
        "package": package.generate(PROMPTS, numbers),
        f"yours: {steps()}": yours.generate(PROMPTS, numbers),
    }
    with torch.no_grad():
        texts, drawn = package.embed_text(PROMPTS), package.embed_images(rows["package"])
        right = package.clip.similarity(drawn, texts).argmax(1).eq(torch.tensor(numbers)).sum()
    captions = ", ".join(PROMPTS)
    picture = grid(list(rows.values()), list(rows))
    save_png(picture, ROOT / "prompts.png", prompts=captions, source=SOURCE)
    return (
        f"Package: of {len(PROMPTS)} captions, CLIP finds {int(right)} in its pictures\n"
        f"Captions: {captions}"
    )


def draw_cascade(prompt: str = "couple with heart") -> str:
    """A caption at 64, 256 and 1024 pixels, all shown at the largest size; a report."""
    import torch
    import torch.nn.functional as F

    from unclip_pl.pipeline.unclip import UnCLIP
    from unclip_pl.utils.images import grid, save_png

    unclip = UnCLIP.load(prior="diffusion", upsamplers=("256", "1024"))
    sizes, seconds = unclip.sizes, []
    drawn: list[torch.Tensor] = []
    for size in sizes:
        start = time.monotonic()
        if drawn:
            drawn.append(unclip.upsample(drawn[-1], [0], 4))
        else:
            drawn.append(unclip.generate([prompt], [0], size=size))
        seconds.append(f"{size} pixels in {time.monotonic() - start:.0f} s")
    shown = [F.interpolate(images, sizes[-1], mode="nearest") for images in drawn]
    save_png(grid([torch.cat(shown)]), ROOT / "cascade.png", prompt=prompt, seed="0", source=SOURCE)
    return f"Cascade in the package: {prompt}: {', '.join(seconds)}"


if __name__ == "__main__":
    sys.exit(main())
