"""Data preparation: cases per second and peak memory, beside the released script's way.

    python benchmarks/prepare.py [speed] [geometry] [dicom] [--n 20] [--data ../shared/data] [--record]

`speed` repeats the real case of shared/data (or, without it, a phantom of its size) with one worker
and with two. The released script's way resamples each sequence and mask to the whole volume,
through picai_prep, before the slice is chosen. Both read the same files and write a PNG, each way
in a fresh process. Then the whole command on copies of the case, and the CheXpert and PatchCamelyon
paths, on phantoms in files of the real ones' size. `geometry` tells what alignment and window
change in that case; `dicom` times slices of a CT series, beside plain pydicom. `--record` writes
results/prepare_speed.json and prepare_geometry.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import judge, peak_memory, run_alone, timed
from PIL import Image

from medbudget.data import chexpert, layouts, pcam, picai
from medbudget.results import write_result

CASE = "10795_1000811"


def find_case(data: Path, place: Path) -> tuple[Path, Path, str]:
    """Return images, labels and case: the real one, or a phantom of its size."""
    if (data / "picai").is_dir():
        return data / "picai" / "images", data / "picai" / "labels", CASE
    images, labels = layouts.write_picai(place, n=1, pixels=344, slices=19)
    return images, labels, "10000_1000000"


def by_the_script(images: Path, labels: Path, case: str, out: Path) -> None:
    """The released conversion's steps on picai_prep's functions: every volume as a whole."""
    import SimpleITK as sitk
    from picai_prep.preprocessing import crop_or_pad, resample_img

    def volume(file: Path, mask: bool) -> Any:
        image = resample_img(sitk.ReadImage(os.fspath(file)), (3, 0.5, 0.5), is_label=mask)
        values = sitk.GetArrayFromImage(image)
        if not mask:
            values = (values - values.min()) / (values.max() - values.min())
        return crop_or_pad(values, (30, 300, 300))

    name = f"{case}.nii.gz"
    volume(labels / picai.HUMAN / name, True)  # the script looks for a tumour first
    gland = volume(labels / picai.GLAND / name, True)
    index = int(np.median(np.unique(np.nonzero(gland)[0])))
    place = images / case.split("_")[0]
    planes = [volume(place / f"{case}_{key}.mha", False)[index] for key in picai.SEQUENCES]
    picture = Image.fromarray((np.stack(planes, axis=-1) * 255).astype(np.uint8))
    picture.resize((512, 512), Image.Resampling.LANCZOS).save(out / f"{case}.png")


def by_us(images: Path, labels: Path, case: str, out: Path) -> None:
    """One case of ours, written as a PNG."""
    from medbudget.images import save_images

    made = picai.load_case(images, labels, case)
    save_images(made.image[None], out, names=[case])


WAYS = {"script": by_the_script, "medbudget": by_us}
WORKERS = (1, 2)


def start_worker() -> None:
    """Keep each worker on one thread, as `medbudget prepare` does."""
    import SimpleITK as sitk
    import torch

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    torch.set_num_threads(1)


def make_one(i: int, *, way: str, found: tuple[Path, Path, str], out: Path) -> float:
    """Make the case once more; return this process's peak memory in MB."""
    place = out / str(i)
    place.mkdir(parents=True)
    WAYS[way](*found, place)
    return peak_memory()


def repeat(way: str, n: int, workers: int, data: Path) -> None:
    """Print cases a second, processor seconds a case, memory in MB after imports and at its peak."""
    if way == "script":
        import picai_prep.preprocessing  # noqa: F401
    start_worker()
    with tempfile.TemporaryDirectory() as name:
        found = find_case(data, Path(name) / "phantom")
        imports = peak_memory()
        make_one(n, way=way, found=found, out=Path(name))  # first calls load libraries
        run = partial(make_one, way=way, found=found, out=Path(name))
        before = os.times()
        start = time.perf_counter()
        if workers == 1:
            peaks = [run(i) for i in range(n)]
        else:
            context = multiprocessing.get_context("fork")
            with ProcessPoolExecutor(workers, context, start_worker) as pool:
                peaks = list(pool.map(run, range(n)))
        wall = time.perf_counter() - start
        after = os.times()
        cpu = sum(after[:4]) - sum(before[:4])
        print(n / wall, cpu / n, imports, max(peaks))


