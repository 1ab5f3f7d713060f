"""Reads a data set once, from end to end, and lists everything that is wrong with it before a GPU is paid for.

    report = survey("datasets/robots")
    report.is_trainable, report.rows(), report.problems

Every file of every sample is read by the very readers that training uses, several samples at once. A problem is an error if the
data cannot be trained on as it is, and a warning if it can but a person should look at it. Pictures of the samples are in
sheet.py.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.config import apply_overrides, choices
from fewstep.data.controls import Span
from fewstep.data.files import keypoints, masks, packs, video
from fewstep.data.folder.dataset import Folder, layout, parts
from fewstep.data.folder.layout import Layout, Part
from fewstep.data.folder.samples import odd_ones, read_caption
from fewstep.errors import some
from fewstep.untrusted.text import digest_of

Level = Literal["error", "warning"]
Watch = Callable[[Iterable[Any], int, str], Iterable[Any]]  # shows how far a long loop is: fewstep.progress.track

_STILL = 8  # levels of 255; no pixel of the thumbnails changes by more
_ALIKE = 3  # levels of 255 in any cell; the same clip, encoded again
_MAX_COMPARED = 4000  # clips; each is compared with each
_CELLS = 8  # along each side of a fingerprint
_THUMB = 64  # px along the longer side of a thumbnail
_FEW_WORDS = 3  # a caption with fewer is worth a warning
_ENOUGH_CAPTIONS = 6  # clips, from which on equal captions are worth a warning


@dataclass(frozen=True)
class Sample:
    """The properties of one sample; None where it has no such file, or one that cannot be read."""

    stem: str
    num_frames: int | None = None
    size: tuple[int, int] | None = None  # height, width
    fps: float | None = None
    motion: float | None = None  # mean change of a thumbnail's pixel from frame to frame, in levels of 255
    caption: str | None = None
    num_tokens: Mapping[str, int] = field(default_factory=dict[str, int])  # by folder of embeddings
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])  # of arrays, by folder
    parts: tuple[str, ...] = ()  # folders it has a file in

    @property
    def num_words(self) -> int | None:
        return None if self.caption is None else len(self.caption.split())


@dataclass(frozen=True)
class Problem:
    """One kind of mistake, with all samples that have it."""

    level: Level
    kind: str  # for machines: missing-noise, unreadable-videos, ...
    message: str
    stems: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.level}: {self.message}"


@dataclass(frozen=True)
class Survey:
    root: Path
    form: str
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    facts: tuple[tuple[str, str], ...] = ()  # more rows of the table

    @property
    def is_trainable(self) -> bool:
        return bool(self.samples) and not any(problem.level == "error" for problem in self.problems)

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), as a table of a page shows it."""
        rows = [("samples", str(len(self.samples)))]
        for folder, num in sorted(Counter(part for sample in self.samples for part in sample.parts).items()):
            rows.append((f"with {folder}", str(num)))
        rows += _spread("frames", [s.num_frames for s in self.samples])
        rows += _commonest("size (height x width)", [f"{s.size[0]} x {s.size[1]}" for s in self.samples if s.size])
        rows += _commonest("fps", [f"{s.fps:g}" for s in self.samples if s.fps])
        seconds = [s.num_frames / s.fps for s in self.samples if s.num_frames and s.fps]
        rows += _spread("seconds", seconds)
        rows += [("seconds, all", f"{sum(seconds):.1f}")] if seconds else []
        rows += _spread("motion (levels per frame)", [s.motion for s in self.samples])
        rows += _spread("words of a caption", [s.num_words for s in self.samples])
        captions = {s.caption for s in self.samples if s.caption}
        rows += [("different captions", str(len(captions)))] if captions else []
        for folder in sorted({folder for s in self.samples for folder in s.num_tokens}):
            rows += _spread(f"tokens in {folder}", [s.num_tokens.get(folder) for s in self.samples])
        for folder in sorted({folder for s in self.samples for folder in s.shapes}):
            shapes = ["x".join(map(str, s.shapes[folder])) for s in self.samples if folder in s.shapes]
            rows += _commonest(f"shape of {folder}", shapes)
        for kind, name in (("duplicates", "duplicates"), ("still", "near-static clips")):
            rows.append((name, str(sum(len(p.stems) for p in self.problems if p.kind == kind))))
        return [*rows, *self.facts]

    def plain(self) -> dict[str, Any]:
        """The same for machines: what json holds."""
        return {
            "root": str(self.root),
            "form": self.form,
            "trainable": self.is_trainable,
            "table": dict(self.rows()),
            "problems": [asdict(problem) for problem in self.problems],
            "samples": [asdict(sample) | {"num_words": sample.num_words} for sample in self.samples],
        }


