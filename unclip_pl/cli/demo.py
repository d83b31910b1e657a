"""`make demo`: the weights in the package learn to draw in black lines, in a few minutes.

OpenMoji's lines are drawn and embedded, the decoder and the diffusion prior of the package are
trained on them, and captions are drawn by both. One caption is drawn at 64, 256 and 1024 pixels as
well.
"""

import sys
import time
from pathlib import Path

from unclip_pl.cli import lightning as cli
from unclip_pl.utils.errors import UserError

ROOT = Path("runs/demo")
STAGES = {"decoder": ROOT / "decoder", "diffusion_prior": ROOT / "diffusion_prior"}
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
    for stage in STAGES:
        if code := train(stage):
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
  {ROOT}/demo.png     held-out line drawings, and what yours draws from their CLIP embeddings
  {ROOT}/prompts.png  captions as the package draws them, and as yours does
  {ROOT}/cascade.png  one caption at 64, 256 and 1024 pixels, shown at one size
  {ROOT}/decoder/pictures/    what yours drew while it trained

To go on (with `source .venv/bin/activate` first):
  pictures of your own caption
    unclip generate "man cook, dark skin tone" --grid
  through both upsamplers
    unclip generate "man cook, dark skin tone" --size 1024 --num-images 1
  with your decoder and your prior
    unclip generate fox --decoder {newest("decoder")} --prior {newest("diffusion_prior")}
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


def train(stage: str) -> int:
    """`lightning fit` from the package's weights on line drawings; its exit code."""
    from unclip_pl.pipeline.weights import DEFAULT_DECODER, DEFAULT_PRIORS
    from unclip_pl.utils.precision import supported_precision

    weights = DEFAULT_DECODER if stage == "decoder" else DEFAULT_PRIORS["diffusion"]
    overlay = "demo.yaml" if stage == "decoder" else "demo_prior.yaml"
    configs = ["-c", f"stages/{stage}.yaml", "-c", f"lightning_config/{overlay}"]
    command = ["fit", *configs, "--init", str(weights)]
    print(f"\n{stage}: lightning {' '.join(command)}", file=sys.stderr)
    precision = supported_precision("bf16-mixed", fallback="32-true")
    folder = ["--trainer.default_root_dir", str(STAGES[stage]), "--trainer.precision", precision]
    return cli.main([*command, *folder, "--resume", "auto"])


def newest(stage: str) -> Path:
    """The newest checkpoint of the demo's own training."""
    from unclip_pl.cluster.checkpoint_io import newest_checkpoint

    checkpoint = newest_checkpoint(STAGES[stage])
    if checkpoint is None:
        raise UserError(f"{STAGES[stage]} holds no checkpoint: run the demo again.")
    return checkpoint


def steps(stage: str) -> str:
    """How many steps the demo's own training made: "300 steps"."""
    return f"{newest(stage).stem.split('=')[1]} steps"


def draw_held_out(count: int = 8) -> str:
    """Held-out line drawings, and what each decoder draws from their embeddings; a report.

    The drawings lie evenly in the held-out ones: some of each kind.
    """
    import torch

    from unclip_pl.clip.config import CLIPConfig
    from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
    from unclip_pl.pipeline.unclip import UnCLIP
    from unclip_pl.pipeline.weights import DEFAULT_DECODER
    from unclip_pl.utils.images import grid, save_png

    data = ImageEmbeddingData("openmoji-line", "openmoji-line", clip=CLIPConfig(), image_size=64)
    data.prepare_data()
    data.setup("validate")
    batches = list(data.val_dataloader())
    images = torch.cat([batch["image"] for batch in batches])
    embeds = torch.cat([batch["image_embed"] for batch in batches])
    chosen = torch.linspace(0, len(images) - 1, count).long()
    images, embeds = images[chosen], embeds[chosen]
    rows, lines = {"held out": images}, []
    yours = f"yours: {steps('decoder')}"
    for name, path in {"package": DEFAULT_DECODER, yours: newest("decoder")}.items():
        unclip = UnCLIP.load(path)
        rows[name] = unclip.decode(embeds, range(len(embeds)))
        with torch.no_grad():
            similarity = unclip.clip.similarity(unclip.embed_images(rows[name]), embeds)
        right = similarity.argmax(1).eq(torch.arange(len(embeds))).sum()
        lines.append(f"{name}: of {len(embeds)} line drawings, CLIP takes {int(right)} for its own")
    save_png(grid(list(rows.values()), list(rows)), ROOT / "demo.png", source=SOURCE)
    return "\n".join(lines)


def draw_prompts() -> str:
    """`PROMPTS` drawn by the package's prior and decoder, and by the demo's; a report."""
    import torch

    from unclip_pl.pipeline.unclip import UnCLIP
    from unclip_pl.utils.images import grid, save_png

    yours = UnCLIP.load(newest("decoder"), newest("diffusion_prior"))
    pipelines = {"package": UnCLIP.load(prior="diffusion"), f"yours: {steps('decoder')}": yours}
    rows, lines = {}, []
    for name, unclip in pipelines.items():
        rows[name] = unclip.generate(PROMPTS, range(len(PROMPTS)))
        with torch.no_grad():
            texts, drawn = unclip.embed_text(PROMPTS), unclip.embed_images(rows[name])
            right = unclip.clip.similarity(drawn, texts).argmax(1).eq(torch.arange(len(PROMPTS)))
        lines.append(f"{name}: of {len(PROMPTS)} captions, CLIP finds {int(right.sum())}")
    captions = ", ".join(PROMPTS)
    picture = grid(list(rows.values()), list(rows))
    save_png(picture, ROOT / "prompts.png", prompts=captions, source=SOURCE)
    return "\n".join([*lines, f"Captions: {captions}"])


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
