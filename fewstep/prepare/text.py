"""Embeds captions with a text encoder once: metas/*.txt -> t5_xxl/*.pickle, or packs.

A pickle holds [float16 (tokens, D)] as `get_t5_embeddings.py` of Cosmos writes it. Zeros after the last token are left out, and
restored when the file is read; padding with embeddings of its own (Flux, CogVideoX, CLIP, Reason1) is kept, because those
networks attend to it. Captions are encoded one by one, so that a batch size never changes a bit; equal captions are encoded
once.
"""

from __future__ import annotations

import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fewstep.data.files.arrays import write_pickle
from fewstep.data.files.packs import Label, has_packs, open_writer
from fewstep.data.folder import layout, parts
from fewstep.data.folder.layout import Layout
from fewstep.data.folder.samples import captions_of, hash_of_text, read_caption, text_ledger
from fewstep.errors import UserError, some
from fewstep.files import write_bytes, write_json, write_text
from fewstep.networks.encoders.text import TextEncoder, stored_embedding, stored_pooled
from fewstep.prepare.ledger import open_ledger
from fewstep.prepare.summary import Summary
from fewstep.progress import track
from fewstep.untrusted.text import read_bytes, read_json

Form = Literal["pickle", "packed"]


def write(
    dataset_dir: str | Path, encoder: TextEncoder, *, folder: str = "t5_xxl", prompt: str | None = None, form: Form = "pickle"
) -> Summary:
    """Embeds every caption that is not embedded, or whose text changed; `prompt` becomes the caption of every clip first.

    Refuses missing and empty captions, a folder made with another encoder, and captions that `prompt` would replace.
    """
    place = _opened(dataset_dir, prompt)
    part = layout.text(folder)
    if prompt is not None:
        _write_prompt(place, prompt)
    texts = captions(place)
    made_from = {"encoder": encoder.fingerprint, "dtype": "float16"}
    items = track(texts.items(), len(texts), f"embedding into {folder}")
    if form == "packed":
        if stored_pooled(encoder, "") is not None:
            raise UserError(
                "--format packed: holds tokens only, and this encoder also gives pooled vectors of texts. Take --format pickle"
            )
        embed = lru_cache(maxsize=64)(lambda text: stored_embedding(encoder, text))
        if place.files(part):
            raise UserError(
                f"{place.root / folder}: holds single files, which packs would hide. Remove them, or --format pickle"
            )
        labels = [Label(stem, hash_of_text(text)) for stem, text in texts.items()]
        with open_writer(place.root / folder, made_from, lengths_differ=True) as writer:
            writer.keep_only(labels)
            for label, (_, text) in zip(labels, items, strict=True):
                writer.put(label, lambda text=text: embed(text))
        return Summary(len(texts), writer.new)
    if has_packs(place.root / folder):
        raise UserError(f"{place.root / folder}: holds packs, which would hide single files. Remove them, or --format packed")
    content = lru_cache(maxsize=64)(lambda text: _content(encoder, text))
    new = foreign = 0
    with open_ledger(text_ledger(place, folder), made_from, lambda stem: place.file(part, stem)) as ledger:
        for stem, text in items:
            state = ledger.state(stem, hash_of_text(text))
            foreign += state == "foreign"
            if state == "todo":
                value = content(text)
                ledger.begin(stem, hash_of_text(text))
                write_pickle(place.file(part, stem), value)
                new += 1
    return Summary(len(texts), new, foreign)


def negative_file(folder: Path, into: str) -> Path:
    """Where the negative of the embeddings in `into` belongs: negative.pickle, and of a second encoder a file of its own."""
    return folder / ("negative.pickle" if into == "t5_xxl" else f"{into}_negative.pickle")


def check_negative(folder: Path, into: str, encoder: TextEncoder, text: str) -> None:
    """Refuses to replace the negative of another encoder, or one that this command did not write."""
    file, record = negative_file(folder, into), _negative_record(folder, into)
    if not file.is_file():
        return
    before = read_json(record, f"Remove {file} and embed it again").get("encoder") if record.is_file() else None
    if before == encoder.fingerprint or (before is None and read_bytes(file) == _negative_bytes(encoder, text)):
        return
    whose = (
        "was not written by this command" if before is None else f"is of the encoder {before!r}, not {encoder.fingerprint!r}"
    )
    raise UserError(f"{file}: {whose}. Give each encoder a folder with --into, or remove that file")


def write_negative(folder: Path, into: str, encoder: TextEncoder, text: str) -> Path:
    """Embeds a negative prompt in the same layout, and returns its file."""
    file = negative_file(folder, into)
    write_json(_negative_record(folder, into), {"encoder": encoder.fingerprint, "text": text})
    write_bytes(file, _negative_bytes(encoder, text))
    return file


def _negative_record(folder: Path, into: str) -> Path:
    file = negative_file(folder, into)
    return file.with_name(f".made.{file.stem}.json")


def _negative_bytes(encoder: TextEncoder, text: str) -> bytes:
    return pickle.dumps(_content(encoder, text), protocol=4)  # as arrays.write_pickle


def _content(encoder: TextEncoder, text: str) -> Any:  # plain data
    return parts.stored_embedding(stored_embedding(encoder, text), stored_pooled(encoder, text))


def captions(place: Layout) -> dict[str, str]:
    """The caption of every clip by stem; refuses missing, empty and unreadable ones, by name."""
    files = place.files(layout.CAPTIONS)
    stems = list(place.files(layout.VIDEOS) or place.files(layout.LATENTS) or files)
    problem = place.missing(layout.CAPTIONS, stems)
    problems = [f"{problem}. Write one for each clip, or give one to all: --prompt TEXT"] if problem else []
    texts, unusable = captions_of(place, [stem for stem in stems if stem in files])
    problems += unusable
    if problems or not stems:
        raise UserError("\n".join(f"{place.root}: {problem}" for problem in problems or ["has no clips and no captions"]))
    return texts


# ---- parts of the above --------------------------------------------------------------------------------------------


def _opened(dataset_dir: str | Path, prompt: str | None) -> Layout:
    root = Path(dataset_dir)
    if prompt is None and (root / layout.CAPTIONS.folder).is_dir():  # prompts alone, for pairs that a teacher is to make
        return Layout(root)
    return Layout.open(root)


def _write_prompt(place: Layout, prompt: str) -> None:
    """Writes the same caption for every clip; another caption is never replaced."""
    prompt, files = prompt.strip(), place.files(layout.CAPTIONS)
    if not prompt:
        raise UserError("--prompt is empty: give the text that all clips have")
    other = [stem for stem, path in files.items() if read_caption(path) != prompt]
    if other:
        raise UserError(
            f"{place.root}: {len(other)} captions in {place.pattern(layout.CAPTIONS)} say something else than --prompt: "
            f"{some(other)}. Leave --prompt out to embed them, or remove them"
        )
    for stem in place.files(layout.VIDEOS) or place.files(layout.LATENTS):
        if stem not in files:
            write_text(place.file(layout.CAPTIONS, stem), prompt + "\n")
