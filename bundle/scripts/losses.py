# SPDX-License-Identifier: Apache-2.0
"""Normalized focal loss.

Idea: Wollmann et al., "GRUU-Net", Medical Image Analysis 56 (2019), https://doi.org/10.1016/j.media.2019.04.011: a
"normalized pixel-wise focal cross-entropy" for momentum-based optimizers. The paper's formula is not at hand: the one
below is this project's decision. Focal weights are from Lin et al., https://arxiv.org/abs/1708.02002.

Why the normalization: plain focal weights fall by orders of magnitude as training goes on, while the second moment of
Adam or AMSGrad remembers the large early gradients; so the steps die away on just the hard pixels between cells.
Dividing by the sum of the weights keeps the scale of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["NormalizedFocalLoss", "normalized_focal_loss"]


def normalized_focal_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    gamma: float = 2.0,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -1,
) -> torch.Tensor:
    """Focal cross-entropy in which each image's focal weights sum to one.

        w_i = u_i * a_i * (1 - p_i)^gamma,   p_i the softmax probability of the true class of pixel i
        L = sum_i w_i * CE_i / stop_gradient(sum_i w_i)            per image, then the mean over the batch

    with `u` the pixel weight and `a` the class weight. Pixels to ignore have `w = 0`. An image without any pixel to
    learn from, and one that is all correct to the last bit, counts as 0. With `gamma=0` and no weights this is
    cross-entropy.

    Args:
        input: logits, (B, C, H, W[, D]), of any floating type; computed in at least float32.
        target: true classes, (B, 1, H, W[, D]) or (B, H, W[, D]), of any type that holds whole numbers.
        weight: non-negative pixel weights, shaped like `target`.
        gamma: focusing exponent, at least 0.
        class_weight: non-negative weight of each class, (C,).
        ignore_index: target value of pixels that count neither way.

    Returns:
        scalar loss.

    Raises:
        ValueError: when shapes do not fit together.
    """
    shape = (input.shape[0], *input.shape[2:])
    target = _without_channel(target, shape, "target").long()
    valid = target != ignore_index
    classes = torch.where(valid, target, torch.zeros_like(target)).unsqueeze(1)

    log_p = F.log_softmax(input.to(torch.promote_types(input.dtype, torch.float32)), dim=1)
    log_p_true = log_p.gather(1, classes).squeeze(1)
    # 1 - p of the true class, without the cancellation that costs it all its digits where p is near 1; kept above zero,
    # where a power below 1 has no finite derivative
    w = (-torch.expm1(log_p_true)).clamp(min=1e-12) ** gamma if gamma > 0 else torch.ones_like(log_p_true)
    w = w * valid
    if class_weight is not None:
        w = w * class_weight.to(w)[classes.squeeze(1)]
    if weight is not None:
        w = w * _without_channel(weight, shape, "weight").to(w)

    dims = list(range(1, w.dim()))
    total = w.sum(dims).detach().clamp(min=torch.finfo(w.dtype).tiny)
    return ((w * -log_p_true).sum(dims) / total).mean()


def _without_channel(x: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """(B, 1, ...) or (B, ...) -> (B, ...); a ValueError for all else."""
    if tuple(x.shape) not in (shape, (shape[0], 1, *shape[1:])):
        raise ValueError(f"{name} must be (B, 1, ...) or (B, ...) with (B, ...) = {shape}, got {tuple(x.shape)}.")
    return x.reshape(shape)


class NormalizedFocalLoss(nn.Module):
    """Module form of `normalized_focal_loss`, which explains the arguments.

    Args:
        gamma: focusing exponent, at least 0.
        class_weight: weight of each class, or None.
        ignore_index: target value of pixels that count neither way.

    Raises:
        ValueError: when `gamma` or a class weight is negative.

    Examples::

        >>> logits, target = torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
        >>> round(NormalizedFocalLoss()(logits, target).item(), 4)
        1.0986
    """

    def __init__(self, gamma: float = 2.0, class_weight: Sequence[float] | None = None, ignore_index: int = -1) -> None:
        super().__init__()
        if gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {gamma}.")
        if class_weight is not None and min(class_weight) < 0:
            raise ValueError(f"class_weight must not be negative, got {list(class_weight)}.")
        self.gamma = gamma
        self.ignore_index = ignore_index
        self.class_weight: torch.Tensor | None
        self.register_buffer(
            "class_weight", None if class_weight is None else torch.tensor(class_weight, dtype=torch.float32)
        )

    def forward(self, input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, C, ...), classes (B, 1, ...) and maybe pixel weights (B, 1, ...) -> scalar loss."""
        return normalized_focal_loss(input, target, weight, self.gamma, self.class_weight, self.ignore_index)
