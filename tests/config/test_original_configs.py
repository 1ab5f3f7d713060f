"""Commands written for Cosmos and FastGen name configuration files of those trees: they paste where the experiment is ours."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from fewstep.config import ConfigError, compose, originals, read_command, recipe


@dataclass(frozen=True)
class Small:
    iterations: int = 1


@recipe("original_configs_small")
def small() -> Small:
    """A run."""
    return Small()


# From the original documents, with our experiment in the place of theirs.
COMMANDS = [
    "--config=cosmos_predict2/_src/predict2/distill/configs/registry_predict2p5.py -- experiment=original_configs_small",
    "--config=cosmos_transfer1/distillation/config/config_ctrl_dmd2.py -- experiment=original_configs_small iterations=7",
    "--dryrun --config=cosmos_transfer1/diffusion/config/config_train.py -- experiment=original_configs_small",
    "--config=cosmos_predict1/diffusion/training/config/config.py -- experiment=original_configs_small",
    "--config fastgen/configs/experiments/CosmosPredict2/config_dmd2.py - experiment=original_configs_small",
    "--config=/opt/FastGen/fastgen/configs/experiments/CosmosPredict2/config_sf.py - experiment=original_configs_small",
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_originals_pastes(words: str) -> None:
    command = read_command(words.split())
    assert len(originals(command)) == 1
    assert compose(command, Small).iterations == (7 if "iterations" in words else 1)


def test_it_is_not_imported_even_where_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = Path("cosmos_transfer1/distillation/config/config_ctrl_kd.py")
    there.parent.mkdir(parents=True)
    there.write_text("raise SystemExit('imported')\n")
    command = read_command([f"--config={there}", "--", "experiment=original_configs_small"])
    assert originals(command) == (str(there),)
    assert compose(command, Small) == Small()


def test_a_file_of_ours_is_imported_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = Path("fastgen/configs/mine.py")
    mine.parent.mkdir(parents=True)
    mine.write_text(
        "from dataclasses import dataclass\nfrom fewstep.config import recipe\n"
        "@dataclass(frozen=True)\nclass Mine:\n    iterations: int = 3\n"
        "@recipe('original_configs_mine')\ndef mine() -> Mine:\n    'A run.'\n    return Mine()\n"
    )
    command = read_command(["--config", str(mine), "experiment=original_configs_mine"])
    assert originals(command) == ()
    assert compose(command, object).iterations == 3  # type: ignore[attr-defined]


def test_without_an_experiment_it_is_told_what_is_wanted() -> None:
    command = read_command(
        ["--config=fastgen/configs/experiments/CosmosPredict2/config_kd_causal.py", "-", "trainer.fsdp=True"]
    )
    with pytest.raises(ConfigError, match=r"config_kd_causal\.py is a configuration of the original code; say which run it is"):
        compose(command, Small)
    with pytest.raises(ConfigError, match="original_configs_smal"):
        compose(read_command(["--config=fastgen/configs/a.py", "experiment=original_configs_smal"]), Small)


@pytest.mark.parametrize("path", ["my_recipes.py", "configs/run.py", "cosmos_predict2/train.py", "notfastgen/configs/a.py"])
def test_other_files_that_are_missing_are_still_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=path):
        compose(read_command([f"--config={path}", "experiment=original_configs_small"]), Small)
