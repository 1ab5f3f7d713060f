"""The toy world as a data set on disk, in the folder layout of Cosmos-Transfer1.

    videos/clip_000000.mp4         lossless: 17 frames of 32 x 32 at 16 fps
    metas/clip_000000.txt          its caption
    edge|vis|depth/clip_000000.mp4 lossless; vis has the preset "very_low": the others blur 32 pixels to nothing
    seg/clip_000000.pickle         masks, in the layout of Cosmos-Transfer1
    keypoint/clip_000000.pickle    centres and corners, in a layout like that of its people
    t5_xxl/clip_000000.pickle      the caption, embedded
    toyworld.json                  the world, the seed, and what is in each clip

Grey of the depth video is linear in 1 / depth, from `near_m` (white) to `far_m` (black) of toyworld.json. Clips depend on
(world, seed, number) alone: a rerun adds what is missing, to the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.data.controls import Edge, Pixels, Vis
from fewstep.data.files import keypoints, masks, video
from fewstep.data.folder import layout
from fewstep.data.folder.layout import Layout, Part
from fewstep.errors import UserError
from fewstep.files import write_text
from fewstep.networks.encoders.text import open_text_encoder
from fewstep.prepare import text
from fewstep.progress import track
from fewstep.toyworld import captions, clips, physics, scenes
from fewstep.toyworld.physics import Event, Scene, World
from fewstep.toyworld.workers import spawned
from fewstep.untrusted.text import read_json

EDGE, VIS = Edge("medium"), Vis("very_low")
DEPTH, SEG, KEYPOINT = (
    layout.control(name, suffix) for name, suffix in (("depth", ".mp4"), ("seg", ".pickle"), ("keypoint", ".pickle"))
)
PARTS = (
    *(layout.VIDEOS, layout.CAPTIONS),
    *(layout.control(control.folder, control.suffix) for control in (EDGE, VIS)),
    *(DEPTH, SEG, KEYPOINT),
)  # of a clip
TEXT = layout.text("t5_xxl")
INDEX = "toyworld.json"

_Label = dict[str, Any]  # texts, numbers and lists of them, as json has them
_Labels = dict[int, _Label]
_Job = tuple[World, int, int, Layout, tuple[Part, ...]]


def write(
    out: Path,
    num: int,
    seed: int = 0,
    world: World = World(),  # noqa: B008  # frozen
    workers: int = 0,
    only: Iterable[str] | None = None,
    encoder: str | Path | None = None,
) -> int:
    """Writes those clips 0 .. num - 1 of the series `seed` that `out` lacks, and returns their number.

    `only` names the folders to write (videos, metas, edge ..); None: all of them. `encoder`, a folder or hub id, embeds the
    captions, unless `only` leaves them out; None: they are not embedded.

    `workers` processes render and write, or this one if 0. A folder that holds other clips is a UserError.
    """
    parts, embeds = _parts_of(only)
    opened = open_text_encoder(encoder) if embeds and encoder is not None else None  # before anything is rendered
    place, earlier = _claimed(out, num, seed, world)
    there = [place.files(part) for part in parts]
    todo = [index for index in range(num) if not all(stem_of(index) in files for files in there)]
    jobs = [(world, seed, index, place, parts) for index in todo]
    new = {label["index"]: label for label in track(_write_clips(jobs, workers), len(jobs), f"rendering {out}")}
    rest = {index: _label(world, seed, index) for index in range(num) if index not in earlier | new}
    labels = earlier | new | rest
    _write_index(out, num, seed, world, [labels[index] for index in range(num)])
    if opened is not None:
        text.write(out, opened, folder=TEXT.folder)
    return len(jobs)


def stem_of(index: int) -> str:
    return f"clip_{index:06d}"


def depth_range_m(world: World) -> tuple[float, float]:
    """Depths in metres of white and black in the depth video: the nearest floor in the picture, and the wall."""
    camera = world.camera
    floor = camera.y_m * camera.focal_px / (camera.height - camera.cy_px)
    return min(floor, world.lanes_m[0] - max(*world.sphere_sizes_m, *world.box_sizes_m)), world.stage.wall_z_m


# ---- parts of the above --------------------------------------------------------------------------------------------


def _parts_of(only: Iterable[str] | None) -> tuple[tuple[Part, ...], bool]:
    """The parts to write of each clip, and whether to embed captions; embedded captions are also written."""
    if only is None:
        return PARTS, True
    names, choices = set(only), [part.folder for part in (*PARTS, TEXT)]
    unknown = sorted(names - set(choices))
    if unknown or not names:
        raise UserError(f"--only: there is no {', '.join(unknown) or 'name in it'}; it takes {', '.join(choices)}")
    embeds = TEXT.folder in names
    return tuple(part for part in PARTS if part.folder in names or (embeds and part is layout.CAPTIONS)), embeds


@dataclass(frozen=True)
class _Index:
    """What is read of INDEX again."""

    num: int
    seed: int
    world: dict[str, Any]
    clips: list[dict[str, Any]]


def _claimed(out: Path, num: int, seed: int, world: World) -> tuple[Layout, _Labels]:
    """The folder, after marking it as this series' own, and the labels of the clips that it has already."""
    if num < 1:
        raise UserError(f"--num must be at least 1, not {num}")
    if seed < 0:
        raise UserError(f"--seed must not be negative, as {seed} is")
    path, num_before, labels = out / INDEX, 0, _Labels()
    if path.is_file():
        before = read_json(path, f"Remove {out} and prepare it again", _Index)
        num_before = before.num
        labels = {label["index"]: label for label in before.clips if isinstance(label.get("index"), int)}
        played = asdict(World()) | before.world  # a setting that its version did not have was at its default
        settings = _plain({"seed": seed, "world": asdict(world)})
        other = [key for key in settings if _plain({"seed": before.seed, "world": played})[key] != settings[key]]
        if other:
            raise UserError(f"{out}: holds clips of another {' and '.join(other)}. Choose another --out, or remove that folder")
        if num_before > num:
            raise UserError(f"{out}: was begun with --num {num_before}. Ask for at least as many, or choose another --out")
    elif out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise UserError(f"{out}: is not empty and has no {INDEX}. Choose a new folder for --out")
    if num_before < num:
        _write_index(out, num, seed, world, [])
    return Layout(out), labels


