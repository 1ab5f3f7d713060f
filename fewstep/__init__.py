"""Few-step students of video world models: distil, post-train, measure."""

from pathlib import Path

from fewstep.registry import provide

__version__ = "0.1.0"
TOY = (
    Path(__file__).parent / "toyworld" / "stack"
)  # models of the toy world, shipped: a pipeline's folder with transformer/, vae/, ...

# Where names are registered; none of these modules is imported before one of its group's names is asked for.
provide("recipe", "fewstep.recipes", "fewstep.toyworld.recipes")
provide("method", "fewstep.methods")
provide("network", "fewstep.networks.analytic", "fewstep.networks.tiny", "fewstep.networks.families")
provide("role", "fewstep.networks.roles", "fewstep.networks.lora")
provide("head", "fewstep.networks.heads")
provide("scorer", "fewstep.evaluation.fidelity", "fewstep.toyworld.scores")
provide("text_encoder", "fewstep.networks.encoders.text", "fewstep.toyworld.words")
provide("data", "fewstep.data", "fewstep.inference.synthetic")
provide("control", "fewstep.data.controls")
provide("path", "fewstep.diffusion.path")
provide("times", "fewstep.diffusion.times")
provide("preview", "fewstep.training.preview")
provide("reward", "fewstep.methods.reward_dmd")
provide("sample_weight", "fewstep.methods.f_distill", "fewstep.methods.reward_dmd")
