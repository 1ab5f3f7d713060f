"""Writes a data set as tar files with an index, here or on any store that fsspec reaches; fewstep/data/shards.py reads them.

A shard is complete when its .json is there, which is written after its .tar; a rerun writes the shards that are missing or
whose files changed, with the same bytes. While a command works, index.json is marked as incomplete, and readers refuse it.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fewstep.data.controls import Control
from fewstep.data.files import cache, video
from fewstep.data.files.packs import Packs, has_packs, open_packs
from fewstep.data.folder import layout
from fewstep.data.folder.layout import Layout, Part
from fewstep.data.shards import FORMAT, INDEX, IndexFile, filesystem, read_json
from fewstep.errors import UserError, some
from fewstep.files import is_plain, make_folder, remove, whole_file, write_bytes, writing
from fewstep.prepare.summary import Summary
from fewstep.progress import track
from fewstep.untrusted.text import ANY_SIZE, read_bytes

T = TypeVar("T")
_SUFFIXES = (".pickle", ".safetensors", ".npy")  # of files beside the folders that are copied: a negative prompt


@dataclass(frozen=True)
class _Source:
    """The source of one member: a file, or a row of a pack."""

    part: str
    suffix: str
    path: Path
    row: tuple[Packs, int] | None = None

    @property
    def size(self) -> int:
        if self.row is None:
            return self.path.stat().st_size
        packs, number = self.row
        return 2 * int(packs.read(number).numel())

    @property
    def stamp(self) -> list[Any]:
        """Values that change when the content does."""
        if self.row is None:
            status = self.path.stat()
            return [self.part, self.suffix, status.st_size, status.st_mtime_ns]
        packs, number = self.row
        return [self.part, self.suffix, packs.rows[number].content, sorted(packs.made_from.items())]

    def read(self) -> bytes:
        if self.row is None:
            return read_bytes(self.path, ANY_SIZE)
        packs, number = self.row
        label = packs.rows[number]
        name = "latents" if self.part == "latents" or self.part.endswith("_latents") else "text"
        return cache.encoded({name: packs.read(number)}, made_from=packs.made_from, facts=label.facts)


def write(dataset_dir: str | Path, url: str, *, parts: Sequence[str] | None = None, shard_bytes: int = 2**30) -> Summary:
    """Writes the samples of a folder with everything that each of them has, or with `parts` alone.

    Refuses a part that some samples lack, and an `url` that holds shards with other parts or of another size.
    """
    place = Layout.open(dataset_dir)
    if place.form != "flat":
        raise UserError(f"{place.root}: has a folder for each sample; shards are written of folders with videos/ or latents/")
    if shard_bytes < 1:
        raise UserError(f"a shard has at least one byte, not {shard_bytes}")
    fs, root = filesystem(url)
    samples = _sources(place, parts)
    names = tuple(source.part for source in next(iter(samples.values())))
    settings = {"format": FORMAT, "parts": names, "shard_bytes": shard_bytes}
    before = _earlier(fs, f"{root}/{INDEX}", IndexFile)
    changed = [key for key, value in settings.items() if before is not None and getattr(before, key) != value]
    if changed:
        differences = ", ".join(f"{key} {getattr(before, key)}, not {settings[key]}" for key in changed)
        raise UserError(f"{url}: holds shards with {differences}. Choose another --out, or remove them")
    if before is None and fs.exists(f"{root}/000000.tar"):
        raise UserError(f"{url}: holds tars that this command did not write. Choose another --out")
    make_folder(Path(root)) if _is_local(fs) else fs.makedirs(root, exist_ok=True)
    groups = list(_grouped(samples, shard_bytes))
    shards = [f"{number:06d}" for number in range(len(groups))]
    new = 0
    old = [] if before is None else [name for name in before.shards if name not in shards]

    def write_index(whole: bool, names: list[str]) -> None:
        index = settings | {"whole": whole, "num": len(samples), "shards": names}
        _put(fs, f"{root}/{INDEX}", (json.dumps(index, indent=1) + "\n").encode())

    for name, stems in zip(shards, track(groups, len(groups), f"writing {url}"), strict=True):
        plan = _plan(stems, samples)
        if (_earlier(fs, f"{root}/{name}.json", dict[str, Any]) or {}).get("plan") != plan:
            if not new:
                write_index(whole=False, names=shards + old)
            _remove(fs, f"{root}/{name}.json")
            rows = _write_tar(fs, f"{root}/{name}.tar", stems, samples)
            _put(fs, f"{root}/{name}.json", json.dumps({"plan": plan, "samples": rows}, sort_keys=True).encode())
            new += 1
    if old:
        write_index(whole=False, names=shards + old)
    for name in old:  # of clips that are gone
        _remove(fs, f"{root}/{name}.json")
        _remove(fs, f"{root}/{name}.tar")
    for path in sorted(place.root.iterdir()):
        if path.is_file() and path.suffix in _SUFFIXES and not path.name.startswith("."):
            _put(fs, f"{root}/{path.name}", read_bytes(path))
    write_index(whole=True, names=shards)
    return Summary(len(samples), new, shards=len(groups))


# ---- parts of the above --------------------------------------------------------------------------------------------


def _sources(place: Layout, parts: Sequence[str] | None) -> dict[str, list[_Source]]:
    """The sources of each sample, in the order of stems and parts; refuses a sample that lacks a part which others have."""
    folders = sorted(path.name for path in place.root.iterdir() if path.is_dir() and not path.name.startswith("."))
    unknown = sorted(set(parts or ()) - set(folders))
    if unknown:
        raise UserError(f"{place.root}: has no {', '.join(unknown)}; it holds {some(folders, 20)}")
    by_part = {name: _of_part(place, name) for name in folders if parts is None or name in parts}
    by_part = {name: sources for name, sources in by_part.items() if sources}
    lead = next((name for name in (layout.VIDEOS.folder, layout.LATENTS.folder) if name in by_part), None)
    if lead is None:
        raise UserError(f"{place.root}: has neither videos nor latents to write{' among --parts' if parts else ''}")
    stems, problems = list(by_part[lead]), list[str]()
    for name, sources in by_part.items():
        lacking = [stem for stem in stems if stem not in sources]
        if lacking:
            problems.append(
                f"{len(lacking)} of {len(stems)} lack {name}: {some(lacking)}. Make them, or leave it out with --parts"
            )
    dotted = [stem for stem in stems if "." in stem]
    odd = [stem for stem in stems if not is_plain(stem)]
    if odd:
        problems.append(f"{len(odd)} names cannot be those of files in a shard: {some(list(map(repr, odd)))}. Rename them")
    if dotted:
        problems.append(f"{len(dotted)} names have a dot, which ends a WebDataset name: {some(dotted)}. Rename them")
    if problems:
        raise UserError("\n".join(f"{place.root}: {problem}" for problem in problems))
    return {stem: [by_part[name][stem] for name in by_part] for stem in stems}


def _of_part(place: Layout, name: str) -> dict[str, _Source]:
    folder = place.root / name
    if has_packs(folder):
        packs = open_packs(folder)
        rows = packs.by_stem()
        windows = [stem for stem, numbers in rows.items() if len(numbers) > 1]
        if windows:
            raise UserError(f"{folder}: its packs hold windows of clips ({some(windows)}); shards hold whole ones")
        return {stem: _Source(name, ".safetensors", folder, (packs, numbers[0])) for stem, numbers in rows.items()}
    paths = place.files(_part(name))
    return {stem: _Source(name, path.name[len(stem) :], path) for stem, path in paths.items()}


def _part(name: str) -> Part:
    parts = {part.folder: part for part in (layout.VIDEOS, layout.CAPTIONS, layout.NOISE, layout.PATH, layout.LATENTS)}
    if name in parts:
        return parts[name]
    if name.endswith("_latents"):
        return layout.control_latents(name.removesuffix("_latents"))
    from fewstep.config import choices

    control: Control | None = choices("control").get(name)  # pyright: ignore[reportAssignmentType]  # its class knows the suffix
    return layout.text(name) if control is None else layout.control(name, control.suffix)


def _grouped(samples: dict[str, list[_Source]], shard_bytes: int) -> Iterator[list[str]]:
    group, size = list[str](), 0
    for stem, sources in samples.items():
        group.append(stem)
        size += sum(source.size for source in sources)
        if size >= shard_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _plan(stems: Sequence[str], samples: dict[str, list[_Source]]) -> str:
    stamps = [[stem, [source.stamp for source in samples[stem]]] for stem in stems]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def _write_tar(fs: Any, path: str, stems: Sequence[str], samples: dict[str, list[_Source]]) -> list[dict[str, Any]]:
    """Writes the tar, whole or not at all, and returns the place of each member."""
    if _is_local(fs):
        with whole_file(path) as beside:
            return _tar(beside, stems, samples)
    with tempfile.TemporaryDirectory(prefix="fewstep-") as own:
        beside = Path(own) / "shard.tar"
        with writing(beside):
            rows = _tar(beside, stems, samples)
        fs.put_file(str(beside), path)
        return rows


def _tar(path: Path, stems: Sequence[str], samples: dict[str, list[_Source]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for stem in stems:
            members: dict[str, Any] = {}
            for source in samples[stem]:
                content = source.read()
                entry = tarfile.TarInfo(f"{stem}.{source.part}{source.suffix}")  # time 0, nobody's: the same bytes again
                entry.size = len(content)
                try:
                    tar.addfile(entry, io.BytesIO(content))
                except ValueError:
                    raise UserError(f"{stem}: the name is too long for a tar; shorten it") from None
                begin = tar.offset - (len(content) + 511) // 512 * 512
                members[source.part] = {"offset": begin, "size": len(content), "crc": zlib.crc32(content)}
                members[source.part]["suffix"] = source.suffix
                if source.suffix == ".mp4":
                    header = video.probe(source.path)
                    members[source.part]["header"] = [header.num_frames, header.fps, header.height, header.width]
            rows.append({"stem": stem, "members": members})
    return rows


def _put(fs: Any, path: str, content: bytes) -> None:
    if _is_local(fs):
        write_bytes(path, content)
    else:
        fs.pipe_file(path, content)  # object stores show it when it is whole


def _is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _remove(fs: Any, path: str) -> None:
    if _is_local(fs):
        remove(Path(path))
    elif fs.exists(path):
        fs.rm_file(path)


def _earlier(fs: Any, path: str, kind: type[T]) -> T | None:
    """The JSON file of an earlier command; None if there is none, or only a damaged one."""
    try:
        return read_json(fs, path, "", kind)
    except (FileNotFoundError, UserError):
        return None
