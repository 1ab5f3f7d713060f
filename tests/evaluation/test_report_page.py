"""The page in a real browser: no complaint, nothing asked of the network, every clip decodes to its very pixels and plays."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import chromium
from report_sample import film, models, small

from fewstep.evaluation.report import Film, Gallery, Report, Row, write

pytestmark = pytest.mark.skipif(chromium.found() is None, reason="no chromium in the path: apt-get install chromium")
READY = "document.documentElement.dataset.ready === 'yes'"
FRAMES = "[...document.querySelectorAll('.gallery')].map(g => +g.dataset.at)"

# Every text a reader sees, with the contrast of its colour against what is painted behind it (WCAG 2.2, 1.4.3).
CONTRAST = """(() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), out = [];
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement, box = node.getBoundingClientRect();
    if (!walk.currentNode.textContent.trim() || !box.width || !box.height) continue;
    if (node.closest("script, style, option, title")) continue;
    let behind = [0, 0, 0, 0];
    for (let up = node; up; up = up.parentElement) {
      const c = parse(getComputedStyle(up).backgroundColor);
      if (c[3] === 1) { behind = c; break; }
    }
    const svg = node.closest("svg"), style = getComputedStyle(node);
    const a = light(parse(svg ? style.fill : style.color).slice(0, 3)), b = light(behind.slice(0, 3));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) out.push(`${ratio.toFixed(2)} ${node.tagName} ${walk.currentNode.textContent.slice(0, 40)}`);
  }
  return out;
})()"""


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    with chromium.browser() as page:
        yield page


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(small(), tmp_path_factory.mktemp("report") / "report.html")


def pixels(tab: chromium.Page) -> np.ndarray:
    """What the canvases of the first gallery show."""
    code = """[...document.querySelector('.gallery').querySelectorAll('canvas')].map(
        c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])"""
    return np.array(tab.js(code), dtype=np.uint8).reshape(-1, 32, 32, 4)


def test_it_opens_without_a_complaint_and_asks_nothing_of_the_network(tab: chromium.Page, file: Path) -> None:
    tab.open(file, 1280, 900)
    tab.wait(READY)
    assert tab.errors == []
    assert {url.split(":")[0] for url in tab.requests} <= {"file", "data", "blob"}
    assert sum(url.startswith("file:") for url in tab.requests) == 1
    assert tab.js("document.querySelectorAll('canvas.live').length") == 13
    assert tab.js("document.querySelectorAll('img').length") == 0  # all were taken apart
    assert tab.js("[...document.querySelectorAll('canvas.live')].every(c => c.getAttribute('aria-label'))")


def test_every_clip_shows_its_very_pixels_frame_by_frame(tab: chromium.Page, file: Path) -> None:
    tab.open(file, 1280, 900)
    tab.wait(READY)
    wanted = np.stack([film(10 * i + k) for i in range(2) for k in range(6)])
    tab.js("galleries[0].playing = false, galleries[0].time = 0, galleries[0].draw()")
    for frame in (0, 1, 2, 3, 4, 5, 0):  # the last step wraps around
        assert tab.js(FRAMES)[0] == frame
        seen = pixels(tab)
        assert np.array_equal(seen[..., :3], wanted[:, frame]) and (seen[..., 3] == 255).all(), frame
        tab.js("document.querySelector('.next').click()")
    tab.js("document.querySelector('.back').click()")
    tab.js("document.querySelector('.back').click()")
    assert tab.js(FRAMES)[0] == 5 and np.array_equal(pixels(tab)[..., :3], wanted[:, 5])
    tab.js("{const s = document.querySelector('.slide'); s.value = 3; s.dispatchEvent(new Event('input'))}")
    assert tab.js("document.querySelector('.count').textContent") == "4 / 6" and np.array_equal(
        pixels(tab)[..., :3], wanted[:, 3]
    )


def test_clips_play_in_step_and_stop(tab: chromium.Page, file: Path) -> None:
    tab.open(file, 1280, 900)
    tab.wait(READY)
    tab.js("document.querySelector('.gallery').scrollIntoView()")  # below the verdict: only what is looked at plays
    tab.js("document.querySelector('.rate').value = '0.25', document.querySelector('.rate').dispatchEvent(new Event('change'))")
    seen = set()
    end = time.monotonic() + 60
    while len(seen) < 6 and time.monotonic() < end:
        frames = tab.js("[...document.querySelector('.gallery').querySelectorAll('canvas')].map(c => +c.dataset.at)")
        assert len(set(frames)) == 1  # all at the same frame, whenever one looks
        seen.add(frames[0])
    assert seen == set(range(6))
    tab.js("document.querySelector('.play').click()")
    still = tab.js(FRAMES)[0]
    time.sleep(0.3)
    assert tab.js(FRAMES)[0] == still and tab.js("document.querySelector('.play').getAttribute('aria-label')") == "Play"
    tab.js("document.querySelector('.play').click()")
    tab.wait(f"{FRAMES}[0] !== {still}")


def test_large_clips_play_and_step_as_video(tab: chromium.Page, tmp_path: Path) -> None:
    frames = [np.repeat(np.repeat(film(i, 12, 36, 64), 5, axis=1), 5, axis=2) for i in range(3)]
    rows = [Row("wide clips", [Film(f"model {i}", one, "student") for i, one in enumerate(frames)])]
    tab.open(write(Report("videos", galleries=[Gallery("g", rows, 12)]), tmp_path / "r.html"), 360, 740)
    tab.wait(READY)
    times = "[...document.querySelectorAll('video')].map(v => v.currentTime)"
    assert len(tab.js(times)) == 3
    for moment in (0.2, 0.6):
        tab.wait(f"{times}.every(t => t > {moment})")
    tab.js("galleries[0].playing = false, galleries[0].time = 7.5 / 12, galleries[0].draw()")
    tab.wait(f"{times}.every(t => Math.floor(t * 12 + .001) === 7)")
    tab.js("document.querySelector('.back').click()")
    tab.wait(f"{times}.every(t => Math.floor(t * 12 + .001) === 6)")
    assert tab.js("document.documentElement.scrollWidth") == 360
    assert tab.errors == []


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_it_fits_its_screen(tab: chromium.Page, file: Path, width: int) -> None:
    tab.open(file, width, 740)
    tab.wait(READY)
    tab.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert tab.js("document.documentElement.scrollWidth") <= width
    wide = """[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
        && !e.closest('.scroll, dialog, .skip')).map(e => e.tagName + '.' + e.className)"""
    assert tab.js(wide) == []
    sizes = tab.js("[...document.querySelectorAll('.deck button')].map(b => Math.min(b.offsetWidth, b.offsetHeight))")
    assert min(sizes) >= 36  # for a thumb
    assert tab.js("[...document.querySelectorAll('.plot')].filter(p => p.offsetHeight).length") == 1


@pytest.mark.parametrize("dark", [False, True])
def test_texts_can_be_read_in_light_and_dark(tab: chromium.Page, file: Path, dark: bool) -> None:
    tab.open(file, 1280, 900, dark)
    tab.wait(READY)
    tab.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert tab.js(CONTRAST) == []
    paper = tab.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 120) == dark


def test_a_clip_is_enlarged_and_plays_there(tab: chromium.Page, file: Path) -> None:
    tab.open(file, 360, 740)
    tab.wait(READY)
    tab.js("document.querySelectorAll('button.screen')[7].click()")
    large = "document.querySelector('#large canvas')"
    first = tab.js(f"{large}.dataset.at")
    tab.wait(f"{large}.dataset.at !== '{first}'")
    assert tab.js(f"{large}.getBoundingClientRect().width") > 250
    assert models()[1].name in tab.js("document.querySelector('#large p').textContent")
    tab.js("document.querySelector('#large').close()")
    tab.wait(f"!{large}")
    assert tab.errors == []


def test_commands_are_copied_as_they_are(tab: chromium.Page, file: Path) -> None:
    tab.open(file, 1280, 900)
    tab.wait(READY)
    tab.js("navigator.clipboard.writeText = async text => { window.copied = text; }")
    tab.js("document.querySelectorAll('.copy')[1].click()")
    tab.wait("window.copied")
    assert tab.js("window.copied") == small(1).stages[1].command
    tab.wait("document.querySelectorAll('.copy')[1].textContent === 'Copied'")


def test_print_shows_everything_but_the_controls(tab: chromium.Page, file: Path) -> None:
    tab.open(file, 800, 1100, dark=True, media="print")
    tab.wait(READY)
    tab.js("dispatchEvent(new Event('beforeprint'))")
    assert tab.js("[...document.querySelectorAll('.deck, .copy, nav')].every(e => !e.offsetHeight)")
    assert tab.js("document.querySelector('table').offsetHeight") > 0
    assert tab.js(FRAMES) == [3, 2]  # the middle of each
    assert tab.js("getComputedStyle(document.body).color") == "rgb(21, 24, 30)"  # ink on paper, whatever the screen


def test_clips_play_without_a_script(tab: chromium.Page, file: Path) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(file, 360, 740)
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
    state = "[...document.querySelectorAll('img.source')].map(i => i.complete && i.naturalWidth)"
    tab.wait(f"{state}.length === 13 && {state}.every(w => w === 32)")
    assert tab.js("document.querySelector('.deck').offsetHeight") == 0  # no dead buttons
