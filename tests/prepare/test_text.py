"""Embedded captions come back as the encoder gave them, in the layout of Cosmos; files of others are never replaced."""

import json
import pickle
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import cli
from fewstep.data.check.survey import survey
from fewstep.data.files import video
from fewstep.data.files.arrays import write_pickle
from fewstep.data.folder.dataset import Folder
from fewstep.data.folder.texts import Texts
from fewstep.prepare import text

CAPTIONS = {"a": "a red ball", "b": "a blue box rolls", "c": "a red ball", "d": "nothing"}


class Words:
    """A number for each word, on four channels; counts what it is asked."""

    dim, max_tokens = 4, 6

    def __init__(self, fingerprint: str = "words", pads_with: float = 0.0, factor: float = 1.0):
        self.fingerprint, self.pads_with, self.factor = fingerprint, pads_with, factor
        self.asked: list[str] = []

    def pooled(self, prompts: Sequence[str]) -> None:
        return None

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.asked += prompts
        out = torch.full((len(prompts), self.max_tokens, self.dim), self.pads_with)
        mask = torch.zeros(len(prompts), self.max_tokens, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            for place, word in enumerate(prompt.split()):
                out[row, place] = self.factor * (zlib.crc32(word.encode()) % 1000) / 8 + torch.arange(4)
                mask[row, place] = True
        return out, mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for stem, caption in CAPTIONS.items():
        video.write(tmp_path / "videos" / f"{stem}.mp4", np.zeros((2, 8, 8, 3), np.uint8), 8)
        (tmp_path / "metas").mkdir(exist_ok=True)
        (tmp_path / "metas" / f"{stem}.txt").write_text(caption + "\n")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("form", ["pickle", "packed"])
def test_what_training_reads_is_what_the_encoder_gave(folder: Path, form: text.Form) -> None:
    encoder = Words()
    assert text.write(folder, encoder, form=form) == text.Summary(4, 4, 0)
    assert sorted(encoder.asked) == sorted(set(CAPTIONS.values()))  # equal captions once
    index = torch.tensor([0, 1, 2, 3])
    cond = Folder(str(folder), max_tokens=6, mask_text=True).open().batch(index).cond
    # Networks that attend to padding, Cosmos among them, are not told where it begins.
    assert Folder(str(folder), max_tokens=6).open().batch(index).cond.text_mask is None
    wanted, mask = Words().encode(list(CAPTIONS.values()))
    assert cond.text is not None and cond.text_mask is not None
    assert torch.equal(cond.text, wanted) and torch.equal(cond.text_mask, mask)
    assert (folder / "t5_xxl" / "packs").is_dir() == (form == "packed")


def test_the_pickle_has_the_exact_layout_of_cosmos(folder: Path) -> None:
    text.write(folder, Words())
    value: Any = pickle.loads((folder / "t5_xxl" / "b.pickle").read_bytes())
    assert type(value) is list and len(value) == 1 and type(value[0]) is np.ndarray
    assert value[0].dtype == np.float16 and value[0].shape == (4, 4)  # tokens, numbers


def test_padding_that_networks_attend_to_is_kept(folder: Path) -> None:
    text.write(folder, Words(pads_with=0.5))
    value: Any = pickle.loads((folder / "t5_xxl" / "a.pickle").read_bytes())
    assert value[0].shape == (6, 4) and (value[0][3:] == 0.5).all()


@pytest.mark.parametrize("form", ["pickle", "packed"])
def test_a_rerun_embeds_what_is_new_or_changed(folder: Path, form: text.Form) -> None:
    text.write(folder, Words(), form=form)
    before = content(folder)
    assert text.write(folder, Words(), form=form) == text.Summary(4, 0, 0)
    assert content(folder) == before
    (folder / "metas" / "d.txt").write_text("something else")
    encoder = Words()
    assert text.write(folder, encoder, form=form).new == 1
    assert encoder.asked == ["something else"]
    (folder / "metas" / "d.txt").write_text("nothing\n")
    text.write(folder, Words(), form=form)
    found = Folder(str(folder), max_tokens=6).open().batch(torch.arange(4)).cond.text
    assert found is not None and torch.equal(found, Words().encode(list(CAPTIONS.values()))[0])


@pytest.mark.parametrize("form", ["pickle", "packed"])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_stopped_and_run_again_it_is_as_if_nothing_had_happened(folder: Path, form: text.Form, stop: int) -> None:
    class Dies(Words):
        def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
            if len(self.asked) == stop:
                raise KeyboardInterrupt
            return super().encode(prompts)

    with pytest.raises(KeyboardInterrupt):
        text.write(folder, Dies(), form=form)
    first, second = stop, Words()
    text.write(folder, second, form=form)
    assert len(second.asked) <= 3 - first + (1 if first else 0)  # `a red ball` of clip c may be asked for a second time
    stopped = content(folder / "t5_xxl")
    for path in sorted((folder / "t5_xxl").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    text.write(folder, Words(), form=form)
    assert content(folder / "t5_xxl") == stopped


@pytest.mark.parametrize("form", ["pickle", "packed"])
def test_a_caption_that_was_edited_since_is_named_by_whoever_reads_its_embedding(folder: Path, form: text.Form) -> None:
    text.write(folder, Words(), form=form)
    settings = Folder(str(folder), text="t5_xxl")
    assert len(settings.open()) == len(Texts.open(settings).captions) == len(CAPTIONS)
    (folder / "metas" / "b.txt").write_text("a green box rolls\n")
    said = "1 of 4 captions have changed since t5_xxl/ was made of them: b. Run fewstep prepare text again"
    for reader in (settings.open, lambda: Texts.open(settings)):
        with pytest.raises(ValueError, match=said):
            reader()
    assert said in [problem.message for problem in survey(folder, num_threads=1).problems if problem.kind == "stale-t5_xxl"]
    assert text.write(folder, Words(), form=form).new == 1
    assert len(settings.open()) == len(CAPTIONS)


def test_a_line_cut_off_by_a_kill_is_no_damage(folder: Path) -> None:
    text.write(folder, Words())
    ledger, before = folder / "t5_xxl" / ".made.jsonl", content(folder)
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])
    (folder / "t5_xxl" / "d.pickle").unlink()  # its line comes first
    assert text.write(folder, Words()) == text.Summary(4, 1, 0)
    assert content(folder) == before
    ledger.write_bytes(b"?\n")
    with pytest.raises(ValueError, match="damaged"):
        text.write(folder, Words())
    for name in ("../x", "..", "", 300 * "n"):
        ledger.write_bytes(lines[0] + json.dumps({"name": name, "content": "y"}).encode() + b"\n")
        with pytest.raises(ValueError, match=rf"names '{re.escape(name[:40])}.*, which is no file of its folder"):
            text.write(folder, Words())


