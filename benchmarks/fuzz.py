"""Claim: a damaged or hostile file gives one clear error or a right result, and never harm.

Small files of each format are made and changed at random (bits, lengths, truncation, pieces moved,
numbers in text headers), then read by the library in another process, whose memory is limited. An
input is *read* (a result of the promised type and shape), *refused* (an error of the library's own),
an *error* of another kind, a *hang* (10 s of processor time) or a *crash* of the process.

Every second image is damaged in its pixels only: cut, or changed where the format carries a check
sum (PNG, .nii.gz, compressed .mha and .nrrd). It has to be refused, or give the pixels of the whole
file; else it is *wrong*. A changed bit in uncompressed .nii, .mha, .nrrd, TIFF and DICOM, or inside a
JPEG, JPEG 2000, JPEG-LS, RLE or deflated stream, cannot be seen: these carry no check sum.

    python benchmarks/fuzz.py [--inputs 100000] [--seed 0] [--formats png,dicom] [--record]
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LIMIT_S = 10
MEMORY = 2**30  # beyond what the process has when it starts, whatever it reads in its life
OUTCOMES = ("read", "refused", "wrong", "error", "hang", "crash")
COLUMNS = (*OUTCOMES, "peak MiB")
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, 2**63 - 1)

# ------------------------------------------------------------------------------ small files


def make_seeds(folder: Path) -> dict[str, list[tuple[str, bytes]]]:
    """Return format -> (file name, content) of small whole files."""
    import h5py
    import pandas as pd
    import pydicom
    import SimpleITK as sitk
    import torch
    from PIL import Image
    from pydicom.uid import JPEGLSLossless, RLELossless

    from medbudget import Embedding
    from medbudget.data.chexpert import OBSERVATIONS
    from medbudget.data.layouts import write_dicom

    rng = np.random.default_rng(0)
    gray = rng.integers(0, 256, (24, 20), np.uint8)
    colour = rng.integers(0, 256, (24, 20, 3), np.uint8)

    def picture(kind: str, values: Any, **options: Any) -> bytes:
        out = io.BytesIO()
        Image.fromarray(values).save(out, format=kind, **options)
        return out.getvalue()

    def written(name: str, write: Callable[[Path], Any]) -> tuple[str, bytes]:
        write(folder / name)
        return name, (folder / name).read_bytes()

    volume = sitk.GetImageFromArray(rng.integers(0, 900, (3, 12, 10)).astype(np.int16))

    def volumes(*names: str, packed: bool = False) -> list[tuple[str, bytes]]:
        return [
            written(name, lambda p: sitk.WriteImage(volume, os.fspath(p), packed)) for name in names
        ]

    def h5(part: str, values: Any, **options: Any) -> tuple[str, bytes]:
        def write(path: Path) -> None:
            with h5py.File(path, "w") as file:
                file.create_dataset(part, data=values, **options)

        return written(f"camelyonpatch_level_2_split_train_{part}.h5", write)

    def recompress(path: Path, syntax: str) -> None:
        write_dicom(path, gray)
        data = pydicom.dcmread(path)
        data.compress(syntax)
        data.save_as(path)

    patches, labels = rng.integers(0, 256, (4, 96, 96, 3), np.uint8), np.eye(4, dtype=np.uint8)[0]
    word = Embedding(torch.randn(2, 8), "<x>", step=3, data="4 images", record={"seed": 1})
    state = OrderedDict(a=torch.nn.Parameter(torch.ones(2, 3)), b=torch.zeros(4).half())
    box = {"_parameters": state, "_buffers": {"c": torch.ones(1)}, "_modules": {}}
    table = pd.DataFrame(
        [
            {"Path": f"C/train/patient{i:05d}/study1/v.jpg", "AP/PA": "AP", OBSERVATIONS[i % 14]: 1}
            for i in range(6)
        ],
        columns=["Path", "Sex", "AP/PA", *OBSERVATIONS],
    )
    shape = (4, 1, 1, 1)
    return {
        "PNG": [
            ("a.png", picture("PNG", colour)),
            ("a.png", picture("PNG", gray)),
            ("a.png", picture("PNG", gray.astype(np.uint16) * 200)),
        ],
        "JPEG": [
            ("a.jpg", picture("JPEG", colour)),
            ("a.jpg", picture("JPEG", gray, progressive=True)),
        ],
        "TIFF": [
            ("a.tif", picture("TIFF", colour)),
            ("a.tif", picture("TIFF", gray, compression="tiff_lzw")),
        ],
        "DICOM": [
            written(
                "a.dcm",
                lambda p: write_dicom(p, gray.astype(np.uint16) * 9, {"0010|0020": "A"}),
            ),
            written("a.dcm", lambda p: write_dicom(p, colour)),
            written("a.dcm", lambda p: write_dicom(p, gray, compressor="JPEG2000")),
            written("a.dcm", lambda p: write_dicom(p, gray, compressor="JPEG")),
            written("a.dcm", lambda p: recompress(p, RLELossless)),
            written("a.dcm", lambda p: recompress(p, JPEGLSLossless)),
        ],
        "MHA": [*volumes("a.mha"), *volumes("b.mha", packed=True)],
        "NIfTI": volumes("a.nii", "b.nii.gz"),
        "NRRD": [*volumes("a.nrrd"), *volumes("b.nrrd", packed=True)],
        "HDF5": [
            h5("y", labels.reshape(shape)),
            h5("x", patches[:2, ::1], chunks=(1, 96, 96, 3), compression="gzip"),
        ],
        "embedding .pt": [written("a.pt", word.save)],
        "embedding .safetensors": [written("a.safetensors", word.save)],
        "StyleGAN3 .pkl": [("a.pkl", pickle.dumps({"G_ema": box, "D": box}))],
        "CSV": [
            ("labels.csv", b"file,class,patient\r\na.png,sick,p1\r\nb.png,well,p2\r\n"),
            ("train.csv", table.to_csv(index=False).encode()),
        ],
    }


# ------------------------------------------------------------------------------ changes


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """Change a file in one way, or in two or four."""
    if (
        data[:2] == b"\x1f\x8b" and rng.random() < 0.7
    ):  # else the checksum hides everything behind it
        return gzip.compress(mutate(rng, gzip.decompress(data)), 1)
    out = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 1, 2, 4]))):
        if not out:
            break
        kind = rng.integers(7)
        place = int(
            rng.integers(min(len(out), 512)) if rng.random() < 0.6 else rng.integers(len(out))
        )
        if kind == 0:
            out[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[place] = int(rng.integers(256))
        elif kind == 2:
            width = int(rng.choice([1, 2, 4, 8]))
            order = "little" if rng.random() < 0.5 else "big"
            number = int(NUMBERS[rng.integers(len(NUMBERS))]) & (256**width - 1)
            out[place : place + width] = number.to_bytes(width, order)  # type: ignore[arg-type]
        elif kind == 3:
            del out[place if rng.random() < 0.5 else len(out) - 1 - place // 8 :]
        elif kind == 4:
            del out[place : place + int(rng.integers(1, 40))]
        elif kind == 5:
            start = int(rng.integers(len(out)))
            out[place:place] = out[start : start + int(rng.integers(1, 80))]
        else:
            numbers = list(re.finditer(rb"-?\d+(\.\d+)?", bytes(out[:4096])))
            if numbers:
                found = numbers[int(rng.integers(len(numbers)))]
                text = str(int(rng.choice(["-1", "0", "99999", "4294967296", "9" * 18])))
                out[found.start() : found.end()] = text.encode()
    if out[:4] == b"\x89PNG" and rng.random() < 0.7:
        out = bytearray(_mend_png(bytes(out)))
    return bytes(out)


# where the pixels of an image begin: behind this
STARTS = {
    "PNG": b"IDAT", "JPEG": b"\xff\xda", "TIFF": b"", "DICOM": b"\xe0\x7f\x10\x00", "NRRD": b"\n\n",
    "MHA": b"ElementDataFile = LOCAL\n", "NIfTI": b"",
}  # fmt: skip


def damage_pixels(rng: np.random.Generator, name: str, data: bytes) -> bytes:
    """Cut a file in its pixels, or change these where the format carries a check sum."""
    packed = b"CompressedData = True" in data or b"encoding: gzip" in data
    checked = name == "PNG" or data[:2] == b"\x1f\x8b" or packed
    start = data.index(STARTS[name]) + len(STARTS[name])
    start = {"TIFF": 300, "NIfTI": 20 if data[:2] == b"\x1f\x8b" else 352}.get(name, start)
    place = int(rng.integers(start, len(data)))
    if not checked or rng.random() < 0.3:
        return data[: place if rng.random() < 0.5 else len(data) - int(rng.integers(1, 9))]
    out = bytearray(data)
    if rng.random() < 0.2:
        out[place : place + 8] = bytes(len(out[place : place + 8]))
    for _ in range(int(rng.integers(1, 4))):
        out[int(rng.integers(start, len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _mend_png(data: bytes) -> bytes:
    """Write right checksums, so that what lies behind them is tried too."""
    out, place = bytearray(data), 8
    while place + 12 <= len(out):
        end = place + 8 + int.from_bytes(out[place : place + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(out)


# ------------------------------------------------------------------------------ reading


def _read_picture(path: Path) -> Any:
    from medbudget.data.volumes import Source
    from medbudget.images import ImageError, load_image

    with contextlib.suppress(ImageError):
        image = load_image(path)
        assert image.ndim == 3 and len(image) == 3 and str(image.dtype) == "torch.uint8"
    return _read_source(path, Source((path.name,), "picture"))


def _read_source(path: Path, source: Any) -> Any:
    from medbudget.data.render import apply_window
    from medbudget.data.volumes import read_pixels

    pixels = read_pixels(path.parent, source)
    shown, _ = apply_window(pixels, len(pixels.values) // 2, "auto")
    assert shown.dtype == np.uint8 and shown.shape == pixels.values.shape[1:]
    assert min(pixels.values.shape) > 0
    return pixels.values


def _read_volume(path: Path) -> Any:
    from medbudget.data.prepare import BrokenCase
    from medbudget.data.volumes import find_sources

    sources = [s for s in find_sources(path.parent) if s.files[0] == path.name]
    if not sources:  # without suffix and mark, it is passed over
        raise BrokenCase("no image")
    values = _read_source(path, sources[0])
    return values


def _read_h5(path: Path) -> None:
    from medbudget.data.pcam import load_labels, load_patches

    if path.stem.endswith("y"):
        assert load_labels(path.parent, "train").ndim == 1
    else:
        patches = load_patches(path.parent, "train", [0, 1], size=96)
        assert patches.shape == (2, 3, 96, 96)


def _read_embedding(path: Path) -> None:
    from medbudget import Embedding

    e = Embedding.load(path)
    assert e.vectors.ndim == 2 and e.token[0] == "<" and isinstance(e.step, int)


def _read_official(path: Path) -> None:
    from medbudget.stylegan3.official import import_official, read_pickle

    read_pickle(path)
    import_official(path)


def _read_csv(path: Path) -> None:
    from medbudget.data import chexpert
    from medbudget.data.listed import list_by_table
    from medbudget.data.volumes import Source

    if path.name == "train.csv":
        selected = chexpert.select_clean(chexpert._read_labels(path))
        assert set(selected["label"]) <= set(chexpert.OBSERVATIONS)
        return
    sources = [Source((name,), "picture") for name in ("a.png", "b.png")]
    for source in sources:
        (path.parent / source.files[0]).touch()
    entries = list_by_table(path.parent, path, sources, ("file", "class", None), [], [])
    assert entries and all(isinstance(e.label, str) and e.label for e in entries)


READERS: dict[str, Callable[[Path], Any]] = {
    "PNG": _read_picture,
    "JPEG": _read_picture,
    "TIFF": _read_picture,
    "DICOM": _read_volume,
    "MHA": _read_volume,
    "NIfTI": _read_volume,
    "NRRD": _read_volume,
    "HDF5": _read_h5,
    "embedding .pt": _read_embedding,
    "embedding .safetensors": _read_embedding,
    "StyleGAN3 .pkl": _read_official,
    "CSV": _read_csv,
}


def is_ours(error: BaseException) -> bool:
    """Is this an error as the library promises: ValueError or OSError, with a message of its own?"""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = f"{os.sep}medbudget{os.sep}" in where or type(error).__name__ == "BrokenCase"
    return isinstance(error, ValueError | OSError) and ours and bool(str(error).strip())


def try_input(name: str, path: Path, right: Any = None) -> tuple[str, str]:
    """Read one file; return the outcome, and the error if it is not an expected one.

    `right` are the pixels that it has to hold, if it is read.
    """
    try:
        values = READERS[name](path)
    except Exception as error:
        if is_ours(error):
            return "refused", ""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        return "error", " ".join(text.split())[:300]
    if right is not None and not np.array_equal(values, right):
        return "wrong", f"{np.shape(values)} pixels, not those of the whole file"
    return "read", ""


def work() -> None:
    """Read lines "format seed first count" from stdin and write a line for each input."""
    answer = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # decoders print what they like
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    limit: int | None = None
    with tempfile.TemporaryDirectory() as folder:
        seeds = make_seeds(Path(folder))
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        for line in sys.stdin:
            name, seed, first, count = line.rstrip("\n").split("\t")
            place = Path(folder) / name.replace(" ", "_")
            place.mkdir(exist_ok=True)
            files, right = seeds[name], []
            for file, content in files:  # whole ones have to be read; also loads the decoders
                (place / file).write_bytes(content)
                found, why = try_input(name, place / file)
                assert found == ("refused" if name == "StyleGAN3 .pkl" else "read"), (file, why)
                right.append(READERS[name](place / file) if name in STARTS else None)
                (place / file).unlink()
            if limit is None:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + MEMORY
                hard = resource.getrlimit(resource.RLIMIT_AS)[1]
                resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
            for i in range(int(first), int(first) + int(count)):
                rng = np.random.default_rng([int(seed), list(READERS).index(name), i])
                file, content = files[i % len(files)]
                whole = right[i % len(files)] if i // len(files) % 2 else None
                changed = (
                    mutate(rng, content) if whole is None else damage_pixels(rng, name, content)
                )
                (place / file).write_bytes(changed)
                signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
                signal.alarm(20 * LIMIT_S)
                found, why = try_input(name, place / file, whole)
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
                (place / file).unlink()
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                answer.write(f"{i}\t{found}\t{peak}\t{why}\n")
                answer.flush()


class Worker:
    """The process that reads; started anew when it died."""

    def __init__(self) -> None:
        self.peak = 0
        plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**plain, "OMP_NUM_THREADS": "1"},
        )

    def read(self, name: str, seed: int, first: int, count: int) -> list[tuple[str, str]]:
        """Return outcome and error of inputs from `first`, up to the one that the process died of."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{name}\t{seed}\t{first}\t{count}\n")
        self.process.stdin.flush()
        found = []
        for _ in range(count):
            line = self.process.stdout.readline()
            if not line:
                code = -self.process.wait()
                if code <= 0:
                    raise RuntimeError(f"the reading process failed at {name}, input {first}")
                hang = code in (signal.SIGPROF, signal.SIGALRM)
                found.append(("hang" if hang else "crash", signal.Signals(code).name))
                break
            _, outcome, peak, why = line.rstrip("\n").split("\t", 3)
            self.peak = int(peak)
            found.append((outcome, why))
        return found

    def close(self) -> None:
        self.process.communicate()


