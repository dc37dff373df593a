"""Measures of two representations beside CKA, and what they are by chance."""

from rgfast.ops.similarity.api import MEASURES, calibrate, mutual_knn, procrustes, rsa, similarity_matrix
from rgfast.ops.similarity.calibrated import Calibrated

__all__ = [
    "MEASURES",
    "Calibrated",
    "calibrate",
    "mutual_knn",
    "procrustes",
    "rsa",
    "similarity_matrix",
]
