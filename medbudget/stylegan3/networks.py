"""StyleGAN3's generator (configuration T) and StyleGAN2's residual discriminator.

Written from the papers: Karras et al. 2021 (arXiv 2106.12423, "the paper" here) and Karras et al.
2020 (arXiv 1912.04958). Ordinary PyTorch operations only, on any device.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from medbudget.settings import check_counts, check_number
from medbudget.stylegan3.filters import TAPS, Rates, design_filter, downsample, make_rates, upsample

SLOPE, GAIN = 0.2, math.sqrt(2)


@dataclass(frozen=True)
class Architecture:
    """Sizes of both networks; the defaults are those of the paper.

    A layer has ``min(channel_base / 2 / cutoff, channel_max)`` channels in the generator and
    ``min(channel_base / resolution, channel_max)`` in the discriminator.
    """

    size: int = 512  # pixels an edge, a power of two from 32 on
    channel_base: int = 32768
    channel_max: int = 512
    width: int = 512  # of z and w
    n_layers: int = 14  # synthesis layers
    margin: int = 10  # pixels of the canvas around the image
    mbstd_group: int = 4  # images that share a standard deviation; with 1 it says nothing

    def __post_init__(self) -> None:
        if self.size & (self.size - 1) or not 32 <= self.size <= 8192:
            raise ValueError(f"size must be a power of two from 32 to 8192, got {self.size}")
        check_number("n_layers", self.n_layers, 3, 64, whole=True)
        counts = ("channel_base", "channel_max", "width", "mbstd_group")
        check_counts(**{name: getattr(self, name) for name in counts})


class Dense(nn.Module):
    """Fully connected layer with equalised learning rate; ``lr`` below 1 slows it further."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: float = 0.0, lr: float = 1.0, active: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr)
        self.bias = nn.Parameter(torch.full((outputs,), bias / lr))
        self.gain, self.lr, self.active = lr / math.sqrt(inputs), lr, active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, self.weight * self.gain, self.bias * self.lr)
        return F.leaky_relu(x, SLOPE) * GAIN if self.active else x


class Mapping(nn.Module):
    """z to w: two layers at a hundredth of the learning rate (section 3 of the paper)."""

    mean: torch.Tensor

    def __init__(self, width: int, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Dense(width, width, lr=0.01, active=True) for _ in range(layers)
        )
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, z: torch.Tensor, *, truncation: float = 1.0) -> torch.Tensor:
        """Map ``(B, width)``; truncation below 1 draws w towards its running mean."""
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.layers:
            w = layer(w)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(w.mean(0), 0.002)
        return w if truncation == 1 else self.mean.lerp(w, truncation)


