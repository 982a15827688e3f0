"""A blinded reader study: which of two images looks better? Pairs, answers, analysis.

Section 4.2 of the paper: one radiologist saw 50 pairs and preferred diffusion to StyleGAN3 in 36.
"""

from medbudget.reader.analysis import Preference, compute_power, compute_preference, required_pairs
from medbudget.reader.answers import CHOICES, SIDES, ReaderError, Reading
from medbudget.reader.study import QUESTION, ReaderStudy, default_key

__all__ = [
    "CHOICES", "QUESTION", "SIDES", "Preference", "ReaderError", "ReaderStudy", "Reading",
    "compute_power", "compute_preference", "default_key", "required_pairs",
]  # fmt: skip
