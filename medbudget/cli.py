"""Command line: a thin face over the library's functions."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Textual Inversion for medical images on a budget. Not for clinical use.",
)
embedding_app = typer.Typer(no_args_is_help=True, help="Look into embedding files, convert them.")
app.add_typer(embedding_app, name="embedding")
base_app = typer.Typer(no_args_is_help=True, help="Where bases come from; fetch and verify them.")
app.add_typer(base_app, name="base")
embeddings_app = typer.Typer(no_args_is_help=True, help="Embeddings that others released.")
app.add_typer(embeddings_app, name="embeddings")
study_app = typer.Typer(no_args_is_help=True, help="The paper's tables and figures as studies.")
app.add_typer(study_app, name="study")
reader_app = typer.Typer(
    no_args_is_help=True, help="Which of two images looks better? A blinded study with readers."
)
app.add_typer(reader_app, name="reader-study")
prepare_app = typer.Typer(
    no_args_is_help=True,
    help="Turn data sets, or your own images, into image sets split by patient.",
)
app.add_typer(prepare_app, name="prepare")

BaseOption = Annotated[
    str, typer.Option(help="tiny, sd2, sd2-random, a folder in diffusers' layout, or a .ckpt")
]
FastOption = Annotated[
    bool, typer.Option("--fast", help="compile the U-Net first: a minute, pays off in long runs")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu or cuda; default: cuda if there is one")
]
PreparedOption = Annotated[Path, typer.Option(help="folder for images and manifest; resumes there")]
EdgeOption = Annotated[int, typer.Option(help="pixels an edge; paper: 512")]
PerClassOption = Annotated[int, typer.Option(help="of each class in each split; paper: 100")]
FewerOption = Annotated[bool, typer.Option("--allow-fewer", help="share out what there is")]
BrokenOption = Annotated[
    bool, typer.Option("--allow-broken", help="exit 0 in spite of broken cases")
]
WorkersOption = Annotated[int | None, typer.Option(help="processes; default: one for each core")]
ReferenceOption = Annotated[
    int, typer.Option(help="also write that many healthy cases for distances")
]
EachReferenceOption = Annotated[
    int, typer.Option(help="also write that many of each class for distances")
]
DisjointOption = Annotated[
    bool,
    typer.Option("--disjoint/--overlap", help="may the reference share patients with the splits?"),
]
SeedOption = Annotated[int, typer.Option(help="the same seed gives the same result")]


def _square(base: Any, images: Path) -> Any:
    from medbudget import load_images

    return load_images(images, size=base.size)


@app.command()
def doctor() -> None:
    """Tell versions, device, memory, what is reachable and what fits this machine."""
    import torch

    from medbudget.base import TINY, BaseError, load_base
    from medbudget.sources import list_sd2_sources

    problems: list[str] = []
    names = ("medbudget", "torch", "torchvision", "diffusers", "transformers", "timm", "numpy")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for name in names:
        try:
            print(f"  {name} {version(name)}")
        except PackageNotFoundError:
            problems.append(f"{name} is not installed: pip install {name}")
    if torch.cuda.is_available():
        free, total = (value / 2**30 for value in torch.cuda.mem_get_info())
        print(f"GPU {torch.cuda.get_device_name()}: {free:.1f} of {total:.1f} GiB free")
        lines = _what_fits(free)
        for line, _ in lines:
            print(f"  {line}")
        if not all(fits for _, fits in lines[1:]):  # training can do without the first
            problems.append("too little GPU memory: close other programs, or use --base tiny")
    else:
        print("GPU none: everything runs on the CPU; --base tiny is made for that")
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        print(
            f"CPU {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.1f} GiB memory"
        )
    print(f"disk {shutil.disk_usage('.').free / 2**30:.1f} GiB free here")
    try:
        tiny = load_base("tiny", device="cpu")
        print(f"base tiny: ready, hash {tiny.hash}, {tiny.size} px; batch 8 fits 2 GiB of memory")
    except BaseError as error:
        problems.append(f"base tiny in {TINY}: {error}")
    try:
        here = next((f"{s}, {p}" for s, p in list_sd2_sources() if p is not None), None)
        print(f"base sd2: {here or 'not here; medbudget base fetch gets it (5 GB)'}")
    except BaseError as error:
        problems.append(f"{error}: correct or unset it")
    if platform.libc_ver()[0] == "glibc" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        problems.append(
            "training on this CPU is several times faster with the three MALLOC_ variables of the "
            "Makefile in the environment: export them before you start"
        )
    for problem in problems:
        print(f"! {problem}")
    if not problems:
        print("no problems found")


def _what_fits(free: float) -> list[tuple[str, bool]]:
    """Say for each job with Stable Diffusion 2.0 whether `free` GiB of GPU memory are enough."""
    from medbudget.memory import largest_batch, plan_memory

    lines = []
    jobs = {
        "invert --base sd2": ("invert", False),
        "invert --base sd2, checkpointing (turned on by itself)": ("invert", True),
        "sample --base sd2": ("sample", False),
    }
    for name, (job, checkpointing) in jobs.items():
        need = plan_memory(job, checkpointing=checkpointing).total
        batch = largest_batch(job, free, checkpointing=checkpointing) if free >= need else 0
        words = f"fits up to batch {batch}" if batch else f"does not fit {free:.1f} GiB"
        lines.append((f"{name} at 512 px takes {need:.1f} GiB at batch 1 and {words}", batch > 0))
    return lines


@app.command()
def phantoms(
    out: Annotated[Path, typer.Argument(help="folder to write PNG files to")],
    kind: Annotated[str, typer.Option(help="prostate, chest or histology")] = "prostate",
    label: Annotated[
        list[str] | None, typer.Option(help="e.g. healthy; several for combined chest diseases")
    ] = None,
    n: Annotated[int, typer.Option(help="number of images")] = 100,
    size: Annotated[int, typer.Option(help="pixels")] = 64,
    seed: SeedOption = 0,
    split: Annotated[str, typer.Option(help="train, val or test: they never overlap")] = "train",
) -> None:
    """Draw procedural stand-ins for medical images (phantoms)."""
    from medbudget import make_phantoms, save_images
    from medbudget.data.phantoms import KINDS

    labels = tuple(label) if label else (KINDS[kind][0],) if kind in KINDS else ("",)
    made = make_phantoms(kind, labels, n, size=size, seed=seed, split=split)
    save_images(made.images, out)
    print(f"wrote {n} {kind} phantoms ({made.labels[0]}, {split}) to {out}")


@app.command()
def invert(
    images: Annotated[Path, typer.Argument(help="folder of images of one class")],
    token: Annotated[str, typer.Option(help='the new word, e.g. "<mine>"')],
    out: Annotated[Path, typer.Option(help="x.safetensors, x.pt (A1111) or x.bin (diffusers)")],
    base: BaseOption = "tiny",
    preset: Annotated[
        str | None, typer.Option(help="tiny, colab or paper; default: the base's")
    ] = None,
    n_vectors: Annotated[int | None, typer.Option(help="rows, 1 to 74; paper: 64")] = None,
    steps: Annotated[int | None, typer.Option(help="paper: 50000")] = None,
    lr: Annotated[float | None, typer.Option(help="paper: 0.005")] = None,
    batch_size: Annotated[int | None, typer.Option(help="paper: 1")] = None,
    init: Annotated[str | None, typer.Option(help='"*" (A1111), mean, or any text')] = None,
    latents: Annotated[str | None, typer.Option(help="once (A1111), mean or resample")] = None,
    seed: SeedOption = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="save there; go on from it")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="steps")] = None,
    preview_every: Annotated[int | None, typer.Option(help="steps between preview images")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="write TensorBoard events there")] = None,
    fast: FastOption = False,
    device: DeviceOption = None,
) -> None:
    """Train an embedding on a folder of images (Textual Inversion)."""
    from medbudget import InversionSettings, load_base
    from medbudget import invert as run
    from medbudget.embeddings import check_token
    from medbudget.files import check_writable, hold

    check_token(token)
    if out.suffix not in (".safetensors", ".pt", ".bin"):
        raise ValueError(f"--out {out}: allowed endings are .safetensors, .pt, .bin")
    check_writable(out)
    loaded = load_base(base, device=device, fast=fast)
    settings = InversionSettings.preset(
        preset or loaded.preset,
        n_vectors=n_vectors,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        init=init,
        latents=latents,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    pictures = _square(loaded, images)
    count = f"{len(pictures)} image{'s' if len(pictures) > 1 else ''}"
    print(f"{count}, {settings.steps} steps of {settings.batch_size} on {loaded.device}")
    if len(pictures) < 5:
        print("note: a word from so few images copies them; the paper's smallest set has 5")
    callback, close = _observer(loaded, token, out, preview_every, log_dir)
    try:
        with hold(out):
            made = run(
                loaded,
                pictures,
                token=token,
                settings=settings,
                checkpoint=checkpoint,
                callback=callback,
                data=f"{count} of folder {images.name}",
            )
            made.save(out)
    finally:
        close()
    print(f"wrote {out} ({out.stat().st_size / 1024:.0f} kB): {token}, {len(made.vectors)} vectors")


def _observer(
    base: Any, token: str, out: Path, preview_every: int | None, log_dir: Path | None
) -> tuple[Callable[[dict[str, Any]], None] | None, Callable[[], None]]:
    """Return the callback for previews and TensorBoard, and what closes it."""
    from medbudget import Embedding, sample, save_images

    writer: Any = None
    if log_dir is not None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--log-dir needs TensorBoard: pip install tensorboard") from None
        writer = SummaryWriter(log_dir)
    if writer is None and not preview_every:
        return None, lambda: None

    def callback(state: dict[str, Any]) -> None:
        if writer is not None:
            for name in ("loss", "lr", "grad_norm"):
                writer.add_scalar(name, state[name], state["step"])
        if preview_every and state["step"] % preview_every == 0:
            now = Embedding(state["vectors"].clone(), token)
            base.vae.to(base.device)
            images = sample(base, token, embeddings=[now], n=4)
            names = [f"step{state['step']:06d}_{i}" for i in range(len(images))]
            save_images(images, out.with_name(f"{out.stem}_previews"), names=names)

    return callback, writer.close if writer is not None else lambda: None


def _warn_of_other_base(e: Any, base: Any) -> None:
    """Say on stderr if an embedding names a base other than this one."""
    if not e.base_hash or e.base_hash in (base.hash, base.checkpoint_hash):
        return
    if len(e.base_hash) == 8 and not base.checkpoint_hash:
        return  # A1111's hash of a file, which a folder has not
    print(
        f"note: {e.token} was made on a base with hash {e.base_hash}, this one has {base.hash}: "
        "images will differ from those it was trained for",
        file=sys.stderr,
    )


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help='e.g. "<mine>" or "<a>:0.5 AND <b>:0.5"')],
    out: Annotated[Path, typer.Option(help="folder for the PNG files")],
    embeddings: Annotated[list[Path] | None, typer.Option(help="embedding files, one each")] = None,
    n: Annotated[int, typer.Option(help="number of images")] = 16,
    steps: Annotated[int | None, typer.Option(help="default 25 on tiny, else 100")] = None,
    cfg_scale: Annotated[float, typer.Option(help="classifier-free guidance; paper: 2")] = 2.0,
    negative_prompt: Annotated[str, typer.Option(help="what to guide away from")] = "",
    seed: SeedOption = 0,
    base: BaseOption = "tiny",
    fast: FastOption = False,
    device: DeviceOption = None,
) -> None:
    """Generate images from a prompt; a command that was stopped goes on where it was."""
    from medbudget import Embedding, load_base, save_images
    from medbudget import sample as run
    from medbudget.files import check_writable, hold
    from medbudget.images import read_record
    from medbudget.progress import quiet, tqdm
    from medbudget.sampling import BLOCK, check_numbers, default_steps, total_guidance

    check_writable(out / "00000.png")
    files = [Embedding.load(path) for path in embeddings or []]
    loaded = load_base(base, device=device, fast=fast)
    for e in files:
        _warn_of_other_base(e, loaded)
    steps = default_steps(loaded) if steps is None else steps
    check_numbers(n=n, steps=steps, cfg_scale=cfg_scale)
    record = _describe_images(
        loaded,
        files,
        prompt=prompt,
        negative_prompt=negative_prompt,
        steps=steps,
        cfg_scale=cfg_scale,
    )
    names = [f"{i:05d}" for i in range(n)]
    records = [{**record, "seed": seed + i} for i in range(n)]
    paths = [out / f"{name}.png" for name in names]
    for path, mine in zip(paths, records):
        if path.exists() and read_record(path) != mine:
            raise ValueError(
                f"{path} is another image than this command makes: choose another --out, or "
                "delete the folder"
            )
    with hold(out), tqdm(total=n, desc="sample", unit="image") as bar:
        for first in range(0, n, BLOCK):
            block = slice(first, min(first + BLOCK, n))
            if not all(path.exists() for path in paths[block]):
                with quiet():
                    images = run(
                        loaded,
                        prompt,
                        embeddings=files,
                        negative_prompt=negative_prompt,
                        n=len(names[block]),
                        steps=steps,
                        cfg_scale=cfg_scale,
                        seed=seed + first,
                    )
                save_images(images, out, names=names[block], records=records[block])
            bar.update(len(names[block]))
    print(
        f"wrote {n} synthetic images to {out}; total guidance {total_guidance(prompt, cfg_scale):g}"
    )


def _describe_images(base: Any, words: list[Any], **settings: Any) -> dict[str, Any]:
    """Return what is written into every synthetic image's file."""
    from medbudget.files import hash_tensors

    return {
        "synthetic": True,
        **settings,
        "base": Path(base.name).name,
        "base_hash": base.hash,
        "embeddings": {e.token: hash_tensors({"vectors": e.vectors}) for e in words},
    }


