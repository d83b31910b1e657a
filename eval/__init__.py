"""Figures of generated images: `python -m eval.fid`, `eval.clip_score`, `eval.compare`, `eval.sweep`, `eval.coco`.

Write `from eval import fid`: after `import eval` the name no longer means the builtin.
"""
