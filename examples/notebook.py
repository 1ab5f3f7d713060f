"""What a notebook does: train a student, sample it, make clips from text, and read them back as a data set.

    python examples/notebook.py

Each block is a cell. Everything is written below OUTPUT_ROOT (default: checkpoints); it takes about a minute on a CPU.
"""

# %% The names of the public face
from dataclasses import replace

import torch

import fewstep
from fewstep.diffusion import Rng
from fewstep.environment import output_root
from fewstep.evaluation import energy_distance
from fewstep.recipes.analytic import MIXTURE

# %% Train: a recipe is one frozen dataclass; `replace` changes it
recipe = fewstep.build_recipe("analytic_finetune")
run = replace(
    recipe,
    job=replace(recipe.job, project="examples", group="notebook", name="finetune"),
    trainer=replace(recipe.trainer, max_iter=300),
)
summary = fewstep.train(run)
print(f"step {summary['step']} in {summary['wall_s']:.0f} s")

# %% Sample: a model is a network and the way in which it is sampled
model = fewstep.open_model(run.job.folder())
rng = Rng.of_samples(range(2000))
samples = model.sampler(model.network, rng.normal((2,)), fewstep.Condition(), rng)
truth = MIXTURE.build().sample(Rng.of_samples(range(2000, 4000)))
print(f"energy distance to the data: {energy_distance(samples, truth):.4f}")

# %% Clips from text, by the toy world's shipped teacher
out = output_root() / "examples" / "notebook" / "clips"
prompts = ("a red sphere rolls to the left.", "a blue box is dropped.")
clips = tuple(fewstep.ClipRequest(name=f"clip_{seed}", prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts))
size = {"num_frames": 17, "height": 32, "width": 32}
fewstep.generate(fewstep.GenerateRequest(str(fewstep.TOY), out / "videos", clips, fps=8, batch_size=2, **size))

# %% The same clips as a data set: uint8 on disk, -1..1 in a batch
data = fewstep.Folder(str(out), text=None).open()
batch = data.batch(torch.arange(len(data)))
print(f"{len(data)} clips, B C T H W: {tuple(batch.x0.shape)}")
