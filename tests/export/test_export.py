"""Weights out: plain diffusers, in a process where this project cannot be imported, gives our latents and our frames."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.config import kind
from fewstep.diffusion import EDM, RectifiedFlow, Rng, StudentSampler, TeacherSampler, TrigFlow
from fewstep.diffusion.times import karras, shifted
from fewstep.export.export import export
from fewstep.export.schedulers import scheduler_of
from fewstep.inference.card import StudentCard
from fewstep.inference.model import open_model
from fewstep.inference.synthetic import MixtureSamples
from fewstep.methods import KD, Finetune
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.contract import Scheduling
from fewstep.networks.encoders.codecs import open_codec
from fewstep.networks.encoders.text import open_text_encoder
from fewstep.networks.encoders.words import WordsConfig, WordsEncoder, WordsModel
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks, build
from fewstep.networks.tiny import TinySpec
from fewstep.networks.weights.addresses import read
from fewstep.training.ema import Ema
from fewstep.training.health import Health
from fewstep.training.loop import train
from fewstep.training.run import Checkpoint, Job, Run, Trainer

NET = CosmosSpec(
    latent_channels=2, num_heads=2, head_dim=12, num_layers=2, mlp_ratio=2.0, text_dim=8, adaln_lora_dim=4,
    max_size=(4, 8, 8), rope_scale=(1.0, 1.0, 1.0), padding_mask=False,
)  # fmt: skip
FIRST = replace(NET, family="edm", sigma_data=0.5, use_fps=True, learnable_positions=True, padding_mask=True)
SHAPE = (2, 3, 4, 4)
TIMES = (1.0, 0.9375, 0.8333333333333334, 0.625)
WORDS = ("a", "red", "ball", "rolls")


@kind("export_test_clips", group="data")
@dataclass(frozen=True)
class Clips:
    """Latents, noise, text, and the first latent frame given."""

    fields = frozenset({"x0", "noise"})

    def open(self) -> Clips:
        return self

    def __len__(self) -> int:
        return 8

    def batch(self, index: Tensor) -> Batch:
        rng = Rng(5, 0, index)
        x0, noise, text = rng.normal(SHAPE), rng.normal(SHAPE), rng.normal((4, 8))
        mask = torch.zeros(len(index), SHAPE[1])
        mask[:, 0] = 1
        cond = Condition(text=text, frames=x0, frame_mask=mask, fps=torch.full((len(index),), 16.0))
        return Batch(x0=x0, noise=noise, cond=cond, index=index)


def trained(
    root: Path, name: str, spec: Any = NET, method: Any = None, nets: Networks | None = None, ema: Ema | None = None
) -> Path:
    run = Run(
        job=Job(name=name),
        method=method or Finetune(),
        networks=nets or Networks(student=Full(spec, init="random")),
        data=Clips(),
        ema=ema or Ema(beta=0.5),
        trainer=Trainer(max_iter=2, batch_size=2, num_threads=1, log_every=1),
        checkpoint=Checkpoint(save_iter=2),
        health=Health(every=None),
    )
    os.environ["OUTPUT_ROOT"] = str(root)
    train(run)
    return run.job.folder()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    before = os.environ.get("OUTPUT_ROOT")
    yield tmp_path_factory.mktemp("runs")
    os.environ.pop("OUTPUT_ROOT", None)
    if before is not None:
        os.environ["OUTPUT_ROOT"] = before


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    return trained(root, "flow")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rest of the pipeline: a codec of 2 channels, and an encoder of words."""
    from diffusers import AutoencoderKLCosmos

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoencoderKLCosmos(
        latent_channels=2, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, spatial_compression_ratio=4,
        temporal_compression_ratio=4, latents_mean=[0.1, -0.2], latents_std=[0.7, 1.3],
    ).save_pretrained(folder / "vae")  # fmt: skip
    config = WordsConfig(WORDS, dim=8, num_layers=1, num_heads=2, max_tokens=6)
    WordsEncoder(WordsModel(config).eval()).save(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "AutoencoderKLCosmos"]}))
    return folder


def sampled(run: Path, sampler: StudentSampler) -> Path:
    """The same run, whose student is meant to be sampled in another way."""
    replace(StudentCard.read(run, ""), sampler=sampler).write(run)
    return run


