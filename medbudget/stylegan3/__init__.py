"""StyleGAN3-T, the paper's rival, written from the papers (arXiv 2106.12423 and 1912.04958)."""

from medbudget.stylegan3.equivariance import translation_equivariance
from medbudget.stylegan3.model import TINY, StyleGAN3, make_stylegan3
from medbudget.stylegan3.networks import Architecture, Discriminator, Generator
from medbudget.stylegan3.official import import_official
from medbudget.stylegan3.training import GanError, StyleGAN3Settings, train_stylegan3

__all__ = [
    "TINY",
    "Architecture",
    "Discriminator",
    "GanError",
    "Generator",
    "StyleGAN3",
    "StyleGAN3Settings",
    "import_official",
    "make_stylegan3",
    "train_stylegan3",
    "translation_equivariance",
]
