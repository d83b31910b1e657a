"""Figures of generated images: `python -m eval.fid`, `eval.clip_score`, `eval.compare`,
`eval.sweep`, `eval.coco`.

Write `from eval import fid`: after `import eval` the name no longer means the builtin.
"""

import os

# Before torch is imported: threads soon sleep while they wait (docs/cluster.md, "CPUs").
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
