"""The axis from healthy to diseased as a study: what it shares, and scores that can be checked."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from medbudget import make_phantoms
from medbudget.metrics import disease_score
from medbudget.studies import Store, in_order, make_study
from medbudget.studies.tasks import ensure


@pytest.fixture(scope="module")
def study():
    return make_study("interpolation", "tiny", base_hash="0" * 12)


def test_ends_are_shared_by_axes_and_with_table1(study):
    kinds = [task.kind for task in in_order(study.tasks)]
    # 8 classes; 64 images are 4 blocks: 3 healthy ends, 5 diseased ends, 3 shares between for
    # each, and all of it at two CFG scales
    assert kinds.count("word") == 8
    assert kinds.count("block") == 2 * 4 * (3 + 5 + 5 * 3)
    shares = [row.value for row in study.rows if row.group == "tumour, CFG 2"]
    assert shares == [0, 0.25, 0.5, 0.75, 1]
    other = make_study("table1", "tiny", base_hash="0" * 12)
    healthy = next(row for row in study.rows if (row.group, row.value) == ("tumour, CFG 2", 0))
    final = next(row for row in other.rows if row.compare is None)
    assert [t.key for t in healthy.images] == [t.key for t in final.images]


def test_prompts_name_both_words_with_weights_that_sum_to_one(study):
    row = next(row for row in study.rows if (row.group, row.value) == ("pneumonia, CFG 5", 0.25))
    block = row.images[0]
    assert block.settings["prompt"] == "<healthy>:0.75 AND <disease>:0.25"
    assert block.settings["cfg_scale"] == 5
    assert block.settings["tokens"] == ["<healthy>", "<disease>"]
    labels = [word.settings["label"] for word in block.inputs]
    assert labels == ["healthy", "pneumonia"]


def test_scores_and_rise_are_those_of_the_images(study, tmp_path):
    """Phantoms in place of generated images: the healthy ones at 0, the diseased ones at 1."""
    store = Store(tmp_path)
    rows = [
        row for row in study.rows if row.group == "metastasis, CFG 2" and row.value in (0, 0.25)
    ]
    images = {}
    for row, label in zip(rows, ("normal", "metastasis")):
        images[label] = make_phantoms("histology", label, 64, split="val").images
        for i, task in enumerate(row.images):
            store.path(task).parent.mkdir(exist_ok=True)
            save_file({"images": images[label][16 * i : 16 * i + 16]}, store.path(task))
    wanted = [rows[0].score, rows[1].score, rows[1].compare]
    assert [ensure(task, store) for task in wanted] == [1, 1, 1]
    low, high, rise = (json.loads(store.path(task).read_text("utf-8")) for task in wanted)
    scores = {label: disease_score(made, "histology") for label, made in images.items()}
    assert low["disease score"]["value"] == pytest.approx(scores["normal"].mean())
    assert low["disease score"]["value"] < 0 < high["disease score"]["value"]
    steps = scores["metastasis"] - scores["normal"]
    assert rise["difference"] == pytest.approx(steps.mean()) and rise["p_value"] < 1e-6
