"""Low-pass filters and the table of cut-offs: StyleGAN3's section 3.2 and appendix C.

Frequencies are in cycles per image, sampling rates in pixels per image, so that a signal of rate
``s`` can hold frequencies up to ``s / 2``. Positions are those of pixel centres, and every canvas
has its centre at the image's: no resampling here shifts anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.signal import firwin

TAPS = 6  # n of the paper: taps of a filter for each sample of the lower of its two rates


def design_filter(taps: int, cutoff: float, half_width: float, rate: float) -> torch.Tensor:
    """Return a Kaiser-windowed low-pass filter (appendix C), ``(taps,) float32`` that sums to 1.

    `cutoff` and `half_width` are the centre of the transition band and half its width; the filter
    runs at the sampling rate `rate`.
    """
    return torch.from_numpy(firwin(taps, cutoff, width=2 * half_width, fs=rate)).float()


@dataclass(frozen=True)
class Rates:
    """What a synthesis layer's output can hold (figure 4c of the paper)."""

    cutoff: float  # of its low-pass filter, cycles per image
    half_width: float  # of that filter's transition band
    rate: int  # sampling rate, pixels per image


def make_rates(size: int, n_layers: int = 14) -> list[Rates]:
    """Return the rates of ``n_layers`` synthesis layers and of ToRGB: the paper's section 3.2.

    Cut-off and stop frequency grow geometrically; the last two layers are critically sampled.
    """
    rates = []
    for i in range(n_layers + 1):
        share = min(i / (n_layers - 2), 1)
        cutoff = 2.0 * (size / 2 / 2.0) ** share
        stop = 2**2.1 * (size / 2 * 2**0.3 / 2**2.1) ** share
        rate = 2 ** math.ceil(math.log2(min(2 * stop, size)))
        rates.append(Rates(cutoff, max(stop, rate / 2) - cutoff, rate))
    return rates


def _along(kernel: torch.Tensor, channels: int, axis: int) -> torch.Tensor:
    shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
    return kernel.view(shape).expand(channels, -1, -1, -1)


def upsample(x: torch.Tensor, kernel: torch.Tensor, factor: int, size: int) -> torch.Tensor:
    """Insert zeros and filter, on both axes: ``(B, C, H, W)`` to ``(B, C, size, size)``.

    Outside the canvas the signal is zero; `size` cuts the result around its centre.
    """
    for axis in (2, 3):
        stride = (factor, 1) if axis == 2 else (1, factor)
        over = (x.shape[axis] - 1) * factor + len(kernel) - size
        padding = (over // 2, 0) if axis == 2 else (0, over // 2)
        x = F.conv_transpose2d(
            x, _along(kernel * factor, x.shape[1], axis), stride=stride, padding=padding,
            groups=x.shape[1],
        )  # fmt: skip
    return x


def downsample(x: torch.Tensor, kernel: torch.Tensor, factor: int) -> torch.Tensor:
    """Filter and keep every `factor`-th sample, on both axes, where the filter lies inside."""
    for axis in (2, 3):
        stride = (factor, 1) if axis == 2 else (1, factor)
        x = F.conv2d(x, _along(kernel, x.shape[1], axis), stride=stride, groups=x.shape[1])
    return x
