"""Few-step students of video world models: distil, post-train, measure.

    run = fewstep.build_recipe("analytic_finetune")      summary = fewstep.train(run)
    model = fewstep.open_model(run.job.folder())         data = fewstep.Folder("datasets/robots").open()

The names of `_PUBLIC` are imported when they are first used, so that `import fewstep` alone loads no torch.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from fewstep.registry import provide

__version__ = "0.1.0"
TOY = (
    Path(__file__).parent / "toyworld" / "stack"
)  # models of the toy world, shipped: a pipeline's folder with transformer/, vae/, ...

# Where names are registered; none of these modules is imported before one of its group's names is asked for.
provide("recipe", "fewstep.recipes", "fewstep.toyworld.recipes", "fewstep.toyworld.causal")
provide("method", "fewstep.methods")
provide("network", "fewstep.networks.analytic", "fewstep.networks.tiny", "fewstep.networks.causal", "fewstep.networks.families")
provide("role", "fewstep.networks.roles", "fewstep.networks.lora")
provide("head", "fewstep.networks.heads")
provide(
    "scorer",
    "fewstep.toyworld.scores",
    "fewstep.evaluation.fidelity",
    "fewstep.evaluation.clips",
    "fewstep.evaluation.judges",
    "fewstep.evaluation.long_run",
)
provide("annotator", "fewstep.toyworld.annotator")
provide("judge", "fewstep.evaluation.judges", "fewstep.toyworld.judge")
provide("features", "fewstep.evaluation.features", "fewstep.toyworld.extractor")
provide("text_encoder", "fewstep.networks.encoders.text", "fewstep.networks.encoders.words")
provide("codec", "fewstep.networks.encoders.codecs")
provide("guardrail", "fewstep.inference.guardrails")
provide("upsampler", "fewstep.inference.upsamplers")
provide("data", "fewstep.data", "fewstep.inference.synthetic")
provide("control", "fewstep.data.controls")
provide("path", "fewstep.diffusion.path")
provide("times", "fewstep.diffusion.times")
provide("sampler", "fewstep.diffusion.sampling")
provide("preview", "fewstep.training.preview", "fewstep.training.preview_clips")
provide("reward", "fewstep.methods.reward_dmd")
provide("sample_weight", "fewstep.methods.f_distill", "fewstep.methods.reward_dmd")

_PUBLIC = {
    "Batch": "fewstep.batch",
    "ClipRequest": "fewstep.inference.request",
    "Condition": "fewstep.batch",
    "Folder": "fewstep.data.folder.dataset",
    "GenerateRequest": "fewstep.inference.request",
    "Run": "fewstep.training.run",
    "build_recipe": "fewstep.config",
    "generate": "fewstep.inference.generate",
    "open_codec": "fewstep.networks.encoders.codecs",
    "open_model": "fewstep.inference.model",
    "train": "fewstep.training.loop",
}
__all__ = ["TOY", "__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]  # __getattr__ finds them


def __getattr__(name: str) -> Any:  # Any: whatever has that name
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
