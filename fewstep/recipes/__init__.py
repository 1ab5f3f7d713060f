"""Recipes: functions that return one complete Run, registered by name.

The names stand here once more, by what they are for, so that a command with a mistyped name is refused, and that they can be
listed in a useful order; a test compares them with what is registered. So do the names of settings, in settings.json, which
`python docs/list_options.py` writes: reading the classes that declare them imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fewstep.config import Command, ConfigError
from fewstep.config.problems import hint, join, nearest_keys
from fewstep.registry import registered
from fewstep.untrusted.text import read_json

_CONTROLS = ("depth", "edge", "keypoint", "seg", "vis")
_TRANSFER1 = "CTRL_7Bv1pt3_lvg_tp_121frames_control_input"
_PREDICT25 = "dmd2_trigflow_distill_cosmos_predict2"
_OWN = "A teacher and data of your own: teacher=PIPELINE data.dataset_dir=DIR"
GROUPS: dict[str, tuple[str, ...]] = {  # the most useful first
    _OWN: (
        *("finetune", "lora", "kd", "dmd2", "scm", "rcm", "flow_map", "flow_map_on_policy"),
        *("causal_finetune", "causal_consistency", "causal_kd", "self_forcing"),
    ),
    "Cosmos-Predict2.5 and Cosmos-Transfer2.5": (
        *(f"{_PREDICT25}_{size}_bidirectional_TnI2V" for size in ("2B", "14B")),
        f"{_PREDICT25}_2B_bidirectional_TnI2V_w_discriminator",
        *(f"dmd2_trigflow_distill_cosmos_transfer2p5_2B_bidirectional_{name}" for name in ("depth", "edge", "seg", "vis")),
    ),
    "Cosmos-Predict1": ("video2world_7b_example_cosmos_nemo_assets", "video2world_7b_lora_example_cosmos_nemo_assets"),
    "Cosmos-Transfer1": (
        *(f"DISTILL_CTRL_7Bv1_{control}_fsdp_{method}_train" for control in (*_CONTROLS, "all") for method in ("kd", "dmd2")),
        *(f"{_TRANSFER1}_{control}_block3_{kind}" for control in _CONTROLS for kind in ("posttrain", "pretrain")),
        "dmd2_cosmos_transfer1_7b_edge",
    ),
    "FastGen": (
        *(f"{name}_kd{toy}" for name in ("WanT2V", "SDXL", "CogVideoX") for toy in ("", "_toy")),
        *("WanT2V_kd_path", "WanT2V_kd_path_toy"),
        *(
            f"{name}_{stage}{toy}"
            for name in ("CosmosPredict2", "WanT2V")
            for stage in ("kd_causal", "sf")
            for toy in ("", "_toy")
        ),
    ),
    "The toy world of fewstep demo": (
        *("toy_teacher", "toy_edge", "toy_vis", "toy_depth", "toy_kd_1step", "toy_kd_4step"),
        *("toy_dmd2_1step", "toy_dmd2_4step", "toy_dmd2_1step_lora", "toy_dmd2_4step_lora"),
        *("toy_kd_causal", "toy_sf"),
        *("toy_causal_finetune", "toy_causal_consistency", "toy_sf_consistency"),
        *("toy_rcm", "toy_scm", "toy_flow_map", "toy_flow_map_on_policy"),
    ),
    "Points of the plane with an exact teacher, a minute each": (
        *("analytic_finetune", "analytic_kd", "analytic_kd_4step", "analytic_dmd2", "analytic_dmd2_onestep"),
        *("analytic_biased", "analytic_dmd2_biased", "analytic_dmd2_gan", "analytic_f_distill", "analytic_ladd"),
        *("analytic_phased", "analytic_reward", "analytic_sid"),
        *("analytic_scm", "analytic_rcm", "analytic_consistency", "analytic_tcm"),
        *("analytic_meanflow", "analytic_flow_map", "analytic_flow_map_on_policy"),
    ),
}
NAMES = frozenset(name for names in GROUPS.values() for name in names)


SETTINGS = Path(__file__).with_name("settings.json")


@dataclass(frozen=True)
class Settings:
    """settings.json."""

    tree: dict[str, Any]  # the settings of every run: those below a name, or null where they depend on what is chosen
    others: list[str]  # names of settings of the kinds that can be chosen, and of parameters of recipes


def refuse_unknown(command: Command) -> None:
    """Raises ConfigError if the command names no run, or a recipe or a setting that no run of this package can have."""
    if any(file.endswith(".py") for file in command.files):
        return  # which may register the name
    if command.experiment is None and not command.files:
        own = ", ".join(GROUPS[_OWN])
        raise ConfigError(
            [("experiment", f"which run? Give experiment=NAME or a .yaml file. {_OWN}: {own}. fewstep ls lists all")]
        )
    if command.experiment is not None and command.experiment not in NAMES | registered("recipe"):
        raise ConfigError([("experiment", f"no recipe is named {command.experiment!r}{hint(command.experiment, NAMES)}")])
    refuse_mistyped(command.overrides)


def refuse_mistyped(overrides: Iterable[str], prefix: str = "") -> None:
    """Raises ConfigError, which names them below `prefix`, for settings KEY=VALUE that no run has, spelled like others.

    Not if one of the others depends on what is chosen: the classes know whether it is wrong, too, and one error names all.
    """
    settings = read_json(SETTINGS, "Install fewstep again", Settings)
    keys = [word.partition("=")[0] for word in overrides]
    problems = {key: text for key in keys if (text := _mistyped(key, settings))}
    if problems and all(key in problems or _is_there(key, settings.tree) for key in keys):
        raise ConfigError([(join(prefix, key), text) for key, text in problems.items()])


def _is_there(key: str, tree: Mapping[str, Any]) -> bool:
    first, _, rest = key.partition(".")
    return first in tree and (not rest or _is_there(rest, tree[first] or {}))


def _mistyped(key: str, settings: Settings) -> str | None:
    """The message about a setting that no run has, and that is spelled like one of its level; None for every other."""
    level, names = "", settings.tree
    for word in key.split("."):
        if names is None:
            return None
        if word not in names:
            if not get_close_matches(word, names, n=1) or {word, key.rpartition(".")[2]} & {*settings.others}:
                return None
            near = nearest_keys(key, level, list(names), list(_keys(settings.tree)))
            return f"no such setting; did you mean {' or '.join(near)}?" if near else None
        level, names = join(level, word), names[word]
    return None


def _keys(tree: Mapping[str, Any], level: str = "") -> Iterator[str]:
    for name, below in tree.items():
        yield join(level, name)
        yield from _keys(below or {}, join(level, name))
