"""A folder with one small honest file of each kind that the package reads, and the commands that read it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIZE = (16, 24)


@dataclass(frozen=True)
class Target:
    """A file, and a command that reads it. {home} is a copy of the folder below, {out} a fresh one to write to."""

    file: str
    command: str
    kind: str = "json"  # how it is damaged: json, lines, yaml, text, bytes
    weight: int = 10
    is_deep: bool = False  # imports diffusers, which takes seconds
    is_checked: bool = False  # a command that succeeds in spite of the damage gives the undisturbed result


_GENERATE = "generate {home}/run --num-frames 1 --height 1 --width 1 --out {out}"
_CONVERT = "convert {home}/weights.pt {out}/x.safetensors"
_EXPORT = "export {home}/run --out {out} --format safetensors"
_RESUME = "train {home}/run/config.yaml trainer.max_iter=5"
_CHECKPOINT = "run/checkpoints/iter_000000004"
TARGETS = (
    Target("run/checkpoints/latest_checkpoint.txt", _EXPORT, "text", is_checked=True),
    Target(f"{_CHECKPOINT}/.metadata", _EXPORT, "bytes", 20, is_checked=True),
    Target(f"{_CHECKPOINT}/__0_0.distcp", _EXPORT, "bytes", 20, is_checked=True),
    Target(f"{_CHECKPOINT}/trainer.json", _EXPORT),
    Target("run/student.json", _EXPORT, weight=20),
    Target("run/config.yaml", _EXPORT, "yaml", 20),
    Target("run/summary.json", _EXPORT),
    Target("run/checkpoints/iter_000000002/trainer.json", _RESUME, weight=3),
    Target(f"{_CHECKPOINT}/trainer.json", _RESUME, weight=3),
    Target(f"{_CHECKPOINT}/.metadata", _RESUME, "bytes", 3),
    Target("run/checkpoints/latest_checkpoint.txt", _RESUME, "text", 3),
    Target("run/metrics.jsonl", _RESUME, "lines", 3),
    Target("run/config.yaml", _RESUME, "yaml", 3),
    Target("mine.json", "report {home}/mine.json {home}/run --out {out}/x.html", weight=20),
    Target("run/metrics.jsonl", "report {home}/run --out {out}/x.html", "lines", 5),
    Target("run/config.yaml", "report {home}/run --out {out}/x.html", "yaml", 5),
    Target("run/env.json", "report {home}/run --out {out}/x.html", weight=5),
    Target("mine.json", "evaluate --compare {home}/mine.json {home}/other.json", weight=20),
    Target("set/metas/clip_1.txt", "check data {home}/set --threads 1", "text"),
    Target("set/videos/clip_1.mp4", "check data {home}/set --threads 1", "bytes", 15),
    Target("set/t5_xxl/clip_1.pickle", "check data {home}/set --threads 1", "bytes"),
    Target("set/videos/clip_1.mp4", "prepare controls {home}/set --type edge", "bytes", 5),
    Target("set/edge/.made.jsonl", "prepare controls {home}/set --type edge", "lines"),
    Target("set/metas/clip_1.txt", "prepare shards {home}/set --out {out}/shards", "text"),
    Target("shards/index.json", "prepare shards {home}/set --out {home}/shards"),
    Target("pictures/images/clip_1.png", "check data {home}/pictures --threads 1", "bytes", 15),
    Target("arrays/noise/clip_1.npy", "check data {home}/arrays --threads 1", "bytes"),
    Target("arrays/latents/clip_1.safetensors", "check data {home}/arrays --threads 1", "bytes", 15),
    Target("fastgen/000001/latent.pth", "check data {home}/fastgen --threads 1", "bytes", 15),
    Target("prompts.jsonl", _GENERATE + " --prompts {home}/prompts.jsonl", "lines", 20, is_deep=True),
    Target("spec.json", _GENERATE + " -i {home}/spec.json", weight=20, is_deep=True),
    Target("run/student.json", _GENERATE + " --prompt x", weight=10, is_deep=True),
    Target("weights.pt", _CONVERT, "bytes", 20),
    Target("old.pt", "convert {home}/old.pt {out}/x.safetensors", "bytes", 10),
    Target("weights.safetensors", "convert {home}/weights.safetensors {out}/x.pt", "bytes", 10),
    Target("parts/model.safetensors.index.json", "convert {home}/parts {out}/x.pt"),
    Target("teacher/model_index.json", "generate {home}/teacher --prompt x --out {out} --num-steps 1", is_deep=True),
    Target("teacher/transformer/config.json", "generate {home}/teacher --prompt x --out {out} --num-steps 1", is_deep=True),
    Target("run/config.yaml", "train {home}/run/config.yaml --dryrun", "yaml", 10),
    Target("run/config.yaml", "plan {home}/run/config.yaml", "yaml", 5),
)


@dataclass(frozen=True)
class Reader:
    """A file, and what reads it."""

    file: str
    read: Callable[[Path], object]
    kind: str = "json"


def _tensors(file: Path) -> object:
    from fewstep.networks.files.tensor_files import open_tensors

    return [stored.read() for stored in open_tensors(file).tensors.values()]


def _checkpoint(file: Path) -> object:
    from fewstep.networks.files.distributed import open_distributed

    return [stored.read() for stored in open_distributed(file.parent).values()]


def _run(file: Path) -> object:
    from fewstep.config import check, from_yaml
    from fewstep.training.run import Run

    return check(from_yaml(Run, file))


def _card(file: Path) -> object:
    from fewstep.inference.card import StudentCard

    return StudentCard.read(file.parent, "Export it again").spec()


def _progress(file: Path) -> object:
    from fewstep.training.checkpoint import read_progress

    return read_progress(file.parent)


def _pointer(file: Path) -> object:
    from fewstep.networks.files.checkpoints import newest_in

    newest = newest_in(file.parent)
    assert newest is not None and newest.parent == file.parent
    return newest


def _array(file: Path) -> object:
    from fewstep.data.files import arrays

    return arrays.read(file)


def _cache(file: Path) -> object:
    from fewstep.data.files import cache

    return cache.read(file).tensors


def _video(file: Path) -> object:
    from fewstep.data.files import video

    return video.probe(file), [frame.shape for frame in video.stream(file, (8, 8))]


def _masks(file: Path) -> object:
    from fewstep.data.files import masks

    whole = masks.read(file)
    return [mask.frames([0, mask.shape[0] - 1]) for mask in whole if mask.shape[1] * mask.shape[2] < 1e7]


def _keypoints(file: Path) -> object:
    from fewstep.data.files import keypoints

    return keypoints.draw(keypoints.read(file, range(3)), 24, 32)


def _noise(file: Path) -> object:
    from fewstep.data.folder import parts

    return parts.noise(file)


def _stage(file: Path) -> object:
    from fewstep.distill.stages import Stage, claim

    return claim([Stage.of("text", "captions become embeddings", ("fewstep", "prepare", "text"))], file.parent.parent)


def _gate(file: Path) -> object:
    from fewstep.evaluation.verdict import table, verdicts

    other = file.with_name("other.json")
    return [str(one) for one in verdicts(file, other)], table({"a": file, "b": other}, {"a": "a", "b": "b"})


def _times(file: Path) -> object:
    from fewstep.data.folder.dataset import _recorded_times  # pyright: ignore[reportPrivateUsage]  # of pairs for FastGen

    return _recorded_times(file.parent)


def _clip(file: Path) -> object:
    from fewstep.inference.generate import _is_done  # pyright: ignore[reportPrivateUsage]  # whether a clip is to be made

    return _is_done(file.parent, file.stem, {"seed": 3})


def _caption(file: Path) -> object:
    from fewstep.data.folder.samples import read_caption

    return read_caption(file)


def _shards(file: Path) -> object:
    from fewstep.data.shards import Shards

    return len(Shards(str(file.parent), num_frames=5).open())


def _command(option: str) -> Callable[[Path], object]:
    def read(file: Path) -> object:
        from fewstep.inference.command import read_command

        return read_command(["model", option, str(file)], lambda text: None)

    return read


def _compared(file: Path) -> object:
    from fewstep.evaluation.compare import compare, table

    rows = compare([file, file.with_name("other.json")])
    return table(rows)


def _curves(file: Path) -> object:
    from fewstep.evaluation.report.curves import curves_of

    return curves_of(file.parent)


def _metrics(file: Path) -> object:
    from fewstep.training.log import _records  # pyright: ignore[reportPrivateUsage]  # what a resume reads

    return _records(file, 3)


def _ledger(file: Path) -> object:
    from fewstep.prepare.ledger import open_ledger

    with open_ledger(file, {}, lambda name: file.with_name(name)) as ledger:
        return ledger.state("clip_1", "x")


def _teacher(file: Path) -> object:
    from fewstep.networks.weights.folders import spec_of

    place = file.parent if file.name == "model_index.json" else file.parent.parent
    return spec_of(str(place))


def _codec(file: Path) -> object:
    from fewstep.networks.encoders.codecs import form_of

    return form_of(file.parent)


def _words(file: Path) -> object:
    from fewstep.networks.encoders.text import text_form

    return text_form(file.parent)


READERS = (
    *[Reader(f"{_CHECKPOINT}/.metadata", _checkpoint, "bytes")] * 3,
    *[Reader(f"{_CHECKPOINT}/__0_0.distcp", _checkpoint, "bytes")] * 2,
    *[Reader("run/config.yaml", _run, "yaml")] * 3,
    *[Reader("run/student.json", _card)] * 3,
    *[Reader(file, _tensors, "bytes") for file in ("weights.pt", "weights.pt", "old.pt", "weights.safetensors")],
    *[Reader("arrays/latents/clip_1.safetensors", _cache, "bytes"), Reader("arrays/noise/clip_1.npy", _array, "bytes")] * 2,
    *[Reader("set/t5_xxl/clip_1.pickle", _array, "bytes"), Reader("fastgen/000001/latent.pth", _array, "bytes")] * 2,
    *[Reader("set/videos/clip_1.mp4", _video, "bytes"), Reader("pictures/images/clip_1.png", _video, "bytes")] * 2,
    *[Reader("shards/index.json", _shards), Reader("shards/000000.json", _shards)] * 2,
    *[Reader("prompts.jsonl", _command("--prompts"), "lines"), Reader("spec.json", _command("-i"))] * 2,
    *[Reader("mine.json", _compared), Reader("teacher/transformer/config.json", _teacher)] * 2,
    Reader("spec.json", _command("--controlnet_specs")),
    Reader("teacher/model_index.json", _teacher),
    Reader("vae/config.json", _codec),
    Reader("text_encoder/config.json", _words),
    Reader("parts/model.safetensors.index.json", lambda file: _tensors(file.parent)),
    Reader("run/metrics.jsonl", _curves, "lines"),
    Reader("run/metrics.jsonl", _metrics, "lines"),
    Reader("run/config.yaml", _curves, "yaml"),
    Reader(f"{_CHECKPOINT}/trainer.json", _progress),
    Reader("run/checkpoints/latest_checkpoint.txt", _pointer, "text"),
    Reader("set/edge/.made.jsonl", _ledger, "lines"),
    Reader("set/metas/clip_1.txt", _caption, "text"),
    *[Reader("records/stages/text.json", _stage), Reader("mine.json", _gate), Reader("records/pairs.json", _times)],
    Reader("records/clip.json", _clip),
    *[Reader("controls/masks.pickle", _masks, "bytes"), Reader("controls/keypoints.pickle", _keypoints, "bytes")] * 2,
    *[Reader("controls/noise.pickle", _noise, "bytes"), Reader("controls/plain.pickle", _noise, "bytes")] * 2,
)


def build(home: Path) -> None:
    """Writes the folder. It takes some seconds: a tiny run is trained."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from fewstep.cli import main
    from fewstep.data.files import cache, masks, video
    from fewstep.files import write_json

    def run(command: str) -> None:
        assert main(command.split()) == 0, command

    os.environ["OUTPUT_ROOT"] = str(home.parent)
    rng = np.random.default_rng(0)
    for number in range(3):
        name = f"clip_{number}"
        frames = rng.integers(0, 255, (9, *SIZE, 3), dtype=np.uint8)
        video.write(home / "set/videos" / f"{name}.mp4", frames, 8.0, "lossless")
        for folder in ("set/metas", "set/t5_xxl", "pictures/images", "arrays/noise", f"fastgen/00000{number}"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        (home / "set/metas" / f"{name}.txt").write_text(f"a clip of noise, number {number}")
        (home / "set/t5_xxl" / f"{name}.pickle").write_bytes(pickle.dumps([rng.normal(size=(4, 8)).astype(np.float16)]))
        Image.fromarray(frames[0]).save(home / "pictures/images" / f"{name}.png")
        latents = torch.randn(4, 3, 2, 2)
        np.save(home / "arrays/noise" / f"{name}.npy", latents.numpy())
        cache.write(home / "arrays/latents" / f"{name}.safetensors", {"latents": latents}, made_from={"codec": "x"})
        torch.save(latents, home / f"fastgen/00000{number}/latent.pth")
        (home / f"fastgen/00000{number}/prompt.txt").write_text("a clip")
    (home / "controls").mkdir()
    ball = np.zeros((5, 12, 12), bool)
    ball[1:4, 3:9, 2:7] = True
    masks.write(home / "controls/masks.pickle", [("ball", ball), ("none", np.zeros_like(ball)), ("all", ~np.zeros_like(ball))])
    body = rng.random((133, 3)).astype(np.float32)
    people = {n: [{"body-keypoints": body, "hand-keypoints": body[91:]}] * (n % 2) for n in range(3)}
    plain = {"a": [1, 2.5, "text", b"bytes", None, True, (1, {2})], 3: np.arange(5)}
    for name, value, protocol in (
        ("keypoints", people, 4),
        ("noise", rng.normal(size=(4, 3, 8, 8)).astype(np.float32), 2),
        ("plain", plain, 0),
    ):
        (home / f"controls/{name}.pickle").write_bytes(pickle.dumps(value, protocol=protocol))
    write_json(home / "records/stages/text.json", {"name": "text", "commands": ["fewstep prepare text"], "seconds": 1.5})
    write_json(home / "records/pairs.json", {"path_times": [1.0, 0.5], "seed": 0})
    write_json(home / "records/clip.json", {"made": {"seed": 3, "size": [16, 24]}, "prompt": "x"})
    (home / "records/clip.mp4").touch()
    run(f"prepare shards {home}/set --out {home}/shards")
    run(f"prepare controls {home}/set --type edge")
    run(
        "train experiment=analytic_kd job.project=case job.group=home job.name=run trainer.max_iter=4 trainer.batch_size=8 "
        "data.num=16 "
        "checkpoint.save_iter=2 checkpoint.keep_last=2 trainer.log_every=1 optim.warmup_iters=1 preview=none"
    )
    shutil.move(home.parent / "case/home/run", home / "run")  # where a copy of it is resumed
    weights = {"net.a.weight": torch.arange(6.0).reshape(2, 3), "net.b.bias": torch.ones(4)}
    torch.save(weights, home / "weights.pt")
    torch.save({"model": weights, "iteration": 3}, home / "old.pt", _use_new_zipfile_serialization=False)
    save_file(weights, home / "weights.safetensors")
    (home / "parts").mkdir()
    for number, (name, tensor) in enumerate(weights.items(), 1):
        save_file({name: tensor}, home / f"parts/model-0000{number}-of-00002.safetensors")
    write_json(
        home / "parts/model.safetensors.index.json",
        {"metadata": {}, "weight_map": {name: f"model-0000{n}-of-00002.safetensors" for n, name in enumerate(weights, 1)}},
    )
    write_json(
        home / "teacher/model_index.json", {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    )
    write_json(
        home / "teacher/transformer/config.json", {"_class_name": "WanTransformer3DModel", "num_layers": 1, "in_channels": 4}
    )
    sizes = {"z_dim": 4, "temperal_downsample": [True, False], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    write_json(home / "vae/config.json", {"_class_name": "AutoencoderKLWan"} | sizes)
    words = {"model_type": "fewstep_words", "words": ["a", "ball"], "dim": 8, "num_layers": 1, "num_heads": 2, "max_tokens": 4}
    write_json(home / "text_encoder/config.json", words)
    names = ("frechet", "recall")
    scores = {
        "what": "student",
        "num_calls": 4,
        "legend": [{"name": n, "title": n, "meaning": "m", "better": "lower", "is_headline": True} for n in names],
        "scores": {n: {"value": 1.5, "spread": 0.25, "num": 8, "draws": [1.0, 2.0, 1.5]} for n in names},
        "sets": [{"per_clip": {"recall": [0.5, 0.25]}, "num": 2, "scores": {"frechet": 1.0}}],
        "protocol": {"num": 8, "frames_height_width": [[9, 16, 24]]},
        "notes": [],
    }
    for name in ("mine", "other"):
        write_json(home / f"{name}.json", scores)
    (home / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"row {n}", "seed": n, "name": f"r{n}"}) + "\n" for n in range(3))
    )
    write_json(
        home / "spec.json", {"name": "x", "prompt": "a ball", "seed": 3, "num_steps": 1, "edge": {"control_weight": 1.0}}
    )
    (home / "bad.yaml").write_text("trainer: [")
    (home / "evil.py").write_text("open('ran', 'w').close()\n")
    os.mkfifo(home / "fifo")
    os.mkfifo(home / "fifo.yaml")
    (home / "link").symlink_to("/etc/passwd")
