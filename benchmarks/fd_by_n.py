"""Claim under test: a Frechet distance falls with n, and so does its floor; a kernel distance not.

Phantoms only, no generator: healthy prostates against other healthy ones (the floor), and against
prostates with a tumour, for growing n.

    python benchmarks/fd_by_n.py [--most 512] [--record]
"""

from __future__ import annotations

import argparse
from typing import Any

from medbudget import make_phantoms
from medbudget.metrics import compute_features, frechet_interval, kernel_distance
from medbudget.results import write_result

EXTRACTORS = ("efficientnet-lite0", "layout")


def curve(x: Any, y: Any, sizes: list[int]) -> dict[str, list[float]]:
    """Return the Frechet distance of the first n of both, with its interval, for every n."""
    found = [frechet_interval(x[:n], y[:n]) for n in sizes]
    return {
        "x": sizes,
        "y": [e.value for e in found],
        "low": [e.interval[0] for e in found],
        "high": [e.interval[1] for e in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=512, help="the largest n")
    parser.add_argument("--record", action="store_true", help="write results/fd_by_n.json")
    args = parser.parse_args()
    sizes = [n for n in (16, 32, 64, 128, 256, 512, 1024) if n <= args.most]
    healthy, floor, tumour = (
        make_phantoms("prostate", label, sizes[-1], split=split).images
        for label, split in (("healthy", "train"), ("healthy", "test"), ("tumour", "test"))
    )
    values: dict[str, Any] = {"kind": "prostate", "size": healthy.shape[-1]}
    for name in EXTRACTORS:
        x, *others = (
            compute_features(images, name, progress=True) for images in (healthy, floor, tumour)
        )
        sets = dict(zip(("floor", "tumour"), others))
        values[name] = {label: curve(x, y, sizes) for label, y in sets.items()}
        if name == EXTRACTORS[0]:
            values["kernel"] = {}
            for label, y in sets.items():
                found = [kernel_distance(x[:n], y[:n]) for n in sizes]
                values["kernel"][label] = {
                    "x": sizes,
                    "y": [e.value for e in found],
                    "se": [e.se for e in found],
                }
        for label in sets:
            print(name, label, [round(v, 3) for v in values[name][label]["y"]], flush=True)
    if args.record:
        command = f"python benchmarks/fd_by_n.py --most {args.most} --record"
        print(f"wrote {write_result('fd_by_n', values, command=command)}")


if __name__ == "__main__":
    main()
