"""Both networks of a StyleGAN3 with their record: sample, save, load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import nn

from medbudget.files import check_writable, hash_tensors, write_tensors
from medbudget.progress import tqdm
from medbudget.settings import check_seed
from medbudget.stylegan3.networks import Architecture, Discriminator, Generator

WEIGHTS = Path(__file__).parent / "weights"
PRETRAINED = "corpus64"  # networks that ship, pretrained on the corpus of the tiny base
TINY = Architecture(
    size=64, channel_base=1024, channel_max=64, width=128, n_layers=6, mbstd_group=4
)


@dataclass(frozen=True, eq=False)
class StyleGAN3:
    """Both networks and where they come from; the generator is the running mean of its weights."""

    generator: Generator
    discriminator: Discriminator
    record: dict[str, Any]

    @property
    def hash(self) -> str:
        """Name of the generator's weights: 12 hex digits."""
        return hash_tensors(self.generator.state_dict())

    @torch.inference_mode()
    def sample(
        self, n: int, *, seed: int = 0, truncation: float = 1.0, batch_size: int | None = None
    ) -> torch.Tensor:
        """Generate ``(n, 3, size, size) uint8``; image i comes from seed + i, as in `sample`.

        The default `batch_size` is 32 at 64 px and less above: 1 at 512 px, which takes 1.4 GiB.
        """
        check_seed(seed, n)
        device, a = self.generator.input.phases.device, self.generator.architecture
        batch_size = batch_size or images_at_once(a.size)
        self.generator.eval()
        images = []
        with tqdm(total=n, desc="stylegan3", unit="image") as bar:
            for first in range(0, n, batch_size):
                seeds = range(seed + first, seed + min(first + batch_size, n))
                z = draw_latents(seeds, a.width).to(device)
                x = self.generator(z, truncation=truncation) * 127.5 + 127.5
                images.append(x.round().clamp(0, 255).to(torch.uint8).cpu())
                bar.update(len(z))
        return torch.cat(images)

    def save(self, path: str | os.PathLike[str], *, snapshots: torch.Tensor | None = None) -> None:
        """Write both networks as safetensors of float16.

        `snapshots` ``(N, 3, H, W) uint8`` are images to keep in the same file.
        """
        path = check_writable(path)
        tensors = {
            f"{name}.{key}": t.half() if t.ndim else t
            for name in ("generator", "discriminator")
            for key, t in getattr(self, name).state_dict().items()
        }
        if snapshots is not None:
            tensors["snapshots"] = snapshots
        about = {"architecture": asdict(self.generator.architecture),
                 "discriminator": asdict(self.discriminator.architecture),
                 "record": self.record}  # fmt: skip
        write_tensors(path, tensors, {"medbudget_stylegan3": json.dumps(about)})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str] = PRETRAINED, *, device: str | torch.device = "cpu"
    ) -> StyleGAN3:
        """Read what `save` wrote: a file, or networks that ship, by name.

        ``corpus64`` was pretrained on the corpus of the tiny base, ``prostate_healthy64``
        fine-tuned from it on 100 phantoms.
        """
        if (shipped := WEIGHTS / f"{path}.safetensors").is_file():
            path = shipped
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["medbudget_stylegan3"])
                names = [key for key in file.keys() if key != "snapshots"]  # noqa: SIM118
                tensors = {key: file.get_tensor(key).float() for key in names}
            record = about["record"]
            networks = []
            for kind, head, sizes in (
                (Generator, "generator.", about["architecture"]),
                (Discriminator, "discriminator.", about["discriminator"]),
            ):
                own = {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}
                network: Any = build_like(kind, Architecture(**sizes), own)
                network.load_state_dict(own)
                networks.append(network.to(device).eval())
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"{path} holds no StyleGAN3 of medbudget ({type(error).__name__}); give a file "
                "that StyleGAN3.save wrote, or read an official one with import_official"
            ) from None
        return cls(networks[0], networks[1], record)


Network = TypeVar("Network", bound=nn.Module)


def build_like(
    kind: Callable[[Architecture], Network],
    architecture: Architecture,
    tensors: Mapping[str, torch.Tensor],
) -> Network:
    """Build a network that has the shapes of tensors from a file; tried without memory first.

    Other shapes are refused: a file must not decide how much is allocated.
    """
    with torch.device("meta"):
        wanted = kind(architecture).state_dict()
    for name, value in tensors.items():
        if name in wanted and wanted[name].shape != value.shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)}, configuration T of this size has "
                f"{tuple(wanted[name].shape)}"
            )
    if missing := sorted(set(wanted) - set(tensors)):
        raise ValueError(f"lacks {missing[0]} ({len(missing)} tensors in all)")
    return kind(architecture)


def make_stylegan3(
    generator: Architecture, discriminator: Architecture | None = None, *, seed: int = 0
) -> StyleGAN3:
    """Return networks with random weights; the same seed gives the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(check_seed(seed))
        g, d = Generator(generator), Discriminator(discriminator or generator)
    return StyleGAN3(g.eval(), d.eval(), {"seed": seed, "images_seen": 0})


def images_at_once(size: int) -> int:
    """Return how many images go through a network at once, so that a GPU of 8 GB holds them."""
    return max(1, 32 * 64**3 // size**3)


def draw_latents(seeds: Any, width: int) -> torch.Tensor:
    """Return z, ``(len(seeds), width)``, each row from a seed of its own."""
    return torch.stack(
        [torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Map ``uint8`` to floats of -1 to 1."""
    return images.float() / 127.5 - 1
