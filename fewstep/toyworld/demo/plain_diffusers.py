"""Samples an exported student with plain diffusers: nothing of fewstep is imported.

python plain_diffusers.py STUDENT_FOLDER CAPTIONS_FOLDER OUT [NUM]
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main(student: str, captions: str, out: str, num: int = 16) -> None:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    modules: Any = sys.modules
    modules["fewstep"] = None  # whoever tries to import it fails
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    pipe: Any = DiffusionPipeline.from_pretrained(student, custom_pipeline=f"{student}/pipeline.py", trust_remote_code=True)
    prompts = [path.read_text().strip() for path in sorted(Path(captions).glob("*.txt"))[:num]]
    began = time.monotonic()
    frames = pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="np").frames
    seconds = time.monotonic() - began
    Path(out).mkdir(parents=True, exist_ok=True)
    for number, (clip, prompt) in enumerate(zip(frames, prompts)):
        write(Path(out) / f"{number:02d}.mp4", (np.asarray(clip) * 255).round().clip(0, 255).astype(np.uint8))
        (Path(out) / f"{number:02d}.txt").write_text(prompt + "\n")
    print(f"{out}: {len(prompts)} clips of {frames[0].shape} in {seconds:.1f} s by {type(pipe).__name__}")


def write(path: Path, clip: np.ndarray, fps: int = 16) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=fps, options={"crf": "0"})
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    # diffusers copies every pipeline.py to one place in its cache: two processes that load two of them at once read halves.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_MODULES_CACHE"] = cache
        main(sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:5]))