@app.command(name="inpaint")
def inpaint_command(
    image: Annotated[Path, typer.Argument(help="an image, or a folder of them")],
    mask_and_prompt: Annotated[
        list[str],
        typer.Argument(
            metavar="[MASK] PROMPT",
            help="a mask file, white where to repaint, or a folder with a mask for each image "
            "under its name; left out with --ellipse. Then the prompt",
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder for the PNG files")],
    ellipse: Annotated[
        list[str] | None,
        typer.Option(help="x,y,rx,ry in fractions of the edge, e.g. .6,.55,.08,.06; repeatable"),
    ] = None,
    embeddings: Annotated[list[Path] | None, typer.Option(help="embedding files, one each")] = None,
    save_masks: Annotated[
        bool, typer.Option("--save-masks", help="write each image's mask to OUT/masks too")
    ] = False,
    strength: Annotated[float, typer.Option(help="0 to 1: how far from the original")] = 0.75,
    mask_blur: Annotated[float, typer.Option(help="pixels at 512, scaled to the size")] = 4.0,
    content: Annotated[str, typer.Option(help="original, fill, noise or zeros")] = "original",
    n: Annotated[int, typer.Option(help="variants of each image and mask")] = 1,
    steps: Annotated[int | None, typer.Option(help="default 25 on tiny, else 100")] = None,
    cfg_scale: Annotated[float, typer.Option(help="classifier-free guidance; paper: 2")] = 2.0,
    negative_prompt: Annotated[str, typer.Option(help="what to guide away from")] = "",
    seed: SeedOption = 0,
    base: BaseOption = "tiny",
    device: DeviceOption = None,
) -> None:
    """Repaint what a mask covers: every mask on every image, or a mask for each image."""
    import torch

    from medbudget import Embedding, load_base, save_images
    from medbudget.files import check_writable, hold
    from medbudget.images import find_images
    from medbudget.inpainting import check_masks
    from medbudget.inpainting import inpaint as run
    from medbudget.sampling import default_steps

    if len(mask_and_prompt) != (1 if ellipse else 2):
        raise ValueError(
            "write either IMAGE MASK PROMPT, or IMAGE PROMPT --ellipse x,y,rx,ry; found "
            f"{len(mask_and_prompt)} arguments after IMAGE and {len(ellipse or [])} ellipses"
        )
    prompt = mask_and_prompt[-1]
    check_writable(out / "00000.png")
    files = find_images(image)
    loaded = load_base(base, device=device)
    pictures = _square(loaded, image)
    if ellipse:
        masks = {f"ellipse{i}": _parse_ellipse(text) for i, text in enumerate(ellipse)}
    else:
        folder = Path(mask_and_prompt[0])
        masks = {p.stem: _square(loaded, p)[0, 0] for p in find_images(folder)}
        if folder.is_dir() and image.is_dir():
            missing = sorted({p.stem for p in files} - set(masks))
            if missing:
                raise ValueError(f"{folder} has no mask for {', '.join(missing[:5])}")
    paired = not ellipse and image.is_dir() and Path(mask_and_prompt[0]).is_dir()
    names, which, chosen = [], [], []
    for i, file in enumerate(files):
        for name, mask in masks.items():
            if paired and name != file.stem:
                continue
            names.append(file.stem if paired or len(masks) == 1 else f"{file.stem}_{name}")
            which.append(i)
            chosen.append(check_masks(mask, pictures.shape[-1])[0])
    settings: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "strength": strength,
        "mask_blur": mask_blur,
        "content": content,
        "steps": default_steps(loaded) if steps is None else steps,
        "cfg_scale": cfg_scale,
        "seed": seed,
    }
    words = [Embedding.load(path) for path in embeddings or []]
    with hold(out):
        made = run(
            loaded,
            pictures[which],
            torch.stack(chosen),
            prompt,
            embeddings=words,
            n=n,
            **settings,
        )
        record = _describe_images(loaded, words, prompt=prompt, **settings)
        records = [{**record, "image": i} for i in range(len(made))]
        names = [f"{name}_{k}" if n > 1 else name for name in names for k in range(n)]
        save_images(made, out, names=names, records=records)
        if save_masks:
            binary = (torch.stack(chosen) >= 0.5).repeat_interleave(n, 0)
            gray = binary[:, None].expand(-1, 3, -1, -1).to(torch.uint8) * 255
            save_images(gray, out / "masks", names=names)
    print(f"wrote {len(made)} inpainted images to {out}: synthetic under their masks")


def _parse_ellipse(text: str) -> Any:
    from medbudget.inpainting import ellipse

    try:
        x, y, rx, ry = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"--ellipse {text!r}: write x,y,rx,ry in fractions of the edge, e.g. .6,.55,.08,.06"
        ) from None
    return ellipse((x, y), (rx, ry))


