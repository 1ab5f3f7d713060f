"""Weights from one form into another: original Cosmos, diffusers' folders, safetensors, the parts of parallel training.

    OUT.pt            the names of the original Cosmos code, as one file of torch.save
    OUT_model_mp_*.pt the same in the parts of tensor parallelism (parts=8)
    OUT.safetensors   our names: the address of networks.teacher_init, networks.student.init, ..
    OUT/              a folder that diffusers opens: config.json beside the weights; transformer/ and controlnet/ where there
                      are branches

Tensors are mapped and written one by one: a 14B file needs the memory of its largest tensor. OUT appears when it is complete.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fewstep.config import alike, parse
from fewstep.config.text import read_text, read_yaml_mapping
from fewstep.errors import UserError, some
from fewstep.files import whole_folder, write_json, write_tensors, write_text, write_torch
from fewstep.networks.contract import AnyNetwork
from fewstep.networks.families.cosmos.control import Controlled, CosmosControlSpec
from fewstep.networks.families.cosmos.keys import (
    Generation,
    generation_of,
    num_branches,
    odd_names,
    original_names,
    refuse_apart,
)
from fewstep.networks.families.cosmos.models import MODELS
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.cosmos.transfer1 import Transfer1Branch
from fewstep.networks.files import hub
from fewstep.networks.files.folders import refuse_sizes
from fewstep.networks.files.tensor_files import SUFFIXES, open_tensors, split
from fewstep.networks.weights.addresses import Collected, Piece, collect, of_run, pieces_of, tell
from fewstep.networks.weights.deltas import added
from fewstep.untrusted.stored import Stored
from fewstep.untrusted.text import fault_of, read_json

SHARD_BYTES = 5 * 10**9
SIZES = "network.yaml"  # beside weights of sizes never published: their network, as a configuration has it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Dtype = Literal["keep", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Written:
    path: Path
    num_tensors: int
    num_parameters: int
    about: str

    def __str__(self) -> str:
        return f"{self.path}: {self.num_tensors} tensors, {self.num_parameters:,} numbers, {self.about}"


def convert(
    source: str | None,
    out: Path | None,
    *,
    base: str | None = None,
    control: Sequence[str] = (),
    model: str | None = None,
    dtype: Dtype = "keep",
    lora_scale: float | None = None,
    parts: int | None = None,
    add: Sequence[str] = (),
) -> list[Written]:
    """What was written. `source`, or `base` and `control` which are put together; `out` says by its ending into what."""
    if parts is not None and (parts < 2 or out is None or out.suffix not in (".pt", ".pth")):
        raise UserError("convert: --parts N, at least 2, are of OUT.pt: OUT_model_mp_0.pt, .. for N processes")
    run = of_run(source) if source is not None and base is None else None
    if run is not None:
        if out is None:
            raise UserError("convert: say what to write: OUT.pt, OUT.safetensors or OUT/")
        tell(run)
        return _write(out, _with(run, add), model, dtype, parts)
    pieces = _pieces(source, base, control)
    if out is None:
        if len(pieces) != 2:
            raise UserError(
                "convert: say what to write: OUT.pt, OUT.safetensors or OUT/ (only a base and its control have a usual place)"
            )
        out = Path(pieces[0][1]).parent / "checkpoints_teacher" / Path(pieces[1][1]).name
    if out.exists() and any(Path(place).resolve() == out.resolve() for _, place, _ in pieces):
        raise UserError(f"convert: '{out}' is what is read; write it elsewhere")
    if out.suffix in (".pt", ".pth") and len(pieces) > 1 and lora_scale is None and not add:
        union = _union(pieces)
        if union is not None:
            _keep_sizes(pieces, out)
            about = f"the union of {' and '.join(place for _, place, _ in pieces)}"
            return _write_original(out, union, dtype, about, parts)
    weights = collect(pieces, lora_scale=lora_scale)
    for file in weights.files:
        _refuse_odd(file.tensors, file.source)
    tell(weights)
    return _write(out, _with(weights, add), model, dtype, parts)


def _with(weights: Collected, add: Sequence[str]) -> Collected:
    for file in add:
        weights = replace(weights, tensors=added(weights.tensors, file))
    return weights


def _write(out: Path, weights: Collected, model: str | None, dtype: Dtype, parts: int | None) -> list[Written]:
    if out.suffix in (".pt", ".pth"):
        return _write_original(out, _originally_named(weights), dtype, "original names", parts)
    if out.suffix == ".safetensors":
        write_tensors(out, weights.tensors, dtype=DTYPES.get(dtype))
        return [_entry(out, weights.tensors, "our names")]
    if out.suffix:
        raise UserError(f"convert: cannot write '{out}': it must end in .pt or .safetensors, or be a folder for diffusers")
    return _write_folder(out, weights, model, dtype)


def _pieces(source: str | None, base: str | None, control: Sequence[str]) -> list[Piece]:
    if (source is None) == (base is None):
        raise UserError("convert: give either SRC, or --base with --control")
    if base is not None and not control:
        raise UserError("convert: --base wants the --control to put beside it")
    address = source if source is not None else "+".join([base or "", *control])
    if hub.is_hub_id(address) and Path(address).suffix not in SUFFIXES and not Path(address).parent.is_dir():
        address = str(hub.folder_of(address, ["*.safetensors", "*.json"], "weights"))
    pieces = pieces_of(address)
    if pieces is None:
        raise UserError(f"convert: '{address}' is no file or folder of weights, and no run")
    return pieces


# --- one file


def _union(pieces: Sequence[Piece]) -> dict[str, Stored] | None:
    """All tensors of original files under their own names, joined as Cosmos' script joins them; None for other files."""
    files = [open_tensors(place, part) for _, place, part in pieces]
    if len(files) != 2 or any(generation_of(file.tensors) != "1" for file in files) or num_branches(files[1].tensors) != 1:
        return None
    for file in files:
        _refuse_odd(file.tensors, file.source)
    base, control = files
    tensors = dict(base.tensors)
    if not any(name.startswith("base_model.") for name in tensors):  # a transformer alone: the name it has beside a branch
        tensors = {
            f"base_model.{name if name.startswith('net.') else f'net.{name}'}": tensor for name, tensor in tensors.items()
        }
    collect(pieces)  # refuses what both hold
    return tensors | dict(control.tensors)


