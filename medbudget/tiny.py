"""The embedded base's visual words, and the embeddings that ship with the package.

Visual words say what is where, from coarse to fine: a sentence of 60 words describes an image. One
word for its grain, then one for every cell of a 1x1, a 3x3 and a 7x7 grid in reading order. A word
stands for six numbers: for a cell its mean colour and its spread (standard deviation) per channel;
for the grain the spread of the detail under 3 pixels and of that between 3 and 7 pixels.

The embeddings were trained on phantoms by ``pretraining/words.py``: the eight classes, on healthy
prostates the vectors and cases of the paper's Table 1, and prostates with a tumour from 10 cases
for its Table 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from medbudget.base import Base
from medbudget.data.phantoms import KINDS
from medbudget.embeddings import Embedding
from medbudget.images import check_images
from medbudget.known import BaseError

FOLDER = Path(__file__).parent / "weights" / "embeddings"
VECTORS, CASES, SIZE = 64, 100, 64  # SIZE: pixels of the phantoms that were learned from
SHIPPED = tuple((kind, label) for kind, labels in KINDS.items() for label in labels)
SPECS = (
    *((kind, label, VECTORS, CASES) for kind, label in SHIPPED),
    *(("prostate", "healthy", n, CASES) for n in (8, 16, 32)),
    *(("prostate", "healthy", VECTORS, cases) for cases in (5, 10, 50)),
    ("prostate", "tumour", VECTORS, 10),  # Table 2's rows with an asterisk
)
GRIDS = (1, 3, 7)
N_WORDS = 1 + sum(grid * grid for grid in GRIDS)


def compute_numbers(images: torch.Tensor) -> torch.Tensor:
    """Return the six numbers of every visual word of images, ``(N, 60, 6) float32``, about [-1, 1].

    Images ``(N, 3, H, W) uint8`` of another size are area-averaged to 64 x 64 first.
    """
    x = images.float() / 255
    if x.shape[-2:] != (64, 64):
        x = F.interpolate(x, size=(64, 64), mode="area")
    fine = x - _box(x, 3)
    middle = _box(x, 3) - _box(x, 7)
    grain = torch.cat([fine.std((2, 3)), middle.std((2, 3))], 1) * 8 - 1
    words = [grain[:, None]]
    for grid in GRIDS:
        mean = F.adaptive_avg_pool2d(x, grid)
        square = F.adaptive_avg_pool2d(x * x, grid)
        spread = (square - mean * mean).clamp_min(0).sqrt()
        words.append(torch.cat([mean * 2 - 1, spread * 6 - 1], 1).flatten(2).transpose(1, 2))
    return torch.cat(words, 1)


def _box(x: torch.Tensor, width: int) -> torch.Tensor:
    pad = width // 2
    return F.avg_pool2d(F.pad(x, (pad,) * 4, mode="reflect"), width, stride=1)


def describe(base: Base, images: torch.Tensor | Sequence[torch.Tensor]) -> str:
    """Write the visual words of images ``(N, 3, H, W) uint8``, or of their mean: a prompt for tiny.

    Examples
    --------
    >>> from medbudget import load_base, make_phantoms
    >>> base = load_base("tiny", device="cpu")
    >>> len(describe(base, make_phantoms("chest", "healthy", 4).images).split())
    60
    """
    if not base.words:
        raise BaseError(
            f"base {base.name} has no visual words: only 'tiny' was trained with them; for Stable "
            "Diffusion write the prompt yourself or use a captioning model"
        )
    if not isinstance(images, torch.Tensor):
        images = torch.stack(list(images))
    numbers = compute_numbers(check_images(images)).mean(0)
    nearest = {
        name: torch.cdist(own, base.words[name].float()).argmin(1).tolist()
        for name, own in (("grain", numbers[:1]), ("cells", numbers[1:]))
    }
    return " ".join([f"g{nearest['grain'][0]:04d}", *(f"v{i:04d}" for i in nearest["cells"])])


def path_of(kind: str, label: str, n_vectors: int, cases: int) -> Path:
    name = f"{kind}_{label}"
    if (n_vectors, cases) != (VECTORS, CASES):
        name += f"_{n_vectors}vectors_{cases}cases"
    return FOLDER / f"{name}.safetensors"


def find_trained(kind: str, label: str, *, n_vectors: int = VECTORS, cases: int = CASES) -> Path:
    """Return the file of a shipped embedding; ValueError if there is none for this class."""
    path = path_of(kind, label, n_vectors, cases)
    if not path.exists():
        have = ", ".join(sorted(p.stem for p in FOLDER.glob("*.safetensors"))) or "none"
        raise ValueError(f"no trained embedding {path.stem}; there are: {have}")
    return path


def load_trained(
    kind: str, label: str, base: Base, *, n_vectors: int = VECTORS, cases: int = CASES
) -> Embedding:
    """Return the shipped embedding of a phantom class, with its training record."""
    if base.name != "tiny":
        raise ValueError(
            f"the embeddings in the package are for the base 'tiny', this one is {base.name!r}: "
            "learn a word with medbudget.invert, load one with Embedding.load(file), or use the "
            "paper's with medbudget.hub.find_word"
        )
    path = find_trained(kind, label, n_vectors=n_vectors, cases=cases)
    embedding = Embedding.load(path)
    if embedding.base_hash != base.hash:
        raise ValueError(
            f"{path.name} was trained on a base with hash {embedding.base_hash}, this one has "
            f"{base.hash}; train it again with python -m pretraining.words"
        )
    return embedding
