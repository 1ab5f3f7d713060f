"""Pairs: the clip is what the teacher's ODE makes of the stored noise, by an integration written here; files, resume, ranks."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fewstep import TOY
from fewstep.batch import Condition
from fewstep.cli import main as cli
from fewstep.data.controls import Edge
from fewstep.data.files import arrays, cache, video
from fewstep.data.files.arrays import write_pickle
from fewstep.data.folder.dataset import Folder
from fewstep.diffusion import Prediction, RectifiedFlow, Rng, TeacherSampler
from fewstep.diffusion.sampling import student_times
from fewstep.inference.conditions import Shot
from fewstep.inference.pair_prompts import FolderPrompts, published_shot
from fewstep.inference.pairs import PairSettings, Solver, verify
from fewstep.inference.pairs import write as write_pairs
from fewstep.inference.request import PairsRequest, SamplerOptions, Sizes, path_times_of
from fewstep.networks.contract import NetworkDefaults, Traits
from fewstep.prepare.latents import write as prepare_latents

NUM, FRAMES, SIZE = 5, 5, 8
TIMES = (1.0, 0.75, 0.5)


class Pull(NetworkDefaults):
    """v = x - text: a field whose flow is known, and which depends on the condition."""

    path = RectifiedFlow()
    module = nn.Module()
    traits = Traits(controls=("edge",))
    asked = 0

    def __call__(self, x_t, t, cond: Condition, *, taps=(), cache=None) -> Prediction:
        self.asked += len(x_t)
        assert cond.text is not None
        target = cond.text.mean((1, 2)).to(x_t)[:, None, None, None, None]
        velocity = x_t - target
        if cond.frames is not None:
            assert cond.frame_mask is not None
            velocity = velocity + (cond.frames * cond.frame_mask[:, None, :, None, None]).sum((1, 2, 3, 4), keepdim=True) * 1e-3
        for control in cond.control.values():
            velocity = velocity + control.mean((1, 2, 3, 4), keepdim=True)
        return Prediction(x_t, t, self.path, velocity)


class Blocks:
    """A codec of 4 x 4 blocks, every other frame: 3 channels of means."""

    module = nn.Module()
    fingerprint = "blocks"

    def encode(self, pixels):
        return nn.functional.avg_pool3d(pixels[:, :, ::2], (1, 4, 4))

    def decode(self, latents):
        return nn.functional.interpolate(latents, scale_factor=(1, 4, 4)).repeat_interleave(2, 2)[:, :, :-1]

    def shape(self, frames, height, width):
        return 3, (frames + 1) // 2, height // 4, width // 4


def write(out: Path, teacher: Any, codec: Any, source: Folder, making: PairSettings, **more: Any) -> int:
    needs_clips = source.control is not None or making.given_frames > 0
    prompts = FolderPrompts.of(source, codec=codec, needs_clips=needs_clips)
    solver = Solver(teacher, codec, making, name=more.pop("name", "the teacher"))
    return write_pairs(out, solver, prompts, **more)


def dataset(root: Path) -> Folder:
    rng = np.random.default_rng(0)
    for n in range(NUM):
        frames = rng.integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
        video.write(root / "videos" / f"{n}.mp4", frames, 16.0, quality="lossless")
        video.write(root / "edge" / f"{n}.mp4", frames[::-1].copy(), 16.0, quality="lossless")
        (root / "metas").mkdir(exist_ok=True)
        (root / "metas" / f"{n}.txt").write_text(f"clip {n}\n")
        write_pickle(root / "t5_xxl" / f"{n}.pickle", [np.full((2, 3), 0.1 * n, np.float32)])
    return Folder(str(root), max_tokens=2, negative="zeros")


def by_hand(noise: torch.Tensor, target: float, w: float, num: int, until: float = 0.0) -> torch.Tensor:
    """Euler on the even grid 1, 1 - 1/num, ..: guided target is w target, the negative's being 0."""
    x, grid = noise.double(), [1 - k / num for k in range(num)] + [0.0]
    for t, t_next in pairwise(grid):
        if t <= until + 1e-9:
            break
        x = x + (t_next - t) * (x - w * target)
    return x