@app.command()
def evaluate(
    real: Annotated[Path, typer.Argument(help="folder of real images")],
    synthetic: Annotated[Path, typer.Argument(help="folder of generated images")],
    train: Annotated[
        Path | None, typer.Option(help="folder of training images: adds memorisation")
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="extractor, or NAME=WEIGHTS; may be repeated; default efficientnet-lite0"
        ),
    ] = None,
    permutation: Annotated[
        Path | None, typer.Option(help="folder of another generator's images: adds a test")
    ] = None,
    paired: Annotated[
        bool, typer.Option(help="files of both generators were made from the same seeds, in order")
    ] = False,
    repeats: Annotated[int, typer.Option(help="permutations")] = 1000,
    normalize: Annotated[str, typer.Option(help="none, or paper: each image z-scored")] = "none",
    interval: Annotated[str, typer.Option(help="influence, bootstrap or paper")] = "influence",
    floor: Annotated[bool, typer.Option(help="real versus real beside every distance")] = True,
    size: Annotated[int | None, typer.Option(help="pixels; default: that of the synthetic")] = None,
    out: Annotated[Path | None, typer.Option(help="also write the scores as JSON")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="PNG of the 8 images nearest to --train, beside theirs")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> None:
    """Score generated images against real ones, beside the real-versus-real floor."""
    from medbudget import evaluate as run
    from medbudget import load_images
    from medbudget.files import check_writable
    from medbudget.metrics import format_table, to_json

    if pairs is not None and train is None:
        raise ValueError("--pairs shows training images: name their folder with --train")
    if paired and permutation is None:
        raise ValueError("--paired is about --permutation: name the other generator's folder")
    for path in (out, pairs):
        if path is not None:
            check_writable(path)
    made = load_images(synthetic, size=size)

    def load(folder: Path | None) -> Any:
        return None if folder is None else load_images(folder, size=size or made.shape[2])

    learned = load(train)
    scores = run(
        load(real),
        made,
        features=features or "efficientnet-lite0",
        train=learned,
        permutation=load(permutation),
        paired=paired,
        normalize=normalize,
        interval=interval,
        floor=floor,
        repeats=repeats,
        seed=seed,
        device=device,
        progress=True,
    )
    print(format_table(scores))
    if out is not None:
        to_json(scores, out)
        print(f"wrote {out}")
    if pairs is not None:
        _write_pairs(made, learned, pairs)


