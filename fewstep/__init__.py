"""Few-step students of video world models: distil, post-train, measure."""

__version__ = "0.1.0"
