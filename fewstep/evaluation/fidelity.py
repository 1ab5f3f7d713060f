"""Control fidelity: how well clips keep the control signals they were conditioned on (`--control edge,vis,..`).

    edge      F1 of edge pixels: Canny of the clip against the edges it was conditioned on
    vis       SSIM of the clip's blur and the blur it was conditioned on
    depth     scale-invariant RMSE of two depth videos
    seg       mean IoU of matched objects
    keypoint  mean distance of matched keypoints

Depth, objects and keypoints of a clip come from the files beside it (`fewstep prepare controls`), or from an annotator
(annotators.py). A control of the user's own that has `fidelity(clip, signal) -> float`, 0 to 1, is scored as NAME_fidelity. The
measures are those of control.py, which has their sources and their limits for small clips.

A raw score says little: at 32 x 32 an unrelated clip keeps .4 of the edges. So three anchors stand beside it, of the same
signals: a clip that equals the signal's own measurement (the best there is), the real clip measured anew (what the annotator
and the files lose), and an unrelated clip (chance).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from fewstep.config import choices, kind
from fewstep.data.controls import Control, Edge, Pixels, Span, Strength, Vis, made_of
from fewstep.data.files import keypoints, masks, video
from fewstep.errors import UserError
from fewstep.evaluation.annotators import Annotator, AnyAnnotator, Figures, Masks, suitable
from fewstep.evaluation.control import depth_rmse, edge_scores, keypoint_scores, match_masks, ssim
from fewstep.evaluation.measured import Divisible, Measured
from fewstep.evaluation.score import Clip, ClipSet, Need, Record, Score, Value, mean_over_clips

OF_FILES = ("depth", "seg", "keypoint")  # of a clip they come from files beside it, or from an annotator


@runtime_checkable
class Comparable(Protocol):
    """A control that measures by itself how well a clip keeps its signal."""

    def fidelity(self, clip: Pixels, signal: Pixels) -> float:
        """0 to 1, of a clip and the signal it was conditioned on, both uint8 T H W 3."""
        ...


LEGEND = (
    Score("edge_f1", "Edge F1", "Overlap of the clip's Canny edges and those it was conditioned on.", "higher", True),
    Score("edge_recall", "Edge recall", "Share of the edges it was conditioned on that the clip has.", "higher"),
    Score("vis_ssim", "Blur SSIM", "Structural similarity of the clip's blur and that it was conditioned on.", "higher", True),
    Score("depth_rmse", "Depth RMSE", "Error of the clip's depth, up to a factor, in shares of the range.", "lower", True),
    Score("seg_iou", "Mean IoU", "Overlap of the clip's objects and those it was conditioned on, matched.", "higher", True),
    Score("seg_recall", "Object recall", "Share of the matched objects that overlap; read it beside mean IoU.", "higher"),
    Score("keypoint_distance", "Keypoint distance", "Mean error of keypoints, in shares of the diagonal.", "lower", True),
    Score("keypoint_pck", "Keypoints kept", "Share of the keypoints that are within .05 of the diagonal.", "higher"),
)
SAME, ANNOTATED, UNRELATED = "the signal itself", "the real clips, measured anew", "unrelated clips"


@kind("control", group="scorer")
@dataclass(frozen=True)
class ControlFidelity(Divisible):
    """How well clips keep the edges, blur, depth and objects they were conditioned on."""

    preset: Strength | None = None  # of edge and vis; none: the one with which the signals of the real clips were made
    tolerance: int = 0  # pixels by which an edge may be misplaced; published scores use 0
    annotators: tuple[AnyAnnotator, ...] = ()  # of depth, seg and keypoint; (): the registered ones that suit the clips

    needs: ClassVar[frozenset[Need]] = frozenset({"controls"})

    @property
    def legend(self) -> Sequence[Score]:
        others = [cls for cls in choices("control").values() if issubclass(cls, Comparable)]
        return (*LEGEND, *(_legend_of(cls) for cls in others))

    def measured(self, samples: ClipSet, numbers: Sequence[int]) -> Measured:
        """Scores of each clip, and of its anchors as ANCHOR|SCORE."""
        controls = self._controls(samples)
        per_clip: dict[int, dict[str, float]] = {}
        for number in numbers:
            clip, row = samples.clips[number], dict[str, float]()
            source = samples.sources[number] if samples.sources else None
            real = None if source is None else video.read(source, count=len(clip)).frames
            annotators = self.annotators or suitable(clip, samples.prompts[number] if samples.prompts else "")
            for name, control in controls.items():
                row |= self._of_control(name, control, samples, number, clip, real, annotators)
            per_clip[number] = row
        return Measured(per_clip=per_clip)

    def _of_control(
        self,
        name: str,
        control: Control,
        samples: ClipSet,
        number: int,
        clip: Clip,
        real: Clip | None,
        annotators: Sequence[Annotator],
    ) -> dict[str, float]:
        signals, num = samples.controls[name], len(samples.clips)
        path, file = signals.conditioned[number], signals.measured[number]
        if path is None:
            return {}
        own = _of_clip(name, control, clip, file, annotators)
        if own is None:
            return {}
        target, size = _of_file(name, control, path, clip), (clip.shape[1], clip.shape[2])
        scores = self._compared(name, control, own, target, size)
        row = scores | of_anchor(SAME, {score: _BEST.get(score, 1.0) for score in scores})
        again = None if real is None else _of_clip(name, control, real, None, annotators)
        if again is not None:
            row |= of_anchor(ANNOTATED, self._compared(name, control, again, target, size))
        other = signals.conditioned[(number + max(1, num // 2)) % num] if num > 1 else None
        if other is not None:
            with suppress(UserError):  # it has fewer frames
                row |= of_anchor(UNRELATED, self._compared(name, control, own, _of_file(name, control, other, clip), size))
        return row

    def summary(self, measured: Measured, samples: ClipSet, reference: Any) -> Record:
        columns, anchors = split_anchors(measured.columns())
        notes = _notes(samples, measured)
        if not columns:
            raise UserError("; ".join(notes) or "no control was found to score")
        scores = {name: mean_over_clips(values) for name, values in columns.items()}
        presets = ", ".join(f"{name} {c.preset}" for name, c in self._controls(samples).items() if isinstance(c, (Edge, Vis)))
        return Record(f"control fidelity ({presets})" if presets else "control fidelity", scores, 0, notes, anchors, columns)

    def _controls(self, samples: ClipSet) -> dict[str, Control]:
        """The controls by name, edge and vis with the preset of the files."""
        out: dict[str, Control] = {}
        for name, signals in samples.controls.items():
            control = signals.control
            if not _is_measured(name, control):
                continue
            if isinstance(control, (Edge, Vis)):
                pairs = zip(samples.sources or (), signals.conditioned, strict=False)
                pair = next(((real, file) for real, file in pairs if real is not None and file is not None), None)
                preset = self.preset or ("medium" if pair is None else _preset_of(control, *pair))
                control = replace(control, preset=preset)
            out[name] = control
        return out

    def _compared(self, name: str, control: Control, own: Any, target: Any, size: tuple[int, int]) -> dict[str, float]:
        """The scores of one signal, or of the clip itself, against the one it was conditioned on; none if that is empty."""
        if isinstance(control, Comparable):
            return {f"{name}_fidelity": control.fidelity(own, target)}
        if name == "edge":
            edges = 255 * (target[..., 0] > 127).astype(np.uint8)
            if not edges.any():
                return {}
            overlap = edge_scores(own[..., 0] > 127, edges, self.tolerance)
            return {"edge_f1": overlap.f1, "edge_recall": overlap.recall}
        if name == "vis":
            return {"vis_ssim": ssim(own, target)}
        if name == "depth":
            return {"depth_rmse": depth_rmse(own[..., 0] / 255, target[..., 0] / 255)}
        if name == "seg":
            match = match_masks(own, target) if target else None
            return {} if match is None else {"seg_iou": match.mean_iou, "seg_recall": match.recall}
        if not any((figure[:, 2] >= 0.6).any() for frame in target for figure in frame):
            return {}
        points = keypoint_scores(own, target, size)
        return {"keypoint_distance": points.distance, "keypoint_pck": points.within}


_BEST = {"depth_rmse": 0.0, "keypoint_distance": 0.0}  # of a signal against itself; 1 for all others


def of_anchor(title: str, scores: Mapping[str, float]) -> dict[str, float]:
    """Scores of one clip of a known kind, as they are kept beside its own."""
    return {f"{title}|{name}": value for name, value in scores.items()}


def split_anchors(columns: Mapping[str, list[float]]) -> tuple[dict[str, list[float]], dict[str, dict[str, Value]]]:
    """The scores of single clips, and the means of their anchors by what these are."""
    own = {name: values for name, values in columns.items() if "|" not in name}
    anchors: dict[str, dict[str, Value]] = {}
    for name in [name for name in columns if name not in own]:
        title, _, score = name.partition("|")
        anchors.setdefault(title, {})[score] = mean_over_clips(columns[name])
    return own, anchors


def _legend_of(control: Any) -> Score:  # Any: a class that @kind registered
    meaning = (control.__doc__ or "").strip().partition("\n")[0]
    return Score(f"{control.folder}_fidelity", f"{control.folder} fidelity", meaning, "higher", True)


def _is_measured(name: str, control: Control) -> bool:
    return name in ("edge", "vis", *OF_FILES) or isinstance(control, Comparable)


def _of_file(name: str, control: Control, path: Path, clip: Clip) -> Any:  # Any: pixels, masks or figures, by name
    """The signal in a file, as many frames as the clip has, at the clip's size."""
    if name == "seg":
        return _objects(path, clip)
    if name == "keypoint":
        return [[figure.points for figure in frame] for frame in keypoints.read(path, range(len(clip)))]
    return control.read(path, Span(0, len(clip)), (clip.shape[1], clip.shape[2]))