def settings(num_steps: int, guidance: float = 1.0, **changes: Any) -> PairSettings:
    return PairSettings(TeacherSampler("euler", num_steps, shift=1.0, guidance=guidance), **changes)


def made(tmp_path: Path, name: str = "out", source: Folder | None = None, **more) -> Path:
    making = settings(8, guidance=2.0, seed=3, path_times=TIMES, quality="lossless")
    source = source or dataset(tmp_path / "data")
    write(tmp_path / name, Pull(), Blocks(), source, making, name="pull", batch_size=2, **more)  # type: ignore[arg-type]
    return tmp_path / name


def test_each_clip_is_the_flow_of_its_noise(tmp_path: Path) -> None:
    out = made(tmp_path)
    for n in range(NUM):
        noise = torch.from_numpy(arrays.read_one(out / "noise" / f"{n}.pickle").numpy())
        assert noise.shape == (3, 3, 2, 2)
        latents = cache.read(out / "latents" / f"{n}.safetensors").tensors["latents"]
        torch.testing.assert_close(latents.double(), by_hand(noise, 0.1 * n, 2.0, 8), atol=2e-6, rtol=0)
        path = cache.read(out / "path" / f"{n}.safetensors").tensors
        assert path["path_times"].tolist() == list(TIMES)
        for k, t in enumerate(TIMES):
            torch.testing.assert_close(path["path"][k].double(), by_hand(noise, 0.1 * n, 2.0, 8, t), atol=2e-6, rtol=0)
        pixels = Blocks().decode(latents[None]).clamp(-1, 1)[0].permute(1, 2, 3, 0)
        shown = video.read(out / "videos" / f"{n}.mp4").frames
        np.testing.assert_allclose(shown, (pixels.numpy() + 1) * 127.5, atol=0.51)
        assert (out / "metas" / f"{n}.txt").read_text() == f"clip {n}\n"


def test_what_was_written_is_what_kd_reads(tmp_path: Path) -> None:
    out = made(tmp_path)
    data = Folder(str(out), x0="latents", max_tokens=2, pairs=("noise", "path")).open()
    batch = data.batch(torch.arange(NUM))
    assert batch.noise is not None and batch.x0 is not None and batch.path is not None
    torch.testing.assert_close(batch.path[:, 0], batch.noise)
    for n in range(NUM):
        torch.testing.assert_close(batch.x0[n].double(), by_hand(batch.noise[n], 0.1 * n, 2.0, 8), atol=2e-6, rtol=0)


