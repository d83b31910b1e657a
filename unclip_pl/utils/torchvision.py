"""Import torchvision even where its compiled part does not fit the installed torch.

Importing this module is all there is to do. A torchvision wheel built for CUDA, next to a CPU-only
torch, fails with `operator torchvision::nms does not exist`, and after that with `qnms`. Lightning,
torchmetrics and open_clip import torchvision and then fail with it, although none of the operators
is called here. Declaring the schema of the missing operators lets the import finish.
"""

import re
import sys

import torch


def _import(declared: frozenset[str] = frozenset()) -> None:
    """Import torchvision, declaring one missing operator after the other."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
        if missing is None or missing[1] in declared:
            raise
        for name in list(sys.modules):
            if name.split(".")[0] == "torchvision":
                del sys.modules[name]
        torch.library.define(
            missing[1], "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
        _import(declared | {missing[1]})


_import()
