"""Imports torchvision, also where its CUDA build stands beside torch's CPU build (torch ships no CPU torchvision)."""

import torch

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    # The build registers fake implementations for two operators whose library it could not load: declare them first.
    _library = torch.library.Library("torchvision", "DEF")
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
