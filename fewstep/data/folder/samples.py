"""The samples of a folder. Their problems are found, by name, before anything is decoded.

Partners, frame counts, sizes, rates, captions and packed rows are checked for all samples at once, so
that one message holds every problem.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewstep.data.controls import Span
from fewstep.data.files import cache, video
from fewstep.data.files.packs import Packs, has_packs, open_packs
from fewstep.data.files.sizes import nearest_shape
from fewstep.data.folder import layout
from fewstep.data.folder.layout import Layout, Part
from fewstep.data.folder.settings import FolderSettings
from fewstep.errors import UserError, some
from fewstep.untrusted.text import read_json_lines, read_text

_PROBE_THREADS = 8  # headers are small reads from disk: waiting, not work
_MAX_CAPTION_BYTES = 2**20
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Sample:
    """One sample: its files by the folder of their part, and which frames of them."""

    stem: str
    files: Mapping[str, Path]
    span: Span = field(default_factory=Span)
    header: video.Header | None = None  # of its video, if that is read
    rows: Mapping[str, int] = field(default_factory=dict[str, int])  # its rows in the parts that are packed, by folder


def packs_of(spec: FolderSettings, place: Layout) -> dict[str, Packs]:
    """The parts of a sample that lie in packs, by folder."""
    if place.form != "flat":
        return {}
    folders = [part.folder for part in parts_of(spec) if part not in (layout.NOISE, layout.PATH)]
    folders += [spec.latents] if spec.x0 == "latents" else []
    return {folder: open_packs(place.root / folder) for folder in folders if has_packs(place.root / folder)}


def _missing(place: Layout, part: Part, stems: Sequence[str], packs: Mapping[str, Packs]) -> str | None:
    if part.folder not in packs:
        return place.missing(part, stems)
    there = packs[part.folder].by_stem()
    return _lack_rows(part.folder, [stem for stem in stems if stem not in there], len(stems))


def _lack_rows(folder: str, lacking: Sequence[str], num: int) -> str | None:
    return f"{len(lacking)} of {num} lack a row in {folder}/packs: {some(lacking)}" if lacking else None


def buckets_of(spec: FolderSettings, samples: Sequence[Sample]) -> Tensor:
    """The number of each sample's bucket; all 0 where all samples are of one size."""
    if not spec.buckets or spec.x0 == "latents":
        return torch.zeros(len(samples), dtype=torch.int64)
    return torch.tensor([nearest_shape(s.header.size, spec.buckets) for s in samples if s.header is not None])


def samples_of(spec: FolderSettings, place: Layout, packs: Mapping[str, Packs], left_out: dict[str, str]) -> tuple[Sample, ...]:
    """Every sample with its files. Raises one UserError with all problems. Fills `left_out`."""
    problems = [f"data.{key}: {message}" for key, message in spec.problems() if not key.startswith("warn:")]
    refuse(place, problems)
    lead = layout.latents(spec.latents) if spec.x0 == "latents" else place.pixels()
    needed = parts_of(spec)
    stems = list(packs[lead.folder].by_stem() if lead.folder in packs else place.files(lead))
    if not stems:
        hint = "" if spec.x0 != "latents" else ". Make them with: fewstep prepare latents, or set data.x0=pixels"
        others = place.unread(lead) if lead == layout.VIDEOS else []
        hint += f". It has files that are not read: {some(others)}; convert them to .mp4" if others else ""
        raise UserError(f"{place.root}: has no {place.pattern(lead)}{hint}")
    for part in needed:
        problem = _missing(place, part, stems, packs)
        problems += [f"{problem}{_remedy(part, spec)}"] if problem else []
    if spec.text is not None and place.files(layout.CAPTIONS):  # Transfer1's pairs have embeddings and no captions
        problem = place.missing(layout.CAPTIONS, stems)
        texts, unusable = ({}, [problem]) if problem else captions_of(place, stems)
        problems += [*unusable, *stale_problem(place, spec.text, texts, packs.get(spec.text))]
    files = {part.folder: place.files(part) for part in (lead, *needed) if part.folder not in packs}
    if spec.x0 == "latents":
        problems += (
            _packed_problems(spec, place, packs, left_out)
            if lead.folder in packs
            else _latent_problems(spec, files[lead.folder])
        )
        refuse(place, problems)
        spans = _spans_of_rows(packs[lead.folder]) if lead.folder in packs else {stem: [Span()] for stem in stems}
        return samples_with(files, spans, {}, packs)
    files["videos"] = files.pop(lead.folder)  # pictures are clips of one frame from here on
    headers, unreadable = _headers(files["videos"])
    if len(unreadable) <= spec.max_bad and headers:
        left_out |= unreadable
    else:
        errors = list(unreadable.values())
        problems += errors[:5] + ([f"{len(errors) - 5} more videos cannot be read"] if len(errors) > 5 else [])
    controls: Mapping[str, video.Header] = {}
    if spec.control is not None and spec.control.suffix == ".mp4" and spec.control_from == "files":
        controls, unreadable = _headers({s: path for s, path in files[spec.control.folder].items() if s in headers})
        problems += list(unreadable.values())[:5]
    return windows_of(spec, place, files, headers, controls, problems, packs)


