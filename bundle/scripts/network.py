# SPDX-License-Identifier: Apache-2.0
"""GRUU-Net, for 2D and 3D images.

Based on: Wollmann et al., "GRUU-Net: Integrated convolutional and gated recurrent neural network for cell
segmentation", Medical Image Analysis 56 (2019), https://doi.org/10.1016/j.media.2019.04.011. The authors published no
code; this is written from the paper's text and from a public reader's summary of its equations.

Two streams run side by side. The recurrent stream holds one state `h` at full resolution. The pooling stream visits the
scales 2, 4, ..., 2^n, ..., 4, 2 once each; at each scale a Full-Resolution Dense Unit (FRDU) looks at the pooled
state and at the previous scale's features, and a convolutional GRU refines the state with what the unit found. There
is no other skip connection.

Left open by the sources, decided here: one GRU is shared by all steps (`shared_gru`); unpooling is nearest neighbor;
one residual block stands before the recurrence, as in FRRN; channels and dense layers per scale; batch norm by default;
an image of any size is padded at its far edges by replication, and the result cropped.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv
from torch import nn
from torch.utils.checkpoint import checkpoint

from scripts.blocks import FRDU, ConvGRU, ResidualBlock

__all__ = ["GRUUNet"]


class GRUUNet(nn.Module):
    """GRUU-Net for any image size in 2D and 3D; see the module's docstring for the sources.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        in_channels: number of image channels.
        out_channels: number of classes.
        features: channels of the recurrent state (the paper's lanes).
        channels: channels of the merging 1x1 convolution at each scale, finest (2) first; as many as there are scales.
        dense_layers: dense layers at each scale, as many as `channels`.
        growth: channels that each dense layer adds.
        act: activation.
        norm: normalization, "batch", "instance", ("group", {"num_groups": 8}) or None.
        dropout: dropout probability in the dense blocks.
        shared_gru: use one GRU for all steps, else one for each.
        max_steps: stop the refinement after so many steps (a switch for inference: the network keeps all its weights).
        checkpointing: save memory in training by computing each step again in the backward pass: same gradients
            (the running statistics of batch norm are updated twice).

    Raises:
        ValueError: when an argument is out of its range.

    Examples::

        >>> GRUUNet(spatial_dims=2, in_channels=1, out_channels=3)(torch.zeros(1, 1, 65, 90)).shape
        torch.Size([1, 3, 65, 90])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: int = 32,
        channels: Sequence[int] = (32, 64, 96, 128, 128),
        dense_layers: Sequence[int] = (2, 3, 3, 4, 4),
        growth: int = 32,
        act: str | tuple = ("leakyrelu", {"negative_slope": 0.01}),
        norm: str | tuple | None = "batch",
        dropout: float = 0.0,
        shared_gru: bool = True,
        max_steps: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if not channels or len(channels) != len(dense_layers):
            raise ValueError(
                "channels and dense_layers must have one entry for each scale, "
                f"got {list(channels)} and {list(dense_layers)}."
            )
        scales = len(channels)
        self.steps = 2 * scales - 1
        if max_steps is not None and not 1 <= max_steps <= self.steps:
            raise ValueError(f"max_steps must be 1 to {self.steps} for {scales} scales, got {max_steps}.")
        self.spatial_dims = spatial_dims
        self.divisor = 2**scales
        self.max_steps = self.steps if max_steps is None else max_steps
        self.checkpointing = checkpointing

        self.stem = Convolution(
            spatial_dims, in_channels, features, kernel_size=5, act=act, norm=norm, bias=norm is None
        )
        self.before = ResidualBlock(spatial_dims, features, act, norm)
        self.units = nn.ModuleList()
        self.grus = nn.ModuleList()
        previous = features
        for step in range(self.steps):
            level = min(step, self.steps - 1 - step)  # 0, 1, ..., scales - 1, ..., 1, 0
            unit = FRDU(
                spatial_dims,
                state_channels=features,
                in_channels=previous,
                channels=channels[level],
                growth=growth,
                layers=dense_layers[level],
                scale=2 ** (level + 1),
                downward=step < scales,
                act=act,
                norm=norm,
                dropout=dropout,
            )
            self.units.append(unit)
            # a shared GRU stands in the list once for each step; its weights exist once
            self.grus.append(self.grus[0] if shared_gru and step else ConvGRU(spatial_dims, features, act))
            previous = unit.out_channels
        self.after = ResidualBlock(spatial_dims, features, act, norm)
        self.head = Conv[Conv.CONV, spatial_dims](features, out_channels, kernel_size=1)
        # twice as fast as the default format on a CPU, in 3D (measured)
        memory_format = torch.channels_last if spatial_dims == 2 else torch.channels_last_3d
        self.to(memory_format=memory_format)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image (B, in_channels, H, W[, D]) of any size -> logits (B, out_channels, H, W[, D])."""
        size = list(x.shape[2:])
        return self.crop(self.head(self.after(self.states(self.pad(x))[-1])), size)

    @torch.jit.export
    def step_logits(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Logits after each step of the refinement: each state in turn, read out through the one head.

        Args:
            x: image, (B, in_channels, H, W[, D]).

        Returns:
            `max_steps` tensors (B, out_channels, H, W[, D]); the last one is `forward(x)`.
        """
        size = list(x.shape[2:])
        return [self.crop(self.head(self.after(h)), size) for h in self.states(self.pad(x))]

    def states(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The recurrent state after each step, for an image whose size is a multiple of `divisor`."""
        o = self.stem(x)
        h = self.before(o)
        states: list[torch.Tensor] = []
        for i, (unit, gru) in enumerate(zip(self.units, self.grus)):  # noqa: B905 (TorchScript knows no strict)
            if i < self.max_steps:
                if self.checkpointing and self.training and not torch.jit.is_scripting():
                    o, h = self.checkpointed_step(i, o, h)
                else:
                    o, x_t = unit(o, h)
                    h = gru(x_t, h)
                states.append(h)
        return states

    @torch.jit.unused
    def checkpointed_step(self, i: int, o: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Step `i` of `states` that keeps only its inputs for the backward pass."""

        def step(o: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            o, x_t = self.units[i](o, h)
            return o, self.grus[i](x_t, h)

        return checkpoint(step, o, h, use_reentrant=False)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Replicate the far edges until the size is a multiple of `divisor`."""
        amount: list[int] = []  # last axis first, as F.pad wants it
        for axis in range(x.dim() - 1, 1, -1):
            amount += [0, -x.shape[axis] % self.divisor]
        x = F.pad(x, amount, mode="replicate")
        if self.spatial_dims == 2:
            return x.contiguous(memory_format=torch.channels_last)
        return x.contiguous(memory_format=torch.channels_last_3d)

    def crop(self, x: torch.Tensor, size: list[int]) -> torch.Tensor:
        """Cut off what `pad` added."""
        for axis, length in enumerate(size):
            x = x.narrow(axis + 2, 0, length)
        return x
