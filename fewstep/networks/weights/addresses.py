"""Weights are addresses, resolved here and nowhere else.

    RUN@latest:student.ema       of a run folder (absolute, or below the output root): the EMA of its student
    RUN@best:student.ema         at the best value of checkpoint.best_metric
    RUN@500:critic               the critic after 500 iterations; without @ITER the latest, without :ROLE the student.ema, or
                                 the student of a run that keeps no moving average
    FILE or FOLDER               tensors of others in any form that tensor_files.py reads: original Cosmos, FastGen, diffusers,
                                 safetensors, distributed checkpoints, parts of tensor parallelism; FILE:ema of several sets
    BASE+CONTROL                 a base and its control branch as two files; several branches as BASE+edge=FILE+depth=FILE

Loading is strict: a missing, extra or misshapen tensor is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.environment import output_root, ranks
from fewstep.errors import UserError, some
from fewstep.networks.families.cosmos.keys import Generation, match, num_branches, repeated
from fewstep.networks.families.cosmos.lora_files import adapters, merged
from fewstep.networks.files.checkpoints import best_in, damaged_after, newest_in
from fewstep.networks.files.tensor_files import TensorFile, is_tensor_file, open_tensors
from fewstep.untrusted.stored import Stored


def read(address: str, like: nn.Module | None = None) -> dict[str, Tensor]:
    """Name -> tensor for the address, on the CPU; tensors of others come under our names, still mapped from their file.

    like: the module that is to hold them; it names its control branches. What was loaded is printed.
    """
    pieces = pieces_of(address)
    if pieces is None:
        folder, role = locate(address)
        name, _, part = role.partition(".")
        return read_tensors(folder, f"{name}.{part or 'weights'}.", f"{name}.buffers.")
    weights = collect(pieces, like)
    tell(weights)
    return {name: tensor.read() for name, tensor in weights.tensors.items()}


@dataclass(frozen=True)
class Collected:
    """The tensors of one or more files under our names; what no table knows keeps its own, for the refusal to name it."""

    tensors: Mapping[str, Stored]
    files: tuple[TensorFile, ...]
    generation: Generation | None  # whose original names they had; None: ours
    unused: tuple[str, ...]  # entries beside the weights


Piece = tuple[str, str, str | None]  # a control's name or "", the place, which of several sets of weights


def pieces_of(address: str) -> list[Piece] | None:
    """The files that make up an address; None where it names a run."""
    words = [address] if Path(address).exists() else address.split("+")
    pieces: list[Piece] = []
    for word in words:
        name, equals, place = word.partition("=")
        if not equals or "/" in name or Path(word).exists():
            name, place = "", word
        part: str | None = None
        if not Path(place).exists() and ":" in place:
            place, _, part = place.rpartition(":")
        if not is_tensor_file(place):
            if len(words) == 1:
                return None
            raise UserError(f"no weights at '{address}': '{place}' is no file of tensors")
        pieces.append((name, place, part))
    return pieces


def collect(pieces: Sequence[Piece], like: nn.Module | None = None, lora_scale: float | None = None) -> Collected:
    """What the pieces hold together: one file, or a base and its branches.

    lora_scale: how much adapters in them count, which no file says; they are added into the weights.
    """
    files = [_without_adapters(open_tensors(place, part), lora_scale) for _, place, part in pieces]
    controls = _controls(files, pieces, like)
    merged: dict[str, Stored] = {}
    unused: list[str] = []
    generation: Generation | None = None
    for number, file in enumerate(files):
        is_base = len(files) > 1 and number == 0 and num_branches(file.tensors) == 0
        mapping = match(file.tensors, () if is_base else controls[number - 1 :] if number else controls)
        generation, start = generation or mapping.generation, ""
        if is_base:
            start = "base."
        elif number and mapping.generation is None:
            start = f"branches.{controls[number - 1]}."
        ours = {name: file.tensors[theirs] for name, theirs in mapping.sources.items()}
        ours = {n if n.startswith(("base.", "branches.")) else f"{start}{n}": tensor for n, tensor in ours.items()}
        ours |= {name: file.tensors[name] for name in mapping.unknown}
        twice = sorted(ours.keys() & merged.keys())
        if twice:
            raise UserError(f"'{files[0].source}' and '{file.source}' both hold '{twice[0]}' and {len(twice) - 1} more")
        merged |= ours
        unused += mapping.unused
    if len(files) > 1 and generation == "2":
        merged |= {name: merged[base] for name, base in repeated(merged, controls).items()}
    return Collected(merged, tuple(files), generation, tuple(unused))


def _without_adapters(file: TensorFile, scale: float | None) -> TensorFile:
    num = len(adapters(file.tensors))
    if num and scale is None:
        raise UserError(
            f"'{file.source}' holds {num} adapters (LoRA) beside its weights, and no file says how much they count. Add them "
            f"into the weights with: fewstep convert {file.source} OUT.safetensors --lora-scale 1 (Predict1: its `scale`, 1 in "
            "the example; PEFT: alpha / rank)"
        )
    return file if scale is None else replace(file, tensors=merged(file.tensors, scale))


def _controls(files: Sequence[TensorFile], pieces: Sequence[Piece], like: nn.Module | None) -> list[str]:
    """Names of the branches in these files: those of the address, those of the module, or plain ones."""
    names = [name for name, _, _ in pieces if name]
    if not names and like is not None:
        names = list(dict.fromkeys(n.split(".")[1] for n in like.state_dict() if n.startswith("branches.")))
    count = max(len(files) - 1, *(num_branches(file.tensors) for file in files))
    return names or ["control", *(f"control_{i}" for i in range(2, count + 1))][:count]


def tell(weights: Collected) -> None:
    """Prints which tensors were read and from where, in one line, on the first process only."""
    if not ranks().is_main:
        return
    places = " + ".join(f"{file.source}{f':{file.part}' if file.part else ''}" for file in weights.files)
    beside = len(weights.unused) + sum(file.ignored for file in weights.files)
    kind = f", named as Cosmos {weights.generation} names them" if weights.generation else ""
    print(f"weights: {len(weights.tensors)} tensors from {places}{kind}; {beside} other entries left", file=sys.stderr)


def locate(address: str) -> tuple[Path, str]:
    """The checkpoint folder and the role that a run address names; without :ROLE student.ema, or student where that is all.

    Of a student without a moving average a note is printed.
    """
    place, _, role = address.partition(":")
    folder = checkpoint_of(place)
    if role:
        return folder, role
    from fewstep.networks.files.distributed import open_distributed

    if any(name.startswith("student.ema.") for name in open_distributed(folder)):
        return folder, "student.ema"
    if ranks().is_main:
        print(f"weights: {place} keeps no moving average; its student's weights are taken as trained", file=sys.stderr)
    return folder, "student"


def checkpoint_of(place: str) -> Path:
    """The checkpoint folder of a run, RUN or RUN@ITERATION."""
    address = place
    place, _, iteration = place.partition("@")
    run = next((root for root in (Path(place), output_root() / place) if root.is_dir()), None)
    if run is None:
        raise UserError(f"no weights at '{address}': neither '{place}' nor '{output_root() / place}' is a folder")
    if (run / ".metadata").is_file():  # the checkpoint folder itself
        return run
    checkpoints = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    if iteration and iteration != "latest":
        name = f"iter_{int(iteration):09d}" if iteration.isdecimal() and len(iteration) < 20 else iteration
        folder = best_in(checkpoints) if iteration == "best" else checkpoints / name
        if folder is None:
            raise UserError(f"no weights at '{address}': {run} was trained without checkpoint.best_metric")
    else:
        folder = newest_in(checkpoints)
        if folder is None:
            raise UserError(f"no weights at '{address}': {run} holds no finished checkpoint yet")
        damaged = damaged_after(folder)
        if damaged is not None:
            raise UserError(
                f"no weights at '{address}': {damaged} is not whole. Remove it, or name another: {place}@{folder.name}"
            )
    if not (folder / ".metadata").is_file():
        have = sorted(path.name for path in checkpoints.glob("iter_*") if path.is_dir())
        raise UserError(f"no weights at '{address}': {checkpoints} has no {folder.name}; it has {', '.join(have) or 'none'}")
    return folder


def read_tensors(folder: Path, prefix: str, *more: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names start with `prefix`, and those with the prefixes of `more` where there are
    any, named without them; sharded ones come whole."""
    return {name: tensor.read() for name, tensor in _tensors(folder, prefix, *more).items()}


