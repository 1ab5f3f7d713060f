"""Every command of docs/coming-from-cosmos.md is a line of a story, or names the test that runs it."""

import re
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from shell import ROOT, commands
from test_docs import COMMANDS, split

PAGE = "docs/coming-from-cosmos.md"
FOLDER = Path(__file__).parent
# What stands for any name on the page: a word of capitals, the reader's files, dots.
PLACES = "RUN|OUT|EXPORT|FOLDER|TOKENIZER|PIPELINE|TEACHER|DATASET|ITER|[A-Z]"
ANY = re.compile(rf"\\\.\\\.\\\.|(?<![A-Za-z0-9_])({PLACES})(?![A-Za-z0-9_])|TYPE|NAME")
FILES = re.compile(r"(spec\.json|student|out|outputs)$")
# Commands that no story walks, by how they begin: the test that runs each, on files as the original tools write them.
ELSEWHERE = {
    "torchrun --nproc_per_node=8 -m fewstep.train experiment=CosmosPredict2_": (
        "recipes/test_one_step.py::test_a_recipe_takes_a_step"
    ),
    "fewstep convert P_model_net iter_N_full.pt": "networks/test_weights_in.py::test_a_distributed_checkpoint",
    "fewstep convert ITER/model:net OUT/model.pt": "networks/test_weights_in.py::test_a_distributed_checkpoint",
    "fewstep convert ITER/model:net_ema OUT/model_ema_fp32.pt --dtype fp32": (
        "networks/test_weights_in.py::test_another_precision_and_a_writer_that_safetensors_reads"
    ),
    "fewstep convert X.pth:net ode_init.pt": "networks/test_weights_in.py::test_whatever_a_trainer_wraps_around_its_weights",
    "fewstep convert iter_N.pt OUT.pt": (
        "networks/test_weights_in.py::test_parts_of_tensor_parallelism_are_put_together_as_they_were_cut"
    ),
    "fewstep convert iter_N_model.pt OUT.pt --lora-scale 1": (
        "networks/test_cosmos_lora.py::test_predict1s_adapters_are_added_into_the_layers_beside_which_they_lie"
    ),
    "fewstep prepare controls datasets/dmd2 --type depth --model FOLDER": "prepare/test_controls.py::test_the_command",
    "fewstep prepare text D --text-encoder google-t5/t5-11b --prompt P": (
        "prepare/test_text.py::test_one_prompt_for_all_as_the_nemo_assets_want_it"
    ),
    "fewstep pipeline cosmos_self_forcing": (
        "stories/test_pipeline.py::test_stage_by_stage_and_all_at_once_it_is_the_same_student"
    ),
    "fewstep pairs TEACHER --prompts P --out O": "inference/test_pairs.py::test_the_files_of_fastgen_hold_the_same_pairs",
    "fewstep generate FOLDER --input_image_or_video_path": (
        "inference/test_generate.py::test_a_teacher_is_solved_with_guidance_and_led_by_first_frames"
    ),
}


def of_stories() -> list[tuple[str, list[str]]]:
    found = []
    for script in sorted(FOLDER.glob("*.sh")):
        for _, line in commands(script.read_text()):
            line = re.sub(r"^(\w+=\S+\s+)+", "", line.strip())
            for start in ("fewstep ", "torchrun ", "python -m fewstep"):
                if line.startswith(start):
                    found.append(split(re.sub(r"\$\{?TYPE\}?", "edge", line)))
    return found


STORIES = of_stories()


def is_walked(command: str) -> bool:
    """Whether one line of a story has this verb and every word of it, placeholders standing for anything."""
    verb, words = split(command)
    wanted = [re.compile(ANY.sub(".+", re.escape(word))) for word in words if not FILES.match(word) and word not in ("-", "--")]
    return any(verb == other and all(any(map(word.fullmatch, line)) for word in wanted) for other, line in STORIES)


@pytest.mark.parametrize("command", [command for page, command in COMMANDS if page == PAGE])
def test_a_command_of_the_page_is_run(command: str) -> None:
    test = next((test for start, test in ELSEWHERE.items() if command.startswith(start)), None)
    if test is None:
        assert is_walked(command), shlex.join(split(command)[1])
        return
    file, _, name = test.partition("::")
    assert re.search(rf"^def {name}\b", (ROOT / "tests" / file).read_text(), flags=re.MULTILINE), test
