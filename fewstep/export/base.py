"""The parts of a pipeline that a student takes with it: codec, text encoders, tokenizers.

They come from folders from somewhere else, and what is exported from them may be published. Only parts and kinds of file that
are data are copied, under classes of diffusers and transformers; links are not followed; nothing is shared with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from fewstep.errors import UserError
from fewstep.files import copy_file, make_folder, write_json
from fewstep.networks.encoders.codecs import form_of, read_statistics
from fewstep.networks.encoders.text import MODELS as TEXT_MODELS
from fewstep.networks.files import hub
from fewstep.untrusted.text import MAX_JSON_BYTES, parse_json, read_bytes, read_json

PARTS = (
    *("vae", "image_encoder", "feature_extractor", "image_processor"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
)
LIBRARIES = ("diffusers", "transformers")
SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # configurations, weights, vocabularies, chat templates
FILES = ["model_index.json", *(f"{part}/*{suffix}" for part in (*PARTS, "scheduler") for suffix in SUFFIXES)]  # of a pipeline
CODEC_FILES = ["config.json", "diffusion_pytorch_model*.safetensors", "vae/*"]
TEXT_FILES = ["config.json", "model*", "text_encoder*/*", "tokenizer*", "spiece.model", "special_tokens_map.json", "*.txt"]
MODEL_CONFIGS = ("config.json", "generation_config.json")
DENOISERS = ("transformer", "unet")  # of which the configuration is read
ADVICE = "Copy that folder again"


@dataclass(frozen=True)
class _Architectures:
    """What is read of the config.json of a text encoder."""

    architectures: list[str] | None = None


@dataclass(frozen=True)
class Base:
    """Local folders that the parts come from; `codec` and `text_encoder` replace those of the pipeline."""

    pipeline: Path | None = None
    codec: Path | None = None
    text_encoder: Path | None = None

    @classmethod
    def of(cls, pipeline: str | Path | None, codec: str | None = None, text_encoder: str | None = None) -> Base:
        """The folders at these addresses; those of the hub are downloaded into its cache, without the denoiser."""
        configs = [f"{part}/config.json" for part in DENOISERS]
        base = cls(
            None if pipeline is None else hub.folder_of(str(pipeline), [*FILES, *configs], "pipeline"),
            None if codec is None else hub.folder_of(codec, CODEC_FILES, "codec"),
            None if text_encoder is None else hub.folder_of(text_encoder, TEXT_FILES, "text encoder"),
        )
        if base.pipeline is not None and not (base.pipeline / "model_index.json").is_file():
            raise UserError(f"--base {pipeline}: is no folder of a diffusers pipeline, it has no model_index.json")
        return base

    def copy_parts(self, out: Path, index: dict[str, Any]) -> str:
        """Copies the parts into `out`, enters them and the pipeline's settings in `index`; returns the pipeline's class.

        The class is "" where it is none of diffusers. Raises UserError for links, and for parts that ask for code of their own.
        """
        if self.codec is not None:
            _copy_codec(self.codec.resolve(), out, index)
        if self.text_encoder is not None:
            _copy_text_encoder(self.text_encoder.resolve(), out, index)
        return "" if self.pipeline is None else _copy_pipeline(self.pipeline.resolve(), out, index)


def _copy_pipeline(base: Path, out: Path, index: dict[str, Any]) -> str:
    """Copies the parts of a pipeline that are not in `out`, and returns its class."""
    entries = read_json(base / "model_index.json", ADVICE)
    for name, entry in entries.items():
        if not name.startswith("_") and name.isidentifier() and isinstance(entry, bool | int | float):
            index[name] = entry  # a setting of the pipeline
    has_own_text = (out / "text_encoder").exists()
    for name in PARTS:
        if not (base / name).is_dir() or (out / name).exists() or (has_own_text and name.startswith(("text_", "tokenizer"))):
            continue
        entry = entries.get(name)
        if _is_class(entry):
            index[name] = entry
        elif name != "text_encoder":  # one of no known class is read by pipeline.py, which knows some more
            continue
        _copy(base, base / name, out / name)
    return _pipeline_class(entries.get("_class_name"))


def _copy_codec(folder: Path, out: Path, index: dict[str, Any]) -> None:
    source = folder / "vae" if (folder / "vae").is_dir() else folder
    form = form_of(source)  # refuses classes that are not known
    _copy(folder, source, out / "vae", needs_weights=True)
    config = read_json(out / "vae" / "config.json", ADVICE)
    index["vae"] = ["diffusers", config["_class_name"]]
    statistics = source / "mean_std.pt"
    if statistics.is_file() and config.get("latents_mean") is None:
        # Of an original tokenizer; diffusers has them in the configuration.
        mean, std = read_statistics(statistics, form.channels)
        write_json(out / "vae" / "config.json", config | {"latents_mean": _flat(mean), "latents_std": _flat(std)})


def _flat(values: Any) -> list[float]:  # a tensor
    return [float(value) for value in values.flatten()]


def _copy_text_encoder(folder: Path, out: Path, index: dict[str, Any]) -> None:
    """Copies an encoder with its tokenizer, which lies beside it in a folder of its own, or among its files."""
    is_pipeline = (folder / "text_encoder").is_dir()
    there = [name for name in PARTS if name.startswith("text_") and (folder / name).is_dir()]
    for part in there if is_pipeline else ["text_encoder"]:
        source = folder / part if is_pipeline else folder
        names = read_json(source / "config.json", ADVICE, _Architectures).architectures or ()
        cls = next((TEXT_MODELS[name] for name in names if name in TEXT_MODELS), None)
        _copy(folder, source, out / part, needs_weights=True)
        tokenizer = part.replace("text_encoder", "tokenizer")
        if cls is None:  # read by pipeline.py, and so are its words
            continue
        index[part] = ["transformers", cls]
        words = folder / tokenizer if is_pipeline else folder
        _copy(folder, words, out / tokenizer, words_only=True)
        index[tokenizer] = ["transformers", _tokenizer_class(out / tokenizer)]


def _tokenizer_class(folder: Path) -> str:
    import transformers

    config = folder / "tokenizer_config.json"
    name = read_json(config, ADVICE).get("tokenizer_class") if config.is_file() else None
    return name if isinstance(name, str) and hasattr(transformers, name) else "PreTrainedTokenizerFast"


def copy_scheduler(base: Path, out: Path, index: dict[str, Any]) -> bool:
    """Copies the base's scheduler and enters it in `index`, if it is a class of diffusers."""
    base = base.resolve()
    entry = read_json(base / "model_index.json", ADVICE).get("scheduler")
    if not _is_class(entry) or entry[0] != "diffusers" or not (base / "scheduler").is_dir():
        return False
    _copy(base, base / "scheduler", out / "scheduler")
    index["scheduler"] = entry
    return True