def with_settings(survey: Survey, overrides: Sequence[str]) -> Survey:
    """The survey, and whether the data set opens with these settings of a run: num_frames=17, data.pairs=[noise], ..."""
    if not overrides:
        return survey
    spec = apply_overrides(Folder(str(survey.root)), [word.removeprefix("data.") for word in overrides])
    try:
        data = spec.open()
    except ValueError as error:
        wrong = [Problem("error", "settings", line) for line in str(error).splitlines()]
        return replace(survey, problems=(*wrong, *survey.problems))
    return replace(survey, facts=(("samples with these settings", str(len(data))),))


def survey(root: str | os.PathLike[str], *, num_threads: int | None = None, watch: Watch | None = None) -> Survey:
    """Reads all samples of the folder. ValueError only if it is no data set at all; what is wrong in it is a `Problem`."""
    place = Layout.open(root)
    files = _files_of(place)
    stems = files.stems
    if not stems:
        empty = Problem("error", "empty", f"{place.root}: has no sample. Put clips into {layout.VIDEOS.folder}/")
        return Survey(place.root, place.form, (), (*(files.broken or (empty,)), *_unread(files)))
    threads = num_threads or min(os.cpu_count() or 1, 16)
    with ThreadPoolExecutor(threads) as pool:
        looks: Iterable[_Look] = pool.map(lambda stem: _look(files, stem), stems)
        looks = list(watch(looks, len(stems), f"reading {place.root}") if watch else looks)
    samples = tuple(look.sample for look in looks)
    return Survey(place.root, place.form, samples, tuple(_problems(files, looks)))


# ---- what there is to read -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """The files of a data set, by part and stem."""

    place: Layout
    lead: Part  # which files make a sample
    files: Mapping[str, Mapping[str, Path]]  # by folder of the part
    packed: Mapping[str, packs.Packs]
    rows: Mapping[str, Mapping[str, Sequence[int]]]  # of packs, by folder and stem
    texts: tuple[str, ...]  # folders of embeddings
    broken: tuple[Problem, ...] = ()

    @property
    def stems(self) -> list[str]:
        return list(self.rows.get(self.lead.folder) or self.files.get(self.lead.folder, {}))


def has_latents(folder: Path) -> bool:
    """Whether `prepare latents --into` wrote the folder."""
    try:
        return packs.has_packs(folder) and "part" in packs.open_packs(folder).made_from
    except ValueError:
        return False


def _control_parts() -> list[Part]:
    return [layout.control(cls.folder, cls.suffix) for cls in choices("control").values()]


def _files_of(place: Layout) -> _Files:
    controls, broken = _control_parts(), list[Problem]()
    all_parts = [layout.VIDEOS, layout.IMAGES, layout.CAPTIONS, layout.NOISE, layout.PATH, layout.LATENTS, *controls]
    all_parts += [layout.control_latents(part.folder) for part in controls]

    def files_of(part: Part) -> dict[str, Path]:
        try:
            return place.files(part)
        except ValueError as error:  # two files for one sample
            broken.append(Problem("error", f"ambiguous-{part.folder}", str(error)))
            return {}

    files = {part.folder: files_of(part) for part in all_parts}
    if files[layout.VIDEOS.folder] and files[layout.IMAGES.folder]:
        broken.append(
            Problem("error", "mixed", f"{place.root}: holds videos/ and images/; put them in a folder each (data=mix)")
        )
    others = ["txt_emb"]
    packed: dict[str, packs.Packs] = {}
    if place.form == "flat":
        folders = sorted(e.name for e in os.scandir(place.root) if e.is_dir() and not e.name.startswith("."))
        others = [name for name in folders if name not in files and not has_latents(place.root / name)]
        for name in folders:
            try:
                if packs.has_packs(place.root / name):
                    packed[name] = packs.open_packs(place.root / name)
            except ValueError as error:
                broken.append(Problem("error", f"unreadable-{name}", str(error)))
    rows = {name: pack.by_stem() for name, pack in packed.items()}
    leads = (layout.VIDEOS, layout.IMAGES, layout.LATENTS, layout.PATH)
    lead = next((part for part in leads if files[part.folder] or part.folder in rows), layout.VIDEOS)
    stems = set(rows.get(lead.folder) or files[lead.folder])
    texts: list[str] = []
    for name in others:
        paths = files_of(layout.text(name))
        if name in rows or stems & set(paths):  # a folder that shares no name with the clips is none of ours
            texts.append(name)
            files[name] = paths
    return _Files(place, lead, files, packed, rows, tuple(texts), tuple(broken))


