"""Claim: on the embedded base, Textual Inversion shows the paper's effects; the bars of its card.

    python benchmarks/tiny_base.py [BAR …] [--n 200] [--seeds 3] [--real FOLDER] [--out FILE]
        [--store FOLDER] [--go-on]

Bars: `autoencoder`, `inversion` (the shipped embeddings against prompts), `trends` (vectors, cases,
guidance, sampling steps), `disease` (generated diseased against healthy), `axis` (weighted AND),
`xrays` (real chest X-rays that nobody here drew; needs --real), and `limits`, which is no bar and
asks at which noise the distance is lost. Each one's rows replace its rows in the file, so that they
can be run one by one, and --go-on leaves out those that an interrupted run with the same --store has
recorded. The words that `trends` and `xrays` learn and all images that are drawn are kept in --store,
where other bars and a run that goes on find them. Distances are Frechet distances of
EfficientNet-Lite0 features ("FD") and of 8 x 8 thumbnails ("layout"), always beside the
real-versus-real floor of the same n. The autoencoder was trained with EfficientNet's features: beside
the bars stand two views that were trained on nothing, random convolutions and the power spectrum.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors

from medbudget import (
    Embedding,
    InversionSettings,
    describe,
    invert,
    load_base,
    load_images,
    make_phantoms,
    sample,
)
from medbudget.base import Base
from medbudget.cases import Cases
from medbudget.classifier import ClassifierSettings, train_classifier
from medbudget.files import hash_settings, hash_tensors, write_bytes, write_text
from medbudget.images import find_images
from medbudget.metrics import compute_auc, frechet_distance, precision_recall
from medbudget.metrics.features import compute_features
from medbudget.results import StaleResultError, load_result, write_result
from medbudget.sampling.sampler import BATCH, Condition, denoise, draw_noises, make_sigmas
from medbudget.tiny import CASES, FOLDER, SHIPPED, load_trained

Row = dict[str, Any]
NETWORK, LAYOUT = "efficientnet-lite0", "layout"
VIEWS = {"random": "random-convolutions", "spectrum": "spectrum"}

# Twenty honest prompts for each kind of image: every ground with every set of objects.
GROUNDS = {
    "prostate": ("grainy red brown field ground", "faint brown ground",
                 "grainy red brown coarse field mirrored ground", "smooth brown red gradient ground"),
    "chest": ("grainy silver ground", "faint gray silver coarse field mirrored ground",
              "smooth gray ground", "grainy silver white gradient ground"),
    "histology": ("grainy pink purple fine cells ground", "noisy pink purple fine field ground",
                  "faint pink ground", "grainy purple pink coarse cells ground"),
}  # fmt: skip
OBJECTS = {
    "prostate": ("", "large olive ellipse center", "large olive ellipse center medium black ellipse bottom",
                 "pair medium green bar left large olive ellipse center medium black ellipse bottom",
                 "medium green ellipse top large olive ellipse center medium black ellipse bottom"),
    "chest": ("", "pair large charcoal ellipse left", "pair large charcoal ellipse left white bar center",
              "pair large charcoal ellipse left white bar center medium silver ellipse bottom",
              "pair huge black shaded ellipse left white bar center silver box bottom"),
    "histology": ("", "many small purple ellipse", "huge pink spotted ellipse center",
                  "large purple spotted blob center", "medium purple blob center pink ring center"),
}  # fmt: skip


def list_prompts(kind: str) -> list[str]:
    """Return the twenty prompts of a kind."""
    return [f"{g} {o}".strip() for g in GROUNDS[kind] for o in OBJECTS[kind]]


def distances(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Return the Frechet distances of two sets of images: FD, layout and two more views."""
    return {
        name: frechet_distance(compute_features(a, extractor), compute_features(b, extractor))
        for name, extractor in {"FD": NETWORK, "layout": LAYOUT, **VIEWS}.items()
    }


def other_views(name: str, of: dict[str, float], beside: dict[str, float]) -> Iterator[Row]:
    """Yield rows without a bar: what two more views say."""
    for view in VIEWS:
        yield {
            "name": f"{name}, {view}", "view": view, "value": of[view], "beside": beside[view],
            "ratio": of[view] / beside[view],
        }  # fmt: skip


STORE: list[Path] = []  # the folder of --store, if there is one
DRAWN: dict[str, torch.Tensor] = {}  # without it


