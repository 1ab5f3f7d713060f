"""`fewstep prepare codec`: a video tokenizer for a small world of one's own, trained on the clips of a data set.

It is the toy world's tokenizer (AutoencoderKLCosmos: 8 x 8 pixels and 4 frames to a latent), with the same losses on pixels and
without the perceptual network, which is the toy world's own. The run resumes; the result is a folder of diffusers with the mean
and the spread of each latent channel, which `prepare latents --codec` reads.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from fewstep.data.files import video
from fewstep.data.folder import layout
from fewstep.data.folder.dataset import Folder
from fewstep.data.folder.layout import Layout
from fewstep.errors import UserError
from fewstep.toyworld.autoencode import Autoencode
from fewstep.toyworld.release import NUM_MEASURED, save, with_statistics
from fewstep.toyworld.tokenizer import TokenizerSpec
from fewstep.toyworld.train_tokenizer import Trainer, tokenizer, train
from fewstep.training.run import Job

SPACE, TIME = 8, 4  # pixels and frames to a latent
MOST_FRAMES = 17  # of a training window, unless --num-frames says otherwise


def write(
    dataset_dir: Path,
    out: Path,
    *,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    latent_channels: int = 8,
    channels: tuple[int, ...] = TokenizerSpec.channels,
    num_steps: int = 3000,
    batch_size: int = 8,
    seed: int = 0,
) -> str:
    """Trains a tokenizer, or resumes its training, and writes its folder; returns a line for the user."""
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"{out}: is there already. Choose another --out, or remove it")
    data = windows(dataset_dir, num_frames, size)
    num = len(data.open())
    first = tokenizer()
    place = hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:8]
    run = replace(
        first,
        job=Job(project="codecs", group=place, name=out.name),
        tokenizer=TokenizerSpec(channels=channels, latent_channels=latent_channels),
        loss=Autoencode(noise=0.05),
        data=data,
        optim=replace(first.optim, warmup_iters=min(200, num_steps // 4)),
        trainer=Trainer(
            max_iter=num_steps,
            batch_size=min(batch_size, num),
            seed=seed,
            num_threads=torch.get_num_threads(),
            log_every=min(100, max(num_steps // 4, 1)),
            save_iter=min(500, num_steps),
        ),
    )
    train(run)
    vae, spread = with_statistics(run.tokenizer, str(run.job.folder()), replace(data, ram_gib=0.0), min(NUM_MEASURED, 256))
    save(vae, out)
    assert data.video_size is not None
    height, width = data.video_size
    return (
        f"{out}: trained on {num} windows of {data.num_frames} x {height} x {width}, spread of its {latent_channels} channels "
        f"{spread.min():.2f} .. {spread.max():.2f}. Next: fewstep prepare latents {dataset_dir} --codec {out}"
    )


def windows(dataset_dir: Path, num_frames: int | None, size: tuple[int, int] | None) -> Folder:
    """Windows side by side of all clips: of up to 17 frames, at the size of the first clip down to a multiple of 8."""
    place = Layout.open(dataset_dir)
    files = place.files(place.pixels())
    if not files:
        raise UserError(f"{dataset_dir}: has no {place.pattern(layout.VIDEOS)} to train on")
    headers = [video.probe(path) for path in files.values()]
    shortest = min(header.num_frames for header in headers)
    num = num_frames or 1 + (min(shortest, MOST_FRAMES) - 1) // TIME * TIME
    if (num - 1) % TIME:
        raise UserError(f"--num-frames {num}: a tokenizer of {TIME} frames to a latent takes 1 + k * {TIME}, 17 for instance")
    height, width = size or (max(side // SPACE, 1) * SPACE for side in headers[0].size)
    if height % SPACE or width % SPACE:
        raise UserError(f"--height {height} --width {width}: both must be multiples of {SPACE}")
    return Folder(
        str(dataset_dir),
        text=None,
        num_frames=num,
        start_frame_interval=num,
        video_size=(height, width),
        resize="crop",
        skip_short=True,
    )
