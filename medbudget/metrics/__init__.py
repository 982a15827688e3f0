"""How good, how certain, how copied: metrics for small sets of images."""

from medbudget.metrics.auc import (
    Calibration,
    bootstrap_auc,
    calibration,
    compute_auc,
    delong,
    delong_difference,
    detectable_difference,
    hanley_mcneil,
)
from medbudget.metrics.disease import disease_axis, disease_score
from medbudget.metrics.evaluation import evaluate, frechet_score
from medbudget.metrics.extractors import Extractor, extractor_names, load_extractor
from medbudget.metrics.features import compute_features, normalize_images
from medbudget.metrics.frechet import (
    Estimate,
    bootstrap_distances,
    frechet_distance,
    frechet_interval,
)
from medbudget.metrics.kernel import kernel_distance, precision_recall
from medbudget.metrics.membership import judge_membership, membership_inference
from medbudget.metrics.neighbours import (
    Memorisation,
    memorisation,
    pixel_neighbours,
)
from medbudget.metrics.permutation import PermutationTest, permutation_test
from medbudget.metrics.scores import Score, format_table, judge, summarize, to_json, to_table
from medbudget.weights import WeightsError

__all__ = [
    "Calibration", "Estimate", "Extractor", "Memorisation", "PermutationTest", "Score",
    "WeightsError", "bootstrap_auc", "bootstrap_distances", "calibration", "compute_auc",
    "compute_features", "delong", "delong_difference", "detectable_difference", "disease_axis",
    "disease_score", "evaluate", "extractor_names", "format_table", "frechet_distance",
    "frechet_interval", "frechet_score", "hanley_mcneil", "judge", "judge_membership",
    "kernel_distance", "load_extractor", "membership_inference", "memorisation",
    "normalize_images", "permutation_test", "pixel_neighbours", "precision_recall", "summarize",
    "to_json", "to_table",
]  # fmt: skip
