"""Textual Inversion for medical images on a budget: the library under the companion book."""

__version__ = "0.1.0"

from medbudget import telemetry  # noqa: F401  (before what would report)
from medbudget.base import Base, describe, load_base
from medbudget.data.phantoms import Phantoms, make_phantoms
from medbudget.embeddings import Embedding
from medbudget.images import load_images, save_images
from medbudget.inpainting import ellipse, inpaint
from medbudget.inversion import InversionSettings, invert
from medbudget.metrics import Score, evaluate, frechet_distance
from medbudget.prompts import parse_prompt
from medbudget.sampling import interpolate, sample

__all__ = [
    "Base",
    "Embedding",
    "InversionSettings",
    "Phantoms",
    "Score",
    "describe",
    "ellipse",
    "evaluate",
    "frechet_distance",
    "inpaint",
    "interpolate",
    "invert",
    "load_base",
    "load_images",
    "make_phantoms",
    "parse_prompt",
    "sample",
    "save_images",
]
