"""Video files: what is written comes back, only the frames asked for, and every damaged file has its own words."""

import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fewstep.data.files import video
from fewstep.errors import UserError
from fewstep.toyworld import clips, physics


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.fixture(scope="module")
def toy() -> NDArray[np.uint8]:
    return clips.clip(physics.World(), 0, 0).rgb


def smooth(num: int, height: int = 64, width: int = 96) -> NDArray[np.uint8]:
    """Slow waves of light and colour, a different picture in each frame."""
    t, y, x = np.meshgrid(np.arange(num), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 9 + t / 3), np.sin(y / 7 - t / 4), np.sin((x + y) / 15 + t / 2)]
    return np.stack([128 + 90 * wave for wave in waves], axis=-1).astype(np.uint8)


def raw_write(path: Path, frames: NDArray[np.uint8], times: list[int] | None = None, **options: str) -> None:
    """As other programs write: any options, any times (in 1/24 s)."""
    import av

    flags = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with av.open(str(path), "w", format="mp4", options=flags) as container:
        stream = container.add_stream("libx264", rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 24)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (number if times is None else times[number]), Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_lossless_is_exact_at_any_size_and_the_same_bytes_each_time(tmp_path: Path, toy: NDArray[np.uint8]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 33, 47, 3), dtype=np.uint8)
    for frames in (toy, noise):
        video.write(tmp_path / "a.mp4", frames, 16, "lossless")
        video.write(tmp_path / "b.mp4", frames, 16, "lossless")
        back = video.read(tmp_path / "a.mp4")
        assert np.array_equal(back.frames, frames)
        assert back.fps == 16
        assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_why_the_toy_world_is_written_lossless(tmp_path: Path, toy: NDArray[np.uint8]) -> None:
    video.write(tmp_path / "best.mp4", toy, 16, quality=0)
    assert psnr(video.read(tmp_path / "best.mp4").frames, toy) < 33  # halved chroma alone; lossless has no error at all
    frames = smooth(9)
    video.write(tmp_path / "usual.mp4", frames, 24)
    assert psnr(video.read(tmp_path / "usual.mp4").frames, frames) > 33


@pytest.mark.parametrize("fps", [24, 16, 12.5, 29.97, 30000 / 1001])
def test_the_header_tells_frames_rate_and_size(tmp_path: Path, fps: float) -> None:
    video.write(tmp_path / "a.mp4", smooth(7), fps)
    header = video.probe(tmp_path / "a.mp4")
    assert (header.num_frames, header.size) == (7, (64, 96))
    assert header.fps == pytest.approx(fps, abs=0.01)


@pytest.mark.parametrize("options", [{"g": "7"}, {"g": "7", "bf": "0"}, {"g": "10", "x264-params": "open-gop=1:bframes=3"}])
def test_a_window_is_a_slice_of_the_whole(tmp_path: Path, options: dict[str, str]) -> None:
    raw_write(tmp_path / "a.mp4", smooth(40), **options)
    whole = video.read(tmp_path / "a.mp4").frames
    assert len(whole) == 40
    for start, count, stride in [(0, 5, 1), (3, 9, 3), (9, 3, 2), (14, 1, 1), (20, 5, 4), (27, 13, 1), (39, 1, 1)]:
        part = video.read(tmp_path / "a.mp4", start, count, stride)
        assert np.array_equal(part.frames, whole[start : start + (count - 1) * stride + 1 : stride]), (start, count, stride)
        assert part.fps == pytest.approx(24 / stride)
    assert np.array_equal(video.read(tmp_path / "a.mp4", start=3, stride=5).frames, whole[3::5])


def test_frames_are_resized_when_asked(tmp_path: Path) -> None:
    frames = smooth(3)
    video.write(tmp_path / "a.mp4", frames, 24, "lossless")
    half = video.read(tmp_path / "a.mp4", size=(32, 48)).frames
    assert half.shape == (3, 32, 48, 3)
    means = frames.reshape(3, 32, 2, 48, 2, 3).mean((2, 4))
    assert np.abs(half - means).mean() < 2


def test_no_video_in_it(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound\.mp4: has no video, only audio\. Remove or replace it"):
        video.read(tmp_path / "sound.mp4")


def test_a_format_nobody_knows(tmp_path: Path) -> None:
    video.write(tmp_path / "a.mp4", smooth(3), 24)
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes().replace(b"avc1", b"zzz1").replace(b"avcC", b"zzzC"))
    for ask in (video.probe, video.read):
        with pytest.raises(ValueError, match=r"a\.mp4: (its video is in a format|not a readable video)"):
            ask(tmp_path / "a.mp4")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_cut_off_with_the_index_at_the_end(tmp_path: Path, share: float) -> None:
    video.write(tmp_path / "a.mp4", smooth(20), 24)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"a\.mp4: not a readable video .* cut off .* Write or download it again"):
        video.probe(tmp_path / "a.mp4")


def test_cut_off_with_the_index_in_front(tmp_path: Path) -> None:
    raw_write(tmp_path / "a.mp4", smooth(20), movflags="faststart")
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: int(0.6 * len(content))])
    for ask in (video.probe, video.read):
        with pytest.raises(ValueError, match=r"a\.mp4: cut off after [\d,]+ bytes, only \d+ of its 20 frames are there"):
            ask(tmp_path / "a.mp4")