def _of_clip(
    name: str, control: Control, clip: Clip, file: Path | None, annotators: Sequence[Annotator]
) -> Any:  # Any: likewise
    """The signal of a clip: computed, from its own file, or measured; None where nothing measures it."""
    if isinstance(control, Comparable):
        return clip
    if name not in OF_FILES:
        return made_of(control, clip, 0)
    if file is not None:
        return _of_file(name, control, file, clip)
    for one in annotators:
        signal: Pixels | Masks | Figures | None = {"depth": one.depth, "seg": one.seg, "keypoint": one.keypoint}[name](clip)
        if signal is not None:
            return signal
    return None


_PRESETS: tuple[Strength, ...] = ("medium", "low", "very_low", "high", "very_high", "none")  # of equal ones the first is named


@functools.lru_cache(maxsize=64)
def _preset_of(control: Edge | Vis, real: Path, file: Path) -> Strength:
    """The preset with which the file was most likely made from the real clip, by the first frame."""
    frame = video.read(real, count=1).frames
    signal = control.read(file, Span(), (frame.shape[1], frame.shape[2])).astype(np.float64)
    errors: dict[Strength, float] = {}
    for preset in _PRESETS:
        with suppress(UserError):  # the frames are too small for it
            errors[preset] = float(np.abs(made_of(replace(control, preset=preset), frame, 0) - signal).mean())
    for preset, error in errors.items():
        if error == min(errors.values()):
            return preset
    return "medium"


