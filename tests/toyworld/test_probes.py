"""The probes against what the world knows: projected centres, gravity, words; and against faults they must see."""

import dataclasses

import numpy as np
import pytest

from fewstep.toyworld import clips, probes
from fewstep.toyworld.clips import Clip
from fewstep.toyworld.physics import COLOURS, Body, Scene, World
from fewstep.toyworld.probes import NAMES, Description, Parsed, adherence, descriptions, flights, parse
from fewstep.toyworld.scores import damaged

WORLD = World()
SEED, NUM = 9_100, 128


@pytest.fixture(scope="module")
def series() -> list[Clip]:
    return clips.clips(WORLD, SEED, range(NUM))


@pytest.fixture(scope="module")
def real(series: list[Clip]) -> np.ndarray:
    return np.stack([clip.rgb for clip in series])


@pytest.fixture(scope="module")
def parsed(real: np.ndarray) -> Parsed:
    return parse(real)


@pytest.fixture(scope="module")
def wanted(series: list[Clip]) -> Description:
    return descriptions([clip.caption for clip in series])


def test_coverage_of_a_mixed_pixel_is_its_share() -> None:
    share = np.linspace(0.4, 1, 13)[:, None, None, None]
    shade = np.array([1.0, 0.8, 0.6])[None, :, None, None]
    paint = np.array(list(COLOURS.values()))[None, None]
    pixels = np.round((share * shade * paint + (1 - share) * 0.72) * 255).astype(np.uint8)
    coverage, colour = probes.coverage_of(pixels)
    sees = np.broadcast_to(np.arange(6), colour.shape)
    bright = np.broadcast_to((share * shade)[..., 0] > 0.45, colour.shape)
    np.testing.assert_array_equal(colour[bright], sees[bright])
    assert np.abs(coverage - share[..., 0])[bright].max() < 0.012  # rounding to bytes
    grey, none = probes.coverage_of(np.full((4, 3), 180, np.uint8))
    assert (grey == 0).all() and (none == -1).all()


def test_count_colours_and_shapes_of_real_clips(parsed: Parsed, wanted: Description) -> None:
    assert (parsed.present == wanted.present).all(1).mean() >= 0.99
    assert (parsed.count == wanted.present.sum(1)).mean() >= 0.99
    both = parsed.present & wanted.present
    assert (parsed.is_box == wanted.is_box)[both].mean() >= 0.98
    found = adherence(parsed, wanted)
    assert found.colours >= 0.99 and found.colours_and_shapes >= 0.97
    others = adherence(parsed, wanted.rows(np.roll(np.arange(NUM), 1)))
    assert others.colours_and_shapes <= others.colours < 0.12


def test_centres_are_the_projected_ones(series: list[Clip], parsed: Parsed) -> None:
    errors = []
    for row, clip in enumerate(series):
        for n, body in enumerate(clip.scene.bodies):
            size = (clip.segmentation == n + 1).sum((1, 2))
            whole = size >= 0.9 * size.max()
            error = parsed.centre[row, NAMES.index(body.colour)] - clip.keypoints[:, n, 0, :2] * 32
            errors.append(np.abs(error[whole]))
    errors = np.concatenate(errors)
    assert np.nanmedian(errors) < 0.12
    assert np.nanquantile(errors, 0.9) < 0.5


def test_gravity_is_the_worlds(parsed: Parsed) -> None:
    found = flights(parsed)
    known = found.gravity[~np.isnan(found.gravity)]
    assert len(known) >= 100
    assert np.median(known) == pytest.approx(9.81, rel=0.03)
    per_m = WORLD.camera.focal_px / 16**2
    slowest, fastest = (9.81 * per_m / WORLD.lanes_m[lane] for lane in (2, 0))
    assert ((found.pull_px > 0.85 * slowest) & (found.pull_px < 1.15 * fastest)).mean() > 0.9
    assert (np.diff(found.clip) >= 0).all()


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_wrong_gravity_is_read_off(factor: float, parsed: Parsed) -> None:
    played = clips.clips(WORLD, SEED, range(64), gravity=factor * 9.81)
    other = flights(parse(np.stack([clip.rgb for clip in played])))
    assert np.median(other.pull_px) / np.median(flights(parsed).pull_px) == pytest.approx(factor, rel=0.1)
    known = other.gravity[~np.isnan(other.gravity)]
    assert np.median(known) == pytest.approx(factor * 9.81, rel=0.06)


def test_direction_smoothness_and_permanence_of_real_clips(parsed: Parsed, wanted: Description) -> None:
    assert np.nanmean(probes.sides_match(parsed, wanted)) >= 0.98
    assert 0.15 < np.nanmean(probes.second_difference_px(parsed)) < 0.4
    assert np.nanmean(probes.permanence(parsed)) >= 0.995


