# SPDX-License-Identifier: Apache-2.0
"""The network: shapes of any size, the identity behind its fast recurrence, gradients, exports."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F

from scripts.blocks import ConvGRU, unpooled_kernel
from scripts.network import GRUUNet

TINY = {"features": 4, "channels": (4, 6), "dense_layers": (1, 2), "growth": 4}


def tiny(spatial_dims: int = 2, **changes: object) -> GRUUNet:
    """A network of two scales and three steps, with fixed weights."""
    torch.manual_seed(0)
    return GRUUNet(spatial_dims, in_channels=1, out_channels=3, **{**TINY, **changes})  # type: ignore[arg-type]


SHAPES = [
    (2, {}, (1, 1, 33, 31)),
    (2, {}, (2, 1, 63, 65)),
    (2, {}, (1, 1, 1, 3)),
    (2, {"norm": "instance"}, (2, 1, 12, 20)),
    (2, {"norm": ("group", {"num_groups": 2})}, (2, 1, 12, 20)),
    (2, {"norm": None, "dropout": 0.2}, (2, 1, 12, 20)),
    (2, {"act": "relu", "shared_gru": False}, (1, 1, 12, 20)),
    (2, {"channels": (4, 6, 8), "dense_layers": (1, 1, 1)}, (1, 1, 37, 41)),
    (3, {}, (1, 1, 9, 15, 5)),
    (3, {"shared_gru": False}, (2, 1, 8, 8, 1)),
]


@pytest.mark.parametrize(("spatial_dims", "changes", "shape"), SHAPES)
def test_shape_is_kept(spatial_dims: int, changes: dict, shape: tuple[int, ...]) -> None:
    net = tiny(spatial_dims, **changes).eval()
    with torch.no_grad():
        logits = net(torch.randn(shape))
    assert logits.shape == (shape[0], 3, *shape[2:])
    assert torch.isfinite(logits).all()


def test_default_size() -> None:
    n_parameters = sum(p.numel() for p in GRUUNet(2, 1, 3).parameters())
    assert 1_000_000 <= n_parameters <= 2_000_000


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_unpooled_kernel_equals_unpooling_then_convolving(spatial_dims: int) -> None:
    conv = F.conv2d if spatial_dims == 2 else F.conv3d
    conv_transpose = F.conv_transpose2d if spatial_dims == 2 else F.conv_transpose3d
    x = torch.randn(2, 4, *(5, 7, 3)[:spatial_dims], dtype=torch.double)
    weight = torch.randn(6, 4, *(3,) * spatial_dims, dtype=torch.double)
    expected = conv(F.interpolate(x, scale_factor=2), weight, padding=1)
    torch.testing.assert_close(conv_transpose(x, unpooled_kernel(weight), stride=2, padding=1), expected)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gru_equals_its_equations(spatial_dims: int) -> None:
    """The plain form, on the unpooled input, is the reference: outputs and gradients."""
    torch.manual_seed(0)
    gru = ConvGRU(spatial_dims, 4, "tanh").double()
    conv = F.conv2d if spatial_dims == 2 else F.conv3d
    x = torch.randn(2, 4, *(3, 5, 2)[:spatial_dims], dtype=torch.double)
    h = torch.randn(2, 4, *(6, 10, 4)[:spatial_dims], dtype=torch.double)

    def plain() -> torch.Tensor:
        full = F.interpolate(x, scale_factor=2)
        w_z, w_r, w_c = gru.input_gates.weight.chunk(3)
        assert gru.input_gates.bias is not None
        b_z, b_r, b_c = gru.input_gates.bias.chunk(3)
        u_z, u_r = gru.state_gates.weight.chunk(2)
        z = torch.sigmoid(conv(full, w_z, b_z, padding=1) + conv(h, u_z, padding=1))
        r = torch.sigmoid(conv(full, w_r, b_r, padding=1) + conv(h, u_r, padding=1))
        c = torch.tanh(conv(full, w_c, b_c, padding=1) + conv(r * h, gru.candidate.weight, padding=1))
        return z * h + (1 - z) * c

    torch.testing.assert_close(gru(x, h), plain())
    parameters = list(gru.parameters())
    fast_gradients = torch.autograd.grad(gru(x, h).square().sum(), parameters)
    torch.testing.assert_close(fast_gradients, torch.autograd.grad(plain().square().sum(), parameters))


@pytest.mark.parametrize("changes", [{}, {"shared_gru": False}, {"norm": None}, {"norm": "instance"}])
def test_every_parameter_gets_a_gradient(changes: dict) -> None:
    net = tiny(**changes)
    net(torch.randn(2, 1, 16, 16)).square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_step_logits_end_in_forward_and_differ() -> None:
    net, x = tiny().eval(), torch.randn(1, 1, 13, 18)
    with torch.no_grad():
        steps = net.step_logits(x)
        assert [s.shape for s in steps] == [(1, 3, 13, 18)] * 3
        torch.testing.assert_close(steps[-1], net(x))
        assert not torch.allclose(steps[0], steps[-1])


def test_max_steps_stops_early_with_the_same_weights() -> None:
    net, short, x = tiny().eval(), tiny(max_steps=2).eval(), torch.randn(1, 1, 16, 16)
    short.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(short(x), net.step_logits(x)[1])


def test_shared_gru_counts_once() -> None:
    def size(net: GRUUNet) -> int:
        return sum(p.numel() for p in net.parameters())

    gru = sum(p.numel() for p in ConvGRU(2, 4, "relu").parameters())
    assert size(tiny(shared_gru=False)) - size(tiny()) == 2 * gru


def test_checkpointing_gives_the_same_gradients() -> None:
    x = torch.randn(2, 1, 16, 16)
    gradients = []
    for checkpointing in (False, True):
        net = tiny(checkpointing=checkpointing)
        net(x).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_checkpointing_keeps_at_most_half() -> None:
    """Bytes that the forward pass keeps for the backward pass, each storage counted once."""

    def kept(net: GRUUNet) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = net(torch.randn(1, 1, 64, 64))
        del logits
        return sum(storages.values())

    arguments = {"features": 8, "channels": (8, 8, 8), "dense_layers": (2, 2, 2)}
    assert kept(tiny(checkpointing=True, **arguments)) <= kept(tiny(**arguments)) / 2


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_torchscript_agrees(spatial_dims: int) -> None:
    net, x = tiny(spatial_dims).eval(), torch.randn(2, 1, *(13, 18, 6)[:spatial_dims])
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(net), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), net(x))
        torch.testing.assert_close(scripted.step_logits(x), net.step_logits(x))


def test_torch_export_agrees_at_other_sizes() -> None:
    net = tiny().eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(net, (torch.randn(2, 1, 18, 21),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    for shape in ((2, 1, 18, 21), (3, 1, 25, 30)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
        ({"channels": (4,), "dense_layers": (1, 1)}, "one entry for each scale"),
        ({"channels": (), "dense_layers": ()}, "one entry for each scale"),
        ({"max_steps": 4}, "max_steps must be 1 to 3"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)
