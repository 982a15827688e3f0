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


def test_score_prints_all_that_it_depends_on():
    score = Score(
        "FD (X)", 123.44, (110.2, 136.91), 100, "X", "abc123", "bilinear to 8x8", "paper", "a note"
    )
    text = str(score)
    assert text == (
        "FD (X) 123.4 [110.2, 136.9], n = 100; X abc123, bilinear to 8x8; "
        "normalisation: paper; a note"
    )
    assert "n = 5 vs 7" in str(Score("a", 1.0, None, (5, 7)))


def test_distance_names():
    assert metrics.load_extractor("layout").distance_name == "Layout distance"
    assert metrics.load_extractor("efficientnet-lite0").distance_name == "FD (EfficientNet-Lite0)"


def test_table_and_json_keep_everything(tmp_path):
    scores = evaluate(blobs(12, seed=0), blobs(6, seed=1), features="layout")
    table = metrics.to_table(scores)
    assert list(table["value"]) == [s.value for s in scores]
    assert list(table["low"]) == [s.interval[0] for s in scores]
    path = tmp_path / "scores.json"
    back = json.loads(metrics.to_json(scores, path))
    assert back == json.loads(path.read_text(encoding="utf-8"))
    assert back[0]["interval"] == list(scores[0].interval)
    assert back[0]["extractor_hash"] == scores[0].extractor_hash != ""
    assert len(metrics.to_table([])) == 0


def test_the_printed_table_says_each_note_once():
    a = Score("FD (X)", 123.44, (110.2, 136.91), 100, "X", "abc", "bilinear", note="caveat; alone")
    b = Score("C_T", -2.5, None, (5, 7), "X", "abc", "bilinear", note="caveat")
    assert metrics.format_table([a, b]).splitlines() == [
        "score   value  95 % interval   n       notes",
        "FD (X)  123.4  110.2 to 136.9  100     1, 2",
        "C_T      -2.5                  5 vs 7  1",
        "features: X abc, bilinear, normalisation none",
        "1: caveat",
        "2: alone",
    ]


def test_a_shifted_layout_is_above_its_floor_and_a_true_sample_is_not():
    real = blobs(120, seed=0)
    shifted, floor = evaluate(real, blobs(60, seed=1, shift=12), features="layout")
    assert shifted.interval[0] > floor.interval[1]
    good, floor = evaluate(real, blobs(60, seed=2), features="layout")
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
    scores = evaluate(torch.cat([train[:5], fresh]), copies, features="layout", train=train)
    share = next(s for s in scores if s.name == "Copied share (pixels)")
    assert 0.5 <= share.value <= 0.6 and share.interval[0] > 0.01
    assert "5 real images that are training images left out" in share.note
    assert "120 held-out" in share.note
    with pytest.raises(ValueError, match="also a training image"):
        evaluate(train, copies, features="layout", train=train)


def test_permutation_adds_a_p_value_per_extractor():
    real = blobs(60, seed=0)
    scores = evaluate(
        real, blobs(30, seed=1), features="layout", permutation=blobs(30, seed=2, shift=12),
        repeats=99,
    )  # fmt: skip
    (test,) = [s for s in scores if "difference" in s.name]
    assert test.value < 0 and "p = 0.01 (99 permutations)" in test.note
    scores = evaluate(
        real, blobs(30, seed=1), features="layout", permutation=blobs(30, seed=1), paired=True,
        repeats=99,
    )  # fmt: skip
    (test,) = [s for s in scores if "difference" in s.name]
    assert (
        test.value == pytest.approx(0, abs=1e-6) and "p = 1 (99 paired permutations)" in test.note
    )


def test_paper_normalisation_is_said():
    scores = evaluate(blobs(8, seed=0), blobs(4, seed=1), features="layout", normalize="paper")
    assert scores[0].normalisation == "paper" and "blind to darkness" in str(scores[0])


def test_n_is_lowered_for_both_and_said():
    scores = evaluate(blobs(21, seed=0), blobs(30, seed=1), features="layout")
    assert {s.n for s in scores} == {10}
    assert "n lowered from 30 to 10" in scores[0].note
    (whole,) = evaluate(blobs(21, seed=0), blobs(30, seed=1), features="layout", floor=False)
    assert whole.n == (21, 30) and "lowered" not in whole.note


def test_the_floor_uses_disjoint_images():
    # with every real image distinct, a shared image would make the floor of 2 sets of 2 images 0
    real = blobs(4, seed=3)
    for seed in range(5):
        _, floor = evaluate(real, real[:2], features="layout", seed=seed)
        assert floor.value > 0


def test_too_few_images():
    with pytest.raises(ValueError, match="3 real and 5 synthetic images are too few"):
        evaluate(blobs(3, seed=0), blobs(5, seed=1), features="layout")
    with pytest.raises(ValueError, match="too few"):
        evaluate(blobs(30, seed=0), blobs(1, seed=1), features="layout")
    with pytest.raises(TypeError, match="synthetic"):
        evaluate(blobs(4, seed=0), blobs(4, seed=1).float())
