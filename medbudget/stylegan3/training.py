"""Training of StyleGAN3: non-saturating loss, lazy R1, running mean of weights, adaptive
augmentation."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as save_safetensors
from torch import nn

from medbudget._version import __version__
from medbudget.artifacts import load_checkpoint, save_checkpoint
from medbudget.files import check_writable, hash_tensors, hold, write_bytes
from medbudget.images import check_images
from medbudget.metrics.evaluation import frechet_score
from medbudget.metrics.features import Extractor, features, load_extractor
from medbudget.processes import stoppable
from medbudget.progress import tqdm
from medbudget.stylegan3.augment import adapt, augment
from medbudget.stylegan3.networks import Architecture, Discriminator, Generator

WEIGHTS = Path(__file__).parent / "weights"
PRETRAINED = "corpus64"  # networks that ship, made by medbudget.stylegan3.pretrain


class GanError(RuntimeError):
    """Training that cannot go on; the message explains."""


@dataclass(frozen=True)
class StyleGAN3Settings:
    """Settings of `train_stylegan3`; make one with `StyleGAN3Settings.preset`.

    Attributes
    ----------
    kimg : float
        Thousands of real images that the discriminator sees.
    batch_size : int
    lr_generator, lr_discriminator : float
        Of Adam with betas 0 and 0.99.
    gamma : float
        Weight of R1, the squared gradient of the discriminator at real images, halved.
    r1_every : int
        Iterations between penalties, each as much heavier (lazy regularisation of StyleGAN2).
    ema_kimg : float
        Half-life of the running mean of the generator's weights, thousands of images.
    ema_rampup : float
        If above 0, the half-life is at most this share of the images seen; for random starts.
    magnitude_kimg : float
        Half-life of the generator's running mean squares.
    mirror : bool
        Add every image's mirror image to the data.
    ada_target : float
        Wanted overfitting r_t; 0 switches augmentation off.
    ada_kimg, ada_every : float, int
        Thousands of images in which its probability can go from 0 to 1, and iterations between
        changes.
    mbstd_group : int
        Images in a group of the discriminator's standard deviation.
    snapshot_kimg : float
        Thousands of images between snapshots and checkpoints.
    """

    kimg: float = 100.0
    batch_size: int = 4
    lr_generator: float = 0.0025
    lr_discriminator: float = 0.002
    gamma: float = 8.0
    r1_every: int = 16
    ema_kimg: float = 1.25
    ema_rampup: float = 0.0
    magnitude_kimg: float = 20.0
    mirror: bool = True
    ada_target: float = 0.6
    ada_kimg: float = 100.0
    ada_every: int = 4
    mbstd_group: int = 1
    snapshot_kimg: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("kimg", "batch_size", "lr_generator", "lr_discriminator", "r1_every",
                     "ema_kimg", "magnitude_kimg", "ada_kimg", "ada_every", "mbstd_group",
                     "snapshot_kimg"):  # fmt: skip
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 <= self.ada_target < 1:
            raise ValueError(f"ada_target must be 0 (off) to below 1, got {self.ada_target}")
        if self.gamma < 0:
            raise ValueError(f"gamma must be 0 or more, got {self.gamma}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> StyleGAN3Settings:
        """Return the settings called ``tiny`` or ``paper``; overrides that are None are ignored."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; allowed are {', '.join(PRESETS)}")
        known = {f.name for f in fields(cls)}
        if unknown := set(overrides) - known:
            raise TypeError(f"unknown settings {sorted(unknown)}; known are {sorted(known)}")
        return replace(PRESETS[name], **{k: v for k, v in overrides.items() if v is not None})