def test_ranks_divide_the_work_and_change_nothing(tmp_path: Path) -> None:
    source = dataset(tmp_path / "data")
    alone = made(tmp_path, "alone", source)
    for rank in (1, 0):
        both = made(tmp_path, "both", source, rank=rank, world_size=2)
    files = sorted(path.relative_to(alone) for path in alone.rglob("*.*") if path.is_file())
    assert files == sorted(path.relative_to(both) for path in both.rglob("*.*") if path.is_file())
    for name in files:
        if name.suffix == ".safetensors":  # whose header is in no fixed order
            one, two = cache.read(alone / name), cache.read(both / name)
            assert one.tensors.keys() == two.tensors.keys()
            assert all(torch.equal(one.tensors[key], two.tensors[key]) for key in one.tensors), name
        else:
            assert (alone / name).read_bytes() == (both / name).read_bytes(), name


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    source, out = dataset(tmp_path / "data"), tmp_path / "out"
    making, teacher = settings(4), Pull()
    assert write(out, teacher, Blocks(), source, making, num=3, batch_size=1) == 3  # type: ignore[arg-type]
    (out / "noise" / "1.pickle").unlink()  # as if killed before it was written
    teacher.asked = 0
    assert write(out, teacher, Blocks(), source, making, num=4, batch_size=1) == 2  # type: ignore[arg-type]
    assert teacher.asked == 2 * 4
    with pytest.raises(ValueError, match=r"sampler\.guidance 1.0, not 3.0"):
        write(out, teacher, Blocks(), source, settings(4, guidance=3.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"--num 9: .* has 5 samples"):
        write(out, teacher, Blocks(), source, making, num=9)  # type: ignore[arg-type]


class Crowd(Pull):
    """Answers by the size of the batch: as kernels do, but in more than the last bits."""

    def __call__(self, x_t, t, cond: Condition, *, taps=(), cache=None) -> Prediction:
        answer = super().__call__(x_t, t, cond)
        return Prediction(x_t, t, self.path, answer.velocity * (1 + len(x_t) / 100))


@pytest.mark.parametrize("lacks", [("1",), ("0", "4"), ("2", "3", "4")])
@pytest.mark.parametrize("world_size", [1, 2])
def test_pairs_that_are_made_later_are_those_of_an_undisturbed_run(
    lacks: tuple[str, ...], world_size: int, tmp_path: Path
) -> None:
    """A kill leaves some pairs of a batch; the others are made in the same batch, and what is there is not written again."""
    source, out, making, teacher = dataset(tmp_path / "data"), tmp_path / "out", settings(4), Crowd()

    def run() -> int:
        more = {"batch_size": 2, "world_size": world_size}
        return sum(write(out, teacher, Blocks(), source, making, rank=rank, **more) for rank in range(world_size))  # type: ignore[arg-type]

    assert run() == NUM
    whole = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert cache.read(out / "latents/0.safetensors").tensors["latents"].isfinite().all()
    for name in lacks:
        (out / "videos" / f"{name}.mp4").unlink()
    times = {path: path.stat().st_mtime_ns for path in whole if path.exists() and path.stem not in lacks}
    assert run() == len(lacks)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == whole
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_teacher_that_answers_nan_makes_no_pairs(tmp_path: Path) -> None:
    """Clamped and rounded, nan is black: its pairs would look like clips of the night."""

    class Broken(Pull):
        def __call__(self, x_t, t, cond: Condition, *, taps=(), cache=None) -> Prediction:
            return super().__call__(x_t * float("nan"), t, cond)

    source, out = dataset(tmp_path / "data"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"^pull: answers numbers that are not finite"):
        write(out, Broken(), Blocks(), source, settings(2), name="pull")  # type: ignore[arg-type]
    assert not out.exists()  # and nothing blocks the next command
    out.mkdir()
    (out / "pairs.json").write_text('{"teacher": ')
    with pytest.raises(ValueError, match=r"pairs\.json: damaged, no JSON: .*Remove .*out and make its pairs again"):
        made(tmp_path, "out", source)


def test_controls_and_given_frames_reach_the_teacher_and_stay_with_the_pair(tmp_path: Path) -> None:
    plain = dataset(tmp_path / "data")
    source = Folder(plain.dataset_dir, max_tokens=2, control=Edge())
    making = settings(2, given_frames=1)
    write(tmp_path / "out", Pull(), Blocks(), source, making)  # type: ignore[arg-type]
    pixels = plain.open().batch(torch.tensor([2])).x0
    control = source.open().batch(torch.tensor([2])).cond.control["edge"]
    noise = arrays.read_one(tmp_path / "out" / "noise" / "2.pickle").double()
    first = Blocks().encode(pixels)[0, :, :1].sum() * 1e-3 + Blocks().encode(control).mean()
    x = noise
    for _ in range(2):
        x = x - 0.5 * (x - 0.2 + first)
    latents = cache.read(tmp_path / "out" / "latents" / "2.safetensors").tensors["latents"]
    torch.testing.assert_close(latents.double(), x, atol=1e-5, rtol=0)
    assert (tmp_path / "out" / "edge" / "2.mp4").read_bytes() == (Path(plain.dataset_dir) / "edge" / "2.mp4").read_bytes()
    assert json.loads((tmp_path / "out" / "pairs.json").read_text())["given_frames"] == 1


def test_a_control_without_a_branch_is_refused(tmp_path: Path) -> None:
    class Plain(Pull):
        traits = Traits()

    class Deep(Pull):
        traits = Traits(controls=("depth", "seg"))

    source = Folder(dataset(tmp_path / "data").dataset_dir, max_tokens=2, control=Edge())
    for teacher, words in ((Plain(), "no control branch"), (Deep(), "branches for depth, seg only")):
        with pytest.raises(ValueError, match=rf"--control edge: pull has {words}"):
            write(tmp_path / "out", teacher, Blocks(), source, settings(2), name="pull")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_other_captions_texts_or_weights_do_not_mix_in(tmp_path: Path) -> None:
    source, out = dataset(tmp_path / "data"), tmp_path / "out"
    write(out, Pull(), Blocks(), source, settings(2), num=2)
    caption, text = (Path(source.dataset_dir) / name for name in ("metas/1.txt", "t5_xxl/1.pickle"))

    class Other(Pull):
        module = nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"teacher_weights '[0-9a-f]{16}', not '[0-9a-f]{16}'"):
        write(out, Other(), Blocks(), source, settings(2))
    caption.write_text("another clip\n")
    with pytest.raises(ValueError, match=r"1 pairs were made of other captions .*: 1\."):
        write(out, Pull(), Blocks(), source, settings(2))
    caption.write_text("clip 1\n")
    before = text.read_bytes()
    write_pickle(text, [np.ones((2, 3), np.float32)])
    with pytest.raises(ValueError, match=r"the pair 1 was made of another text embedding"):
        write(out, Pull(), Blocks(), source, settings(2))
    text.write_bytes(before)
    (Path(source.dataset_dir) / "metas" / "4.txt").write_text("another clip\n")  # of no pair so far
    assert write(out, Pull(), Blocks(), source, settings(2)) == NUM - 2
    with pytest.raises(ValueError, match=r"shape \[5, 8, 8\], not \[3, 8, 8\]"):
        write_pairs(out, Solver(Pull(), Blocks(), settings(2)), FolderPrompts.of(source, Sizes(num_frames=3)))  # type: ignore[arg-type]


