"""The folder of pairs: which prompts have theirs, under which number, and whether it was made by the settings of now.

OUT/pairs.json has all that decides a clip; other settings are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.data.files import arrays
from fewstep.data.folder.parts import stored_embedding
from fewstep.diffusion import Path as NoisePath
from fewstep.diffusion import TeacherSampler
from fewstep.errors import UserError, some
from fewstep.files import write_json
from fewstep.inference.pair_files import Form, Pair, PairFiles, Quality, check_form, evenly
from fewstep.inference.pair_prompts import FilePrompts, PairPrompts, hash_of
from fewstep.inference.record import differences
from fewstep.untrusted.text import read_json

RECORD = "pairs.json"
ORDER = "order"  # of pairs.json: the stems, in the order of their numbers
NUM_COMPARED = 3  # pairs whose embedding is compared with that of now


@dataclass(frozen=True)
class PairSettings:
    """How each pair is made."""

    sampler: TeacherSampler
    seed: int = 0
    path_times: tuple[float, ...] = ()  # states to keep, in the time of the teacher's path
    given_frames: int = 0  # clean latent frames of the data set's own clip that the teacher receives
    quality: Quality = 18  # of the mp4
    form: Form = "ours"

    def check(self, path: NoisePath) -> None:
        """Refuses path times that the sampler cannot keep on this path."""
        for problem in self.sampler.problems_of(self.path_times, path):
            raise UserError(f"--path-times: {problem}")


@dataclass(frozen=True)
class PairFolder:
    """The folder of pairs, and the number of each prompt in it."""

    files: PairFiles
    prompts: PairPrompts
    order: Mapping[str, int]  # number of each prompt by its stem
    record: Mapping[str, Any] | None  # to be written with the first pair; None: it is there

    @classmethod
    def of(cls, out: Path, prompts: PairPrompts, settings: PairSettings, record: dict[str, Any] | None) -> PairFolder:
        """Refuses a folder that holds pairs made with other settings, texts or captions. Writes nothing."""
        texts = prompts.record()
        control = texts["control"]
        check_form(settings.form, control, prompts.text(0))
        text = texts.get("text", "t5_xxl")
        files = PairFiles(out, settings.form, text, bool(settings.path_times), control, settings.quality)
        path, before = out / RECORD, dict[str, Any]()
        if record is not None:
            record = json.loads(json.dumps(record))
        if path.is_file():
            before = read_json(path, f"Remove {out} and make its pairs again")
            now = {key: value for key, value in (record or {}).items() if key in before}
            other = [f"{key} {old!r}, not {new!r}" for key, old, new in differences(before, now)]
            if other:
                raise UserError(f"{out}: holds pairs made otherwise: {'; '.join(other)}. Choose another --out, or remove it")
        elif out.is_dir() and any(not entry.name.startswith(".") for entry in list(out.iterdir())):
            if path.is_file():  # another rank has just written it
                return cls.of(out, prompts, settings, record)
            raise UserError(f"{out}: is not empty and has no {RECORD}. Choose a new folder for --out")
        stems = list(dict.fromkeys([*before.get(ORDER, prompts.stems), *prompts.stems]))
        whole = None if record is None else {**record, ORDER: stems}
        folder = cls(files, prompts, {stem: number for number, stem in enumerate(stems)}, None if whole == before else whole)
        folder._refuse_other_texts()
        return folder

    def name(self, row: int) -> str:
        stem = self.prompts.stems[row]
        return self.files.name(stem, self.order[stem])

    def numbers(self, rows: Sequence[int]) -> list[int]:
        return [self.order[self.prompts.stems[row]] for row in rows]

    def checked_num(self, num: int | None) -> int:
        there = len(self.prompts.stems)
        num = there if num is None else num
        if not 1 <= num <= there:
            raise UserError(f"--num {num}: {self.prompts.record()['source']} has {there} samples")
        return num

    def todo(self, num: int) -> list[int]:
        return [row for row in range(num) if not self.files.has(self.name(row))]

    def write(self, pairs: Mapping[int, Pair]) -> None:
        """Writes pairs, by their rows; before the first of them pairs.json, which every rank does with the same content."""
        if self.record is not None and (not (self.files.root / RECORD).is_file() or self._has_new_stems()):
            write_json(self.files.root / RECORD, self.record)
        if isinstance(self.prompts, FilePrompts):
            negative = self.prompts.negative_text()
            file = self.files.root / "negative.pickle"
            if negative is not None and not file.is_file():
                arrays.write_pickle(file, stored_embedding(**negative))
        for row, pair in pairs.items():
            self.files.write(self.name(row), pair)

    def _has_new_stems(self) -> bool:
        assert self.record is not None
        return read_json(self.files.root / RECORD, "Remove it").get(ORDER) != self.record[ORDER]

    def _refuse_other_texts(self) -> None:
        """Refuses pairs whose caption or embedding is another one now: all captions, and the embeddings of a few."""
        there = [row for row in range(len(self.prompts.stems)) if self.files.has(self.name(row))]
        other = [self.name(row) for row in there if self.files.caption(self.name(row)) != self.prompts.captions[row]]
        if other:
            raise UserError(
                f"{self.files.root}: {len(other)} pairs were made of other captions than {self.prompts.record()['source']} has "
                f"now: {some(other)}. Remove their files, or choose another --out"
            )
        if isinstance(self.prompts, FilePrompts):
            return  # the encoder's fingerprint is in the record
        for row in evenly(there, NUM_COMPARED):
            before, now = self.files.embedding(self.name(row)), self.prompts.text(row)
            now = arrays.read_one(now, "text") if isinstance(now, Path) else None if now is None else now["text"]
            if before is not None and now is not None and hash_of(before) != hash_of(now):
                raise UserError(
                    f"{self.files.root}: the pair {self.name(row)} was made of another text embedding than "
                    f"{self.prompts.record()['source']} has now. Embed with the same encoder, or choose another --out"
                )