# ---- one sample ------------------------------------------------------------------------------------------------------


@dataclass
class _Look:
    """The result of reading one sample."""

    sample: Sample
    wrong: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # kind, what is said
    content: str = ""  # hash of its clip's bytes
    print: NDArray[np.int16] | None = None  # its fingerprint
    change: float | None = None  # the largest of any pixel of the thumbnails, in levels of 255


@dataclass(frozen=True)
class _Own:
    """What one sample has, by folder: files, and rows of packs."""

    listing: _Files
    stem: str
    files: Mapping[str, Path]
    rows: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, listing: _Files, stem: str) -> _Own:
        files = {folder: paths[stem] for folder, paths in listing.files.items() if stem in paths}
        return cls(listing, stem, files, {folder: rows[stem] for folder, rows in listing.rows.items() if stem in rows})

    @property
    def folders(self) -> set[str]:
        return self.files.keys() | self.rows.keys()

    def path(self, name: str) -> Path:
        """Its file; of a row, the name that its file would have."""
        return self.files.get(name, self.listing.place.root / name / self.stem)

    def array(self, name: str) -> Tensor:
        """An array, from its pack or its file."""
        if name in self.rows:
            return self.listing.packed[name].read(self.rows[name][0])
        return parts.array(self.files[name])


def _look(listing: _Files, stem: str) -> _Look:
    """Reads all files of a sample; never raises for their content."""
    look, own = _Look(Sample(stem)), _Own.of(listing, stem)
    files = own.files
    facts: dict[str, Any] = {"parts": tuple(sorted(own.folders))}
    clip = files.get(layout.VIDEOS.folder) or files.get(layout.IMAGES.folder)
    header: video.Header | None = None
    if clip is not None:
        with _collected(look, f"unreadable-{listing.lead.folder}"):
            header = video.probe(clip)
            facts |= {"num_frames": header.num_frames, "size": header.size, "fps": header.fps or None}
            look.content = digest_of(clip)
            facts["motion"] = _watch_clip(look, clip, header)
    for part in _control_parts():
        if part.folder in files:
            with _collected(look, f"unreadable-{part.folder}"):
                _look_at_control(look, part, files[part.folder], header)
    if layout.CAPTIONS.folder in files:
        with _collected(look, "unreadable-metas"):
            facts["caption"] = read_caption(files[layout.CAPTIONS.folder])
    tokens, shapes = dict[str, int](), dict[str, tuple[int, ...]]()
    for name in [name for name in listing.texts if name in own.folders]:
        with _collected(look, f"unreadable-{name}"):
            array = own.array(name)
            num = max(len(array), 1) if array.ndim == 2 else 1
            tokens[name] = int(parts.padded(own.path(name), array, num).mask.sum())
            shapes[name] = (array.shape[-1],)
    shapes |= _look_at_pair(look, own, header)
    look.sample = Sample(stem, num_tokens=tokens, shapes=shapes, **facts)
    return look


