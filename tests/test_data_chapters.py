"""What the data chapters teach is what the library does."""

from __future__ import annotations

import numpy as np
import torch
from test_notebooks import equation

from medbudget.data.resample import quantise


def test_window_is_the_librarys() -> None:
    apply_window = equation("apply_window")
    values = np.random.default_rng(0).normal(100, 80, (40, 40)).astype(np.float32)
    ours = apply_window(torch.from_numpy(values).double(), 20.0, 180.0).numpy()
    assert np.array_equal(ours, quantise(values, 20.0, 180.0, "t2w"))
    by_hand = apply_window(torch.tensor([-5.0, 0.0, 2.5, 10.0, 99.0]), 0.0, 10.0)
    assert by_hand.tolist() == [0, 0, 64, 255, 255]
