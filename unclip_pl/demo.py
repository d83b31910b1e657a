"""`make demo`: OpenMoji is drawn and embedded, a decoder and both priors train for some minutes, then held-out drawings and captions
are drawn, and one caption at 64, 256 and 1024 pixels by the weights in the package."""

import sys
import time
from pathlib import Path

from unclip_pl import cli
from unclip_pl.errors import UserError

ROOT = Path("runs/demo")
STAGES = {"decoder": ROOT / "decoder", "diffusion_prior": ROOT / "diffusion_prior", "ar_prior": ROOT / "ar_prior"}
PROMPTS = ["woman firefighter, dark skin tone", "thumbs up, medium skin tone", "man cook", "red heart", "sun", "fox"]


def main() -> int:
    """Train briefly (going on where an earlier demo stopped), draw the pictures, print what was done and how to go on."""
    start = time.monotonic()
    for stage, folder in STAGES.items():
        print(f"\n{stage}: lightning fit -c stages/{stage}.yaml, for a short while", file=sys.stderr)
        overlay = "lightning_config/demo.yaml" if stage == "decoder" else "lightning_config/demo_prior.yaml"
        code = cli.main(["fit", "-c", f"stages/{stage}.yaml", "-c", overlay, "--trainer.default_root_dir", str(folder), "--resume", "auto"])
        if code:
            return code
    trained = time.monotonic()
    try:
        report = "\n".join([draw(), draw_prompts(), draw_cascade()])
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(report)
    print(f"""
Data, embeddings and training took {trained - start:.0f} s, drawing {time.monotonic() - trained:.0f} s.
  {ROOT}/demo.png     held-out drawings, what the decoder in the package draws from their CLIP embeddings, and what yours does
  {ROOT}/prompts.png  captions through both priors: those in the package, and yours
  {ROOT}/cascade.png  one caption at 64, 256 and 1024 pixels, all shown at the same size, by the weights in the package
  {ROOT}/decoder/pictures/    what yours drew while it trained

To go on (with `source .venv/bin/activate` first):
  unclip generate "man cook, dark skin tone" --grid            pictures of a caption of your own
  unclip generate "man cook, dark skin tone" --size 1024 --num-images 1        through both upsamplers
  unclip upsample PICTURE.png --size 1024                      a picture of your own, drawn larger
  unclip vary PICTURE.png --out out                            variations of a picture of your own
  lightning fit -c stages/decoder.yaml                         the same decoder, trained in earnest; diffusion_prior, ar_prior likewise
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
    for name, path in {"in the package": DEFAULT_DECODER, "yours": newest_checkpoint(STAGES["decoder"])}.items():
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


def draw_prompts() -> str:
    """`PROMPTS` through both priors, of the package and of the demo, each with its own decoder; returns a report in words."""
    import torch

    from unclip_pl.images import grid, save_png
    from unclip_pl.pipeline import DEFAULT_DECODER, DEFAULT_PRIORS, UnCLIP
    from unclip_pl.training.checkpoint import newest_checkpoint

    rows, lines = {}, []
    for name, decoder in {"in the package": DEFAULT_DECODER, "yours": newest_checkpoint(STAGES["decoder"])}.items():
        for kind in DEFAULT_PRIORS:
            prior = kind if name == "in the package" else newest_checkpoint(STAGES["diffusion_prior" if kind == "diffusion" else "ar_prior"])
            if decoder is None or prior is None:
                continue
            unclip = UnCLIP.load(decoder, prior)
            rows[f"{kind} prior, {name}"] = unclip.generate(PROMPTS, range(len(PROMPTS)))
            with torch.no_grad():
                near = unclip.clip.similarity(unclip.embed_images(rows[f"{kind} prior, {name}"]), unclip.embed_text(PROMPTS))
            right = near.argmax(1).eq(torch.arange(len(PROMPTS))).sum()
            lines.append(f"{kind} prior, {name}: of {len(PROMPTS)} captions, CLIP finds {int(right)} in the picture that was drawn from them")
    captions = ", ".join(PROMPTS)
    save_png(grid(list(rows.values()), list(rows)), ROOT / "prompts.png", prompts=captions, source="OpenMoji, CC BY-SA 4.0, openmoji.org")
    return "\n".join([*lines, f"Captions: {captions}"])


def draw_cascade(prompt: str = PROMPTS[0]) -> str:
    """A caption at 64, 256 and 1024 pixels side by side by the package's weights, all shown at the largest size; returns a report in words."""
    import torch
    import torch.nn.functional as F

    from unclip_pl.images import grid, save_png
    from unclip_pl.pipeline import UnCLIP

    unclip = UnCLIP.load(prior="diffusion", upsamplers=("256", "1024"))
    sizes, seconds = unclip.sizes, []
    drawn: list[torch.Tensor] = []
    for size in sizes:
        start = time.monotonic()
        drawn.append(unclip.upsample(drawn[-1], [0], 4) if drawn else unclip.generate([prompt], [0], size=size))
        seconds.append(f"{size} pixels in {time.monotonic() - start:.0f} s")
    shown = [F.interpolate(images, sizes[-1], mode="nearest") for images in drawn]  # the pixels as they are, only larger
    save_png(grid([torch.cat(shown)]), ROOT / "cascade.png", prompt=prompt, seed="0", source="OpenMoji, CC BY-SA 4.0, openmoji.org")
    return f"Cascade in the package: {prompt}: {', '.join(seconds)}"


if __name__ == "__main__":
    sys.exit(main())