def windows_of(
    spec: FolderSettings,
    place: Layout,
    files: Mapping[str, Mapping[str, Path]],
    headers: Mapping[str, video.Header],
    controls: Mapping[str, video.Header],  # headers of the control videos
    problems: Sequence[str] = (),
    packs: Mapping[str, Packs] | None = None,
) -> tuple[Sample, ...]:
    """The samples of clips with these headers. Raises one UserError with `problems`, and those of the headers."""
    spans, wrong = spans_of(spec, headers)
    refuse(place, [*problems, *_size_problems(spec, headers), *_control_problems(spec, controls, headers), *wrong])
    return samples_with(files, {stem: spans.get(stem, []) for stem in headers}, headers, packs or {})


def samples_with(
    files: Mapping[str, Mapping[str, Path]],  # by folder and stem
    spans: Mapping[str, Sequence[Span]],
    headers: Mapping[str, video.Header],
    packs: Mapping[str, Packs],
) -> tuple[Sample, ...]:
    """One sample for each span of a clip. Its rows in packs are those of the same window, or else of the whole clip."""
    tables = {folder: {(row.stem, row.start): number for number, row in enumerate(pack.rows)} for folder, pack in packs.items()}
    out: list[Sample] = []
    for stem, windows in spans.items():
        own = {folder: paths[stem] for folder, paths in files.items()}
        for span in windows:
            places = (stem, span.start), (stem, 0)
            rows = {folder: table[next(place for place in places if place in table)] for folder, table in tables.items()}
            out.append(Sample(stem, own, span, headers.get(stem), rows))
    return tuple(out)


def _spans_of_rows(packs: Packs) -> dict[str, list[Span]]:
    """The windows of the rows, in their order."""
    spans = defaultdict[str, list[Span]](list)
    for label in packs.rows:
        span = Span(label.start, int(label.facts.get("num_frames", 1)), int(label.facts.get("stride", 1)))
        spans[label.stem].append(span)
    return spans


def _packed_problems(spec: FolderSettings, place: Layout, packs: Mapping[str, Packs], left_out: dict[str, str]) -> list[str]:
    """Rows of different shapes, of clips that changed since, or without the same window of their control; clips without any."""
    main, again, problems = packs[spec.latents], "Run fewstep prepare latents again", list[str]()
    names = [f"{label.stem}@{label.start}" if label.start else label.stem for label in main.rows]
    problems += _odd_ones("shape", dict(zip(names, main.shapes, strict=True)), again)
    videos = place.files(layout.VIDEOS)
    sizes = {stem: path.stat().st_size for stem, path in videos.items()}
    stale = [one.stem for one in main.rows if "bytes" in one.facts and sizes.get(one.stem) not in (None, one.facts["bytes"])]
    if stale:
        problems.append(f"{len(stale)} of {len(names)} latents are of another file than videos/ holds: {some(stale)}. {again}")
    there = main.by_stem()
    lacking = [stem for stem in videos if stem not in there]
    if len(lacking) > spec.max_bad:
        problems.append(f"{len(lacking)} of {len(videos)} clips have no latents: {some(lacking)}. {again}, or remove them")
    left_out |= dict.fromkeys(lacking, "has no latents")
    if spec.num_frames is not None:
        odd = [n for n, label in zip(names, main.rows, strict=True) if label.facts.get("num_frames") != spec.num_frames]
        if odd:
            problems.append(f"{len(odd)} of {len(names)} latents are not of {spec.num_frames} frames: {some(odd)}. {again}")
    if spec.pairs and main.made_from.get("num_frames", "whole") != "whole":
        problems.append("its latents are of windows, but a pair is the whole clip its noise belongs to. Encode whole clips")
    for folder, other in packs.items():
        if folder.endswith(f"_{spec.latents}"):
            there = {(label.stem, label.start) for label in other.rows}
            lacking = [n for n, label in zip(names, main.rows, strict=True) if (label.stem, label.start) not in there]
            problem = _lack_rows(folder, lacking, len(names))
            problems += [f"{problem}. {again}"] if problem else []
            unlike = [k for k, v in main.made_from.items() if k != "part" and other.made_from.get(k) != v]
            problems += [f"{folder}/ and {spec.latents}/ were made with another {', '.join(unlike)}. {again}"] if unlike else []
    return problems


