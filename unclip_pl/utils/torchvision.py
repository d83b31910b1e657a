"""Let torchvision be imported where its compiled part does not fit the installed torch.

A torchvision built for CUDA fails next to a torch for CPUs with `operator torchvision::nms does not
exist`. Lightning, torchmetrics and open_clip import torchvision and then fail with it, although no
such operator is called here. Importing this module is all there is to do: a later import of
torchvision that fails so declares what is missing and starts again. Any other import is as ever.
"""

import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Import torchvision, declaring one missing operator after the other."""
        declared: set[str] = set()
        while True:
            try:
                return super().exec_module(module)
            except RuntimeError as error:
                missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
                if missing is None or missing[1] in declared:
                    raise
            import torch

            declared.add(missing[1])
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(missing[1], schema)


class _Finder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of torchvision with our loader; None for all other modules."""
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _Finder)
