"""Scores and `evaluate`: never bare, always beside the floor."""

import json

import numpy as np
import pytest
import torch

from medbudget import metrics
from medbudget.metrics import Score, evaluate


def blobs(n, *, seed, shift=0, size=32):
    """Bright squares in random places on noise: cheap images with a layout."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (n, 3, size, size))
    for image in images:
        row, column = rng.integers(2, 12, 2)
        image[:, row + shift : row + shift + 8, column : column + 8] += 150
    return torch.from_numpy(images.astype(np.uint8))


def layout(*sets, **options):
    return evaluate(*sets, features="layout", **options)


def test_scores_print_all_that_they_depend_on_and_each_note_once():
    a = Score("FD (X)", 123.44, (110.2, 136.91), 100, "X", "abc", "bilinear", note="caveat; alone")
    b = Score("C_T", -2.5, None, (5, 7), "X", "abc", "bilinear", "paper", "caveat")
    assert str(a) == "FD (X) 123.4 [110.2, 136.9], n = 100; X abc, bilinear; caveat; alone"
    assert str(b) == "C_T -2.5, n = 5 vs 7; X abc, bilinear; normalisation: paper; caveat"
    assert metrics.format_table([a, b]).splitlines() == [
        "score   value  95 % interval   n       notes",
        "FD (X)  123.4  110.2 to 136.9  100     1, 2",
        "C_T      -2.5                  5 vs 7  1",
        "features: X abc, bilinear, normalisation none",
        "features: X abc, bilinear, normalisation paper",
        "1: caveat",
        "2: alone",
    ]


def test_table_and_json_keep_everything(tmp_path):
    scores = layout(blobs(12, seed=0), blobs(6, seed=1))
    table = metrics.to_table(scores)
    assert list(table["value"]) == [s.value for s in scores]
    assert list(table["low"]) == [s.interval[0] for s in scores]
    back = json.loads(metrics.to_json(scores, tmp_path / "scores.json"))
    assert back == json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert back[0]["interval"] == list(scores[0].interval)
    assert back[0]["extractor_hash"] == scores[0].extractor_hash != ""
    assert len(metrics.to_table([])) == 0


def test_a_shifted_layout_is_above_its_floor_and_a_true_sample_is_not():
    real = blobs(120, seed=0)
    shifted, floor = layout(real, blobs(60, seed=1, shift=12))
    assert shifted.interval[0] > floor.interval[1]
    good, floor = layout(real, blobs(60, seed=2))
    assert good.value < 1.25 * floor.value
    assert good.n == floor.n == 60


def test_the_table_has_every_score_and_its_floor():
    scores = evaluate(blobs(16, seed=0), blobs(8, seed=1))
    assert [s.name for s in scores] == [
        "FD (EfficientNet-Lite0)",
        "FD (EfficientNet-Lite0), real vs real",
        "Kernel distance (EfficientNet-Lite0)",
        "Precision",
        "Recall",
        "Layout distance",
        "Layout distance, real vs real",
    ]
    for s in scores:
        assert s.interval[0] <= s.value <= s.interval[1] and s.n == 8
        assert s.extractor_hash and s.resize
    assert abs(scores[2].value) < 3 * (scores[2].interval[1] - scores[2].value)


def test_train_adds_memorisation_and_says_what_was_left_out():
    train, fresh = blobs(30, seed=0), blobs(120, seed=1)
    copies = torch.cat([train[:10], blobs(10, seed=2)])
    scores = layout(torch.cat([train[:5], fresh]), copies, train=train)
    share = next(s for s in scores if s.name == "Copied share (pixels)")
    assert 0.5 <= share.value <= 0.6 and share.interval[0] > 0.01
    assert "5 real images that are training images left out" in share.note
    assert "120 held-out" in share.note
    with pytest.raises(ValueError, match="also a training image"):
        layout(train, copies, train=train)


def test_permutation_adds_a_p_value_per_extractor():
    real, made = blobs(60, seed=0), blobs(30, seed=1)
    *_, test = layout(real, made, permutation=blobs(30, seed=2, shift=12), repeats=99)
    assert test.name == "Layout distance, difference to the other set"
    assert test.value < 0 and "p = 0.01 (99 permutations)" in test.note
    *_, test = layout(real, made, permutation=made, paired=True, repeats=99)
    assert test.value == pytest.approx(0, abs=1e-6)
    assert "p = 1 (99 paired permutations)" in test.note


def test_the_papers_normalisation_is_said():
    sets = blobs(8, seed=0), blobs(4, seed=1)
    (paper,) = layout(*sets, normalize="paper", floor=False)
    assert paper.normalisation == "paper" and "blind to darkness" in str(paper)


def test_n_is_lowered_for_both_and_said():
    sets = blobs(21, seed=0), blobs(30, seed=1)
    scores = layout(*sets)
    assert {s.n for s in scores} == {10}
    assert "n is half of the 21 real images" in scores[0].remark
    (whole,) = layout(*sets, floor=False)
    assert whole.n == (21, 30) and "lowered" not in whole.note


def test_the_floor_uses_disjoint_images():
    # with every real image distinct, a shared image would make the floor of 2 sets of 2 images 0
    real = blobs(4, seed=3)
    for seed in range(5):
        _, floor = layout(real, real[:2], seed=seed)
        assert floor.value > 0


def test_too_few_images_and_other_types():
    with pytest.raises(ValueError, match="3 real and 5 synthetic images are too few"):
        layout(blobs(3, seed=0), blobs(5, seed=1))
    with pytest.raises(ValueError, match="too few"):
        layout(blobs(30, seed=0), blobs(1, seed=1))
    with pytest.raises(TypeError, match="synthetic"):
        layout(blobs(4, seed=0), blobs(4, seed=1).float())