def test_files_of_someone_else_are_kept(folder: Path) -> None:
    write_pickle(folder / "t5_xxl" / "b.pickle", [np.ones((2, 4), np.float16)])
    before = (folder / "t5_xxl" / "b.pickle").read_bytes()
    assert text.write(folder, Words()) == text.Summary(4, 3, 1)
    assert text.write(folder, Words()) == text.Summary(4, 0, 1)
    assert (folder / "t5_xxl" / "b.pickle").read_bytes() == before


def test_another_encoder_is_refused_until_its_files_are_gone(folder: Path) -> None:
    text.write(folder, Words())
    with pytest.raises(ValueError, match=r"encoder is 'words', not 'other'.*remove its 4 files"):
        text.write(folder, Words("other"))
    assert text.write(folder, Words("other"), folder="other").new == 4
    for path in (folder / "t5_xxl").glob("*.pickle"):
        path.unlink()
    assert text.write(folder, Words("other")).new == 4
    with pytest.raises(ValueError, match="holds single files, which packs would hide"):
        text.write(folder, Words("other"), form="packed")
    text.write(folder, Words(), folder="packed", form="packed")
    with pytest.raises(ValueError, match="holds packs, which would hide single files"):
        text.write(folder, Words(), folder="packed")


def test_one_prompt_for_all_as_the_nemo_assets_want_it(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"4 captions in metas/\*\.txt say something else than --prompt: a, b, c, d\. Leave"):
        text.write(folder, Words(), prompt="sks teal robot")
    for stem in "abc":
        (folder / "metas" / f"{stem}.txt").unlink()
    (folder / "metas" / "d.txt").write_text(" sks teal robot ")
    encoder = Words()
    assert text.write(folder, encoder, prompt="sks teal robot").new == 4
    assert encoder.asked == ["sks teal robot"]
    assert (folder / "metas" / "a.txt").read_text() == "sks teal robot\n"
    with pytest.raises(ValueError, match="--prompt is empty"):
        text.write(folder, Words(), prompt=" ")


