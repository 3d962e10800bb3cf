# SPDX-License-Identifier: Apache-2.0
"""How the network is run: on patches in training, on whole images of any size in validation and inference.

Both run in bfloat16 where asked to (`amp`). MONAI's engines know mixed precision on CUDA only; an inferer is the one
place where it works on CPU too, and bfloat16 needs no loss scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, sliding_window_inference
from monai.utils import convert_to_dst_type

__all__ = ["PatchInferer", "ProbabilityInferer", "bfloat16_pays", "window_weights"]

SIGMA = 0.125  # of the weight of a window's pixels, relative to its size


def bfloat16_pays(device: torch.device | str) -> bool:
    """Whether the device computes bfloat16 faster than float32, as far as PyTorch can tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.backends.cpu.get_cpu_capability() if torch.device(device).type == "cpu" else ""
    return capabilities == "AVX512" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def window_weights(size: Sequence[int]) -> torch.Tensor:
    """Gaussian weight of each pixel of a window, (1, 1, X, Y[, Z]).

    MONAI's own weights are never below 0.001. Near the image's edge all weights are so small, and there the outermost
    pixels of a window, which have seen the least, would count as much as the inner ones of the next window.
    """
    weights = torch.ones(1, 1, *[1] * len(size))
    for axis, length in enumerate(size, start=2):
        offset = (torch.arange(length) - (length - 1) / 2) / (SIGMA * length)
        shape = [1] * weights.ndim
        shape[axis] = length
        weights = weights * torch.exp(-0.5 * offset**2).reshape(shape)
    return weights


class PatchInferer(Inferer):
    """One pass of the network; logits in float32.

    Args:
        amp: run in bfloat16 autocast.
    """

    def __init__(self, amp: bool = False) -> None:
        self.amp = amp

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """(B, C_in, ...) -> logits (B, C_out, ...)."""
        if isinstance(inputs, MetaTensor):  # whose bookkeeping would follow each operation of the network
            inputs = inputs.as_tensor()
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return network(inputs, *args, **kwargs).float()


class ProbabilityInferer(Inferer):
    """Class probabilities of whole images: overlapping windows, each through softmax, blended with a Gaussian weight.

    Blending probabilities before any object is drawn is what keeps objects whole across windows. An image not larger
    than the window goes through the network as it is, without padding (the network takes any size).

    Args:
        roi_size: window in pixels, (X, Y[, Z]).
        sw_batch_size: windows per pass.
        overlap: share of a window that it has in common with the next.
        amp: run in bfloat16 autocast.
        progress: show a progress bar over the windows.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        sw_batch_size: int = 1,
        overlap: float = 0.25,
        amp: bool = False,
        progress: bool = False,
    ) -> None:
        self.roi_size = tuple(roi_size)
        self.sw_batch_size = sw_batch_size
        self.overlap = overlap
        self.patch_inferer = PatchInferer(amp)
        self.progress = progress

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Images (B, C_in, X, Y[, Z]) -> probabilities (B, C_out, X, Y[, Z]), float32.

        Raises:
            ValueError: when the images have another number of spatial dimensions than `roi_size`.
        """
        size = inputs.shape[2:]
        if len(size) != len(self.roi_size):
            raise ValueError(
                f"expected {len(self.roi_size)}D images, got {len(size)}D of size {tuple(size)}; "
                "for volumes add the overlay configs/3d.json."
            )

        def probabilities(x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.patch_inferer(x, network, *args, **kwargs), dim=1)

        if all(length <= window for length, window in zip(size, self.roi_size, strict=True)):
            return convert_to_dst_type(probabilities(inputs), inputs)[0]
        window = [min(length, most) for length, most in zip(size, self.roi_size, strict=True)]
        return sliding_window_inference(  # type: ignore[return-value]
            inputs,
            roi_size=window,
            sw_batch_size=self.sw_batch_size,
            predictor=probabilities,
            overlap=self.overlap,
            roi_weight_map=window_weights(window),
            progress=self.progress,
        )
