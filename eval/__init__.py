"""Figures of generated images: `python -m eval.fid`, `eval.clip_score`, `eval.compare`, `eval.sweep`. Write `from eval import fid`: the bare name is a builtin."""