def test_a_data_set_that_gains_clips_keeps_its_noise(tmp_path: Path) -> None:
    source, out = dataset(tmp_path / "data"), tmp_path / "out"
    write(out, Pull(), Blocks(), source, settings(2))
    noise = {n: (out / "noise" / f"{n}.pickle").read_bytes() for n in range(NUM)}
    root = Path(source.dataset_dir)
    for part, suffix in (("videos", "mp4"), ("metas", "txt"), ("t5_xxl", "pickle"), ("edge", "mp4")):
        shutil.copy(root / part / f"1.{suffix}", root / part / f"00.{suffix}")  # the second in the order of names
    for rank in (1, 0):
        write(out, Pull(), Blocks(), source, settings(2), rank=rank, world_size=2)
    assert all((out / "noise" / f"{n}.pickle").read_bytes() == noise[n] for n in noise)
    new = arrays.read_one(out / "noise" / "00.pickle")
    assert torch.equal(new, Rng(0, 0, [NUM]).normal((3, 3, 2, 2))[0])  # a number of its own, after all others


def test_clips_have_the_shape_of_the_prepared_latents_or_of_the_options(tmp_path: Path) -> None:
    """KD on whole clips and DMD2 on windows of them went together without a word."""
    source, out = dataset(tmp_path / "data"), tmp_path / "out"
    windowed = replace(source, text=None, negative=None, num_frames=3, video_size=(4, 8))
    prepare_latents(windowed, Blocks())  # type: ignore[arg-type]
    write(out, Pull(), Blocks(), source, settings(2, quality="lossless"))
    assert video.read(out / "videos" / "2.mp4").frames.shape == (3, 4, 8, 3)
    prompts = FolderPrompts.of(source, codec=Blocks())  # type: ignore[arg-type]
    assert prompts.origin == "the data set's prepared latents (latents/)" and prompts.shot.num_frames == 3
    sizes = Sizes(num_frames=9, height=16, width=8, fps=12.0)  # more frames than the clips have: no clip is read
    prompts = FolderPrompts.of(source, sizes)
    assert write_pairs(tmp_path / "long", Solver(Pull(), Blocks(), settings(2, quality="lossless")), prompts) == NUM  # type: ignore[arg-type]
    made = video.read(tmp_path / "long" / "videos" / "2.mp4")
    assert made.frames.shape == (9, 16, 8, 3) and made.fps == 12.0
    with pytest.raises(ValueError, match="shorter than a window of 9 frames"):
        FolderPrompts.of(replace(source, control=Edge()), sizes, needs_clips=True)


