"""Draws docs/pictures/strip.png, the strip of frames in the README, from a report that `fewstep demo` wrote.

    python docs/pictures/strip.py docs/results/demo_long_2026-11-22.html

A report holds its clips as lossless animated WebP, so the strip shows the very pixels that each model produced, enlarged
without smoothing. Rows are models, columns are instants of the clip; each block of columns is one prompt that no model was
trained on.
"""

from __future__ import annotations

import base64
import html
import io
import re
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROWS = {  # name in the report: lines of the label
    "real clips": ("truth", "rendered, same caption"),
    "teacher, 35 steps": ("teacher", "70 network calls"),
    "student, 4 steps": ("student", "4 network calls"),
    "student, 1 step": ("student", "1 network call"),
}
PROMPTS = (
    "a red box slides to the right, a yellow sphere is thrown to the left. They collide.",
    "a green sphere is dropped, a yellow sphere is dropped.",
)
FRAMES = (0, 5, 10, 16)  # of 17
CLIP = re.compile(r'<img class="source"[^>]*src="data:image/webp;base64,([^"]+)" alt="([^"]*)"')
SCALE = 4
GAP = 4  # between frames
BLOCK_GAP = 24  # between prompts
LABEL_WIDTH = 200
TITLE_HEIGHT = 62
MARGIN = 16


def films(report: Path) -> dict[tuple[str, str], list[Image.Image]]:
    """The clips of a report, by model and prompt."""
    clips = {}
    for data, alt in re.findall(
        r'<img class="source"[^>]*src="data:image/webp;base64,([^"]+)" alt="([^"]*)"', report.read_text()
    ):
        model, _, prompt = html.unescape(alt).partition(": ")
        movie = Image.open(io.BytesIO(base64.b64decode(data)))
        frames = []
        for index in range(getattr(movie, "n_frames", 1)):
            movie.seek(index)
            frames.append(movie.convert("RGB"))
        clips.setdefault((model, prompt), frames)
    return clips


def strip(report: Path) -> Image.Image:
    clips = films(report)
    side = SCALE * clips[next(iter(ROWS)), PROMPTS[0]][0].width
    block = len(FRAMES) * side + (len(FRAMES) - 1) * GAP
    width = 2 * MARGIN + LABEL_WIDTH + len(PROMPTS) * block + (len(PROMPTS) - 1) * BLOCK_GAP
    height = 2 * MARGIN + TITLE_HEIGHT + len(ROWS) * (side + GAP) - GAP
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    large = ImageFont.load_default(22)
    small = ImageFont.load_default(17)
    for column, prompt in enumerate(PROMPTS):
        left = MARGIN + LABEL_WIDTH + column * (block + BLOCK_GAP)
        first, _, rest = prompt.partition(", ")
        draw.text((left, MARGIN), f'"{first},', fill="#333333", font=small)
        draw.text((left, MARGIN + 24), f'{rest}"', fill="#333333", font=small)
        for row, model in enumerate(ROWS):
            top = MARGIN + TITLE_HEIGHT + row * (side + GAP)
            for place, frame in enumerate(FRAMES):
                tile = clips[model, prompt][frame].resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(tile, (left + place * (side + GAP), top))
    for row, (name, detail) in enumerate(ROWS.values()):
        middle = MARGIN + TITLE_HEIGHT + row * (side + GAP) + side // 2
        draw.text((MARGIN, middle - 26), name, fill="black", font=large)
        draw.text((MARGIN, middle + 4), detail, fill="#555555", font=small)
    return canvas


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    strip(Path(sys.argv[1])).save(Path(__file__).with_suffix(".png"), optimize=True)
