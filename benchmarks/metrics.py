"""Frechet distance: speed and error beside the usual ways, and the coverage of three intervals.

    python benchmarks/metrics.py [speed] [coverage] [--quick] [--count 1000] [--record]

Everything that is compared runs in this one process, on the same features. The memory figure is
the peak of a fresh process that runs all of ours. `--record` writes results/metrics_speed.json and
results/metrics_coverage.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import judge, peak_memory, run_alone, timed
from scipy.linalg import sqrtm

from medbudget.metrics import (
    bootstrap_distances,
    frechet_distance,
    frechet_interval,
    permutation_test,
)
from medbudget.results import write_result

N, D = 1000, 2048
Z = 1.959963984540054


def make_features(n: int, d: int, seed: int, *, scale: float = 1.0, shift: float = 0.0) -> Any:
    """Normal features with a slowly falling spectrum, mixed so that no axis is special."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.arange(1, d + 1) ** -0.5 * 10
    mix = np.linalg.qr(np.random.default_rng(99).normal(size=(d, d)))[0]
    return (x @ mix) * scale + shift


def by_sqrtm(x: Any, y: Any) -> float:
    """The way of pytorch-fid: covariances, their product, its matrix square root."""
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(0) - y.mean(0)
    root = np.trace(sqrtm(c1 @ c2)).real
    return float(gap @ gap + np.trace(c1) + np.trace(c2) - 2 * root)


def by_torchmetrics(x: Any, y: Any) -> float:
    """The formula of torchmetrics, called in its own code in float64."""
    import torch
    from torchmetrics.image.fid import _compute_fid

    def moments(a: Any) -> tuple[Any, Any]:
        t = torch.from_numpy(a)
        return t.mean(0), torch.cov(t.T)

    (m1, c1), (m2, c2) = moments(x), moments(y)
    return float(_compute_fid(m1, c1, m2, c2))


def known_pair() -> tuple[Any, Any, float]:
    """Two sets whose distance is known: the second is the first, scaled, shifted, reordered."""
    x = make_features(N, D, 0)
    y = (1.3 * x + 0.05)[::-1].copy()
    trace = float(((x - x.mean(0)) ** 2).sum() / (N - 1))
    gap = x.mean(0) - y.mean(0)
    return x, y, float(gap @ gap) + 0.3**2 * trace


def speed(quick: bool, count: int) -> dict[str, Any]:
    """Time everything once; on a busy machine compare the processor seconds."""
    x, y, truth = known_pair()
    frechet_distance(x[:50], y[:50])  # first calls load libraries
    ways: dict[str, Callable[[Any, Any], float]] = {"medbudget": frechet_distance}
    if not quick:
        ways |= {"torchmetrics": by_torchmetrics, "scipy sqrtm": by_sqrtm}
    rows: dict[str, Any] = {}
    for name, way in ways.items():
        results = [timed(lambda way=way: way(x, y)) for _ in range(3 if name == "medbudget" else 1)]
        value, seconds = min(results, key=lambda result: result[1]["cpu"])
        rows[name] = {"seconds": seconds, "relative_error": abs(value - truth) / truth}
        print(name, rows[name], flush=True)
    ours = rows["medbudget"]["seconds"]
    for row in rows.values():
        row["ratio"] = {kind: row["seconds"][kind] / ours[kind] for kind in ours}
    other = make_features(N, D, 2, scale=1.1)
    work: dict[str, Callable[[], Any]] = {
        "interval": lambda: frechet_interval(x, other),
        "bootstrap": lambda: bootstrap_distances(x, other, repeats=count),
        "permutations": lambda: permutation_test(y, other, x, repeats=count),
    }
    seconds = {name: timed(run)[1] for name, run in work.items()}
    imports, peak = run_alone(__file__, "memory")
    goals = [
        ("relative error", rows["medbudget"]["relative_error"], "<=", 1e-6),
        ("interval, s", seconds["interval"]["wall"], "<=", 1),
        ("peak memory, MB", peak, "<=", 1000),
    ]
    if not quick:
        goals += [
            ("times as fast as scipy sqrtm", rows["scipy sqrtm"]["ratio"]["wall"], ">=", 50),
            ("times as fast as torchmetrics", rows["torchmetrics"]["ratio"]["wall"], ">=", 10),
        ]
    if count == 1000:
        goals += [
            ("1000 bootstrap replicates, s", seconds["bootstrap"]["wall"], "<=", 120),
            ("1000 permutations, s", seconds["permutations"]["wall"], "<=", 480),
        ]
    return {
        "n": N,
        "d": D,
        "numpy": np.__version__,
        "distance": rows,
        "interval_seconds": seconds["interval"],
        "replicates": count,
        "bootstrap_seconds": seconds["bootstrap"],
        "permutations_seconds": seconds["permutations"],
        "peak_memory_mb": {"after_imports": round(imports), "peak": round(peak)},
        "goals": judge(goals),
    }