def draw(base: Base, prompt: str, n: int, embeddings: Any = (), **options: Any) -> torch.Tensor:
    """Sample `n` images at the paper's guidance of 2, 25 steps, unless told otherwise.

    What was drawn in the same way before, by another bar or an earlier run, is not drawn again.
    """
    words = {word.token: hash_tensors({"vectors": word.vectors}) for word in embeddings}
    name = {"base": base.hash, "prompt": prompt, "n": n, "words": words, "seed": 0} | options
    if len(words) == 1 and prompt in words:  # a word alone: what it is called does not matter
        name |= {"prompt": "<x>", "words": list(words.values())}
    key = hash_settings(name)
    path = STORE[0] / "images" / f"{key}.safetensors" if STORE else None
    if path and path.exists():
        return load_file(path)["images"]
    if key in DRAWN:
        return DRAWN[key]
    images = sample(base, prompt, embeddings=list(embeddings), n=n, **options)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save_safetensors({"images": images.contiguous()}))
    else:
        DRAWN[key] = images
    return images


@cache
def draw_phantoms(kind: str, label: str, n: int, split: str = "train") -> torch.Tensor:
    """Draw phantoms once for all bars."""
    return make_phantoms(kind, label, n, split=split).images


def draw_class(base: Base, kind: str, label: str, n: int) -> torch.Tensor:
    """Sample a class's shipped word."""
    word = load_trained(kind, label, base)
    return draw(base, word.token, n, [word])


def learn(base: Base, name: str, images: torch.Tensor, args: argparse.Namespace, **settings: Any):
    """Learn a word with the preset `tiny`, or take one that was learned in the same way.

    From --store, or from those that ship with the package.
    """
    wanted = InversionSettings.preset("tiny", steps=args.steps, **settings)
    path = args.store / f"{name.replace(' ', '_')}.safetensors" if args.store else None
    same = (base.hash, dataclasses.asdict(wanted), hash_tensors({"images": images}))
    for other in (*((path,) if path else ()), *sorted(FOLDER.glob("*.safetensors"))):
        if other.exists():
            found = Embedding.load(other)
            record = found.record
            if same == (found.base_hash, record.get("settings"), record.get("images_hash")):
                return found
    word = invert(base, images, token="<x>", settings=wanted)
    if path:
        word.save(path)
    return word


