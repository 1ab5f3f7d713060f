"""A data set in tar files, on this machine or any store that fsspec reaches, read sample by sample.

    Shards("s3://bucket/robots", num_frames=17, video_size=(704, 1280))        # written by `fewstep prepare shards`

    URL/index.json        which parts a sample has, which shards there are
    URL/000000.tar        WebDataset: STEM.videos.mp4, STEM.metas.txt, STEM.t5_xxl.pickle, ... one sample after another
    URL/000000.json       the place of each sample's members in the tar, and the headers of its videos

The index gives the place of every member, so a sample is a few reads of some kB, in any order: the order of samples, their
windows and their checks are those of the data set `folder`, and a run resumes at the same sample. Any WebDataset reader reads
the tars.
"""

from __future__ import annotations

import hashlib
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Le, Predicate
from torch import Tensor

from fewstep.config import kind
from fewstep.data.controls import Span
from fewstep.data.files import video
from fewstep.data.folder.dataset import Folder, FolderData, layout
from fewstep.data.folder.layout import Layout
from fewstep.data.folder.parts import Embedding
from fewstep.data.folder.samples import Sample, parts_of, refuse, samples_with, windows_of
from fewstep.errors import UserError, some
from fewstep.files import is_plain, write_bytes
from fewstep.untrusted.text import MAX_JSON_BYTES, Amount, Count, Name, parse_json

INDEX, FORMAT = "index.json", 1
T = TypeVar("T")
_AGAIN = "Write it again: fewstep prepare shards"


@dataclass(frozen=True)
class Index:
    """The index of a set of shards: everything but the bytes."""

    parts: tuple[str, ...]  # folders of the data set: videos, metas, ...
    samples: Mapping[str, Mapping[str, Member]]  # by stem, then by part
    tars: Mapping[str, tuple[str, int]]  # path and size of the tar of a sample, by stem


@dataclass(frozen=True)
class IndexFile:
    """index.json."""

    format: int
    num: Count
    shards: list[Name]
    parts: tuple[Name, ...]
    whole: bool = True
    shard_bytes: Count = 0


@dataclass(frozen=True)
class Member:
    """One file of a sample, within a tar."""

    offset: Count
    size: Count
    crc: Count
    suffix: Annotated[str, Predicate(lambda suffix: is_plain(f"stem{suffix}"))]  # .mp4
    header: tuple[Annotated[int, Ge(1), Le(video.MAX_FRAMES)], Amount, Count, Count] | None = None

    @property
    def of_video(self) -> video.Header | None:
        return None if self.header is None else video.Header(*self.header)


@dataclass(frozen=True)
class _Row:
    stem: Name
    members: dict[Name, Member]


@dataclass(frozen=True)
class _Shard:
    """000000.json."""

    samples: list[_Row]


@kind("shards", group="data")
@dataclass(frozen=True)
class Shards(Folder):
    """The same as `folder`, from tar files on this machine or any store that fsspec reaches."""

    # dataset_dir is the folder or URL that holds index.json
    cache_dir: str | None = None  # keep what was read here, so that it is fetched once; none: fetch again

    def open(self) -> FolderData:
        return ShardsData(self)


class ShardsData(FolderData):
    """The samples of `Shards`, checked by their index."""

    def __init__(self, spec: Shards):
        self._fs, self._root = filesystem(spec.dataset_dir)
        self._index = read_index(spec.dataset_dir)
        self._cache = Path(spec.cache_dir).absolute() / hash_of(spec.dataset_dir) if spec.cache_dir else None
        super().__init__(spec, Layout(Path(spec.dataset_dir)), _samples(spec, self._index))

    def captions(self) -> list[str]:
        stems = list(dict.fromkeys(self.stems))
        lacking = [stem for stem in stems if layout.CAPTIONS.folder not in self._index.samples[stem]]
        if lacking:
            raise UserError(f"{self.spec.dataset_dir}: {len(lacking)} of {len(stems)} have no caption: {some(lacking)}")
        texts = {stem: self._bytes(stem, layout.CAPTIONS.folder).decode("utf-8", "replace").strip() for stem in stems}
        return [texts[stem] for stem in self.stems]

    def _read(self, sample: Sample) -> dict[str, Tensor]:
        with self._local(sample) as local:
            return super()._read(local)

    def _embedding(self, sample: Sample) -> Embedding:
        with self._local(sample) as local:
            return super()._embedding(local)

    @contextmanager
    def _file(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="fewstep-") as place:
            path = Path(place) / Path(name).name
            path.write_bytes(self._fs.cat_file(f"{self._root}/{name}"))
            yield path

    @contextmanager
    def _local(self, sample: Sample) -> Iterator[Sample]:
        """The sample with its files on this machine."""
        if all(path.is_absolute() for path in sample.files.values()):  # it is already
            yield sample
            return
        with ExitStack() as stack:
            place = self._cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fewstep-")))
            yield replace(sample, files={part: self._fetched(place, sample.stem, part) for part in sample.files})

    def _fetched(self, place: Path, stem: str, part: str) -> Path:
        member = self._index.samples[stem][part]
        path = place / part / f"{stem}{member.suffix}"
        if not path.is_file() or path.stat().st_size != member.size:
            write_bytes(path, self._bytes(stem, part))
        return path

    def _bytes(self, stem: str, part: str) -> bytes:
        member = self._index.samples[stem][part]
        path, size = self._index.tars[stem]
        end = min(member.offset + member.size, size)  # what is asked for beyond it would be made room for
        content = self._fs.cat_file(path, start=member.offset, end=end) if end > member.offset else b""
        if len(content) != member.size or zlib.crc32(content) != member.crc:
            raise UserError(
                f"{path}: {stem}.{part}{member.suffix} is not what the index says. The tar is damaged or another's; {_AGAIN}"
            )
        return content


