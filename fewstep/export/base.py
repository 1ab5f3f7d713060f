"""The parts of a pipeline that a student takes from its base: codec, text encoders, tokenizers.

A base is a folder from somewhere else, and what is exported from it may be published. Only parts and kinds of file that are
data are copied, under classes of diffusers and transformers; links are not followed; nothing is shared with the base.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fewstep.errors import UserError
from fewstep.files import read_json

PARTS = (
    *("vae", "image_encoder", "feature_extractor", "image_processor"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
)
LIBRARIES = ("diffusers", "transformers")
SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # configurations, weights, vocabularies, chat templates
ADVICE = "Copy that folder again"


def copy_parts(base: Path, out: Path, index: dict[str, Any]) -> str:
    """Copies the base's parts into `out`, enters them and the pipeline's settings in `index`; returns the pipeline's class.

    The class is "" where it is none of diffusers. Raises UserError for links, and for parts that ask for code of their own.
    """
    base = base.resolve()
    entries = read_json(base / "model_index.json", ADVICE)
    if not isinstance(entries, dict):
        raise UserError(f"{base / 'model_index.json'}: expected a mapping. {ADVICE}")
    for name, entry in entries.items():
        if not name.startswith("_") and name.isidentifier() and isinstance(entry, bool | int | float):
            index[name] = entry  # a setting of the pipeline
    for name in PARTS:
        if not (base / name).is_dir() or (out / name).exists():
            continue
        entry = entries.get(name)
        if _is_class(entry):
            index[name] = entry
        elif name != "text_encoder":  # one of no known class is read by pipeline.py, which knows some more
            continue
        _copy(base, base / name, out / name)
    return _pipeline_class(entries.get("_class_name"))


def copy_scheduler(base: Path, out: Path, index: dict[str, Any]) -> bool:
    """Copies the base's scheduler and enters it in `index`, if it is a class of diffusers."""
    base = base.resolve()
    entry = read_json(base / "model_index.json", ADVICE).get("scheduler")
    if not _is_class(entry) or entry[0] != "diffusers" or not (base / "scheduler").is_dir():
        return False
    _copy(base, base / "scheduler", out / "scheduler")
    index["scheduler"] = entry
    return True


def _is_class(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
        return False
    return entry[0] in LIBRARIES and entry[1].isidentifier()


def _pipeline_class(name: Any) -> str:
    import diffusers

    return name if isinstance(name, str) and name.endswith("Pipeline") and hasattr(diffusers, name) else ""


def _copy(base: Path, part: Path, target: Path) -> None:
    if part.is_symlink():
        raise UserError(f"--base {part}: is a symbolic link; copy the folder itself there")
    target.mkdir()
    files = [file for file in sorted(part.iterdir()) if file.suffix in SUFFIXES]
    for file in files:
        source = _target_of(base, file)
        if file.suffix == ".json":
            _refuse_own_code(source, file)
        shutil.copyfile(source, target / file.name)
    has_weights = any(file.suffix == ".bin" for file in part.iterdir())
    if has_weights and not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"--base {part}: has its weights as a pickle only. Save it again with save_pretrained, as safetensors")


def _target_of(base: Path, file: Path) -> Path:
    """The file itself; of a snapshot in the hub's cache, whose files are links into the cache, the cached file."""
    target = file.resolve()
    is_cached = base.parent.name == "snapshots" and target.parent == base.parents[1] / "blobs"
    if file.is_symlink() and not is_cached:
        raise UserError(f"--base {file}: is a symbolic link, which is not followed; copy the file itself there")
    if not target.is_file():
        raise UserError(f"--base {file}: is no file")
    return target


def _refuse_own_code(source: Path, file: Path) -> None:
    try:
        config = json.loads(source.read_text())
    except ValueError:
        raise UserError(f"--base {file}: damaged, no JSON. {ADVICE}") from None
    if isinstance(config, dict) and ("auto_map" in config or "custom_pipelines" in config):
        raise UserError(f"--base {file}: asks for code of its own (auto_map), which is not exported. Remove that entry")
