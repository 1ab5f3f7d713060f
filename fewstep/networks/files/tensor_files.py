"""Tensors on disk, in whatever form others left them: found by name, read when asked for; no code of a file is ever run.

    x.safetensors                      and a folder of them, with or without an index: what diffusers writes
    x.pt  x.pth  x.ckpt  x.bin         torch.save: flat, or nested as {"model": .., "ema": ..} and {"model": {"net": ..}}
    FOLDER with model.pt               what the downloads of the original Cosmos make
    iter_N_model_mp_0.pt .. _7.pt      parts of tensor parallelism: given by any one of them, or as iter_N.pt
    FOLDER with .metadata              torch.distributed.checkpoint, sharded or not

distributed.py reads the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.networks.files.distributed import open_distributed
from fewstep.untrusted.safe_tensors import open_safetensors
from fewstep.untrusted.stored import Stored
from fewstep.untrusted.text import Name, read_json
from fewstep.untrusted.torch_files import load_torch

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
MODEL = "model.pt"  # in the folder of an original model

_INCOMPLETE = "Is the download complete?"
# Of several sets of weights in one file these are taken first: the moving average is the model, the rest is training.
_PREFERRED = ("ema", "model.ema", "model_ema", "net_ema", "model", "model.net", "module", "state_dict", "net")
_NETS = ("net", "net_ema", "net_fake_score", "net_discriminator_head")  # Predict2.5 keeps them under these starts, in one set
_WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")
_STARTS = ("module.", "model.", "transformer.")  # one word before every name: DDP, a trainer, FastGen

# Tensor parallelism splits these along their outputs and their inputs; everything else is whole in every part (Transfer1).
_BY_OUTPUT = ("to_q.0.weight", "to_k.0.weight", "to_v.0.weight", "block.layer1.weight")
_BY_INPUT = ("to_out.0.weight", "block.layer2.weight")


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one file, or of several that are one model."""

    source: str
    tensors: Mapping[str, Stored]
    part: str = ""  # which of several sets of weights; "" where there is one
    ignored: int = 0  # entries of that set that are no tensors, or of other networks


@dataclass(frozen=True)
class _Index:
    """What is read of model.safetensors.index.json."""

    weight_map: dict[str, Name]


def is_tensor_file(place: str) -> bool:
    """Whether the address names files of tensors rather than a run of ours."""
    path = Path(place)
    if path.suffix in SUFFIXES:
        return True
    if not path.is_dir() or (path / "checkpoints").is_dir():
        return False
    if (path / ".metadata").is_file():
        return not any(re.match(r"\w+\.(weights|ema)\.", name) for name in open_distributed(path))
    return bool(_safetensors_in(path)) or (path / MODEL).is_file()


def open_tensors(place: str | Path, part: str | None = None) -> TensorFile:
    """The tensors of a file or folder, by their names there; wrappers of training are taken off the names.

    part: which set of weights where there are several, by the name it has in the file: "model", "ema", "net_fake_score".
    """
    path = Path(place)
    if _is_split(path):
        file = _split(path, part)
    elif not path.exists() or (path.suffix in SUFFIXES and not path.is_file()):
        raise UserError(f"no weights at '{place}': there is no such file")
    elif path.suffix == ".safetensors":
        file = TensorFile(str(path), open_safetensors(path, _INCOMPLETE)[0])
    elif path.suffix in TORCH_SUFFIXES:
        file = _torch_file(path, part)
    elif (path / ".metadata").is_file():
        file = TensorFile(str(path), open_distributed(path))
    elif path.is_dir() and _safetensors_in(path):
        merged: dict[str, Stored] = {}
        for shard in _safetensors_in(path):
            merged |= open_safetensors(shard, _INCOMPLETE)[0]
        file = TensorFile(str(path), merged)
    elif (path / MODEL).is_file():
        file = _torch_file(path / MODEL, part)
    else:
        raise UserError(f"no weights in '{place}': it is no folder with .safetensors files, {MODEL} or .metadata")
    if not file.tensors:
        raise UserError(f"'{file.source}' holds no tensors")
    file = _one_net(file, part)
    if part is not None and file.part != part:
        raise UserError(f"'{place}' holds one set of weights only, none is called '{part}'")
    return TensorFile(file.source, _plain(file.tensors), file.part, file.ignored)