def _keep_sizes(pieces: Sequence[Piece], out: Path) -> None:
    """Copies the file that describes the network from beside the base to beside `out`."""
    beside = Path(pieces[0][1]).parent / SIZES
    if beside.is_file() and beside.parent.resolve() != out.parent.resolve():
        write_text(out.parent / SIZES, read_text(beside))


def _originally_named(weights: Collected) -> dict[str, Stored]:
    generation: Generation = weights.generation or _generation_of_ours(weights.tensors)
    names = original_names(weights.tensors, generation)
    _refuse_odd(names.values(), " and ".join(file.source for file in weights.files))
    refuse_apart({name: tensor.read for name, tensor in weights.tensors.items()})
    return {names[name]: tensor for name, tensor in weights.tensors.items() if name in names}


def _refuse_odd(names: Iterable[str], source: str) -> None:
    """Refuses a file under original names that lacks some, or has others."""
    missing, extra = odd_names(list(names))
    problems = [f"  missing: {name}" for name in missing] + [f"  no weight of Cosmos: {name}" for name in extra]
    if problems:
        lines = some(problems, 12, "\n")
        raise UserError(f"convert: '{source}' does not hold the weights of a Cosmos network, whole and no others:\n{lines}")


def _generation_of_ours(names: Mapping[str, Stored]) -> Generation:
    return "1" if any("learnable_pos_embed." in name or ".after.0." in name for name in names) else "2"


