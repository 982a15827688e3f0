"""Losses of both networks, their optimizers, and the mean of the generator's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Non-saturating loss: ``softplus(-D(G(z)))``, mean over the batch."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Logistic loss: ``softplus(-D(x)) + softplus(D(G(z)))``, mean over the batch."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(discriminator: nn.Module, real: torch.Tensor, gamma: float) -> torch.Tensor:
    """R1 of Mescheder et al. 2018: ``gamma / 2 * |grad D(x)|^2`` at real images, their mean."""
    real = real.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return gamma / 2 * gradient.square().sum((1, 2, 3)).mean()


def make_optimizers(
    generator: nn.Module, discriminator: nn.Module, lr: tuple[float, float], r1_every: int
) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    """Return Adam for both; the discriminator's is slowed for its lazy penalty's extra steps."""
    lazy = r1_every / (r1_every + 1)
    return (
        torch.optim.Adam(generator.parameters(), lr=lr[0], betas=(0.0, 0.99)),
        torch.optim.Adam(discriminator.parameters(), lr=lr[1] * lazy, betas=(0.0, 0.99**lazy)),
    )


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, keep: float) -> None:
    """Move running means towards the weights by ``1 - keep``; buffers are copied."""
    for a, b in zip(average.parameters(), network.parameters()):
        a.lerp_(b, 1 - keep)
    for own, other in zip(average.buffers(), network.buffers()):
        own.copy_(other)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Compute no gradients of a network's weights inside the block."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
