"""Proposition 1 of Hu et al. 2022, in numbers: without scaling, branches are a learning rate.

For y = sum_m W_m x, every W_m has the gradient of W = sum_m W_m, so a step of rate r moves W as a
step of rate M r moves one conv. With a scaling layer behind each branch it does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

STEPS, BRANCHES, RATE = 50, 3, 0.02


def largest_departure(*, scales: bool, seed: int = 0) -> float:
    """The largest |sum_m v_m W_m - W| / |W| over a training in float64.

    W: the kernel of one conv that starts at the same sum and learns at M times the rate.
    scales: whether each branch has a scaling layer v_m, which starts at 1.
    """
    torch.manual_seed(seed)
    images = torch.randn(32, 3, 8, 8, dtype=torch.float64)
    targets = torch.randn(32, 4, 6, 6, dtype=torch.float64)
    kernels = [nn.Parameter(0.1 * torch.randn(4, 3, 3, 3).double()) for _ in range(BRANCHES)]
    factors = [torch.ones(4, 1, 1, 1).double().requires_grad_(scales) for _ in kernels]
    one = nn.Parameter(sum(k.detach() for k in kernels))  # type: ignore[arg-type]

    def composed() -> Tensor:
        return torch.stack([v * k for v, k in zip(factors, kernels, strict=True)]).sum(0)

    largest = 0.0
    for _ in range(STEPS):
        trained = [*kernels, *(v for v in factors if v.requires_grad)]
        _step(images, targets, composed, trained, RATE)
        _step(images, targets, lambda: one, [one], BRANCHES * RATE)
        departure = ((composed() - one).norm() / one.norm()).item()
        largest = max(largest, departure)
    return largest


def _step(
    images: Tensor,
    targets: Tensor,
    kernel: Callable[[], Tensor],
    trained: list[Tensor],
    rate: float,
) -> None:
    loss = (nn.functional.conv2d(images, kernel()) - targets).square().mean()
    with torch.no_grad():
        for tensor, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            tensor -= rate * grad