def parts_of(spec: FolderSettings) -> list[Part]:
    """The parts that a sample must have besides its clip."""
    needed: list[Part] = []
    if spec.text is not None:
        needed.append(layout.text(spec.text))
    if spec.control is not None and spec.x0 == "latents":
        needed.append(layout.control_latents(spec.control.folder, spec.latents))
    elif spec.control is not None and spec.control_from == "files":
        needed.append(layout.control(spec.control.folder, spec.control.suffix))
    return needed + [{"noise": layout.NOISE, "path": layout.PATH}[name] for name in spec.pairs]


def _remedy(part: Part, spec: FolderSettings) -> str:
    if part in (layout.NOISE, layout.PATH):
        return ". A teacher makes clips and what they came from together: fewstep pairs"
    if part.folder == spec.text:
        return (
            ". Embed the captions: fewstep prepare text (--prompt TEXT gives one to clips without any), or set data.text=none"
        )
    if part.folder.endswith(f"_{spec.latents}"):
        return ". Encode them: fewstep prepare latents"
    return ". Make them with: fewstep prepare controls" + (", or set data.control_from=video" if callable(spec.control) else "")


def refuse(place: Layout, problems: Sequence[str]) -> None:
    if problems:
        raise UserError("\n".join(f"{place.root}: {problem}" for problem in problems))