def _notes(samples: ClipSet, measured: Measured) -> tuple[str, ...]:
    """Which controls were not scored, and of how many clips."""
    out: list[str] = []
    for name, signals in samples.controls.items():
        if not _is_measured(name, signals.control):
            out.append(f"{name}: there is no measure of its fidelity.")
            continue
        num, files = len(samples.clips), list(zip(signals.conditioned, signals.measured, strict=True))
        scored = {n for n, row in measured.per_clip.items() if any(key.startswith(f"{name}_") for key in row)}
        needs_file = name in OF_FILES and not any(files[n][1] is None for n in scored)  # no annotator measured it
        count = sum(target is not None and (own is not None or not needs_file) for target, own in files)
        if count < num:
            advice = f"; measure theirs with: fewstep prepare controls DIR --type {name}" if name in OF_FILES else ""
            out.append(f"{name}: {num - count} of {num} clips have no file to compare{advice}.")
    return tuple(out)


def _objects(path: Path, clip: Clip) -> list[tuple[str, np.ndarray]]:
    """The masks of a file by phrase, as many frames as the clip has, at the clip's size."""
    import cv2

    num, height, width, _ = clip.shape
    out: list[tuple[str, np.ndarray]] = []
    for mask in masks.read(path):
        tube = mask.frames(range(num)).astype(np.uint8)
        sized = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_NEAREST) for frame in tube]
        out.append((mask.phrase, np.stack(sized).astype(bool)))
    return [(phrase, tube) for phrase, tube in out if tube.any()]