def _look_at_control(look: _Look, part: Part, path: Path, header: video.Header | None) -> None:
    """Whether a control goes frame by frame with its clip."""
    if part.suffixes[0] == ".mp4":
        own = video.probe(path)
        for _ in video.stream(path, (16, 16)):  # every frame is decoded
            pass
        odd = [] if header is None else [f"{what} {ours}, its clip {its}" for what, ours, its in own.differences(header)]
        if odd:
            look.wrong.append((f"unlike-{part.folder}", f"{path.name} ({'; '.join(odd)})"))
        return
    num = 1 if header is None else header.num_frames
    if part.folder == "seg":
        segments = masks.read(path)
        if segments and header is not None and segments[0].shape[0] != num:
            look.wrong.append((f"unlike-{part.folder}", f"{path.name} (frames {segments[0].shape[0]}, its clip {num})"))
    elif part.folder == "keypoint":
        keypoints.read(path, range(num))
    else:  # a control of the user's own reads its own files
        for cls in choices("control").values():
            if getattr(cls, "folder", None) == part.folder and header is not None:
                cls().read(path, Span(0, num), header.size)


def _look_at_pair(look: _Look, own: _Own, header: video.Header | None) -> dict[str, tuple[int, ...]]:
    """Latents, noise and states: shapes that fit one another and the clip."""
    shapes, latents = dict[str, tuple[int, ...]](), None
    like: dict[str, Tensor] = {}
    if header is not None:
        like["frames"] = torch.empty((header.num_frames, *header.size, 3), device="meta")
    for name in (layout.LATENTS.folder, *(f"{p.folder}_latents" for p in _control_parts())):
        if name not in own.folders:
            continue
        with _collected(look, f"unreadable-{name}"):
            array = parts.checked_latents(own.path(name), own.array(name))
            shapes[name] = tuple(array.shape)
            if name == layout.LATENTS.folder:
                latents = array
            elif latents is not None and array.shape[1:] != latents.shape[1:]:
                look.wrong.append((f"unlike-{name}", f"{own.stem} ({tuple(array.shape)}, its clip {tuple(latents.shape)})"))
    if latents is not None:
        like = {"latents": latents}
    for part in (layout.NOISE, layout.PATH):
        name, is_noise = part.folder, part is layout.NOISE
        if name in own.files:
            with _collected(look, f"unreadable-{name}"):
                array = parts.noise(own.path(name)) if is_noise else parts.states(own.path(name), unknown_times=True)[0]
                shapes[name] = tuple(array.shape)
                parts.refuse_foreign_noise(own.path(name), array if is_noise else array[0], **like)
    return shapes


@contextmanager
def _collected(look: _Look, kind: str) -> Iterator[None]:
    """Turns the error of a reader into an entry of the look; anything else is a fault of ours and goes on."""
    try:
        yield
    except (ValueError, OSError) as error:
        look.wrong.append((kind, str(error)))


def _watch_clip(look: _Look, path: Path, header: video.Header) -> float:
    """Decodes every frame: how much it moves, and a fingerprint that survives encoding it again."""
    scale = _THUMB / max(header.size)
    size = max(round(header.height * scale), 1), max(round(header.width * scale), 1)
    sampled = {round(share * (header.num_frames - 1)) for share in (0, 0.25, 0.5, 0.75, 1)}
    first = before = None
    total, change, cells = 0.0, 0.0, list[NDArray[np.int16]]()
    for place, frame in enumerate(video.stream(path, size)):
        grey = frame.mean(-1).astype(np.float32)
        if first is None or before is None:
            first = grey
        else:
            total += float(np.abs(grey - before).mean())
            change = max(change, float(np.abs(grey - first).max()))
        before = grey
        if place in sampled:
            pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(grey)[None], _CELLS)
            cells.append(pooled.numpy().round().astype(np.int16).ravel())
    look.print = np.concatenate(cells)
    look.change = change if header.num_frames > 1 else None
    return total / max(header.num_frames - 1, 1)


# ---- all samples -----------------------------------------------------------------------------------------------------


def _problems(listing: _Files, looks: Sequence[_Look]) -> Iterator[Problem]:
    """All problems, errors first, each kind once."""
    problems = [*listing.broken, *_unreadable(looks), *_unlike(looks), *_missing(listing), *_captions(looks), *_shapes(looks)]
    problems += [*_pair_lengths(listing, looks), *_still(looks), *_duplicates(looks), *_varied(listing, looks)]
    problems += [*_without_clip(listing), *_unread(listing)]
    yield from sorted(problems, key=lambda problem: problem.level != "error")