def test_missing_and_empty_captions_are_named(folder: Path) -> None:
    (folder / "metas" / "a.txt").unlink()
    (folder / "metas" / "b.txt").write_text(" \n")
    (folder / "metas" / "c.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError) as told:
        text.write(folder, Words())
    for words in (r"1 of 4 lack metas/*.txt: a", "captions are empty: b", "the caption of c is not UTF-8 text"):
        assert words in str(told.value)
    assert not (folder / "t5_xxl").exists()


def test_numbers_beyond_float16_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="has numbers that float16 does not hold"):
        text.write(folder, Words(factor=1e6))


def test_prompts_alone_are_embedded_for_pairs_that_are_still_to_be_made(tmp_path: Path) -> None:
    (tmp_path / "metas").mkdir()
    (tmp_path / "metas" / "p0.txt").write_text("a red ball")
    assert text.write(tmp_path, Words()).new == 1


def test_a_folder_for_each_sample(tmp_path: Path) -> None:
    for stem in ("000000", "000001"):
        video.write(tmp_path / stem / "video.mp4", np.zeros((2, 8, 8, 3), np.uint8), 8)
        (tmp_path / stem / "prompt.txt").write_text(f"clip {stem}")
    assert text.write(tmp_path, Words()) == text.Summary(2, 2, 0)
    assert (tmp_path / "000001" / "t5_xxl.pickle").is_file()
    assert text.write(tmp_path, Words()) == text.Summary(2, 0, 0)
    cond = Folder(str(tmp_path), max_tokens=6).open().batch(torch.tensor([1])).cond
    assert cond.text is not None and torch.equal(cond.text, Words().encode(["clip 000001"])[0])


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.networks.encoders.text.open_text_encoder", lambda *_, **__: Words())
    words = ["prepare", "text", str(folder), "--text-encoder", "owner/x", "--negative-prompt", "blurry"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{folder / 't5_xxl'}: 4 captions, 4 of them new\n"
    batch = Folder(str(folder), max_tokens=6, negative="negative.pickle").open().batch(torch.tensor([0]))
    assert batch.negative is not None and batch.negative.text is not None
    assert torch.equal(batch.negative.text, Words().encode(["blurry"])[0])
    assert cli.main([*words, "--format", "csv"]) == 2
    assert "'csv' is not one of pickle, packed" in capsys.readouterr().err
    assert cli.main([*words, "--into", "../elsewhere"]) == 2
    assert "--into names a folder" in capsys.readouterr().err


def test_the_negative_of_another_encoder_is_not_replaced(tmp_path: Path) -> None:
    """The second encoder's silently took the place of the first one's, and training read it."""
    (tmp_path / "metas").mkdir()
    (tmp_path / "metas" / "a.txt").write_text("red dog")
    first, second = Words(), Words("other")
    text.check_negative(tmp_path, "t5_xxl", first, "blurry")
    assert text.write_negative(tmp_path, "t5_xxl", first, "blurry") == tmp_path / "negative.pickle"
    before = (tmp_path / "negative.pickle").read_bytes()
    with pytest.raises(ValueError, match=r"negative\.pickle: is of the encoder .*Give each encoder a folder with --into"):
        text.check_negative(tmp_path, "t5_xxl", second, "blurry")
    text.check_negative(tmp_path, "t5_own", second, "blurry")
    assert text.write_negative(tmp_path, "t5_own", second, "blurry") == tmp_path / "t5_own_negative.pickle"
    assert (tmp_path / "negative.pickle").read_bytes() == before
    text.check_negative(tmp_path, "t5_xxl", first, "dark")  # another text of the same encoder
    (tmp_path / ".made.negative.json").unlink()
    text.check_negative(tmp_path, "t5_xxl", first, "blurry")  # the same bytes
    with pytest.raises(ValueError, match="was not written by this command"):
        text.check_negative(tmp_path, "t5_xxl", first, "dark")
