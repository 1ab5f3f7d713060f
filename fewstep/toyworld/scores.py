"""Scores of sets of toy-world clips against real ones, each with its spread over clips and its n.

    real = reference(toyworld_clips)                            # once; kept on disk by its content if a folder is given
    record = score([made_0, made_1, made_2], prompts, real)     # one set of clips for each evaluation seed
    record.flat("teacher")["frechet_teacher_spread"]

What each score means is in docs/evaluation.md, with the table of anchors (real clips, damaged ones, collapsed ones) that

    python -m fewstep.toyworld.scores

prints: read a score beside those of real and of damaged clips.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.config import kind
from fewstep.data.files.video import Header
from fewstep.errors import UserError
from fewstep.evaluation.bootstrap import REAL, half_sampled, halves
from fewstep.evaluation.diversity import mean_pairwise_distance, vendi
from fewstep.evaluation.frechet import Remembered, frechet_distance, frechet_extrapolated
from fewstep.evaluation.mmd import mmd_of_subsets
from fewstep.evaluation.neighbours import num_zero_balls, of_subsets
from fewstep.evaluation.score import Clip, ClipSet, Need, Record, Score, Scorer, Value, mean_over_clips, over_sets
from fewstep.files import write_tensors
from fewstep.toyworld import clips, features, physics, probes, raycast
from fewstep.toyworld.features import Clips, FeatureNet, as_clips
from fewstep.toyworld.legend import LEGEND
from fewstep.toyworld.physics import Body, Scene, SceneError, World
from fewstep.untrusted.safe_tensors import read_safetensors
from fewstep.untrusted.text import digest_of

Source = Clips | Path | str
LEAST = 12  # clips of a set, made or real: half of them still have five neighbours each
_SCALES = (
    1.0,
    1.5,
    2.0,
    2.5,
)  # of the extrapolation; half of 512 clips, thinned 2.5 times, are still more than the 96 features
SEED_REFERENCE, SEED_ANCHORS = 7_200_000, 7_200_001  # series of clips of the table of anchors
_SHIFTS = range(1, 9)  # by which captions are moved to other clips for the chance level


@kind("toyworld", group="scorer")
@dataclass(frozen=True)
class ToyWorld(Scorer):
    """Clips of the toy world: features of a network trained on it, and probes of objects, motion and captions."""

    needs: ClassVar[frozenset[Need]] = frozenset({"real", "prompts"})
    min_clips: ClassVar[int] = LEAST

    @property
    def legend(self) -> Sequence[Score]:
        return LEGEND

    def suits(self, clip: Header, captions: Sequence[str]) -> bool:
        return (clip.num_frames, *clip.size) == features.shipped().size and bool(captions) and all(map(_is_readable, captions))

    def reference(self, real: Path | str | None, cache: Path | None = None) -> Reference:
        assert real is not None, "checked by `needs`"
        return reference(real, cache)

    def score(self, samples: ClipSet, reference: Reference) -> Record:
        return score(_stacked(samples.clips), samples.prompts, reference)

    def distance(self, samples: ClipSet, reference: Reference) -> float:
        return frechet_distance(features.features(torch.from_numpy(_stacked(samples.clips))), reference.features)


def _is_readable(caption: str) -> bool:
    """Whether a caption is in the language of the toy world."""
    try:
        probes.descriptions([caption])
    except UserError:
        return False
    return True


def _stacked(clips: Sequence[Clip]) -> NDArray[np.uint8]:
    clips = list(clips)
    shapes = sorted({clip.shape for clip in clips})
    if len(shapes) > 1:
        raise UserError(f"the clips have different sizes, {shapes[0]} and {shapes[-1]}; these scores compare clips of one size")
    return np.stack(clips)


@dataclass(frozen=True)
class Reference:
    """Statistics of the real clips."""

    features: Tensor  # n 96
    random_features: Tensor  # n 96, of the untrained witness
    pull_px: Tensor  # of each free flight, px/frame^2


def reference(source: Source, cache: Path | None = None, net: FeatureNet | None = None) -> Reference:
    """Statistics of the real clips. 2048 clips take some 15 s, or nothing if the folder `cache` has them.

    The name in the cache is a hash of the pictures or files, of the number of frames and their size, of both networks, and of
    the code that reads them: if any of these changes, an old file is not used.
    """
    net = features.shipped() if net is None else net
    if cache is None:
        return _reference(read_clips(source, net.size[0]), net)
    path = Path(cache) / f"toyworld-{content_hash(source, net)}.safetensors"
    if path.is_file():
        with suppress(UserError, TypeError):  # damaged: it is made again
            return Reference(**read_safetensors(path, "")[0])
    stats = _reference(read_clips(source, net.size[0]), net)
    write_tensors(path, {f.name: getattr(stats, f.name) for f in fields(stats)})
    return stats


def _reference(clips: Tensor, net: FeatureNet) -> Reference:
    flights = probes.flights(probes.parse(clips))
    return Reference(*_features(clips, net), torch.from_numpy(flights.pull_px).float())


def _features(clips: Tensor, net: FeatureNet) -> tuple[Tensor, Tensor]:
    """Features by the network and by the untrained network, in one pass if they read the same size."""
    witness = features.random_net()
    if net.size != witness.size or net.mean.device != witness.mean.device:
        return features.features(clips, net), features.features(clips, witness)
    own, of_witness = features.features_by(clips, [net, witness])
    return own, of_witness


def content_hash(source: Source, net: FeatureNet | None = None) -> str:
    """sha256 of all that decides what is computed from `source`."""
    digest = hashlib.sha256()
    for own in (net, features.random_net()):
        digest.update(features.weights_hash(own).encode())  # frames and size are in it
    for file in (features.SHIPPED, Path(probes.__file__), Path(features.__file__), Path(__file__)):
        digest.update(file.read_bytes())
    if isinstance(source, (str, Path)):
        for file in video_files(source):
            digest.update(bytes.fromhex(digest_of(file)))
    else:
        clips = as_clips(source).cpu().contiguous()
        digest.update(repr(tuple(clips.shape)).encode() + clips.numpy().tobytes())
    return digest.hexdigest()[:32]


def read_clips(source: Source, num_frames: int = 17) -> Tensor:
    """Clips (B, T, H, W, 3) uint8: as they are, or the first `num_frames` frames of the mp4 files of a folder, by name.

    Write toy-world clips lossless: at 32 x 32 the halved chroma of an ordinary mp4 is itself a damage the scores see.
    """
    if not isinstance(source, (str, Path)):
        return as_clips(source)
    from fewstep.data.files.video import read

    clips = [read(file, count=num_frames).frames for file in video_files(source)]
    sizes = sorted({clip.shape[1:3] for clip in clips})
    if len(sizes) > 1:
        raise UserError(f"{source}: its videos have different sizes {sizes}; scores compare clips of one size.")
    return torch.from_numpy(np.stack(clips))


def video_files(folder: Path | str) -> list[Path]:
    """The mp4 files of a folder, or of the data set it is, in the order of their names."""
    from fewstep.evaluation.clips import clip_files

    files = list(clip_files(Path(folder)).values())
    if not files:
        raise UserError(f"{folder}: no mp4 files. Give a folder of them, or a data set with videos/")
    return files


def score(
    clip_sets: Source | Sequence[Source],
    prompts: Sequence[str],
    real: Reference | Source,
    *,
    groups: Clips | None = None,
    net: FeatureNet | None = None,
    draws: int = 20,
    cache: Path | None = None,
) -> Record:
    """Every score of `clip_sets`, one set of clips for the `prompts` or several (evaluation seeds), against `real` clips.

    `groups` (P, S, T, H, W, 3) are S seeds for each of P prompts; with them comes `seed_diversity`, to be divided by the
    teacher's. Precision, recall, density and coverage compare equal numbers of clips. 512 clips take 8 s on one core.
    """
    net = features.shipped() if net is None else net
    stats = real if isinstance(real, Reference) else reference(real, cache, net)
    sources = [clip_sets] if isinstance(clip_sets, (Tensor, np.ndarray, Path, str)) else list(clip_sets)
    sets = [read_clips(source, net.size[0]) for source in sources]
    wrong = [len(one) for one in sets if len(one) != len(prompts)]
    if wrong or not sets:
        raise UserError(f"{len(prompts)} prompts, but sets of {wrong} clips: give each set one clip for each prompt.")
    least = min(len(stats.features), *map(len, sets))
    if least < LEAST:
        raise UserError(f"{least} clips are too few to score: sets, and the real clips, need {LEAST} and better hundreds.")
    captions = probes.descriptions(prompts)
    notes: list[str] = []
    against = _Real(stats, draws)
    columns = [_scores_of(clips, captions, against, net, draws, seed, notes) for seed, clips in enumerate(sets)]
    scores = {name: over_sets([column[name] for column, _ in columns]) for name in columns[0][0]}
    if groups is not None:
        scores["seed_diversity"] = _seed_diversity(groups, net, draws)
    per_clip = {name: np.concatenate([each[name] for _, each in columns]).tolist() for name in columns[0][1]}
    return Record(features.name(net), scores, len(stats.features), tuple(dict.fromkeys(notes)), per_clip=per_clip)


class _Real:
    """The real clips, all of them and random halves, which every set is compared with."""

    def __init__(self, stats: Reference, draws: int) -> None:
        self.stats = stats
        self.halves = halves(len(stats.features), draws, REAL)
        self.features, self.random_features = (
            [Remembered(rows), *(Remembered(rows[half]) for half in self.halves)]
            for rows in (stats.features, stats.random_features)
        )


def _scores_of(
    clips: Tensor, captions: probes.Description, real: _Real, net: FeatureNet, draws: int, seed: int, notes: list[str]
) -> tuple[dict[str, Value], dict[str, probes.Floats]]:
    """The scores of one set, and those of each of its clips; `seed` thins it for extrapolation."""
    own, witness = _features(clips, net)
    stats = real.stats
    limit = frechet_extrapolated(own, real.features[0], scales=_SCALES, seed=seed)
    if not limit.is_determined:
        few = f"one in {max(_SCALES):g} of the {len(own)} clips, which are fewer than its {limit.full.dims} features"
        notes.append(f"frechet is undetermined: it also takes {few}.")
    copies = num_zero_balls(own)
    if copies:
        notes.append(f"{copies} clips have five exact copies: recall means nothing.")
    num = min(len(own), len(stats.features))
    same = stats.features[:num]

    subsets = [torch.arange(len(own)), *halves(len(own), draws)]

    def of_set(measure: Callable[[Tensor, Remembered], float], rows: Tensor, others: Sequence[Remembered]) -> Value:
        whole, *some = [measure(rows[subset], against) for subset, against in zip(subsets, others, strict=True)]
        return Value.of_draws(whole, some, len(rows))

    def extrapolated(rows: Tensor, against: Remembered) -> float:
        thinning = seed if len(rows) == len(own) else 0  # halves are thinned alike in every set
        return frechet_extrapolated(rows, against, scales=_SCALES, draws=4, seed=thinning).value

    out = {
        "frechet": of_set(extrapolated, own, real.features)._replace(value=limit.value),
        "frechet_plain": of_set(frechet_distance, own, real.features),
        "frechet_random_net": of_set(extrapolated, witness, real.random_features),
    }
    pairs = zip(subsets, [torch.arange(len(stats.features)), *real.halves], strict=True)
    whole, *some = mmd_of_subsets(own, stats.features, list(pairs))
    out["mmd"] = Value.of_draws(whole, some, len(own))
    picks = halves(num, 2 * draws)
    fractions, *parts = of_subsets(
        same, own[:num], [(torch.arange(num), torch.arange(num)), *zip(picks[1::2], picks[::2], strict=True)]
    )
    for name, value, column in zip(fractions._fields, fractions, np.transpose(parts).tolist(), strict=True):
        out[name] = Value.of_draws(value, column, num)
    out["vendi"] = half_sampled(vendi, own, draws=draws)
    probed, per_clip = _probed(probes.parse(clips), captions, stats, draws)
    return out | probed, per_clip


def _probed(
    parsed: probes.Parsed, captions: probes.Description, stats: Reference, draws: int
) -> tuple[dict[str, Value], dict[str, probes.Floats]]:
    """Means over clips and medians over flights, and the numbers of each clip."""
    num = len(parsed.present)
    colours = probes.colours_match(parsed, captions)
    both = parsed.present & captions.present
    flights = probes.flights(parsed)
    chance = np.mean([_adheres(parsed, captions.rows(np.roll(np.arange(num), shift))) for shift in _SHIFTS], axis=0)
    per_clip: dict[str, probes.Floats] = {
        "adherence": _adheres(parsed, captions).astype(np.float64),
        "adherence_colours": colours.astype(np.float64),
        "adherence_chance": chance,
        "count": (parsed.count == captions.present.sum(1)).astype(np.float64),
        "shape": probes.ratio((both & (parsed.is_box == captions.is_box)).sum(1), both.sum(1)),
        "direction": probes.sides_match(parsed, captions),
        "second_difference_px": probes.second_difference_px(parsed),
        "permanence": probes.permanence(parsed),
        "flights": np.bincount(flights.clip, minlength=num).astype(np.float64),
    }
    out = {name: mean_over_clips(values.tolist()) for name, values in per_clip.items()}
    real = float(stats.pull_px.median()) if len(stats.pull_px) else float("nan")
    for name, values in (("gravity", flights.gravity), ("gravity_ratio", flights.pull_px / real)):
        is_known = ~np.isnan(values)
        out[name] = _median_over_flights(flights.clip[is_known], values[is_known], num, draws)
    return out, per_clip


def _adheres(parsed: probes.Parsed, captions: probes.Description) -> NDArray[np.bool_]:
    return probes.colours_match(parsed, captions) & probes.shapes_match(parsed, captions)


def _median_over_flights(clip: NDArray[np.integer], values: probes.Floats, num: int, draws: int) -> Value:
    """The median over flights; halves are halves of the clips, since flights of a clip are not independent."""
    if len(values) < 4:
        return Value(float("nan"), float("nan"), len(values))

    def median(pick: Tensor) -> float:
        some = values[np.isin(clip, pick.numpy())]
        return float(np.median(some)) if len(some) else float("nan")

    return Value.of_draws(float(np.median(values)), [median(pick) for pick in halves(num, draws)], len(values))


def _seed_diversity(groups: Clips, net: FeatureNet, draws: int) -> Value:
    """Mean distance between features of one prompt's clips, over prompts."""
    tensor = groups if isinstance(groups, Tensor) else torch.from_numpy(groups)
    if tensor.ndim != 6 or tensor.shape[1] < 2:
        raise UserError(f"groups must be (prompts, seeds, T, H, W, 3) with two seeds or more, not {tuple(tensor.shape)}.")
    values = features.features(tensor.flatten(0, 1), net).unflatten(0, tensor.shape[:2])
    each = torch.tensor([mean_pairwise_distance(group) for group in values])
    spread = half_sampled(lambda some: float(some.mean()), each, draws=draws)
    return spread._replace(per_set=(spread.value,))