def test_a_control_of_a_window_is_stored_as_the_teacher_received_it(tmp_path: Path) -> None:
    source, out = replace(dataset(tmp_path / "data"), control=Edge()), tmp_path / "out"
    prompts = FolderPrompts.of(source, Sizes(num_frames=3, height=4, width=8), needs_clips=True)
    write_pairs(out, Solver(Pull(), Blocks(), settings(2, quality="lossless")), prompts)  # type: ignore[arg-type]
    stored = video.read(out / "edge" / "1.mp4").frames
    expected = replace(source, num_frames=3, video_size=(4, 8)).open()
    row = [sample.stem for sample in expected.samples].index("1")
    pixels = expected.batch(torch.tensor([row])).cond.control["edge"]
    assert torch.equal(torch.from_numpy(stored), ((pixels[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0))
    data = Folder(str(out), x0="latents", max_tokens=2, pairs=("noise",), control=Edge()).open()
    torch.testing.assert_close(data.batch(torch.tensor([1])).cond.control["edge"], Blocks().encode(pixels).half().float())


def test_captions_alone_are_enough(tmp_path: Path) -> None:
    source = dataset(tmp_path / "data")
    write(tmp_path / "whole", Pull(), Blocks(), source, settings(2))
    for name in ("videos", "edge"):
        shutil.rmtree(Path(source.dataset_dir) / name)
    with pytest.raises(ValueError, match=r"no clips and no latents.* give --num-frames, --height, --width"):
        FolderPrompts.of(source)
    for sizes, teacher in ((Sizes(FRAMES, SIZE, SIZE), None), (Sizes(), Shot(FRAMES, SIZE, SIZE, 16.0))):
        out = tmp_path / f"alone_{teacher is None}"
        write_pairs(out, Solver(Pull(), Blocks(), settings(2)), FolderPrompts.of(source, sizes, teacher=teacher))  # type: ignore[arg-type]
        for n in range(NUM):
            same = [cache.read(f / "latents" / f"{n}.safetensors").tensors["latents"] for f in (out, tmp_path / "whole")]
            assert torch.equal(*same)


def test_the_files_of_fastgen_hold_the_same_pairs(tmp_path: Path) -> None:
    source, out = dataset(tmp_path / "data"), tmp_path / "fastgen"
    ours = made(tmp_path, "ours", source)
    write(out, Pull(), Blocks(), source, settings(8, 2.0, seed=3, path_times=TIMES, form="fastgen"), batch_size=2)
    names = {"latent.pth", "path.pth", "prompt.txt", "video.mp4", "noise.pth", "txt_emb.pth"}
    assert {path.name for path in (out / "000001").iterdir()} == names
    state = torch.load(out / "000001" / "path.pth", weights_only=True)
    assert state.shape == (3, 3, 3, 2, 2) and (out / "000001" / "prompt.txt").read_text() == "clip 1\n"
    batches = [
        Folder(str(folder), x0="latents", max_tokens=2, pairs=("noise", "path")).open().batch(torch.arange(NUM))
        for folder in (ours, out)  # of the second the times come from pairs.json
    ]
    for name in ("x0", "noise", "path", "path_times"):
        assert torch.equal(getattr(batches[0], name), getattr(batches[1], name)), name
    assert torch.equal(batches[0].cond.text, batches[1].cond.text)
    assert write(out, Pull(), Blocks(), source, settings(8, 2.0, seed=3, path_times=TIMES, form="fastgen")) == 0
    with pytest.raises(ValueError, match="has no place for a control"):
        write(tmp_path / "x", Pull(), Blocks(), replace(source, control=Edge()), settings(2, form="fastgen"))
    teacher, pooled = Pull(), {"text": np.ones((2, 3), np.float32), "pooled": np.ones(4, np.float32)}
    for n in range(NUM):
        write_pickle(tmp_path / f"data/t5_xxl/{n}.pickle", pooled)
    with pytest.raises(ValueError, match="has no place for the pooled vectors"):
        write(tmp_path / "x", teacher, Blocks(), source, settings(2, form="fastgen"))
    assert not teacher.asked and not (tmp_path / "x").exists()


def test_verify_solves_pairs_again(tmp_path: Path) -> None:
    source = dataset(tmp_path / "data")
    out = made(tmp_path, "out", source)
    prompts = FolderPrompts.of(source)
    making = settings(8, guidance=2.0, seed=3, path_times=TIMES)
    assert verify(out, Solver(Pull(), Blocks(), making), prompts, 3) < 1e-6  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the pair 1 differs by .* of its spread"):
        verify(out, Solver(Pull(), Blocks(), replace(making, sampler=replace(making.sampler, guidance=3.0))), prompts, NUM)  # type: ignore[arg-type]


def test_a_foreign_folder_is_not_written_into(tmp_path: Path) -> None:
    source, out = dataset(tmp_path / "data"), tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"is not empty and has no pairs.json"):
        write(out, Pull(), Blocks(), source, settings(2))  # type: ignore[arg-type]


def test_a_command_line_is_read_whole() -> None:
    # shift s of u: s u / (1 + (s - 1) u) at u = 1, 3/4, 1/2, 1/4
    assert path_times_of("4") == 4
    np.testing.assert_allclose(student_times(4, RectifiedFlow(), 3.0), [1.0, 0.9, 0.75, 0.5], rtol=1e-12)
    assert path_times_of("0.9,0.5") == (0.9, 0.5)
    with pytest.raises(ValueError, match="--sampler is one of"):
        SamplerOptions(solver="rk4")
    with pytest.raises(ValueError, match="takes numbers"):
        path_times_of("x")
    here = Path()
    for wrong, match in (
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"batch_size": -1}, "--batch-size -1: at least 1"),
        ({"given_frames": -1}, "--given-frames -1: at least 0"),
        ({"quality": "good"}, "--quality is 'lossless' or a CRF"),
    ):
        with pytest.raises(ValueError, match=match):
            PairsRequest("m", here, here, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"--path-times 0\.5,0\.9: times descend"):
        path_times_of("0.5,0.9")
    with pytest.raises(ValueError, match="--height and --width go together"):
        Sizes(height=8)
    with pytest.raises(ValueError, match="give a data set, or --prompts FILE"):
        PairsRequest("m", None, here)
    with pytest.raises(ValueError, match="--path-times: the times must descend"):
        settings(8, path_times=(0.5, 0.9)).check(RectifiedFlow())
    with pytest.raises(ValueError, match="too few to keep 4 states and solve between them: at least 8"):
        settings(6, path_times=(1.0, 0.9, 0.75, 0.5)).check(RectifiedFlow())


