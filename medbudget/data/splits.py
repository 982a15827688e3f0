"""Split patients: the same on every machine, and unmoved by new patients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

SPLITS = ("train", "val", "test")


def shuffle(names: Iterable[str], *, seed: int = 0) -> list[str]:
    """Order names by a hash of seed and name.

    The order depends on nothing else: neither on the machine, nor on the order given, nor on which
    other names there are, so that new patients do not move the old ones.
    """

    def key(name: str) -> tuple[bytes, str]:  # file names may be of no known encoding
        return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest(), name

    return sorted(names, key=key)


def join_patients(groups: Iterable[Iterable[str]]) -> dict[str, str]:
    """Join patients who share an image: each of them to the one that stands for all.

    Patients who share nothing with anybody are left out.
    """
    parents: dict[str, str] = {}

    def find(patient: str) -> str:
        while (above := parents.get(patient, patient)) != patient:
            patient = above
        return patient

    for group in groups:
        roots = sorted({find(patient) for patient in group})
        for patient in group:
            parents.setdefault(patient, patient)
        for root in roots[1:]:
            parents[root] = roots[0]
    return {patient: find(patient) for patient in parents}


def choose_one_per_patient(
    patients: Mapping[str, str], labels: Mapping[str, str], *, seed: int = 0
) -> dict[str, str]:
    """Choose one image (or study) for each patient.

    A patient with images of several labels counts for the label that the fewest patients have.

    Parameters
    ----------
    patients, labels : mapping of str to str
        Image name to patient and to label, with the same keys.

    Returns
    -------
    dict of str to str
        Patient to the name of the image chosen.
    """
    of_label: dict[str, set[str]] = {}
    names: dict[str, list[str]] = {}
    for name, patient in patients.items():
        of_label.setdefault(labels[name], set()).add(patient)
        names.setdefault(patient, []).append(name)
    rank = {label: (len(having), label) for label, having in of_label.items()}
    chosen = {}
    for patient, theirs in names.items():
        label = min((labels[name] for name in theirs), key=rank.__getitem__)
        chosen[patient] = shuffle((n for n in theirs if labels[n] == label), seed=seed)[0]
    return chosen


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
        Share out what there is, in the proportions wanted, instead of raising.

    Returns
    -------
    splits : dict of str to str
        Patient to split. Each patient stands in one.
    left : dict of str to list of str
        Label to the patients that remain, in the order in which they would have been taken.

    Raises
    ------
    ValueError
        Fewer patients than wanted; the message says how many there are of each label.

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
            "too few patients: " + "; ".join(short) + "; ask for fewer (--per-class), or share out "
            "what there is (--allow-fewer)"
        )
    return splits, left


def split_in_proportion(
    labels: Mapping[str, str], proportions: Mapping[str, float], *, seed: int = 0
) -> dict[str, str]:
    """Deal all patients out in given proportions, label by label.

    Every split gets at least one patient of each label.

    Raises
    ------
    ValueError
        A label with fewer patients than there are splits, or proportions that are not positive.
    """
    if not proportions or min(proportions.values()) <= 0:
        raise ValueError(f"proportions must be above 0, got {dict(proportions)}")
    counts: dict[str, int] = {}
    for label in labels.values():
        counts[label] = counts.get(label, 0) + 1
    few = {label: n for label, n in sorted(counts.items()) if n < len(proportions)}
    if few:
        shown = ", ".join(f"{label!r}: {n}" for label, n in list(few.items())[:5])
        raise ValueError(
            f"{len(proportions)} splits by patient need at least {len(proportions)} patients of "
            f"each class; found {shown}. Join classes, add patients, or ask for fewer splits. (Is "
            "this one folder for each patient? Then name the classes in a CSV file.)"
        )
    sizes: dict[str, dict[str, int]] = {split: {} for split in proportions}
    for label, n in counts.items():
        parts = share(n - len(proportions), list(proportions.values()))
        for split, part in zip(proportions, parts):
            sizes[split][label] = 1 + part
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

    Parameters
    ----------
    splits : mapping of str to str
        Patient to split, of this label.
    left : sequence of str
        Patients of this label in no split.
    disjoint : bool
        Take only from `left`, which may be fewer than `n`. Else fill up with patients of the test,
        the validation and, last, the training split.

    Returns
    -------
    chosen : dict of str to str
        Patient to the split that it also stands in, or to "".
    notes : list of str
        What the reader should know: fewer than wanted, or how many stand in which split too.

    Raises
    ------
    ValueError
        Fewer than `n` patients although they may overlap, or none left for a disjoint set.
    """
    if n < 1:
        raise ValueError(f"a reference set needs at least 1 patient, got {n}")
    chosen = dict.fromkeys(left[:n], "")
    if disjoint and not chosen:
        raise ValueError(
            "no patient is left for a disjoint reference set: ask for smaller splits "
            "(--per-class), or let it overlap (--overlap)"
        )
    if not disjoint:
        for split in reversed(SPLITS):
            mine = [p for p, own in splits.items() if own == split]
            chosen |= dict.fromkeys(mine[: n - len(chosen)], split)
        if len(chosen) < n:
            raise ValueError(f"a reference of {n} patients is wanted, there are {len(chosen)}")
    notes = []
    if len(chosen) < n:
        notes.append(
            f"the reference set has {len(chosen)} of {n} patients: no more are left outside the "
            "splits (--overlap would take them from there)"
        )
    shared = {split: sum(s == split for s in chosen.values()) for split in SPLITS}
    if any(shared.values()):
        listed = ", ".join(f"{count} with {split}" for split, count in shared.items() if count)
        notes.append(f"the reference set shares patients: {listed}; see the manifest's notes")
    return chosen, notes