def _write_original(out: Path, tensors: Mapping[str, Stored], dtype: Dtype, about: str, num: int | None) -> list[Written]:
    """OUT.pt; in `num` parts OUT_model_mp_0.pt and so on, each as one process of Cosmos 1's tensor parallelism reads it."""
    if num is None:
        write_torch(out, _read(tensors, dtype))
        return [_entry(out, tensors, about)]
    if generation_of(tensors) != "1":
        raise UserError("convert: --parts: only networks of Cosmos 1 (Predict1, Transfer1) were trained in such parts")
    files: list[Written] = []
    for number, part in enumerate(split(_read(tensors, dtype), num)):
        file = out.with_name(f"{out.stem.partition('_model_mp_')[0]}_model_mp_{number}.pt")
        write_torch(file, {"model": part})
        numbers = sum(tensor.numel() for tensor in part.values())
        files.append(Written(file, len(part), numbers, f"{about}, part {number} of {num}"))
    return files


def _read(tensors: Mapping[str, Stored], dtype: Dtype) -> dict[str, torch.Tensor]:
    kind = DTYPES.get(dtype)
    weights = {name: tensor.read() for name, tensor in tensors.items()}
    if kind is not None:
        weights = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    return {name: tensor.contiguous() for name, tensor in weights.items()}


# --- a folder for diffusers


def _write_folder(out: Path, weights: Collected, model: str | None, dtype: Dtype) -> list[Written]:
    name, module = model_of(weights, model)
    branches: Any = module.branches if isinstance(module, Controlled) else {}
    controls = list(branches)
    if any(isinstance(branch, Transfer1Branch) for branch in branches.values()):
        raise UserError(
            "convert: diffusers has no branch of Cosmos-Transfer1; write OUT.safetensors for us, or OUT.pt, originally named"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"convert: '{out}' exists and is not empty; remove it or write elsewhere")
    parts: dict[str, tuple[Any, dict[str, Stored]]] = {}
    if controls:
        parts["transformer"] = module.base, _under(weights.tensors, "base.")
        for control in controls:
            folder = "controlnet" if len(controls) == 1 else f"controlnet_{control}"
            parts[folder] = branches[control], _under(weights.tensors, f"branches.{control}.")
    else:
        parts["."] = module, dict(weights.tensors)
    files: list[Written] = []
    with whole_folder(out) as beside:
        for folder, (part, tensors) in parts.items():
            part.save_config(beside / folder)
            _write_shards(beside / folder, tensors, dtype)
            files.append(_entry(out / folder if folder != "." else out, tensors, f"{type(part).__name__} of {name}"))
    return files


def _under(tensors: Mapping[str, Stored], start: str) -> dict[str, Stored]:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _write_shards(folder: Path, tensors: Mapping[str, Stored], dtype: Dtype) -> None:
    shards: list[dict[str, Stored]] = [{}]
    sizes = [0]
    for name, tensor in tensors.items():
        if sizes[-1] and sizes[-1] + tensor.num_bytes > SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += tensor.num_bytes
    stem = "diffusion_pytorch_model"
    if len(shards) == 1:
        write_tensors(folder / f"{stem}.safetensors", tensors, dtype=DTYPES.get(dtype))
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard, dtype=DTYPES.get(dtype))
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    write_json(folder / f"{stem}.safetensors.index.json", index, indent=2)


def model_of(weights: Collected, name: str | None) -> tuple[str, nn.Module]:
    """The module, without weights, that these tensors fill: the one published model that fits, or the one that was named."""
    shapes = {n: tensor.shape for n, tensor in weights.tensors.items()}
    controls = _branch_names(shapes)
    described = _described(weights, name)
    modules: dict[str, nn.Module] = {}
    if described is not None:
        modules = {str(described[0]): _empty(described[1])}
    elif name is not None and name not in MODELS:
        modules = {name: _of_folder(Path(name), controls)}
    for candidate, spec in MODELS.items() if not modules else ():
        if name in (None, candidate) and isinstance(spec, CosmosControlSpec) == bool(controls):
            modules[candidate] = _empty(replace(spec, controls=controls) if isinstance(spec, CosmosControlSpec) else spec)
    if not modules:
        raise UserError(f"convert: no published model{f' called {name}' if name else ''} has such branches")
    problems = {candidate: _problems(module, shapes) for candidate, module in modules.items()}
    fits = [candidate for candidate, lines in problems.items() if not lines]
    if len(fits) > 1:
        raise UserError(
            f"convert: the weights fit {' and '.join(fits)}, which differ in their positions; say which with --model"
        )
    if not fits:
        nearest = min(problems, key=lambda candidate: len(problems[candidate]))
        lines = some(problems[nearest], 12, "\n")
        raise UserError(
            f"convert: the weights fit none of the published models; the nearest is {nearest}:\n{lines}\nFor a model of other "
            f"dimensions, put a {SIZES} with its settings beside the weights, give --model FOLDER with its config.json, or "
            "write OUT.safetensors, which needs none"
        )
    return fits[0], modules[fits[0]]


