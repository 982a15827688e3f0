"""A small classifier, trained as the paper's: heavy augmentation, best validation AUC, tested once.

De Wilde et al. (2024), section 4.3: ResNet-18 with ImageNet weights, Adam, a constant learning
rate, batches of 32. All images stay on the device as bytes; augmentation runs there in batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from medbudget._version import __version__
from medbudget.artifacts import load_checkpoint, save_checkpoint
from medbudget.augment import LEVELS, augment
from medbudget.cases import Cases, check_drawn, check_splits
from medbudget.files import check_writable, hash_tensors, hold
from medbudget.images import check_images
from medbudget.metrics.auc import (
    Difference,
    auc,
    bootstrap_auc,
    calibration,
    delong,
    detectable_difference,
)
from medbudget.metrics.extractors import download, fit, load_state
from medbudget.metrics.features import efficientnet_network
from medbudget.metrics.scores import Score
from medbudget.processes import stoppable
from medbudget.progress import tqdm

RESNET18_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
RESNET18_HASH = "f37072fd"
NETWORKS = ("resnet18", "efficientnet-lite0")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ClassifierSettings:
    """Settings of `train_classifier`; make one with `ClassifierSettings.preset`.

    Attributes
    ----------
    network : str
        ``resnet18`` (the paper) or ``efficientnet-lite0`` (real ImageNet weights, no download).
    weights : str
        ``imagenet``, ``none``, or a file (``.safetensors`` or ``.pth``).
    size : int
        Pixels; images are resized once, bilinearly.
    antialias : bool
        Of that resize; the paper's had none.
    normalize : bool
        Bring values to what the weights were trained on; the paper left them in [0, 1].
    augment : str
        ``heavy`` (the paper) or ``none``.
    frozen : int
        Leading stages that keep their weights: the stem and the groups of blocks that follow.
    steps, batch_size, lr
        Of Adam; the learning rate is constant.
    validate_every : int
        Steps between validations; the step of the best one counts.
    precision : str
        ``auto``: bfloat16 or float16 where a GPU has it, else float32.
    checkpoint_every : int
        Steps between checkpoints, where `train_classifier` is given a path for them.
    """

    network: str = "resnet18"
    weights: str = "imagenet"
    size: int = 196
    antialias: bool = False
    normalize: bool = False
    augment: str = "heavy"
    frozen: int = 0
    steps: int = 6250
    batch_size: int = 32
    lr: float = 1e-4
    validate_every: int = 50
    precision: str = "auto"
    seed: int = 0
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        choices = {"network": NETWORKS, "augment": tuple(LEVELS), "precision": PRECISIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name, low in (
            ("size", 32), ("steps", 1), ("batch_size", 2), ("validate_every", 1),
            ("checkpoint_every", 1), ("frozen", 0), ("seed", 0),
        ):  # fmt: skip
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr must be between 0 and 1, such as 1e-4, got {self.lr}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ClassifierSettings:
        """Return the settings called ``tiny``, ``modern`` or ``paper``, with overrides.

        ``tiny``: 64 px, the last stages of EfficientNet-Lite0, under a minute on a CPU;
        ``modern``: the paper's at 224 px, antialiased and normalised. Overrides that are None are
        ignored.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; allowed are {', '.join(PRESETS)}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(overrides) - known):
            raise ValueError(
                f"unknown setting {', '.join(unknown)}; allowed are {', '.join(sorted(known))}"
            )
        given = {key: value for key, value in overrides.items() if value is not None}
        return cls(**(PRESETS[name] | given))


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "modern": {"size": 224, "antialias": True, "normalize": True},
    "tiny": {
        "network": "efficientnet-lite0", "size": 64, "antialias": True, "normalize": True,
        "frozen": 6, "steps": 200, "batch_size": 16, "lr": 1e-3, "validate_every": 25,
    },
}  # fmt: skip


