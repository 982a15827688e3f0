"""GPU: record a training step as a CUDA graph, and go on where memory ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from medbudget.progress import tqdm

OutOfMemory = torch.cuda.OutOfMemoryError


class Stepper:
    """Calls ``compute(*tensors)``, a training step, as a CUDA graph if `graph`.

    Where the GPU's memory ends, the U-Net's activations are recomputed in the backward pass
    (gradient checkpointing: about a third slower, equal up to rounding), until the block ends.
    """

    def __init__(
        self, unet: Any, compute: Callable[..., tuple[torch.Tensor, ...]], *, graph: bool
    ) -> None:
        self.unet, self.compute, self.graph = unet, compute, graph
        self.recorded: Callable[..., tuple[torch.Tensor, ...]] | None = None
        self.before = bool(unet.is_gradient_checkpointing)

    def __enter__(self) -> Stepper:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.unet.is_gradient_checkpointing and not self.before:
            self.unet.disable_gradient_checkpointing()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        try:
            if self.recorded is None:
                self.recorded = record(self.compute, inputs) if self.graph else self.compute
            return self.recorded(*inputs)
        except OutOfMemory:
            if self.unet.is_gradient_checkpointing:
                raise OutOfMemory(
                    "out of GPU memory in spite of checkpointing: close other programs, or take a "
                    f"smaller batch_size than {len(inputs[0])}, or smaller images"
                ) from None
        # only here has the exception let go of the tensors
        self.recorded = None
        self.unet.enable_gradient_checkpointing()
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
