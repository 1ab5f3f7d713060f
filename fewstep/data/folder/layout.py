"""The names of files and folders of data sets on disk. They stand in this file only.

Flat, as Cosmos-Transfer1 and Cosmos-Predict1 have it: files of one sample share their stem.

    DIR/videos/STEM.mp4                the clips
    DIR/images/STEM.png                or pictures, each a clip of one frame (.jpg, .webp too; ours)
    DIR/metas/STEM.txt                 their captions
    DIR/t5_xxl/STEM.pickle             the captions, embedded
    DIR/noise/STEM.pickle              the noise from which a teacher made the clip
    DIR/path/STEM.safetensors          states of the teacher's ODE on the way, and their times (ours)
    DIR/edge|vis|depth/STEM.mp4        controls
    DIR/seg|keypoint/STEM.pickle       controls
    DIR/latents/STEM.safetensors       the clips, encoded (ours)
    DIR/edge_latents/STEM.safetensors  a control, encoded (ours)

A folder for each sample, as FastGen's generate_ode_pairs.py writes it:

    DIR/000000/latent.pth     DIR/000000/path.pth     DIR/000000/prompt.txt     DIR/000000/video.mp4
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fewstep.data.files.packs import has_packs
from fewstep.data.files.video import PICTURES
from fewstep.errors import UserError, some

_ARRAYS = (".safetensors", ".pickle", ".pth", ".npy")


@dataclass(frozen=True)
class Part:
    """One kind of file that a sample may have."""

    folder: str  # flat: FOLDER/STEM + suffix
    suffixes: tuple[str, ...]  # that are read; the first is the one a message names
    names: tuple[str, ...]  # a folder for each sample: STEM/NAME + suffix


VIDEOS = Part("videos", (".mp4",), ("video",))
IMAGES = Part("images", PICTURES, ("image",))
LEDGER = ".made.jsonl"  # the list of the files that a command wrote, and of what
CAPTIONS = Part("metas", (".txt",), ("prompt",))
NOISE = Part("noise", (".pickle", ".safetensors", ".npy", ".pth"), ("noise",))
PATH = Part("path", _ARRAYS, ("path",))
LATENTS = Part("latents", _ARRAYS, ("latent", "latents"))


def latents(folder: str) -> Part:
    """The latents of clips; those of a second codec are in a folder of their own."""
    return LATENTS if folder == LATENTS.folder else Part(folder, _ARRAYS, (folder,))


def text(folder: str) -> Part:
    """Text embeddings of one encoder; t5_xxl in Cosmos-Transfer1."""
    return Part(folder, (".pickle", ".safetensors", ".npy", ".pth"), (folder, "txt_emb"))


def control(folder: str, suffix: str) -> Part:
    """A control signal as it was written."""
    return Part(folder, (suffix, *PICTURES) if suffix == ".mp4" else (suffix,), (folder,))


def control_latents(folder: str, latents: str = "latents") -> Part:
    """The same, encoded; latents: the folder of the clips' own."""
    names = (f"{folder}_latent", f"{folder}_latents") if latents == LATENTS.folder else (f"{folder}_{latents}",)
    return Part(f"{folder}_{latents}", _ARRAYS, names)


@dataclass(frozen=True)
class Layout:
    """A data set's folder. File names never come from inside a file, so that none can lead out of it."""

    root: Path
    form: Literal["flat", "per_sample"] = "flat"

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> Layout:
        """The layout of a folder. Raises UserError, which lists its folders, if it is neither form."""
        path = Path(root)
        if not path.is_dir():
            raise UserError(f"{path}: no such folder. Set data.dataset_dir to the folder that holds {VIDEOS.folder}/")
        folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
        if {VIDEOS.folder, IMAGES.folder, LATENTS.folder} & set(folders) or any(has_packs(path / name) for name in folders):
            return cls(path, "flat")
        per_sample = cls(path, "per_sample")
        if any(per_sample.files(part) for part in (LATENTS, PATH, VIDEOS, IMAGES)):
            return per_sample
        raise UserError(
            f"{path}: no data set. It has neither {VIDEOS.folder}/, {IMAGES.folder}/ nor {LATENTS.folder}/, nor a folder for "
            f"each sample with latent.* or path.*; it holds {some(folders) if folders else 'no folders'}"
        )

    def pixels(self) -> Part:
        """Where the pixels are: videos, or pictures; refuses both in one folder."""
        videos, pictures = self.files(VIDEOS), self.files(IMAGES)
        if videos and pictures:
            raise UserError(
                f"{self.root}: has {self.pattern(VIDEOS)} and {self.pattern(IMAGES)}. Put them in a folder each, and train on "
                "both with data=mix"
            )
        return IMAGES if pictures else VIDEOS

    def files(self, part: Part) -> dict[str, Path]:
        """The files of a part by stem, in the order of the stems; refuses two files for one stem."""
        by_stem: dict[str, list[Path]] = {}
        if self.form == "flat":
            for path in _visible(self.root / part.folder):
                for suffix in part.suffixes:
                    if path.name.endswith(suffix):
                        by_stem.setdefault(path.name.removesuffix(suffix), []).append(path)
        else:
            file_names = {name + suffix for name in part.names for suffix in part.suffixes}
            for folder in _visible(self.root):
                for path in _visible(folder):
                    if path.name in file_names:
                        by_stem.setdefault(folder.name, []).append(path)
        twice = [stem for stem, paths in by_stem.items() if len(paths) > 1]
        if twice:
            names = ", ".join(path.name for path in by_stem[twice[0]])
            raise UserError(
                f"{self.root}: two files for one sample ({names}) in {part.folder}: {some(twice)}. Remove one of them"
            )
        return {stem: by_stem[stem][0] for stem in sorted(by_stem)}

    def unread(self, part: Part) -> list[str]:
        """Names of files in the folder of a part that are not read for their suffix: clip.MP4, clip.mov."""
        if self.form != "flat":
            return []
        files = (path for path in _visible(self.root / part.folder) if not path.is_dir())
        return sorted(path.name for path in files if not path.name.endswith(part.suffixes))

    def file(self, part: Part, stem: str) -> Path:
        """Where the file of a sample belongs when it is written."""
        if self.form == "flat":
            return self.root / part.folder / f"{stem}{part.suffixes[0]}"
        return self.root / stem / f"{part.names[0]}{part.suffixes[0]}"

    def pattern(self, part: Part) -> str:
        """The name of a part in messages: noise/*.pickle."""
        return (
            f"{part.folder if self.form == 'flat' else '*'}/{'*' if self.form == 'flat' else part.names[0]}{part.suffixes[0]}"
        )

    def missing(self, part: Part, stems: Iterable[str]) -> str | None:
        """The message about samples that lack this part; None if none does."""
        there, names = self.files(part), list(stems)
        lacking = [stem for stem in names if stem not in there]
        if not lacking:
            return None
        others = sorted(set(there) - set(names))
        hint = f"; it has files of other names: {some(others)}" if others else ""
        return f"{len(lacking)} of {len(names)} lack {self.pattern(part)}: {some(lacking)}{hint}"


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [Path(entry.path) for entry in os.scandir(folder) if not entry.name.startswith(".")]