def _write_pairs(made: Any, learned: Any, path: Path) -> None:
    """Draw the synthetic images nearest to training images (in pixels) above their neighbours."""
    from medbudget import plots
    from medbudget.files import atomic_path
    from medbudget.metrics import pixel_neighbours

    distance, index = pixel_neighbours(made, learned)
    worst = distance.argsort()[:8].copy()
    figure = plots.show_rows(
        {"synthetic": made[worst], "nearest in training": learned[index[worst]]},
        titles=[f"{value:.3f}" for value in distance[worst]],
        note="1 - correlation, over mirror images and small shifts; 0: a copy",
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    print(f"wrote {path}")


@app.command()
def classify(
    train: Annotated[Path, typer.Argument(help="folder with a folder of images for each class")],
    val: Annotated[Path, typer.Argument(help="the same classes: chooses the best step")],
    test: Annotated[Path, typer.Argument(help="the same classes: looked at once a run")],
    synthetic: Annotated[
        Path | None, typer.Option(help="the same classes: is training with these better?")
    ] = None,
    runs: Annotated[int, typer.Option(help="trainings that differ in their seed; paper: 10")] = 10,
    out: Annotated[Path, typer.Option(help="folder for runs and scores; goes on there")] = Path(
        "classified"
    ),
    preset: Annotated[
        str | None, typer.Option(help="tiny, modern or paper; default: tiny on a CPU, else modern")
    ] = None,
    positive: Annotated[
        str | None, typer.Option(help="class that scores speak for; default: second by name")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="bring all images to this size first; else they must agree")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="batches of training; paper: 6250")] = None,
    lr: Annotated[float | None, typer.Option(help="paper: 0.0001")] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16; auto: half on a GPU")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="imagenet, none, or a file of the network's weights")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> None:
    """Train classifiers on real and on real + synthetic images; compare them on a test set."""
    import torch

    from medbudget.classifier import (
        ClassifierSettings,
        check_splits,
        load_cases,
        repeat_classifier,
        score_gain,
        score_runs,
    )
    from medbudget.files import check_writable, hold
    from medbudget.metrics import bootstrap_auc, delong_difference, format_table, to_json

    folders = {"train": train, "val": val, "test": test}
    if synthetic is not None:
        folders["synthetic"] = synthetic
    cases = {n: load_cases(f, positive=positive, size=size) for n, f in folders.items()}
    check_splits(cases)
    check_writable(out / "scores.csv")
    gpu = torch.device(device).type != "cpu" if device else torch.cuda.is_available()
    settings = ClassifierSettings.preset(
        preset or ("modern" if gpu else "tiny"),
        steps=steps,
        lr=lr,
        precision=precision,
        weights=weights,
        seed=seed,
    )
    negative, shown = cases["test"].classes
    print(f"{shown} against {negative}: " + ", ".join(f"{len(c)} {n}" for n, c in cases.items()))
    sets = {"real": cases["train"]}
    if synthetic is not None:
        sets["real + synthetic"] = cases["train"] + cases["synthetic"]
    labels = cases["test"].labels.numpy()
    n = (int((labels == 0).sum()), int((labels == 1).sum()))
    found, rows = {}, []
    with hold(out):
        for name, chosen in sets.items():
            folder = out / name.replace(" + ", "_and_")
            found[name] = repeat_classifier(
                chosen,
                cases["val"],
                cases["test"],
                settings,
                runs=runs,
                folder=folder,
                device=device,
            )
            scores = score_runs(labels, found[name])
            if name != "real":
                gain = bootstrap_auc(labels, found[name], found["real"])
                scores += score_gain(gain, n)
                one = delong_difference(labels, found[name][0], found["real"][0])
                scores.append(_delong_score(one, n))
            rows += [replace(score, name=f"{score.name}, {name}") for score in scores]
        _write_scores(out / "scores.csv", cases["test"], found, seed)
        to_json(rows, out / "result.json")
    print(format_table(rows))
    print(f"wrote {out / 'scores.csv'} (every test case in every run) and {out / 'result.json'}")


def _delong_score(difference: Any, n: tuple[int, int]) -> Any:
    from medbudget.metrics import Score

    note = f"DeLong, p = {difference.p_value:.3g}; a check on one pair of runs"
    return Score("gain of the first run", difference.value, difference.interval, n, note=note)


def _write_scores(path: Path, test: Any, found: dict[str, Any], seed: int) -> None:
    """Write one line for each case, training set and run."""
    import csv

    from medbudget.files import atomic_path

    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "label", "trained on", "seed", "score"])
        for name, runs in found.items():
            for i, run in enumerate(runs):
                for case, label, score in zip(test.names, test.labels.tolist(), run):
                    writer.writerow([case, label, name, seed + i, f"{score:.6f}"])


@app.command()
def describe(
    images: Annotated[Path, typer.Argument(help="a folder, or one image")],
    base: BaseOption = "tiny",
) -> None:
    """Write the visual words of an image (or the mean of a folder): a prompt, or an --init."""
    from medbudget import describe as run
    from medbudget import load_base

    loaded = load_base(base)
    print(run(loaded, _square(loaded, images)))