def choose_settings(
    preset: str | None = None, device: str | torch.device | None = None, **changes: Any
) -> ClassifierSettings:
    """Return a preset's settings; without a name ``tiny`` on a CPU, ``modern`` on a GPU."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return ClassifierSettings.preset(
        preset or ("tiny" if place.type == "cpu" else "modern"), **changes
    )


# --------------------------------------------------------------------------------- the network


class Network(nn.Module):
    """Stages and a linear head for two classes: ``(B, 3, H, W)`` in [0, 1] to logits ``(B, 2)``.

    Frozen stages keep weights and running statistics.
    """

    def __init__(
        self, stages: Sequence[nn.Module], width: int, mean: Sequence[float], sd: Sequence[float],
        frozen: int,
    ) -> None:  # fmt: skip
        super().__init__()
        if frozen > len(stages):
            raise ValueError(f"frozen must be 0 to {len(stages)} for this network, got {frozen}")
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(width, 2)
        self.frozen = frozen
        self.mean: torch.Tensor
        self.sd: torch.Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("sd", torch.tensor(sd).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(True)
        for stage in self.stages[:frozen]:
            stage.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        for stage in self.stages[: self.frozen]:
            stage.eval()
        return self

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Bring values to what the weights were trained on."""
        return ((images - self.mean) / self.sd).contiguous(memory_format=torch.channels_last)

    def run(self, x: torch.Tensor, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Pass feature maps through some of the stages."""
        for stage in self.stages[start:stop]:
            x = stage(x)
        return x

    def decide(self, x: torch.Tensor) -> torch.Tensor:
        """Turn the last stage's maps into logits."""
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.decide(self.run(self.normalize(images)))


def make_network(settings: ClassifierSettings) -> Network:
    """Build the network, load its weights, and give it a head drawn from the seed.

    Raises
    ------
    WeightsError
        Weights that are neither in a cache nor to be had, or of another network.
    """
    path = None if settings.weights in ("imagenet", "none") else Path(settings.weights)
    mean: tuple[float, ...] = (0.0,) * 3
    sd: tuple[float, ...] = (1.0,) * 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.network == "resnet18":
            from torchvision.models import resnet18

            net: Any = resnet18(weights=None)
            if settings.weights != "none":
                path = path or _resnet18_file()
                fit(net, load_state("resnet18", path), "resnet18", path)
            stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
            stages = [stem, net.layer1, net.layer2, net.layer3, net.layer4]
            width = 512
            if settings.normalize:
                mean, sd = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        else:
            if settings.weights == "none":
                import timm

                net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
            else:
                net, _ = efficientnet_network(torch.device("cpu"), path)
            stem = nn.Sequential(net.conv_stem, net.bn1)
            stages = [stem, *net.blocks, nn.Sequential(net.conv_head, net.bn2)]
            width = 1280
            if settings.normalize:
                mean, sd = (127 / 255,) * 3, (128 / 255,) * 3
        network = Network(stages, width, mean, sd, settings.frozen)
    return network.to(memory_format=torch.channels_last)


def _resnet18_file() -> Path:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(RESNET18_URL).name
    return cached if cached.is_file() else download("resnet18", RESNET18_URL, RESNET18_HASH)


def resize(images: torch.Tensor, size: int, *, antialias: bool) -> torch.Tensor:
    """Resize bilinearly to a square and round: ``(N, 3, H, W) uint8`` both ways."""
    if images.shape[2:] == (size, size):
        return images
    parts = [
        F.interpolate(
            part.float(), size=(size, size), mode="bilinear", align_corners=False,
            antialias=antialias,
        ).round().clamp(0, 255).to(torch.uint8)
        for part in images.split(64)
    ]  # fmt: skip
    return torch.cat(parts)


# ------------------------------------------------------------------------------- the classifier


@dataclass(eq=False)
class Classifier:
    """A trained classifier with the record of its training and of every test.

    Attributes
    ----------
    network : Network
        With the weights of the best validation.
    settings : ClassifierSettings
    classes : (str, str)
    record : dict
        ``history`` (steps, losses, validation AUCs), ``best_step``, ``best_auc``, hashes of the
        training and validation images, and ``tests``: one entry for each call of `test`.
    """

    network: Network
    settings: ClassifierSettings
    classes: tuple[str, str]
    record: dict[str, Any] = field(default_factory=dict)

    def predict(self, images: torch.Tensor, *, batch_size: int = 64) -> npt.NDArray[np.float64]:
        """Return the probability of class 1, ``(N,)``, of images ``(N, 3, H, W) uint8``."""
        check_images(images)
        s = self.settings
        device = next(self.network.parameters()).device
        small = resize(images.to(device), s.size, antialias=s.antialias)
        return _predict(self.network, small, batch_size, s.precision)

    def test(self, cases: Cases) -> tuple[npt.NDArray[np.float64], Score]:
        """Predict test cases and note in the record that they have been seen.

        Returns
        -------
        probabilities, score
            ``(N,)``, and the AUC with DeLong's interval. The note says how often these cases were
            tested with this classifier; a test counts once, before anything is chosen by it.

        Raises
        ------
        ValueError
            Cases that it was trained or validated on.
        """
        key = hash_tensors({"images": cases.images})
        for split in ("train", "val"):
            if self.record.get(f"{split}_hash") == key:
                raise ValueError(f"these are the {split} cases: test on others")
        tests = self.record.setdefault("tests", [])
        tests.append({"images": key, "n": len(cases)})
        times = sum(one["images"] == key for one in tests)
        probabilities = self.predict(cases.images)
        found = delong(cases.labels.numpy(), probabilities)
        note = "DeLong interval; tested once" if times == 1 else f"tested {times} times"
        positive = int(cases.labels.sum())
        score = Score(
            "AUC", found.value, found.interval, (len(cases) - positive, positive), note=note
        )
        return probabilities, score


def saliency(
    classifier: Classifier, images: torch.Tensor, *, stage: int = -1
) -> npt.NDArray[np.float32]:
    """Return where an image speaks for class 1: Grad-CAM (Selvaraju et al. 2017).

    The maps of a stage are weighed by the mean of the logit's slope over each map, and summed.

    Parameters
    ----------
    images : torch.Tensor
        ``(N, 3, H, W) uint8``.
    stage : int
        Whose output is weighed; earlier stages have finer grids and see less of the image.

    Returns
    -------
    numpy.ndarray
        ``(N, size, size)`` from 0 to 1, 1 at the image's own maximum; all 0 where nothing speaks
        for class 1. A map of what the network used, not of where a disease is.
    """
    check_images(images)
    s, network = classifier.settings, classifier.network.eval()
    place = next(network.parameters()).device
    small = resize(images.to(place), s.size, antialias=s.antialias) / 255
    last = range(len(network.stages))[stage] + 1
    with torch.no_grad():
        maps = network.run(network.normalize(small), stop=last)
    maps.requires_grad_(True)
    logit = network.decide(network.run(maps, start=last))[:, 1]
    (slope,) = torch.autograd.grad(logit.sum(), maps)
    cam = (slope.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu().detach()
    cam = F.interpolate(cam, (s.size, s.size), mode="bilinear")[:, 0]
    scaled: npt.NDArray[np.float32] = (
        (cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)).cpu().numpy()
    )
    return scaled


def _autocast(device: torch.device, precision: str) -> tuple[Any, torch.dtype]:
    if precision == "auto":
        kind = torch.float32
        if device.type == "cuda":
            kind = torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    else:
        kind = getattr(torch, precision)
    if kind == torch.float32:
        return nullcontext(), kind
    return torch.autocast(device.type, kind), kind


def _predict(
    network: Network, images: torch.Tensor, batch_size: int, precision: str
) -> npt.NDArray[np.float64]:
    network.eval()
    context, _ = _autocast(images.device, precision)
    with torch.inference_mode(), context:
        logits = torch.cat([network(part / 255) for part in images.split(batch_size)])
    return logits.double().softmax(1)[:, 1].cpu().numpy()


def _pick(n: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Which images a step sees: all in a new random order each epoch, by seed and step alone."""
    order: list[int] = []
    while len(order) < batch:
        epoch, start = divmod(step * batch + len(order), n)
        shuffle = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order += torch.randperm(n, generator=shuffle)[start:].tolist()[: batch - len(order)]
    return torch.tensor(order)


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

    Parameters
    ----------
    settings : ClassifierSettings, optional
        Default: ``tiny`` on a CPU, ``modern`` on a GPU.
    checkpoint : path, optional
        Saved there every ``settings.checkpoint_every`` steps, and at Ctrl-C or SIGTERM after the
        step. If it exists, the run goes on from it and ends as an undisturbed one. The one before
        is kept beside it, for the case that it is damaged. Removed by nobody.
    callback : callable, optional
        Called after every validation with ``{"step", "steps", "loss", "auc"}``.

    Raises
    ------
    ValueError
        Splits that do not fit together or share an image, a checkpoint of another run.
    RuntimeError
        A loss that is not finite; `InUseError`: another process writes the same checkpoint.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = settings or choose_settings(device=place)
    check_splits({"train": train, "val": val})
    check_drawn(train, "training")
    if checkpoint is not None:
        checkpoint = check_writable(checkpoint)
    network = make_network(settings).to(place)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=settings.lr, fused=True)
    images, watched = (
        resize(cases.images.to(place), settings.size, antialias=settings.antialias)
        for cases in (train, val)
    )
    labels, truth = train.labels.to(place), val.labels.numpy()
    level = LEVELS[settings.augment]
    context, kind = _autocast(place, settings.precision)
    scaler = torch.amp.GradScaler(place.type, enabled=kind == torch.float16)
    identity = {
        "settings": {
            k: v for k, v in asdict(settings).items() if k not in ("steps", "checkpoint_every")
        },
        "train": hash_tensors({"images": train.images, "labels": train.labels}),
        "val": hash_tensors({"images": val.images, "labels": val.labels}),
    }
    state: dict[str, Any] = {
        "step": 0, "steps": [], "losses": [], "aucs": [], "best": None, "recent": [],
    }  # fmt: skip
    start = time.monotonic()
    with stoppable() as stopped, hold(checkpoint):
        if checkpoint is not None:
            state = _resume(checkpoint, identity, network, optimizer, scaler) or state
        bar = tqdm(total=settings.steps, initial=state["step"], desc="classifier", unit="step")
        try:
            while state["step"] < settings.steps and not stopped():
                step = state["step"]
                pick = _pick(len(images), settings.batch_size, step, settings.seed).to(place)
                generator = torch.Generator(place).manual_seed(settings.seed * 15_485_863 + step)
                network.train()
                with context:
                    batch = augment(images[pick] / 255, level, generator=generator)
                    loss = F.cross_entropy(network(batch).float(), labels[pick])
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                state["recent"].append(loss.detach())
                state["step"] = step + 1
                bar.update()
                last = state["step"] == settings.steps
                if state["step"] % settings.validate_every == 0 or last:
                    _validate(network, watched, truth, settings, state, callback)
                    bar.set_postfix(auc=f"{state['aucs'][-1]:.3f}")
                due = last or stopped() or state["step"] % settings.checkpoint_every == 0
                if checkpoint is not None and due:
                    _check_losses(state)
                    _save(checkpoint, identity, network, optimizer, scaler, state)
        finally:
            bar.close()
    if state["step"] < settings.steps:
        raise KeyboardInterrupt  # if the signal's own handler has not
    network.load_state_dict(state["best"]["network"])
    network.eval()
    at = state["best"]["index"]
    record = {
        "settings": asdict(settings),
        "history": {key: state[key] for key in ("steps", "losses", "aucs")},
        "best_step": state["steps"][at],
        "best_auc": state["aucs"][at],
        "n": {"train": len(train), "val": len(val)},
        "train_hash": hash_tensors({"images": train.images}),
        "val_hash": hash_tensors({"images": val.images}),
        "device": place.type,
        "medbudget": __version__,
        "seconds": round(time.monotonic() - start, 1),
        "tests": [],
    }
    return Classifier(network, settings, train.classes, record)


def _validate(
    network: Network, images: torch.Tensor, truth: npt.NDArray[Any], settings: ClassifierSettings,
    state: dict[str, Any], callback: Callable[[dict[str, Any]], None] | None,
) -> None:  # fmt: skip
    loss = _check_losses(state)
    state["recent"] = []
    value = auc(truth, _predict(network, images, 64, settings.precision))
    if state["best"] is None or value > max(state["aucs"]):
        copy = {key: v.detach().clone() for key, v in network.state_dict().items()}
        state["best"] = {"network": copy, "index": len(state["aucs"])}
    for key, one in (("steps", state["step"]), ("losses", loss), ("aucs", value)):
        state[key].append(one)
    if callback is not None:
        callback({"step": state["step"], "steps": settings.steps, "loss": loss, "auc": value})


def _check_losses(state: dict[str, Any]) -> float:
    """Return the mean loss since the last validation, which must be finite."""
    loss = float(torch.stack(state["recent"]).mean()) if state["recent"] else 0.0
    if not np.isfinite(loss):
        raise RuntimeError(
            f"the loss became {loss} before step {state['step']}: use a lower learning rate, or "
            "precision float32. The last checkpoint is untouched"
        )
    return loss


def _save(path: Path, identity: dict, network, optimizer, scaler, state: dict[str, Any]) -> None:
    content = {
        "identity": identity,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "state": state,
    }
    save_checkpoint(path, content)


def _resume(path: Path, identity: dict, network, optimizer, scaler) -> dict[str, Any] | None:
    place = next(network.parameters()).device
    stored = load_checkpoint(path, identity, device=place)
    if stored is None:
        return None
    network.load_state_dict(stored["network"])
    optimizer.load_state_dict(stored["optimizer"])
    scaler.load_state_dict(stored["scaler"])
    state: dict[str, Any] = stored["state"]
    return state


def score_runs(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    *,
    repeats: int = 2000,
    patients: Sequence[Hashable] | None = None,
) -> list[Score]:
    """Return the mean AUC of repeated runs with its interval, their spread, and calibration.

    Parameters
    ----------
    labels : array_like
        ``(n,)`` of 0 and 1.
    scores : array_like
        ``(runs, n)``: probabilities of class 1.
    repeats : int
        Of the two-level bootstrap, over cases and runs.
    patients : sequence, optional
        Whose case each is: patients are resampled instead of cases.
    """
    truth, values = np.asarray(labels), np.atleast_2d(np.asarray(scores, dtype=np.float64))
    n = (int((truth == 0).sum()), int((truth == 1).sum()))
    found = bootstrap_auc(truth, values, repeats=repeats, patients=patients)
    what = "cases" if patients is None else f"{len(set(patients))} patients"
    note = f"mean of {len(values)} runs; two-level bootstrap over {what} and runs"
    rows = [Score("AUC", found.value, found.interval, n, note=note)]
    if len(values) > 1:
        sd = float(np.std([auc(truth, one) for one in values], ddof=1))
        rows.append(Score("sd of runs", sd, None, n, note="training noise on one test set"))
    error = calibration(truth, values).error
    return [*rows, Score("ECE", error, None, n, note="calibration error, 10 bins, all runs")]


def score_gain(gain: Difference, n: tuple[int, int]) -> list[Score]:
    """Return a gain of `bootstrap_auc` as a score, and the gain that could have been detected."""
    least = detectable_difference(gain.se)
    return [
        Score("gain", gain.value, gain.interval, n, note=f"p = {gain.p_value:.3g}; same cases"),
        Score("detectable", least, None, n, note="a true gain found with power 80 % at 5 %"),
    ]
