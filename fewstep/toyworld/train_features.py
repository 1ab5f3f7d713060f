"""Trains the feature network of the toy world and the shape classifier of the probes, and writes both to one file.

    python -m fewstep.toyworld.train_features

wrote the shipped weights. Half of the clips play under the world's own gravity, half under 0.25 to 2.5 times of it.
Batch normalisation helps the training and is folded into the convolutions afterwards. Some four minutes on one core,
one of them rendering.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.files import write_tensors
from fewstep.toyworld import features, probes
from fewstep.toyworld.clips import Clip, stream
from fewstep.toyworld.features import SHIPPED, WIDTHS, FeatureNet
from fewstep.toyworld.physics import Motion, World
from fewstep.toyworld.probes import NAMES, NUM

# Series of clips of the toy world; no evaluation may use these again.
SEED, SEED_GRAVITY, SEED_STATISTICS, SEED_HELD_OUT, SEED_HELD_OUT_GRAVITY = (
    7_100_000,
    7_100_001,
    7_100_002,
    7_100_003,
    7_100_004,
)
APART = 10  # from one --seed to the next
GRAVITIES = (0.25, 2.5)
_MOTIONS: tuple[Motion, ...] = ("thrown", "tossed", "dropped", "rolls", "slides", "stands")
_PER_COLOUR = 1 + len(_MOTIONS) + 3 + 6  # box, motion, side, places


@dataclass(frozen=True)
class Labels:
    """Ground truth of n clips, by colour where K stands."""

    present: Tensor  # n K
    is_box: Tensor  # n K
    motion: Tensor  # n K, int64
    side: Tensor  # n K, int64: 0 none, 1 left, 2 right
    places: Tensor  # n K 6: x, y in the first, the middle and the last frame, -1..1 in the picture
    collides: Tensor  # n
    log_gravity: Tensor  # n, over the world's own
    flies: Tensor  # n: something starts in the air, so gravity shows

    def rows(self, index: Tensor) -> Labels:
        return Labels(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def labels_of(world: World, clips: Iterable[Clip]) -> tuple[Tensor, Labels]:
    """The pictures (n, T, H, W, 3) uint8 of `clips`, and their labels."""
    pictures: list[Tensor] = []
    rows: list[Labels] = []
    for clip in clips:
        pictures.append(torch.from_numpy(clip.rgb))
        one = Labels(
            present=torch.zeros(NUM),
            is_box=torch.zeros(NUM),
            motion=torch.zeros(NUM, dtype=torch.int64),
            side=torch.zeros(NUM, dtype=torch.int64),
            places=torch.zeros(NUM, 6),
            collides=torch.tensor(float(clip.collides)),
            log_gravity=torch.tensor(math.log(clip.scene.gravity / world.gravity)),
            flies=torch.tensor(float(any(not b.on_floor for b in clip.scene.bodies))),
        )
        looked_at = [0, (world.num_frames - 1) // 2, world.num_frames - 1]
        for n, body in enumerate(clip.scene.bodies):
            k = NAMES.index(body.colour)
            one.present[k], one.is_box[k] = 1.0, float(body.shape == "box")
            one.motion[k] = _MOTIONS.index(body.motion)
            one.side[k] = (None, "left", "right").index(body.side)
            # Under weak gravity objects leave the picture: a place far outside is no place one could see.
            one.places[k] = torch.from_numpy(clip.keypoints[looked_at, n, 0, :2].ravel() * 2 - 1).clamp(-2, 2)
        rows.append(one)
    return torch.stack(pictures), Labels(**{f.name: torch.stack([getattr(r, f.name) for r in rows]) for f in fields(Labels)})


class Trainee(nn.Module):
    """The feature network with batch normalisation, and the heads of its training."""

    def __init__(self, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.net = FeatureNet(size)
        self.norms = nn.ModuleList(nn.BatchNorm3d(width) for width in WIDTHS)
        self.clip_head = nn.Linear(WIDTHS[-1], NUM + 2)
        self.object_head = nn.Sequential(nn.Linear(WIDTHS[-1], 192), nn.SiLU(), nn.Linear(192, NUM * _PER_COLOUR))

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        x = features.with_differences(clips)
        for conv, norm in zip(self.net.convs, self.norms):
            x = functional.silu(norm(conv(x)))
        pooled = x.mean(dim=(2, 3, 4))
        return self.clip_head(pooled), self.object_head(pooled).view(-1, NUM, _PER_COLOUR)

    def folded(self) -> FeatureNet:
        """The feature network alone, the normalisation in its weights, rounded to half precision as it will be stored."""
        out = FeatureNet(self.net.size)
        for conv, trained, norm in zip(out.convs, self.net.convs, self.norms):
            assert isinstance(conv, nn.Conv3d) and isinstance(trained, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d)
            assert norm.running_mean is not None and norm.running_var is not None
            assert conv.bias is not None and trained.bias is not None
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            conv.weight.data = (trained.weight * scale[:, None, None, None, None]).half().float().detach()
            conv.bias.data = ((trained.bias - norm.running_mean) * scale + norm.bias).half().float().detach()
        return out.eval().requires_grad_(False)


def losses(clip_head: Tensor, object_head: Tensor, labels: Labels) -> dict[str, Tensor]:
    """One term for each kind of label; those of objects count where there is an object, gravity where something flies."""
    there, num = labels.present, labels.present.sum()
    box, motion, side, places = object_head.split([1, len(_MOTIONS), 3, 6], dim=-1)
    logit_loss = functional.binary_cross_entropy_with_logits

    def of_class(logits: Tensor, target: Tensor) -> Tensor:
        return (functional.cross_entropy(logits.movedim(-1, 1), target, reduction="none") * there).sum() / num

    return {
        "colours": 2 * logit_loss(clip_head[:, :NUM], there),
        "shape": (logit_loss(box[..., 0], labels.is_box, reduction="none") * there).sum() / num,
        "motion": of_class(motion, labels.motion),
        "side": of_class(side, labels.side),
        "places": 5 * ((places - labels.places).square().mean(-1) * there).sum() / num,
        "collision": logit_loss(clip_head[:, NUM], labels.collides),
        "gravity": 2
        * ((clip_head[:, NUM + 1] - labels.log_gravity).square() * labels.flies).sum()
        / labels.flies.sum().clamp(min=1),
    }


def accuracy(trainee: Trainee, clips: Tensor, labels: Labels) -> dict[str, float]:
    """Shares of correct predictions on held-out clips, R^2 for places and log gravity."""
    trainee.eval()
    with torch.inference_mode():
        answers = [trainee(some) for some in clips.split(64)]
    head, objects = torch.cat([a for a, _ in answers]), torch.cat([b for _, b in answers])
    box, motion, side, places = objects.split([1, len(_MOTIONS), 3, 6], dim=-1)
    there, flies = labels.present.bool(), labels.flies.bool()
    predicted = head[:, :NUM] > 0

    def share(right: Tensor) -> float:
        return round(float(right.float().mean()), 3)

    def r2(answer: Tensor, truth: Tensor) -> float:
        return round(float((1 - (answer - truth).square().mean(0) / truth.var(0)).mean()), 3)

    out = {
        "colours": share((predicted == there).all(1)),
        "count": share(predicted.sum(1) == there.sum(1)),
        "shape": share(((box[..., 0] > 0) == labels.is_box.bool())[there]),
        "motion": share((motion.argmax(-1) == labels.motion)[there]),
        "side": share((side.argmax(-1) == labels.side)[there]),
        "collision": share((head[:, NUM] > 0) == labels.collides.bool()),
        "places_r2": r2(places[there], labels.places[there]),
    }
    if float(labels.log_gravity.std()) > 0:
        out["log_gravity_r2"] = r2(head[flies, NUM + 1], labels.log_gravity[flies])
    return out


def train_features(clips: Tensor, labels: Labels, epochs: int, seed: int = 0, batch: int = 32) -> Trainee:
    """A trained network; its batches and first weights follow from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the initialisation of layers takes no generator
        size = (clips.shape[1], clips.shape[2], clips.shape[3])
        trainee = Trainee(size)
    per_epoch = len(clips) // batch
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        start, means = time.monotonic(), dict[str, float]()
        trainee.train()
        for pick in torch.randperm(len(clips), generator=generator)[: per_epoch * batch].split(batch):
            clip_head, object_head = trainee(_grainy(clips[pick], generator))
            terms = losses(clip_head, object_head, labels.rows(pick))
            loss = torch.stack(list(terms.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for name, value in terms.items():
                means[name] = means.get(name, 0.0) + float(value.detach()) / per_epoch
        text = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        print(f"epoch {epoch + 1}/{epochs}  {text}  {time.monotonic() - start:.0f} s", flush=True)
    return trainee.eval()


def _grainy(clips: Tensor, generator: torch.Generator) -> Tensor:
    """`clips` as floats 0..255, half of them with white noise of up to 0.008.

    Rendered clips have none at all. A network that never saw any takes grain for worse than shuffled frames: at n = 512 noise
    of 0.03 had a distance of 261 and a shuffle 171; so trained, 138 and 169. More of it (0.01) hides mild damage: 1.2 for 2.1.
    """
    amount = torch.rand(len(clips), generator=generator) * 0.016
    amount = torch.where(amount > 0.008, 0.0, amount)
    noise = torch.randn(clips.shape, generator=generator) * 255 * amount[:, None, None, None, None]
    return (clips.float() + noise).round().clamp(0, 255)


def train_shapes(clips: Tensor, is_box: Tensor, steps: int = 600, seed: int = 0) -> probes.ShapeNet:
    """A classifier of crops, trained on clips that are partly blurred and noisy, as generated ones are."""
    looks, truth = _looks(_damaged(clips, seed), is_box)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = probes.ShapeNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = torch.randint(len(looks), (128,), generator=generator)
        loss = functional.binary_cross_entropy_with_logits(net(looks[pick])[:, 0], truth[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for parameter in net.parameters():
        parameter.data = parameter.data.half().float()
    return net.eval().requires_grad_(False)


def _looks(clips: Tensor, is_box: Tensor) -> tuple[Tensor, Tensor]:
    pixels: list[Tensor] = []
    truth: list[Tensor] = []
    for start in range(0, len(clips), 64):
        looks = probes.looks_at(clips[start : start + 64].numpy())
        pixels.append(torch.from_numpy(looks.pixels))
        truth.append(is_box[torch.from_numpy(looks.clip) + start, torch.from_numpy(looks.colour)])
    return torch.cat(pixels), torch.cat(truth)


def _damaged(clips: Tensor, seed: int) -> Tensor:
    """Each clip with its own blur (up to 0.9 px, three in ten with none) and noise (up to 0.03)."""
    import cv2

    rng = np.random.Generator(np.random.Philox(key=seed))
    out = clips.numpy().copy()
    for clip in out:
        blur, noise = rng.uniform(-0.4, 0.9), rng.uniform(0, 0.03)
        for frame in clip:
            soft = cv2.GaussianBlur(frame, (0, 0), blur) if blur > 0.1 else frame
            frame[:] = np.clip(soft + rng.normal(0, 255 * noise, soft.shape), 0, 255).round()
    return torch.from_numpy(out)


def statistics(net: FeatureNet, clips: Tensor) -> FeatureNet:
    """`net`, standardised by the features of `clips`."""
    raw = features.features(clips, net).double()
    net.mean.copy_(raw.mean(0))
    net.std.copy_(raw.std(0).clamp(min=1e-6))
    return net


def save(path: Path, net: FeatureNet, witness: FeatureNet, shapes: probes.ShapeNet, notes: dict[str, str]) -> None:
    """Writes what `features.load`, `features.random_net` and `probes.shape_net` read."""
    tensors = {key: value.half() if key.startswith("convs") else value for key, value in net.state_dict().items()}
    tensors |= {"random.mean": witness.mean.clone(), "random.std": witness.std.clone()}
    tensors |= {f"shape.{key}": value.half() for key, value in shapes.state_dict().items()}
    frames, height, width = net.size
    write_tensors(path, tensors, notes | {"frames": str(frames), "height": str(height), "width": str(width)})


def main(arguments: list[str]) -> None:
    """Renders, trains, measures and writes."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.toyworld.train_features", description=__doc__)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--num", type=int, default=6144, help="clips to train on; half of them under other gravities")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--height", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="another: other first weights, other clips")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    world = World(height=options.height, width=options.width, num_frames=options.frames)
    various = replace(world, gravity_scale=GRAVITIES)
    start = time.monotonic()
    half, apart = options.num // 2, APART * options.seed
    own, own_labels = labels_of(world, stream(world, SEED + apart, range(half)))
    others, other_labels = labels_of(world, stream(various, SEED_GRAVITY + apart, range(options.num - half)))
    clips = torch.cat([own, others])
    labels = Labels(*(torch.cat([getattr(own_labels, f.name), getattr(other_labels, f.name)]) for f in fields(Labels)))
    reference, _ = labels_of(world, stream(world, SEED_STATISTICS, range(2048)))
    print(f"{options.num} + {len(reference)} clips rendered in {time.monotonic() - start:.0f} s", flush=True)

    start = time.monotonic()
    trainee = train_features(clips, labels, options.epochs, options.seed)
    train_s = time.monotonic() - start
    net = statistics(trainee.folded(), reference)
    witness = statistics(features.untrained(net.size), reference)
    num_looked_at = min(1024, half)
    shapes = train_shapes(own[:num_looked_at], own_labels.is_box[:num_looked_at])

    held_out, held_labels = labels_of(world, stream(world, SEED_HELD_OUT, range(512)))
    held_various, held_various_labels = labels_of(world, stream(various, SEED_HELD_OUT_GRAVITY, range(512)))
    looks, truth = _looks(held_out, held_labels.is_box)
    scores = {
        "own gravity": accuracy(trainee, held_out, held_labels),
        "0.25 to 2.5 x gravity": accuracy(trainee, held_various, held_various_labels),
        "shape of one crop": {"right": round(float(((shapes(looks)[:, 0] > 0) == truth.bool()).float().mean()), 4)},
    }
    settings = [f"--{key} {value}" for key, value in vars(options).items() if key != "out" and value != parser.get_default(key)]
    command = " ".join(["python -m fewstep.toyworld.train_features", *settings])
    save(options.out, net, witness, shapes, {"command": command, "held_out": json.dumps(scores), "torch": torch.__version__})
    print(f"trained in {train_s:.0f} s; on 512 held-out clips each: {json.dumps(scores, indent=2)}")
    print(f"{features.name(features.load(options.out))}: {options.out}, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
