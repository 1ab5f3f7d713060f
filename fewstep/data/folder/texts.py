"""Captions and their embeddings, whether or not there are clips: metas/*.txt and t5_xxl/*.pickle (or packs).

    texts = Texts.open(Folder("prompts", negative="zeros"))     # a folder with metas/ and t5_xxl/ alone is enough
    cond, negative = texts.conditions([0, 1])

A tensor is what `Folder` would have read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.data.files import arrays
from fewstep.data.files.packs import Packs, has_packs, open_packs
from fewstep.data.folder import layout, parts
from fewstep.data.folder.layout import Layout
from fewstep.data.folder.parts import Embedding
from fewstep.data.folder.samples import captions_of, refuse, stale_problem
from fewstep.data.folder.settings import FolderSettings
from fewstep.errors import UserError, some


@dataclass(frozen=True)
class Texts:
    """The captions of a folder, in the order of its stems, with their embeddings."""

    spec: FolderSettings
    place: Layout
    stems: tuple[str, ...]
    captions: tuple[str, ...]
    files: Mapping[str, Path]  # of embeddings by stem; empty where they are packed
    packs: Packs | None = None

    @classmethod
    def open(cls, spec: FolderSettings) -> Texts:
        """Raises UserError, by name, for captions or embeddings that are missing or empty."""
        place = opened(spec.dataset_dir)
        captions = place.files(layout.CAPTIONS)
        stems = list(place.files(layout.VIDEOS) or place.files(layout.IMAGES) or place.files(layout.LATENTS) or captions)
        packed = place.root / layout.LATENTS.folder
        if not (place.files(layout.VIDEOS) or place.files(layout.IMAGES)) and place.form == "flat" and has_packs(packed):
            stems = list(open_packs(packed).by_stem())
        if not stems:
            raise UserError(f"{place.root}: has no {place.pattern(layout.CAPTIONS)}. Write one text for each clip to be made")
        problem = place.missing(layout.CAPTIONS, stems)
        texts, problems = captions_of(place, [stem for stem in stems if stem in captions])
        problems += [problem] if problem else []
        files: Mapping[str, Path] = {}
        packs = None
        if spec.text is not None:
            part, folder = layout.text(spec.text), place.root / spec.text
            if place.form == "flat" and has_packs(folder):
                packs = open_packs(folder)
                there = packs.by_stem()
                lacking = [stem for stem in stems if stem not in there]
                problem = f"{len(lacking)} of {len(stems)} lack a row in {folder}/packs: {some(lacking)}" if lacking else None
            else:
                files = place.files(part)
                problem = place.missing(part, stems)
            problems += stale_problem(place, spec.text, texts, packs)
            problems += [f"{problem}. Embed the captions: fewstep prepare text"] if problem else []
        refuse(place, problems)
        return cls(spec, place, tuple(stems), tuple(texts[stem] for stem in stems), files, packs)

    def tokens(self, row: int) -> Tensor:
        """(N, D): the embedding of a caption as it is stored."""
        stem = self.stems[row]
        if self.packs is not None:
            return self.packs.read(self.packs.by_stem()[stem][0])
        return arrays.read_one(self.files[stem], "text")

    def conditions(self, rows: Sequence[int]) -> tuple[Condition, Condition | None]:
        """The text of these captions, and what guidance pushes away from."""
        spec = self.spec
        if spec.text is None:
            return Condition(), None
        embeddings = [self._embedding(row) for row in rows]
        cond = condition_of(embeddings, spec.mask_text)
        if spec.negative is None:
            return cond, None
        like = embeddings[0]
        if spec.negative == "zeros":
            return cond, negative_of(cond, like.zeros())
        return cond, negative_of(cond, parts.negative_embedding(self.place.root / spec.negative, like, spec.text))

    def _embedding(self, row: int) -> Embedding:
        most = self.spec.max_tokens
        if self.packs is None:
            return parts.embedding(self.files[self.stems[row]], most)
        return parts.padded(self.place.root / self.stems[row], self.tokens(row), most)


def condition_of(embeddings: Sequence[Embedding], uses_mask: bool) -> Condition:
    """The texts of a batch, in float32."""
    pooled = [embedding.pooled.float() for embedding in embeddings if embedding.pooled is not None]
    return Condition(
        text=torch.stack([embedding.text.float() for embedding in embeddings]),
        text_mask=torch.stack([embedding.mask for embedding in embeddings]) if uses_mask else None,
        pooled=torch.stack(pooled) if pooled else None,
    )


def negative_of(cond: Condition, negative: Embedding) -> Condition:
    """`cond` with another text, the same for every row."""

    def rows(value: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if value is None or like is None else value.to(like.dtype).expand_as(like).contiguous()

    text, mask = rows(negative.text, cond.text), rows(negative.mask, cond.text_mask)
    return replace(cond, text=text, text_mask=mask, pooled=rows(negative.pooled, cond.pooled))


def opened(root: str | Path) -> Layout:
    """The layout of a data set, or of a folder with captions alone."""
    if (Path(root) / layout.CAPTIONS.folder).is_dir():
        return Layout(Path(root))
    return Layout.open(root)
