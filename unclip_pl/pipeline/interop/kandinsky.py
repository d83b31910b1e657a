"""The prior of Kandinsky 2.2 (and 2.1) in diffusers' folder layout.

It is a network of Karlo's shape that was trained on another CLIP: ViT-bigG/14, 1280 numbers (2.1:
ViT-L/14). Kandinsky's decoder is another network and is not imported.
"""

from pathlib import Path

from unclip_pl.pipeline.interop.karlo import Part, pipeline_of, prior_part

PIPELINES = "KandinskyV22PriorPipeline", "KandinskyPriorPipeline"


def read_folder(folder: Path) -> list[Part]:
    """The prior in a folder; its weights are not read yet. It draws with 25 steps and guidance 4.

    Raises:
        UserError: it is another pipeline, or parts are missing, damaged or of other shape.
    """
    pipeline_of(folder, "Kandinsky's prior", PIPELINES)
    return [prior_part(folder, "scheduler")]