def _prepare(
    run: Callable[..., Any],
    *folders: Path,
    workers: int | None,
    allow_broken: bool,
    **options: Any,
) -> None:
    """Run a preparation and print what it did; broken cases make the exit code 1."""
    from medbudget.results import count_cores

    report = run(*folders, workers=count_cores() if workers is None else workers, **options)
    print(report)
    print(f"look at {report.out / 'contact_sheet.png'}")
    if report.broken and not allow_broken:
        raise typer.Exit(1)


@prepare_app.command("picai")
def prepare_picai(
    images: Annotated[Path, typer.Argument(help="folder of <patient>/<patient>_<study>_t2w.mha …")],
    labels: Annotated[Path, typer.Argument(help="a copy of DIAGNijmegen/picai_labels")],
    out: PreparedOption,
    size: EdgeOption = 512,
    seed: SeedOption = 0,
    per_class: PerClassOption = 100,
    allow_fewer: FewerOption = False,
    reference: ReferenceOption = 0,
    disjoint: DisjointOption = True,
    sequences: Annotated[str, typer.Option(help="all: T2W, ADC, DWI as R, G, B; or t2w")] = "all",
    geometry: Annotated[str, typer.Option(help="physical, or paper")] = "physical",
    window: Annotated[str, typer.Option(help="percentile, or volume (paper)")] = "percentile",
    workers: WorkersOption = None,
    allow_broken: BrokenOption = False,
) -> None:
    """Prostate MRI: one axial slice a case, with tumour and gland masks."""
    from medbudget.data.picai import prepare_picai as run

    _prepare(
        run,
        images,
        labels,
        out,
        size=size,
        seed=seed,
        per_class=per_class,
        allow_fewer=allow_fewer,
        reference=reference,
        disjoint=disjoint,
        sequences=sequences,
        geometry=geometry,
        window=window,
        workers=workers,
        allow_broken=allow_broken,
    )


@prepare_app.command("chexpert")
def prepare_chexpert(
    root: Annotated[Path, typer.Argument(help="the folder with train.csv")],
    out: PreparedOption,
    size: EdgeOption = 512,
    seed: SeedOption = 0,
    per_class: PerClassOption = 100,
    allow_fewer: FewerOption = False,
    uncertain: Annotated[
        str, typer.Option(help="exclude images with uncertain findings, or ignore those findings")
    ] = "exclude",
    reference: ReferenceOption = 0,
    disjoint: DisjointOption = True,
    workers: WorkersOption = None,
    allow_broken: BrokenOption = False,
) -> None:
    """Chest X-rays: AP views with exactly one finding, one image a patient."""
    from medbudget.data.chexpert import prepare_chexpert as run

    _prepare(
        run,
        root,
        out,
        size=size,
        seed=seed,
        per_class=per_class,
        allow_fewer=allow_fewer,
        uncertain=uncertain,
        reference=reference,
        disjoint=disjoint,
        workers=workers,
        allow_broken=allow_broken,
    )


@prepare_app.command("pcam")
def prepare_pcam(
    folder: Annotated[Path, typer.Argument(help="folder with the official .h5 or .h5.gz files")],
    out: PreparedOption,
    size: EdgeOption = 512,
    seed: SeedOption = 0,
    per_class: PerClassOption = 100,
    allow_fewer: FewerOption = False,
    reference: EachReferenceOption = 0,
    workers: WorkersOption = None,
    allow_broken: BrokenOption = False,
) -> None:
    """Histology: random training patches; validation and test stay in their HDF5 files."""
    from medbudget.data.pcam import prepare_pcam as run

    _prepare(
        run,
        folder,
        out,
        size=size,
        seed=seed,
        per_class=per_class,
        allow_fewer=allow_fewer,
        reference=reference,
        workers=workers,
        allow_broken=allow_broken,
    )


@prepare_app.command("folder")
def prepare_folder(
    root: Annotated[Path, typer.Argument(help="one folder for each class, or any with --labels")],
    out: PreparedOption,
    labels: Annotated[Path | None, typer.Option(help="CSV: file, class, patient")] = None,
    file_column: Annotated[str, typer.Option(help="of the CSV")] = "file",
    label_column: Annotated[str, typer.Option(help="of the CSV")] = "class",
    patient_column: Annotated[str, typer.Option(help="of the CSV, if it has one")] = "patient",
    patient_pattern: Annotated[
        str | None,
        typer.Option(help="regular expression on the path; its first group is the patient"),
    ] = None,
    split: Annotated[
        str, typer.Option(help="proportions of train,val,test; or 1: all in train")
    ] = "0.6,0.2,0.2",
    per_class: Annotated[
        int | None, typer.Option(help="patients of each class in each split, instead of all")
    ] = None,
    allow_fewer: FewerOption = False,
    reference: EachReferenceOption = 0,
    disjoint: DisjointOption = True,
    slices: Annotated[str, typer.Option(help="of volumes: middle, mask or every:K")] = "middle",
    masks: Annotated[Path | None, typer.Option(help="folder of masks, for --slices mask")] = None,
    plane: Annotated[str, typer.Option(help="native, axial, coronal or sagittal")] = "native",
    window: Annotated[str, typer.Option(help="auto, tags, percentile or LOW,HIGH")] = "auto",
    size: EdgeOption = 512,
    seed: SeedOption = 0,
    key: Annotated[
        Path | None, typer.Option(help="write which number is which patient there; keep it safe")
    ] = None,
    workers: WorkersOption = None,
    allow_broken: BrokenOption = False,
) -> None:
    """Your own images: DICOM, NIfTI, MHA, NRRD, PNG, JPEG, TIFF; de-identified but for burnt-in text."""
    from medbudget.data.folder import prepare_folder as run

    try:
        proportions = [float(value) for value in split.split(",")]
    except ValueError:
        raise ValueError(f"--split {split}: numbers with commas, such as 0.6,0.2,0.2") from None
    _prepare(
        run,
        root,
        out,
        labels=labels,
        file_column=file_column,
        label_column=label_column,
        patient_column=patient_column,
        patient_pattern=patient_pattern,
        proportions=proportions,
        per_class=per_class,
        allow_fewer=allow_fewer,
        reference=reference,
        disjoint=disjoint,
        slices=slices,
        masks=masks,
        plane=plane,
        window=window,
        size=size,
        seed=seed,
        key=key,
        workers=workers,
        allow_broken=allow_broken,
    )


