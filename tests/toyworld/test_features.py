"""The feature network of the toy world: what it refuses, that it is the same everywhere, and that it sees what it must."""

import numpy as np
import pytest
import torch

from fewstep.evaluation.frechet import frechet_distance
from fewstep.evaluation.neighbours import precision_recall
from fewstep.toyworld import features, train_features
from fewstep.toyworld.clips import clips, stream
from fewstep.toyworld.features import FeatureNet, features_by, random_net, shipped
from fewstep.toyworld.features import features as features_of
from fewstep.toyworld.physics import World
from fewstep.toyworld.scores import anchors, damaged, jittered

WORLD = World()
SEED = 9_000  # no seed of the training


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    return np.stack([clip.rgb for clip in stream(WORLD, SEED, range(512))])


@pytest.fixture(scope="module")
def known(real: np.ndarray) -> torch.Tensor:
    return features_of(real[256:])


def test_features_are_standardised_by_what_real_clips_have(known: torch.Tensor) -> None:
    assert known.shape == (256, 96) and known.dtype == torch.float32
    assert float(known.mean(0).abs().max()) < 0.35
    assert float(known.std(0).min()) > 0.7 and float(known.std(0).max()) < 1.4


def test_a_clip_has_the_same_features_in_any_batch(real: np.ndarray) -> None:
    together = features_of(real[:70])
    apart = torch.cat([features_of(real[:1]), features_of(real[1:70])])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert not together.requires_grad