def test_more_frames_than_bytes_are_refused_before_room_is_made_for_them(tmp_path: Path) -> None:
    video.write(tmp_path / "plain.mp4", smooth(5), 8)
    with video.growing(tmp_path / "fragments.mp4", 8) as append:
        append(smooth(5))
    for name, box, at in (("plain.mp4", b"stsz", 12), ("fragments.mp4", b"trun", 8)):
        path, content = tmp_path / name, bytearray((tmp_path / name).read_bytes())
        place = content.index(box) + at
        content[place : place + 4] = (2**31 - 1).to_bytes(4, "big")
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"claims 2,147,483,6\d\d frames in [\d,]+ bytes"):
            video.probe(path)


def test_a_picture_whose_text_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(smooth(1)[0]).save(path)
    text, content = b"zTXtk\0\0" + zlib.compress(bytes(2**23)), path.read_bytes()
    chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
    path.write_bytes(content[:33] + chunk + content[33:])  # behind its header
    with pytest.raises(UserError, match="cannot be opened"):
        video.probe(path)


def test_no_fixed_rate(tmp_path: Path) -> None:
    times = [*range(6), *range(8, 16)]  # two frames were dropped
    raw_write(tmp_path / "a.mp4", smooth(14), times)
    with pytest.raises(ValueError, match=r"a\.mp4: has no fixed frame rate .*ffmpeg -i a\.mp4 -vf fps=\d+"):
        video.probe(tmp_path / "a.mp4")


def test_no_frames(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    with pytest.raises(ValueError, match=r"a\.mp4: has no frames"):
        video.probe(tmp_path / "a.mp4")


def test_damage_that_the_decoder_sees(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    video.write(tmp_path / "a.mp4", rng.integers(0, 256, (5, 128, 128, 3), dtype=np.uint8), 24)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = len(content) // 2
    content[middle - 2000 : middle] = rng.integers(0, 256, 2000, dtype=np.uint8).tobytes()
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.mp4: (damaged|not a readable video)"):
        video.read(tmp_path / "a.mp4")


def test_other_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"text\.mp4: not a readable video"):
        video.probe(tmp_path / "text.mp4")
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        video.probe(tmp_path / "none.mp4")
    video.write(tmp_path / "a.mp4", smooth(5), 24)
    with pytest.raises(ValueError, match=r"has 5 frames, but frame 6 is wanted \(start 2, count 3, stride 2\)"):
        video.read(tmp_path / "a.mp4", 2, 3, 2)
    with pytest.raises(ValueError, match="has 5 frames, but frame 9 is wanted"):
        video.read(tmp_path / "a.mp4", 9)
    with pytest.raises(ValueError, match="must be even, not 33 x 32"):
        video.write(tmp_path / "odd.mp4", np.zeros((2, 33, 32, 3), np.uint8), 24)
    with pytest.raises(ValueError, match=r"must be uint8 T H W 3 with at least one frame, not uint8 \(0,"):
        video.write(tmp_path / "odd.mp4", np.zeros((0, 32, 32, 3), np.uint8), 24)
    with pytest.raises(ValueError, match="fps must be above 0"):
        video.write(tmp_path / "odd.mp4", np.zeros((1, 32, 32, 3), np.uint8), 0)


def test_a_writer_that_dies_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    video.write(tmp_path / "a.mp4", smooth(5), 24)
    before = (tmp_path / "a.mp4").read_bytes()

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", die, raising=False)
    with pytest.raises(KeyboardInterrupt):
        video.write(tmp_path / "a.mp4", smooth(6), 24)
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_reader_is_chosen_among_the_formats_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture with PostScript inside would start Ghostscript; a playlist called .mp4 would open other files."""
    postscript = tmp_path / "a.png"
    postscript.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", refuse)
    with pytest.raises(UserError, match="cannot be opened"):
        video.read(postscript)
    video.write(tmp_path / "real.mp4", np.zeros((3, 32, 32, 3), np.uint8), 8)
    playlist = tmp_path / "b.mp4"
    playlist.write_text("ffconcat version 1.0\nfile real.mp4\n")
    with pytest.raises(UserError, match="not a readable video"):
        video.read(playlist)


def test_the_same_frames_are_the_same_bytes_whatever_was_in_memory_before(tmp_path: Path) -> None:
    """x264's macroblock trees read what nothing has written: 1 to 14 of 150 such files differed on AVX-512."""
    rng, path = np.random.default_rng(0), tmp_path / "clip.mp4"
    clips = [rng.integers(0, 255, (num, *size, 3), dtype=np.uint8) for num, *size in ((9, 32, 32), (5, 48, 80))]
    written: list[set[bytes]] = [set(), set()]
    for n in range(60):
        for clip, contents in zip(clips, written, strict=True):
            before = [np.full(rng.integers(1, 200_000), n, np.uint8) for _ in range(3)]
            video.write(path, clip, 24.0)
            contents.add(path.read_bytes())
            video.read(path)
            del before
    assert [len(contents) for contents in written] == [1, 1]
