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
from fewstep.evaluation.measured import Divisible, Measured
from fewstep.evaluation.score import Clip, ClipSet, Need, Record, Score, Value, mean_over_clips

Measure = Callable[[Clip, Path, Path | None], dict[str, float]]  # of a clip, the file it was conditioned on, and its own
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
class ControlFidelity(Divisible):
    """How well clips keep the edges, blur, depth and objects they were conditioned on."""

    preset: Strength = "medium"  # of edge and vis, with which the signals were made
    vis: Strength | None = None  # of vis, where it is another: very_low in the toy world
    tolerance: int = 0  # pixels by which an edge may be misplaced; published scores use 0

    needs: ClassVar[frozenset[Need]] = frozenset({"controls"})

    @property
    def legend(self) -> Sequence[Score]:
        others = [cls for cls in choices("control").values() if issubclass(cls, Comparable)]
        return (*LEGEND, *(_legend_of(cls) for cls in others))

    def measured(self, samples: ClipSet, numbers: Sequence[int]) -> Measured:
        """Scores of each clip, and of its anchors as ANCHOR|SCORE."""
        measures = self._measures(samples)
        num = len(samples.clips)
        per_clip: dict[int, dict[str, float]] = {}
        for number in numbers:
            clip, row = samples.clips[number], dict[str, float]()
            source = samples.sources[number] if samples.sources else None
            real = None if source is None else video.read(source, count=len(clip)).frames
            for name, measure in measures.items():
                signals = samples.controls[name]
                target, own = signals.conditioned[number], signals.measured[number]
                if measure is None or target is None or (own is None and name in OF_FILES):
                    continue
                row |= measure(clip, target, own)
                row |= of_anchor(SAME, measure(clip, target, target) if name in OF_FILES else _best(name))
                if real is not None and name not in OF_FILES:
                    row |= of_anchor(ANNOTATED, measure(real, target, None))
                if (other := signals.conditioned[(number + max(1, num // 2)) % num]) is not None and num > 1:
                    row |= of_anchor(UNRELATED, measure(clip, other, own))
            per_clip[number] = row
        return Measured(per_clip=per_clip)

    def summary(self, measured: Measured, samples: ClipSet, reference: Any) -> Record:
        columns, anchors = split_anchors(measured.columns())
        if not columns:
            raise UserError("; ".join(self._notes(samples)) or "no control was found to score")
        scores = {name: mean_over_clips(values) for name, values in columns.items()}
        return Record(f"control fidelity, preset {self.preset}", scores, 0, self._notes(samples), anchors, columns)

    def _measures(self, samples: ClipSet) -> dict[str, Measure | None]:
        return {name: self._measure(name, signals.control) for name, signals in samples.controls.items()}

    def _notes(self, samples: ClipSet) -> tuple[str, ...]:
        """Which controls were not scored, and of how many clips."""
        out: list[str] = []
        num = len(samples.clips)
        for name, measure in self._measures(samples).items():
            if measure is None:
                out.append(f"{name}: there is no measure of its fidelity.")
                continue
            signals = samples.controls[name]
            pairs = zip(signals.conditioned, signals.measured, strict=True)
            count = sum(target is not None and (own is not None or name not in OF_FILES) for target, own in pairs)
            if count < num:
                advice = f"; measure theirs with: fewstep prepare controls DIR --type {name}" if name in OF_FILES else ""
                out.append(f"{name}: {num - count} of {num} clips have no file to compare{advice}.")
        return tuple(out)

    def _measure(self, name: str, control: Control) -> Measure | None:
        """What computes the scores of a clip from the file it was conditioned on and, where needed, its own."""
        if isinstance(control, Comparable):
            return lambda clip, target, _: {f"{name}_fidelity": control.fidelity(clip, _read(control, target, clip))}
        if is_dataclass(control) and "preset" in {field.name for field in fields(control)}:
            control = replace(control, preset=self.vis if name == "vis" and self.vis is not None else self.preset)

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


def _read(control: Any, path: Path, clip: Clip) -> Pixels:  # Any: a Control, also one that is Comparable
    """The signal in a file, as many frames as the clip has, at the clip's size."""
    return control.read(path, Span(0, len(clip)), (clip.shape[1], clip.shape[2]))


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
