"""Feature networks: what turns clips into rows of numbers, whose distribution is then compared. One file each."""

from fewstep.evaluation.features.contract import AnyExtractor, Extractor

__all__ = ["AnyExtractor", "Extractor"]
