"""Claim: long runs stay small. Many images and many embeddings leave memory and open files flat.

One embedding after the other is read from a file (safetensors, A1111's and diffusers' in turn),
images are drawn with it, written, read again and deleted. After each round the resident memory and
the number of open files of this process are noted. Growth is counted after a warm-up of a tenth of
the rounds, from the median of the next tenth to that of the last.

    python benchmarks/soak.py [--images 10000] [--steps 5] [--embeddings 100] [--record]
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from medbudget import Embedding, load_base, load_images, sample, save_images
from medbudget.base import Base
from medbudget.progress import quiet, tqdm
from medbudget.results import write_result

ENDINGS = (".safetensors", ".pt", ".bin")
GOAL = 5.0  # percent


def resident_mib() -> float:
    """Return this process's resident memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    """Return how many file handles this process holds (Linux)."""
    return len(os.listdir("/proc/self/fd"))


def soak(
    base: Base, folder: Path, *, images: int, steps: int, embeddings: int
) -> tuple[list[float], list[int]]:
    """Run the rounds; return memory in MiB and open files after each."""
    generator = torch.Generator().manual_seed(0)
    scale = base.token_rows("red yellow ellipse").std()
    memory, handles = [], []
    for i in tqdm(range(embeddings), desc="soak", unit="embedding"):
        vectors = torch.randn(4 + i % 8, base.width, generator=generator) * scale
        path = Embedding(vectors, f"<word{i}>").save(folder / f"{i}{ENDINGS[i % 3]}")
        word = Embedding.load(path, token=f"<word{i}>")
        count = images * (i + 1) // embeddings - images * i // embeddings
        with quiet():
            made = sample(base, word.token, embeddings=[word], n=count, steps=steps, seed=i * count)
        files = save_images(made, folder / "images")
        assert torch.equal(load_images(files), made), "what was written is not what was drawn"
        for file in (path, *files):
            file.unlink()
        del word, made, vectors
        gc.collect()
        memory.append(resident_mib())
        handles.append(open_files())
    return memory, handles


def growth(series: list[float]) -> tuple[float, float, float]:
    """Return the level after warm-up, that at the end, and the growth in percent."""
    tenth = max(1, len(series) // 10)
    start, end = median(series[tenth : 2 * tenth]), median(series[-tenth:])
    return start, end, 100 * (end - start) / start


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Print the table; record it if --record says so."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--embeddings", type=int, default=100)
    parser.add_argument("--record", action="store_true", help="write results/soak.json")
    args = parser.parse_args(arguments)
    base = load_base("tiny", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        memory, handles = soak(
            base,
            Path(folder),
            images=args.images,
            steps=args.steps,
            embeddings=args.embeddings,
        )
    warm, end, percent = growth(memory)
    files, files_end, _ = growth([float(h) for h in handles])
    rows = {
        "images drawn, written and read": args.images,
        "sampling steps": args.steps,
        "embeddings loaded and dropped": args.embeddings,
        "memory after warm-up, MiB": round(warm, 1),
        "memory at the end, MiB": round(end, 1),
        f"growth, % (goal: below {GOAL:g})": round(percent, 2),
        "highest memory, MiB": round(max(memory), 1),
        "open files after warm-up": int(files),
        "open files at the end (goal: the same)": int(files_end),
    }
    for name, value in rows.items():
        print(f"{name:<42}{value:>10}")
    print("met" if percent < GOAL and files_end <= files else "NOT met")
    values = {"rows": rows, "memory_mib": [round(m, 1) for m in memory], "open_files": handles}
    if args.record:
        command = (
            f"python benchmarks/soak.py --images {args.images} --steps {args.steps} "
            f"--embeddings {args.embeddings} --record"
        )
        print(f"wrote {write_result('soak', values, command=command)}")
    return values


if __name__ == "__main__":
    main()
