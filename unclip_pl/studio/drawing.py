"""How each request is drawn: the same functions, in the same order, as the commands of `unclip`.

A drawing tells what it is at through a `Tell` and may be stopped by what that raises.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unclip_pl.cluster.checkpoint_io import newest_checkpoint
from unclip_pl.manipulate import (
    Latent,
    decode,
    inpaint,
    interpolate,
    inversion_sampling,
    invert,
    text_diff,
)
from unclip_pl.manipulate.latent import INVERSION_STEPS
from unclip_pl.pipeline.compatibility import cut_note
from unclip_pl.probe import paper_dimensions, paste_label, zero_shot
from unclip_pl.studio.models import Models
from unclip_pl.studio.picture_files import from_base64, read_picture
from unclip_pl.studio.requests import (
    PCA,
    Create,
    Drawing,
    Edit,
    Inpaint,
    Interpolate,
    Request,
    Typographic,
    Upsample,
    UseWeights,
    Vary,
)
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

ROWS = 16
"""Pictures that are drawn at a time."""
Tell = Callable[[str, int, int], Any]
"""Called with (stage, step, steps); what it raises ends the drawing."""


@dataclass(frozen=True)
class Drawn:
    """One picture: uint8 (3, H, W) on the CPU."""

    image: Tensor
    label: str
    """What it shows among its fellows: a caption, "theta 0.25"."""
    seed: int


@dataclass(frozen=True)
class Result:
    """The pictures of a request, and what there is to say of them."""

    pictures: list[Drawn]
    notes: list[str] = field(default_factory=list)


def named(tell: Tell, stage: str) -> Callable[[int, int], None]:
    """`tell` as the callback (step, steps) of one stage."""
    return lambda step, steps: tell(stage, step, steps)


def draw(models: Models, requests: Sequence[Request], tell: Tell) -> list[Result]:
    """Draw requests that go together: several `Create` of equal `settings`, or one of any kind."""
    if isinstance(requests[0], Create):
        return create(models, [r for r in requests if isinstance(r, Create)], tell)
    return [WAYS[type(request)](models, request, tell) for request in requests]


def create(models: Models, requests: Sequence[Create], tell: Tell) -> list[Result]:
    """Requests of equal settings, whose pictures are drawn together, `ROWS` at a time."""
    first = requests[0]
    unclip, condition = models.unclip_for(first)
    rows = [row for request in requests for row in request.rows()]
    drawn = []
    for start in range(0, len(rows), ROWS):
        captions, seeds = zip(*rows[start : start + ROWS], strict=True)
        images = unclip.generate(
            captions,
            seeds,
            condition,  # type: ignore[arg-type]  # one of CONDITIONS
            size=first.size or models.sizes[0],
            prior_sampling=models.prior_sampling(first),
            sampling=models.sampling(first),
            upsampling=models.upsampling(first),
            callback=tell,
        )
        drawn += list(to_uint8(images).cpu())
    pictures = [Drawn(image, text, seed) for image, (text, seed) in zip(drawn, rows, strict=True)]
    results = []
    for request in requests:
        count = request.pictures()
        cut = [cut_note(unclip.decoder, unclip.clip, text) for text in request.captions]
        notes = [f"{note}." for note in dict.fromkeys(cut) if note]
        results.append(Result(pictures[:count], notes))
        pictures = pictures[count:]
    return results


def vary(models: Models, request: Vary, tell: Tell) -> Result:
    """As `unclip vary`."""
    unclip, seeds = models.plain, seeds_of(request, request.num_images)
    captions = [request.caption] * len(seeds) if request.caption else None
    callback = named(tell, "decoder")
    if request.eta is None:
        embed = embedded(models, request.image)[1].expand(len(seeds), -1)
        images = unclip.decode(embed, seeds, captions, models.sampling(request), callback)
        return finish(models, request, images, [f"seed {seed}" for seed in seeds], seeds, tell)
    latent = inverted(models, request, request.image, tell)[[0] * len(seeds)]
    sampling = following(models, request, latent, eta=request.eta)
    images = decode(unclip, latent, seeds, captions, sampling, callback)
    return finish(models, request, images, [f"seed {seed}" for seed in seeds], seeds, tell)


def interpolation(models: Models, request: Interpolate, tell: Tell) -> Result:
    """As `unclip interpolate`."""
    fresh = request.noise == "fresh"
    ends = []
    for image in (request.image, request.other):
        if fresh:
            embed = embedded(models, image)[1]
            ends.append(Latent(embed, torch.zeros(1, *models.plain.decoder.shape), 0))
        else:
            ends.append(inverted(models, request, image, tell))
    a, b = (end[[0] * request.frames] for end in ends)
    theta = torch.linspace(0, 1, request.frames)
    images = interpolate(
        models.plain,
        a,
        b,
        theta,
        request.seed if fresh else None,
        models.sampling(request) if fresh else following(models, request, a),
        named(tell, "decoder"),
    )
    labels = [f"{value:.0%} of the way" for value in theta.tolist()]
    return finish(models, request, images, labels, [request.seed] * request.frames, tell)


def edit(models: Models, request: Edit, tell: Tell) -> Result:
    """As `unclip edit`."""
    latent, count = inverted(models, request, request.image, tell), len(request.theta)
    images = text_diff(
        models.plain,
        latent[[0] * count],
        [request.source] * count if request.source else None,
        [request.target] * count,
        torch.tensor(request.theta),
        following(models, request, latent),
        named(tell, "decoder"),
    )
    labels = [f"theta {value:g}" for value in request.theta]
    return finish(models, request, images, labels, [request.seed] * count, tell)


def inpainting(models: Models, request: Inpaint, tell: Tell) -> Result:
    """As `unclip inpaint`."""
    picture, embed = embedded(models, request.image)
    mask = mask_of(models, request)
    seeds = seeds_of(request, request.num_images)
    captions = [request.caption] * len(seeds) if request.caption else None
    unclip, condition = models.unclip_for(request)
    if captions is None:
        embeds: Tensor | None = embed.expand(len(seeds), -1)
    elif condition == "prior":
        embeds = unclip.sample_prior(
            captions, seeds, models.prior_sampling(request), named(tell, "prior")
        )
    else:
        embeds = unclip.embed_text(captions) if condition == "text" else None
    sampling = models.sampling(request)
    if sampling.sampler == "ddim":  # with noise the drawn part fits the known part better
        sampling = dataclasses.replace(sampling, eta=1.0)
    images = inpaint(
        unclip,
        embeds,
        seeds,
        captions,
        sampling,
        named(tell, "decoder"),
        images=picture.expand(len(seeds), -1, -1, -1),
        mask=mask.expand(len(seeds), -1, -1, -1),
    )
    return finish(models, request, images, [f"seed {seed}" for seed in seeds], seeds, tell)


def upsample(models: Models, request: Upsample, tell: Tell) -> Result:
    """As `unclip upsample --times`."""
    picture = opened(request.image)[None]
    images = models.plain.upsample(
        picture, [request.seed], request.times, models.upsampling(request), tell
    )
    height, width = images.shape[-2:]
    label = f"{width} x {height} pixels"
    return Result([Drawn(to_uint8(images[0]).cpu(), label, request.seed)])


def pca(models: Models, request: PCA, tell: Tell) -> Result:
    """As `unclip probe pca`."""
    unclip = models.plain
    _, z = embedded(models, request.image)
    tell("principal components", 0, 1)
    principal = models.components
    tell("principal components", 1, 1)
    counts = request.components or (*paper_dimensions(principal.dim), principal.dim)
    embeds = torch.cat([principal.reconstruct(z, k) for k in counts])
    seeds = [request.seed] * len(counts)
    images = unclip.decode(embeds, seeds, None, models.sampling(request), named(tell, "decoder"))
    near = unclip.clip.similarity(unclip.embed_images(images), z)[:, 0].tolist()
    notes = [
        f"{k} components hold {principal.explained_variance(k):.1%} of the variance: CLIP "
        f"similarity of what is drawn {similarity:.3f}."
        for k, similarity in zip(counts, near, strict=True)
    ]
    labels = [f"{k} components" for k in counts]
    result = finish(models, request, images, labels, seeds, tell)
    return Result(result.pictures, notes)


def typographic(models: Models, request: Typographic, tell: Tell) -> Result:
    """As `unclip probe typographic`."""
    unclip, sampling = models.plain, models.sampling(request)
    whole = square(opened(request.image))
    captions = [request.object, *request.labels]
    seeds = seeds_of(request, request.num_images)
    copies = [whole, *(paste_label(whole, text) for text in request.labels)]
    pictures, notes = [], []
    for copy, name in zip(copies, ["no label", *request.labels], strict=True):
        z = unclip.embed_images(copy[None])
        images = unclip.decode(
            z.expand(len(seeds), -1), seeds, None, sampling, named(tell, f"decoder, {name}")
        )
        for what, embed in {
            "CLIP sees": z,
            "in what is drawn": unclip.embed_images(images),
        }.items():
            shares = zero_shot(unclip, embed, captions).mean(0).tolist()
            named_shares = [f"{c} {share:.1%}" for c, share in zip(captions, shares, strict=True)]
            notes.append(f"{name}: {what} {', '.join(named_shares)}.")
        pictures.append(Drawn(to_uint8(copy).cpu(), f"seen: {name}", request.seed))
        labels = [f"{name}, seed {seed}" for seed in seeds]
        pictures += finish(models, request, images, labels, seeds, tell).pictures
    return Result(pictures, notes)


def use_weights(models: Models, request: UseWeights, tell: Tell) -> Result:
    """Other weights; what they are is the only note."""
    tell("loading", 0, 1)
    if request.run is None:
        models.use_first()
    else:
        path = newest_checkpoint(request.run)
        if path is None:
            raise UserError(f"The run {request.run.name} has no whole checkpoint yet: wait for it.")
        models.use(path, f"{request.run.name}, {path.name}")
    return Result([], [models.standing()])


WAYS: dict[type, Callable[[Models, Any, Tell], Result]] = {
    Vary: vary,
    Interpolate: interpolation,
    Edit: edit,
    Inpaint: inpainting,
    Upsample: upsample,
    PCA: pca,
    Typographic: typographic,
    UseWeights: use_weights,
}


def check_pictures(models: Models, request: Request) -> None:
    """A UserError where a picture of the request cannot be read, or its mask does not fit."""
    for field_name, name in {"image": "picture", "other": "second picture"}.items():
        if hasattr(request, field_name):
            opened(getattr(request, field_name), name)
    if isinstance(request, Inpaint):
        mask_of(models, request)
    if isinstance(request, Upsample):
        height, width = opened(request.image).shape[1:]
        models.plain.cascade.route(max(height, width), request.times)
        most = models.sizes[-1]
        if max(height, width) * request.times > 2 * most:
            raise UserError(
                f"The picture would become {width * request.times} x {height * request.times} "
                f"pixels, and this studio draws at most {2 * most} per side: give a smaller one."
            )


def opened(image: str, name: str = "picture") -> Tensor:
    """A picture of a request, (3, H, W) in [-1, 1]."""
    return read_picture(from_base64(image, name), name)


def square(image: Tensor) -> Tensor:
    """The centre square of (3, H, W)."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side]


