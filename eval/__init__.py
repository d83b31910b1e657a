"""Compute figures of generated images with commands such as `python -m eval.fid`.

The others are `eval.clip_score`, `eval.compare`, `eval.sweep` and `eval.coco`.

Write `from eval import fid`: after `import eval` the name no longer means the builtin.
"""

import os

import unclip_pl  # noqa: F401  before torchmetrics imports torchvision
from unclip_pl.utils.interrupts import quiet_imports

quiet_imports()
# Before torch is imported: threads soon sleep while they wait (docs/cluster.md, "CPUs").
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
