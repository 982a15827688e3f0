"""What the data chapters teach is what the library does."""

from __future__ import annotations

import ast
import json

import numpy as np
import torch
from test_notebooks import ROOT, cells, equation, tags

from medbudget.data.resample import quantise


def test_window_is_the_librarys() -> None:
    apply_window = equation("apply_window")
    values = np.random.default_rng(0).normal(100, 80, (40, 40)).astype(np.float32)
    ours = apply_window(torch.from_numpy(values).double(), 20.0, 180.0).numpy()
    assert np.array_equal(ours, quantise(values, 20.0, 180.0, "t2w"))
    by_hand = apply_window(torch.tensor([-5.0, 0.0, 2.5, 10.0, 99.0]), 0.0, 10.0)
    assert by_hand.tolist() == [0, 0, 64, 255, 255]


def test_the_plan_uses_measured_times() -> None:
    (cell,) = [
        c for c in cells(ROOT / "notebooks" / "12_gpu_and_cluster.ipynb", "code")
        if "parameters" in tags(c)
    ]  # fmt: skip
    values = {
        node.targets[0].id: ast.literal_eval(node.value)  # type: ignore[attr-defined]
        for node in ast.parse(cell.source).body
    }
    gpu = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text(encoding="utf-8"))
    minutes = gpu["goals"]["50,000 steps at batch 1, minutes"]["measured"]
    (batch,) = [
        row["ms"] for row in gpu["rows"]
        if row["name"] == "sampling: ours, eager, a batch of 100 steps" and row["batch"] == 16
    ]  # fmt: skip
    assert values["minutes_per_word"] == minutes
    assert round(batch / 16 / 1000, 2) == values["seconds_per_image"]
