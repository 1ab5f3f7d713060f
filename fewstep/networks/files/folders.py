"""Models of diffusers and transformers, in a folder or on the hub. Errors name the file and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import UserError, show
from fewstep.networks.files import hub
from fewstep.networks.files.pipeline import PipelineFolder
from fewstep.untrusted.safe_tensors import open_safetensors
from fewstep.untrusted.text import fault_of

Configurations = dict[str, Any]  # of models of diffusers, by where they were read
_NOTED: ContextVar[tuple[Configurations, bool] | None] = ContextVar("noted", default=None)
MAX_LAYERS = 4096
WRONG = ("missing_keys", "mismatched_keys", "unexpected_keys")  # of diffusers' loading info


def from_folder(cls: Any, address: str, subfolder: str) -> Any:  # Any: whatever diffusers class it is
    """The diffusers model at a hub id or in a folder; a pipeline holds it in `subfolder`."""
    noted, resumes = _NOTED.get() or ({}, False)
    key = f"{cls.__name__} of {address}, {subfolder}"
    if resumes and key in noted:
        with fault_of(f"the configuration that was noted of {key}"):
            refuse_sizes(noted[key], key)
            return cls.from_config(noted[key])
    module = _opened(cls, address, subfolder)
    noted[key] = json.loads(module.to_json_string())
    return module


@contextmanager
def noting(configurations: Configurations, resumes: bool) -> Iterator[None]:
    """Within, the configuration of each model that `from_folder` reads is noted.

    resumes: a model that is noted is built from that, and its folder, which may be gone, is not looked at.
    """
    token = _NOTED.set((configurations, resumes))
    try:
        yield
    finally:
        _NOTED.reset(token)


def _opened(cls: Any, address: str, subfolder: str) -> Any:
    folder = Path(address)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return load(cls, address)
        if not (folder / subfolder / "config.json").is_file():
            raise UserError(f"no {cls.__name__} in '{address}': it has neither config.json nor {subfolder}/config.json")
        return load(cls, address, subfolder)
    hub.expect_id(address, cls.__name__)
    with hub.asking(address):
        return load(cls, address, subfolder if hub.has_file(address, f"{subfolder}/config.json") else None)


def load(cls: Any, address: str, subfolder: str | None = None, **how: Any) -> Any:
    """`from_pretrained` of a class of diffusers, which alone would give fresh random values to weights that the files lack."""
    where = f"{address}/{subfolder}" if subfolder else address
    try:
        module, wrong = _load(cls, address, subfolder, how)
    except UserError:
        files = sorted(Path(where).glob("*.safetensors"))
        if Path(where).is_dir() and not files and not list(Path(where).glob("*.bin")):
            name = "diffusion_pytorch_model.safetensors"
            raise UserError(f"{where}: its weights are missing ({name}). Copy that folder again, whole") from None
        for file in files:
            open_safetensors(file, "Copy it again, whole")  # the libraries do not say which file is damaged
        raise
    if wrong:
        problems = "; ".join(f"{what.replace('_', ' ')}: {names}" for what, names in wrong.items())
        raise UserError(f"{where}: its weights do not fit its config.json: {problems}")
    return module


def load_transformer(cls: Any, address: str, subfolder: str | None = None, **how: Any) -> Any:
    """The same of a class of transformers, frozen and in eval mode. Code in its folder is not run."""
    module, wrong = _load(cls, address, subfolder, {"trust_remote_code": False, **how})
    lacking = ", ".join(names for what, names in wrong.items() if what != "unexpected_keys")
    if lacking:
        where = f"{address}/{subfolder}" if subfolder else address
        raise UserError(f"{where}: its weights lack {lacking}, which {cls.__name__} needs")
    return module.eval().requires_grad_(False)


def load_reader(cls: Any, address: str, subfolder: str | None = None, **how: Any) -> Any:
    """A tokenizer or a processor of pictures of transformers. Code in its folder is not run."""
    place = {"subfolder": subfolder} if subfolder else {}
    with fault_of(f"{address}/{subfolder}" if subfolder else address), hub.asking(address):
        return cls.from_pretrained(address, trust_remote_code=False, **place, **how)


def _load(cls: Any, address: str, subfolder: str | None, how: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """The model, and the names of weights that do not fit, by what is wrong with them."""
    where, place = (f"{address}/{subfolder}", {"subfolder": subfolder}) if subfolder else (address, {})
    name = f"{subfolder}/config.json" if subfolder else "config.json"
    refuse_sizes(PipelineFolder(address).read(name), f"{address}/{name}")
    # A pickle beside safetensors is never opened; where it is all there is, both libraries read its tensors alone.
    only_safe = True if any(Path(where).glob("*.safetensors*")) else None
    with fault_of(where), hub.asking(address):
        module, info = cls.from_pretrained(address, output_loading_info=True, use_safetensors=only_safe, **place, **how)
    return module, {what: ", ".join(map(str, list(info[what])[:4])) for what in WRONG if info.get(what)}


def refuse_sizes(config: Mapping[str, Any], place: object) -> None:
    """Raises UserError for a configuration that asks for more layers than any model has: building them would not end."""
    entries: list[tuple[str, Any]] = list(config.items())
    while entries:
        key, value = entries.pop()
        is_many = len(value) > MAX_LAYERS if isinstance(value, list) else isinstance(value, int) and value > MAX_LAYERS
        if is_many and re.search("layers|blocks|block_out|depth", key):
            raise UserError(f"{place}: {key} is {show(value)}: a model of more than {MAX_LAYERS:,} layers is not built")
        if isinstance(value, Mapping):
            entries.extend(value.items())
        elif isinstance(value, list):
            entries.extend((key, item) for item in value)


@contextmanager
def unread() -> Iterator[None]:
    """Within, models of diffusers are built from their configuration, and no file of weights is opened."""
    from diffusers import ModelMixin

    before = ModelMixin.__dict__["from_pretrained"]

    def from_configuration(cls: Any, address: str, **more: Any) -> Any:
        module = cls.from_config(cls.load_config(address, **{k: v for k, v in more.items() if k == "subfolder"}))
        return (module, dict[str, Any]()) if more.get("output_loading_info") else module

    ModelMixin.from_pretrained = classmethod(from_configuration)  # pyright: ignore[reportAttributeAccessIssue]  # until the end of the block
    try:
        yield
    finally:
        ModelMixin.from_pretrained = before


@contextmanager
def on_meta() -> Iterator[None]:
    """Within, networks and codecs are built on torch's meta device, where tensors have shapes and no numbers."""
    import diffusers.models.autoencoders.autoencoder_kl_cosmos  # noqa: F401  # its import makes a table, which would stay on meta

    with torch.device("meta"), unread():
        yield
