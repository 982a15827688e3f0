"""`medbudget prepare`, as a user types it: results, tables and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medbudget import make_phantoms
from medbudget.data.layouts import write_chexpert, write_pcam, write_picai
from medbudget.data.prepare import load_manifest
from medbudget.images import save_images


@pytest.fixture
def prepare(medbudget):
    """Run `medbudget prepare …`; return (exit code, stdout, stderr)."""
    return lambda *arguments: medbudget("prepare", *arguments)


SMALL = ("--size", 32, "--workers", 1)


def test_picai_and_its_broken_cases(prepare, tmp_path: Path) -> None:
    images, labels = write_picai(tmp_path, n=8, pixels=64)
    out = tmp_path / "out"
    command = ("picai", images, labels, "--out", out, "--per-class", 1, *SMALL)
    code, said, _ = prepare(*command, "--reference", 1)
    assert code == 0 and "7 made" in said and "contact_sheet.png" in said
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["reference"], settings["size"]) == (1, 32)
    code, _, err = prepare(*command)
    assert code == 1 and "reference (1 there, 0 now)" in err
    for file in images.rglob("*_adc.mha"):
        file.unlink()
    broken = ("picai", images, labels, "--out", tmp_path / "b", "--per-class", 1, *SMALL)
    code, said, _ = prepare(*broken)
    assert code == 1 and "missing sequence adc" in said and "broken cases were left out" in said
    assert prepare(*broken, "--allow-broken")[0] == 0
    code, _, err = prepare("picai", images, labels, "--out", tmp_path / "c", *SMALL)
    assert code == 1 and "there are 4" in err and "--allow-fewer" in err
    code, _, err = prepare("picai", images, labels, "--out", tmp_path / "c", "--geometry", "x")
    assert code == 1 and "one of physical, paper" in err


def test_chexpert_and_pcam(prepare, tmp_path: Path) -> None:
    root = write_chexpert(tmp_path, 4)
    options = ("--per-class", 1, *SMALL)
    code, said, _ = prepare("chexpert", root, "--out", tmp_path / "x", *options)
    assert code == 0 and "8 made" in said
    code, said, _ = prepare("pcam", write_pcam(tmp_path / "h5"), "--out", tmp_path / "p", *options)
    assert code == 0 and "2 made" in said and "read from the HDF5 files" in said


def test_folder(prepare, tmp_path: Path) -> None:
    for label in ("healthy", "pneumonia"):
        save_images(make_phantoms("chest", label, 5, size=32).images, tmp_path / "in" / label)
    command = ("folder", tmp_path / "in", "--out", tmp_path / "out", *SMALL)
    code, said, _ = prepare(*command, "--key", tmp_path / "key.csv")
    assert code == 0 and "10 made" in said and "cannot be detected" in said
    assert "unknown patients: 10" in said
    assert len(load_manifest(tmp_path / "out")) == 10 and (tmp_path / "key.csv").exists()
    code, said, _ = prepare(*command)
    assert code == 0 and "0 made, 10 kept" in said
    code, _, err = prepare(*command, "--split", "most,some")
    assert code == 2 and "0.6,0.2,0.2" in err
