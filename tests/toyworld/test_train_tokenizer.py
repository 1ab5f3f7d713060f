"""The tokenizer's own training: it resumes with equal bits, a decoder alone leaves the latents, wrong use is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.data.folder.dataset import Folder
from fewstep.networks.weights.addresses import read
from fewstep.toyworld.autoencode import Autoencode
from fewstep.toyworld.clip_critic import ClipCriticSpec
from fewstep.toyworld.dataset import write
from fewstep.toyworld.physics import World
from fewstep.toyworld.tokenizer import TokenizerSpec
from fewstep.toyworld.train_tokenizer import TokenizerRun, Trainer, main, tokenizer, train

SMALL = TokenizerSpec(channels=(8, 8, 8), latent_channels=4, resolution=16)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write(folder, 8, 3, World(), 0, ["videos", "metas"])
    return folder


@pytest.fixture
def run(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenizerRun:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    first = tokenizer()
    return replace(
        first,
        tokenizer=SMALL,
        loss=Autoencode(adversarial=0.5),
        critic=ClipCriticSpec((4, 4, 4, 4)),
        data=Folder(str(clips), text=None),
        optim=replace(first.optim, schedule="constant", warmup_iters=0),
        trainer=Trainer(max_iter=4, batch_size=2, log_every=2, save_iter=2),
    )


def weights(run: TokenizerRun) -> dict[str, torch.Tensor]:
    roles = ("tokenizer", "tokenizer.ema", "critic")
    return {f"{role} {n}": t for role in roles for n, t in read(f"{run.job.folder()}:{role}").items()}


def test_a_resumed_training_ends_with_equal_bits(run: TokenizerRun) -> None:
    whole = train(run)
    assert whole["step"] == 4 and whole["loss/rebuilt"] > 0 and whole["loss/critic"] > 0
    halved = replace(run, job=replace(run.job, name="halved"))
    train(replace(halved, trainer=replace(run.trainer, max_iter=2)))
    half = weights(halved)
    train(halved)
    resumed = weights(halved)
    for name, tensor in weights(run).items():
        assert torch.equal(resumed[name], tensor), name
    assert any(not torch.equal(half[name], tensor) for name, tensor in resumed.items())


def test_the_decoder_alone_learns_and_every_latent_stays(run: TokenizerRun, tmp_path: Path) -> None:
    torch.manual_seed(0)
    SMALL.build().module.vae.save_pretrained(tmp_path / "vae")  # type: ignore[union-attr,operator]
    spec = replace(SMALL, pretrained=str(tmp_path / "vae"), trains="decoder")
    train(replace(run, tokenizer=spec, trainer=replace(run.trainer, max_iter=2)))
    before = spec.build().module.state_dict()
    moved = {name for name, tensor in read(f"{run.job.folder()}:tokenizer").items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith(("vae.decoder.", "vae.post_quant_conv.")) for name in moved)


def test_wrong_use_is_told_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    assert main([]) == 2 and "tokenizer | decoder" in capsys.readouterr().err
    assert main(["tokenizer", "trainer.max_itr=3"]) == 2 and "did you mean trainer.max_iter?" in capsys.readouterr().err
    assert main(["tokenizer", "trainer.save_iter=0"]) == 2 and "must be at least 1, not 0" in capsys.readouterr().err
    assert main(["tokenizer", f"data.dataset_dir={tmp_path}/none"]) == 1 and "no such folder" in capsys.readouterr().err
