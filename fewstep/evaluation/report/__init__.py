"""An evaluation as one HTML file to look at: fill a `Report`, `write` it.

from fewstep.evaluation.report import Report, Model, Score, write
write(Report(title="...", models=..., scores=..., galleries=...), "report.html")
"""

from fewstep.evaluation.report.contents import (
    Chart,
    Film,
    Gallery,
    Gate,
    Model,
    Report,
    Row,
    Score,
    Stage,
    Value,
)
from fewstep.evaluation.report.curves import curves_of
from fewstep.evaluation.report.page import page, write

__all__ = [
    "Chart",
    "Film",
    "Gallery",
    "Gate",
    "Model",
    "Report",
    "Row",
    "Score",
    "Stage",
    "Value",
    "curves_of",
    "page",
    "write",
]
