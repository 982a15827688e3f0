"""Textual Inversion for medical images on a budget: the library under the companion book."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from medbudget import telemetry  # noqa: F401  (before what would report)
from medbudget._version import __version__ as __version__

if TYPE_CHECKING:
    from medbudget.adapters import Adapter as Adapter
    from medbudget.base import Base as Base
    from medbudget.data.phantoms import Phantoms as Phantoms
    from medbudget.data.phantoms import make_phantoms as make_phantoms
    from medbudget.embeddings import Embedding as Embedding
    from medbudget.images import load_images as load_images
    from medbudget.images import save_images as save_images
    from medbudget.loading import load_base as load_base
    from medbudget.metrics import Score as Score
    from medbudget.metrics import evaluate as evaluate
    from medbudget.metrics import frechet_distance as frechet_distance
    from medbudget.outputs import inpaint_to as inpaint_to
    from medbudget.outputs import interpolate_to as interpolate_to
    from medbudget.outputs import sample_to as sample_to
    from medbudget.prompts import parse_prompt as parse_prompt
    from medbudget.sampling.composition import interpolate as interpolate
    from medbudget.sampling.inpainting import inpaint as inpaint
    from medbudget.sampling.masks import ellipse as ellipse
    from medbudget.sampling.sampler import sample as sample
    from medbudget.tiny import describe as describe
    from medbudget.training.inversion import InversionSettings as InversionSettings
    from medbudget.training.inversion import invert as invert
    from medbudget.training.lora import TuneSettings as TuneSettings
    from medbudget.training.lora import tune as tune
    from medbudget.training_outputs import invert_to as invert_to
    from medbudget.training_outputs import tune_to as tune_to

_MODULES = {  # loaded on first use: torch and diffusers take seconds
    "adapters": "Adapter",
    "base": "Base",
    "sampling.composition": "interpolate",
    "data.phantoms": "Phantoms make_phantoms",
    "embeddings": "Embedding",
    "images": "load_images save_images",
    "sampling.inpainting": "inpaint",
    "training.inversion": "InversionSettings invert",
    "loading": "load_base",
    "training.lora": "TuneSettings tune",
    "sampling.masks": "ellipse",
    "metrics": "Score evaluate frechet_distance",
    "outputs": "inpaint_to interpolate_to sample_to",
    "prompts": "parse_prompt",
    "sampling.sampler": "sample",
    "tiny": "describe",
    "training_outputs": "invert_to tune_to",
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = globals()[name] = getattr(import_module(f"medbudget.{_PLACES[name]}"), name)
        return value
    try:
        return import_module(f"medbudget.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"medbudget.{name}":
            raise
        raise AttributeError(f"module 'medbudget' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