def _unreadable(looks: Sequence[_Look]) -> Iterator[Problem]:
    for kind, entries in _by_kind(looks, "unreadable-").items():
        for stem, message in entries[:20]:
            yield Problem("error", kind, message, (stem,))
        stems = [stem for stem, _ in entries[20:]]
        message = f"{len(stems)} more files of {kind.removeprefix('unreadable-')}/: {some(stems)}"
        yield from _if_any("error", kind, stems, message)


def _unlike(looks: Sequence[_Look]) -> Iterator[Problem]:
    for kind, entries in _by_kind(looks, "unlike-").items():
        what = kind.removeprefix("unlike-")
        message = f"{len(entries)} in {what}/ do not go with their clip: {some([m for _, m in entries])}. Make them again"
        yield Problem("error", kind, message, tuple(stem for stem, _ in entries))


def _by_kind(looks: Sequence[_Look], start: str) -> dict[str, list[tuple[str, str]]]:
    """(stem, message) by kind, of the kinds whose names start so."""
    out: dict[str, list[tuple[str, str]]] = {}
    for look in looks:
        for kind, message in look.wrong:
            if kind.startswith(start):
                out.setdefault(kind, []).append((look.sample.stem, message))
    return out


def _missing(listing: _Files) -> Iterator[Problem]:
    """Files that some samples have and others lack."""
    stems = listing.stems
    for name, paths in listing.files.items():
        there = set(paths) | set(listing.rows.get(name, ()))
        lacking = [stem for stem in stems if stem not in there]
        if name == listing.lead.folder or not there & set(stems) or not lacking:
            continue
        remedy = "make them with: fewstep prepare"
        if name in (layout.NOISE.folder, layout.PATH.folder):
            remedy = "its teacher makes both together: fewstep pairs"
        remedy = "write one for each clip" if name == layout.CAPTIONS.folder else remedy
        message = f"{len(lacking)} of {len(stems)} lack {name}/: {some(lacking)}; {remedy}, or remove these clips"
        yield Problem("error", f"missing-{name}", message, tuple(lacking))


def _if_any(level: Level, kind: str, stems: Iterable[str], message: str) -> Iterator[Problem]:
    """A problem of these samples; none if there are none."""
    names = tuple(stems)
    if names:
        yield Problem(level, kind, message, names)


def _captions(looks: Sequence[_Look]) -> Iterator[Problem]:
    empty = [look.sample.stem for look in looks if look.sample.caption == ""]
    yield from _if_any("error", "empty-captions", empty, f"{len(empty)} captions are empty: {some(empty)}. Write one")
    short = [s.stem for s in (look.sample for look in looks) if s.num_words is not None and 0 < s.num_words < _FEW_WORDS]
    message = f"{len(short)} captions have fewer than {_FEW_WORDS} words: {some(short)}"
    yield from _if_any("warning", "short-captions", short, message)
    texts = Counter(text for look in looks if (text := look.sample.caption))
    num = sum(texts.values())
    if num >= _ENOUGH_CAPTIONS and 2 * len(texts) < num:
        ((text, times),) = texts.most_common(1)
        yield Problem(
            "warning",
            "same-captions",
            f"{num} clips have {len(texts)} different captions; {times} have {text[:80]!r}. A student learns little of the "
            "text from captions that do not tell clips apart",
        )


def _unread(listing: _Files) -> Iterator[Problem]:
    """Files of clips and captions that no reader takes, for their suffix."""
    for part in (layout.VIDEOS, layout.IMAGES, layout.CAPTIONS):
        others = listing.place.unread(part)
        if others:
            remedy = "Convert them, or rename them: " + ", ".join(part.suffixes)
            message = f"{len(others)} files in {part.folder}/ are not read, for their suffix: {some(others)}. {remedy}"
            yield Problem("warning", f"unread-{part.folder}", message)


def _shapes(looks: Sequence[_Look]) -> Iterator[Problem]:
    """Arrays of one kind that differ: they cannot be in one batch."""
    for name in sorted({name for look in looks for name in look.sample.shapes}):
        shapes = {look.sample.stem: look.sample.shapes[name] for look in looks if name in look.sample.shapes}
        usual, odd = odd_ones(shapes)
        names = some([f"{stem} {shapes[stem]}" for stem in odd])
        message = f"{len(odd)} of {len(shapes)} in {name}/ are not of shape {usual} as the others: {names}. Make them again"
        yield from _if_any("error", f"shape-{name}", odd, message)


