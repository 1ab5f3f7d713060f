"""The network in a folder of diffusers: its configuration, and whether another configuration contradicts the folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fewstep.config import ConfigError, choices, dump
from fewstep.errors import UserError
from fewstep.networks.contract import NetworkSpec
from fewstep.networks.files import hub
from fewstep.networks.files.pipeline import PipelineFolder, is_diffusers_folder
from fewstep.untrusted.text import fault_of


def spec_of(address: str, controls: Sequence[str] = ()) -> NetworkSpec:
    """The configuration of the network in a diffusers folder or hub id, by the class of its denoiser."""
    folder = PipelineFolder(address)
    if folder.path.is_dir() and "StudentPipeline" in str(folder.index.get("_class_name")):
        raise UserError(f"{folder.path}: a student without its student.json, which says how it is sampled. Export it again")
    name = folder.denoiser.get("_class_name")
    classes = _by_class()
    if not isinstance(name, str) or name not in classes:
        kinds = ", ".join(choices("network"))
        raise UserError(f"{address}: its denoiser is a {name}, for which there is no adapter; there are {kinds}")
    with fault_of(f"{address}: config.json of its denoiser"):
        spec = classes[name].of(folder, controls)
        dump(spec)  # refuses values of other types than those of its settings
        return spec


def refuse_contradictions(specs: Iterable[tuple[str, NetworkSpec | None]]) -> None:
    """Raises ConfigError where a configuration, under its dotted key, contradicts the folder that it takes its weights from.

    A network of Cosmos 1 that is trained as a rectified flow would learn something, but not what it was trained for.
    """
    problems = [problem for key, spec in specs if spec is not None for problem in _problems(key, spec)]
    if problems:
        raise ConfigError(problems)


def _problems(key: str, spec: NetworkSpec) -> Iterable[tuple[str, str]]:
    place = spec.source
    if place is None or not (is_diffusers_folder(Path(place)) or (hub.is_hub_id(place) and not Path(place).exists())):
        return  # no folder of diffusers, or none yet
    folder = PipelineFolder(place)
    cls: Any = _by_class().get(str(folder.denoiser.get("_class_name")))
    with fault_of(f"{place}: config.json of its denoiser"):
        facts = {} if cls is None else cls.facts(folder)
    wrong = {name: value for name, value in facts.items() if getattr(spec, name, value) != value}  # of another family: unknown
    for name, value in wrong.items():
        words = " ".join(f"{key}.{other}={_word(facts[other])}" for other in wrong)
        who = folder.pipeline or "its config.json"
        yield (
            f"{key}.{name}",
            f"is {_word(getattr(spec, name))}, but the network at {place} ({who}) is called with {_word(value)}. Set "
            f"{words}, or use a recipe that reads it from the folder (experiment=finetune|lora|kd|dmd2 teacher={place})",
        )


def _word(value: Any) -> str:  # a setting of any type, as it is written on a command line
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _by_class() -> dict[str, Any]:
    """The configurations that open folders, by the class of the denoiser in them."""
    return {cls.diffusers_class: cls for cls in choices("network").values() if issubclass(cls, NetworkSpec)}