def test_a_post_trained_teacher_stays_a_teacher(root: Path, tmp_path: Path) -> None:
    run = trained(root, "post_trained")
    export(str(run), tmp_path / "safetensors", "safetensors")
    export(str(run), tmp_path / "diffusers", "diffusers")
    for address in (run, tmp_path / "safetensors", tmp_path / "diffusers"):
        assert open_model(address).sampler == TeacherSampler.for_path(RectifiedFlow())  # UniPC, 35 steps, shift 5
    text = (tmp_path / "diffusers" / "README.md").read_text()
    assert "a teacher: it takes guidance" in text and "unipc, 35 steps, grid flow, shift 5" in text and "distilled" not in text
    assert "dmd2_config" not in json.loads((tmp_path / "diffusers" / "model_index.json").read_text())


_PLAIN = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fewstep":
            raise ImportError("no fewstep here")
sys.meta_path.insert(0, Nothing())
try:
    import fewstep
    raise SystemExit("fewstep could be imported")
except ImportError:
    pass
import torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from pathlib import Path
for given in sorted(Path(sys.argv[1]).glob("*/given.safetensors")):
    pipe = DiffusionPipeline.from_pretrained(str(given.parent / "student"), trust_remote_code=True)
    given, out = load_file(given), given.with_name("out.safetensors")
    count = sum(name.startswith("renoise") for name in given)
    asked = {"prompt_embeds": given["text"]} if "text" in given else {"prompt": ["a red ball", "rolls"]}
    if "frames" in given:
        asked |= {"given_latents": given["frames"], "frame_mask": given["mask"]}
    asked |= {"latents": given["noise"], "renoise": [given[f"renoise{i}"] for i in range(count)] or None, "fps": 16.0}
    made = {"latents": pipe(**asked, output_type="latent").frames}
    if getattr(pipe, "vae", None) is not None:
        made["pixels"] = pipe(**asked, output_type="pt").frames
    assert not [name for name in sys.modules if name.startswith("fewstep")]
    save_file({name: value.contiguous() for name, value in made.items()}, out)
"""


def ours(address: str, cond: Condition) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents of our sampler, and the noises that it drew."""
    model = open_model(address)
    assert isinstance(model.sampler, StudentSampler)
    rng = Rng.of_samples([3, 4])
    with torch.no_grad():
        made = model.sampler(model.network, rng.normal(SHAPE), cond, rng)
    rng = Rng.of_samples([3, 4])
    drawn = {"noise": rng.normal(SHAPE)}
    if model.sampler.renoise == "fresh":
        drawn |= {f"renoise{i}": rng.normal(SHAPE) for i in range(len(model.sampler.times) - 1)}
    return made, drawn


CASES: dict[str, tuple[StudentSampler, str]] = {
    "fresh": (StudentSampler(TIMES, RectifiedFlow(), "fresh"), "text, given frames, codec"),
    "same": (StudentSampler(TIMES, RectifiedFlow(), "same"), "text"),
    "ode": (StudentSampler(TIMES, RectifiedFlow(), "ode"), "text, given frames"),
    "words": (StudentSampler((1.0, 0.7), RectifiedFlow(), "ode"), "words, codec"),
    "trigflow": (StudentSampler((1.5, 1.2, 0.6), TrigFlow(), "fresh"), "text, given frames"),
    "cosmos1": (StudentSampler((80.0, 5.0), EDM(sigma_data=0.5), "same"), "text, rate"),
}


