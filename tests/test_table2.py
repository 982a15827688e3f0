"""Table 2 as a study: what is trained on what, and numbers that follow from the saved scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_studies import counts

from medbudget import make_phantoms, save_images
from medbudget.classifier import ClassifierSettings
from medbudget.metrics import bootstrap_auc, calibration, compute_auc
from medbudget.studies import (
    Store,
    StudySettings,
    count,
    in_order,
    make_study,
    run,
    study_settings,
    write_report,
)
from medbudget.studies.classifying import keep_agreed, read_part
from medbudget.studies.report import read_values
from medbudget.studies.table2 import PROBLEMS

SMALL = StudySettings.preset(
    "tiny", runs=2, many=32, some=8, steps=2, cases=8, few_cases=3, repeats=100,
    noise={"prostate": 10.0}, overrides={"steps": 2, "batch_size": 1},
    changes={"size": 32, "steps": 4, "batch_size": 8, "validate_every": 2, "frozen": 8},
)  # fmt: skip


def write_prostates(folder, cases=8):
    for split in ("train", "val", "test"):
        for name, label in (("negative", "healthy"), ("positive", "tumour")):
            images = make_phantoms("prostate", label, cases, split=split, seed=5).images
            save_images(images, folder / split / name)
    return {"prostate": folder}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table2")
    sources = write_prostates(folder / "prostate")
    study = make_study("table2", "tiny", base_hash=tiny.hash, sources=sources, settings=SMALL)
    store = study.store(folder / "store")
    assert run(study.tasks, store) == len(in_order(study.tasks))
    return study, store


def read_runs(row, store):
    return list(map(store.read_json, row.details.inputs))


def line(study, value):
    return next(row for row in study.rows if row.value == value)


def test_the_tiny_study_has_the_papers_lines_and_uses_shipped_words(tiny):
    study = make_study("table2", "tiny", base_hash=tiny.hash)
    # 7 + 2 lines of prostate, 2 of chest and of histology; 13 blocks of 16 for 200 images
    assert counts(study.tasks) == {
        "images": 18, "word": 8, "block": 8 * 13, "classifier": 13 * 5, "gain": 10, "auc": 13,
        "runs": 13,
    }  # fmt: skip
    assert [row.group for row in study.rows].count("prostate") == 9
    assert {row.value: dict(row.paper) for row in study.rows}["400 synthetic*"] == {
        "AUC": ".562 ± .036"
    }
    assert sum(bool(row.paper) for row in study.rows) == 11


def test_the_papers_own_study_has_its_numbers(tmp_path, tiny):
    sources = write_prostates(tmp_path, cases=2)
    with pytest.raises(ValueError, match=r"2 images for prostate/train/negative, 100 are needed"):
        make_study("table2", "paper", base_hash="0", sources=sources)
    settings = study_settings("table2", "paper", cases=2, few_cases=2)
    study = make_study("table2", "paper", base_hash="0", sources=sources, settings=settings)
    # 2 words (few cases are all here) of 1000 images in 63 blocks; 6 lines of 10 runs
    found = counts(study.tasks)
    assert found["block"] == 2 * 63 and found["embedding"] == 2 and found["classifier"] == 60
    runs = [t for t in in_order(study.tasks) if t.kind == "classifier"]
    assert all(t.settings["classifier"]["steps"] == 6250 for t in runs)
    with pytest.raises(ValueError, match="prostate=FOLDER"):
        make_study("table2", "paper", base_hash="0")


def test_every_score_of_every_case_in_every_run_is_kept_and_the_table_follows_from_them(finished):
    study, store = finished
    values = {row["value"]: row for row in read_values(study, store)["rows"]}
    real, more = (line(study, v) for v in ("16 real", "16 real + 32 synthetic"))
    own = np.array([r["scores"] for r in read_runs(more, store)])
    base = np.array([r["scores"] for r in read_runs(real, store)])
    assert own.shape == base.shape == (2, 16)
    labels = [0] * 8 + [1] * 8
    scores = values["16 real + 32 synthetic"]["scores"]
    assert scores["AUC"]["value"] == pytest.approx(compute_auc(labels, own))
    gain = bootstrap_auc(labels, own, base, repeats=100)
    assert scores["gain"]["value"] == pytest.approx(gain.value)
    assert scores["gain"]["interval"] == pytest.approx(list(gain.interval))
    compare = values["16 real + 32 synthetic"]["compare"]
    assert compare["p_value"] == gain.p_value and compare["delong"]["p_value"] > 0
    assert scores["ECE"]["value"] == calibration(labels, own).error
    runs = [compute_auc(labels, one) for one in own]
    assert scores["sd of runs"]["value"] == pytest.approx(np.std(runs, ddof=1))
    written = values["16 real + 32 synthetic"]["details"]["scores"]
    assert np.allclose([[float(x) for x in text.split()] for text in written], own, atol=5e-5)
    assert "gain" not in values["16 real"]["scores"]
    assert 0 <= values["16 real"]["scores"]["AUC on synthetic"]["value"] <= 1


def test_lines_differ_in_their_training_images_and_in_nothing_else(finished):
    study, _ = finished
    for row in study.rows:
        for seed, task in enumerate(row.details.inputs):
            assert task.settings["classifier"]["seed"] == seed
            held = [p for p in task.settings["parts"] if p[0] in ("val", "test")]
            assert held == [
                ["val", 0, 1, 8],
                ["val", 1, 1, 8],
                ["test", 0, 1, 8],
                ["test", 1, 1, 8],
            ]
    parts = line(study, "16 real + 8 synthetic").details.inputs[0].settings["parts"]
    trained = [(role, label, n) for role, label, _, n in parts if role in ("real", "synthetic")]
    assert trained == [("real", 0, 8), ("real", 1, 8), ("synthetic", 0, 4), ("synthetic", 1, 4)]
    both = {t.key for v in ("32 synthetic", "32 synthetic*") for t in line(study, v).details.inputs}
    assert len(both) == 4  # other words, other images


def test_the_filter_keeps_what_the_judges_agree_with(finished):
    study, store = finished
    labels = [0, 0, 1, 1]
    judged = [[0.1, 0.9, 0.9, 0.2], [0.3, 0.4, 0.6, 0.3]]
    assert keep_agreed(labels, judged).tolist() == [True, False, True, False]
    judges = read_runs(line(study, "16 real"), store)
    made = judges[0]["also"]["labels"]
    keep = keep_agreed(made, [j["also"]["scores"] for j in judges])
    filtered = line(study, "16 real + 32 synthetic, filtered")
    for one in read_runs(filtered, store):
        assert one["kept"] == [int(keep[:16].sum()), int(keep[16:].sum())]


def test_an_image_has_the_same_noise_wherever_it_is_used(finished):
    study, store = finished
    task = line(study, "32 synthetic").images[0]
    for size in (48, 64):  # noise is added at the size that the classifier sees
        seen = replace(ClassifierSettings.preset("tiny"), size=size)
        few, many = (read_part([task], n, 20.0, store, seen) for n in (3, 9))
        assert torch.equal(few, many[:3])
        clean = read_part([task], 9, 0.0, store, seen)
        assert clean.shape[-1] == size and 10 < (many.float() - clean.float()).std() < 21


def test_a_second_run_makes_nothing_and_the_report_shows_ours_beside_the_papers(finished, tmp_path):
    study, store = finished
    assert run(study.tasks, store) == 0
    page = write_report(study, store, tmp_path)
    text = (page.parent / "report.md").read_text(encoding="utf-8")
    assert "| images | trained on | AUC | sd of runs |" in text and "AUC (paper)" in text
    assert ".803 ± .009" in text and "missing" not in text
    assert "Noise was added" not in text, "noise is for phantoms: these images are real"
    assert "tested on 16 real images" in text


def test_changed_settings_train_again_and_keep_the_images(tiny, finished):
    _, store = finished
    settings = replace(SMALL, runs=3)
    sources = store.sources
    other = make_study("table2", "tiny", base_hash=tiny.hash, sources=sources, settings=settings)
    found = count(other.tasks, store)
    assert found["block"][0] == found["block"][1] and found["embedding"][0] == 4
    # a third run of each of 9 lines; the filtered ones have another jury
    assert found["classifier"][1] - found["classifier"][0] == 9 + 2


def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path):
    def refused(match, sources=None, **changes):
        settings = replace(SMALL, cases=2, few_cases=2, many=16, some=0, noise={}, **changes)
        with pytest.raises(ValueError, match=match):
            make_study("table2", "tiny", base_hash="0", sources=sources, settings=settings)

    with pytest.raises(ValueError, match=r"number of real images \(200\), got 100"):
        make_study(
            "table2", "tiny", base_hash="0", settings=study_settings("table2", "tiny", many=100)
        )
    with pytest.raises(ValueError, match=r"few_cases must be at most cases \(2\), got 10"):
        study = study_settings("table2", "tiny", cases=2)
        make_study("table2", "tiny", base_hash="0", settings=study)
    sources = write_prostates(tmp_path, cases=2)
    train, test = (tmp_path / name / "positive" / "00000.png" for name in ("train", "test"))
    before = test.read_bytes()
    test.write_bytes(train.read_bytes())
    refused("1 images are in two splits", sources)
    test.write_bytes(before)
    save_images(torch.full((1, 3, 64, 64), 7, dtype=torch.uint8), train.parent, names=["black"])
    refused("1 training images show one value only", sources)


def test_a_word_of_another_base_is_refused(tmp_path):
    study = make_study("table2", "tiny", base_hash="f" * 12)
    word = next(t for t in in_order(study.tasks) if t.kind == "word")
    with pytest.raises(ValueError, match="plan anew"):
        run([word], Store(tmp_path))


def test_folders_as_prepare_names_them_and_older_names(tmp_path):
    settings = replace(SMALL, cases=2, few_cases=2, many=16, some=0, noise={})
    names = {"chest": ("no_finding", "cardiomegaly"), "histology": ("normal", "metastasis")}
    for kind, classes in names.items():
        for split in ("train", "val", "test"):
            for folder, label in zip(classes, PROBLEMS[kind].phantoms):
                images = make_phantoms(kind, label, 2, split=split, seed=9).images
                save_images(images, tmp_path / kind / split / folder)
        sources = {kind: tmp_path / kind}
        study = make_study("table2", "tiny", base_hash="0", sources=sources, settings=settings)
        found = {t.settings["source"] for t in in_order(study.tasks) if t.kind == "images"}
        assert f"{kind}/val/{classes[1]}" in found and len(found) == 6
    (tmp_path / "chest" / "val" / "no_finding").rename(tmp_path / "chest" / "val" / "No Finding")
    sources = {"chest": tmp_path / "chest"}
    make_study("table2", "tiny", base_hash="0", sources=sources, settings=settings)
    (tmp_path / "chest" / "val" / "No Finding").rename(tmp_path / "chest" / "val" / "healthy")
    with pytest.raises(
        ValueError, match=r"val has the folders of classes cardiomegaly, healthy; needed are"
    ):
        make_study("table2", "tiny", base_hash="0", sources=sources, settings=settings)


def test_histology_is_tested_on_all_patches_of_the_official_files(tiny, tmp_path):
    from medbudget.data.layouts import write_pcam
    from medbudget.data.pcam import load_labels

    write_pcam(tmp_path / "official")
    sources = {"histology": tmp_path / "prepared", "pcam": tmp_path / "official"}
    for label in ("normal", "metastasis"):
        images = make_phantoms("histology", label, 2, seed=9).images
        save_images(images, tmp_path / "prepared" / "train" / label)
    settings = replace(SMALL, cases=2, few_cases=2, many=16, some=0, noise={}, runs=1)
    study = make_study("table2", "tiny", base_hash=tiny.hash, sources=sources, settings=settings)
    store = study.store(tmp_path / "store")
    run(study.tasks, store)
    result = store.read_json(study.rows[0].details.inputs[0])
    labels = load_labels(tmp_path / "official", "test").tolist()
    assert sorted(result["labels"]) == sorted(labels) and len(labels) == 8
    patches = [t for t in in_order(study.tasks) if t.kind == "patches"]
    assert {store.read_images([t]).shape[2] for t in patches} == {32}
    with pytest.raises(ValueError, match="or val and test by --data pcam=FOLDER"):
        del sources["pcam"]
        make_study("table2", "tiny", base_hash="0", sources=sources, settings=settings)
