"""The names of the ODE solvers, apart from the solvers themselves: a command line is checked without importing torch."""

from __future__ import annotations

from typing import Literal, get_args

SolverName = Literal["euler", "heun", "dpmpp_2m", "unipc", "res_2ab"]
SOLVERS: tuple[str, ...] = get_args(SolverName)
