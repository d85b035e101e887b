"""How good samples are: a judge that knows the truth, and distances between sets of pictures."""

from .distances import Distances, frechet_distance, kernel_distance, precision_recall
from .features import ImageNetFeatures
from .judge import Judge, Scores, wilson

__all__ = [
    "Distances",
    "ImageNetFeatures",
    "Judge",
    "Scores",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "wilson",
]
