# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from scripts.inferers import PatchInferer, ProbabilityInferer, bfloat16_pays


class Recorder(nn.Module):
    """Three logits that depend on the pixel alone, so that windows change nothing; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x)
        return torch.cat([x, torch.sin(5 * x), 3 - x * x], dim=1)

    @property
    def sizes(self) -> set[tuple[int, ...]]:
        return {tuple(x.shape[2:]) for x in self.inputs}


def image(*shape: int) -> MetaTensor:
    pixels = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0)) * 4
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    return MetaTensor(pixels, affine=affine, meta={"filename_or_obj": "/data/01/t000.tif"})


@pytest.mark.parametrize(
    "shape, roi_size, windows",
    [
        ((50, 37), (16, 16), {(16, 16)}),
        ((50, 37), (50, 37), {(50, 37)}),
        ((20, 13), (64, 64), {(20, 13)}),  # smaller than the window: neither padded nor cut
        ((70, 13), (32, 32), {(32, 13)}),
        ((24, 20, 9), (12, 12, 6), {(12, 12, 6)}),
        ((24, 20, 3), (12, 12, 6), {(12, 12, 3)}),
        ((12, 11, 5), (12, 12, 6), {(12, 11, 5)}),
    ],
)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_windows_are_seamless(
    shape: tuple[int, ...], roi_size: tuple[int, ...], windows: set[tuple[int, ...]], overlap: float
) -> None:
    network, inputs = Recorder(), image(*shape)
    found = ProbabilityInferer(roi_size, overlap=overlap)(inputs, network)
    assert network.sizes == windows
    expected = torch.softmax(Recorder()(inputs.as_tensor()), dim=1)
    assert found.shape == (1, 3, *shape) and found.dtype == torch.float32
    torch.testing.assert_close(torch.as_tensor(found).as_subclass(torch.Tensor), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape, roi_size", [((60, 60), (24, 24)), ((80, 30), (40, 40)), ((30, 24, 12), (16, 16, 8))])
def test_windows_are_nearly_seamless_for_a_network_that_looks_around(
    shape: tuple[int, ...], roi_size: tuple[int, ...]
) -> None:
    """A window's outermost pixels see zeros beyond it: they must not count, least of all at the edge of the image."""
    torch.manual_seed(0)
    convolution = nn.Conv2d if len(shape) == 2 else nn.Conv3d
    network, inputs = convolution(1, 3, 3, padding=1), image(*shape)
    with torch.no_grad():
        difference = ProbabilityInferer(roi_size)(inputs, network) - ProbabilityInferer(shape)(inputs, network)

    assert 0 < float(difference.abs().max()) < 0.02


def test_probabilities_are_blended_not_logits() -> None:
    """One window is very sure of class 0, the next rather sure of class 1: in their middle both count alike."""
    logits = iter([(20.0, 0.0), (0.0, 5.0)])

    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(next(logits))[None, :, None, None].expand(1, 2, *x.shape[2:])

    found = ProbabilityInferer((8, 8), overlap=0.5)(torch.zeros(1, 1, 12, 8), network)
    sure = torch.softmax(torch.tensor([0.0, 5.0]), 0)[1]
    assert found[0, 0, 0, 0] == pytest.approx(1) and found[0, 1, -1, -1] == pytest.approx(float(sure))
    middle = found[0, 1, 5:7].mean()
    assert float(middle) == pytest.approx(float(sure) / 2, abs=1e-4)


@pytest.mark.parametrize("roi_size", [(16, 16), (64, 64)])
def test_meta_data_are_kept_from_the_image_and_from_the_network(roi_size: tuple[int, ...]) -> None:
    network, inputs = Recorder(), image(40, 30)
    found = ProbabilityInferer(roi_size)(inputs, network)
    assert isinstance(found, MetaTensor)
    assert found.meta["filename_or_obj"] == "/data/01/t000.tif"
    torch.testing.assert_close(found.affine, inputs.affine)
    assert not any(isinstance(x, MetaTensor) for x in network.inputs)


@pytest.mark.parametrize(
    "shape, roi_size, message", [((8, 8, 8), (8, 8), "2D images, got 3D.*3d.json"), ((8, 8), (8, 8, 8), "3D")]
)
def test_other_dimension_is_refused(shape: tuple[int, ...], roi_size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"expected {message}"):
        ProbabilityInferer(roi_size)(image(*shape), Recorder())


@pytest.mark.parametrize("amp, inside", [(False, torch.float32), (True, torch.bfloat16)])
def test_logits_are_float32_whatever_the_network_computes_in(amp: bool, inside: torch.dtype) -> None:
    convolution, seen = nn.Conv2d(1, 2, 3), []
    convolution.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    logits = PatchInferer(amp)(image(8, 8), convolution)
    assert seen == [inside]
    assert logits.dtype == torch.float32 and type(logits) is torch.Tensor
    logits.sum().backward()
    assert convolution.weight.grad is not None and convolution.weight.grad.dtype == torch.float32


def test_arguments_reach_the_network() -> None:
    def network(x: torch.Tensor, factor: float, shift: float = 0.0) -> torch.Tensor:
        return x * factor + shift

    assert PatchInferer()(torch.ones(1, 1, 2), network, 3.0, shift=1.0).tolist() == [[[4.0, 4.0]]]


@pytest.mark.parametrize(
    "capability, features, pays",
    [
        ("AVX512", {"avx512_bf16": True}, True),
        ("AVX512", {"avx512_bf16": False}, False),
        ("AVX512", {}, False),
        ("AVX2", {"avx512_bf16": True}, False),
    ],
)
def test_bfloat16_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capability: str, features: dict[str, bool], pays: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert bfloat16_pays("cpu") is bfloat16_pays(torch.device("cpu")) is pays
    assert bfloat16_pays("mps") is False


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_on_a_gpu(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert bfloat16_pays("cuda:0") is supported
