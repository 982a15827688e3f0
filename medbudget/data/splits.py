"""Split patients: the same on every machine, and unmoved by new patients."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

SPLITS = ("train", "val", "test")
T = TypeVar("T")


def shuffle(names: Iterable[str], *, seed: int = 0) -> list[str]:
    """Order names by a hash of seed and name alone, so that new patients do not move the old ones."""

    def key(name: str) -> tuple[bytes, str]:  # file names may be of no known encoding
        return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest(), name

    return sorted(names, key=key)


def join_patients(groups: Iterable[Iterable[str]]) -> dict[str, str]:
    """Map each patient who shares an image to the one who stands for all who share it."""
    parents: dict[str, str] = {}

    def find(patient: str) -> str:
        while parents.setdefault(patient, patient) != patient:
            patient = parents[patient]
        return patient

    for group in groups:
        first, *rest = sorted({find(patient) for patient in group})
        parents |= dict.fromkeys(rest, first)
    return {patient: find(patient) for patient in [*parents]}


def choose_one_per_patient(
    patients: Mapping[str, str], labels: Mapping[str, str], *, seed: int = 0
) -> dict[str, str]:
    """Choose one image (or study) for each patient: patient to its name.

    `patients` and `labels` map an image's name to its patient and label; see `stratify`.
    """
    strata = stratify((patient, labels[name]) for name, patient in patients.items())
    names: dict[str, list[str]] = {}
    for name, patient in patients.items():
        if labels[name] == strata[patient]:
            names.setdefault(patient, []).append(name)
    return {patient: shuffle(theirs, seed=seed)[0] for patient, theirs in names.items()}


def stratify(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Patient to label, from pairs of both; of several, the label that the fewest patients have."""
    having: dict[str, set[str]] = {}
    for patient, label in pairs:
        having.setdefault(label, set()).add(patient)
    strata: dict[str, str] = {}
    for label in sorted(having, key=lambda one: (len(having[one]), one)):
        strata = dict.fromkeys(having[label], label) | strata
    return strata


