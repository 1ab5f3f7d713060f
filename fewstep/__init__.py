"""Few-step students of video world models: distil, post-train, measure."""

from pathlib import Path

__version__ = "0.1.0"
TOY = (
    Path(__file__).parent / "toyworld" / "stack"
)  # models of the toy world, shipped: a pipeline's folder with transformer/, vae/, ...