def compare(n: int, data: Path) -> dict[str, Any]:
    """Run both ways, with one worker and with two, each in a process of its own."""
    out: dict[str, Any] = {}
    for way in WAYS:
        for workers in WORKERS:
            line = ("repeat", way, workers, "--n", n, "--data", data)
            rate, cpu, imports, peak = run_alone(__file__, *line)
            out[f"{way}, {workers} worker{'s' * (workers > 1)}"] = {
                "cases_a_second": rate,
                "processor_seconds_a_case": cpu,
                "memory_mb_after_imports": round(imports),
                "peak_memory_mb_of_a_worker": round(peak),
            }
    return out


def command(n: int, data: Path) -> dict[str, float]:
    """Cases a second of the whole command on n copies of the case, by number of workers."""
    out = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        images, labels, case = find_case(data, place / "phantom")
        study = case.split("_")[1]
        rows = ["patient_id,study_id,case_csPCa"]
        target = place / "labels" / picai.GLAND
        target.mkdir(parents=True)
        for i in range(n):
            patient = str(50000 + i)
            (place / "images" / patient).mkdir(parents=True)
            for key in picai.SEQUENCES:
                source = images / case.split("_")[0] / f"{case}_{key}.mha"
                (place / "images" / patient / f"{patient}_{study}_{key}.mha").symlink_to(source)
            (target / f"{patient}_{study}.nii.gz").symlink_to(
                labels / picai.GLAND / f"{case}.nii.gz"
            )
            rows.append(f"{patient},{study},NO")
        sheet = place / "labels" / picai.MARKSHEET
        sheet.parent.mkdir(parents=True)
        sheet.write_text("\n".join(rows) + "\n")
        for count in WORKERS:
            start = time.perf_counter()
            picai.prepare_picai(
                place / "images", place / "labels", place / f"out{count}", per_class=n,
                allow_fewer=True, workers=count,
            )  # fmt: skip
            out[f"{count} worker{'s' * (count > 1)}"] = n / (time.perf_counter() - start)
            shutil.rmtree(place / f"out{count}")
    return out


def describe_geometry(data: Path) -> dict[str, Any]:
    """What alignment and window change in T2W, ADC and DWI, in millimetres and gray levels."""
    with tempfile.TemporaryDirectory() as name:
        images, labels, case = find_case(data, Path(name))
        load: dict[str, dict[str, Any]] = {
            "paper": {"geometry": "paper"},
            **{name: {"window": name} for name in ("volume", "percentile", "gland")},
        }
        cases = {key: picai.load_case(images, labels, case, **kw) for key, kw in load.items()}
        gland = cases["gland"].gland

        def gap(a: str, b: str) -> list[float]:
            planes = cases[a].image.float() - cases[b].image.float()
            return [round(float(plane.abs().mean()), 2) for plane in planes]

        def level(a: str) -> list[float]:
            return [round(float(plane[gland].float().mean()), 1) for plane in cases[a].image]

        return {
            "case": "real" if case == CASE else "phantom",
            "shift_mm": {key: np.round(mm, 3).tolist() for key, mm in
                         picai.measure_shift(images, case).items()},
            "geometry_gray_levels": gap("paper", "volume"),
            "gland_level": {name: level(name) for name in ("volume", "percentile", "gland")},
        }  # fmt: skip


def images_a_second(n: int) -> dict[str, float]:
    """Images a second, one worker, of the CheXpert and PatchCamelyon paths: wall clock."""
    out = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        root = layouts.write_chexpert(place, n, pixels=320)
        folder = layouts.write_pcam(place / "patches", {"train": 4 * n, "valid": 4 * n, "test": 8})
        options: dict[str, Any] = {"per_class": n, "allow_fewer": True}
        for label, run in (
            ("chexpert", partial(chexpert.prepare_chexpert, root, place / "x", **options)),
            ("pcam, written", partial(pcam.prepare_pcam, folder, place / "p", **options)),
        ):
            report, seconds = timed(run)
            out[label] = report.made / seconds["wall"]
        count, seconds = timed(
            lambda: sum(len(labels) for _, labels in pcam.iterate_patches(folder, "val"))
        )
        out["pcam, read from HDF5"] = count / seconds["wall"]
    return out