def _pair_lengths(listing: _Files, looks: Sequence[_Look]) -> Iterator[Problem]:
    """A pair is a whole clip, so all clips of pairs are equally long."""
    if not listing.files[layout.NOISE.folder] and not listing.files[layout.PATH.folder]:
        return
    lengths = {look.sample.stem: look.sample.num_frames for look in looks if look.sample.num_frames is not None}
    usual, odd = odd_ones(lengths)
    names = some([f"{stem} ({lengths[stem]})" for stem in odd])
    message = (
        f"{len(odd)} of {len(lengths)} clips of pairs do not have {usual} frames: {names}. A pair is a whole clip: make it"
    )
    yield from _if_any("error", "pair-length", odd, f"{message} again")


def _still(looks: Sequence[_Look]) -> Iterator[Problem]:
    still = [look.sample.stem for look in looks if look.change is not None and look.change <= _STILL]
    message = f"{len(still)} of {len(looks)} clips hardly move: {some(still)}. A student learns to stand still from them"
    yield from _if_any("warning", "still", still, message)


def _duplicates(looks: Sequence[_Look]) -> Iterator[Problem]:
    """Clips that are there twice, as the same bytes or the same pictures."""
    first: dict[str, str] = {}
    twice: dict[str, str] = {}
    for look in looks:
        if look.content in first:
            twice[look.sample.stem] = first[look.content]
        elif look.content:
            first[look.content] = look.sample.stem
    unique = [look for look in looks if look.print is not None and look.sample.stem not in twice]
    by_length: dict[int, list[_Look]] = {}
    for look in unique[:_MAX_COMPARED]:
        assert look.print is not None
        by_length.setdefault(len(look.print), []).append(look)
    for group in by_length.values():
        table = np.stack([look.print for look in group if look.print is not None])
        for row in range(1, len(group)):
            near = np.flatnonzero(np.abs(table[:row] - table[row]).max(1) <= _ALIKE)
            if len(near) and group[row].sample.num_frames == group[near[0]].sample.num_frames:
                twice[group[row].sample.stem] = group[near[0]].sample.stem
    names = some([f"{stem} as {other}" for stem, other in twice.items()])
    message = f"{len(twice)} of {len(looks)} clips are there before: {names}. They count double in training"
    yield from _if_any("warning", "duplicates", twice, message)


def _varied(listing: _Files, looks: Sequence[_Look]) -> Iterator[Problem]:
    """Differences between clips that the right settings allow."""
    if listing.files[layout.NOISE.folder] or listing.files[layout.PATH.folder]:
        return
    sizes = "Set data.video_size (and data.resize), or data.buckets; of fewstep distill --height, --width"
    for what, advice, of in (
        ("size", sizes, lambda s: s.size),
        ("length", "Set data.num_frames, for windows of one length; fewstep distill does", lambda s: s.num_frames),
        ("fps", "A network that does not receive the rate learns a mixture: sort them apart", lambda s: s.fps),
    ):
        counts = Counter(value for look in looks if (value := of(look.sample)) is not None)
        if len(counts) > 1:
            values = some([f"{_plain(value)} ({num})" for value, num in counts.most_common()])
            yield Problem("warning", f"varied-{what}", f"clips differ in {what}: {values}. {advice}")


def _without_clip(listing: _Files) -> Iterator[Problem]:
    """Files whose clip is not there."""
    stems = set(listing.stems)
    for name, paths in listing.files.items():
        others = sorted(set(paths) - stems)
        message = f"{len(others)} files in {name}/ have no clip of their name: {some(others)}"
        yield from _if_any("warning", f"without-clip-{name}", others, message)


def _spread(name: str, values: Iterable[float | None]) -> list[tuple[str, str]]:
    there = [value for value in values if value is not None]
    if not there:
        return []
    low, mid, high = min(there), float(np.median(there)), max(there)
    text = f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}, median {mid:.4g}"
    return [(name, text)]


def _commonest(name: str, values: Sequence[str]) -> list[tuple[str, str]]:
    if not values:
        return []
    counts = Counter(values).most_common()
    return [(name, counts[0][0] if len(counts) == 1 else some([f"{value} ({num})" for value, num in counts]))]


def _plain(value: Any) -> str:  # a size, a count or a rate
    return " x ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"
