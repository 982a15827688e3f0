"""How much memory a job takes: counted on networks without data, before anything is allocated.

PyTorch's "meta" tensors have shapes and no bytes. A step is run on them and every storage that
lives at the same time is counted; fused attention counts as its inputs and output.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from medbudget.loading import build_networks, read_architectures

GIB = 2**30
# CUDA context, scratch space of convolutions, blocks that the allocator cannot fill: an assumption.
# Beyond weights and activations, PyTorch's peak on an H200 had 0.1 to 0.4 GiB, without the context
# (benchmarks/results/gpu.json); a CPU took 0.9 (training) to 1.3 GiB (drawing) (full_size.json).
OVERHEAD = int(1.3 * GIB)
JOBS = ("invert", "sample")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on a GPU: weights, activations at the peak, and what CUDA itself takes (assumed)."""

    weights: int
    activations: int
    overhead: int = OVERHEAD

    @property
    def total(self) -> float:
        """All of it, GiB."""
        return (self.weights + self.activations + self.overhead) / GIB


class PeakMemory(TorchDispatchMode):
    """Count the bytes of all storages made inside the block that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            x.untyped_storage()._cdata
            for x in tree_iter((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.live and key not in given:  # a view of weights takes nothing
                    self.live.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key, size)
        return out

    def _free(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return _FusedAttention.apply(q, k, v)


def _without_data(networks: tuple[Any, Any, Any], dtype: torch.dtype) -> list[Any]:
    """Return networks of the same configurations on the meta device."""
    vae, unet, text = networks
    with torch.device("meta"):
        copies = [
            type(vae).from_config(vae.config),
            type(unet).from_config(unet.config),
            type(text)(text.config),
        ]
    for copy in copies:
        nn.Module.to(copy, dtype=dtype)
        copy.eval().requires_grad_(False)
    return copies


@cache
def _sd2() -> tuple[Any, Any, Any]:
    with torch.device("meta"):
        return build_networks(read_architectures()["sd2"], "meta")


@contextmanager
def _counting() -> Iterator[PeakMemory]:
    # Meta tensors would take the plain attention, with its matrix of all pairs.
    with (
        patch.object(F, "scaled_dot_product_attention", _fused),
        torch.device("meta"),
        PeakMemory() as counter,
    ):
        yield counter


def plan_memory(
    job: str,
    *,
    networks: tuple[Any, Any, Any] | None = None,
    size: int = 512,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float16,
    checkpointing: bool = False,
) -> MemoryPlan:
    """Return what a job takes on a GPU, counted in a second or two without one.

    Parameters
    ----------
    job : {"invert", "sample"}
        A training step (the VAE is off the GPU by then), or a sampling step of prompt and
        unconditional text in one batch, then decoding image by image.
    networks : tuple, optional
        VAE, U-Net and text encoder of a base; default Stable Diffusion 2.0's.
    size : int
        Pixels an edge.
    checkpointing : bool
        Training only: recompute the U-Net's activations instead of keeping them.
    """
    if job not in JOBS:
        raise ValueError(f"unknown job {job!r}; allowed are {', '.join(JOBS)}")
    vae, unet, text = _without_data(networks or _sd2(), dtype)
    cells = size // 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (vae.config.latent_channels, cells, cells)
    ids = torch.zeros(1, 77, dtype=torch.long, device="meta")
    width = text.config.hidden_size
    if job == "invert":
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with _counting() as counter:
            vectors = torch.randn(1, 77, width, requires_grad=True)
            hook = text.get_input_embeddings().register_forward_hook(
                lambda module, inputs, rows: rows + vectors.to(rows.dtype)
            )
            context = text(ids).last_hidden_state.expand(batch_size, -1, -1)
            hook.remove()
            x = torch.randn(batch_size, *shape, dtype=dtype)
            t = torch.zeros(batch_size)
            loss = F.mse_loss(unet(x, t, encoder_hidden_states=context).sample.float(), x.float())
            torch.autograd.grad(loss, vectors)
        weights = _count_bytes(unet) + _count_bytes(text)
        return MemoryPlan(weights, counter.peak)
    with torch.no_grad(), _counting() as counter:
        n = 2 * batch_size
        context = torch.randn(n, 77, width, dtype=dtype)
        unet(torch.randn(n, *shape, dtype=dtype), torch.zeros(n), encoder_hidden_states=context)
    peak = counter.peak
    with torch.no_grad(), _counting() as counter:
        vae.decode(torch.randn(1, *shape, dtype=dtype))
    weights = sum(map(_count_bytes, (vae, unet, text)))
    return MemoryPlan(weights, max(peak, counter.peak))


def _count_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def largest_batch(job: str, free: float, **options: Any) -> int:
    """Return the largest batch of a job that fits `free` GiB, weights included; 0 if none does.

    `options` are those of `plan_memory`; the activations grow linearly with the batch, once the
    U-Net takes more than decoding one image.
    """
    if free < plan_memory(job, batch_size=1, **options).total:
        return 0
    some, more = (plan_memory(job, batch_size=n, **options).total for n in (8, 16))
    fits = 8 + (free - some) / (more - some) * 8  # below 8, decoding may take the most
    return max(1, int(fits))


__all__ = ["MemoryPlan", "PeakMemory", "largest_batch", "plan_memory"]