def memory() -> None:
    """Print the peak resident memory in MB, after the imports and after running all of ours."""
    imports = peak_memory()
    x, y = make_features(N, D, 0), make_features(N, D, 1)
    frechet_interval(x, y)
    bootstrap_distances(x, y, repeats=4)
    permutation_test(x, y, make_features(N, D, 2), repeats=4)
    print(imports, peak_memory())


SPECTRA = {"slow": -0.5, "fast": -1.5}
GAPS = {"same": (1.0, 0.0), "different": (1.3, 0.1)}


def coverage(quick: bool, _count: int) -> dict[str, Any]:
    """How often do 95 % intervals contain E[FD_n]? Normal features, n = 100, d = 200."""
    n, d = 100, 200
    trials, repeats = (20, 50) if quick else (200, 100)
    out: dict[str, Any] = {"n": n, "d": d, "trials": trials, "bootstrap_repeats": repeats}
    for spectrum, power in SPECTRA.items():
        for gap, (scale, shift) in GAPS.items():
            root = np.arange(1, d + 1) ** power

            def draw(i: int, root: Any = root, scale: float = scale, shift: float = shift) -> Any:
                rng = np.random.default_rng([i, 7])
                x = rng.normal(size=(n, d)) * root
                return x, (rng.normal(size=(n, d)) * scale + shift) * root

            expected = float(np.mean([frechet_distance(*draw(i)) for i in range(1000, 2000)]))
            hits = {"influence": 0, "bootstrap": 0, "paper": 0}
            own = 0
            widths: dict[str, list[float]] = {name: [] for name in hits}
            for i in range(trials):
                x, y = draw(i)
                estimate = frechet_interval(x, y)
                sample = bootstrap_distances(x, y, repeats=repeats, seed=i)
                half = Z * sample.std(ddof=1)
                low, high = np.quantile(sample, [0.025, 0.975])
                intervals = {
                    "influence": estimate.interval,
                    "bootstrap": (estimate.value - half, estimate.value + half),
                    "paper": (low, high),
                }
                own += int(low <= estimate.value <= high)
                for name, (a, b) in intervals.items():
                    hits[name] += int(a <= expected <= b)
                    widths[name].append(b - a)
            out[f"{spectrum}, {gap}"] = {
                "expected_distance": expected,
                **{
                    name: {"coverage": hits[name] / trials, "width": float(np.mean(widths[name]))}
                    for name in hits
                },
                "paper_contains_its_own_estimate": own / trials,
            }
            print(f"{spectrum}, {gap}:", out[f"{spectrum}, {gap}"], flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["speed", "coverage"])
    parser.add_argument("--quick", action="store_true", help="few repeats; no other libraries")
    parser.add_argument("--count", type=int, default=1000, help="replicates that are timed")
    parser.add_argument("--record", action="store_true", help="write into results/")
    args = parser.parse_args()
    if args.parts == ["memory"]:
        memory()
        return
    known = {"speed": speed, "coverage": coverage}
    if unknown := set(args.parts) - set(known):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; allowed are speed, coverage")
    if args.record and args.quick:
        parser.error("--quick is too few repeats to record")
    warnings.filterwarnings("ignore")
    for part in args.parts:
        values = known[part](args.quick, 20 if args.quick else args.count)
        print(json.dumps({part: values}, indent=1), flush=True)
        if args.record:
            count = f" --count {args.count}" if part == "speed" else ""
            command = f"python benchmarks/metrics.py {part}{count} --record"
            print(f"wrote {write_result(f'metrics_{part}', values, command=command)}")


if __name__ == "__main__":
    main()
