"""A small classifier, trained as the paper's: heavy augmentation, best validation AUC, tested once.

De Wilde et al. (2024), section 4.3: ResNet-18 with ImageNet weights, Adam, a constant learning
rate, batches of 32. All images stay on the device as bytes; augmentation runs there in batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from medbudget._version import __version__
from medbudget.augment import LEVELS, augment
from medbudget.cases import Cases, check_drawn, check_splits
from medbudget.files import hash_tensors
from medbudget.images import check_images
from medbudget.metrics.auc import compute_auc, delong
from medbudget.metrics.scores import Score
from medbudget.networks import ClassifierSettings, Network, make_network, resize
from medbudget.runs import Steps, draw_indices


def choose_settings(
    preset: str | None = None, device: str | torch.device | None = None, **changes: Any
) -> ClassifierSettings:
    """Return a preset's settings; without a name ``tiny`` on a CPU, ``modern`` on a GPU."""
    tiny = find_device(device).type == "cpu"
    return ClassifierSettings.preset(preset or ("tiny" if tiny else "modern"), **changes)


def find_device(device: str | torch.device | None) -> torch.device:
    """Return the device that is named, or a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


# ------------------------------------------------------------------------------- the classifier


@dataclass(eq=False)
class Classifier:
    """A trained classifier with the record of its training and of every test."""

    network: Network  # with the weights of the best validation
    settings: ClassifierSettings
    classes: tuple[str, str]
    # history (steps, losses, validation AUCs), best_step, best_auc, hashes of the training and
    # validation images, and tests: one entry for each call of `test`
    record: dict[str, Any] = field(default_factory=dict)

    def predict(self, images: torch.Tensor, *, batch_size: int = 64) -> npt.NDArray[np.float64]:
        """Return the probability of class 1, ``(N,)``, of images ``(N, 3, H, W) uint8``."""
        check_images(images)
        s = self.settings
        device = next(self.network.parameters()).device
        small = resize(images.to(device), s.size, antialias=s.antialias)
        return _predict(self.network, small, batch_size, s.precision)

    def test(self, cases: Cases) -> tuple[npt.NDArray[np.float64], Score]:
        """Return probabilities ``(N,)`` of test cases, and the AUC with DeLong's interval.

        Its note, and the record, say how often these cases were tested with this classifier: a test
        counts once, before anything is chosen by it. Its training and validation cases are refused.
        """
        key = hash_tensors({"images": cases.images})
        for split in ("train", "val"):
            if self.record.get(f"{split}_hash") == key:
                raise ValueError(f"these are the {split} cases: test on others")
        tests = self.record.setdefault("tests", [])
        tests.append({"images": key, "n": len(cases)})
        times = sum(one["images"] == key for one in tests)
        probabilities = self.predict(cases.images)
        estimate = delong(cases.labels.numpy(), probabilities)
        note = "DeLong interval; tested once" if times == 1 else f"tested {times} times"
        n = (int((cases.labels == 0).sum()), int((cases.labels == 1).sum()))
        return probabilities, Score("AUC", estimate.value, estimate.interval, n, note=note)


def saliency(
    classifier: Classifier, images: torch.Tensor, *, stage: int = -1
) -> npt.NDArray[np.float32]:
    """Return where an image speaks for class 1: Grad-CAM (Selvaraju et al. 2017).

    Images ``(N, 3, H, W) uint8`` give maps ``(N, size, size)`` from 0 to 1, 1 at the image's own
    maximum; all 0 where nothing speaks for class 1: what the network used, not where a disease is.
    Earlier stages than the last have finer grids and see less of the image.
    """
    check_images(images)
    s, network = classifier.settings, classifier.network.eval()
    device = next(network.parameters()).device
    small = resize(images.to(device), s.size, antialias=s.antialias) / 255
    last = range(len(network.stages))[stage] + 1
    with torch.no_grad():
        maps = network.run(network.normalize(small), stop=last)
    maps.requires_grad_(True)
    logit = network.decide(network.run(maps, start=last))[:, 1]
    (slope,) = torch.autograd.grad(logit.sum(), maps)
    cam = (slope.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu().detach()
    cam = F.interpolate(cam, (s.size, s.size), mode="bilinear")[:, 0]
    return np.asarray((cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)).cpu(), np.float32)


def _autocast(device: torch.device, precision: str) -> tuple[Any, torch.dtype]:
    if precision == "auto":
        half = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else ""
        precision = half or ("float16" if device.type == "cuda" else "float32")
    kind = getattr(torch, precision)
    context = nullcontext() if kind == torch.float32 else torch.autocast(device.type, kind)
    return context, kind


def _predict(
    network: Network, images: torch.Tensor, batch_size: int, precision: str
) -> npt.NDArray[np.float64]:
    network.eval()
    context, _ = _autocast(images.device, precision)
    with torch.inference_mode(), context:
        logits = torch.cat([network(part / 255) for part in images.split(batch_size)])
    return logits.double().softmax(1)[:, 1].cpu().numpy()


# --------------------------------------------------------------------------------- the training


class Training:
    """A training in progress: network, optimizer, and the weights of the best validation."""

    PARTS = ("network", "optimizer", "scaler")
    PLAIN = ("step", "history", "best", "recent")

    def __init__(self, settings: ClassifierSettings, device: torch.device) -> None:
        self.network = make_network(settings).to(device)
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=settings.lr, fused=True)
        self.context, kind = _autocast(device, settings.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=kind == torch.float16)
        self.step = 0
        self.history: dict[str, list[Any]] = {"steps": [], "losses": [], "aucs": []}
        self.best: dict[str, torch.Tensor] = {}
        self.recent: list[torch.Tensor] = []  # losses since the last validation

    def learn(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Take one step on a batch ``(B, 3, H, W)`` in [0, 1]."""
        self.network.train()
        with self.context:
            loss = F.cross_entropy(self.network(images).float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.recent.append(loss.detach())
        self.step += 1

    def validate(self, auc: float) -> float:
        """Note the AUC of this step, keep the weights if it is the best, return the mean loss."""
        loss = self.mean_loss()
        self.recent = []
        if not self.best or auc > max(self.history["aucs"]):
            self.best = {key: v.detach().clone() for key, v in self.network.state_dict().items()}
        for key, value in (("steps", self.step), ("losses", loss), ("aucs", auc)):
            self.history[key].append(value)
        return loss

    def mean_loss(self) -> float:
        """Return the mean loss since the last validation, which must be finite."""
        loss = float(torch.stack(self.recent).mean()) if self.recent else 0.0
        if not np.isfinite(loss):
            raise RuntimeError(
                f"the loss became {loss} before step {self.step}: use a lower learning rate, or "
                "precision float32. The last checkpoint is untouched"
            )
        return loss

    def state_dict(self) -> dict[str, Any]:
        self.mean_loss()
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return parts | {name: getattr(self, name) for name in self.PLAIN}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in self.PLAIN:
            setattr(self, name, state[name])
        self.recent = [loss.to(self.network.mean.device) for loss in self.recent]


def train_classifier(
    train: Cases,
    val: Cases,
    settings: ClassifierSettings | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    device: str | torch.device | None = None,
) -> Classifier:
    """Train on `train`, keep the weights of the best AUC on `val` (the first of equal ones).

    Without settings, they are those of `choose_settings`. A `checkpoint` is saved every
    ``settings.checkpoint_every`` steps, and at Ctrl-C; a run goes on from it and ends as an
    undisturbed one (see `Steps`). The `callback` is called after every validation with ``{"step",
    "steps", "loss", "auc"}``. A loss that is not finite raises RuntimeError.
    """
    place = find_device(device)
    s = settings or choose_settings(device=place)
    check_splits({"train": train, "val": val})
    check_drawn(train, "training")
    run = Training(s, place)
    images, watched = (
        resize(cases.images.to(place), s.size, antialias=s.antialias) for cases in (train, val)
    )
    labels, truth = train.labels.to(place), val.labels.numpy()
    identity: dict[str, Any] = {"settings": s.without("steps", "checkpoint_every")}
    for name, cases in (("train", train), ("val", val)):
        identity[name] = hash_tensors({"images": cases.images, "labels": cases.labels})
    start = time.monotonic()
    for step in Steps(
        run, s.steps, checkpoint=checkpoint, identity=identity, every=s.checkpoint_every,
        desc="classifier",
    ):  # fmt: skip
        chosen = draw_indices(len(images), s.batch_size, step, s.seed).to(place)
        generator = torch.Generator(place).manual_seed((s.seed * 15_485_863 + step) % 2**64)
        with run.context:
            batch = augment(images[chosen] / 255, LEVELS[s.augment], generator=generator)
        run.learn(batch, labels[chosen])
        if run.step % s.validate_every == 0 or run.step == s.steps:
            value = compute_auc(truth, _predict(run.network, watched, 64, s.precision))
            loss = run.validate(value)
            if callback is not None:
                callback({"step": run.step, "steps": s.steps, "loss": loss, "auc": value})
    run.network.load_state_dict(run.best)
    best = int(np.argmax(run.history["aucs"]))
    record = {
        "settings": asdict(s),
        "history": run.history,
        "best_step": run.history["steps"][best],
        "best_auc": run.history["aucs"][best],
        "n": {"train": len(train), "val": len(val)},
        "train_hash": hash_tensors({"images": train.images}),
        "val_hash": hash_tensors({"images": val.images}),
        "device": place.type,
        "medbudget": __version__,
        "seconds": round(time.monotonic() - start, 1),
        "tests": [],
    }
    return Classifier(run.network.eval(), s, train.classes, record)
