"""Textual Inversion for medical images on a budget: the library under the companion book."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from medbudget import telemetry  # noqa: F401  (before what would report)
from medbudget._version import __version__ as __version__

if TYPE_CHECKING:
    from medbudget.adapters import Adapter
    from medbudget.base import Base
    from medbudget.composition import interpolate
    from medbudget.data.phantoms import Phantoms, make_phantoms
    from medbudget.embeddings import Embedding
    from medbudget.images import load_images, save_images
    from medbudget.inpainting import inpaint
    from medbudget.inversion import InversionSettings, invert
    from medbudget.loading import load_base
    from medbudget.lora import TuneSettings, tune
    from medbudget.masks import ellipse
    from medbudget.metrics import Score, evaluate, frechet_distance
    from medbudget.outputs import inpaint_to, interpolate_to, sample_to
    from medbudget.prompts import parse_prompt
    from medbudget.sampling import sample
    from medbudget.tiny import describe
    from medbudget.training_outputs import invert_to, tune_to

_MODULES = {  # loaded on first use: torch and diffusers take seconds
    "adapters": ("Adapter",),
    "base": ("Base",),
    "composition": ("interpolate",),
    "data.phantoms": ("Phantoms", "make_phantoms"),
    "embeddings": ("Embedding",),
    "images": ("load_images", "save_images"),
    "inpainting": ("inpaint",),
    "inversion": ("InversionSettings", "invert"),
    "loading": ("load_base",),
    "lora": ("TuneSettings", "tune"),
    "masks": ("ellipse",),
    "metrics": ("Score", "evaluate", "frechet_distance"),
    "outputs": ("inpaint_to", "interpolate_to", "sample_to"),
    "prompts": ("parse_prompt",),
    "sampling": ("sample",),
    "tiny": ("describe",),
    "training_outputs": ("invert_to", "tune_to"),
}

__all__ = [
    "Adapter",
    "Base",
    "Embedding",
    "InversionSettings",
    "Phantoms",
    "Score",
    "TuneSettings",
    "describe",
    "ellipse",
    "evaluate",
    "frechet_distance",
    "inpaint",
    "inpaint_to",
    "interpolate",
    "interpolate_to",
    "invert",
    "invert_to",
    "load_base",
    "load_images",
    "make_phantoms",
    "parse_prompt",
    "sample",
    "sample_to",
    "save_images",
    "tune",
    "tune_to",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"medbudget.{module}"), name)
            return value
    try:
        return import_module(f"medbudget.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"medbudget.{name}":
            raise
        raise AttributeError(f"module 'medbudget' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
