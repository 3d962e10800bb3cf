# SPDX-License-Identifier: Apache-2.0
"""Parts of GRUU-Net: the convolutional GRU, the dense unit of each scale, and the residual block; see `network.py`.

One identity makes the recurrence cheaper and changes no result: a 3x3 convolution after nearest-neighbor unpooling by
two is a transposed convolution with a 4x4 kernel and stride 2, so the gates' share of the input never needs the
unpooled input.
"""

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Act, Conv, Pool, split_args
from torch import nn

__all__ = ["ConvGRU", "DenseBlock", "FRDU", "ResidualBlock", "unpooled_kernel"]


def unpooled_kernel(weight: torch.Tensor) -> torch.Tensor:
    """Kernel of the transposed convolution that equals unpooling by two, then convolving with `weight`.

    `conv(unpool(x), weight, padding=1) == conv_transpose(x, unpooled_kernel(weight), stride=2, padding=1)`, borders
    included, where `unpool` is nearest-neighbor upsampling by two.

    Args:
        weight: (C_out, C_in, 3, 3[, 3]).

    Returns:
        (C_in, C_out, 4, 4[, 4]).
    """
    kernel = weight.transpose(0, 1)
    for dim in range(2, weight.dim()):
        kernel = kernel.flip(dim)
        edge = torch.zeros_like(kernel.narrow(dim, 0, 1))
        kernel = torch.cat([kernel, edge], dim) + torch.cat([edge, kernel], dim)
    return kernel


class ConvGRU(nn.Module):
    """Convolutional gated recurrent unit whose input comes at half the state's resolution.

    With `x` unpooled to the state's size, `*` a convolution (3x3) and `.` a product by element:

        z = sigmoid(W_z * x + U_z * h + b_z)         r = sigmoid(W_r * x + U_r * h + b_r)
        c = act(W_c * x + U_c * (r . h) + b_c)       h' = z . h + (1 - z) . c

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        channels: of input and state.
        act: activation of the candidate `c`.
    """

    def __init__(self, spatial_dims: int, channels: int, act: str | tuple) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        self.spatial_dims = spatial_dims
        self.input_gates = conv(channels, 3 * channels, kernel_size=3, padding=1)  # W_z, W_r, W_c and the biases
        self.state_gates = conv(channels, 2 * channels, kernel_size=3, padding=1, bias=False)  # U_z, U_r
        self.candidate = conv(channels, channels, kernel_size=3, padding=1, bias=False)  # U_c
        act_name, act_args = split_args(act)
        self.act = Act[act_name](**act_args)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Refine the state.

        Args:
            x: input, (B, channels, H/2, W/2[, D/2]).
            h: state, (B, channels, H, W[, D]).

        Returns:
            the new state, shaped like `h`.
        """
        kernel = unpooled_kernel(self.input_gates.weight)
        if self.spatial_dims == 2:
            from_x = F.conv_transpose2d(x, kernel, self.input_gates.bias, stride=2, padding=1)
        else:
            from_x = F.conv_transpose3d(x, kernel, self.input_gates.bias, stride=2, padding=1)
        x_z, x_r, x_c = from_x.chunk(3, dim=1)
        h_z, h_r = self.state_gates(h).chunk(2, dim=1)
        z = torch.sigmoid(x_z + h_z)
        r = torch.sigmoid(x_r + h_r)
        c = self.act(x_c + self.candidate(r * h))
        return torch.lerp(c, h.to(c.dtype), z)


class DenseBlock(nn.Module):
    """Densely connected 3x3 convolutions: each sees the block's input and all results before it."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        growth: int,
        layers: int,
        act: str | tuple,
        norm: str | tuple | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Convolution(
                spatial_dims,
                in_channels + i * growth,
                growth,
                act=act,
                norm=norm,
                dropout=dropout or None,
                bias=norm is None,
            )
            for i in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, ...) -> (B, in_channels + layers * growth, ...)."""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class FRDU(nn.Module):
    """Full-Resolution Dense Unit: pooled state and previous features in, this scale's features and the GRU's input out.

    Args:
        spatial_dims: number of spatial dimensions.
        state_channels: channels of the recurrent state.
        in_channels: channels of the previous unit's features.
        channels: of the 1x1 convolution that merges the two.
        growth: channels that each dense layer adds.
        layers: number of dense layers.
        scale: pooling factor of this unit, a power of two.
        downward: the previous features have twice this unit's resolution (else half of it).
        act: activation.
        norm: normalization.
        dropout: dropout probability after each dense convolution.
    """

    def __init__(
        self,
        spatial_dims: int,
        state_channels: int,
        in_channels: int,
        channels: int,
        growth: int,
        layers: int,
        scale: int,
        downward: bool,
        act: str | tuple,
        norm: str | tuple | None,
        dropout: float,
    ) -> None:
        super().__init__()
        pool = Pool[Pool.MAX, spatial_dims]
        self.pool_state = pool(kernel_size=scale, stride=scale)
        self.resample = pool(kernel_size=2, stride=2) if downward else nn.Upsample(scale_factor=2.0, mode="nearest")
        bias = norm is None
        self.merge = Convolution(
            spatial_dims, state_channels + in_channels, channels, kernel_size=1, act=act, norm=norm, bias=bias
        )
        self.dense = DenseBlock(spatial_dims, channels, growth, layers, act, norm, dropout)
        self.out_channels = channels + layers * growth
        self.to_state = Convolution(
            spatial_dims, self.out_channels, state_channels, kernel_size=1, act=None, norm=norm, bias=bias
        )
        self.unpool = nn.Upsample(scale_factor=scale / 2.0, mode="nearest") if scale > 2 else nn.Identity()

    def forward(self, o: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One visit of the scale.

        Args:
            o: previous features, (B, in_channels, ...) at twice or half this scale's resolution.
            h: state, (B, state_channels, H, W[, D]).

        Returns:
            features (B, out_channels, H/scale, ...), and the GRU's input (B, state_channels, H/2, ...).
        """
        o = self.dense(self.merge(torch.cat([self.pool_state(h), self.resample(o)], dim=1)))
        return o, self.unpool(self.to_state(o))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions whose result is added to the input."""

    def __init__(self, spatial_dims: int, channels: int, act: str | tuple, norm: str | tuple | None) -> None:
        super().__init__()
        bias = norm is None
        self.conv1 = Convolution(spatial_dims, channels, channels, act=act, norm=norm, bias=bias)
        self.conv2 = Convolution(spatial_dims, channels, channels, act=None, norm=norm, bias=bias)
        act_name, act_args = split_args(act)
        self.act = Act[act_name](**act_args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, ...) -> the same shape."""
        return self.act(x + self.conv2(self.conv1(x)))
