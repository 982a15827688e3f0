"""Data preparation: cases per second and peak memory, beside the released script's way.

    python benchmarks/prepare.py [picai] [geometry] [chexpert] [pcam] [--n 10] [--workers 1 2]
        [--data ../shared/data] [--out results/prepare.json]

`picai` repeats the real case of shared/data (or, without it, a phantom of its size). The released
script's way resamples each sequence and mask to the whole volume, through picai_prep, before the
slice is chosen. Both read the same files and write a PNG. Seconds are those of the processor where
there is one worker (other work on the machine does not count), and of the wall clock for several.
`geometry` prints what alignment and window change in that case.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medbudget.artifacts import write_json
from medbudget.data import chexpert, pcam, phantom_trees, picai

CASE = "10795_1000811"


def find_case(data: Path, place: Path) -> tuple[Path, Path, str]:
    """Return images, labels and case: the real one, or a phantom of its size."""
    if (data / "picai").is_dir():
        return data / "picai" / "images", data / "picai" / "labels", CASE
    images, labels = phantom_trees.write_picai(place, n=1, pixels=344, slices=19)
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


def repeat(way: str, n: int, data: Path) -> None:
    """Print processor seconds of a case, and peak memory in MB after imports and at the end."""
    import SimpleITK as sitk

    if way == "script":
        import picai_prep.preprocessing  # noqa: F401
    function = {"script": by_the_script, "medbudget": by_us}[way]
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with tempfile.TemporaryDirectory() as name:
        images, labels, case = find_case(data, Path(name))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        function(images, labels, case, Path(name))  # first calls load libraries
        start = time.process_time()
        for _ in range(n):
            function(images, labels, case, Path(name))
        seconds = (time.process_time() - start) / n
        print(seconds, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def compare(n: int, data: Path) -> dict[str, Any]:
    """Run both ways in processes of their own."""
    out: dict[str, Any] = {}
    plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    for way in ("medbudget", "script"):
        command = [sys.executable, __file__, "repeat", way, "--n", str(n), "--data", str(data)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        seconds, before, peak = map(float, done.stdout.split()[-3:])
        out[way] = {
            "processor_seconds_a_case": seconds,
            "cases_a_second": 1 / seconds,
            "memory_mb_after_imports": round(before),
            "memory_mb_peak": round(peak),
        }
    ratio = out["script"]["processor_seconds_a_case"] / out["medbudget"]["processor_seconds_a_case"]
    return {**out, "speed_up": ratio}


def scale(n: int, workers: list[int], data: Path) -> dict[str, Any]:
    """Wall-clock time of the whole command on n copies of the case, by number of workers."""
    out = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        images, labels, case = find_case(data, place / "phantom")
        study = case.split("_")[1]
        rows = ["patient_id,study_id,case_csPCa"]
        for i in range(n):
            patient = str(50000 + i)
            (place / "images" / patient).mkdir(parents=True)
            for key in picai.SEQUENCES:
                source = images / case.split("_")[0] / f"{case}_{key}.mha"
                (place / "images" / patient / f"{patient}_{study}_{key}.mha").symlink_to(source)
            target = place / "labels" / picai.GLAND
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{patient}_{study}.nii.gz").symlink_to(
                labels / picai.GLAND / f"{case}.nii.gz"
            )
            rows.append(f"{patient},{study},NO")
        sheet = place / "labels" / picai.MARKSHEET
        sheet.parent.mkdir(parents=True)
        sheet.write_text("\n".join(rows) + "\n")
        for count in workers:
            start = time.perf_counter()
            picai.prepare_picai(
                place / "images", place / "labels", place / f"out{count}", per_class=n,
                allow_fewer=True, workers=count,
            )  # fmt: skip
            out[f"{count} workers"] = n / (time.perf_counter() - start)
            shutil.rmtree(place / f"out{count}")
    return {
        "cases_a_second": out,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }


def describe_geometry(data: Path) -> dict[str, Any]:
    """What alignment and window change, in millimetres and gray levels."""
    with tempfile.TemporaryDirectory() as name:
        images, labels, case = find_case(data, Path(name))
        load = {"paper": {"geometry": "paper"}, "volume": {"window": "volume"}, "default": {}}
        cases = {key: picai.load_case(images, labels, case, **kw) for key, kw in load.items()}
        gland = cases["default"].gland

        def gap(a: str, b: str) -> list[float]:
            planes = cases[a].image.float() - cases[b].image.float()
            return [round(float(plane.abs().mean()), 2) for plane in planes]

        def level(a: str) -> list[float]:
            return [round(float(plane[gland].float().mean()), 1) for plane in cases[a].image]

        return {
            "case": "real" if case == CASE else "phantom",
            "shift_mm": {key: np.round(mm, 3).tolist() for key, mm in
                         picai.measure_shift(images, case).items()},
            "gray_levels_paper_against_physical_same_window": gap("paper", "volume"),
            "mean_gray_level_in_the_gland_volume_window": level("volume"),
            "mean_gray_level_in_the_gland_percentile_window": level("default"),
        }  # fmt: skip


def images_a_second(what: str, n: int) -> dict[str, Any]:
    """Processor time of the CheXpert and PatchCamelyon paths, at the size of the real files."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if what == "chexpert":
            root = phantom_trees.write_chexpert(place, n, pixels=320)
            start = time.process_time()
            report = chexpert.prepare_chexpert(root, place / "out", per_class=n, allow_fewer=True)
        else:
            folder = phantom_trees.write_pcam(place, {"train": 4 * n, "valid": 4 * n, "test": 8})
            start = time.process_time()
            report = pcam.prepare_pcam(folder, place / "out", per_class=n)
        out = {"written_a_second": report.made / (time.process_time() - start)}
        if what == "pcam":
            start = time.process_time()
            count = sum(len(labels) for _, labels in pcam.iterate_patches(place, "val"))
            out["read_from_hdf5_a_second"] = count / (time.process_time() - start)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=["picai", "geometry", "chexpert", "pcam"])
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, help="JSON to write or to update")
    args = parser.parse_args()
    data = args.data.resolve()
    if args.parts[:1] == ["repeat"]:
        repeat(args.parts[1], args.n, data)
        return
    out = json.loads(args.out.read_text(encoding="utf-8")) if args.out and args.out.exists() else {}
    for part in args.parts:
        if part == "picai":
            out[part] = {**compare(args.n, data), "scaling": scale(args.n, args.workers, data)}
        elif part == "geometry":
            out[part] = describe_geometry(data)
        else:
            out[part] = images_a_second(part, args.n)
        print(json.dumps({part: out[part]}, indent=1), flush=True)
        if args.out:
            write_json(args.out, out)


if __name__ == "__main__":
    main()