def real_xrays(folder: Path | None, size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield label and images of each class, in the order of their file names."""
    if folder is not None:
        for label in ("normal", "pneumonia"):
            yield label, load_images(find_images(folder / label), size=size)


def best_prompt(
    base: Base, kind: str, real: torch.Tensor, args: argparse.Namespace
) -> tuple[str, torch.Tensor]:
    """Return the prompt with the lowest FD at n = --n-prompt, and --n images of it."""
    small = min(args.n, args.n_prompt)
    reference = compute_features(real[:small], NETWORK)
    found = {
        prompt: frechet_distance(compute_features(draw(base, prompt, small), NETWORK), reference)
        for prompt in list_prompts(kind)
    }
    prompt = min(found, key=lambda key: found[key])
    return prompt, draw(base, prompt, args.n)


def run_autoencoder(base: Base, args: argparse.Namespace) -> Iterator[Row]:
    """Bar 1: reconstructions of held-out phantoms and real X-rays."""
    sets = {
        f"{kind} {label}": tuple(
            draw_phantoms(kind, label, args.n, split) for split in ("val", "test")
        )
        for kind, label in SHIPPED
    }
    for label, images in real_xrays(args.real, base.size):
        sets[f"X-rays {label}"] = (images[: args.n // 2 * 2 : 2], images[1 : args.n // 2 * 2 : 2])
    for name, (a, b) in sets.items():
        b = b[: len(a)]
        made = torch.cat([base.decode(base.encode(part)) for part in a.split(50)])
        error = ((a.float() - made.float()) ** 2).mean((1, 2, 3))
        psnr = float((10 * torch.log10(255**2 / error)).mean())
        floor, far = distances(a, b), distances(made, b)
        need = 27 if name.startswith("X") else 30
        yield {"name": f"{name}: PSNR, dB", "value": psnr, "bar": f">= {need}", "met": psnr >= need}
        yield ratio(f"{name}: FD of reconstructions", far["FD"], floor["FD"], 3)
        yield from other_views(f"{name}: reconstructions", far, floor)


def ratio(name: str, value: float, of: float, limit: float) -> Row:
    """Return a row: a value, and how it stands to another."""
    return {
        "name": name, "value": value, "beside": of, "ratio": value / of,
        "bar": f"<= {limit:g} x {of:.3g}", "met": value <= limit * of,
    }  # fmt: skip


def below(name: str, value: float, of: float) -> Row:
    """Return a row: a value that should lie under another."""
    return {"name": name, "value": value, "beside": of, "bar": f"< {of:.3g}", "met": value < of}


def run_inversion(base: Base, args: argparse.Namespace) -> Iterator[Row]:
    """Bar 2: the shipped embeddings, the best of twenty plain prompts, the described mean."""
    for kind, label in SHIPPED:
        name = f"{kind} {label}"
        a, b = (draw_phantoms(kind, label, args.n, split) for split in ("val", "test"))
        floor = distances(a, b)
        made = draw_class(base, kind, label, args.n)
        ti = distances(made, b)
        prompt, plain = best_prompt(base, kind, a, args)
        words = distances(plain, b)
        cases = draw_phantoms(kind, label, CASES)
        said = distances(draw(base, describe(base, cases), args.n), b)
        precision, recall = precision_recall(
            compute_features(b, NETWORK), compute_features(made, NETWORK)
        )
        yield ratio(f"{name}: FD of TI against the floor", ti["FD"], floor["FD"], 5)
        yield ratio(f"{name}: FD of TI against plain words", ti["FD"], words["FD"], 0.5)
        yield below(f"{name}: FD of TI under the described mean's", ti["FD"], said["FD"])
        yield ratio(f"{name}: layout of TI against the floor", ti["layout"], floor["layout"], 4)
        yield below(f"{name}: layout of TI under plain words'", ti["layout"], words["layout"])
        yield below(f"{name}: layout of TI under described's", ti["layout"], said["layout"])
        yield at_least(f"{name}: precision", precision, 0.3)
        yield at_least(f"{name}: recall", recall, 0.2)
        yield from other_views(f"{name}: TI against the floor", ti, floor)
        print(f"  best plain prompt: {prompt}", flush=True)


def at_least(name: str, value: float, limit: float) -> Row:
    """Return a row: a value that should reach a limit."""
    return {"name": name, "value": value, "bar": f">= {limit:g}", "met": value >= limit}


def run_trends(base: Base, args: argparse.Namespace) -> Iterator[Row]:
    """Bar 3: vectors, cases, guidance and sampling steps; mean and 95 % interval over seeds."""
    real = draw_phantoms("prostate", "tumour", args.n, "test")
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        images = make_phantoms("prostate", "tumour", CASES, seed=seed).images
        for name, n_vectors, cases in (("64 vectors", 64, CASES), ("8 vectors", 8, CASES),
                                       ("1 vector", 1, CASES), ("5 cases", 64, 5)):  # fmt: skip
            word = learn(
                base, f"{name} {seed}", images[:cases], args, n_vectors=n_vectors, seed=seed
            )
            first = {"embeddings": [word], "seed": 10_000 * seed}
            made = draw(base, word.token, args.n, **first)
            found.setdefault(name, []).append(distances(made, real))
            if name == "64 vectors":
                for other, change in (("CFG 5", {"cfg_scale": 5.0}), ("10 steps", {"steps": 10})):
                    made = draw(base, word.token, args.n, **first, **change)
                    found.setdefault(other, []).append(distances(made, real))
    pairs = (("64 vectors", "8 vectors"), ("8 vectors", "1 vector"), ("64 vectors", "5 cases"),
             ("64 vectors", "CFG 5"), ("64 vectors", "10 steps"))  # fmt: skip
    for kind in ("FD", "layout", *VIEWS):
        for name, values in found.items():
            mean, half = interval([v[kind] for v in values])
            yield {"name": f"{kind}, {name}", "value": mean, "half_width": half}
        for better, worse in () if kind in VIEWS else pairs:
            gaps = [w[kind] - b[kind] for b, w in zip(found[better], found[worse])]
            mean, half = interval(gaps)
            yield {
                "name": f"{kind}: {worse} minus {better}", "value": mean, "half_width": half,
                "bar": "> 0, with its interval", "met": mean - half > 0,
            }  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % t interval (nan for one value)."""
    from scipy.stats import t

    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    se = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(t.ppf(0.975, len(values) - 1) * se)


DISEASES = (("prostate", "healthy", "tumour"), ("chest", "healthy", "cardiomegaly"),
            ("chest", "healthy", "pleural_effusion"), ("chest", "healthy", "pneumonia"),
            ("histology", "normal", "metastasis"))  # fmt: skip


def run_disease(base: Base, args: argparse.Namespace) -> Iterator[Row]:
    """Bar 4: the disease score tells generated diseased from generated healthy."""
    from medbudget.metrics.disease import disease_score

    for kind, healthy, label in DISEASES:
        scores = []
        for name in (healthy, label):
            images = draw_class(base, kind, name, args.n)
            scores.append(np.asarray(disease_score(images, kind, label)))
        truth = np.repeat([0, 1], args.n)
        yield at_least(f"{kind} {label}: AUC", compute_auc(truth, np.concatenate(scores)), 0.9)


def run_axis(base: Base, args: argparse.Namespace) -> Iterator[Row]:
    """Bar 5: healthy AND diseased, weights 0 to 1: the mean score must rise at each step."""
    from medbudget.metrics.disease import disease_score

    for kind, healthy, label in DISEASES:
        words = [load_trained(kind, name, base) for name in (healthy, label)]
        means = []
        for weight in (0, 0.25, 0.5, 0.75, 1):
            if weight in (0, 1):  # one word alone, as the other bars draw it
                images = draw_class(base, kind, (healthy, label)[weight], args.n)[: args.n // 2]
            else:
                prompt = f"{words[0].token}:{1 - weight} AND {words[1].token}:{weight}"
                images = draw(base, prompt, args.n // 2, words)
            means.append(float(np.mean(np.asarray(disease_score(images, kind, label)))))
        steps = np.diff(means)
        yield {
            "name": f"{kind} {label}: smallest step of the mean score", "value": float(steps.min()),
            "means": means, "bar": "> 0", "met": bool((steps > 0).all()),
        }  # fmt: skip


def run_xrays(base: Base, args: argparse.Namespace) -> Iterator[Row]:
    """Bar 6: 100 real X-rays of each class to learn from, 200 others to compare with.

    Two classifiers see generated images alone: the package's, which keeps the step that is best on
    the 100 real images that the words were learned from, and a linear probe of fixed features.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if args.real is None:
        raise SystemExit("the bar `xrays` needs --real FOLDER, with folders normal and pneumonia")
    made, seen, held = {}, {}, {}
    for label, images in real_xrays(args.real, base.size):
        seen[label], held[label] = images[:100], images[100:300]
        word = learn(base, label, seen[label], args)
        made[label] = draw(base, word.token, args.n, [word])
        half = len(held[label]) // 2
        floor = distances(held[label][:half], held[label][half:])
        ti = distances(made[label], held[label])
        prompt, plain = best_prompt(base, "chest", held[label], args)
        words, said = distances(plain, held[label]), distances(
            draw(base, describe(base, seen[label]), args.n), held[label]
        )  # fmt: skip
        print(f"  {label}: floor {floor} at n = {half}; best plain prompt: {prompt}", flush=True)
        near = distances(made[label][:half], held[label][half:])  # as many as in the floor
        yield ratio(f"{label}: FD of TI against the floor", near["FD"], floor["FD"], 3)
        yield from other_views(f"{label}: TI against the floor", near, floor)
        yield ratio(f"{label}: FD of TI against plain words", ti["FD"], words["FD"], 0.5)
        yield below(f"{label}: FD of TI under the described mean's", ti["FD"], said["FD"])
        yield ratio(
            f"{label}: layout of TI against plain words", ti["layout"], words["layout"], 0.1
        )
        yield below(f"{label}: layout of TI under described's", ti["layout"], said["layout"])
    train, val, test = (
        Cases.of(*part.values(), classes=tuple(part)) for part in (made, seen, held)
    )
    runs = []
    for seed in range(args.runs):
        settings = ClassifierSettings.preset("tiny", seed=seed)
        runs.append(train_classifier(train, val, settings).test(test)[1].value)
    name = f"trained on {len(train)} generated images"
    mean = float(np.mean(runs))
    yield at_least(f"classifier {name}, real patients: AUC of {len(runs)} runs", mean, 0.88)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(compute_features(train.images, NETWORK), train.labels)
    scores = probe.decision_function(compute_features(test.images, NETWORK))
    yield at_least(
        f"linear probe {name}, real patients: AUC", compute_auc(test.labels.numpy(), scores), 0.75
    )


def run_limits(base: Base, args: argparse.Namespace) -> Iterator[Row]:
    """No bar: how far phantoms come out when noise is added to them and taken away again.

    Without noise it is the autoencoder alone, with all of it a sample from the word alone: where
    the distance rises is where the U-Net loses it.
    """
    sigmas, timesteps = make_sigmas(base.alphas_cumprod, 25)
    for kind, label in (("prostate", "tumour"), ("chest", "healthy"), ("histology", "normal")):
        word = load_trained(kind, label, base)
        a, b = (draw_phantoms(kind, label, args.n, split) for split in ("val", "test"))
        floor = distances(a, b)
        condition = Condition.encode(base, word.token, word, "", 2.0)
        for start in (25, 23, 20, 16, 12, 8, 0):
            made = []
            for first in range(0, len(a), BATCH):
                x = base.encode(a[first : first + BATCH])
                noises = draw_noises(range(first, first + len(x)), x.shape[1:], base.device)
                if start < 25:
                    x = x * (start > 0) + sigmas[start] * next(noises)
                    x = denoise(base, x, sigmas[start:], timesteps[start:], condition, noises)
                made.append(base.decode(x))
            found = distances(torch.cat(made), b)
            t = float(timesteps[start]) if start < 25 else 0.0
            for distance in ("FD", "layout"):
                value = found[distance]
                yield {
                    "name": f"{kind} {label}: {distance} after noise of t = {t:.0f}",
                    "kind": kind, "distance": distance, "t": t, "value": value,
                    "beside": floor[distance],
                }  # fmt: skip


BARS: dict[str, Callable[[Base, argparse.Namespace], Iterator[Row]]] = {
    "autoencoder": run_autoencoder,
    "inversion": run_inversion,
    "trends": run_trends,
    "disease": run_disease,
    "axis": run_axis,
    "xrays": run_xrays,
    "limits": run_limits,
}


def main() -> None:
    """Print every bar's rows and write them where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bars", nargs="*", metavar="BAR", help=f"of {', '.join(BARS)}; all")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--n-prompt", type=int, default=40, help="images to choose a prompt by")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5, help="classifiers of the bar `xrays`")
    parser.add_argument("--steps", type=int, help="TI steps where it trains; default the preset's")
    parser.add_argument("--real", type=Path, help="folder with normal/ and pneumonia/")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--store", type=Path, help="folder of words learned and images drawn")
    parser.add_argument(
        "--go-on", action="store_true", help="leave out bars recorded with this --store"
    )
    args = parser.parse_args()
    unknown = sorted(set(args.bars) - set(BARS))
    if unknown:
        parser.error(f"unknown bar {', '.join(unknown)}; allowed are {', '.join(BARS)}")
    if args.go_on and not (args.out and args.store):
        parser.error("--go-on needs the --out and the --store of the run that it goes on with")
    STORE[:] = [args.store] if args.store else []
    base = load_base("tiny")
    values: dict[str, Any] = {}
    if args.out:
        try:
            values = load_result(args.out.stem, base_hash=base.hash, folder=args.out.parent)
        except FileNotFoundError:
            pass
        except StaleResultError as error:
            print(f"its rows are dropped: {error}")
    recorded = {name: args.store / f"{name}.recorded" for name in BARS if args.store}
    bars = args.bars or list(BARS)
    for name in bars if recorded and not args.go_on else ():
        recorded[name].unlink(missing_ok=True)
    for name in bars:
        if args.go_on and name in values and recorded[name].exists():
            print(f"{name}: recorded already")
            continue
        rows = []
        print(f"{name}", flush=True)
        for row in BARS[name](base, args):
            rows.append(row | {"n": args.n})
            met = {True: "met", False: "NOT met"}.get(row.get("met"), "")
            print(
                f"  {row['name']:<58}{row['value']:>9.3g}  {row.get('bar', ''):<18}{met}",
                flush=True,
            )
        if args.out:
            values |= {name: rows}
            write_result(
                args.out.stem,
                values,
                command=make_command(values, args),
                base_hash=base.hash,
                folder=args.out.parent,
            )
            if recorded:
                args.store.mkdir(parents=True, exist_ok=True)
                write_text(recorded[name], "")


def make_command(values: dict[str, list[Row]], args: argparse.Namespace) -> str:
    """Return the lines that make `values` again: one for each number of images."""
    bars: dict[int, list[str]] = {}
    for name, rows in values.items():
        bars.setdefault(rows[0]["n"], []).append(name)
    options = f"--n-prompt {args.n_prompt} --seeds {args.seeds} --out results/{args.out.name}"
    lines = []
    for n, names in bars.items():
        seen = [row["name"] for name in names for row in values[name]]
        needed = "xrays" in names or any(name.startswith("X-rays") for name in seen)
        real = " --real FOLDER" if needed else ""
        lines.append(f"python benchmarks/tiny_base.py {' '.join(names)} --n {n}{real} {options}")
    return "; ".join(lines)


if __name__ == "__main__":
    main()
