"""Image manipulations with an `UnCLIP` (unCLIP section 3).

An image is taken apart into its bipartite latent (z_i, x_T): CLIP's embedding, and the noise from
which the decoder draws the image again. Both halves can then be changed.

All functions take images as tensors (B, 3, H, W) in [-1, 1] at the decoder's size, or as PIL images
of any size and mode, of which the centre square is taken. They return tensors; `unclip_pl.to_pil`
makes a PIL image of one. One image serves all seeds. The decoder gets no caption unless one is
passed, so that only z_i and x_T decide.
"""

from unclip_pl.manipulate.inpainting import count_last_steps, image_to_image, inpaint
from unclip_pl.manipulate.latent import Latent, decode, inversion_sampling, invert, reconstruct
from unclip_pl.manipulate.spherical import check_theta, slerp
from unclip_pl.manipulate.variations import interpolate, text_diff, vary

__all__ = [
    "Latent",
    "check_theta",
    "count_last_steps",
    "decode",
    "image_to_image",
    "inpaint",
    "interpolate",
    "inversion_sampling",
    "invert",
    "reconstruct",
    "slerp",
    "text_diff",
    "vary",
]
