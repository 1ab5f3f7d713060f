"""The shipped control branch: clips of the toy teacher follow the edges they are led by, and not those of other clips."""

import numpy as np
import torch

import fewstep
from fewstep.batch import Condition
from fewstep.data.controls import Edge
from fewstep.diffusion import Rng, TeacherSampler
from fewstep.evaluation import canny_f1
from fewstep.inference.model import open_model
from fewstep.networks.encoders.codecs import open_codec, to_uint8
from fewstep.networks.encoders.text import open_text_encoder
from fewstep.toyworld.clips import stream
from fewstep.toyworld.physics import World

TOY = fewstep.TOY
SERIES, NUM = 7_400_009, 24  # clips that neither the teacher nor its branch has seen


def f1(made: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of each clip, at thresholds for clips of 32 x 32 (evaluation/control.py)."""
    return np.array([canny_f1(a, b, low=40, high=90) for a, b in zip(made, wanted, strict=True)])


def beyond_chance(difference: np.ndarray) -> bool:
    return bool(difference.mean() > 4 * difference.std(ddof=1) / len(difference) ** 0.5)


@torch.no_grad()
def test_clips_follow_the_edges_that_lead_them() -> None:
    clips = list(stream(World(), SERIES, range(NUM)))
    wanted = np.stack([clip.rgb for clip in clips])
    codec, encoder = open_codec(TOY), open_text_encoder(TOY)
    edges = torch.from_numpy(np.stack([Edge("medium")(clip.rgb) for clip in clips]))
    hint = codec.encode(edges.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
    text, mask = encoder.encode([clip.caption for clip in clips])
    noise = Rng.of_samples(list(range(NUM))).normal((8, 5, 4, 4))
    cond = Condition(text=text, text_mask=mask)
    sampler = TeacherSampler("unipc", 12, shift=1.0)

    def made(controls: tuple[str, ...], cond: Condition) -> np.ndarray:
        return to_uint8(codec.decode(sampler(open_model(TOY, controls=controls).network, noise, cond)), "the teacher")

    led = made(("edge",), Condition(text=text, text_mask=mask, control={"edge": hint}))
    alone = made((), cond)
    best = f1(
        to_uint8(codec.decode(codec.encode(torch.from_numpy(wanted).permute(0, 4, 1, 2, 3).float() / 127.5 - 1)), "the codec"),
        wanted,
    )
    own, others, without = f1(led, wanted), f1(led, np.roll(wanted, 1, 0)), f1(alone, wanted)
    print(f"tokenizer {best.mean():.3f}, led {own.mean():.3f}, alone {without.mean():.3f}, of others {others.mean():.3f}")
    assert beyond_chance(own - without) and beyond_chance(own - others)
    assert own.mean() - without.mean() > 0.4 * (best.mean() - without.mean())  # of what the tokenizer lets through