@embedding_app.command("show")
def embedding_show(
    file: Annotated[Path, typer.Argument()],
    base: Annotated[str | None, typer.Option(help="check that it fits this base")] = None,
) -> None:
    """Print token, shape, steps, norms and base of an embedding file."""
    from medbudget import Embedding, load_base

    e = Embedding.load(file)
    norms = e.vectors.norm(dim=1)
    print(f"token   {e.token}")
    print(f"shape   {tuple(e.vectors.shape)} (vectors, width)")
    print(f"step    {e.step}")
    print(f"norms   mean {norms.mean():.2f}, {norms.min():.2f} to {norms.max():.2f}")
    print(f"base    {e.base or 'unknown'} (hash {e.base_hash or 'unknown'})")
    print(f"data    {e.data or 'unknown'}")
    print(f"file    {file.stat().st_size / 1024:.0f} kB")
    if base is not None:
        loaded = load_base(base)
        e.check_fits(loaded.width, loaded.name)
        if e.base_hash == loaded.hash:
            print(f"fits    base {base}: same hash")
        elif e.base_hash and e.base_hash == loaded.checkpoint_hash:
            print(f"fits    base {base}: the checkpoint that it names")
        else:
            print(
                f"! made on a base with hash {e.base_hash or 'unknown'}, {base} here has "
                f"{loaded.hash}: images will differ from those it was trained for"
            )


@embedding_app.command("card")
def embedding_card(
    file: Annotated[Path, typer.Argument()],
    scores: Annotated[Path | None, typer.Option(help="what medbudget evaluate --out wrote")] = None,
    licence: Annotated[str, typer.Option(help="as the hub spells it, e.g. mit")] = "other",
    out: Annotated[Path | None, typer.Option(help="write it there; else print it")] = None,
) -> None:
    """Write the model card of an embedding: data, licence, steps, base, scores, use, limits."""
    from medbudget import Embedding
    from medbudget.files import check_writable, write_text
    from medbudget.hub import make_card, read_scores

    card = make_card(Embedding.load(file), scores=read_scores(scores), licence=licence)
    if out is None:
        print(card, end="")
    else:
        write_text(check_writable(out), card)
        print(f"wrote {out}")


@embedding_app.command("push")
def embedding_push(
    file: Annotated[Path, typer.Argument()],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub")],
    scores: Annotated[Path | None, typer.Option(help="what medbudget evaluate --out wrote")] = None,
    licence: Annotated[str, typer.Option(help="as the hub spells it, e.g. mit")] = "other",
    public: Annotated[bool, typer.Option("--public", help="else only you can see it")] = False,
) -> None:
    """Upload an embedding with its card to the Hugging Face hub (after hf auth login)."""
    from medbudget import Embedding
    from medbudget.hub import push_embedding, read_scores

    e = Embedding.load(file)
    address = push_embedding(
        e, repo, scores=read_scores(scores), licence=licence, private=not public
    )
    print(f"pushed {e.token} to {address}")


@embeddings_app.command("paper")
def embeddings_paper(
    fetch: Annotated[list[str] | None, typer.Option(help="a name, or all; repeatable")] = None,
    out: Annotated[Path, typer.Option(help="folder for the files")] = Path("embeddings"),
) -> None:
    """List the eight embeddings that the paper's authors released, and fetch them on request."""
    from medbudget.hub import (
        PAPER_CHECKPOINT,
        PAPER_EMBEDDINGS,
        PAPER_URL,
        fetch_paper_embedding,
    )

    if not fetch:
        print(f"{'name':<27}{'steps':>8}  {'SHA-256':<14}draws")
        for e in PAPER_EMBEDDINGS:
            print(f"{e.name:<27}{e.steps:>8,}  {e.sha256[:12] or 'unknown':<14}{e.draws}")
        print(
            f"64 vectors of width 1024 each, for Stable Diffusion 2.0 ({PAPER_CHECKPOINT}); MIT. "
            f"From {PAPER_URL}. Get them with --fetch NAME or --fetch all"
        )
        return
    names = [e.name for e in PAPER_EMBEDDINGS] if "all" in fetch else fetch
    for name in names:
        print(f"ready: {fetch_paper_embedding(name, out)}")


@base_app.command("list")
def base_list() -> None:
    """List the bases by name, and which of them are on this machine."""
    from medbudget.sources import RANDOM, TINY, list_sd2_sources, read_architectures

    print(f"tiny          {'ready' if (TINY / 'unet').is_dir() else 'missing'}, in the package")
    for source, path in list_sd2_sources():
        print(f"sd2           {f'ready, {path}' if path else 'not here'}: {source}")
    for name, kind in read_architectures().items():
        print(f"{name + RANDOM:<14}random weights, for trials of speed and memory: {kind['title']}")
    print("or a folder in diffusers' layout, or a .ckpt or .safetensors file: give its path")


@base_app.command("fetch")
def base_fetch(name: Annotated[str, typer.Argument(help="sd2")] = "sd2") -> None:
    """Fetch Stable Diffusion 2.0 into the hub's cache; a broken download goes on."""
    from medbudget.sources import find_sd2

    if name != "sd2":
        raise ValueError(f"{name!r} is not fetched: only sd2 is; see medbudget base list")
    print(f"ready: {find_sd2()}")


@base_app.command("verify")
def base_verify(
    name: Annotated[str, typer.Argument(help="tiny, sd2, a folder or a file")],
    device: DeviceOption = None,
) -> None:
    """Measure whether a base is what it should be; exit code 1 if not."""
    from medbudget import load_base
    from medbudget.base import verify_base

    base = load_base(name, device=device)
    checks = verify_base(base)
    print(f"{'hash':<13}{base.hash}, {base.size} px, {base.note or 'no note'}")
    for check, (found, passed) in checks.items():
        print(f"{check:<13}{'ok' if passed else 'FAILED'}: {found}")
    if not all(passed for _, passed in checks.values()):
        raise typer.Exit(1)


@embedding_app.command("convert")
def embedding_convert(
    file: Annotated[Path, typer.Argument()],
    out: Annotated[Path, typer.Argument(help="*.safetensors, *.pt (A1111) or *.bin (diffusers)")],
    token: Annotated[str | None, typer.Option(help="give it another token")] = None,
) -> None:
    """Write an embedding in another program's format."""
    from medbudget import Embedding

    Embedding.load(file, token=token).save(out)
    print(f"wrote {out}")