def test_differences_are_those_of_the_frames() -> None:
    ramp = np.zeros((1, 17, 32, 32, 3), np.uint8) + 10 * np.arange(17, dtype=np.uint8)[None, :, None, None, None]
    x = features.with_differences(torch.from_numpy(ramp))
    assert x.shape == (1, 9, 17, 32, 32)
    torch.testing.assert_close(x[:, :3, 3], torch.full((1, 3, 32, 32), 30 / 255 - 0.5))
    torch.testing.assert_close(x[:, 3:6, 1:], torch.full((1, 3, 16, 32, 32), 3 * 10 / 255))
    assert float(x[:, 3:6, 0].abs().max()) == 0
    assert float(x[:, 6:].abs().max()) < 1e-6
    square = (np.arange(17) ** 2 // 2 * 2 / 2).astype(np.uint8)
    bent = torch.from_numpy(np.broadcast_to(square[None, :, None, None, None], (1, 17, 32, 32, 3)).copy())
    second = features.with_differences(bent)[0, 6, :, 0, 0]
    torch.testing.assert_close(second[1:-1] * 255 / 3, torch.from_numpy(np.diff(square.astype(float), 2)).float())


def test_what_is_no_set_of_clips_is_refused(real: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        features_of(real[:2].astype(np.float32))
    with pytest.raises(ValueError, match=r"\(B, T, H, W, 3\)"):
        features_of(real[0])
    with pytest.raises(ValueError, match="17 frames of 32 x 32, these are of 9 frames of 32 x 32"):
        features_of(real[:2, :9])
    with pytest.raises(ValueError, match="train_features --out"):
        features.load(features.SHIPPED.with_name("nothing.safetensors"))


def test_the_name_carries_the_hash_of_the_weights() -> None:
    assert features.name() == f"toy Frechet (net {features.weights_hash()[:8]})"
    other = features.load(features.SHIPPED)
    assert features.weights_hash(other) == features.weights_hash()
    other.std[3] *= 1.001
    assert features.weights_hash(other) != features.weights_hash()
    assert features.weights_hash(random_net()) != features.weights_hash()


def test_the_shipped_file_is_small_and_tells_its_making() -> None:
    tensors, notes = features.read_weights(features.SHIPPED)
    assert features.SHIPPED.stat().st_size < 600_000
    made_by = "python -m fewstep.evaluation.train_toyfeatures"  # the module's name on the day it was trained
    assert notes["command"].startswith(made_by)
    assert all(tensors[key].dtype == torch.float16 for key in tensors if key.startswith("convs"))
    assert 240_000 < sum(p.numel() for p in shipped().parameters()) < 265_000


def test_the_untrained_witness_is_the_same_everywhere() -> None:
    net = random_net()
    first = net.convs[0]
    assert isinstance(first, torch.nn.Conv3d)
    expected = np.random.Generator(np.random.Philox(key=20240)).standard_normal(9 * 27 * 20)[:3] * (2 / (9 * 27)) ** 0.5
    np.testing.assert_allclose(first.weight.flatten()[:3].numpy(), expected, rtol=1e-6)


def test_real_below_mild_below_heavy_and_wrong_motion_above_real(real: np.ndarray, known: torch.Tensor) -> None:
    own = features_of(real[:256])
    rng = np.random.Generator(np.random.Philox(key=1))
    made = {
        "mild": damaged(real[:256], 0.4, 0.01),
        "heavy": damaged(real[:256], 1.2, 0.1),
        "shuffled": np.stack([clip[rng.permutation(17)] for clip in real[:256]]),
        "frozen": np.repeat(real[:256, :1], 17, axis=1),
        "swapped": real[:256, [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14, 16]],
    }
    made = {name: features_of(some) for name, some in made.items()}
    generator = torch.Generator().manual_seed(0)
    ordered = 0
    for _ in range(20):
        pick = torch.randperm(256, generator=generator)[:160]
        floor, mild, heavy = (frechet_distance(some[pick], known) for some in (own, made["mild"], made["heavy"]))
        ordered += floor < mild < heavy
        assert all(frechet_distance(made[name][pick], known) > 3 * floor for name in ("shuffled", "frozen", "swapped"))
    assert ordered >= 19


def test_a_collapsed_set_is_seen_by_coverage_while_its_precision_stays(real: np.ndarray, known: torch.Tensor) -> None:
    rng = np.random.Generator(np.random.Philox(key=2))
    scenes = [clip.scene for clip in clips(WORLD, SEED, range(16))]
    from fewstep.toyworld.clips import render

    collapsed = np.stack([render(WORLD, jittered(WORLD, scenes[n % 16], 0.15, rng)).rgb for n in range(256)])
    floor, made = precision_recall(known, features_of(real[:256])), precision_recall(known, features_of(collapsed))
    assert made.precision > 0.9
    assert made.coverage < 0.5 * floor.coverage
    assert made.recall < 0.2 * floor.recall


@pytest.mark.slow
def test_every_anchor_at_full_size() -> None:
    reference = features_of(np.stack([clip.rgb for clip in stream(WORLD, SEED + 1, range(2048))]))
    made = {anchor.name: features_of(anchor.clips) for anchor in anchors(WORLD, SEED, 512)}
    generator = torch.Generator().manual_seed(0)
    ordered = apart = 0
    worse = ("gravity x0.25", "gravity x2", "frames shuffled", "frozen", "adjacent frames swapped", "places jitter 0.05 m")
    for _ in range(20):
        picks = {
            name: some[torch.randperm(512, generator=generator)[:256]] for name, some in made.items()
        }  # not the same clips
        at = {name: frechet_distance(some, reference) for name, some in picks.items()}
        ordered += at["real"] < at["mild: blur .4, noise .01"] < at["heavy: blur 1.2, noise .1"]
        apart += all(at[name] > 2 * at["real"] for name in worse)
    assert ordered >= 19
    assert apart == 20
    floor = precision_recall(reference[:512], made["real"])
    for name in ("16 scenes, jitter 0.15 m", "64 scenes, jitter 0.05 m"):
        collapsed = precision_recall(reference[:512], made[name])
        assert collapsed.precision > 0.9
        assert collapsed.coverage < (0.5 if name.startswith("16") else 0.7) * floor.coverage


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lesson() -> tuple[torch.Tensor, train_features.Labels]:
    various = World(gravity_scale=train_features.GRAVITIES)
    return train_features.labels_of(various, stream(various, SEED, range(32)))


def test_labels_are_the_worlds(lesson: tuple[torch.Tensor, train_features.Labels]) -> None:
    various = World(gravity_scale=train_features.GRAVITIES)
    _, labels = lesson
    for row, clip in enumerate(clips(various, SEED, range(8))):
        assert float(labels.log_gravity[row].exp()) == pytest.approx(clip.scene.gravity / 9.81, rel=1e-5)
        assert bool(labels.collides[row]) == clip.collides
        assert int(labels.present[row].sum()) == len(clip.scene.bodies)
        for n, body in enumerate(clip.scene.bodies):
            k = train_features.NAMES.index(body.colour)
            assert bool(labels.is_box[row, k]) == (body.shape == "box")
            first = (clip.keypoints[0, n, 0, :2] * 2 - 1).clip(-2, 2)
            np.testing.assert_allclose(labels.places[row, k, :2].numpy(), first, rtol=1e-6)


def test_training_learns_and_folding_keeps_the_function(
    lesson: tuple[torch.Tensor, train_features.Labels], tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, labels = lesson
    trainee = train_features.train_features(pictures, labels, epochs=6, batch=8)
    colours = [float(line.split("colours ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert colours[-1] < colours[0]
    x = features.with_differences(pictures[:4])
    with torch.no_grad():
        for conv, norm in zip(trainee.net.convs, trainee.norms):
            x = torch.nn.functional.silu(norm(conv(x)))
    expected = x.mean(dim=(2, 3, 4))
    net = trainee.folded()
    torch.testing.assert_close(net(pictures[:4]), expected, rtol=0.02, atol=0.005)  # half precision
    net = train_features.statistics(net, pictures)
    torch.testing.assert_close(features_of(pictures, net).mean(0), torch.zeros(96), atol=1e-4, rtol=0)
    shapes = train_features.train_shapes(pictures, labels.is_box, steps=2)
    path = tmp_path / "new.safetensors"
    train_features.save(path, net, net, shapes, {"command": "none"})
    again = features.load(path)
    assert features.weights_hash(again) == features.weights_hash(net)
    assert again.size == FeatureNet().size


def test_two_networks_at_once_give_what_each_gives_alone(real: np.ndarray) -> None:
    both = features_by(real[:70], [shipped(), random_net()])
    assert torch.equal(both[0], features_of(real[:70])) and torch.equal(both[1], features_of(real[:70], random_net()))
