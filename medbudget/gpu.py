"""GPU: compile the U-Net, record a training step as a CUDA graph, go on where memory ends."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from medbudget.base import Base
from medbudget.progress import say, tqdm

LONG = 300  # steps or images from which compiling pays: it takes about a minute
OutOfMemory = torch.cuda.OutOfMemoryError


def speed_up(base: Base) -> Base:
    """Return the same base with a compiled U-Net, equal up to rounding.

    The weights are laid out channels-last, in place. On a GPU, `invert` replays its step as a CUDA
    graph.
    """
    if base.fast:
        return base
    base.unet.to(memory_format=torch.channels_last)
    if any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")):
        return replace(base, unet=torch.compile(base.unet), fast=True)
    warnings.warn(
        "no C++ compiler was found: the U-Net is not compiled, only laid out channels-last; "
        "install g++ or set CXX",
        stacklevel=3,
    )
    return replace(base, fast=True)


def choose_speed(base: Base, fast: bool | None, work: int) -> Base:
    """Return the base, compiled if `fast`; with None, on a GPU for `LONG` steps or images (`work`)."""
    if fast is None and base.device.type == "cuda" and work >= LONG and not base.fast:
        say(
            f"the U-Net is compiled first, since {work} steps or images are to come: about a "
            "minute; --no-fast (Python: fast=False) refuses it"
        )
        fast = True
    return speed_up(base) if fast else base


class Stepper:
    """Calls ``compute(*tensors)``, a training step; on a GPU with a fast base as a CUDA graph.

    Where the GPU's memory ends, the U-Net's activations are recomputed in the backward pass
    (gradient checkpointing: about a third slower, equal up to rounding), until the block ends.
    """

    def __init__(self, base: Base, compute: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        self.base, self.compute = base, compute
        self.recorded: Callable[..., tuple[torch.Tensor, ...]] | None = None
        self.before = bool(base.unet.is_gradient_checkpointing)

    def __enter__(self) -> Stepper:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.base.unet.is_gradient_checkpointing and not self.before:
            self.base.unet.disable_gradient_checkpointing()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        try:
            if self.recorded is None:
                graph = self.base.fast and self.base.device.type == "cuda"
                self.recorded = record(self.compute, inputs) if graph else self.compute
            return self.recorded(*inputs)
        except OutOfMemory:
            if self.base.unet.is_gradient_checkpointing:
                raise OutOfMemory(
                    "out of GPU memory in spite of checkpointing: close other programs, or take a "
                    f"smaller batch_size than {len(inputs[0])}, or smaller images"
                ) from None
        # only here has the exception let go of the tensors
        self.recorded = None
        self.base.unet.enable_gradient_checkpointing()
        torch.cuda.empty_cache()
        warnings.warn(
            "out of GPU memory: checkpointing is on from here (slower, equal up to rounding)",
            stacklevel=3,
        )
        return self(*inputs)


def record(
    compute: Callable[..., tuple[torch.Tensor, ...]], inputs: tuple[torch.Tensor, ...]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Record ``compute(*inputs)`` as a CUDA graph, and return what replays it on other tensors."""
    held = [tensor.clone() for tensor in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and fills every cache
            compute(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute(*held)

    def replay(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for target, value in zip(held, values):
            target.copy_(value)
        graph.replay()
        return out

    return replay


def draw_in_batches(
    draw: Callable[[int, int], torch.Tensor], n: int, batch_size: int, *, desc: str
) -> torch.Tensor:
    """Return what ``draw(first, count)`` makes of 0 to `n`; a batch that does not fit is halved."""
    images: list[torch.Tensor] = []
    first = 0
    with tqdm(total=n, desc=desc, unit="image") as bar:
        while first < n:
            count = min(batch_size, n - first)
            try:
                images.append(draw(first, count))
                first += count
                bar.update(count)
                continue
            except OutOfMemory as error:
                if count == 1:
                    raise OutOfMemory(
                        "not even one image at a time fits the GPU's memory: close other programs, "
                        f"choose a smaller size, or device='cpu' ({str(error).splitlines()[0]})"
                    ) from None
            # only here has the exception let go of the tensors
            batch_size = count // 2
            torch.cuda.empty_cache()
            warnings.warn(
                f"a batch of {count} images does not fit the GPU's memory: going on with "
                f"{batch_size} (the same images up to 1 gray level)",
                stacklevel=3,
            )
    return torch.cat(images)
