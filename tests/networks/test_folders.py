"""A folder of diffusers with something missing or cut short: the message names the file."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.inference.model import open_model
from fewstep.networks.encoders.codecs import open_codec

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fewstep.TOY, tmp_path / "toy"))


@pytest.mark.parametrize(("part", "opened"), [("transformer", open_model), ("vae", open_codec)])
def test_weights_that_are_missing_cut_short_or_too_few(part: str, opened: object, toy: Path) -> None:
    assert callable(opened)
    file = toy / part / WEIGHTS
    whole = file.read_bytes()
    file.unlink()
    with pytest.raises(ValueError, match=rf"{toy / part}: its weights are missing \({WEIGHTS}\)\. Copy that folder again"):
        opened(str(toy))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{file}: cannot be opened: .*\. Copy it again, whole"):
        opened(str(toy))
    file.write_bytes(whole)
    tensors = load_file(file)
    lost = sorted(tensors)[3]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
    with pytest.raises(ValueError, match=rf"{part}: its weights do not fit its config\.json: missing keys: {lost}"):
        opened(str(toy))


def test_a_student_without_its_paper_is_no_teacher(toy: Path) -> None:
    index = json.loads((toy / "model_index.json").read_text())
    (toy / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "StudentPipeline"]}))
    with pytest.raises(ValueError, match=r"toy: a student without its student\.json"):
        open_model(toy)
    (toy / "student.json").write_text('{"times": [1.0')
    with pytest.raises(ValueError, match=r"student\.json: damaged, no JSON: .*\. Export the student again"):
        open_model(toy)


@pytest.mark.parametrize("address", ["nowhere", "two/folders/deep", "tests/no_such_folder", "with a blank/in it", "./here"])
@pytest.mark.parametrize("opened", [open_model, open_codec])
def test_a_mistyped_folder_is_not_asked_of_the_hub(opened: object, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    assert callable(opened)
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=rf"no (model|codec).* at '{address}': there is no such folder"):
        opened(address)