def fuzz(
    inputs: int, *, seed: int = 0, formats: tuple[str, ...] = tuple(READERS)
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Try `inputs` files, shared out over the formats; return the tally and what went wrong.

    The tally's "peak MiB" is the largest memory of the process so far, which reads all formats.
    """
    tally: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    worker = Worker()
    for place, name in enumerate(formats):
        total = inputs * (place + 1) // len(formats) - inputs * place // len(formats)
        tally[name] = Counter()
        done = 0
        while done < total:
            found = worker.read(name, seed, done, min(1000, total - done))
            for i, (outcome, why) in enumerate(found, done):
                tally[name][outcome] += 1
                if outcome not in ("read", "refused"):
                    wrong.append(f"{name}, seed {seed}, input {i}: {outcome} {why}")
            done += len(found)
            tally[name]["peak MiB"] = max(tally[name]["peak MiB"], worker.peak)
            if found[-1][0] in ("hang", "crash"):
                worker = Worker()
        print(f"{name:<24}" + "".join(f"{tally[name][o]:>10}" for o in COLUMNS), flush=True)
    worker.close()
    return tally, wrong


def main(arguments: list[str] | None = None) -> int:
    """Print the tally; record it if --record says so."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", default=",".join(READERS))
    parser.add_argument("--record", action="store_true", help="write results/fuzz.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        work()
        return 0
    print(f"{'format':<24}" + "".join(f"{o:>10}" for o in COLUMNS))
    start = time.perf_counter()
    formats = tuple(args.formats.split(","))
    tally, wrong = fuzz(args.inputs, seed=args.seed, formats=formats)
    print(f"{args.inputs} inputs in {(time.perf_counter() - start) / 60:.1f} minutes")
    for line in Counter(re.sub(r"input \d+", "input …", w) for w in wrong).most_common(40):
        print(f"! {line[1]}x {line[0]}")
    for line in wrong[:20]:
        print(f"! {line}")
    if args.record:
        from medbudget.results import write_result

        peak = max(t["peak MiB"] for t in tally.values())
        rows = [
            {"format": n, "inputs": sum(t[o] for o in OUTCOMES), **{o: t[o] for o in OUTCOMES}}
            for n, t in tally.items()
        ]
        command = f"python benchmarks/fuzz.py --inputs {args.inputs} --seed {args.seed} --record"
        values = {"rows": rows, "wrong": wrong[:50], "peak_mib": peak}
        print(f"wrote {write_result('fuzz', values, command=command)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
