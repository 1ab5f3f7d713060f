"""Control fidelity: how well clips keep the control signals they were conditioned on (`--control edge,vis,..`).

    edge      F1 of edge pixels: Canny of the clip against the edges it was conditioned on
    vis       SSIM of the clip's blur and the blur it was conditioned on
    depth     scale-invariant RMSE of two depth videos; the clips' own must be beside them (`fewstep prepare controls`)
    seg       mean IoU of matched objects; the clips' own masks must be beside them
    keypoint  mean distance of matched keypoints; the clips' own must be beside them

A control of the user's own that has `fidelity(clip, signal) -> float`, 0 to 1, is scored as NAME_fidelity. The measures are
those of control.py, which has their sources and their limits for small clips.

A raw score says little: at 32 x 32 an unrelated clip keeps .4 of the edges. So three anchors stand beside it, of the same
signals: a clip that equals the signal's own measurement (the best there is), the real clip measured anew (what the annotator
and the files lose), and an unrelated clip (chance).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from fewstep.config import choices, kind
from fewstep.data.controls import Control, Pixels, Span, Strength, made_of
from fewstep.data.files import keypoints, masks, video
from fewstep.errors import UserError
from fewstep.evaluation.control import depth_rmse, edge_scores, keypoint_scores, match_masks, ssim
from fewstep.evaluation.score import Clip, ClipSet, Need, Record, Score, Scorer, mean_over_clips

OF_FILES = ("depth", "seg", "keypoint")  # not to be had from pixels alone: the clips' own are files beside them


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
class ControlFidelity(Scorer):
    """How well clips keep the edges, blur, depth and objects they were conditioned on."""

    preset: Strength = "medium"  # of edge and vis, with which the signals were made
    tolerance: int = 0  # pixels by which an edge may be misplaced; published scores use 0

    needs: ClassVar[frozenset[Need]] = frozenset({"controls"})

    @property
    def legend(self) -> Sequence[Score]:
        others = [cls for cls in choices("control").values() if issubclass(cls, Comparable)]
        return (*LEGEND, *(_legend_of(cls) for cls in others))

    def score(self, samples: ClipSet, reference: Any) -> Record:
        columns: dict[str, list[float]] = {}
        anchors: dict[str, dict[str, list[float]]] = {SAME: {}, ANNOTATED: {}, UNRELATED: {}}
        notes: list[str] = []
        measures = {name: self._measure(name, signals.control) for name, signals in samples.controls.items()}
        notes += [f"{name}: there is no measure of its fidelity." for name, measure in measures.items() if measure is None]
        num = len(samples.clips)
        scored = dict.fromkeys(measures, 0)
        for place in range(num):
            clip = samples.clips[place]
            source = samples.sources[place] if samples.sources else None
            real = None if source is None else video.read(source, count=len(clip)).frames
            for name, measure in measures.items():
                signals = samples.controls[name]
                target, own = signals.conditioned[place], signals.measured[place]
                if measure is None or target is None or (own is None and name in OF_FILES):
                    continue
                scored[name] += 1
                _add(columns, measure(clip, target, own), place)
                _add(anchors[SAME], measure(clip, target, target) if name in OF_FILES else _best(name), place)
                if real is not None and name not in OF_FILES:
                    _add(anchors[ANNOTATED], measure(real, target, None), place)
                if (other := signals.conditioned[(place + max(1, num // 2)) % num]) is not None and num > 1:
                    _add(anchors[UNRELATED], measure(clip, other, own), place)
        for name, count in scored.items():
            if count < num and measures[name] is not None:
                advice = f"; measure theirs with: fewstep prepare controls DIR --type {name}" if name in OF_FILES else ""
                notes.append(f"{name}: {num - count} of {num} clips have no file to compare{advice}.")
        if not columns:
            raise UserError("; ".join(notes) or "no control was found to score")
        scores = {name: mean_over_clips(values) for name, values in columns.items()}
        known = {title: {n: mean_over_clips(values) for n, values in one.items()} for title, one in anchors.items() if one}
        per_clip = {name: values + [math.nan] * (num - len(values)) for name, values in columns.items()}
        return Record(f"control fidelity, preset {self.preset}", scores, 0, tuple(notes), known, per_clip)

    def _measure(self, name: str, control: Control) -> Callable[[Clip, Path, Path | None], dict[str, float]] | None:
        """What computes the scores of a clip from the file it was conditioned on and, where needed, its own."""
        if isinstance(control, Comparable):
            return lambda clip, target, _: {f"{name}_fidelity": control.fidelity(clip, _read(control, target, clip))}
        if is_dataclass(control) and "preset" in {field.name for field in fields(control)}:
            control = replace(control, preset=self.preset)

        def edge(clip: Clip, target: Path, _: Path | None) -> dict[str, float]:
            signal = _read(control, target, clip)[..., 0] > 127
            if not signal.any():
                return {}  # no edge to keep
            overlap = edge_scores(made_of(control, clip, 0)[..., 0], 255 * signal.astype(np.uint8), self.tolerance)
            return {"edge_f1": overlap.f1, "edge_recall": overlap.recall}

        def vis(clip: Clip, target: Path, _: Path | None) -> dict[str, float]:
            return {"vis_ssim": ssim(made_of(control, clip, 0), _read(control, target, clip))}

        def depth(clip: Clip, target: Path, own: Path | None) -> dict[str, float]:
            assert own is not None
            depths, signal = (_read(control, path, clip)[..., 0] / 255 for path in (own, target))
            return {"depth_rmse": depth_rmse(depths, signal)}

        def seg(clip: Clip, target: Path, own: Path | None) -> dict[str, float]:
            assert own is not None
            objects = _objects(target, clip)
            if not objects:
                return {}
            match = match_masks(_objects(own, clip), objects)
            return {"seg_iou": match.mean_iou, "seg_recall": match.recall}

        def keypoint(clip: Clip, target: Path, own: Path | None) -> dict[str, float]:
            assert own is not None
            figures, wanted = (
                [[f.points for f in frame] for frame in keypoints.read(p, range(len(clip)))] for p in (own, target)
            )
            if not any((figure[:, 2] >= 0.6).any() for frame in wanted for figure in frame):
                return {}
            found = keypoint_scores(figures, wanted, (clip.shape[1], clip.shape[2]))
            return {"keypoint_distance": found.distance, "keypoint_pck": found.within}

        return {"edge": edge, "vis": vis, "depth": depth, "seg": seg, "keypoint": keypoint}.get(name)


def _best(name: str) -> dict[str, float]:
    """What a clip gets whose own signal is the one it was conditioned on."""
    return {"edge": {"edge_f1": 1.0, "edge_recall": 1.0}, "vis": {"vis_ssim": 1.0}}.get(name, {f"{name}_fidelity": 1.0})


def _add(columns: dict[str, list[float]], scores: Mapping[str, float], place: int) -> None:
    """Puts the scores of a clip at its place; clips without one have nan."""
    for name, value in scores.items():
        column = columns.setdefault(name, [])
        column += [math.nan] * (place - len(column))
        column.append(value)


def _legend_of(control: Any) -> Score:  # Any: a class that @kind registered
    meaning = (control.__doc__ or "").strip().partition("\n")[0]
    return Score(f"{control.folder}_fidelity", f"{control.folder} fidelity", meaning, "higher", True)


def _read(control: Any, path: Path, clip: Clip) -> Pixels:  # Any: a Control, also one that is Comparable
    """The signal in a file, as many frames as the clip has, at the clip's size."""
    return control.read(path, Span(0, len(clip)), (clip.shape[1], clip.shape[2]))


def _figures(path: Path, clip: Clip) -> list[list[np.ndarray]]:
    """The keypoints of each figure, frame by frame, of as many frames as the clip has."""
    return [[figure.points for figure in frame] for frame in keypoints.read(path, range(len(clip)))]


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
