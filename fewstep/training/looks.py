"""The previews of a run: what they are shown, and the time that they take."""

from __future__ import annotations

import time

import torch

from fewstep.data.contract import Dataset
from fewstep.data.loader import first_batch
from fewstep.diffusion import EDM, Sampler
from fewstep.parallel import World
from fewstep.training.crew import Crew
from fewstep.training.log import RunLog
from fewstep.training.preview import Scene
from fewstep.training.run import Run
from fewstep.training.run_folder import pipeline_of


class Looks:
    """Shows the previews of a run, and counts their seconds."""

    def __init__(self, run: Run, crew: Crew, sampler: Sampler, data: Dataset, world: World, log: RunLog) -> None:
        self._run, self._crew, self._sampler, self._data, self._world, self._log = run, crew, sampler, data, world, log
        self._began = time.monotonic()
        self._spent_s = 0.0
        self._last_s = 0.0

    def are_cheap(self) -> bool:
        """Whether all previews and another one like the last keep their share of the time; the same on every rank."""
        assert self._run.preview is not None
        share, elapsed = getattr(self._run.preview, "max_share", 1.0), time.monotonic() - self._began
        is_dear = share < 1 and self._spent_s + self._last_s > share * elapsed
        return not self._world.any(is_dear)[0]

    def show(self, step: int) -> dict[str, float]:
        """The numbers of a preview of the student's average. The first one, which makes what never changes, is not counted."""
        run, crew, began = self._run, self._crew, time.monotonic()
        assert run.preview is not None
        path = crew.student.network.path
        rate = first_batch(self._data, 1).cond.fps
        with crew.student.averaged(), torch.no_grad():
            scene = Scene(
                crew.student.network,
                crew.teacher,
                self._sampler,
                step,
                run.job.folder() / "previews",
                self._world.device,
                self._world.is_main,
                self._data,
                pipeline_of(run.networks),
                float(getattr(run.method, "guidance", 1.0)),  # of methods with a teacher
                float(path.sigma_data) if isinstance(path, EDM) else 1.0,
                None if rate is None else float(rate[0]),
                lambda name, picture: self._log.picture(step, name, picture),
                lambda flag: self._world.any(flag)[0],
                self._log.say,
            )
            numbers = dict(run.preview.show(scene))
        seconds = time.monotonic() - began
        if step:
            self._spent_s += seconds
        self._last_s = seconds if step else 0.0
        return numbers