# --- one set of several


def _one_net(whole: TensorFile, part: str | None) -> TensorFile:
    """One of the networks that stand side by side under `net.`, `net_ema.`, ..; its names start with `net.`."""
    have = [net for net in _NETS if any(name.startswith(f"{net}.") for name in whole.tensors)]
    if part not in have and (len(have) < 2 or part is not None):
        return whole  # refused by the caller, unless `part` was found by then
    prefix = part or next((net for net in ("net_ema", "net") if net in have), None)
    if prefix is None:
        raise UserError(f"'{whole.source}' holds {' and '.join(have)}: say which, as {whole.source}:{have[0]}")
    tensors = {f"net.{n.removeprefix(f'{prefix}.')}": t for n, t in whole.tensors.items() if n.startswith(f"{prefix}.")}
    return TensorFile(whole.source, tensors, prefix, whole.ignored + len(whole.tensors) - len(tensors))


def _plain(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors without what training wraps around names; two that become one are refused."""
    names = list(tensors)
    if not any("." in name for name in names) and any(name.count("-") > 1 for name in names):
        names = [name.replace("-", ".") for name in names]  # how Cosmos 1 writes its averages
    for wrapper in _WRAPPERS:
        names = [name.replace(wrapper, "") for name in names]
    for start in _STARTS:
        if all(name.startswith(start) for name in names):
            names = [name.removeprefix(start) for name in names]
    plain: dict[str, Stored] = {}
    for name, tensor in zip(names, tensors.values(), strict=True):
        if not name.isprintable():
            raise UserError(f"a tensor of the file is called {name!r}, which is no name")
        if name in plain:
            raise UserError(f"two tensors of the file are called '{name}' once the wrappers of training are taken off")
        plain[name] = tensor
    return plain


def _sets(tree: Any, at: str = "", depth: int = 0) -> dict[str, Mapping[str, Any]]:
    """Every mapping in the tree that holds tensors, by its path of keys."""
    if not isinstance(tree, Mapping) or depth > 3:
        return {}
    if any(isinstance(value, Tensor) for value in tree.values()) and not _is_optimizer(tree):
        return {at: tree}
    sets: dict[str, Mapping[str, Any]] = {}
    for key, value in tree.items():
        if isinstance(key, str) and key not in ("optimizer", "scheduler", "grad_scaler", "callbacks", "trainer"):
            sets |= _sets(value, f"{at}.{key}" if at else key, depth + 1)
    return sets


def _is_optimizer(tree: Mapping[Any, Any]) -> bool:
    return "param_groups" in tree or not all(isinstance(key, str) for key in tree)


def _chosen_set(sets: Mapping[str, Mapping[str, Any]], part: str | None, source: str) -> str:
    if part is not None:
        fits = [at for at in sets if at == part or at.endswith(f".{part}")]
        if len(fits) == 1:
            return fits[0]
        if "" in sets or len(sets) == 1:
            return next(iter(sets))  # the part may be one of several networks within, see _one_net
        raise UserError(f"'{source}' holds no weights called '{part}'; it holds {', '.join(sorted(sets))}")
    if len(sets) == 1:
        return next(iter(sets))
    preferred = [at for at in _PREFERRED if at in sets]
    if not preferred:
        raise UserError(
            f"'{source}' holds several sets of weights; say which: {', '.join(f'{source}:{at}' for at in sorted(sets))}"
        )
    return preferred[0]


# --- torch.save


def _torch_file(path: Path, part: str | None) -> TensorFile:
    tree = load_torch(path)
    sets = _sets(tree) or {"": {}}
    at = _chosen_set(sets, part, str(path))
    entries = sets[at]
    tensors = {name: Stored.of(value) for name, value in entries.items() if isinstance(value, Tensor)}
    name = part if part is not None and (at == part or at.endswith(f".{part}")) else at
    return TensorFile(str(path), tensors, name, len(entries) - len(tensors))


# --- safetensors


def _safetensors_in(folder: Path) -> list[Path]:
    """The files of one model: those its index names, or all; of a pipeline's folder, those of its transformer."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = read_json(indices[0], "Copy that folder again", _Index).weight_map.values()
        return [folder / name for name in sorted(set(names))]
    files = sorted(folder.glob("*.safetensors"))
    if not files and (folder / "transformer").is_dir():
        return _safetensors_in(folder / "transformer")
    if len(files) > 1 and not all(re.search(r"-\d+-of-\d+$", file.stem) for file in files):
        plain = [file for file in files if not re.search(r"\.(fp16|bf16|fp32)$", file.stem)]
        files = plain if len(plain) == 1 else files
    return files


# --- parts of tensor parallelism


def _is_split(path: Path) -> bool:
    return "_model_mp_" in path.name or (path.suffix == ".pt" and path.with_name(f"{path.stem}_model_mp_0.pt").is_file())


def _split(path: Path, part: str | None) -> TensorFile:
    """The parts put together again. What is split along which axis is fixed by name; the rest must be equal in all parts."""
    stem = path.stem.partition("_model_mp_")[0]
    numbered = {
        int(match.group(1)): file
        for file in path.parent.glob("*_model_mp_*.pt")
        if (match := re.fullmatch(rf"{re.escape(stem)}_model_mp_(\d+)", file.stem))
    }
    if not numbered:
        raise UserError(f"no weights at '{path}': there is no {stem}_model_mp_0.pt")
    lacking = [number for number in range(max(numbered) + 1) if number not in numbered]
    if lacking:
        raise UserError(f"'{path.parent}' lacks {', '.join(f'{stem}_model_mp_{number}.pt' for number in lacking)}")
    parts = [_torch_file(numbered[number], part) for number in sorted(numbered)]
    names = parts[0].tensors.keys()
    for number, other in enumerate(parts):
        odd = sorted(names ^ other.tensors.keys())
        if odd:
            raise UserError(
                f"{stem}_model_mp_0.pt and {stem}_model_mp_{number}.pt hold different tensors: {', '.join(odd[:3])}"
            )
    merged = {name: _joined(name, [one.tensors[name] for one in parts], stem) for name in names}
    return TensorFile(str(path.with_name(f"{stem}_model_mp_*.pt")), merged, parts[0].part, parts[0].ignored)


def _axis_of(name: str) -> int | None:
    """Along which axis tensor parallelism cuts the tensor; None: it is whole in every part."""
    plain = name.replace("-", ".")
    return 0 if plain.endswith(_BY_OUTPUT) else 1 if plain.endswith(_BY_INPUT) else None


def split(tensors: Mapping[str, Tensor], num: int) -> list[dict[str, Tensor]]:
    """The tensors of a Cosmos 1 network as `num` processes of tensor parallelism hold them."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(num)]
    for name, tensor in tensors.items():
        axis = _axis_of(name)
        if axis is not None and tensor.shape[axis] % num:
            raise UserError(f"'{name}' has {tensor.shape[axis]} rows along axis {axis}, which {num} parts do not divide")
        pieces = [tensor] * num if axis is None else tensor.chunk(num, axis)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()  # of its own storage: a view would be saved whole
    return parts


def _joined(name: str, parts: list[Stored], stem: str) -> Stored:
    axis = _axis_of(name)
    first = parts[0]
    fixed = {tuple(size for i, size in enumerate(one.shape) if i != axis) for one in parts}
    if len(fixed) > 1 or (axis is not None and len(first.shape) != 2):
        raise UserError(
            f"{stem}: '{name}' is cut in a way that is not known here; its parts are {[one.shape for one in parts]}"
        )
    if axis is None:
        return Stored(first.shape, first.dtype, partial(_equal, name, parts, stem))
    whole = list(first.shape)
    whole[axis] = sum(one.shape[axis] for one in parts)
    return Stored(tuple(whole), first.dtype, lambda: torch.cat([one.read() for one in parts], axis))


def _equal(name: str, parts: Iterable[Stored], stem: str) -> Tensor:
    first, *others = (one.read() for one in parts)
    for number, other in enumerate(others, 1):
        if not torch.equal(first, other):
            raise UserError(
                f"{stem}: '{name}' should be whole in every part, but part {number} differs from part 0; whether it is cut, "
                "and along which axis, cannot be told"
            )
    return first
