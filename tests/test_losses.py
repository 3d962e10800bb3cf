# SPDX-License-Identifier: Apache-2.0
"""The loss: golden value, limiting cases, gradients, extreme input, and the scale that the normalization keeps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from scripts.losses import NormalizedFocalLoss, normalized_focal_loss


def random_case(*shape: int, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, classes, ...) and targets (B, 1, ...)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], classes, *shape[1:], generator=generator, dtype=torch.double)
    return logits, torch.randint(classes, (shape[0], 1, *shape[1:]), generator=generator)


def test_golden_value() -> None:
    """Two pixels, p = 1/2 and 3/4: weights 1/4 and 1/16, so the loss is (4 ln 2 + ln 4/3) / 5."""
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]]).unsqueeze(2)  # (1, 2, 1, 2)
    loss = normalized_focal_loss(logits, torch.zeros(1, 1, 1, 2))
    assert loss.item() == pytest.approx((4 * math.log(2) + math.log(4 / 3)) / 5, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 4, 3, 2)])
def test_gamma_zero_is_cross_entropy(shape: tuple[int, ...]) -> None:
    logits, target = random_case(*shape)
    expected = F.cross_entropy(logits, target.squeeze(1))
    torch.testing.assert_close(normalized_focal_loss(logits, target, gamma=0), expected)
    # per image, then the mean: images with different numbers of ignored pixels count alike
    target[0, 0, 0] = -1
    pairs = zip(logits, target, strict=True)
    per_image = [F.cross_entropy(x[None], t, ignore_index=-1) for x, t in pairs]
    torch.testing.assert_close(normalized_focal_loss(logits, target, gamma=0), torch.stack(per_image).mean())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_gradient_is_that_of_the_numerator(gamma: float) -> None:
    """The normalizer is held fixed, so numerical differences must hold it fixed too."""
    logits, target = random_case(2, 3, 4)

    def weights(x: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(x, 1).gather(1, target).squeeze(1)
        return (1 - p) ** gamma

    total = weights(logits).sum((1, 2))

    def with_fixed_total(x: torch.Tensor) -> torch.Tensor:
        return ((weights(x) * F.cross_entropy(x, target.squeeze(1), reduction="none")).sum((1, 2)) / total).mean()

    x = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(with_fixed_total, (x,))
    ours = torch.autograd.grad(normalized_focal_loss(x, target, gamma=gamma), x)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(with_fixed_total(x), x)[0])


def test_scale_does_not_fall_as_the_easy_pixels_get_easier() -> None:
    """One hard pixel among easy ones: its gradient stays, where the mean of focal losses lets it fade."""
    target = torch.zeros(1, 1, 1, 1000)
    gradients = []
    for margin in (2.0, 4.0, 8.0):
        logits = torch.zeros(1, 2, 1, 1000)
        logits[:, 0] = margin
        logits[:, 0, 0, 0] = -1.0  # the hard one
        logits.requires_grad_()
        normalized_focal_loss(logits, target).backward()
        assert logits.grad is not None
        gradients.append(logits.grad[0, 0, 0, 0].abs().item())
    assert gradients[0] < gradients[1] < gradients[2]
    assert gradients[2] > 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 100.0, 3e4])
def test_extreme_logits(dtype: torch.dtype, scale: float) -> None:
    logits, target = random_case(2, 4, 4)
    x = (logits.clamp(-1, 1) * scale).to(dtype).requires_grad_()
    for gamma in (0.5, 2.0):
        loss = normalized_focal_loss(x, target, gamma=gamma)
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("case", ["all ignored", "all correct"])
def test_nothing_to_learn_is_zero_and_finite(gamma: float, case: str) -> None:
    x = torch.full((1, 3, 4, 4), -1e4)
    x[:, 0] = 1e4
    x.requires_grad_()
    target = torch.full((1, 1, 4, 4), -1.0 if case == "all ignored" else 0.0)
    loss = normalized_focal_loss(x, target, gamma=gamma)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None and torch.equal(x.grad, torch.zeros_like(x))


def test_ignored_pixels_do_not_matter() -> None:
    logits, target = random_case(1, 4, 6)
    target[..., 3:] = -1
    changed = logits.clone()
    changed[..., 3:] = 50 * torch.randn_like(changed[..., 3:])
    expected = normalized_focal_loss(logits[..., :3], target[..., :3])
    torch.testing.assert_close(normalized_focal_loss(logits, target), expected)
    torch.testing.assert_close(normalized_focal_loss(changed, target), expected)


def test_pixel_weights_and_class_weights() -> None:
    logits, target = random_case(1, 3, 3, classes=2)
    by_class = torch.tensor([1.0, 4.0])
    by_pixel = by_class[target]
    expected = normalized_focal_loss(logits, target, weight=by_pixel)
    torch.testing.assert_close(normalized_focal_loss(logits, target, class_weight=by_class), expected)
    doubled = normalized_focal_loss(logits, target, weight=2 * by_pixel)  # the scale of the weights cancels
    torch.testing.assert_close(doubled, expected)
    assert not torch.isclose(expected, normalized_focal_loss(logits, target))


def test_module_equals_function() -> None:
    logits, target = random_case(2, 5, 5)
    module = NormalizedFocalLoss(gamma=1.5, class_weight=[1.0, 2.0, 3.0], ignore_index=2)
    weight = torch.tensor([1.0, 2.0, 3.0])
    expected = normalized_focal_loss(logits, target, None, 1.5, weight, 2)
    torch.testing.assert_close(module(logits, target), expected)
    torch.testing.assert_close(module(logits, target.squeeze(1).float()), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NormalizedFocalLoss(gamma=-1), "gamma must be at least 0, got -1"),
        (lambda: NormalizedFocalLoss(class_weight=[1, -1]), "class_weight must not be negative"),
        (
            lambda: normalized_focal_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 5)),
            r"target must be .*got \(1, 1, 4, 5\)",
        ),
        (
            lambda: normalized_focal_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4), torch.zeros(4, 4)),
            r"weight must be .*got \(4, 4\)",
        ),
    ],
)
def test_wrong_arguments(call, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        call()