def captions_of(place: Layout, stems: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Captions by stem, and their problems."""
    files, texts, problems = place.files(layout.CAPTIONS), dict[str, str](), list[str]()
    for stem in stems:
        try:
            texts[stem] = read_caption(files[stem])
        except UserError as error:
            about = str(error).removeprefix(f"{files[stem]}: ")
            problems.append(
                f"the caption of {stem} {about}" if about.startswith("is not UTF-8") else f"the caption of {stem}: {error}"
            )
    empty = [stem for stem, text in texts.items() if not text]
    if empty:
        problems.append(f"{len(empty)} of {len(stems)} captions are empty: {some(empty)}. Write one, or remove the clip")
    return texts, problems


def stale_problem(place: Layout, folder: str, texts: Mapping[str, str], packs: Packs | None) -> list[str]:
    """A problem if captions have changed since `fewstep prepare text` embedded them; of other embeddings nobody knows."""
    stale = stale_texts(place, folder, texts, packs)
    names = f"{len(stale)} of {len(texts)} captions have changed since {folder}/ was made of them: {some(stale)}"
    return [f"{names}. Run fewstep prepare text again"] if stale else []


def stale_texts(place: Layout, folder: str, texts: Mapping[str, str], packs: Packs | None) -> list[str]:
    """The stems whose embedding is that of another caption."""
    if packs is not None:
        origins = {row.stem: row.content for row in packs.rows}
    else:
        lines = read_json_lines(text_ledger(place, folder))
        origins = {str(line["name"]): line["content"] for line in lines if {"name", "content"} <= line.keys()}
    return [stem for stem, text in texts.items() if origins.get(stem) not in (None, "", hash_of_text(text))]


def text_ledger(place: Layout, folder: str) -> Path:
    """Where `fewstep prepare text` records the captions of a folder's files."""
    return place.root / folder / layout.LEDGER if place.form == "flat" else place.root / f"{layout.LEDGER}.{folder}"


def hash_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_caption(path: Path) -> str:
    """The text of a file, of at most 1 MiB. UserError for a device, a pipe, more, or other bytes than UTF-8."""
    return read_text(path, _MAX_CAPTION_BYTES).strip()


def _headers(files: Mapping[str, Path]) -> tuple[dict[str, video.Header], dict[str, str]]:
    """Headers by stem, and by stem the error of files that cannot be read."""

    def header_or_error(path: Path) -> video.Header | str:
        try:
            return video.probe(path)
        except ValueError as error:
            return str(error)

    results = dict(zip(files, each(header_or_error, list(files.values()), _PROBE_THREADS), strict=True))
    errors = {stem: result for stem, result in results.items() if isinstance(result, str)}
    return {stem: result for stem, result in results.items() if isinstance(result, video.Header)}, errors


def _size_problems(spec: FolderSettings, headers: Mapping[str, video.Header]) -> list[str]:
    if spec.video_size is not None or spec.buckets or not headers:
        return []
    return _odd_ones("size", {s: h.size for s, h in headers.items()}, "Set data.video_size or data.buckets to resize them")


def _control_problems(
    spec: FolderSettings, controls: Mapping[str, video.Header], headers: Mapping[str, video.Header]
) -> list[str]:
    """Control videos that do not go frame by frame with their clip."""
    odd = defaultdict[str, list[str]](list)
    for stem, header in controls.items():
        for what, here, theirs in header.differences(headers[stem]):
            odd[what].append(f"{stem} ({here}, its clip {theirs})")
    name = spec.control.folder if spec.control is not None else ""
    return [
        f"{len(stems)} of {len(controls)} {name}/*.mp4 differ from their clip in {what}: {some(stems)}. Make them again"
        for what, stems in odd.items()
    ]


def spans_of(spec: FolderSettings, headers: Mapping[str, video.Header]) -> tuple[dict[str, list[Span]], list[str]]:
    """The windows of each clip, in order, and the problems of clips that are too short or of the wrong length."""
    lengths = {stem: header.num_frames for stem, header in headers.items()}
    if spec.num_frames is None:
        whole = {stem: [Span(0, length)] for stem, length in lengths.items()}
        if spec.sequence_interval > 1:
            whole = {s: [Span(0, -(-n // spec.sequence_interval), spec.sequence_interval)] for s, n in lengths.items()}
        hint = "A pair is a whole clip: make these again" if spec.pairs else "Set data.num_frames for windows of one length"
        return whole, _odd_ones("num_frames", lengths, hint)
    if spec.pairs:
        odd = [f"{stem} ({num})" for stem, num in lengths.items() if num != spec.num_frames]
        problem = (
            f"{len(odd)} of {len(lengths)} clips do not have {spec.num_frames} frames: {some(odd)}. A pair is the whole clip "
            "its noise belongs to, never a window of it: make these again, or set data.num_frames to what the teacher made"
        )
        return {stem: [Span(0, num)] for stem, num in lengths.items()}, [problem] if odd else []
    reach = (spec.num_frames - 1) * spec.sequence_interval + 1  # frames of the file that a window lies over
    spans = {
        stem: [
            Span(start, spec.num_frames, spec.sequence_interval)
            for start in range(0, num - reach + 1, spec.start_frame_interval)
        ]
        for stem, num in lengths.items()
    }
    short = [f"{stem} ({lengths[stem]})" for stem, windows in spans.items() if not windows]
    if not short or (spec.skip_short and len(short) < len(spans)):
        return spans, []
    return spans, [
        f"{len(short)} of {len(spans)} clips are shorter than a window of {reach} frames (num_frames {spec.num_frames}, every "
        f"{spec.sequence_interval}): {some(short)}. Set data.skip_short=true to leave them out, or a smaller data.num_frames"
    ]


def _latent_problems(spec: FolderSettings, files: Mapping[str, Path]) -> list[str]:
    """Cache files that differ in shape, origin or length; other formats say nothing before they are read."""
    entries, problems = dict[str, cache.Entry](), list[str]()
    for stem, path in files.items():
        if path.suffix != ".safetensors":
            continue
        try:
            entries[stem] = cache.read(path)
        except ValueError as error:
            problems.append(str(error))
    again = "Encode them again: fewstep prepare latents"
    problems += _odd_ones("shape", {s: entry.shapes.get("latents") for s, entry in entries.items()}, again)
    origins = {s: ", ".join(f"{k} {v}" for k, v in sorted(entry.made_from.items())) for s, entry in entries.items()}
    problems += _odd_ones("origin", origins, again)
    if spec.num_frames is not None:
        odd = [s for s, entry in entries.items() if entry.facts.get("num_frames", spec.num_frames) != spec.num_frames]
        if odd:
            problems.append(
                f"{len(odd)} of {len(entries)} latents are not of {spec.num_frames} frames: {some(odd)}. Latents are of whole "
                "clips: set data.num_frames=none, or to their length"
            )
    return problems


def _odd_ones(what: str, values: Mapping[str, Any], hint: str) -> list[str]:  # values of any kind that can be compared
    """A problem if not all values are equal."""
    usual, odd = odd_ones(values)
    names = some([f"{stem} ({values[stem]})" for stem in odd])
    return [f"{len(odd)} of {len(values)} differ from the others in {what} ({usual}): {names}. {hint}"] if odd else []


def odd_ones(values: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The commonest value, and the names of those that have another one; None for no values."""
    usual = Counter(values.values()).most_common(1)[0][0] if values else None
    return usual, [name for name, value in values.items() if value != usual]


def each(do: Callable[[Any], _Answer], values: Sequence[Any], num_threads: int) -> list[_Answer]:  # values of do's argument
    if num_threads <= 1 or len(values) <= 1:
        return [do(value) for value in values]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(do, values))