def embedded(models: Models, image: str) -> tuple[Tensor, Tensor]:
    """A picture at the decoder's size, (1, 3, S, S), and z_i of it in its own size, (1, D)."""
    data = from_base64(image)
    small = read_picture(data, size=models.sizes[0])[None]
    return small, models.plain.embed_images(square(read_picture(data))[None])


def inverted(models: Models, request: Drawing, image: str, tell: Tell) -> Latent:
    """The Latent of a picture."""
    small, embed = embedded(models, image)
    steps = request.steps or INVERSION_STEPS
    return invert(models.plain, small, steps, named(tell, "inversion"), embed)


def following(models: Models, request: Drawing, latent: Latent, eta: float | None = None) -> Any:
    """The settings that draw a latent again, left where the request says so."""
    asked = {"sampler": request.sampler, "guidance_scale": request.guidance_scale, "eta": eta}
    chosen = {name: value for name, value in asked.items() if value is not None}
    return inversion_sampling(models.plain, latent.steps, **chosen)


def mask_of(models: Models, request: Inpaint) -> Tensor:
    """Where to draw, bool (1, 1, S, S); a UserError where it does not fit the picture."""
    shape, own = opened(request.image).shape[1:], opened(request.mask, "mask").shape[1:]
    if shape != own:
        raise UserError(
            f"The mask is {own[1]} x {own[0]} pixels and the picture {shape[1]} x {shape[0]}: make "
            "it of the same size."
        )
    small = read_picture(from_base64(request.mask), "mask", models.sizes[0])
    mask = small.mean(0, keepdim=True)[None] > 0
    if not mask.any() or mask.all():
        raise UserError("The mask must have white, where to draw, and black, what to keep.")
    return mask


def seeds_of(request: Drawing, count: int) -> list[int]:
    """A seed per picture."""
    return [request.seed + k for k in range(count)]


def finish(
    models: Models,
    request: Drawing,
    images: Tensor,
    labels: Sequence[str],
    seeds: Sequence[int],
    tell: Tell,
) -> Result:
    """What the decoder drew, through the upsamplers where the request asks for a larger size."""
    side = models.sizes[0]
    if request.size is not None and request.size > side:
        times = request.size // side
        images = models.plain.upsample(images, seeds, times, models.upsampling(request), tell)
    rows = zip(to_uint8(images).cpu(), labels, seeds, strict=True)
    return Result([Drawn(image, label, seed) for image, label, seed in rows])
