"""The mathematics: paths, predictions, times, samplers, guidance, randomness. It knows no network and no method."""

from fewstep.diffusion import samplers, times
from fewstep.diffusion.denoiser import Cache, Denoiser, FeaturesOnly, features, on_path
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.path import EDM, VP, Path, RectifiedFlow, TrigFlow
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.rollout import few_step, rollout
from fewstep.diffusion.sampling import Sampler, StudentSampler, TeacherSampler

__all__ = [
    "EDM", "VP", "Cache", "Denoiser", "FeaturesOnly", "Path", "Prediction", "RectifiedFlow", "Rng", "Sampler",
    "StudentSampler", "TeacherSampler", "TrigFlow", "features", "few_step", "guided", "on_path", "rollout", "samplers", "times",
]  # fmt: skip
