"""FastGen's KD by its own names: Wan into four steps, Wan, CogVideoX and SDXL into one, up to plain diffusers."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.batch import Condition
from fewstep.diffusion import VP, StudentSampler
from fewstep.inference.model import open_model
from fewstep.networks.encoders.text import open_text_encoder

sys.path.insert(0, str(Path(__file__).parent))
import tiny_pipelines
from shell import walk

PROMPT = "a red square moves slowly to the right"
ALONE = 'import sys\nsys.modules["fewstep"] = None  # it cannot be imported here\n'
PLAIN = f"""
import json, torch
from pathlib import Path
from safetensors.torch import save_file
code = Path("student/README.md").read_text().split("```python")[1].split("```")[0]  # as the model card says
call = "torch.manual_seed(7) and pipe({PROMPT!r}, output_type='latent'"
code = code.replace("THIS_FOLDER", "student").replace('pipe("PROMPT"', call)
names = {{"torch": torch}}
exec(code, names)
assert type(names["pipe"]).__name__ == json.loads(Path("pipeline/model_index.json").read_text())["_class_name"]
latents = names["video"] if "video" in names else names["picture"][:, None]
save_file({{"latents": latents[None].contiguous()}}, "plain.safetensors")
"""
STORIES = {
    "WanT2V_kd_path": ("wan", "WanT2V/config_kd_path.py", "wan_kd", [1.0, 0.9375, 5 / 6, 0.625]),
    "CogVideoX_kd": ("cogvideox", "CogVideoX/config_kd.py", "CogVideoX_kd", [1.0]),
    "SDXL_kd": ("sdxl", "SDXL/config_kd.py", "sdxl_kd", [1.0]),
    "WanT2V_kd": ("wan", "WanT2V/config_kd.py", "wan_kd", [1.0]),
}
SHAPES = {"wan": (1, 4, 3, 4, 4), "cogvideox": (1, 3, 4, 4, 4), "sdxl": (1, 4, 1, 4, 4)}  # of the noise that a pipeline draws


@pytest.mark.parametrize(
    ("name", "real"),
    [
        *(pytest.param(name, False, id=f"{name}-quick") for name in list(STORIES)[:3]),
        *(pytest.param(name, True, id=f"{name}-slow", marks=pytest.mark.slow) for name in list(STORIES)[:3]),
        pytest.param("WanT2V_kd", False, id="WanT2V_kd", marks=pytest.mark.slow),
    ],
)
def test_a_student_of_kd_reaches_plain_diffusers(name: str, tmp_path: Path, real: bool) -> None:
    kind, config, group, times = STORIES[name]
    tiny_pipelines.PIPELINES[kind](tmp_path / "pipeline")
    is_picture = kind == "sdxl"
    (tiny_pipelines.pictures if is_picture else tiny_pipelines.clips)(tmp_path / "clips", num=4)
    shot = "" if is_picture else "--num-frames 9 --height 32 --width 32"
    (tmp_path / "plain.py").write_text(ALONE + PLAIN)
    plain = "python plain.py" if real else "true"
    walk("fastgen.sh", tmp_path, real=real, NAME=name, CONFIG=config, GROUP=group, PLAIN=plain, SHOT=shot)
    if not real:  # a process of its own takes as long as all the rest
        with contextlib.chdir(tmp_path):
            exec(PLAIN, {})

    model, encoder = open_model(tmp_path / "student"), open_text_encoder(tmp_path / "pipeline")
    teacher = open_model(tmp_path / "pipeline").network.module.state_dict()
    changed = [key for key, tensor in model.network.module.state_dict().items() if not torch.equal(tensor, teacher[key])]
    assert len(changed) > 0.5 * len(teacher)
    assert isinstance(model.sampler, StudentSampler)
    assert list(model.sampler.times) == pytest.approx(times, abs=1e-12)
    theirs = load_file(tmp_path / "plain.safetensors")["latents"]
    text, mask = encoder.encode([PROMPT])
    cond = Condition(text=text, text_mask=mask if encoder.uses_mask else None, pooled=encoder.pooled([PROMPT]))
    drawn = Drawn(kind)
    with torch.no_grad():
        ours = model.sampler(model.network, drawn.normal_like(None), cond, drawn)  # type: ignore[arg-type]
    theirs = theirs.transpose(1, 2) if kind == "cogvideox" else theirs
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert float(ours.std()) > 0.05


class Drawn:
    """An Rng that draws what these pipelines draw after torch.manual_seed; CogVideoX has frames before channels.

    SDXL's pipeline starts from the noise itself, a student here from s(1) times it, and its table has s(1) = 0.9977.
    """

    def __init__(self, kind: str):
        torch.manual_seed(7)
        self.kind = kind

    def normal_like(self, like: Any) -> Tensor:
        drawn = torch.randn(SHAPES[self.kind])
        if self.kind == "sdxl":
            return drawn / float(VP("scaled_linear").coefficients(torch.tensor(1.0, dtype=torch.float64))[1])
        return drawn.transpose(1, 2) if self.kind == "cogvideox" else drawn