# ---- anchors: clips whose faults are known ---------------------------------------------------------------------------


class Anchor(NamedTuple):
    """Clips with a known fault, and the captions they should have followed."""

    name: str
    clips: NDArray[np.uint8]
    captions: list[str]


def anchors(world: World, seed: int, num: int) -> Iterator[Anchor]:
    """Real clips of the series `seed`, and the same with one fault each. Renders `num` clips seven times."""
    series = clips.clips(world, seed, range(num))
    real, captions = np.stack([clip.rgb for clip in series]), [clip.caption for clip in series]
    rng = np.random.Generator(np.random.Philox(key=seed))
    num_frames = world.num_frames
    pairs = np.arange(num_frames) ^ 1  # 1 0 3 2 ..., the last of an odd number stays
    yield Anchor("real", real, captions)
    yield Anchor("mild: blur .4, noise .01", damaged(real, 0.4, 0.01), captions)
    yield Anchor("blur .7", damaged(real, 0.7, 0.0), captions)
    yield Anchor("noise .03", damaged(real, 0.0, 0.03), captions)
    yield Anchor("heavy: blur 1.2, noise .1", damaged(real, 1.2, 0.1), captions)
    yield Anchor("adjacent frames swapped", real[:, np.where(pairs < num_frames, pairs, num_frames - 1)], captions)
    yield Anchor("frames shuffled", np.stack([clip[rng.permutation(num_frames)] for clip in real]), captions)
    yield Anchor("frozen", np.repeat(real[:, :1], num_frames, axis=1), captions)
    yield Anchor("time reversed", real[:, ::-1].copy(), captions)
    flicker = 1 + 0.1 * rng.uniform(-1, 1, (num, num_frames, 1, 1, 1))
    yield Anchor("flicker 10 %", np.clip(real * flicker, 0, 255).round().astype(np.uint8), captions)
    for factor in (0.25, 2.0):
        played = clips.clips(world, seed, range(num), gravity=factor * world.gravity)
        yield Anchor(f"gravity x{factor:g}", np.stack([clip.rgb for clip in played]), captions)
    for metres in (0.05, 0.2):
        yield Anchor(f"places jitter {metres:g} m", np.stack([_shaken(world, c.scene, metres, rng) for c in series]), captions)
    yield Anchor("mean of two clips", ((real.astype(np.uint16) + np.roll(real, 1, 0)) // 2).astype(np.uint8), captions)
    for num_scenes, metres in ((16, 0.15), (64, 0.05)):
        scenes = [series[n % num_scenes].scene for n in range(num)]
        again = [captions[n % num_scenes] for n in range(num)]
        rgb = np.stack([clips.render(world, jittered(world, scene, metres, rng)).rgb for scene in scenes])
        yield Anchor(f"{num_scenes} scenes, jitter {metres:g} m", rgb, again)


def damaged(clips: NDArray[np.uint8], blur_px: float, noise: float, seed: int = 0) -> NDArray[np.uint8]:
    """`clips` with a Gaussian blur of each frame and white noise of a deviation in 0..1."""
    import cv2

    rng = np.random.Generator(np.random.Philox(key=seed))
    out = clips.copy()
    for clip in out:
        for frame in clip:
            soft = cv2.GaussianBlur(frame, (0, 0), blur_px) if blur_px else frame
            frame[:] = np.clip(soft + rng.normal(0, 255 * noise, soft.shape), 0, 255).round()
    return out


def jittered(world: World, scene: Scene, metres: float, rng: np.random.Generator) -> Scene:
    """`scene` with its starts moved by `metres` and its speeds by as many m/s; what rests or flies straight still does.

    A collapsed model makes the same few scenes over and over, but never exact copies.
    """
    for attempt in range(50):
        shake = metres if attempt < 25 else 0.2 * metres  # objects that nearly touch leave little room
        bodies = tuple(_jittered(body, shake, rng) for body in scene.bodies)
        try:
            physics.simulate(world, replace(scene, bodies=bodies))
        except SceneError:
            continue
        return replace(scene, bodies=bodies)
    return scene


def _jittered(body: Body, metres: float, rng: np.random.Generator) -> Body:
    dx, dy, dvx, dvy = rng.normal(0, metres, 4)
    (x, y), (vx, vy) = body.position, body.velocity
    if body.on_floor:
        return replace(body, position=(x + dx, y), velocity=(vx + dvx * (vx != 0), vy))
    return replace(body, position=(x + dx, max(y + dy, body.size_m + 0.01)), velocity=(vx + dvx * (vx != 0), vy + dvy))


def _shaken(world: World, scene: Scene, metres: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The clip of `scene` with every object misplaced anew in every frame."""
    places = physics.simulate(world, scene).positions.copy()
    places[..., :2] += rng.normal(0, metres, places[..., :2].shape)
    places[..., 1] = np.maximum(places[..., 1], [body.size_m for body in scene.bodies])
    solids = [raycast.Solid(body.shape, body.size_m, physics.COLOURS[body.colour]) for body in scene.bodies]
    return raycast.render(world.stage, solids, places).rgb


def main(arguments: list[str]) -> None:
    """Prints the anchors' scores as a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.toyworld.scores", description=main.__doc__)
    parser.add_argument("--num", type=int, default=512)
    parser.add_argument("--reference", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    world = World()
    series = clips.stream(world, SEED_REFERENCE, range(options.reference))
    real = reference(np.stack([clip.rgb for clip in series]))
    for n, (name, rgb, captions) in enumerate(anchors(world, SEED_ANCHORS, options.num)):
        record = score(rgb, captions, real)
        if n == 0:
            print(f"{record.name}; {options.num} clips, {options.reference} reference clips")
            print("| clips | " + " | ".join(record.scores) + " |\n|---" + "|---" * len(record.scores) + "|")
        cells = [f"{s.value:.3g}" + (f" +- {s.spread:.1g}" if s.spread == s.spread else "") for s in record.scores.values()]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
