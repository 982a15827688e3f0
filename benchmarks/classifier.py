"""Claim under test: the classifier's training loop costs hardly more than its network alone.

Images a second of `train_classifier` (resize, augmentation, Adam and all) beside the same network's
bare forward and backward on one resident batch, and beside a plain PyTorch pipeline as in the
authors' repository: PNG files, a DataLoader, torchvision's transforms image by image, contiguous
float32. torchvision has no optical distortion; a perspective warp, which costs a resampling too,
stands for it. Rounds alternate, and the median of the rounds counts.

    python benchmarks/classifier.py [--preset paper] [--steps 4] [--rounds 5] [--out FILE.json]

bfloat16 is for processors with such instructions (lscpu: avx512_bf16 or amx_bf16) and for GPUs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as T

from medbudget import make_phantoms, save_images
from medbudget.augment import HEAVY
from medbudget.cases import Cases
from medbudget.classifier import (
    ClassifierSettings,
    _autocast,
    train_classifier,
)
from medbudget.files import write_json
from medbudget.networks import make_network
from medbudget.results import count_cores


def make_cases(split: str, n: int, size: int) -> Cases:
    """Return n phantoms of each class at the paper's 512 px, or at the size that is trained at."""
    sets = [make_phantoms("prostate", label, n, size=size, split=split).images
            for label in ("healthy", "tumour")]  # fmt: skip
    return Cases.of(*sets)


def wait(device: torch.device) -> float:
    """Return the time when everything asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_ours(train: Cases, val: Cases, s: ClassifierSettings, device: torch.device) -> float:
    """Seconds a step of `train_classifier`, without its first steps and its validations' images."""
    times: list[float] = []
    train_classifier(
        train, val, s, callback=lambda state: times.append(wait(device)), device=device
    )
    return (times[-1] - times[0]) / (s.steps - s.validate_every)


def time_steps(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds a step, after one to warm up."""
    step()
    start = wait(device)
    for _ in range(steps):
        step()
    return (wait(device) - start) / steps


def make_bare_step(s: ClassifierSettings, device: torch.device) -> Callable[[], None]:
    """Return the network's forward and backward on a resident batch, no more."""
    network = make_network(s).to(device)
    batch = torch.rand(s.batch_size, 3, s.size, s.size, device=device)
    labels = torch.arange(s.batch_size, device=device) % 2
    context, _ = _autocast(device, s.precision)

    def step() -> None:
        with context:
            loss = F.cross_entropy(network(batch).float(), labels)
        network.zero_grad(set_to_none=True)
        loss.backward()

    return step


class Files(Dataset[tuple[torch.Tensor, int]]):
    """Images on disk, decoded, resized and augmented one by one."""

    def __init__(self, folder: Path, s: ClassifierSettings) -> None:
        self.files = sorted(folder.glob("*/*.png"))
        shift = (HEAVY.shift, HEAVY.shift)
        self.transform = T.Compose(
            [
                T.PILToTensor(),
                T.ToDtype(torch.float32, scale=True),
                T.Resize((s.size, s.size), antialias=s.antialias),
                T.RandomHorizontalFlip(HEAVY.flip),
                T.Lambda(self.add_noise),
                T.RandomAffine(
                    HEAVY.rotate, shift, (1 - HEAVY.scale, 1 + HEAVY.scale),
                    interpolation=T.InterpolationMode.BILINEAR,
                ),
                T.ColorJitter(brightness=HEAVY.brightness, contrast=HEAVY.contrast),
                T.RandomPerspective(HEAVY.distortion, p=1),
                T.Lambda(self.drop_channel),
            ]
        )  # fmt: skip

    @staticmethod
    def add_noise(image: torch.Tensor) -> torch.Tensor:
        sd = float(torch.rand(()) * HEAVY.noise) ** 0.5
        noisy = (image + sd * torch.randn_like(image)).clamp(0, 1)
        return noisy ** float(1 - torch.rand(()) * (1 - HEAVY.gamma))

    @staticmethod
    def drop_channel(image: torch.Tensor) -> torch.Tensor:
        if torch.rand(()) < HEAVY.drop_channel:
            image[int(torch.randint(3, ()))] = 0
        return image

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file = self.files[index]
        with Image.open(file) as image:
            return self.transform(image.convert("RGB")), int(file.parent.name == "tumour")


def repeat(loader: DataLoader[Any]) -> Iterator[Any]:
    """Go through the loader again and again."""
    while True:
        yield from loader


def make_plain_step(
    folder: Path, s: ClassifierSettings, workers: int, device: torch.device
) -> Callable[[], None]:
    """Return one training step as most repositories have it."""
    network = make_network(s).to(device).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(network.parameters(), lr=s.lr)
    loader = DataLoader(
        Files(folder, s), s.batch_size, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    batches = repeat(loader)

    def step() -> None:
        images, labels = next(batches)
        x = (images.to(device) - network.mean) / network.sd
        for stage in network.stages:
            x = stage(x)
        loss = F.cross_entropy(network.head(x.mean((2, 3))), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    """Print the table, and write it where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="paper", help="paper, modern or tiny")
    parser.add_argument("--steps", type=int, default=4, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", type=int, default=100, help="training images of each class")
    parser.add_argument("--precisions", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    both = {
        precision: ClassifierSettings.preset(
            args.preset, weights="none", steps=2 * args.steps, validate_every=args.steps,
            precision=precision,
        )
        for precision in args.precisions
    }  # fmt: skip
    s = both[args.precisions[0]]
    edge = 64 if args.preset == "tiny" else 512
    train, val = make_cases("train", args.cases, edge), make_cases("val", 2, edge)
    cores = count_cores()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, title in ((0, "healthy"), (1, "tumour")):
            save_images(train.images[train.labels == label], folder / title)
        steps = {f"bare, {p}": make_bare_step(one, device) for p, one in both.items()}
        steps["plain"] = make_plain_step(folder, s, 0, device)
        steps["plain, workers"] = make_plain_step(folder, s, cores, device)
        times: dict[str, list[float]] = {}
        for i in range(args.rounds):
            now = {f"ours, {p}": time_ours(train, val, one, device) for p, one in both.items()}
            now |= {key: time_steps(step, args.steps, device) for key, step in steps.items()}
            for key, value in now.items():
                times.setdefault(key, []).append(value)
            shown = {key: round(value, 4) for key, value in now.items()}
            print(f"round {i + 1} of {args.rounds}, seconds a step: {shown}", flush=True)
    speed = {key: s.batch_size / statistics.median(values) for key, values in times.items()}
    rows = {f"{key}, images per second": value for key, value in speed.items()}
    plain = max(speed["plain"], speed["plain, workers"])
    for p in both:
        rows[f"ours / bare, {p} (goal 0.9)"] = speed[f"ours, {p}"] / speed[f"bare, {p}"]
        rows[f"ours, {p} / the faster plain one (goal 2)"] = speed[f"ours, {p}"] / plain
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    about = f"{where}, {cores} cores, {torch.get_num_threads()} threads, {platform.machine()}"
    print(f"{s.network}, {s.size} px, batch {s.batch_size}; {about}")
    for key, value in rows.items():
        print(f"{key:<60}{value:>10.2f}")
    if args.out:
        write_json(
            args.out,
            {
                "date": date.today().isoformat(),
                "device": about,
                "command": f"python benchmarks/classifier.py --preset {args.preset} "
                f"--steps {args.steps} --rounds {args.rounds}",
                "torch": torch.__version__,
                "rows": {key: round(value, 3) for key, value in rows.items()},
            },
        )


if __name__ == "__main__":
    main()