StoreOption = Annotated[Path, typer.Option(help="folder of results; shared by all machines")]
PresetOption = Annotated[str, typer.Option(help="tiny, colab or paper")]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        help="ROLE=FOLDER of real images; of table1: train, reference, floor; of table2: "
        "prostate, chest, histology as prepare writes them "
        "(tiny without --data: phantoms)"
    ),
]


def _plan_study(name: str, preset: str, store: Path, data: list[str] | None) -> tuple[Any, Any]:
    from medbudget import load_base
    from medbudget.studies import Store, make_study
    from medbudget.studies.catalogue import find_recipe

    recipe = find_recipe(name, preset)
    sources = {}
    for item in data or []:
        role, equals, folder = item.partition("=")
        if not equals:
            raise ValueError(
                f"--data {item!r} is not ROLE=FOLDER; roles of {name}: "
                f"{', '.join(recipe.roles) or 'none'}"
            )
        sources[role] = Path(folder)
    base = load_base(recipe.presets[preset].base)
    study = make_study(name, preset, base_hash=base.hash, sources=sources)
    return study, Store(store, sources)


def _print_plan(study: Any, store: Any, found: Any) -> None:
    from medbudget.studies import simulate
    from medbudget.studies.live import format_time
    from medbudget.studies.planning import TRIAL

    print(f"{study.name}, preset {study.preset}, base {study.base} {study.base_hash}")
    print(f"{'tasks':<12}{'done':>6}{'of':>6}   {'made from':<18}{'the rest':<10}measured by")
    for kind, total in found.total.items():
        seconds, speed = found.seconds[kind], found.speed.get(kind)
        left = "unknown" if seconds is None else format_time(seconds)
        needs = ", ".join(found.needs[kind]) or "–"
        source = speed.source if speed else ""
        print(f"{kind:<12}{found.done[kind]:>6}{total:>6}   {needs:<18}{left:<10}{source}")
    if found.all_seconds is None:
        print("the rest is unknown until one of each kind is done; --dry-run tries a small one")
    elif found.all_seconds:
        ends = {
            workers: simulate(
                study.tasks,
                lambda task: 0.0 if store.has(task) else found.speed[task.kind].seconds(task),
                workers,
            )[0]
            for workers in (1, 2, 8)
        }
        print(
            "estimated: "
            + ", ".join(
                f"{format_time(end)} on {n} worker{'s'[: n - 1]}" for n, end in ends.items()
            )
        )
    if any(speed.source == TRIAL for speed in found.speed.values()):
        print("small trials are timed on one core; while other programs run, they are too slow")
    if found.bytes:
        print(f"estimated: {found.bytes / 2**20:.1f} MiB of disk for what is missing")


def _run_study(
    name: str, store: Path, preset: str, data: list[str] | None, engine: str,
    workers: int | None, address: str | None, shard: str, dry_run: bool,
) -> None:  # fmt: skip
    import torch

    from medbudget.results import count_cores
    from medbudget.studies import measure_speed, plan, run, write_report

    study, results = _plan_study(name, preset, store, data)
    if dry_run:
        if None in plan(study.tasks, results).seconds.values():
            print("timing a small task of each kind …", file=sys.stderr)
            measure_speed(study.tasks, results)
        _print_plan(study, results, plan(study.tasks, results))
        return
    if engine == "local" and workers is None and not torch.cuda.is_available():
        workers = min(count_cores(), 4)
    made = run(study.tasks, results, engine=engine, workers=workers, address=address, shard=shard)
    print(f"made {made} results in {store}")
    if shard == "1/1":
        print(f"report: {write_report(study, results, store / f'{name}-{preset}')}")
    else:
        options = "".join(f" --data {item}" for item in data or [])
        print(
            "when all shards are done: "
            f"medbudget study report {name} --preset {preset} --store {store}{options}"
        )


def _add_study(name: str, doc: str) -> None:
    def command(
        store: StoreOption = Path("studies"),
        preset: PresetOption = "tiny",
        data: DataOption = None,
        engine: Annotated[str, typer.Option(help="local, or ray")] = "local",
        workers: Annotated[
            int | None,
            typer.Option(help="processes of engine local; default: GPUs, else cores up to 4"),
        ] = None,
        address: Annotated[str | None, typer.Option(help="of a Ray cluster")] = None,
        shard: Annotated[str, typer.Option(help="i/k: the i-th of k shares of the tasks")] = "1/1",
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="print the plan, and what it will take")
        ] = False,
    ) -> None:
        _run_study(name, store, preset, data, engine, workers, address, shard, dry_run)

    command.__doc__ = doc
    study_app.command(name)(command)


_add_study("table1", "Table 1: sampling steps, guidance, vectors and cases.")
_add_study("figure5", "Figure 5: the same seeds on every line of Table 1.")
_add_study("table2", "Table 2: classifiers trained on real and synthetic images.")
_add_study("interpolation", "Figures 2 and 8: a disease score along each axis from healthy.")


@study_app.command("stylegan3")
def study_stylegan3(
    store: StoreOption = Path("studies/stylegan3"),
    preset: Annotated[str, typer.Option(help="tiny or paper")] = "tiny",
    data: Annotated[
        list[str] | None,
        typer.Option(help="ROLE=FOLDER of real images, for train and reference"),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            help="networks to fine-tune: *.safetensors, or an official .pkl; paper: AFHQv2"
        ),
    ] = None,
    kimg: Annotated[float | None, typer.Option(help="thousands of images seen; paper: 100")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="also into results/ and the package, for the book")
    ] = False,
    device: DeviceOption = None,
) -> None:
    """Section 4.2: StyleGAN3 and Textual Inversion on the same cases."""
    from dataclasses import replace

    from medbudget.studies import stylegan3 as study
    from medbudget.stylegan3 import StyleGAN3, import_official

    if preset not in study.PRESETS:
        raise ValueError(f"unknown preset {preset!r}; allowed are {', '.join(study.PRESETS)}")
    if record and (preset != "tiny" or data or start):
        raise ValueError("--record keeps preset tiny on phantoms from the shipped networks only")
    sources = {}
    for item in data or []:
        role, equals, folder = item.partition("=")
        if not equals:
            raise ValueError(
                f"--data {item!r} is not ROLE=FOLDER with a role of {', '.join(study.ROLES)}"
            )
        sources[role] = Path(folder)
    settings = study.PRESETS[preset]
    if kimg is not None:
        settings = replace(settings, overrides={"kimg": kimg})
    networks = None
    if start is not None:
        read = import_official if start.suffix == ".pkl" else StyleGAN3.load
        networks = read(start)
    values = study.run_comparison(
        store, preset=preset, settings=settings, sources=sources, start=networks, device=device
    )
    for name in ("stylegan3", "diffusion"):
        about = values[name]
        print(f"{name}: {about['images_seen']} images seen in {about['seconds'] / 60:.1f} min")
        for score in values["scores"]["none"][name]:
            print(f"  {score['name']}: {score['value']:.4g}")
    print(f"images and scores in {store}")
    if record:
        options = f" --kimg {kimg:g}" if kimg is not None else ""
        command = f"medbudget study stylegan3 --store {store.name} --preset tiny{options} --record"
        print(f"recorded: {study.record_comparison(store, command)}")


