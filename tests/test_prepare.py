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
from medbudget.data.prepare import (
    BrokenCase,
    Item,
    Made,
    Report,
    check_settings,
    load_manifest,
    prepare_items,
)
from medbudget.images import ImageError, read_record, to_pil

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
    return Made(
        image,
        (f"{item.job}.raw",),
        "fixed",
        item.job,
        (0.5, 0.25),
        masks={"part": mask},
        pixels=f"pixels {item.job}",
    )


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


@pytest.mark.filterwarnings("ignore:.*pixels of another one")
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
    assert not list((tmp_path / "out").rglob("*.tmp"))


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
@pytest.mark.filterwarnings("ignore:.*pixels of another one")
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
    (out / "train" / "a" / ".p0.png.0123abcd.tmp").write_bytes(b"half")
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
    with pytest.raises(ValueError, match=r"size \(16 there, 32 now\); choose"):
        prepare_items(ITEMS, make, out, settings={**SETTINGS, "size": 32})
    with pytest.raises(ValueError, match="the cases are others"):
        prepare_items(ITEMS[1:], make, out, settings=SETTINGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        prepare_items(ITEMS, make, tmp_path / "mine", settings=SETTINGS)
    with pytest.raises(ValueError, match="no case"):
        prepare_items([], make, tmp_path / "x", settings=SETTINGS)
    with pytest.raises(FileNotFoundError, match="manifest"):
        load_manifest(tmp_path / "x")


def test_a_full_disk_is_no_broken_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medbudget.data.prepare.save_images", full)
    with pytest.raises(OSError, match="No space"):
        prepare_items(ITEMS, make, tmp_path / "out", settings=SETTINGS)


def test_an_image_carries_its_row_and_nothing_of_where_it_lies(tmp_path: Path) -> None:
    prepare_items(ITEMS, make, tmp_path, settings=SETTINGS)
    record = read_record(tmp_path / ITEMS[4].file)
    assert record is not None
    assert (record["prepared"], record["slice_index"], record["masks"]) == (
        "patient4",
        "4",
        ["part"],
    )
    assert "val" not in json.dumps(record) and str(tmp_path) not in json.dumps(record)


def twin_of(item: Item) -> Made:
    return make(Item(item.name, item.label, item.split, item.patient, job=item.job % 10))


def test_the_same_pixels_stay_in_one_split_and_in_one_class(tmp_path: Path) -> None:
    items = [
        Item("one", "a", "train", "1", job=1),
        Item("again", "a", "test", "2", job=11),
        Item("too", "a", "train", "3", job=21),
        Item("well", "a", "val", "4", job=3),
        Item("sick", "b", "val", "5", job=13),
        Item("other", "b", "test", "6", job=4),
    ]
    spares = {"a": [Item("spare", "a", "", "7", job=5)]}
    run = partial(prepare_items, items, twin_of, tmp_path, settings=SETTINGS, spares=spares)
    report = run()
    reasons = dict(report.broken)
    assert set(reasons) == {"again", "well", "sick"}
    assert reasons["again"] == (
        "test/a/again.png and train/a/one.png have the same pixels: kept in train alone"
    )
    for name in ("well", "sick"):
        assert "val/a/well.png" in reasons[name] and "val/b/sick.png" in reasons[name]
        assert "two classes" in reasons[name]
    assert report.counts == {
        ("train", "a"): 2, ("val", "a"): 0, ("val", "b"): 0, ("test", "a"): 1, ("test", "b"): 1,
    }  # fmt: skip
    assert (tmp_path / "test" / "a" / "spare.png").exists()
    assert not (tmp_path / "val" / "b" / "sick.png").exists()
    before = files_of(tmp_path)
    assert run().kept == 4 and files_of(tmp_path) == before


def test_report_counts_patients_and_knows_one_from_many(tmp_path: Path) -> None:
    items = [Item(f"i{i}", "a", "train", f"p{i // 2}", job=i) for i in range(4)]
    report = prepare_items(items, partial(make, broken=(3,)), tmp_path, settings=SETTINGS)
    assert report.patients == {("train", "a"): 2} and report.counts == {("train", "a"): 3}
    lines = str(report).splitlines()
    assert lines[0].split() == ["split", "class", "patients", "images"]
    assert lines[1].split() == ["train", "a", "2", "3", "(1", "missing)"]
    assert "1 broken case was left out:" in lines
    assert "\\udcdc" in str(Report(tmp_path, {}, 0, 0, (("bad\udcdc", "why"),)))


@pytest.mark.parametrize(("edge", "cell"), [(16, 128), (100, 100), (300, 150)])
def test_contact_sheet_has_whole_number_cells_in_the_order_of_the_splits(
    tmp_path: Path, edge: int, cell: int
) -> None:
    """300 px are halved to 150, 16 px drawn 8 times larger: every gray level is the image's."""
    gray = {"train": 50, "val": 100, "test": 150}
    items = [Item(f"{split}1", "a", split, split, job=gray[split]) for split in gray]
    prepare_items(items, partial(flat, edge=edge), tmp_path, settings=SETTINGS)
    sheet = load_images(tmp_path / "contact_sheet.png")[0, 0]
    top = 4 + 16
    for row, split in enumerate(gray):
        start = top + row * (max(cell, 128) + 20)
        seen = sheet[start : start + cell, 4 : 4 + cell]
        assert set(seen.unique().tolist()) == {gray[split], gray[split] + 1}, split
    assert read_record(tmp_path / "contact_sheet.png") is not None


def flat(item: Item, *, edge: int) -> Made:
    image = torch.full((3, edge, edge), item.job, dtype=torch.uint8)
    image[:, : edge // 2] += 1
    return Made(image, ("x",))


def test_load_images_finds_what_was_prepared_and_never_the_contact_sheet(tmp_path: Path) -> None:
    one = [Item(f"i{i}", "a", "train", f"p{i}", job=i) for i in range(3)]
    prepare_items(one, make, tmp_path / "one", settings=SETTINGS)
    assert len(load_images(tmp_path / "one")) == 3
    split = [*one, Item("v", "a", "val", "v", job=7)]
    prepare_items(split, make, tmp_path / "split", settings=SETTINGS)
    with pytest.warns(UserWarning, match="train/a is taken; name another folder for val/a"):
        assert len(load_images(tmp_path / "split")) == 3
    prepare_items(ITEMS, make, tmp_path / "two", settings=SETTINGS)
    with pytest.raises(ImageError, match="2 classes; name the folder of one: train/a, train/b"):
        load_images(tmp_path / "two")
    sheet = (tmp_path / "one" / "contact_sheet.png").read_bytes()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "contact_sheet.png").write_bytes(sheet)
    with pytest.raises(ImageError, match="no images"):
        load_images(tmp_path / "made")
    to_pil(load_images(tmp_path / "one")[0]).save(tmp_path / "made" / "b.png")
    assert len(load_images(tmp_path / "made")) == 1


def test_sizes_out_of_range(tmp_path: Path) -> None:
    for size in (7, 100_000):
        with pytest.raises(ValueError, match=f"size must be 8 to 4096, got {size}"):
            check_settings(size=size)