def of_run(address: str) -> Collected | None:
    """The weights of one role of a run, RUN@ITER:ROLE; None where no folder has that name, or it is no run."""
    place = address.partition(":")[0].partition("@")[0]
    if not place or pieces_of(address) is not None or not any(path.is_dir() for path in (Path(place), output_root() / place)):
        return None
    folder, role = locate(address)
    name, _, part = role.partition(".")
    tensors = _tensors(folder, f"{name}.{part or 'weights'}.", f"{name}.buffers.")
    if any(".lora_A." in tensor for tensor in tensors):
        raise UserError(f"'{address}' holds adapters (LoRA) without the weights below them: fewstep export {address} adds them")
    return Collected(tensors, (TensorFile(str(folder), tensors, role),), None, ())


def _tensors(folder: Path, prefix: str, *more: str) -> dict[str, Stored]:
    from fewstep.networks.files.distributed import open_distributed

    tensors = open_distributed(folder)
    subset = {name: tensor for name, tensor in tensors.items() if name.startswith((prefix, *more))}
    if not any(name.startswith(prefix) for name in subset):
        parts = sorted({".".join(name.split(".")[:2]) for name in tensors if ".optim." not in name})
        raise UserError(f"{folder} holds no '{prefix[:-1]}'; it holds {', '.join(parts)}")
    prefixes = (prefix, *more)
    return {next(n.removeprefix(p) for p in prefixes if n.startswith(p)): tensor for n, tensor in subset.items()}


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: str, *, replaces: bool = False) -> int:
    """Puts every tensor into `module` and returns their number; refuses unless names and shapes match exactly.

    replaces: the tensors take the place of the module's own and stay mapped from their file, instead of being copied.
    """
    own = module.state_dict()
    problems = [f"  missing in the weights: {name}" for name in own if name not in tensors]
    problems += [f"  not in the network: {name}" for name in tensors if name not in own]
    problems += [
        f"  {name}: the network wants {tuple(own[name].shape)}, the weights have {tuple(tensors[name].shape)}"
        for name in own
        if name in tensors and own[name].shape != tensors[name].shape
    ]
    names: dict[str, str] = {}  # the second name of a shared tensor, and its first
    first: dict[int, str] = {}  # a tensor that two parts of the network share has two names, and must be one in the file
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name:
            names[name] = other
        if other != name and {name, other} <= tensors.keys() and not torch.equal(tensors[name], tensors[other]):
            problems.append(f"  {name}: is {other} in the network, but another tensor in the weights")
    if problems:
        lines = some(problems, 12, "\n")
        hint = "\n  they are adapters: begin with the folder that fewstep export makes of them with --base"
        is_lora = any(".lora_A." in name for name in tensors)
        raise UserError(f"the weights at '{source}' do not fit the network:\n{lines}{hint if is_lora else ''}")
    if not replaces:
        module.load_state_dict(dict(tensors), strict=True)
        return len(own)
    module.load_state_dict({name: tensors[name].to(own[name].dtype) for name in own}, strict=True, assign=True)
    for name, other in names.items():
        part, _, leaf = name.rpartition(".")
        module.get_submodule(part)._parameters[leaf] = module.get_parameter(other)  # one again, as before
    return len(own)
