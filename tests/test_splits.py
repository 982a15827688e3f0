"""No patient stands in two splits, and who stands where depends on seed and name alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medbudget.data.splits import (
    choose_one_per_patient,
    choose_reference,
    share,
    shuffle,
    split_in_proportion,
    split_patients,
)

SIZES = {"train": {"a": 3, "b": 2}, "val": {"a": 2, "b": 2}, "test": {"a": 2}}
PEOPLE = {f"p{i:02d}": "ab"[i % 2] for i in range(30)}


def test_sizes_are_those_asked_for_and_no_patient_stands_twice() -> None:
    splits, left = split_patients(PEOPLE, SIZES)
    for split, wanted in SIZES.items():
        for label in "ab":
            mine = [p for p, s in splits.items() if s == split and PEOPLE[p] == label]
            assert len(mine) == wanted.get(label, 0)
    everyone = [*splits, *left["a"], *left["b"]]
    assert sorted(everyone) == sorted(PEOPLE)


def test_same_seed_same_selection_whatever_the_order_and_whoever_else_there_is() -> None:
    names = list(PEOPLE)
    random.Random(1).shuffle(names)
    assert split_patients({n: PEOPLE[n] for n in names}, SIZES) == split_patients(PEOPLE, SIZES)
    assert split_patients(PEOPLE, SIZES, seed=1) != split_patients(PEOPLE, SIZES)
    more = [n for n in shuffle([*PEOPLE, "new"]) if n != "new"]
    assert more == shuffle(PEOPLE)
    # by `printf 0/p00 | sha256sum`: this order must never change, on any machine
    assert shuffle(["p00", "p01", "p02", "p03"]) == ["p01", "p02", "p00", "p03"]


def test_too_few_patients_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"b: 40 patients wanted \(40 train\), there are 15"):
        split_patients(PEOPLE, {"train": {"a": 3, "b": 40}})
    splits, left = split_patients(PEOPLE, {"train": {"b": 40}, "val": {"b": 20}}, allow_fewer=True)
    assert sum(s == "train" for s in splits.values()) == 10
    assert sum(s == "val" for s in splits.values()) == 5
    assert left["b"] == [] and len(left["a"]) == 15


@given(st.integers(0, 500), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_share_adds_up_and_stays_within_one_of_exact(n: int, weights: list[int]) -> None:
    parts = share(n, weights)
    assert sum(parts) == n
    for part, weight in zip(parts, weights):
        assert abs(part - n * weight / sum(weights)) < 1


def test_proportions_use_everybody_and_leave_no_split_empty() -> None:
    splits = split_in_proportion(PEOPLE, {"train": 0.6, "val": 0.2, "test": 0.2})
    assert set(splits) == set(PEOPLE)
    for label in "ab":
        counts = [
            sum(splits[p] == s for p in PEOPLE if PEOPLE[p] == label)
            for s in ("train", "val", "test")
        ]
        assert sum(counts) == 15 and min(counts) >= 1 and counts[0] > counts[1]
    three = split_in_proportion(
        dict.fromkeys("xyz", "c"), {"train": 0.9, "val": 0.05, "test": 0.05}
    )
    assert sorted(three.values()) == ["test", "train", "val"]
    with pytest.raises(ValueError, match="at least 3 patients"):
        split_in_proportion(dict.fromkeys("xy", "c"), {"train": 1, "val": 1, "test": 1})


def test_one_image_per_patient_of_their_rarest_label() -> None:
    patients = {"1a": "1", "1b": "1", "2a": "2", "3a": "3"}
    labels = {"1a": "common", "1b": "rare", "2a": "common", "3a": "common"}
    assert choose_one_per_patient(patients, labels) == {"1": "1b", "2": "2a", "3": "3a"}
    same = {name: "common" for name in labels}
    seeds = {choose_one_per_patient(patients, same, seed=s)["1"] for s in range(20)}
    assert seeds == {"1a", "1b"}


def test_reference_is_disjoint_or_lists_the_overlap() -> None:
    splits = {"t1": "train", "t2": "train", "v": "val", "e": "test"}
    chosen, (note,) = choose_reference(splits, ["x", "y"], 5)
    assert chosen == {"x": "", "y": ""} and "has 2 of 5 patients" in note
    assert choose_reference(splits, ["x", "y"], 2) == ({"x": "", "y": ""}, [])
    chosen, (note,) = choose_reference(splits, ["x", "y"], 5, disjoint=False)
    assert chosen == {
        "x": "",
        "y": "",
        "e": "also in test",
        "v": "also in val",
        "t1": "also in train",
    }
    assert "1 with train, 1 with val, 1 with test" in note
    with pytest.raises(ValueError, match="there are 0"):
        choose_reference(splits, [], 5)
    with pytest.raises(ValueError, match="there are 6"):
        choose_reference(splits, ["x", "y"], 9, disjoint=False)