def _is_class(entry: Any) -> TypeGuard[list[str]]:
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
        return False
    return entry[0] in LIBRARIES and entry[1].isidentifier()


def _pipeline_class(name: Any) -> str:
    import diffusers

    return name if isinstance(name, str) and name.endswith("Pipeline") and hasattr(diffusers, name) else ""


def _copy(base: Path, part: Path, target: Path, *, words_only: bool = False, needs_weights: bool = False) -> None:
    """Copies the files of a part that are data; words_only: those of a tokenizer, beside which a model may lie."""
    if part.is_symlink():
        raise UserError(f"--base {part}: is a symbolic link; copy the folder itself there")
    make_folder(target)
    files = [file for file in sorted(part.iterdir()) if file.suffix in SUFFIXES]
    if words_only:
        files = [file for file in files if file.suffix != ".safetensors" and file.name not in MODEL_CONFIGS]
    for file in files:
        source = _target_of(base, file)
        if file.suffix == ".json":
            _refuse_own_code(source, file)
        copy_file(source, target / file.name)
    has_pickle = any(file.suffix == ".bin" for file in part.iterdir())
    if (needs_weights or (has_pickle and not words_only)) and not any(file.suffix == ".safetensors" for file in files):
        state = "its weights as a pickle only" if has_pickle else "no weights"
        raise UserError(f"--base {part}: has {state}. Save it again with save_pretrained, as safetensors")


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
    config = parse_json(read_bytes(source, MAX_JSON_BYTES), f"--base {file}", ADVICE)
    if "auto_map" in config or "custom_pipelines" in config:
        raise UserError(f"--base {file}: asks for code of its own (auto_map), which is not exported. Remove that entry")
