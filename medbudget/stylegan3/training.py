"""Training of StyleGAN3: non-saturating loss, lazy R1, mean of weights, adaptive augmentation."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch

from medbudget._version import __version__
from medbudget.files import hash_tensors
from medbudget.images import check_images
from medbudget.metrics.evaluation import frechet_score
from medbudget.metrics.extractors import Extractor, load_extractor
from medbudget.metrics.features import compute_features
from medbudget.runs import Steps, draw_indices
from medbudget.settings import SEEDS, Settings
from medbudget.stylegan3.augment import adapt, augment
from medbudget.stylegan3.losses import (
    discriminator_loss,
    frozen,
    generator_loss,
    make_optimizers,
    r1_penalty,
    update_ema,
)
from medbudget.stylegan3.model import StyleGAN3, images_at_once, to_float

NETWORKS = ("generator", "discriminator", "average")


class GanError(RuntimeError):
    """Training that cannot go on; the message explains."""


@dataclass(frozen=True)
class StyleGAN3Settings(Settings):
    """Settings of `train_stylegan3`; ``StyleGAN3Settings.preset("tiny")`` makes one."""

    kimg: float = 100.0  # thousands of real images that the discriminator sees
    batch_size: int = 4
    lr_generator: float = 0.0025  # of Adam with betas 0 and 0.99
    lr_discriminator: float = 0.002
    gamma: float = 8.0  # weight of R1, the discriminator's squared gradient at real images, halved
    r1_every: int = 16  # iterations between penalties, each as much heavier (StyleGAN2's lazy ones)
    ema_kimg: float = 1.25  # half-life of the mean of the generator's weights, thousands of images
    ema_rampup: float = 0.0  # if above 0: half-life at most this share of the images seen
    magnitude_kimg: float = 20.0  # half-life of the generator's mean squares, thousands of images
    mirror: bool = True  # add every image's mirror image to the data
    ada_target: float = 0.6  # wanted overfitting r_t; 0 switches augmentation off
    ada_kimg: float = 100.0  # thousands of images in which its probability can go from 0 to 1
    ada_every: int = 4  # iterations between its changes
    mbstd_group: int = 1  # images in a group of the discriminator's standard deviation
    snapshot_kimg: float = 4.0  # thousands of images between snapshots and checkpoints
    seed: int = 0

    LIMITS: ClassVar = {
        **dict.fromkeys(
            ("kimg", "lr_generator", "lr_discriminator", "ema_kimg", "magnitude_kimg", "ada_kimg",
             "snapshot_kimg"), (1e-9, None),
        ),
        **dict.fromkeys(("batch_size", "r1_every", "ada_every", "mbstd_group"), (1, None)),
        "gamma": (0, None), "ema_rampup": (0, None), "ada_target": (0, 0.999), "seed": SEEDS,
    }  # fmt: skip
    PRESETS: ClassVar = {
        "tiny": {
            "kimg": 24, "batch_size": 8, "gamma": 0.2, "ada_kimg": 25, "mbstd_group": 4,
            "magnitude_kimg": 5, "snapshot_kimg": 2,
        },
        "colab": {"kimg": 10},
        "paper": {},
    }  # fmt: skip


class Trainer:
    """The state of a training run, and one iteration of it.

    A large batch goes through the networks in parts whose gradients add up, and from 128 px on the
    generator's layers are computed again in its backward pass. So an iteration at 512 px and batch
    4 takes 3.7 GiB, where all at once took 45 (counted by `benchmarks/stylegan3.py --memory`).
    """

    def __init__(
        self, images: torch.Tensor, start: StyleGAN3, settings: StyleGAN3Settings, device: Any
    ) -> None:
        self.settings, self.images, self.device = settings, images, torch.device(device)
        s = settings
        self.average = copy.deepcopy(start.generator).to(device).eval().requires_grad_(False)
        self.generator = copy.deepcopy(start.generator).to(device).train()
        self.discriminator = copy.deepcopy(start.discriminator).to(device).train()
        a = replace(self.discriminator.architecture, mbstd_group=s.mbstd_group)
        self.discriminator.architecture = a
        together = max(images_at_once(a.size), s.mbstd_group)
        self.parts = torch.arange(s.batch_size).split(together)
        for layer in (*self.generator.layers, self.generator.to_rgb):
            layer.magnitude_images = s.magnitude_kimg * 1000
            layer.recompute = a.size > 64
        rates = (s.lr_generator, s.lr_discriminator)
        self.optimizers = make_optimizers(self.generator, self.discriminator, rates, s.r1_every)
        self.step, self.p, self.signs, self.seconds = 0, 0.0, torch.zeros((), device=device), 0.0
        self.history: list[dict[str, Any]] = []
        self.recent: dict[str, list[torch.Tensor]] = {}  # losses since the last snapshot

    @property
    def seen(self) -> int:
        """Real images that the discriminator has seen."""
        return self.step * self.settings.batch_size

    def _draw_real(self, generator: torch.Generator) -> torch.Tensor:
        """Return the batch of this step, a function of seed and step."""
        s = self.settings
        real = to_float(
            self.images[draw_indices(len(self.images), s.batch_size, self.step, s.seed)]
        )
        if s.mirror:
            flip = torch.rand(len(real), generator=generator) < 0.5
            real = torch.where(flip[:, None, None, None], real.flip(3), real)
        return real.to(self.device)

    def iterate(self) -> dict[str, torch.Tensor]:
        """Train both networks on one batch; return their losses."""
        # A CPU's time is that of its cores, so that other programs do not count.
        clock = time.process_time if self.device.type == "cpu" else time.monotonic
        began, s = clock(), self.settings
        draw = torch.Generator().manual_seed(((s.seed + 1) * 15_485_863 + self.step) % 2**64)
        width = self.generator.architecture.width
        z = torch.randn((2, s.batch_size, width), generator=draw).to(self.device)
        discriminate, gan = self.discriminator, self.generator

        gan.train()
        with frozen(discriminate):
            fakes = (augment(gan(z[0, part]), self.p, draw) for part in self.parts)
            loss = self._descend(0, (generator_loss(discriminate(fake)) for fake in fakes))
        losses = {"generator": loss}

        gan.eval()  # its running means have seen this iteration
        with torch.no_grad():
            fake = torch.cat([augment(gan(z[1, part]), self.p, draw) for part in self.parts])
        real = augment(self._draw_real(draw), self.p, draw)
        signs = []

        def compare(part: torch.Tensor) -> torch.Tensor:
            logits = discriminate(real[part])
            signs.append(logits.detach().sign())
            return discriminator_loss(logits, discriminate(fake[part]))

        losses["discriminator"] = self._descend(1, map(compare, self.parts))
        self.signs += torch.cat(signs).mean()
        if s.gamma and self.step % s.r1_every == 0:
            penalties = (r1_penalty(discriminate, real[part], s.gamma) for part in self.parts)
            losses["r1"] = self._descend(1, penalties, weight=s.r1_every)

        self.step += 1
        half_life = s.ema_kimg * 1000
        if s.ema_rampup:
            half_life = min(half_life, s.ema_rampup * self.seen)
        update_ema(self.average, gan, 0.5 ** (s.batch_size / half_life))
        if s.ada_target and self.step % s.ada_every == 0:
            self.p = adapt(
                self.p, float(self.signs) / s.ada_every, s.ada_every * s.batch_size,
                target=s.ada_target, images_to_one=s.ada_kimg * 1000,
            )  # fmt: skip
            self.signs.zero_()
        for name, value in losses.items():
            self.recent.setdefault(name, []).append(value)
        self.seconds += clock() - began
        return losses

    def _descend(
        self, which: int, losses: Iterable[torch.Tensor], *, weight: float = 1
    ) -> torch.Tensor:
        """Step one optimizer by the mean of the parts' losses, times a weight; return the mean."""
        optimizer, means = self.optimizers[which], []
        optimizer.zero_grad(set_to_none=True)
        for part, loss in zip(self.parts, losses):
            share = len(part) / self.settings.batch_size
            (loss * (weight * share)).backward()
            means.append(loss.detach() * share)
        optimizer.step()
        return torch.stack(means).sum()

    def _average_losses(self) -> dict[str, float]:
        """Return the mean losses since the last snapshot, which must be finite."""
        means = {k: round(float(torch.stack(v).mean()), 4) for k, v in self.recent.items()}
        if not all(math.isfinite(v) for v in means.values()):
            raise GanError(
                f"a loss is no longer finite after {self.seen} images: {means}; lower the learning "
                "rates or raise gamma. The last checkpoint is untouched"
            )
        return means

    def add_history(self) -> dict[str, Any]:
        """Add a line to the history and return it: losses since the last one, p, time."""
        means = self._average_losses()
        self.recent.clear()
        head = {"images": self.seen, "seconds": round(self.seconds, 1), "p": round(self.p, 4)}
        self.history.append(head | means)
        return self.history[-1]

    def state_dict(self) -> dict[str, Any]:
        """Return all that a checkpoint needs."""
        self._average_losses()
        plain = ("step", "p", "signs", "seconds", "history", "recent")
        return {
            **{name: getattr(self, name).state_dict() for name in NETWORKS},
            **{name: getattr(self, name) for name in plain},
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name in NETWORKS:
            getattr(self, name).load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step, self.p, self.seconds = state["step"], state["p"], state["seconds"]
        self.signs.copy_(state["signs"])
        self.history = list(state["history"])
        self.recent = {k: [v.to(self.device) for v in vs] for k, vs in state["recent"].items()}


def train_stylegan3(
    images: torch.Tensor,
    settings: StyleGAN3Settings | None = None,
    *,
    start: StyleGAN3 | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    extractor: str | Extractor | None = None,
    device: str | torch.device = "cpu",
    data: str = "",
) -> StyleGAN3:
    """Train, or fine-tune, StyleGAN3 on images; at 512 px a batch of 4 takes 3.7 GiB.

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
        the run goes on from it and ends with the same weights as an undisturbed one.
    callback : callable, optional
        Called after every iteration, before that is saved, with ``{"step", "images_seen",
        "losses", "p", "seconds", "snapshot"}``; the last is a `StyleGAN3` at every snapshot, else None.
    extractor : str or Extractor, optional
        Measure the Frechet distance of 100 generated images to `images` at every snapshot, in
        these features.
    data : str
        A note on the images, kept in the record.

    Returns
    -------
    StyleGAN3
        With a record of settings, images seen, seconds (on a CPU: of its cores) and history.
    """
    check_images(images)
    settings = settings or StyleGAN3Settings.preset("tiny")
    start = start or StyleGAN3.load()
    size = start.generator.architecture.size
    if tuple(images.shape[2:]) != (size, size):
        raise ValueError(
            f"images must be {size}x{size} for these networks, got {tuple(images.shape[2:])} "
            f"(H, W); load them with size={size}"
        )
    images_hash = hash_tensors({"images": images})
    trainer = Trainer(images, start, settings, device)
    record = {
        "settings": asdict(settings),
        "start": {k: start.record[k] for k in ("data", "images_seen", "seed") if k in start.record},
        "images": len(images),
        "images_hash": images_hash,
        "data": data or f"{len(images)} images of {size} px",
        "medbudget": __version__,
        "device": trainer.device.type,
    }

    def copy_networks() -> StyleGAN3:
        now = {"images_seen": trainer.seen, "seconds": round(trainer.seconds, 1),
               "history": list(trainer.history)}  # fmt: skip
        average, discriminator = copy.deepcopy((trainer.average, trainer.discriminator))
        return StyleGAN3(average, discriminator.eval(), record | now)

    steps = math.ceil(settings.kimg * 1000 / settings.batch_size)
    every = max(1, round(settings.snapshot_kimg * 1000 / settings.batch_size))
    identity = {"settings": settings.without("kimg"), "images": images_hash, "start": start.hash}
    for _ in Steps(
        trainer, steps, checkpoint=checkpoint, identity=identity, every=every, desc="stylegan3"
    ):
        losses = trainer.iterate()
        snapshot = None
        if trainer.step % every == 0 or trainer.step == steps:
            line = trainer.add_history()
            snapshot = copy_networks()
            if extractor is not None:
                line["fd"] = measure_distance(images, snapshot.sample(100), extractor)
        if callback is not None:
            state = {"step": trainer.step, "images_seen": trainer.seen, "losses": losses}
            state |= {"p": trainer.p, "seconds": trainer.seconds, "snapshot": snapshot}
            callback(state)
    return copy_networks()


def measure_distance(
    images: torch.Tensor, generated: torch.Tensor, extractor: str | Extractor
) -> dict[str, float | str | list[float]]:
    """Return the Frechet distance of generated images to `images`, as a run's history has it."""
    if isinstance(extractor, str):
        extractor = load_extractor(extractor)
    x, y = (compute_features(one, extractor) for one in (images, generated))
    score = frechet_score(x, y, extractor)
    interval = list(score.interval or ())
    return {"value": score.value, "interval": interval, "extractor": extractor.name}