def split_patients(
    labels: Mapping[str, str],
    sizes: Mapping[str, Mapping[str, int]],
    *,
    seed: int = 0,
    allow_fewer: bool = False,
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Deal patients out to splits, label by label.

    Parameters
    ----------
    labels : mapping of str to str
        Patient to label.
    sizes : mapping of str to mapping of str to int
        Split to label to the number of patients wanted: ``{"train": {"positive": 100}}``.
    allow_fewer : bool
        Share out what there is, in the proportions wanted, instead of raising ValueError.

    Returns
    -------
    splits : dict of str to str
        Patient to split.
    left : dict of str to list of str
        Label to the patients that remain, in the order in which they would have been taken.

    Examples
    --------
    >>> labels = {"ann": "healthy", "bob": "healthy", "cem": "tumour", "dora": "tumour"}
    >>> sizes = {"train": {"healthy": 1, "tumour": 1}, "test": {"healthy": 1, "tumour": 1}}
    >>> splits, left = split_patients(labels, sizes, seed=1)
    >>> sorted(splits), sorted(splits.values())
    (['ann', 'bob', 'cem', 'dora'], ['test', 'test', 'train', 'train'])
    """
    queues = {
        label: shuffle((p for p, own in labels.items() if own == label), seed=seed)
        for label in sorted({*labels.values(), *(one for part in sizes.values() for one in part)})
    }
    splits: dict[str, str] = {}
    left: dict[str, list[str]] = {}
    short = []
    for label, queue in queues.items():
        wanted = {split: part.get(label, 0) for split, part in sizes.items()}
        total = sum(wanted.values())
        if total > len(queue):
            parts = " + ".join(f"{n} {split}" for split, n in wanted.items() if n)
            short.append(f"{label}: {total} patients wanted ({parts}), there are {len(queue)}")
            wanted = dict(zip(wanted, share(len(queue), list(wanted.values()))))
        for split, n in wanted.items():
            splits |= dict.fromkeys(queue[:n], split)
            queue = queue[n:]
        left[label] = queue
    if short and not allow_fewer:
        raise ValueError(
            f"too few patients: {'; '.join(short)}; ask for fewer (--per-class, --allow-fewer)"
        )
    return splits, left


def split_in_proportion(
    labels: Mapping[str, str], proportions: Mapping[str, float], *, seed: int = 0
) -> dict[str, str]:
    """Deal all patients out in given proportions, label by label, at least one to every split."""
    if min(proportions.values()) <= 0:
        raise ValueError(f"proportions must be above 0, got {dict(proportions)}")
    counts = Counter(labels.values())
    few = [f"{label!r}: {n}" for label, n in sorted(counts.items()) if n < len(proportions)]
    if few:
        raise ValueError(
            f"{len(proportions)} splits by patient need at least {len(proportions)} patients of "
            f"each class; found {', '.join(few[:5])}. Join classes, add patients, or ask for fewer "
            "splits. (Are folders patients, not classes? Name the classes in a CSV file.)"
        )
    sizes: dict[str, dict[str, int]] = {split: {} for split in proportions}
    for label, n in counts.items():
        for split, more in zip(sizes, share(n - len(proportions), [*proportions.values()])):
            sizes[split][label] = 1 + more
    return split_patients(labels, sizes, seed=seed)[0]


def share(n: int, weights: Sequence[float]) -> list[int]:
    """Share n out in whole numbers, in proportion to the weights (largest remainder)."""
    total = sum(weights)
    exact = [n * weight / total if total else 0.0 for weight in weights]
    parts = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: n - sum(parts) if total else 0]:
        parts[i] += 1
    return parts


def choose_reference(
    splits: Mapping[str, str], left: Sequence[str], n: int, *, disjoint: bool = True
) -> tuple[dict[str, str], list[str]]:
    """Choose up to `n` patients of one label as a reference set for distances.

    `splits` maps patients to their split, `left` has those in none. A disjoint set takes only from
    `left`, which may be fewer than `n`; else it fills up with patients of the test, the validation
    and, last, the training split. Returns patient to a note on the split that it stands in too, or
    to "", and notes on what is fewer or shared.
    """
    chosen = dict.fromkeys(left[:n], "")
    for split in () if disjoint else reversed(SPLITS):
        mine = [p for p, own in splits.items() if own == split]
        chosen |= dict.fromkeys(mine[: n - len(chosen)], f"also in {split}")
    if not chosen or (len(chosen) < n and not disjoint):
        raise ValueError(
            f"a reference of {n} patients is wanted, there are {len(chosen)}: ask for fewer, for "
            "smaller splits (--per-class), or let it overlap with them (--overlap)"
        )
    notes = []
    if len(chosen) < n:
        notes.append(
            f"the reference set has {len(chosen)} of {n} patients: no more are left outside the "
            "splits (--overlap would take them from there)"
        )
    shared = Counter(note.removeprefix("also in ") for note in chosen.values() if note)
    if shared:
        listed = ", ".join(f"{shared[split]} with {split}" for split in SPLITS if shared[split])
        notes.append(f"the reference set shares patients: {listed}; see the manifest's notes")
    return chosen, notes


def choose_cases(
    patients: Mapping[str, str],
    labels: Mapping[str, str],
    sizes: Mapping[str, Mapping[str, int]],
    item: Callable[[str, str, str], T],
    *,
    seed: int,
    allow_fewer: bool,
    reference: int,
    healthy: str,
    disjoint: bool,
) -> tuple[list[T], dict[str, list[T]], list[str]]:
    """Choose one image a patient, split the patients, and choose a reference set of healthy ones.

    ``item(name, split, note)`` makes an entry; the note names a split that it stands in too.
    Returns the items, label to spare items of no split, and notes.
    """
    chosen = choose_one_per_patient(patients, labels, seed=seed)
    own = {patient: labels[name] for patient, name in chosen.items()}
    splits, left = split_patients(own, sizes, seed=seed, allow_fewer=allow_fewer)
    items = [item(chosen[patient], split, "") for patient, split in splits.items()]
    notes: list[str] = []
    if reference:
        mine = {patient: split for patient, split in splits.items() if own[patient] == healthy}
        extra, notes = choose_reference(mine, left[healthy], reference, disjoint=disjoint)
        items += [item(chosen[patient], "reference", other) for patient, other in extra.items()]
        left[healthy] = [patient for patient in left[healthy] if patient not in extra]
    spares = {label: [item(chosen[p], "", "") for p in queue] for label, queue in left.items()}
    return items, spares, notes
