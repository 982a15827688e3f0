"""Textual Inversion for medical images on a budget: the library under the companion book."""

import os

__version__ = "0.1.0"

# No dependency reports anything to anyone: they read these when they are imported, or started.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)

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