def _empty(spec: CosmosSpec) -> nn.Module:
    """The network without weights."""
    with torch.device("meta"):
        return spec.build().module


def _problems(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line for each tensor that the module lacks, has too many, or wants in another shape."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    lines = [f"  missing: {n}" for n in own if n not in shapes] + [f"  not in it: {n}" for n in shapes if n not in own]
    return lines + [f"  {n}: wants {own[n]}, has {shapes[n]}" for n in own if n in shapes and own[n] != shapes[n]]


def published_spec(weights: Collected, name: str | None) -> tuple[str | None, CosmosSpec]:
    """The name and configuration of the published network that these tensors fill; with `name`, of that one.

    Networks of other sizes are described by a file of settings: network.yaml beside the weights, or `name`.
    """
    described = _described(weights, name)
    if described is not None:
        return None, described[1]
    if name is not None and name not in MODELS:
        raise UserError(f"--network {name}: is none of {', '.join(MODELS)}, and no .yaml file of a network's settings")
    name, _ = model_of(weights, name)
    spec = MODELS[name]
    if isinstance(spec, CosmosControlSpec):
        spec = replace(spec, controls=_branch_names(weights.tensors))
    return name, spec


@dataclass(frozen=True)
class _Sizes:
    network: AnyNetwork


def _described(weights: Collected, name: str | None) -> tuple[Path, CosmosSpec] | None:
    """The network in the file of settings that `name` is, or that lies beside the weights; without branches where they have
    none."""
    beside = Path(weights.files[0].source).parent / SIZES
    file = beside if name is None else Path(name)
    if file.suffix not in (".yaml", ".yml") or (name is None and not file.is_file()):
        return None
    spec = parse(_Sizes, {"network": read_yaml_mapping(read_text(file), str(file))}).network
    if not isinstance(spec, CosmosSpec):
        raise UserError(f"{file}: is no network of Cosmos, but these weights are named as Cosmos names them")
    controls = _branch_names(weights.tensors)
    if not isinstance(spec, CosmosControlSpec):
        return file, spec
    if controls:
        return file, replace(spec, controls=controls)
    return file, alike(CosmosSpec, spec)


def _branch_names(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.split(".")[1] for name in names if name.startswith("branches.")))


def _of_folder(folder: Path, controls: Sequence[str]) -> nn.Module:
    """The model whose config.json this is, for sizes never published; with controls, those of transformer/ and controlnet/."""
    from diffusers import CosmosControlNetModel, CosmosTransformer3DModel

    def empty(cls: Any, place: Path) -> Any:  # Any: diffusers' classes
        if not (place / "config.json").is_file():
            raise UserError(f"convert: --model {folder} is neither a folder with a config.json nor one of {', '.join(MODELS)}")
        with fault_of(place / "config.json"), torch.device("meta"):
            config = read_json(place / "config.json", "Copy it again")
            refuse_sizes(config, place / "config.json")
            return cls.from_config(config)

    if not controls:
        return empty(CosmosTransformer3DModel, folder)
    base = empty(CosmosTransformer3DModel, folder / "transformer")
    branches = {name: empty(CosmosControlNetModel, folder / "controlnet") for name in controls}
    return Controlled(base, branches, dict.fromkeys(controls, 1.0), freezes_base=False)


# --- both


def _entry(path: Path, tensors: Mapping[str, Stored], about: str) -> Written:
    return Written(path, len(tensors), sum(math.prod(tensor.shape) for tensor in tensors.values()), about)