class FourierInput(nn.Module):
    """Waves of fixed random frequency below the first cut-off, moved as w says (section 3.1)."""

    frequencies: torch.Tensor
    phases: torch.Tensor

    def __init__(self, width: int, channels: int, canvas: int, rates: Rates) -> None:
        super().__init__()
        radius = rates.cutoff * torch.rand(channels).sqrt()  # uniform over the disc
        angle = 2 * math.pi * torch.rand(channels)
        self.register_buffer(
            "frequencies", torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
        )
        self.register_buffer("phases", torch.rand(channels) - 0.5)
        self.canvas, self.rate = canvas, rates.rate
        self.affine = Dense(width, 4)  # cosine and sine of a rotation, shift in x and y
        with torch.no_grad():
            self.affine.weight.zero_()
            self.affine.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        self.weight = nn.Parameter(torch.randn(channels, channels))

    def forward(self, w: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``(B, C, canvas, canvas)``; `shift` ``(B, 2)`` moves it by (x, y) image widths."""
        t = self.affine(w)
        c, s, x, y = (t / t[:, :2].norm(dim=1, keepdim=True)).unbind(1)
        rotation = torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1)
        turned = self.frequencies @ rotation  # (B, C, 2)
        phases = self.phases - torch.stack([x, y], 1) @ self.frequencies.T
        if shift is not None:
            phases = phases - (turned * shift[:, None]).sum(2)
        axis = (torch.arange(self.canvas, device=w.device) - (self.canvas - 1) / 2) / self.rate
        across = turned[:, None, None, :, 0] * axis[:, None]
        down = turned[:, None, None, :, 1] * axis[:, None, None]
        waves = torch.sin(2 * math.pi * (across + down + phases[:, None, None]))  # (B, H, W, C)
        return F.linear(waves, self.weight / math.sqrt(len(self.weight))).permute(0, 3, 1, 2)


class Modulated(nn.Module):
    """A convolution whose input channels are scaled by w, and by the input's mean square."""

    magnitude: torch.Tensor  # mean square of the input: its root keeps scales apart from styles
    magnitude_images = 20_000.0  # half-life of that mean
    recompute = False  # compute the layer again in the backward pass, which saves its memory

    def __init__(self, width: int, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.affine = Dense(width, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("magnitude", torch.ones(()))

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Map ``(B, inputs, H, W)`` as w ``(B, width)`` says."""
        if self.training:
            with torch.no_grad():
                keep = 0.5 ** (len(x) / self.magnitude_images)
                self.magnitude.lerp_(x.square().mean(), 1 - keep)
        scale = self.magnitude.rsqrt()
        if self.recompute and torch.is_grad_enabled():
            y = checkpoint(self.compute, x, w, scale, use_reentrant=False, preserve_rng_state=False)
            return cast(torch.Tensor, y)
        return self.compute(x, w, scale)

    def compute(self, x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class SynthesisLayer(Modulated):
    """Modulated convolution, bias, and a leaky ReLU between two filters (figure 4b)."""

    up_filter: torch.Tensor
    down_filter: torch.Tensor

    def __init__(
        self, width: int, inputs: int, outputs: int, margin: int, before: Rates, after: Rates
    ) -> None:
        super().__init__(width, inputs, outputs, 3)
        fine = 2 * max(before.rate, after.rate)  # where the leaky ReLU runs
        self.up, self.down = fine // before.rate, fine // after.rate
        for name, factor, rates in (
            ("up_filter", self.up, before),
            ("down_filter", self.down, after),
        ):
            kernel = design_filter(TAPS * factor, rates.cutoff, rates.half_width, fine)
            self.register_buffer(name, kernel)
        self.canvas = after.rate + 2 * margin

    def compute(self, x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, canvas, canvas)``."""
        style = self.affine(w)
        square = self.weight.square().sum((2, 3))
        demodulate = (style.square() @ square.T + 1e-8).rsqrt()
        x = x * (style * scale)[:, :, None, None]
        x = F.conv2d(x, self.weight, padding=1)
        return self.activate(x * demodulate[:, :, None, None] + self.bias[:, None, None])

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the leaky ReLU at a higher rate, so that what it adds can be filtered out."""
        size = (self.canvas - 1) * self.down + len(self.down_filter)
        x = upsample(x, self.up_filter, self.up, size)
        x = F.leaky_relu(x, SLOPE)
        return downsample(x, self.down_filter * math.sqrt(GAIN), self.down)  # on two axes


class ToRGB(Modulated):
    """The last, pointwise layer: modulated but not demodulated, no activation."""

    def __init__(self, width: int, inputs: int, size: int) -> None:
        super().__init__(width, inputs, 3, 1)
        self.size = size

    def compute(self, x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, 3, size, size)``."""
        style = self.affine(w) * scale / math.sqrt(self.weight.shape[1])
        edge = (x.shape[2] - self.size) // 2
        x = x[:, :, edge : edge + self.size, edge : edge + self.size]
        return F.conv2d(x * style[:, :, None, None], self.weight) + self.bias[:, None, None]


class Generator(nn.Module):
    """Configuration T: mapping, Fourier features, synthesis layers, ToRGB."""

    def __init__(self, architecture: Architecture | None = None) -> None:
        super().__init__()
        a = self.architecture = architecture or Architecture()
        rates = make_rates(a.size, a.n_layers)
        channels = [min(round(a.channel_base / 2 / r.cutoff), a.channel_max) for r in rates]
        self.mapping = Mapping(a.width)
        canvas = rates[0].rate + 2 * a.margin
        self.input = FourierInput(a.width, channels[0], canvas, rates[0])
        self.layers = nn.ModuleList(
            SynthesisLayer(a.width, channels[j], channels[i], a.margin, rates[j], rates[i])
            for i, j in enumerate([0, *range(a.n_layers - 1)])  # layer j comes before i
        )
        self.to_rgb = ToRGB(a.width, channels[a.n_layers - 1], a.size)

    def synthesize(self, w: torch.Tensor, *, shift: torch.Tensor | None = None) -> torch.Tensor:
        """Draw images from w: ``(B, width)`` to ``(B, 3, size, size)``, about -1 to 1.

        `shift` ``(B, 2)`` moves the input waves by (x, y) image widths, and so the image.
        """
        x = self.input(w, shift)
        for layer in self.layers:
            x = layer(x, w)
        return 0.25 * self.to_rgb(x, w)

    def forward(self, z: torch.Tensor, *, truncation: float = 1.0) -> torch.Tensor:
        """Draw images from z ``(B, width)``, standard normal."""
        return self.synthesize(self.mapping(z, truncation=truncation))


class Convolution(nn.Module):
    """Convolution with equalised learning rate; halves the edge after a blur if `down`."""

    kernel: torch.Tensor

    def __init__(
        self, inputs: int, outputs: int, size: int, *, bias: bool = True, active: bool = True,
        down: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        # The gain of the leaky ReLU goes through it, so that it can be spent on the weights.
        self.gain, self.active, self.down = GAIN if active else 1.0, active, down
        self.scale = self.gain / math.sqrt(inputs * size**2)
        self.register_buffer("kernel", torch.tensor([1.0, 3, 3, 1]) / 8, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pad, stride = self.weight.shape[2] // 2, 1
        if self.down:  # a pointwise convolution may skip pixels already in the blur
            stride = 2 if pad else 1
            x = downsample(F.pad(x, [pad + 1] * 4), self.kernel, 2 // stride)
            pad = 0
        bias = None if self.bias is None else self.bias * self.gain
        x = F.conv2d(x, self.weight * self.scale, bias, stride=stride, padding=pad)
        return F.leaky_relu(x, SLOPE) if self.active else x


class Block(nn.Module):
    """Two convolutions beside a pointwise one, half the resolution (StyleGAN2, figure 7c)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = Convolution(inputs, inputs, 3)
        self.second = Convolution(inputs, outputs, 3, down=True)
        self.skip = Convolution(inputs, outputs, 1, bias=False, active=False, down=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(self.first(x)) + self.skip(x)) / math.sqrt(2)


def minibatch_std(x: torch.Tensor, group: int) -> torch.Tensor:
    """Append the mean standard deviation over groups of images as one more channel.

    With groups of one image it is constant: the discriminator then has no sign of diversity.
    """
    n, c, h, w = x.shape
    group = math.gcd(min(group, n), n)
    y = x.reshape(group, n // group, c, h, w)
    y = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean((1, 2, 3), keepdim=True)
    return torch.cat([x, y.repeat(group, 1, h, w)], 1)


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator."""

    def __init__(self, architecture: Architecture | None = None) -> None:
        super().__init__()
        a = self.architecture = architecture or Architecture()
        steps = [a.size // 2**k for k in range(int(math.log2(a.size)) - 1)]  # size, ..., 4
        channels = [min(a.channel_base // step, a.channel_max) for step in steps]
        self.from_rgb = Convolution(3, channels[0], 1)
        self.blocks = nn.ModuleList(Block(*pair) for pair in itertools.pairwise(channels))
        last = channels[-1]
        self.last = Convolution(last + 1, last, 3)
        self.dense = Dense(last * 16, last, active=True)
        self.out = Dense(last, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return one logit for each image ``(B, 3, size, size)``, above 0 for real."""
        x = self.from_rgb(images.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        x = self.last(minibatch_std(x, self.architecture.mbstd_group))
        return self.out(self.dense(x.flatten(1)))[:, 0]