@study_app.command("status")
def study_status(
    name: str,
    store: StoreOption = Path("studies"),
    preset: PresetOption = "tiny",
    data: DataOption = None,
) -> None:
    """Print what is done, what is missing and how long that will take."""
    from medbudget.studies import plan

    study, results = _plan_study(name, preset, store, data)
    _print_plan(study, results, plan(study.tasks, results))


@study_app.command("report")
def study_report(
    name: str,
    store: StoreOption = Path("studies"),
    preset: PresetOption = "tiny",
    data: DataOption = None,
    record: Annotated[
        bool, typer.Option("--record", help="also into results/, for the book's chapters")
    ] = False,
) -> None:
    """Write the report of what is done: Markdown, HTML, figure."""
    from medbudget.studies import record_table, write_report

    study, results = _plan_study(name, preset, store, data)
    print(f"report: {write_report(study, results, store / f'{name}-{preset}')}")
    if record:
        options = f"--preset {preset} --store {store.name}"
        command = (
            f"medbudget study {name} {options}; medbudget study report {name} {options} --record"
        )
        print(f"recorded: {record_table(study, results, command)}")


@study_app.command("clean")
def study_clean(
    name: str,
    store: StoreOption = Path("studies"),
    preset: PresetOption = "tiny",
    data: DataOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="delete; else only say what")] = False,
) -> None:
    """Delete results in the store that this study does not use, and abandoned scratch files."""
    from medbudget.studies import clean

    study, results = _plan_study(name, preset, store, data)
    found = clean(study.tasks, results, delete=yes)
    size = sum(found.values()) / 2**20
    print(f"{'deleted' if yes else 'would delete'} {len(found)} files, {size:.1f} MiB")
    if found and not yes:
        print("add --yes to delete them")


@reader_app.command("create")
def reader_create(
    a: Annotated[Path, typer.Argument(help="folder of images: the source that should win")],
    b: Annotated[Path, typer.Argument(help="folder of images of the other source")],
    out: Annotated[Path, typer.Option(help="the study's folder, for readers")],
    seed: Annotated[
        int | None,
        typer.Option(
            help="default: a random one, kept in the key; tell no reader: it gives it away"
        ),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="key file; default OUT.key.json")] = None,
    n_pairs: Annotated[int, typer.Option(help="paper: 50")] = 50,
    repeats: Annotated[float, typer.Option(help="share of the pairs that is asked twice")] = 0.1,
    question: Annotated[
        str | None, typer.Option(help="default: Which image looks more like a real one?")
    ] = None,
) -> None:
    """Make blinded pairs of two folders' images, and the key in another file."""
    from medbudget.reader import QUESTION, ReaderStudy, compute_power, default_key

    study = ReaderStudy.create(
        a,
        b,
        out,
        seed=seed,
        n_pairs=n_pairs,
        repeats=repeats,
        question=question or QUESTION,
        key=key,
    )
    print(f"wrote {out}: study {study.id}, {len(study.pairs)} questions on {n_pairs} pairs")
    print(f"wrote {key or default_key(out)}: the key; keep it from the readers")
    found = ", ".join(f"{p:.0%}: {compute_power(n_pairs, p):.0%}" for p in (0.6, 0.7, 0.8))
    print(f"chance of finding a true preference of {found}")


@reader_app.command("export")
def reader_export(
    study: Annotated[Path, typer.Argument(help="the study's folder")],
    out: Annotated[Path, typer.Option(help="HTML file")],
) -> None:
    """Write the study as one page that works offline in a browser, without Python."""
    from medbudget.files import check_writable
    from medbudget.reader import ReaderStudy

    check_writable(out)
    ReaderStudy.load(study).export(out)
    print(
        f"wrote {out} ({out.stat().st_size / 2**20:.1f} MiB): send it to readers, without the key"
    )


@reader_app.command("analyse")
def reader_analyse(
    study: Annotated[Path, typer.Argument(help="the study's folder")],
    key: Annotated[Path | None, typer.Option(help="key file; default STUDY.key.json")] = None,
    answers: Annotated[
        list[Path] | None, typer.Option(help="file that a page gave; imported first; repeatable")
    ] = None,
    power: Annotated[float, typer.Option(help="for the size of a next study")] = 0.8,
    out: Annotated[Path | None, typer.Option(help="also write the scores as JSON")] = None,
) -> None:
    """Import answers, open the key, test preference, sides and agreement."""
    from medbudget.files import check_writable
    from medbudget.metrics import format_table, to_json
    from medbudget.reader import ReaderStudy, required_pairs

    if out is not None:
        check_writable(out)
    loaded = ReaderStudy.load(study)
    for file in answers or []:
        reading = loaded.import_answers(file)
        print(f"{reading.name}: {len(reading.answers())} answers")
    scores = loaded.analyse(key)
    print(format_table(scores))
    first = scores[0]
    for name, share in zip(("as found", "lower limit"), (first.value, *(first.interval or ())[:1])):
        try:
            n = required_pairs(share, power=power)
        except ValueError as error:
            print(f"next study, {name}: {error}")
        else:
            print(f"next study, {name}: {n} pairs show {share:.1%} with a power of {power:.0%}")
    if out is not None:
        to_json(scores, out)
        print(f"wrote {out}")


def main() -> None:
    """Run the command line; expected errors become one message and exit code 1.

    Ctrl-C and SIGTERM end it with one line and exit code 130 or 143.
    """
    came = [signal.SIGINT]

    def stop(number: int, frame: Any) -> None:
        came[0] = signal.Signals(number)
        raise KeyboardInterrupt

    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, stop)
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as end:  # of which typer makes exit code 130
        if isinstance(end, SystemExit) and end.code != 130:
            raise
        print("stopped", file=sys.stderr)
        sys.exit(128 + came[0])
    except MemoryError as error:
        print(f"error: out of memory {error}: fewer or smaller images need less", file=sys.stderr)
        sys.exit(1)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