def filesystem(url: str) -> tuple[Any, str]:  # Any: fsspec carries no types
    """The store of a URL or folder, and the path in it, without a slash at its end."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: no store that fsspec reaches here ({error})") from None
    return fs, str(path).rstrip("/")


def read_index(url: str) -> Index:
    """The index of a set of shards; refuses a damaged one, and names with a path in them."""
    fs, root = filesystem(url)
    index = read_json(fs, f"{root}/{INDEX}", f"Write it: fewstep prepare shards DIR --out {url}", IndexFile)
    if index.format != FORMAT:
        raise UserError(f"{root}/{INDEX}: has the format {index.format}, where {FORMAT} is read. {_AGAIN}")
    if not index.whole:
        raise UserError(f"{root}: is not whole, its writing was interrupted. Run fewstep prepare shards again")
    samples: dict[str, dict[str, Member]] = {}
    tars: dict[str, tuple[str, int]] = {}
    for name in index.shards:
        path, tar = f"{root}/{name}.json", f"{root}/{name}.tar"
        rows = read_json(fs, path, _AGAIN, _Shard).samples
        if not fs.isfile(tar):
            raise FileNotFoundError(f"{tar}: no such file, but the index has it. {_AGAIN}")
        size = fs.size(tar)
        claims = sum(member.header[0] for row in rows for member in row.members.values() if member.header)
        if claims > size:  # there would be a sample for each window of them
            raise UserError(f"{tar}: is not what the index says, {claims:,} frames in {size:,} bytes. {_AGAIN}")
        for row in rows:
            if samples.setdefault(row.stem, row.members) is not row.members:
                raise UserError(f"{path}: damaged, two samples called {row.stem}. {_AGAIN}")
            tars[row.stem] = tar, size
    if len(samples) != index.num:
        raise UserError(f"{root}/{INDEX}: says {index.num} samples, its shards hold {len(samples)}. {_AGAIN}")
    return Index(index.parts, samples, tars)


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _samples(spec: Shards, index: Index) -> tuple[Sample, ...]:
    """Every sample with its windows. Raises one UserError with all problems."""
    place = Layout(Path(spec.dataset_dir))
    problems = [f"data.{key}: {message}" for key, message in spec.problems() if not key.startswith("warn:")]
    lead = spec.latents if spec.x0 == "latents" else layout.VIDEOS.folder
    needed = [lead, *(part.folder for part in parts_of(spec))]
    for part in needed:
        lacking = [stem for stem, members in index.samples.items() if part not in members]
        if lacking:
            problems.append(
                f"{len(lacking)} of {len(index.samples)} lack {part}: {some(lacking)}; shards have {some(index.parts, 20)}"
            )
    refuse(place, problems if index.samples else ["its shards hold no samples"])
    files = {part: {stem: Path(f"{stem}{row[part].suffix}") for stem, row in index.samples.items()} for part in needed}
    if spec.x0 == "latents":
        return samples_with(files, {stem: [Span()] for stem in index.samples}, {}, {})
    control = spec.control.folder if spec.control is not None else ""
    headers, controls = (
        {stem: header for stem, row in index.samples.items() if part in needed and (header := row[part].of_video)}
        for part in (lead, control)
    )
    return windows_of(spec, place, files, headers, controls)


def read_json(fs: Any, path: str, remedy: str, kind: type[T]) -> T:  # fs: of fsspec, which carries no types
    """As `untrusted.text.read_json`, from any store. Raises FileNotFoundError where there is no such file."""
    if not fs.isfile(path):  # a pipe would be read for ever
        raise FileNotFoundError(f"{path}: no such file. {remedy}")
    return parse_json(fs.cat_file(path, end=MAX_JSON_BYTES), f"{path}: damaged", remedy, kind)
