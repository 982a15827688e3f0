"""Every study under the paper's preset, from prepared folders to its report, on SD 2.0 in small."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paper_base import SIZE
from test_metrics_extractors import randomise

from medbudget.metrics import pretrained
from medbudget.stylegan3 import TINY, make_stylegan3

pytestmark = pytest.mark.slow

FEW = ("size=64", "n=4", "cases=4", "steps=2", "overrides.steps=2", "vectors=4")
GRID = ("grid.CFG scale=[1, 2]", "grid.sampling steps=[]", "grid.vectors=[]", "grid.cases=[]")
STUDIES = {
    "table1": GRID, "figure5": GRID,
    "table2": ("few_cases=2", "many=8", "runs=1", "repeats=20", "changes.steps=1",
               "changes.size=32", "changes.batch_size=2"),
    "interpolation": ("n=2", "grid.share=[0, 0.5]"),
    "stylegan3": ("gan.kimg=0.004", "gan.snapshot_kimg=0.004"),
    "budget": ("grid.cases=[4]", "methods=word 64,full tuning", "paces.full tuning=1",
               "runs=1",
               "repeats=20", "changes.steps=1", "changes.size=32", "changes.batch_size=2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights where a user keeps Inception's, RadImageNet's, and networks to start from."""
    folder = tmp_path_factory.mktemp("weights")
    for name, network in (
        ("inception", pretrained.inception_network()),
        ("radimagenet-keras", pretrained.radimagenet_network("keras")),
    ):
        torch.save(randomise(network).state_dict(), folder / f"{name}.pth")
    small = replace(TINY, channel_max=8, channel_base=256)
    make_stylegan3(small).save(folder / "start.safetensors")
    assert small.size == SIZE
    return folder


@pytest.fixture
def study(paper, weights, medbudget, tmp_path):
    """Run a study as a user does; return its exit code, error and report."""

    def run(name, *settings, extractors=("inception",)):
        data = {role: paper.data / role for role in ("prostate", "chest", "histology")}
        if name == "table2":
            data["pcam"] = paper.pcam
        elif name == "budget":
            data = {"chest": data["chest"]}
        elif name != "interpolation":
            data = {role: data["prostate"] / role / "negative" for role in ("train", "reference")}
        if name == "stylegan3":
            data["start"] = weights / "start.safetensors"
        named = ",".join(f"{one}={weights / one}.pth" for one in extractors)
        options = [word for role in data for word in ("--data", f"{role}={data[role]}")]
        for setting in (*FEW, *STUDIES[name], f"extractors={named}", *settings):
            options += ["--set", setting]
        code, _, error = medbudget(
            "study", name, "--preset", "paper", "--workers", 1, "--store", tmp_path, *options
        )
        report = tmp_path / f"{name}-paper" / "report.md"
        return code, error, report.read_text("utf-8") if report.exists() else ""

    return run


def test_table1_has_fid_mfid_and_both_z_scored_beside_the_papers(study, tmp_path):
    code, error, report = study("table1", extractors=("inception", "radimagenet-keras"))
    assert code == 0, error
    head = next(line for line in report.splitlines() if line.startswith("| setting"))
    keras = "FD (RadImageNet ResNet-50 (Keras conversion))"
    assert f"| FID | FID, z-scored | {keras} | {keras}, z-scored | p | FID (paper) |" in head
    assert "| CFG scale | 2 |" in report and "| 99 | 2.87 |" in report
    assert "base sd2" in report and "the images given" in report and "missing" not in report
    code, error, report = study("figure5")
    assert code == 0 and "| CFG scale | 2 |" in report and "FID" not in report, error
    assert (tmp_path / "figure5-paper" / "figure.png").is_file()


def test_axes_go_to_every_disease_that_was_prepared(study):
    code, error, report = study("interpolation")
    assert code == 0 and "missing" not in report, error
    assert (
        "isease score" not in report and "the images given" in report
    )  # scores know phantoms only
    for axis in ("positive", "cardiomegaly", "pleural_effusion", "pneumonia", "metastasis"):
        assert f"| {axis}, CFG 2 | 0.5 |" in report


def test_table2_trains_on_all_three_problems_and_tests_on_official_patches(study):
    code, error, report = study("table2")
    assert code == 0, error
    lines = [line for line in report.splitlines() if line.startswith("| ")]
    assert [sum(name in line for line in lines) for name in ("prostate", "chest", "histology")] == [
        8, 2, 2,
    ]  # fmt: skip
    assert ".803 ± .009" in report and "missing" not in report and "resnet18, 32 px" in report


def test_stylegan3_is_fine_tuned_and_compared_with_the_word(study):
    code, error, report = study("stylegan3", "extractors=layout")
    assert code == 0, error
    assert "| StyleGAN3 | 4 |" in report and "z-scored" in report and "missing" not in report


def test_what_is_missing_is_said_before_the_first_task(study, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", _refuse)
    code, error, _ = study("table1", "extractors=inception")
    assert code == 1 and "inception" in error and "could not be downloaded" in error
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    code, error, _ = study("table2")
    assert code == 1 and "resnet18 could not be downloaded" in error
    (tmp_path / "figure5-paper").mkdir()
    (tmp_path / "figure5-paper" / "report.md").write_text("mine")
    code, error, _ = study("figure5")
    assert code == 1 and "is no report of a study" in error
    assert not list(tmp_path.rglob("*.safetensors"))


def _refuse(*_args, **_options):
    raise OSError("no network")


def test_budgets_are_compared_on_prepared_folders(study):
    code, error, report = study("budget")
    assert code == 0, error
    assert "| chest, 4 cases | full tuning |" in report and "the images given as real" in report
    assert "equal images" not in report.split("| trained on |")[1] and "missing" not in report
    assert "| FID | Precision | Recall | Layout distance |" in report
    assert "Disease AUC |" not in report  # no disease score for real images