PRESETS = {
    "tiny": StyleGAN3Settings(
        kimg=24, batch_size=8, gamma=0.2, ada_kimg=25, mbstd_group=4, magnitude_kimg=5,
        snapshot_kimg=2,
    ),
    "paper": StyleGAN3Settings(),
}  # fmt: skip
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
        self, n: int, *, seed: int = 0, truncation: float = 1.0, batch_size: int = 32
    ) -> torch.Tensor:
        """Generate ``(n, 3, size, size) uint8``; image i comes from seed + i, as in `sample`."""
        device = self.generator.input.phases.device
        self.generator.eval()
        made = []
        with tqdm(total=n, desc="stylegan3", unit="image") as bar:
            for first in range(0, n, batch_size):
                seeds = range(seed + first, seed + min(first + batch_size, n))
                z = draw_latents(seeds, self.generator.architecture.width).to(device)
                made.append(to_uint8(self.generator(z, truncation=truncation)).cpu())
                bar.update(len(z))
        return torch.cat(made)

    def save(
        self, path: str | os.PathLike[str], *, half: bool = True,
        snapshots: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write both networks as safetensors, in float16 unless `half` is False.

        `snapshots` ``(N, 3, H, W) uint8`` are images to keep in the same file.
        """
        path = check_writable(path)
        tensors = {
            f"{name}.{key}": (t.half() if half and t.ndim else t).cpu().contiguous()
            for name in ("generator", "discriminator")
            for key, t in getattr(self, name).state_dict().items()
        }
        if snapshots is not None:
            tensors["snapshots"] = snapshots
        about = {"architecture": asdict(self.generator.architecture),
                 "discriminator": asdict(self.discriminator.architecture),
                 "record": self.record}  # fmt: skip
        meta = {"medbudget_stylegan3": json.dumps(about)}
        write_bytes(path, save_safetensors(tensors, metadata=meta))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str] = PRETRAINED, *, device: str | torch.device = "cpu"
    ) -> StyleGAN3:
        """Read what `save` wrote.

        Parameters
        ----------
        path : path
            A file, or the name of networks that ship: ``corpus64``, pretrained on the corpus of
            the tiny base, or ``prostate_healthy64``, fine-tuned from it on 100 phantoms.

        Raises
        ------
        ValueError
            A file that is not of this kind.
        """
        if (shipped := WEIGHTS / f"{path}.safetensors").is_file():
            path = shipped
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["medbudget_stylegan3"])
                names = [key for key in file.keys() if key != "snapshots"]  # noqa: SIM118
                tensors = {key: file.get_tensor(key).float() for key in names}
            record = about["record"]
            parts = {
                name: {
                    key.removeprefix(f"{name}."): value
                    for key, value in tensors.items()
                    if key.startswith(name)
                }
                for name in ("generator", "discriminator")
            }
            sizes = Architecture(**about["architecture"])
            generator = build_like(Generator, sizes, parts["generator"])
            generator.load_state_dict(parts["generator"])
            sizes = Architecture(**about["discriminator"])
            discriminator = build_like(Discriminator, sizes, parts["discriminator"])
            discriminator.load_state_dict(parts["discriminator"])
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"{path} holds no StyleGAN3 of medbudget ({type(error).__name__}); give a file "
                "that StyleGAN3.save wrote, or read an official one with import_official"
            ) from None
        return cls(generator.to(device).eval(), discriminator.to(device).eval(), record)


Network = TypeVar("Network", bound=nn.Module)


def build_like(
    kind: Callable[[Architecture], Network],
    architecture: Architecture,
    found: Mapping[str, torch.Tensor],
) -> Network:
    """Build a network that has the shapes found in a file; tried without memory first.

    Raises
    ------
    ValueError
        Other shapes, named: a file must not decide how much is allocated.
    """
    with torch.device("meta"):
        wanted = kind(architecture).state_dict()
    for name, value in found.items():
        if name in wanted and wanted[name].shape != value.shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)}, configuration T of this size has "
                f"{tuple(wanted[name].shape)}"
            )
    if missing := sorted(set(wanted) - set(found)):
        raise ValueError(f"lacks {missing[0]} ({len(missing)} tensors in all)")
    return kind(architecture)


def make_stylegan3(
    generator: Architecture, discriminator: Architecture | None = None, *, seed: int = 0
) -> StyleGAN3:
    """Return networks with random weights; the same seed gives the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        g, d = Generator(generator), Discriminator(discriminator or generator)
    return StyleGAN3(g.eval(), d.eval(), {"seed": seed, "images_seen": 0})


def draw_latents(seeds: Any, width: int) -> torch.Tensor:
    """Return z, ``(len(seeds), width)``, each row from a seed of its own."""
    return torch.stack(
        [torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map floats of -1 to 1 to ``uint8``."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Map ``uint8`` to floats of -1 to 1."""
    return images.float() / 127.5 - 1


# ----------------------------------------------------------------------------------- losses


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
    generator: nn.Module, discriminator: nn.Module, settings: StyleGAN3Settings
) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    """Return Adam for both; the discriminator's is slowed for its extra, lazy steps."""
    lazy = settings.r1_every / (settings.r1_every + 1)
    return (
        torch.optim.Adam(generator.parameters(), lr=settings.lr_generator, betas=(0.0, 0.99)),
        torch.optim.Adam(
            discriminator.parameters(),
            lr=settings.lr_discriminator * lazy,
            betas=(0.0, 0.99**lazy),
        ),
    )


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, keep: float) -> None:
    """Move running means towards the weights by ``1 - keep``; buffers are copied."""
    for a, b in zip(average.parameters(), network.parameters()):
        a.lerp_(b, 1 - keep)
    for mine, theirs in zip(average.buffers(), network.buffers()):
        mine.copy_(theirs)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


# --------------------------------------------------------------------------------- training


class Trainer:
    """The state of a training run, and one iteration of it."""

    def __init__(
        self, images: torch.Tensor, start: StyleGAN3, settings: StyleGAN3Settings, device: Any
    ) -> None:
        self.images, self.settings, self.device = images, settings, torch.device(device)
        self.average = copy.deepcopy(start.generator).to(device).eval().requires_grad_(False)
        self.generator = copy.deepcopy(start.generator).to(device).train()
        self.discriminator = copy.deepcopy(start.discriminator).to(device).train()
        a = replace(self.discriminator.architecture, mbstd_group=settings.mbstd_group)
        self.discriminator.architecture = a
        for part in self.generator.modules():
            if hasattr(part, "magnitude_images"):
                part.magnitude_images = settings.magnitude_kimg * 1000  # type: ignore[assignment]
        self.optimizers = make_optimizers(self.generator, self.discriminator, settings)
        self.step, self.p, self.signs, self.seconds = 0, 0.0, torch.zeros((), device=device), 0.0
        self.history: list[dict[str, Any]] = []
        self.recent: dict[str, list[torch.Tensor]] = {}  # losses since the last snapshot

    @property
    def seen(self) -> int:
        """Real images that the discriminator has seen."""
        return self.step * self.settings.batch_size

    def _real(self, generator: torch.Generator) -> torch.Tensor:
        """The batch of this step, a function of seed and step: every epoch in a new order."""
        s, n = self.settings, len(self.images)
        order: list[int] = []
        while len(order) < s.batch_size:
            epoch, start = divmod(self.seen + len(order), n)
            shuffle = torch.Generator().manual_seed(s.seed * 1_000_003 + epoch)
            order += torch.randperm(n, generator=shuffle)[start:].tolist()
        real = to_float(self.images[order[: s.batch_size]])
        if s.mirror:
            flip = torch.rand(len(real), generator=generator) < 0.5
            real = torch.where(flip[:, None, None, None], real.flip(3), real)
        return real.to(self.device)

    def iterate(self) -> dict[str, torch.Tensor]:
        """Train both networks on one batch; return their losses."""
        s = self.settings
        draw = torch.Generator().manual_seed((s.seed + 1) * 15_485_863 + self.step)
        width = self.generator.architecture.width
        z = torch.randn((2, s.batch_size, width), generator=draw).to(self.device)

        self.generator.train()
        with _frozen(self.discriminator):
            fake = augment(self.generator(z[0]), self.p, draw)
            loss_g = generator_loss(self.discriminator(fake))
            self._descend(0, loss_g)

        self.generator.eval()  # its running means have seen this iteration
        with torch.no_grad():
            fake = augment(self.generator(z[1]), self.p, draw)
        real = augment(self._real(draw), self.p, draw)
        real_logits = self.discriminator(real)
        loss_d = discriminator_loss(real_logits, self.discriminator(fake))
        self._descend(1, loss_d)
        self.signs += real_logits.detach().sign().mean()
        losses = {"generator": loss_g.detach(), "discriminator": loss_d.detach()}
        if s.gamma and self.step % s.r1_every == 0:
            penalty = r1_penalty(self.discriminator, real, s.gamma)
            self._descend(1, penalty * s.r1_every)
            losses["r1"] = penalty.detach()

        self.step += 1
        half_life = s.ema_kimg * 1000
        if s.ema_rampup:
            half_life = min(half_life, s.ema_rampup * self.seen)
        update_ema(self.average, self.generator, 0.5 ** (s.batch_size / half_life))
        if s.ada_target and self.step % s.ada_every == 0:
            self.p = adapt(
                self.p, float(self.signs) / s.ada_every, s.ada_every * s.batch_size,
                target=s.ada_target, images_to_one=s.ada_kimg * 1000,
            )  # fmt: skip
            self.signs.zero_()
        return losses

    def _descend(self, which: int, loss: torch.Tensor) -> None:
        optimizer = self.optimizers[which]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint needs."""
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "p": self.p,
            "signs": self.signs,
            "seconds": self.seconds,
            "history": self.history,
            "recent": self.recent,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        for name in ("generator", "discriminator", "average"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step, self.p, self.seconds = state["step"], state["p"], state["seconds"]
        self.signs.copy_(state["signs"])
        self.history, self.recent = list(state["history"]), dict(state["recent"])


def train_stylegan3(
    images: torch.Tensor,
    settings: StyleGAN3Settings | None = None,
    *,
    start: StyleGAN3 | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    extractor: str | Extractor | None = None,
    n_evaluate: int = 100,
    device: str | torch.device = "cpu",
    data: str = "",
) -> StyleGAN3:
    """Train, or fine-tune, StyleGAN3 on images.

    Parameters
    ----------
    images : torch.Tensor
        ``(N, 3, size, size) uint8``, of the networks' size.
    settings : StyleGAN3Settings, optional
        Default: preset ``tiny``.
    start : StyleGAN3, optional
        Networks to go on from; default: those that ship, pretrained on the tiny base's corpus.
        `make_stylegan3` gives random ones.
    checkpoint : path, optional
        Saved there at every snapshot, and at Ctrl-C or SIGTERM after the iteration. If it exists,
        the run goes on from it and ends with the same weights as an undisturbed one. The one before
        is kept beside it, for the case that it is damaged.
    callback : callable, optional
        Called after every iteration, before that is saved, with ``{"step", "images_seen",
        "losses", "p", "seconds", "snapshot"}``; the last is a `StyleGAN3` at every snapshot, else None.
    extractor : str, optional
        Measure the Frechet distance of `n_evaluate` generated images to `images` at every
        snapshot, in these features.
    data : str
        A note on the images, kept in the record.

    Returns
    -------
    StyleGAN3
        With a record of settings, images seen, seconds (on a CPU: of its cores) and history.

    Raises
    ------
    GanError
        A loss that is not finite.
    ValueError
        Images or checkpoint that do not fit.
    InUseError
        Another process writes the same checkpoint.
    """
    check_images(images)
    settings = settings or PRESETS["tiny"]
    start = start or StyleGAN3.load()
    size = start.generator.architecture.size
    if tuple(images.shape[2:]) != (size, size):
        raise ValueError(
            f"images must be {size}x{size} for these networks, got {tuple(images.shape[2:])} "
            f"(H, W); load them with size={size}"
        )
    if checkpoint is not None:
        checkpoint = check_writable(checkpoint)
    identity = {
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("kimg",)},
        "images": hash_tensors({"images": images}),
        "start": start.hash,
    }
    trainer = Trainer(images, start, settings, device)
    record = {
        "settings": asdict(settings),
        "start": {k: start.record[k] for k in ("data", "images_seen", "seed") if k in start.record},
        "images": len(images),
        "images_hash": identity["images"],
        "data": data or f"{len(images)} images of {size} px",
        "medbudget": __version__,
        "device": trainer.device.type,
    }

    def made() -> StyleGAN3:
        about = record | {
            "images_seen": trainer.seen,
            "seconds": round(trainer.seconds, 1),
            "history": list(trainer.history),
        }
        networks = (copy.deepcopy(trainer.average), copy.deepcopy(trainer.discriminator).eval())
        return StyleGAN3(*networks, about)

    def check() -> dict[str, float]:
        """Return the mean losses since the last snapshot, which must be finite."""
        means = {k: round(float(torch.stack(v).mean()), 4) for k, v in trainer.recent.items()}
        if not all(math.isfinite(v) for v in means.values()):
            raise GanError(
                f"a loss is no longer finite after {trainer.seen} images: {means}; lower "
                "the learning rates or raise gamma. The last checkpoint is untouched"
            )
        return means

    # A CPU's time is that of its cores, so that other programs do not count.
    clock = time.process_time if trainer.device.type == "cpu" else time.monotonic
    steps = math.ceil(settings.kimg * 1000 / settings.batch_size)
    every = max(1, round(settings.snapshot_kimg * 1000 / settings.batch_size))
    with stoppable() as stopped, hold(checkpoint):
        if checkpoint is not None:
            stored = load_checkpoint(checkpoint, identity, device=trainer.device)
            if stored is not None:
                trainer.restore(stored)
        bar = tqdm(total=steps, initial=trainer.step, desc="stylegan3", unit="step")
        try:
            while trainer.step < steps and not stopped():
                began = clock()
                losses = trainer.iterate()
                trainer.seconds += clock() - began
                for name, value in losses.items():
                    trainer.recent.setdefault(name, []).append(value)
                bar.update()
                snapshot = None
                if trainer.step % every == 0 or trainer.step == steps:
                    means = check()
                    trainer.recent.clear()
                    line: dict[str, Any] = {"images": trainer.seen, "seconds": round(trainer.seconds, 1),
                            "p": round(trainer.p, 4), **means}  # fmt: skip
                    trainer.history.append(line)
                    snapshot = made()
                    if extractor is not None:
                        line["fd"] = measure_distance(
                            images, snapshot.sample(n_evaluate), extractor
                        )
                    bar.set_postfix(**{k: v for k, v in line.items() if k not in ("images", "fd")})
                if callback is not None:
                    callback(
                        {
                            "step": trainer.step,
                            "images_seen": trainer.seen,
                            "losses": losses,
                            "p": trainer.p,
                            "seconds": trainer.seconds,
                            "snapshot": snapshot,
                        }
                    )
                if checkpoint is not None and (snapshot is not None or stopped()):
                    check()
                    save_checkpoint(checkpoint, {"identity": identity, **trainer.state()})
        finally:
            bar.close()
    if trainer.step < steps:
        raise KeyboardInterrupt  # if the signal's own handler has not
    return made()


def measure_distance(
    images: torch.Tensor, generated: torch.Tensor, extractor: str | Extractor
) -> dict[str, float | str | list[float]]:
    """Return the Frechet distance of generated images to `images`, as a run's history has it."""
    if isinstance(extractor, str):
        extractor = load_extractor(extractor)
    score = frechet_score(features(images, extractor), features(generated, extractor), extractor)
    return {
        "value": score.value,
        "interval": list(score.interval or ()),
        "extractor": extractor.name,
    }
