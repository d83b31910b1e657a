"""Import torchvision also where its compiled part does not fit the installed torch; importing this module is the whole use.

A torchvision wheel built for CUDA beside a CPU-only torch ends in `operator torchvision::nms does not exist` (then `qnms`), and with it
lightning, torchmetrics and open_clip, none of which call these operators here. Declaring their schema lets the rest import.
"""

import re
import sys

import torch


def _import(declared: frozenset[str] = frozenset()) -> None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
        if missing is None or missing[1] in declared:
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        torch.library.define(
            missing[1], "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
        _import(declared | {missing[1]})


_import()