def _write_index(out: Path, num: int, seed: int, world: World, labels: list[_Label]) -> None:
    near, far = depth_range_m(world)
    content = {"format": 1, "num": num, "seed": seed, "world": asdict(world)}
    content |= {"depth": {"near_m": near, "far_m": far}, "edge": EDGE.preset, "vis": VIS.preset}
    clips = ",\n".join(f"  {json.dumps(label)}" for label in labels)
    write_text(out / INDEX, f'{json.dumps(content, indent=1)[:-2]},\n "clips": [\n{clips}\n ]\n}}\n')


def _label(world: World, seed: int, index: int) -> _Label:
    """The label of a clip, without rendering it: about 3 ms."""
    scene = scenes.specification(world, seed, index)
    path = physics.simulate(world, scene)
    return _label_of(index, scene, captions.caption(world, scene, path), path.events)


def _label_of(index: int, scene: Scene, caption: str, events: tuple[Event, ...]) -> _Label:
    label = {
        "stem": stem_of(index),
        "index": index,
        "caption": caption,
        "gravity": scene.gravity,
        "objects": [asdict(body) | {"motion": body.motion, "side": body.side} for body in scene.bodies],
        "events": [asdict(event) for event in events],
    }
    return _plain(label)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """The value as json returns it: tuples become lists."""
    return json.loads(json.dumps(value))


def _write_clips(jobs: list[_Job], workers: int) -> Iterator[_Label]:
    if workers <= 0 or len(jobs) < 2:
        yield from map(_write_clip, jobs)
        return
    with spawned(workers, _use_one_thread) as pool:
        try:
            yield from pool.map(_write_clip, jobs, chunksize=max(1, min(8, len(jobs) // (4 * workers))))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _use_one_thread() -> None:
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _write_clip(job: _Job) -> _Label:
    world, seed, index, place, parts = job
    clip = clips.clip(world, seed, index)
    stem, rgb = stem_of(index), clip.rgb
    phrases = [f"{body.colour} {body.shape}" for body in clip.scene.bodies]

    def film(part: Part, frames: Callable[[], np.ndarray]) -> None:
        if part in parts:
            video.write(place.file(part, stem), frames(), clip.fps, quality="lossless")

    film(layout.VIDEOS, lambda: rgb)
    for control in (EDGE, VIS):
        film(layout.control(control.folder, control.suffix), lambda control=control: control(rgb))
    film(DEPTH, lambda: grey_of_depth(clip.depth, *depth_range_m(world)))
    if SEG in parts:
        masks.write(place.file(SEG, stem), [(phrase, clip.segmentation == n + 1) for n, phrase in enumerate(phrases)])
    if KEYPOINT in parts:
        keypoints.write_objects(place.file(KEYPOINT, stem), phrases, clip.keypoints)
    if layout.CAPTIONS in parts:
        write_text(place.file(layout.CAPTIONS, stem), clip.caption + "\n")
    return _label_of(index, clip.scene, clip.caption, clip.events)


def grey_of_depth(depth: NDArray[np.floating], near: float, far: float) -> Pixels:
    """(T, H, W) metres to grey frames: 255 at `near`, 0 at `far`, linear in 1 / depth, as depth networks answer."""
    grey = 255 * (1 / np.clip(depth, near, far) - 1 / far) / (1 / near - 1 / far)
    return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=-1)


def depth_of_grey(frames: Pixels, near: float, far: float) -> NDArray[np.float64]:
    """(T, H, W) metres of what `grey_of_depth` gave; off by at most depth^2 (1 / near - 1 / far) / 510."""
    return 1 / (frames[..., 0] / 255 * (1 / near - 1 / far) + 1 / far)
