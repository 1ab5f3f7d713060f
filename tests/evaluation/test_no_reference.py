"""Scores of single clips that need weights, real clips or a judge: NIQE-like, LPIPS, given frames, prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch.nn import functional

from fewstep.cli import main
from fewstep.data.files import video
from fewstep.evaluation import lpips, naturalness, pixels
from fewstep.evaluation.frechet import Moments
from fewstep.evaluation.judges import OTHERS, Adherence, ClipJudge
from fewstep.evaluation.score import ClipSet

# ---- local statistics --------------------------------------------------------------------------------------------------


def test_the_asymmetric_gaussian_is_the_one_that_values_were_drawn_from() -> None:
    rng = np.random.default_rng(0)
    for shape, left, right in ((2.0, 1.0, 1.0), (1.0, 0.5, 1.5), (0.6, 2.0, 1.0), (4.0, 1.0, 1.0)):
        sizes = stats.gennorm.rvs(shape, size=200_000, random_state=rng)
        is_left = rng.uniform(size=sizes.size) < left / (left + right)  # the density is one function at 0
        values = np.where(is_left, -left, right) * np.abs(sizes)
        fit = [float(one[0]) for one in naturalness.asymmetric(values[None])]
        assert fit == pytest.approx([shape, left, right], rel=0.04)


def texture(seed: int) -> NDArray[np.uint8]:
    """Edges and shades at many scales, as pictures have them: discs that hide one another."""
    rng = np.random.default_rng(seed)
    picture = np.full((64, 64, 3), 128, np.uint8)
    for radius in np.geomspace(24, 1.5, 90):
        centre, colour = rng.integers(0, 64, 2).tolist(), rng.integers(20, 236, 3).tolist()
        cv2.circle(picture, centre, round(radius), colour, -1, cv2.LINE_AA)
    return np.repeat(picture[None], 2, axis=0)


def changed(clip: NDArray[np.uint8], blur: float = 0, noise: float = 0) -> NDArray[np.uint8]:
    soft = np.stack([cv2.GaussianBlur(f, (0, 0), blur) if blur else f for f in clip]).astype(float)
    return np.clip(soft + np.random.default_rng(0).normal(0, 1, clip.shape) * noise, 0, 255).astype(np.uint8)


def test_blurred_and_noisy_clips_are_far_from_real_ones() -> None:
    law = Moments()
    for seed in range(40):
        rows = naturalness.features(texture(seed))
        assert rows is not None and rows.shape == (2 * 16, 36)
        law.update(rows)

    def mean(**damage: float) -> float:
        rows = [naturalness.features(changed(texture(seed), **damage)) for seed in range(100, 112)]
        means = torch.stack([row.mean(dim=0) for row in rows if row is not None])
        gaussian = law.compute()
        apart = (means - gaussian.mean).numpy()
        wanted = np.sqrt(np.einsum("ni,ij,nj->n", apart, np.linalg.pinv(gaussian.covariance.numpy()), apart))
        values = naturalness.distances(means, law)
        assert values == pytest.approx(wanted.tolist(), rel=1e-6)
        return float(np.mean(values))

    real = mean()
    assert real < 2
    assert min(mean(blur=0.7), mean(blur=1.5)) > 3 * real  # in no order: 12 and 9, where real clips have 1.5
    assert mean(noise=25) > mean(noise=8) > 1.3 * real
    assert naturalness.features(np.zeros((1, 12, 40, 3), np.uint8)) is None


# ---- LPIPS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lpips.alexnet, pytest.param(lpips.vgg16, marks=pytest.mark.slow)])
def test_lpips_is_its_formula_from_either_form_of_the_files(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(0)
    network = make()
    for lin in network.lins:
        lin.weight.data.abs_()
    state = network.state_dict()
    torch.save({name: x for name, x in state.items() if name.startswith("features.")}, tmp_path / "torchvision.pth")
    lins = {f"lin{name.split('.')[1]}.model.1.weight": x for name, x in state.items() if name.startswith("lins.")}
    torch.save(lins, tmp_path / "lins.pth")
    whole = {f"net.slice1.{name.removeprefix('features.')}": x for name, x in state.items() if name.startswith("features.")}
    torch.save({**whole, **lins, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, tmp_path / "whole.pth")
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8) for _ in range(2))

    def looks(frames: NDArray[np.uint8]) -> list[torch.Tensor]:
        """Layer by layer, by hand."""
        x = torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 127.5 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        out = []
        is_alex = make is lpips.alexnet
        for name in [name for name in state if name.startswith("features.") and name.endswith("weight")]:
            n = int(name.split(".")[1])
            stride, pad = (4, 2) if n == 0 and is_alex else (1, state[name].shape[-1] // 2)
            if is_alex and n in (3, 6):
                x = functional.max_pool2d(x, 3, 2)
            if not is_alex and n in (5, 10, 17, 24):
                x = functional.max_pool2d(x, 2, 2)
            x = functional.conv2d(x, state[name].double(), state[name.replace("weight", "bias")].double(), stride, pad).relu()
            if n in ((0, 3, 6, 8, 10) if is_alex else (2, 7, 14, 21, 28)):
                out.append(x / x.square().sum(dim=1, keepdim=True).sqrt())
        return out

    wanted = 0.0
    for number, (one, other) in enumerate(zip(looks(a), looks(b), strict=True)):
        wanted += float((state[f"lins.{number}.weight"].double() * (one - other).square()).sum(dim=1).mean())
    for files in ((tmp_path / "whole.pth",), (tmp_path / "torchvision.pth", tmp_path / "lins.pth")):
        assert lpips.distance(a, b, files) == pytest.approx(wanted, rel=1e-4)
    assert lpips.distance(a, a, files) == 0
    with pytest.raises(ValueError, match="are the weights of another network: lins"):
        lpips.distance(a, b, (tmp_path / "torchvision.pth",))
    with pytest.raises(ValueError, match="hold neither AlexNet nor VGG-16"):
        lpips.distance(a, b, (tmp_path / "lins.pth",))


# ---- given frames ------------------------------------------------------------------------------------------------------


def test_given_frames_are_compared_with_the_clip_and_a_jump_after_them_is_seen() -> None:
    rng = np.random.default_rng(0)
    wide = cv2.GaussianBlur(rng.uniform(0, 255, (32, 64, 3)), (0, 0), 2).astype(np.uint8)
    clip = np.stack([wide[:, n : n + 32] for n in range(12)])
    kept = pixels.of_given(clip, clip[:5])
    assert kept["given_psnr"] == 100 and kept["seam"] == pytest.approx(1, rel=0.1)
    jumping = np.concatenate([clip[:5], clip[5:] // 2])
    scores = pixels.of_given(jumping, clip[:5])
    assert scores["given_psnr"] == 100 and scores["seam"] > 4
    lost = pixels.of_given(np.clip(clip.astype(int) + 10, 0, 255).astype(np.uint8), clip[:5])
    assert lost["given_psnr"] == pytest.approx(20 * math.log10(255 / 10), abs=0.1)


# ---- prompts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of transformers with random weights, and a vocabulary of letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(n) for n in range(97, 123)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(vocabulary), "eos_token_id": 53, "bos_token_id": 52, "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).eval().save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_clip_judge_gives_the_cosine_of_transformers_beside_that_of_other_prompts(tiny_clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 256, (3, 40, 48, 3), dtype=np.uint8) for _ in range(4)]
    prompts = ["a red ball", "two blue boxes", "snow", "a car"]
    record = Adherence(ClipJudge(tiny_clip)).score(ClipSet(clips, prompts=prompts), None)
    model, processor = CLIPModel.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip)
    frames = [frame for clip in clips for frame in clip]
    with torch.no_grad():
        logits = model(**processor(text=prompts, images=frames, return_tensors="pt", padding=True)).logits_per_image
        cosines = (logits / model.logit_scale.exp()).view(4, 3, 4).mean(dim=1)
    assert record.per_clip["prompt_score"] == pytest.approx(cosines.diagonal().tolist(), abs=1e-5)
    others = np.mean([float(cosines[n, (n + 2) % 4]) for n in range(4)])
    assert record.anchors[OTHERS]["prompt_score"].value == pytest.approx(others, abs=1e-5)
    with pytest.raises(ValueError, match="holds no CLIP"):
        ClipJudge(tiny_clip / "nowhere").scores(clips, prompts)


def test_the_command_judges_clips_by_the_prompts_of_a_data_set(tmp_path: Path) -> None:
    words = ("--out", str(tmp_path / "data"), "--num", "6", "--seed", "5", "--workers", "1", "--only", "videos,metas")
    assert main(["prepare", "toyworld", *words]) == 0
    for path in sorted((tmp_path / "data" / "videos").iterdir()):  # a folder of clips without captions
        video.write(tmp_path / "made" / path.name, video.read(path).frames, 16.0, quality="lossless")
    out = tmp_path / "scores.json"
    where = (str(tmp_path / "made"), "--prompts", str(tmp_path / "data"), "--out", str(out))
    assert main(["evaluate", *where, "--scorer", "adherence", "judge=toyworld", "--sets", "1"]) == 0
    record = json.loads(out.read_text())
    assert record["scores"]["prompt_score"]["value"] > 0.8 > record["anchors"][OTHERS]["prompt_score"]["value"] + 0.3
