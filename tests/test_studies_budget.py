"""Equal budgets as a study: what is planned, and scores that can be checked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors.torch import save_file

from medbudget import Adapter, Embedding, make_phantoms
from medbudget.cli.studies import Options
from medbudget.images import save_images
from medbudget.studies import Store, in_order, make_study, run, study_settings
from medbudget.studies.drawing import load_trained
from medbudget.studies.tasks import ensure

TINY = study_settings("budget", "tiny")
FEW = study_settings(
    "budget", "tiny", methods=("word 64", "LoRA 4"), n=4, steps=2, runs=1, cases=8, repeats=20,
    overrides={"steps": 2, "batch_size": 2}, changes={"steps": 1}, extractors=("layout",),
    grid={"cases": (3,)}, problems=("prostate",),
)  # fmt: skip


def plan(settings=TINY, **changes):
    settings = replace(settings, **changes)
    return make_study("budget", "tiny", base_hash="0" * 12, settings=settings)


def trainings(row):
    return row.details.inputs[0].settings


def test_every_method_has_a_line_for_each_number_of_cases():
    study = plan()
    lines = [(row.group, row.value) for row in study.rows]
    assert len(set(lines)) == len(lines) == 3 * (8 * 3 + 5 + 1)  # 5 have another pace
    assert {row.group.split(",")[0] for row in study.rows} == {"prostate", "chest", "histology"}
    assert lines[:2] == [("prostate, 5 cases", "word 1"), ("prostate, 5 cases", "word 8")]
    assert [row.value for row in study.rows if row.compare is None] == 3 * (
        ["word 64"] * 3 + ["none"]
    )


def test_budgets_are_equal_in_time_or_in_images_seen():
    rows = {(row.group, row.value): row for row in plan().rows}
    word = trainings(rows["prostate, 100 cases", "word 64"])["training"]
    assert (word["steps"], word["batch_size"], word["n_vectors"]) == (150, 8, 64)
    full, equal = (
        trainings(rows[group, "full tuning"])["training"]
        for group in ("prostate, 100 cases", "prostate, 100 cases, equal images")
    )
    assert (full["steps"], equal["steps"]) == (round(150 / 1.45), 150) and full["rank"] == "full"
    both = trainings(rows["prostate, 5 cases", "LoRA 16 + word 8"])["training"]
    assert (both["rank"], both["n_vectors"], both["word_lr"]) == (16, 8, word["lr"])
    gan = trainings(rows["prostate, 100 cases, equal images", "StyleGAN3"])["stylegan3"]
    assert gan["kimg"] == 1.2
    slow = {(r.group, r.value): r for r in plan(paces={"LoRA 4": 2}).rows}
    assert trainings(slow["prostate, 5 cases", "LoRA 4"])["training"]["steps"] == 75


def test_cases_are_the_first_ones_and_no_image_is_both_trained_on_and_tested_with():
    for row in plan().rows:
        if row.details is None:
            continue
        settings, (images,) = trainings(row), row.details.inputs[0].inputs
        n = int(row.group.split()[1])
        ill = {"prostate": "tumour", "chest": "cardiomegaly", "histology": "metastasis"}
        assert images.settings["split"] == "train"
        assert images.settings["label"] == ill[row.group.split(",")[0]]
        assert n in (settings.get("cases"), images.settings["n"])
        real = [t for t in row.score.inputs if t.kind == "images"]
        assert [t.settings["split"] for t in real] == ["test", "train"]
        (leak,) = [t for t in row.score.inputs if t.kind == "leak"]
        assert [t.settings["split"] for t in leak.inputs[1:]] == ["train", "val"]
        assert leak.settings["n"] == [min(n, 50), 50]


def test_unknown_methods_and_problems_are_refused():
    with pytest.raises(ValueError, match="unknown method 'LoRA 5'; allowed are word 1, word 8"):
        plan(methods=("LoRA 5",))
    with pytest.raises(ValueError, match="unknown method 'x'"):
        plan(paces={"x": 1})
    with pytest.raises(ValueError, match="unknown problem 'knee'"):
        plan(problems=("knee",))
    with pytest.raises(ValueError, match="needs real images"):
        plan(phantoms=False)


def test_own_images_are_two_classes_of_any_names(tmp_path):
    for split in ("train", "val", "test"):
        for name, n in (("pneumonia", 3), ("normal", 3)):
            save_images(
                make_phantoms("chest", "healthy", n, split=split).images, tmp_path / split / name
            )
    settings = replace(FEW, cases=3)
    study = make_study(
        "budget", "tiny", base_hash="0" * 12, settings=settings, sources={"own": tmp_path}
    )
    (trained,) = {row.details.inputs[0].inputs[0].settings["source"] for row in study.rows[:1]}
    assert trained == "own/train/pneumonia", "the class that is not called normal is learned"
    assert study.rows[0].group == "own, 3 cases" and "held-out images given" in study.about
    (tmp_path / "test" / "normal").rename(tmp_path / "test" / "zoster")  # never another class
    with pytest.raises(ValueError, match=r"zoster; needed are .*\{normal,pneumonia\}"):
        make_study(
            "budget", "tiny", base_hash="0" * 12, settings=settings, sources={"own": tmp_path}
        )
    (tmp_path / "train" / "third").mkdir()
    with pytest.raises(ValueError, match=r"third; needed are \{train,val,test\}/\{two,classes\}"):
        make_study(
            "budget", "tiny", base_hash="0" * 12, settings=settings, sources={"own": tmp_path}
        )


def test_a_small_study_runs_to_its_table(tiny, tmp_path):
    study, store = make_study("budget", "tiny", base_hash=tiny.hash, settings=FEW), Store(tmp_path)
    assert run(study.tasks, store) == len(in_order(study.tasks))
    word, lora, again, real = study.rows
    kinds = [type(load_trained(store.path(r.details.inputs[0]))) for r in (word, lora)]
    assert kinds == [Embedding, Adapter]
    scores = {row.value: store.read_json(row.score) for row in (word, lora, real)}
    assert {"Layout distance", "Classifier AUC", "Membership AUC"} <= set(scores["word 64"])
    assert {"Classifier gain", "Copied share (pixels)"} <= set(scores["LoRA 4"])
    assert "Membership AUC" not in scores["none"] and "Classifier gain" not in scores["none"]
    price = store.read_json(lora.details)
    assert price["images_seen"] == 4 and price["seconds"] > 0 and price["peak_bytes"] is None
    adapter = load_trained(store.path(lora.details.inputs[0]))
    assert price["numbers"] == sum(t.numel() for t in adapter.tensors.values())
    assert store.read_json(word.details)["numbers"] == 64 * 96
    assert not store.read_images(lora.images).equal(store.read_images(word.images))
    assert store.read_json(lora.compare)["p_value"] > 0 and again.value == "LoRA 4"


@pytest.mark.slow
def test_perfect_images_score_as_real_ones_and_copies_are_seen(tmp_path):
    """Phantoms in place of generated images: held-out ones for the word, copies for LoRA."""
    settings = replace(
        FEW, n=16, extractors=("efficientnet-lite0",), grid={"cases": (16,)}, cases=40
    )
    study, store = plan(settings), Store(tmp_path)
    word, lora, *_ = study.rows
    made = {}
    for row, split in ((word, "test"), (lora, "train")):
        drawn = [t for t in row.score.inputs if t.kind == "drawn"]
        for task, label in zip(drawn, ("healthy", "tumour")):
            images = make_phantoms("prostate", label, 56 if split == "test" else 16, split=split)
            path = store.path(task)
            path.parent.mkdir(exist_ok=True)
            save_file({"images": images.images[-16:]}, path)
        for task in row.score.inputs:
            if task.kind in ("auc", "leak"):
                path = store.path(task)
                path.parent.mkdir(exist_ok=True)
                path.write_text("{}")
        assert ensure(row.score, store) > 0
        made[split] = json.loads(store.path(row.score).read_text("utf-8"))
    assert made["train"]["Copied share (pixels)"]["value"] == 1
    assert made["test"]["Copied share (pixels)"]["value"] < 0.2
    assert made["test"]["Disease AUC"]["value"] > 0.65  # some tumours are hard
    assert made["test"]["Precision"]["value"] > 0.5


def test_a_recorded_command_does_not_tell_where_images_lie():
    options = Options(data=["own=/home/ann/xrays"], changes=["cases=95"])
    assert options.repeat(store="s") == "--preset tiny --store s --data own=xrays --set 'cases=95'"