def test_broken_time_is_seen(real: np.ndarray, wanted: Description) -> None:
    mirrored, reversed_ = parse(real[:, :, :, ::-1]), parse(real[:, ::-1])
    for wrong in (mirrored, reversed_):
        assert np.nanmean(probes.sides_match(wrong, wanted)) < 0.2
    frozen = parse(np.repeat(real[:, :1], 17, axis=1))
    assert np.nanmean(probes.sides_match(frozen, wanted)) == 0
    assert len(flights(frozen).clip) == 0
    assert np.nanmax(probes.second_difference_px(frozen)) == 0
    rng = np.random.Generator(np.random.Philox(key=0))
    shuffled = parse(np.stack([clip[rng.permutation(17)] for clip in real]))
    assert np.nanmean(probes.second_difference_px(shuffled)) > 4
    assert len(flights(shuffled).clip) < 0.3 * len(flights(parse(real)).clip)


def test_an_object_that_vanishes_breaks_permanence() -> None:
    ball = Body("sphere", "red", 0.45, 0, (-0.6, 0.45), (0.8, 0.0))
    box = Body("box", "green", 0.4, 1, (0.9, 0.4))
    both = clips.render(WORLD, Scene((ball, box))).rgb
    alone = clips.render(WORLD, Scene((box,))).rgb
    vanishing = parse(np.stack([both, np.concatenate([both[:10], alone[10:]])]))
    np.testing.assert_allclose(probes.permanence(vanishing), [1, 1 - 7 / 34], rtol=1e-6)


def test_an_object_behind_another_or_out_of_the_picture_is_excused() -> None:
    front = Body("box", "blue", 0.42, 0, (0.0, 0.42))
    behind = Body("sphere", "yellow", 0.36, 2, (-1.2, 0.36), (2.6, 0.0))
    leaving = Body("sphere", "red", 0.4, 1, (1.0, 0.4), (3.0, 0.0))
    made = parse(np.stack([clips.render(WORLD, Scene((front, behind, leaving))).rgb]))
    assert (made.area[0, NAMES.index("red")] == 0).any()
    assert probes.permanence(made)[0] == 1


def test_two_objects_of_one_colour_are_counted() -> None:
    twins = (Body("sphere", "red", 0.45, 0, (-0.8, 0.45), (0.5, 0.0)), Body("sphere", "red", 0.45, 0, (0.9, 0.45)))
    made = parse(clips.render(WORLD, Scene(twins)).rgb[None])
    assert made.count.tolist() == [2]
    assert adherence(made, ["a red sphere rolls to the right."]) == (0.0, 0.0)


def test_light_damage_changes_little(real: np.ndarray, wanted: Description) -> None:
    for blur, noise in ((0.4, 0.01), (0.0, 0.03), (0.7, 0.0)):
        assert adherence(parse(damaged(real[:64], blur, noise)), wanted.rows(np.arange(64))).colours_and_shapes >= 0.95


def test_twice_the_resolution_gives_the_same_answers(parsed: Parsed) -> None:
    fine = dataclasses.replace(WORLD, height=64, width=64)
    large = parse(np.stack([clip.rgb for clip in clips.clips(fine, SEED, range(8))]))
    small = parsed.rows(slice(8))
    np.testing.assert_array_equal(large.present, small.present)
    np.testing.assert_array_equal(large.is_box & large.present, small.is_box & small.present)
    assert np.nanmedian(np.abs(large.centre - small.centre)) < 0.15
    assert np.nanmedian(flights(large).gravity) == pytest.approx(9.81, rel=0.06)


def test_empty_pictures_have_no_objects_and_no_numbers() -> None:
    empty = parse(np.full((2, 17, 32, 32, 3), 180, np.uint8))
    assert empty.count.tolist() == [0, 0]
    assert np.isnan(probes.second_difference_px(empty)).all() and np.isnan(probes.permanence(empty)).all()
    assert len(flights(empty).clip) == 0
    assert adherence(empty, ["a red box slides to the left."] * 2).colours == 0
    assert probes.sides_match(empty, descriptions(["a red box slides to the left.", "a red box is dropped."]))[0] == 0


def test_what_cannot_be_probed_is_refused(real: np.ndarray) -> None:
    with pytest.raises(ValueError, match="two red objects"):
        descriptions(["a red sphere is dropped, a red box is dropped."])
    with pytest.raises(ValueError, match="2 clips and 1 captions"):
        adherence(real[:2], ["a red sphere is dropped."])
    with pytest.raises(ValueError, match="17 frames of 20 x 32"):
        parse(real[:2, :, :20])
    with pytest.raises(ValueError, match="uint8"):
        parse(real[:2].astype(np.float64))
