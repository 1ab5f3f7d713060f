"""Scores of sets of features and of clips against their controls, their spreads, and small plots."""

from fewstep.evaluation.bootstrap import half_sampled
from fewstep.evaluation.control import blur_ssim, canny_f1, depth_rmse, mean_iou
from fewstep.evaluation.energy import energy_distance
from fewstep.evaluation.frechet import frechet_distance
from fewstep.evaluation.neighbours import precision_recall
from fewstep.evaluation.score import Record, Score, Scorer, Signals, Value, mean_over_clips

__all__ = [
    "Record",
    "Score",
    "Scorer",
    "Signals",
    "Value",
    "blur_ssim",
    "canny_f1",
    "depth_rmse",
    "energy_distance",
    "frechet_distance",
    "half_sampled",
    "mean_iou",
    "mean_over_clips",
    "precision_recall",
]