def dicom_slices_a_second(n: int = 200, edge: int = 512) -> dict[str, dict[str, float]]:
    """Slices a second of a CT series by transfer syntax: plain pydicom's `pixel_array`, and ours.

    Both read the same files. Ours also joins them to a series by their headers (find), checks them,
    rescales, and turns the volume (read).
    """
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

    from medbudget.data.volumes import find_sources, read_pixels

    rng = np.random.default_rng(0)
    y, x = np.indices((edge, edge))
    body = np.where((y - edge / 2) ** 2 + (x - edge / 2) ** 2 < (edge / 2.5) ** 2, 1000, 0)
    out = {}
    for name, syntax in (
        ("native", ExplicitVRLittleEndian), ("RLE", RLELossless), ("JPEG-LS", JPEGLSLossless),
        ("JPEG 2000", JPEG2000Lossless),
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            count = n if name == "native" else n // 4
            for k in range(count):
                values = (body + rng.normal(0, 20, body.shape) + 100).clip(0).astype(np.uint16)
                tags = {"0020|0010": "1", "0020|000e": "1.2.3", "0028|1052": "-1024", "0028|1053": "1",
                        "0020|0032": f"0\\0\\{3 * k}", "0020|0037": "1\\0\\0\\0\\1\\0"}  # fmt: skip
                path = layouts.write_dicom(Path(folder) / f"{k:04d}.dcm", values, tags)
                if syntax != ExplicitVRLittleEndian:
                    dataset = pydicom.dcmread(path)
                    dataset.compress(syntax)
                    dataset.save_as(path)
            files = sorted(Path(folder).iterdir())
            plain = timed(lambda: sum(pydicom.dcmread(f).pixel_array.size for f in files))[1]  # noqa: B023
            sources, find = timed(lambda: find_sources(folder))
            assert [len(source.files) for source in sources] == [count]
            read = timed(lambda: read_pixels(folder, sources[0]))[1]  # noqa: B023
            seconds = {"pydicom": plain, "find": find, "read": read}
            out[name] = {key: count / value["wall"] for key, value in seconds.items()}
    return out


def speed(n: int, data: Path) -> dict[str, Any]:
    """Everything that is timed, and the goals."""
    ways, whole = compare(n, data), command(n, data)
    seconds = {way: ways[f"{way}, 1 worker"]["processor_seconds_a_case"] for way in WAYS}
    goals = [
        ("times as fast as the script's way, 1 core", seconds["script"] / seconds["medbudget"], ">=", 3),
        ("two workers against one, whole command", whole["2 workers"] / whole["1 worker"], ">=", 1.8),
    ]  # fmt: skip
    return {
        "case": "real" if (data / "picai").is_dir() else "phantom",
        "n": n,
        "a_case": ways,
        "whole_command_cases_a_second": whole,
        "images_a_second": images_a_second(n),
        "dicom_slices_a_second": dicom_slices_a_second(),
        "goals": judge(goals),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=["speed", "geometry"])
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--record", action="store_true", help="write into results/")
    args = parser.parse_args()
    data = args.data.resolve()
    if args.parts[:1] == ["repeat"]:
        repeat(args.parts[1], args.n, int(args.parts[2]), data)
        return
    known = {
        "speed": partial(speed, args.n, data),
        "geometry": partial(describe_geometry, data),
        "dicom": dicom_slices_a_second,
    }
    if unknown := set(args.parts) - set(known):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; allowed are {', '.join(known)}")
    if args.record and not (data / "picai").is_dir():
        parser.error(f"no real case in {data}: what is recorded is about it; name --data")
    for part in args.parts:
        values = known[part]()
        print(json.dumps({part: values}, indent=1), flush=True)
        if args.record:
            size = f" --n {args.n}" if part == "speed" else ""
            line = f"python benchmarks/prepare.py {part}{size} --record"
            print(f"wrote {write_result(f'prepare_{part}', values, command=line)}")


if __name__ == "__main__":
    main()
