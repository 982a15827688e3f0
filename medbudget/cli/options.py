"""Options that several commands share."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

Text = Annotated[str, Parameter(metavar="TEXT")]
Paths = Annotated[list[Path] | None, Parameter(consume_multiple=False)]
File = Annotated[Path, Parameter(help="an embedding: .safetensors, .pt or .bin")]
Words = Annotated[list[str] | None, Parameter(consume_multiple=False, metavar="TEXT...")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where to compute.

    Args:
        device: cpu or cuda; default: cuda if there is one
        threads: of the processor; default: one for each core
    """

    device: Text | None = None
    threads: int | None = None

    def prepare(self) -> str | None:
        """Set the number of threads, check the device and return it."""
        import torch

        from medbudget.results import count_cores

        if self.device is not None and self.device.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise ValueError(f"--device {self.device}: allowed are cpu, cuda, cuda:1 …, mps")
        if self.threads is not None:
            if self.threads < 1:
                raise ValueError(f"--threads must be at least 1, got {self.threads}")
            torch.set_num_threads(self.threads)
        elif hasattr(os, "getloadavg") and "OMP_NUM_THREADS" not in os.environ:
            load, cores = os.getloadavg()[0], count_cores()
            if load > 0.75 * cores > 0.75:
                print(
                    f"note: other programs keep this machine busy (load {load:.1f} on {cores} "
                    "cores): --threads 1 is often several times faster then",
                    file=sys.stderr,
                )
        return self.device


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BaseOptions(Machine):
    """Which base, and where to compute.

    Args:
        base: tiny, sd20, sd15 … (medbudget base list), owner/name of the hub, a folder or a file
        fast: compile the U-Net first, a minute; default: on a GPU for 300 steps or images and more
    """

    base: Text = "tiny"
    fast: Annotated[bool | None, Parameter(negative="--no-fast")] = None

    def load(self) -> Any:
        """Load the base."""
        from medbudget import load_base

        return load_base(self.base, device=self.prepare(), fast=bool(self.fast))
