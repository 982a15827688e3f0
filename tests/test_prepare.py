"""Every preparation is whole, resumable, the same everywhere, and honest about broken cases."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from medbudget import load_images
from medbudget.data.prepare import BrokenCase, Item, Made, load_manifest, prepare_items

SETTINGS = {"dataset": "test", "size": 16}
ITEMS = [
    Item(f"p{i}", "ab"[i % 2], ("train", "val", "test")[i % 3], f"patient{i}", job=i)
    for i in range(12)
]


def make(item: Item, *, broken: tuple[int, ...] = (), log: Path | None = None) -> Made:
    if log is not None:
        with open(log, "a") as file:
            file.write(f"{item.job}\n")
    if item.job in broken:
        raise BrokenCase(f"number {item.job} is spoilt")
    image = torch.full((3, 16, 16), 10 + item.job, dtype=torch.uint8)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:4] = True
    return Made(image, (f"{item.job}.raw",), "fixed", item.job, (0.5, 0.25), masks={"part": mask})


def slow(item: Item, *, log: Path) -> Made:
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.3)
    return make(item)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def files_of(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_writes_images_masks_manifest_settings_and_contact_sheet(tmp_path: Path) -> None:
    report = prepare_items(ITEMS, make, tmp_path / "out", settings=SETTINGS)
    assert report.made == 12 and report.kept == 0 and not report.broken
    assert report.counts["train", "a"] == 2
    table = load_manifest(tmp_path / "out")
    assert len(table) == 12 and list(table["file"]) == sorted(table["file"])
    row = table[table["patient"] == "patient4"].iloc[0]
    assert (row["split"], row["label"], row["slice_index"]) == ("val", "a", "4")
    assert row["spacing"] == "0.5 x 0.25" and row["sources"] == "4.raw" and row["window"] == "fixed"
    image = load_images(tmp_path / "out" / "val" / "a")
    assert image.shape == (2, 3, 16, 16) and sorted(image[:, 0, 0, 0].tolist()) == [14, 20]
    mask = load_images(tmp_path / "out" / "masks" / "part" / "val" / "a")
    assert mask[:, :, :4].min() == 255 and mask[:, :, 4:].max() == 0
    assert (
        json.loads((tmp_path / "out" / "settings.json").read_text(encoding="utf-8"))["dataset"]
        == "test"
    )
    assert load_images(tmp_path / "out" / "contact_sheet.png").shape[1] == 3
    assert not list((tmp_path / "out").rglob("*.tmp")) and not list(tmp_path.rglob(".journal*"))


def test_running_again_makes_only_what_is_missing_or_changed(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    prepare_items(ITEMS, make, out, settings=SETTINGS)
    before = files_of(out)
    (out / ITEMS[3].file).unlink()
    (out / ITEMS[5].file).write_bytes(b"half an image")
    (out / "masks" / "part" / ITEMS[7].file).unlink()
    report = prepare_items(ITEMS, partial(make, log=log), out, settings=SETTINGS)
    assert sorted(map(int, log.read_text(encoding="utf-8").split())) == [3, 5, 7]
    assert (report.made, report.kept) == (3, 9)
    assert files_of(out) == before


def test_two_workers_give_the_same_files(tmp_path: Path) -> None:
    prepare_items(ITEMS, make, tmp_path / "one", settings=SETTINGS)
    prepare_items(ITEMS, make, tmp_path / "two", settings=SETTINGS, workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_killed_and_resumed_leaves_nothing_half_written(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run = partial(prepare_items, ITEMS, partial(slow, log=log), out, settings=SETTINGS, workers=2)
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    limit = time.monotonic() + 60
    while len(list(out.rglob("p*.png"))) < 6 and time.monotonic() < limit:  # images and masks
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    workers = {int(line) for line in log.read_text().split()}
    assert len(workers) == 2 and process.pid not in workers
    while any(map(is_running, workers)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(is_running, workers)), "workers outlive a killed parent"
    assert not (out / "manifest.csv").exists()
    written = [p for p in out.rglob("p*.png") if not p.name.startswith(".")]
    assert 2 <= len(written) < 24
    load_images(written)  # each is whole
    with open(out / ".journal.jsonl", "a") as journal:
        journal.write('{"file": "train/a/p0.p')  # the line being written when it was killed
    (out / "train" / "a" / ".p0.png.1-2.tmp").write_bytes(b"half")
    report = prepare_items(ITEMS, make, out, settings=SETTINGS)
    assert report.kept >= 1 and report.made + report.kept == 12
    prepare_items(ITEMS, make, tmp_path / "fresh", settings=SETTINGS)
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_broken_cases_are_listed_and_replaced_by_spares(tmp_path: Path) -> None:
    spares = {"a": [Item(f"s{i}", "a", "", f"spare{i}", job=i) for i in (20, 22)]}
    out = tmp_path / "out"
    report = prepare_items(
        ITEMS, partial(make, broken=(0, 1, 20)), out, settings=SETTINGS, spares=spares
    )
    assert [name for name, _ in report.broken] == ["p0", "p1", "s20"]
    assert report.short == {("val", "b"): 1}
    assert (out / "train" / "a" / "s22.png").exists()
    for text in ("number 20 is spoilt", "(1 missing)", "3 broken cases"):
        assert text in str(report)
    mended = prepare_items(ITEMS, make, out, settings=SETTINGS, spares=spares)
    assert not mended.broken and mended.made == 2
    assert not (out / "train" / "a" / "s22.png").exists(), "the spare is no longer needed"
    assert len(load_manifest(out)) == 12


def test_refuses_other_settings_other_cases_and_foreign_folders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_items(ITEMS, make, out, settings=SETTINGS)
    with pytest.raises(ValueError, match="size: 16 there, 32 now"):
        prepare_items(ITEMS, make, out, settings={**SETTINGS, "size": 32})
    with pytest.raises(ValueError, match="selection"):
        prepare_items(ITEMS[1:], make, out, settings=SETTINGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        prepare_items(ITEMS, make, tmp_path / "mine", settings=SETTINGS)
    with pytest.raises(ValueError, match="no case"):
        prepare_items([], make, tmp_path / "x", settings=SETTINGS)
    with pytest.raises(ValueError, match="two items"):
        prepare_items([*ITEMS, ITEMS[0]], make, tmp_path / "x", settings=SETTINGS)
    with pytest.raises(FileNotFoundError, match="manifest"):
        load_manifest(tmp_path / "x")


def test_a_full_disk_is_no_broken_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medbudget.data.prepare.save_images", full)
    with pytest.raises(OSError, match="No space"):
        prepare_items(ITEMS, make, tmp_path / "out", settings=SETTINGS)
