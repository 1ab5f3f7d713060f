"""What is wrong with a data set, by the looks at its samples: each kind of problem once, with all samples that have it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fewstep.data.check.look import Files, Level, Look, Problem
from fewstep.data.folder.dataset import layout
from fewstep.data.folder.samples import odd_ones, stale_texts
from fewstep.errors import some

_STILL = 8  # levels of 255; no pixel of the thumbnails changes by more
_ALIKE = 3  # levels of 255 in any cell; the same clip, encoded again
_MAX_COMPARED = 4000  # clips; each is compared with each
_FEW_WORDS = 3  # a caption with fewer is worth a warning
_ENOUGH_CAPTIONS = 6  # clips, from which on equal captions are worth a warning


def problems_of(listing: Files, looks: Sequence[Look]) -> Iterator[Problem]:
    """All problems, errors first, each kind once."""
    problems = [*listing.broken, *_unreadable(looks), *_unlike(looks), *_missing(listing), *_captions(looks), *_shapes(looks)]
    problems += _stale_texts(listing, looks)
    problems += [*_pair_lengths(listing, looks), *_still(looks), *_duplicates(looks), *_varied(listing, looks)]
    problems += [*_without_clip(listing), *unread(listing)]
    yield from sorted(problems, key=lambda problem: problem.level != "error")


def _unreadable(looks: Sequence[Look]) -> Iterator[Problem]:
    for kind, entries in _by_kind(looks, "unreadable-").items():
        for stem, message in entries[:20]:
            yield Problem("error", kind, message, (stem,))
        stems = [stem for stem, _ in entries[20:]]
        message = f"{len(stems)} more files of {kind.removeprefix('unreadable-')}/: {some(stems)}"
        yield from _if_any("error", kind, stems, message)


def _unlike(looks: Sequence[Look]) -> Iterator[Problem]:
    for kind, entries in _by_kind(looks, "unlike-").items():
        what = kind.removeprefix("unlike-")
        message = f"{len(entries)} in {what}/ do not go with their clip: {some([m for _, m in entries])}. Make them again"
        yield Problem("error", kind, message, tuple(stem for stem, _ in entries))


def _by_kind(looks: Sequence[Look], start: str) -> dict[str, list[tuple[str, str]]]:
    """(stem, message) by kind, of the kinds whose names start so."""
    out: dict[str, list[tuple[str, str]]] = {}
    for look in looks:
        for kind, message in look.wrong:
            if kind.startswith(start):
                out.setdefault(kind, []).append((look.sample.stem, message))
    return out


def _missing(listing: Files) -> Iterator[Problem]:
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


def _stale_texts(listing: Files, looks: Sequence[Look]) -> Iterator[Problem]:
    texts = {look.sample.stem: look.sample.caption for look in looks if look.sample.caption}
    for folder in listing.texts:
        stale = stale_texts(listing.place, folder, texts, listing.packed.get(folder))
        message = f"{len(stale)} of {len(texts)} captions have changed since {folder}/ was made of them: {some(stale)}"
        yield from _if_any("error", f"stale-{folder}", stale, f"{message}. Run fewstep prepare text again")


def _captions(looks: Sequence[Look]) -> Iterator[Problem]:
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


def unread(listing: Files) -> Iterator[Problem]:
    """Files of clips and captions that no reader takes, for their suffix."""
    for part in (layout.VIDEOS, layout.IMAGES, layout.CAPTIONS):
        others = listing.place.unread(part)
        if others:
            remedy = "Convert them, or rename them: " + ", ".join(part.suffixes)
            message = f"{len(others)} files in {part.folder}/ are not read, for their suffix: {some(others)}. {remedy}"
            yield Problem("warning", f"unread-{part.folder}", message)


def _shapes(looks: Sequence[Look]) -> Iterator[Problem]:
    """Arrays of one kind that differ: they cannot be in one batch."""
    for name in sorted({name for look in looks for name in look.sample.shapes}):
        shapes = {look.sample.stem: look.sample.shapes[name] for look in looks if name in look.sample.shapes}
        usual, odd = odd_ones(shapes)
        names = some([f"{stem} {shapes[stem]}" for stem in odd])
        message = f"{len(odd)} of {len(shapes)} in {name}/ are not of shape {usual} as the others: {names}. Make them again"
        yield from _if_any("error", f"shape-{name}", odd, message)


def _pair_lengths(listing: Files, looks: Sequence[Look]) -> Iterator[Problem]:
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


def _still(looks: Sequence[Look]) -> Iterator[Problem]:
    still = [look.sample.stem for look in looks if look.change is not None and look.change <= _STILL]
    message = f"{len(still)} of {len(looks)} clips hardly move: {some(still)}. A student learns to stand still from them"
    yield from _if_any("warning", "still", still, message)


def _duplicates(looks: Sequence[Look]) -> Iterator[Problem]:
    """Clips that are there twice, as the same bytes or the same pictures."""
    first: dict[str, str] = {}
    twice: dict[str, str] = {}
    for look in looks:
        if look.content in first:
            twice[look.sample.stem] = first[look.content]
        elif look.content:
            first[look.content] = look.sample.stem
    unique = [look for look in looks if look.print is not None and look.sample.stem not in twice]
    by_length: dict[int, list[Look]] = {}
    for look in unique[:_MAX_COMPARED]:
        assert look.print is not None
        by_length.setdefault(len(look.print), []).append(look)
    for group in by_length.values():
        table = np.stack([look.print for look in group if look.print is not None])
        for row in range(1, len(group)):
            near = np.flatnonzero(np.abs(table[:row] - table[row]).max(1) <= _ALIKE)
            if len(near) and group[row].sample.num_frames == group[near[0]].sample.num_frames:
                twice[group[row].sample.stem] = group[near[0]].sample.stem
    names = some([f"{stem} of {other}" for stem, other in twice.items()])
    message = f"{len(twice)} of {len(looks)} clips are copies of others: {names}. They count double in training"
    yield from _if_any("warning", "duplicates", twice, message)


def _varied(listing: Files, looks: Sequence[Look]) -> Iterator[Problem]:
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


def _without_clip(listing: Files) -> Iterator[Problem]:
    """Files whose clip is not there."""
    stems = set(listing.stems)
    for name, paths in listing.files.items():
        others = sorted(set(paths) - stems)
        message = f"{len(others)} files in {name}/ have no clip of their name: {some(others)}"
        yield from _if_any("warning", f"without-clip-{name}", others, message)


def _plain(value: Any) -> str:  # a size, a count or a rate
    return " x ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"
