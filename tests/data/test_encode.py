"""Encoding while training reads: the bits of `prepare latents`, controls on the fly, a cache, and a run that resumes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep import TOY
from fewstep.cli import main as cli
from fewstep.data.controls import Edge, seed_of
from fewstep.data.files import video
from fewstep.data.folder.dataset import Folder
from fewstep.networks.encoders.codecs import Autoencoder, open_codec
from fewstep.prepare.controls import OfFrames
from fewstep.prepare.controls import write as write_controls
from fewstep.prepare.latents import write as write_latents

NUM, FRAMES = 3, 9
WINDOWS = {"num_frames": 5, "start_frame_interval": 4, "video_size": (24, 24), "resize": "crop"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("encode"), np.random.default_rng(0)
    for n in range(NUM):
        small = rng.integers(0, 255, (FRAMES, 4, 5, 3), dtype=np.uint8)
        video.write(root / "videos" / f"{n}.mp4", small.repeat(8, 1).repeat(8, 2), 24.0, quality="lossless")
    write_controls(root, OfFrames("edge", "random", "lossless"))
    return root


def encoding(root: Path, **more: Any) -> Folder:
    return Folder(str(root), **{"x0": "encode", "codec": str(TOY), "text": None, **WINDOWS, **more})


def all_of(data: Folder) -> tuple[torch.Tensor, torch.Tensor | None]:
    opened = data.open()
    batch = opened.batch(torch.arange(len(opened)))
    assert batch.x0 is not None
    return batch.x0, batch.cond.control.get("edge")


def test_the_bits_are_those_of_prepared_latents(clips: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(clips, tmp_path / "data"))
    edge = Edge("random")
    write_latents(Folder(str(root), text=None, control=edge, **WINDOWS), open_codec(TOY, scale=0.5))  # type: ignore[arg-type]
    prepared = all_of(Folder(str(root), x0="latents", text=None, control=edge))
    on_the_fly = all_of(encoding(root, control=edge, codec_scale=0.5))
    assert prepared[0].shape == (2 * NUM, 8, 2, 3, 3)
    assert torch.equal(prepared[0], on_the_fly[0])
    assert prepared[1] is not None and on_the_fly[1] is not None and torch.equal(prepared[1], on_the_fly[1])
    opened, like = encoding(root).open(), Folder(str(root), x0="latents", text=None).open()
    assert torch.equal(*(data.batch(torch.tensor([1])).cond.fps for data in (opened, like)))  # type: ignore[arg-type]


def test_a_control_is_computed_from_the_frames_of_the_window(clips: Path) -> None:
    _, control = all_of(encoding(clips, control=Edge("random"), control_from="video"))
    pixels = Folder(str(clips), text=None, **WINDOWS).open()  # type: ignore[arg-type]
    codec = open_codec(TOY)
    for row, sample in enumerate(pixels.samples):
        frames = ((pixels.batch(torch.tensor([row])).x0[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()  # type: ignore[index]
        edges = torch.from_numpy(Edge("random")(frames, seed_of(sample.stem, sample.span.start)))
        latents = codec.encode(edges.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)[0]
        assert control is not None and torch.equal(control[row], latents.half().float())


def test_a_cache_keeps_what_was_encoded(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(shutil.copytree(clips, tmp_path / "data"))
    data = encoding(root, control=Edge("low"), control_from="video", codec_cache=str(tmp_path / "cache"), ram_gib=0.0)
    first, calls = all_of(data), list[int]()
    encode = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, pixels: (calls.append(1), encode(self, pixels))[1])
    decoded = video.read
    monkeypatch.setattr("fewstep.data.folder.dataset.video.read", lambda *a, **k: pytest.fail("a clip was decoded"))
    again = all_of(data)
    assert not calls and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # type: ignore[arg-type]
    monkeypatch.setattr("fewstep.data.folder.dataset.video.read", decoded)
    other = all_of(replace(data, control=Edge("high")))  # the clips are those that were encoded, the control is not
    assert len(calls) == 2 * NUM and not torch.equal(other[1], first[1])  # type: ignore[arg-type]
    calls.clear()
    shutil.copy(root / "videos" / "1.mp4", root / "videos" / "0.mp4")  # another clip of that name
    changed = all_of(data)
    assert len(calls) == 4 and torch.equal(changed[0][2], first[0][2]) and not torch.equal(changed[0][0], first[0][0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec": None}, r"data\.codec: is none, but x0=encode needs one"),
        ({"pairs": ("noise",)}, r"data\.x0: is encode, but pairs have the latents"),
        ({"video_size": (20, 24)}, "both sides must be multiples of 8"),
        ({"num_frames": 4}, "4 frames do not fit; it takes 1 .* 5"),
    ],
)
def test_what_cannot_be_encoded_is_refused_when_the_data_are_opened(clips: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encoding(clips, **changes).open()


def test_a_control_network_trains_from_videos_and_captions_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The road of the originals, clips in and edges computed on the way, has the losses of the prepared road; and resumes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTPUT_ROOT", "out")
    assert cli(["prepare", "toyworld", "--out", "data", "--num", "4", "--workers", "0", "--only", "videos,metas"]) == 0
    assert cli(["prepare", "text", "data", "--encoder", str(TOY)]) == 0
    common = ["experiment=toy_edge", "data.dataset_dir=data", "trainer.batch_size=2", "trainer.log_every=1"]
    common += ["optim.warmup_iters=1", "checkpoint.save_iter=1"]
    on_the_fly = ["data.x0=encode", f"data.codec={TOY}", "data.control_from=video", "job.name=fly"]
    assert cli(["train", *common, *on_the_fly, "trainer.max_iter=1", "optim.schedule=constant"]) == 0
    assert cli(["train", *common, *on_the_fly, "trainer.max_iter=3", "optim.schedule=constant"]) == 0
    assert not (tmp_path / "data" / "edge").exists() and not (tmp_path / "data" / "latents").exists()
    assert cli(["prepare", "controls", "data", "--type", "edge"]) == 0
    assert cli(["prepare", "latents", "data", "--codec", str(TOY), "--control", "edge"]) == 0
    assert cli(["train", *common, "job.name=prepared", "trainer.max_iter=3", "optim.schedule=constant"]) == 0
    losses = [
        [
            {key: value for key, value in json.loads(line).items() if "denoising" in key}
            for line in (tmp_path / f"out/toyworld/basic/{name}/metrics.jsonl").read_text().splitlines()
        ]
        for name in ("fly", "prepared")
    ]
    assert len(losses[0]) == 3 and all(losses[0]) and losses[0] == losses[1]