def test_prompts_alone_make_the_pairs_of_a_data_set_with_those_captions(tmp_path: Path, capsys: Any) -> None:
    prompts = ["a red sphere rolls right", "a blue box slides left"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (tmp_path / "data" / "metas").mkdir(parents=True)
    for n, prompt in enumerate(prompts):
        (tmp_path / "data" / "metas" / f"{n:06d}.txt").write_text(prompt)
    out, data = str(tmp_path / "out"), str(tmp_path / "data")
    size = ["--num-frames", "5", "--height", "16", "--width", "16", "--fps", "8"]
    same = ["--steps", "4", "--guidance", "2", "--path-times", "2", "--mask-text", "--max-tokens", "40", *size]
    assert cli(["prepare", "text", data, "--text-encoder", str(TOY), "--negative-prompt", ""]) == 0
    of_data = ["pairs", str(TOY), data, "--out", f"{out}/data", "--negative", "negative.pickle", *same]
    assert cli(of_data) == 0
    alone = ["pairs", str(TOY), "--prompts", str(tmp_path / "prompts.txt"), "--out", f"{out}/alone", *same, "--verify", "1"]
    capsys.readouterr()
    assert cli(alone) == 0
    shown = capsys.readouterr()
    assert "clips of 5 x 16 x 16 at 8 fps: --num-frames 5 --height 16 --width 16" in shown.err
    assert "2 pairs made; 1 of them solved again differ by" in shown.out
    for kind in ("noise", "latents", "path"):
        one, other = (layout_file(Path(out) / name, kind, "000001") for name in ("data", "alone"))
        assert all(torch.equal(arrays.read(one)[key], arrays.read(other)[key]) for key in arrays.read(one)), kind
    # what was written is a data set that trains: its text and its negative are those the teacher received
    settings_ = {"x0": "latents", "pairs": ("noise", "path"), "max_tokens": 40, "negative": "negative.pickle"}
    batches = [Folder(f"{out}/{name}", **settings_).open().batch(torch.arange(2)) for name in ("alone",)]  # type: ignore[arg-type]
    assert batches[0].negative is not None and batches[0].cond.text is not None
    assert not torch.equal(batches[0].negative.text, batches[0].cond.text)
    assert not list(Path(out, "alone").glob(".text*"))
    # wrong use is found before the teacher is loaded
    assert cli([*of_data, "--prompts", "p.txt"]) == 2 and cli([*alone, "--control", "edge"]) == 2
    assert cli([word if word != "4" else "3" for word in of_data]) == 2
    assert "3 steps are too few to keep 2 states and solve between them: at least 4" in capsys.readouterr().err


def layout_file(root: Path, kind: str, stem: str) -> Path:
    return root / kind / f"{stem}.{'pickle' if kind == 'noise' else 'safetensors'}"


def test_without_clips_the_size_is_that_of_the_upstream_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert published_shot(str(tmp_path)) == Shot(81, 480, 832, 24.0)
    assert published_shot(str(TOY)) is None


@pytest.mark.slow
def test_two_processes_that_hold_half_of_the_weights_make_the_same_pairs(tmp_path: Path) -> None:
    (tmp_path / "data" / "metas").mkdir(parents=True)
    for n in range(3):
        (tmp_path / "data" / "metas" / f"{n}.txt").write_text(["a red sphere rolls right", "a box slides", ""][n] or "a box")
    assert cli(["prepare", "text", str(tmp_path / "data"), "--encoder", str(TOY)]) == 0
    command = [
        "pairs",
        str(TOY),
        str(tmp_path / "data"),
        "--num-frames",
        "5",
        "--height",
        "16",
        "--width",
        "16",
        "--steps",
        "2",
    ]
    command += ["--mask-text", "--max-tokens", "40", "--batch-size", "1", "--device", "cpu", "--verify", "2", "--out"]
    assert cli([*command, str(tmp_path / "alone")]) == 0
    code = "import sys, torch; torch.set_num_threads(1); from fewstep.cli import main; sys.exit(main(sys.argv[1:]))"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "-c", code, *command, str(tmp_path / "shared"), "--shard"]
    processes = [
        subprocess.Popen(
            words,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert "2 pairs made by rank 0 of 2; 2 of them solved again" in said[0] and "1 pairs made by rank 1 of 2" in said[1]
    for n in range(3):
        latents = [cache.read(tmp_path / f / "latents" / f"{n}.safetensors").tensors["latents"] for f in ("alone", "shared")]
        assert torch.equal(*latents)