@pytest.fixture(scope="module")
def plain(
    run: Path, root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """By case: what plain diffusers made of the exported student, and our latents. One process for all: it starts slowly."""
    folder = tmp_path_factory.mktemp("plain")
    first, wanted = trained(root, "edm", FIRST), dict[str, Tensor]()
    batch = Clips().batch(torch.arange(2))
    for case, (sampler, what) in CASES.items():
        address = str(sampled(first if case == "cosmos1" else run, sampler))
        export(address, folder / case / "student", base=base if "codec" in what else None)
        cond = batch.cond if "given" in what else Condition(text=batch.cond.text)
        cond = replace(cond, fps=batch.cond.fps if "rate" in what else None)
        if "words" in what:
            text, mask = open_text_encoder(base).encode(["a red ball", "rolls"])
            cond = Condition(text=text, text_mask=mask)
        wanted[case], given = ours(address, cond)
        told = {"text": None if "words" in what else cond.text, "frames": cond.frames, "mask": cond.frame_mask}
        given |= {name: value for name, value in told.items() if value is not None}
        save_file({name: value.contiguous() for name, value in given.items()}, folder / case / "given.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", _PLAIN, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return {case: (load_file(folder / case / "out.safetensors"), wanted[case]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_plain_diffusers_samples_an_exported_student(case: str, plain: Any, base: Path) -> None:
    made, wanted = plain[case]
    torch.testing.assert_close(made["latents"], wanted, rtol=0, atol=1e-5)
    assert float(wanted.std()) > 0.01
    assert ("pixels" in made) == ("codec" in CASES[case][1])
    if "pixels" in made:
        pixels = (open_codec(base).decode(wanted) / 2 + 0.5).clamp(0, 1).transpose(1, 2)
        torch.testing.assert_close(made["pixels"], pixels, rtol=0, atol=1e-4)


def test_what_a_folder_says_of_its_student(run: Path, base: Path, tmp_path: Path) -> None:
    address = str(sampled(run, StudentSampler(TIMES, RectifiedFlow(), "fresh")))
    export(address, tmp_path / "student", base=base)
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "StudentPipeline"]
    assert index["dmd2_config"] == {
        "num_inference_steps": 4, "guidance_scale": 1.0, "solver": "sde", "denoising_timesteps": [1000, 938, 833, 625],
    }  # fmt: skip
    assert index["scheduler"] == ["diffusers", "FlowMatchLCMScheduler"]
    told = json.loads((tmp_path / "student" / "student.json").read_text())
    assert told["envelope"]["latent_shape"] == list(SHAPE)
    assert (told["envelope"]["num_frames"], told["envelope"]["height"], told["envelope"]["fps"]) == (9, 16, 16.0)
    card = (tmp_path / "student" / "README.md").read_text()
    for said in (
        "4 network calls",
        "| frames | 9 |",
        "| height x width | 16 x 16 |",
        "export_test_clips",
        "| guidance | none |",
    ):
        assert said in card, card
    assert not any(
        "fewstep" in line and "import" in line for line in (tmp_path / "student" / "pipeline.py").read_text().split("\n")
    )
    model = open_model(tmp_path / "student")
    assert model.envelope.num_inference_steps == 4
    assert model.sampler == StudentSampler(TIMES, RectifiedFlow(), "fresh")


def test_the_pipeline_refuses_what_its_student_was_not_trained_for(
    run: Path, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from diffusers import DiffusionPipeline

    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    export(str(sampled(run, StudentSampler(TIMES, RectifiedFlow(), "fresh"))), tmp_path / "student", base=base)
    pipe: Any = DiffusionPipeline.from_pretrained(str(tmp_path / "student"), trust_remote_code=True)
    with pytest.raises(ValueError, match="takes 4 steps, not 50"):
        pipe("a red ball", num_inference_steps=50)
    with pytest.raises(ValueError, match="guidance is baked into this student"):
        pipe("a red ball", guidance_scale=7.0)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    frames = pipe("a red ball", num_inference_steps=50, force=True, generator=generator).frames
    assert frames.shape == (1, 9, 16, 16, 3)
    video = torch.rand(1, 3, 4, 16, 16) * 2 - 1  # shorter than the clip: its last frame is repeated, for what is not shown
    led = pipe("a red ball", video=video, num_given=1, output_type="latent").frames
    wanted = open_codec(base).encode(torch.cat([video, video[:, :, -1:].expand(-1, -1, 5, -1, -1)], 2))
    torch.testing.assert_close(led[:, :, 0], wanted[:, :, 0], rtol=0, atol=1e-5)
    next(iter(pipe.transformer.parameters())).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="answers numbers that are not finite"):  # numpy would make them black
        pipe("a red ball")


def test_adapters_are_merged_or_written_as_such(root: Path, base: Path, tmp_path: Path) -> None:
    nets = Networks(teacher=NET, student=Lora(rank=2))
    lora = trained(root, "lora", nets=nets)
    sampled(lora, StudentSampler(TIMES, RectifiedFlow(), "ode"))
    export(str(lora), tmp_path / "merged", base=base)
    export(str(lora), tmp_path / "files", "lora")
    student = open_model(str(lora)).network
    whole = load_file(tmp_path / "merged" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in student.module.state_dict().items():
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=0)
    peft = load_file(tmp_path / "files" / "pytorch_lora_weights.safetensors")
    from diffusers import CosmosTransformer3DModel

    teacher = open_model(f"{lora}:teacher").network.module
    plain = CosmosTransformer3DModel.from_config(teacher.config)
    plain.load_state_dict(teacher.state_dict())
    plain.load_lora_adapter(peft)
    x, t = torch.randn(1, 2, 3, 4, 4), torch.tensor([0.5])
    asked = {"hidden_states": x, "timestep": t, "encoder_hidden_states": torch.randn(1, 4, 8), "return_dict": False}
    asked["condition_mask"] = torch.zeros(1, 1, 3, 4, 4)
    torch.testing.assert_close(plain(**asked)[0], student.module(**asked)[0], rtol=0, atol=1e-5)
    assert (tmp_path / "files" / "kohya_lora.safetensors").is_file()
    with pytest.raises(ValueError, match="this run's student is a full network"):
        export(str(root / "fewstep" / "default" / "flow"), tmp_path / "no", "lora")


def test_original_names_go_out_and_come_back_bit_by_bit(run: Path, tmp_path: Path) -> None:
    from fewstep.networks.families.cosmos.keys import match

    export(str(run), tmp_path / "pt", "pt-original")
    names = {path.name for path in (tmp_path / "pt").glob("*.pt")}
    assert names == {"model.pt", "model_ema_fp32.pt", "model_ema_bf16.pt", "iter_000000002_full.pt"}
    original = torch.load(tmp_path / "pt" / "model_ema_fp32.pt", weights_only=True)
    assert any(name.endswith("blocks.0.self_attn.q_proj.weight") for name in original)
    mine = open_model(str(run)).network.module.state_dict()
    back = match(original).sources
    for name, tensor in mine.items():
        torch.testing.assert_close(original[back[name]], tensor, rtol=0, atol=0)
    both = torch.load(tmp_path / "pt" / "iter_000000002_full.pt", weights_only=True)
    assert both["iteration"] == 2
    assert both["ema"].keys() == both["model"].keys() == original.keys()


def test_any_network_goes_out_as_safetensors_and_comes_back(root: Path, tmp_path: Path) -> None:
    mixture = MixtureSpec(means=((1.0, 0.0), (-1.0, 0.5)), stds=(0.2, 0.3))
    os.environ["OUTPUT_ROOT"] = str(root)
    made = Run(
        job=Job(name="points"), method=Finetune(), networks=Networks(student=Full(TinySpec(width=8, depth=1), init="random")),
        data=MixtureSamples(mixture, num=16), trainer=Trainer(max_iter=2, batch_size=4, num_threads=1, log_every=1),
    )  # fmt: skip
    train(made)
    files = export(str(made.job.folder()), tmp_path / "student")
    assert {"student.safetensors", "student.json", "config.yaml", "README.md"} == {path.name for path in files}
    found, wanted = open_model(tmp_path / "student"), open_model(str(made.job.folder()))
    for name, tensor in wanted.network.module.state_dict().items():
        torch.testing.assert_close(found.network.module.state_dict()[name], tensor, rtol=0, atol=0)
    with pytest.raises(ValueError, match="is no class of diffusers; take --format safetensors"):
        export(str(made.job.folder()), tmp_path / "other", "diffusers")
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / ".other.partial").exists()


def test_a_folder_that_is_no_export_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than an earlier export"):
        export(str(run), tmp_path / "thesis")
    with pytest.raises(ValueError, match="holds something else"):
        export(str(run), run)
    with pytest.raises(ValueError, match=r"is no folder of a diffusers pipeline, it has no model_index\.json"):
        export(str(run), tmp_path / "new", base=tmp_path)
    export(str(run), tmp_path / "new")
    export(str(run), tmp_path / "new", "safetensors")  # an earlier export is replaced
    assert (tmp_path / "new" / "student.safetensors").is_file()
    assert not (tmp_path / "new" / "model_index.json").exists()


def test_what_the_user_put_beside_an_export_stays(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    export(str(run), out, "safetensors")
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("keep")
    (out / "link").symlink_to("notes/mine.txt")
    files = export(str(run), out)
    assert (out / "notes" / "mine.txt").read_text() == "keep" and (out / "link").readlink() == Path("notes/mine.txt")
    assert (out / "transformer").is_dir() and not (out / "student.safetensors").exists()
    assert not {"mine.txt", "link"} & {path.name for path in files}
    (out / "student.safetensors").write_text("mine, too")
    with pytest.raises(ValueError, match=r"would replace student\.safetensors, which no export wrote"):
        export(str(run), out, "safetensors")
    assert (out / "student.safetensors").read_text() == "mine, too" and (out / "transformer").is_dir()


# ---- a base from somewhere else --------------------------------------------------------------------------------------


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


def test_only_data_of_known_parts_is_copied_from_a_base(run: Path, copied: Path, tmp_path: Path) -> None:
    for name in ("vae/evil.py", "evil/model.py", "vae/deep/evil.py", "text_encoder/run.sh"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("raise SystemExit('executed')")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.json").write_text("{}")
    index = json.loads((copied / "model_index.json").read_text())
    index |= {"../secret": ["diffusers", "AutoencoderKLCosmos"], "evil": ["evil", "Model"], "tokenizer": ["vae.evil", "X"]}
    index |= {"image_encoder": ["transformers", "__import__('os')"], "_class_name": ["evil", "Pipeline"], "boundary_ratio": 0.5}
    (copied / "model_index.json").write_text(json.dumps(index))
    files = export(str(run), tmp_path / "out" / "student", base=copied)
    names = {path.relative_to(tmp_path / "out" / "student").as_posix() for path in files}
    assert {name for name in names if not name.endswith((".json", ".safetensors"))} == {
        "README.md",
        "config.yaml",
        "pipeline.py",
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["student"]
    written = json.loads((tmp_path / "out" / "student" / "model_index.json").read_text())
    assert not {"../secret", "evil", "tokenizer", "image_encoder"} & written.keys() and written["boundary_ratio"] == 0.5
    assert written["_class_name"] == ["pipeline", "StudentPipeline"]
    for file in files:
        assert file.stat().st_nlink == 1, file  # an edit of the student's file must not change the teacher's


@pytest.mark.parametrize("name", ["vae/config.json", "vae/more.safetensors", "vae"])
def test_links_in_a_base_are_not_followed(name: str, run: Path, copied: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    if (copied / name).exists():
        (copied / name).rename(target)
    else:
        target.write_text("a private key")
    (copied / name).symlink_to(target)
    with pytest.raises(ValueError, match=rf"--base {copied / name}: is a symbolic link"):
        export(str(run), tmp_path / "student", base=copied)
    assert not (tmp_path / "student").exists()


def test_the_links_of_the_hubs_own_cache_are_followed(run: Path, copied: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "models--x" / "blobs"
    snapshot = tmp_path / "models--x" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    copied.rename(snapshot)
    (snapshot / "vae" / "config.json").rename(blobs / "5678")
    (snapshot / "vae" / "config.json").symlink_to("../../../blobs/5678")
    export(str(run), tmp_path / "student", base=snapshot)
    assert not (tmp_path / "student" / "vae" / "config.json").is_symlink()


def test_a_part_that_asks_for_code_of_its_own_is_refused(run: Path, copied: Path, tmp_path: Path) -> None:
    config = copied / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ValueError, match="asks for code of its own"):
        export(str(run), tmp_path / "student", base=copied)


# ---- a run without a moving average ----------------------------------------------------------------------------------


def test_a_run_without_a_moving_average_gives_its_weights_and_says_so(root: Path, tmp_path: Path, capfd: Any) -> None:
    plain = trained(root, "no_average", ema=Ema(profile="none"))
    said = "keeps no moving average; its student's weights are taken as trained"
    model = open_model(str(plain))
    assert said in capfd.readouterr().err
    export(str(plain), tmp_path / "student")
    assert said in capfd.readouterr().err and "weights: `student`" in (tmp_path / "student" / "README.md").read_text()
    initialised = build(Networks(student=Full(NET, init=str(plain))), ("student",), 0)["student"]
    again = open_model(tmp_path / "student")
    for name, tensor in read(f"{plain}:student").items():
        for network in (model.network, again.network, initialised):
            torch.testing.assert_close(network.module.state_dict()[name], tensor, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"holds no 'student\.ema'"):
        open_model(f"{plain}:student.ema")


# ---- schedulers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("renoise", ["ode", "fresh"])
def test_a_scheduler_of_diffusers_takes_the_steps_of_a_shifted_student(num: int, shift: float, renoise: Any) -> None:
    """Its steps on a linear velocity, by its own step(), equal ours."""
    sampler = StudentSampler(tuple(shifted(num, shift).tolist()), RectifiedFlow(), renoise)
    fit = scheduler_of(sampler, RectifiedFlow())
    assert fit is not None and fit.offset == 0.0
    scheduler = fit.scheduler
    scheduler.set_timesteps(num)
    torch.testing.assert_close(scheduler.timesteps.double(), 1000 * torch.tensor(sampler.times).double(), rtol=2e-6, atol=0)
    x, drawn = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    noises, start = [torch.randn(1, 4, generator=drawn) for _ in range(num)], x
    for step in scheduler.timesteps:
        x = scheduler.step(0.3 * x + 0.1, step, x, generator=torch.Generator().manual_seed(1), return_dict=False)[0]
    mine = start
    for i, t in enumerate(sampler.times):
        x0, eps = mine - t * (0.3 * mine + 0.1), mine + (1 - t) * (0.3 * mine + 0.1)
        following = sampler.times[i + 1] if i + 1 < num else 0.0
        mine = (1 - following) * x0 + following * (eps if renoise == "ode" else noises[0])
    torch.testing.assert_close(x, mine, rtol=0, atol=1e-5)


def test_where_no_scheduler_takes_the_steps_none_is_named() -> None:
    flow = RectifiedFlow()
    assert scheduler_of(StudentSampler((0.997, 0.937, 0.833, 0.624), flow, "ode"), flow) is None  # begins below pure noise
    assert scheduler_of(StudentSampler((1.0, 0.9, 0.8, 0.1), flow, "ode"), flow) is None
    assert scheduler_of(StudentSampler(TIMES, flow, "same"), flow) is None
    edm = EDM(sigma_data=0.5)
    assert scheduler_of(StudentSampler((80.0,), edm, "fresh"), edm) is not None
    assert scheduler_of(StudentSampler(tuple(karras(4).tolist()), edm, "ode"), edm) is not None
    assert scheduler_of(StudentSampler((80.0, 40.0, 0.1), edm, "ode"), edm) is None


@pytest.mark.parametrize(
    ("times", "offset"),
    [((1.0, 0.9375, 0.8333, 0.625), 3.34e-5), ((0.999, 0.937, 0.833, 0.624), 1e-3), ((0.999,), 1e-3), ((0.999, 0.833), 1e-3)],
)
@pytest.mark.parametrize("sends_sigmas", [False, True])
def test_rounded_times_keep_upstream_s_pipeline_and_the_difference_is_stated(
    times: tuple[float, ...], offset: float, sends_sigmas: bool
) -> None:
    """Times written with four digits, and FastGen's: a scheduler within 1e-3 of each."""
    flow = RectifiedFlow()
    fit = scheduler_of(StudentSampler(times, flow, "ode"), flow, Scheduling(sends_sigmas=sends_sigmas))
    assert fit is not None and 0 < fit.offset == pytest.approx(offset, rel=0.3)
    num = len(times)
    fit.scheduler.set_timesteps(num, **({"sigmas": [1 - i / num for i in range(num)]} if sends_sigmas else {}))
    assert fit.scheduler.sigmas[:-1].tolist() == pytest.approx(times, rel=0, abs=1.001e-3)


def test_kd_papers_name_its_times(root: Path) -> None:
    run = trained(root, "kd", method=KD(t_list=(1.0,)))
    assert open_model(str(run)).sampler == StudentSampler((1.0,), RectifiedFlow(), "fresh")
