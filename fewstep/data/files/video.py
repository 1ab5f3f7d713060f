"""Video files in and out, as uint8 T H W C.

    write("clip.mp4", frames, fps=24)                      # H.264, yuv420p: plays everywhere
    write("clip.mp4", frames, fps=16, quality="lossless")  # H.264 in RGB: every pixel comes back as it was
    read("clip.mp4", start=8, count=17, stride=2)          # decodes from the last key frame before 8 to the last one wanted
    stream("clip.mp4")                                     # frame by frame: a long clip never stands in memory
    probe("clip.mp4")                                      # frames, fps, size, from the header alone

A picture (.png, .jpg, .webp) is read as a clip of one frame, whose rate is 0: it has none.

At 32 x 32 the halved chroma of yuv420p costs more than any compression: 31 dB at crf 18 and 32 dB at crf 0, against an
exact copy in RGB for 2.6 times the bytes. So the toy world is written lossless, and clips of real size are not.

A damaged file is refused, never repaired: frames that FFmpeg invents would be a wrong sample that nobody notices.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UserError
from fewstep.files import whole_file
from fewstep.untrusted.text import fault_of, opened

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from PIL.Image import Image

Quality = int | Literal["lossless"]  # crf, 0 (best) to 51; or every pixel as it is
Size = tuple[int, int]  # height, width

_MANY_PIXELS = 256 * 256  # below, starting threads costs more than they save
_NEAR = 0.75  # of the source's sides: no colour is lost that a video of the new size could hold
_SEEK_OVER = 8  # frames; decoding fewer is quicker than seeking
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# Libraries choose a reader by the content of a file, and some readers start programs or open other files.
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
_VIDEO_FORMATS = {"format_whitelist": "mov,mp4,matroska,webm,avi,mpeg,mpegts,gif,flv,ogg", "protocol_whitelist": "file"}
_HOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")  # boxes of mp4 that hold boxes ..
_COUNTS = {b"stsz": 16, b"stz2": 16, b"trun": 12}  # .. and those that say how many frames there are: at which byte
_MAX_SIDE = 16384  # px; H.264 ends there, and a header that claims more would be believed before anything is decoded
MAX_FRAMES = 2**22  # of a clip: two days at 24 frames a second
_MAX_PIXELS = 2**26  # of a picture: twice 8K
_SMPTE170M, _LIMITED = 6, 1  # ffmpeg's numbers of BT.601 and of the range 16..235, which its RGB conversion uses by default


@dataclass(frozen=True)
class Frames:
    """Pictures of a video and their rate, in frames per second of `frames` (a stride divides that of the file)."""

    frames: NDArray[np.uint8]  # T H W 3
    fps: float


@dataclass(frozen=True)
class Header:
    """The header of a video file; the frame count is the number of entries in its index."""

    num_frames: int
    fps: float
    height: int
    width: int

    @property
    def size(self) -> Size:
        return self.height, self.width

    def differences(self, clip: Header) -> list[tuple[str, Any, Any]]:
        """(what, here, of the clip) where a video does not go with its clip frame by frame."""
        rows = [("frames", self.num_frames, clip.num_frames), ("size", self.size, clip.size)]
        rows += [("fps", round(self.fps, 2), round(clip.fps, 2))]
        return [row for row in rows if row[1] != row[2]]


def write(path: str | os.PathLike[str], frames: NDArray[np.uint8], fps: float, quality: Quality = 18) -> None:
    """Writes uint8 T H W 3 as H.264 in mp4, whole or not at all; the same frames give the same bytes."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise UserError(f"{path}: frames must be uint8 T H W 3 with at least one frame, not {frames.dtype} {frames.shape}")
    with growing(path, fps, quality, plays=False) as append:
        append(frames)


@contextmanager
def growing(
    path: str | os.PathLike[str], fps: float, quality: Quality = 18, plays: bool = True
) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """A function that appends uint8 T H W 3 to a video, PATH's hidden neighbour; it is at `path` when the block ends without
    an error.

    plays: it can be played while it grows, for some more bytes.
    """
    import av

    if not fps > 0:
        raise UserError(f"{path}: fps must be above 0, not {fps}")
    codec, pixels = ("libx264rgb", "rgb24") if quality == "lossless" else ("libx264", "yuv420p")
    # x264 with trees of macroblocks writes other bytes now and then from the same frames: of small ones on AVX-512, 1 in 20.
    options = {"crf": "0", "preset": "veryfast"} if quality == "lossless" else {"crf": str(quality), "mbtree": "0"}
    fragments: dict[str, str] = {}
    if plays:
        options["tune"] = "zerolatency"  # a frame leaves the encoder as soon as it enters
        fragments = {"movflags": "empty_moov+default_base_moof+frag_every_frame", "flush_packets": "1"}
    with whole_file(path) as beside, av.open(str(beside), "w", format="mp4", options=fragments) as container:
        stream: Any = None  # Any: a stream of PyAV, opened with the first frames, which have its size

        def append(frames: NDArray[np.uint8]) -> None:
            nonlocal stream
            height, width = frames.shape[1:3]
            if quality != "lossless" and (height % 2 or width % 2):
                raise UserError(
                    f"{path}: H.264 halves the chroma, so height and width must be even, not {height} x {width}: crop or pad "
                    'by one, or pass quality="lossless"'
                )
            if stream is None:
                stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
                stream.width, stream.height, stream.pix_fmt = width, height, pixels
                if quality != "lossless":
                    stream.codec_context.colorspace, stream.codec_context.color_range = _SMPTE170M, _LIMITED
                if height * width < _MANY_PIXELS:
                    stream.codec_context.thread_count = 1
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

        yield append
        if stream is not None:
            container.mux(stream.encode())


def probe(path: str | os.PathLike[str]) -> Header:
    """Frames, fps and size, without decoding: 0.3 ms. Refuses what `read` would: no video, cut off, no fixed rate."""
    if is_picture(path):
        with _picture(Path(path)) as picture:
            return Header(1, 0.0, picture.height, picture.width)
    with _opened(Path(path)) as (_, stream):
        return _header(Path(path), stream)


def read(
    path: str | os.PathLike[str], start: int = 0, count: int | None = None, stride: int = 1, *, size: Size | None = None
) -> Frames:
    """Frames start, start + stride, ... (`count` of them; None: to the end), resized to `size` (bicubic) if given.

    Refuses a file that is damaged, cut off, without video or without a fixed rate, and frames beyond its end. Costs what
    decoding from the last key frame before `start` costs.
    """
    path = Path(path)
    if start < 0 or stride < 1 or (count is not None and count < 1):
        raise UserError(f"{path}: start {start}, count {count}, stride {stride}: none may be negative, count and stride not 0")
    if is_picture(path):
        if start or (count or 1) > 1:
            raise UserError(f"{path}: is one picture, but frame {start + ((count or 1) - 1) * stride} is wanted")
        with _picture(path) as picture:
            return Frames(_pixels_of(picture, size)[None], 0.0)
    with _opened(path) as (container, stream):
        header = _header(path, stream)
        if count is None:
            count = max((header.num_frames - start + stride - 1) // stride, 1)
        last = start + (count - 1) * stride
        if last >= header.num_frames:
            raise UserError(
                f"{path}: has {header.num_frames} frames, but frame {last} is wanted (start {start}, count {count}, stride "
                f"{stride}). Ask for a shorter window, or leave this clip out"
            )
        out = np.empty((0, 0, 0, 3), dtype=np.uint8)
        pictures = _pictures(path, container, stream, header, size, range(start, last + 1, stride))
        for num, picture in zip(range(count), pictures, strict=False):  # what follows the last one is not decoded
            if num == 0:  # the first picture is what the header says: only then is memory taken for all of them
                out = np.empty((count, *picture.shape), dtype=np.uint8)
            out[num] = picture
        return Frames(out, header.fps / stride)


def stream(path: str | os.PathLike[str], size: Size | None = None) -> Iterator[NDArray[np.uint8]]:
    """Every frame (H, W, 3), one at a time; refuses what `read` refuses, at the frame where it is found."""
    path = Path(path)
    if is_picture(path):
        yield from read(path, size=size).frames
        return
    with _opened(path) as (container, stream):
        header = _header(path, stream)
        yield from _pictures(path, container, stream, header, size, range(header.num_frames))


def is_picture(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() in PICTURES


def refuse_size(path: Path, height: float, width: float) -> None:
    """Raises UserError for a size that no picture of the file at `path` can have."""
    if min(height, width) < 1 or max(height, width) > _MAX_SIDE or height * width > _MAX_PIXELS:
        raise UserError(
            f"{path}: its pictures are {height} x {width}: sides must be 1 to {_MAX_SIDE}, with {_MAX_PIXELS:,} "
            "pixels at the most"
        )


# ---- parts of the above --------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream; every error of FFmpeg becomes one UserError."""
    import av

    _refuse_endless(path)
    try:
        with av.open(str(path), options=_VIDEO_FORMATS, metadata_errors="replace") as container:
            if not container.streams.video:
                others = ", ".join(sorted({stream.type for stream in container.streams}))
                raise UserError(f"{path}: has no {f'video, only {others}' if others else 'frames'}. Remove or replace it")
            stream = container.streams.video[0]
            # None if FFmpeg has no decoder for what the file names.
            if stream.codec_context is None:  # pyright: ignore[reportUnnecessaryComparison]  # the stubs leave None out
                raise UserError(f"{path}: its video is in a format that FFmpeg does not know. Convert it to H.264 in mp4")
            small = stream.width * stream.height < _MANY_PIXELS
            stream.codec_context.thread_count = 1 if small else 0
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}
            yield container, stream
    except av.FFmpegError as error:
        raise UserError(
            f"{path}: not a readable video ({error.strerror}); it may be cut off or no mp4. Write or download it again"
        ) from None


def _refuse_endless(path: Path) -> None:
    """Refuses an mp4 that claims more frames than it has bytes: FFmpeg would take memory for all of them."""
    with opened(path) as file:
        size, place, claimed = os.fstat(file.fileno()).st_size, 0, 0
        for _ in range(MAX_FRAMES):  # boxes
            if place >= size or claimed > size:
                break
            file.seek(place)
            head = file.read(20).ljust(20, b"\0")
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if kind in _COUNTS:
                claimed += int.from_bytes(head[_COUNTS[kind] :][:4], "big")
            length = int.from_bytes(head[8:16], "big") if length == 1 else length or size
            place += 8 if kind in _HOLDERS else max(length, 8)
    if claimed > size or place < size:
        raise UserError(f"{path}: damaged, it claims {claimed:,} frames in {size:,} bytes. Write or download it again")


def _header(path: Path, stream: VideoStream) -> Header:
    """From the index of the file: one entry for each frame, with its place in the file and its time."""
    if "matroska" in stream.container.format.name:  # which lists key frames only
        raise UserError(
            f"{path}: is a Matroska or WebM file, which does not list its frames. Convert it: ffmpeg -i {path.name} a.mp4"
        )
    if len(stream.index_entries) > MAX_FRAMES:
        raise UserError(f"{path}: its index has {len(stream.index_entries):,} frames, at most {MAX_FRAMES:,} are read. Cut it")
    entries = [(e.timestamp, e.pos + e.size) for e in stream.index_entries if not e.is_discard]
    if not entries:
        raise UserError(f"{path}: its video has no frames, or no index. Write it again as a plain mp4 with frames in it")
    refuse_size(path, stream.height, stream.width)
    num_bytes = path.stat().st_size
    whole = sum(end <= num_bytes for _, end in entries)
    if whole < len(entries):
        raise UserError(
            f"{path}: cut off after {num_bytes:,} bytes, only {whole} of its {len(entries)} frames are there. "
            "Write or download it again"
        )
    times = np.array([time for time, _ in entries], dtype=np.float64)
    rate = stream.average_rate or stream.guessed_rate or Fraction(24)
    if len(times) > 1:
        tick = (times[-1] - times[0]) / (len(times) - 1)
        off = np.abs(times - times[0] - tick * np.arange(len(times))).max()
        # One unit of time is rounding (29.97 fps in milliseconds); a frame that was dropped is off by half a tick or more.
        if tick <= 0 or off > max(1.0, 0.25 * tick):
            raise UserError(
                f"{path}: has no fixed frame rate (frames come up to {off / max(tick, 1e-9):.1f} frames off time). "
                f"Convert it first: ffmpeg -i {path.name} -vf fps={round(float(rate)) or 24} fixed.mp4"
            )
        rate = 1 / (tick * stream.time_base) if stream.time_base else rate
    return Header(len(entries), round(float(rate), 4), stream.height, stream.width)


def _decoded(
    path: Path, container: InputContainer, stream: VideoStream, header: Header, start: int
) -> Iterator[tuple[int, VideoFrame]]:
    """(place, frame) in order, from some place at or before `start`; refuses frames that are damaged or of another size."""
    frames, first = container.decode(stream), 0
    if start > _SEEK_OVER:
        tick = 1 / (header.fps * float(stream.time_base or 1))
        began = stream.start_time or 0
        container.seek(round(began + start * tick), stream=stream, backward=True)
        frames = container.decode(stream)
        lead = next(frames, None)  # it tells where the seek has led
        first = start + 1 if lead is None else round(((lead.pts or 0) - began) / tick)
        if lead is not None and first <= start:
            frames = chain([lead], frames)
        else:  # index and pictures disagree: count from the beginning
            container.seek(began, stream=stream, backward=True)
            frames, first = container.decode(stream), 0
    for place, frame in enumerate(frames, first):
        if frame.is_corrupt:
            raise UserError(f"{path}: damaged near frame {place}. Write or download it again")
        if (frame.height, frame.width) != header.size:
            sizes = f"{frame.height} x {frame.width}, but its header says {header.height} x {header.width}"
            raise UserError(f"{path}: frame {place} is {sizes}. Write it again at one size")
        if frame.rotation:
            raise UserError(
                f"{path}: its pictures are stored turned, and a player turns them by {abs(frame.rotation)} degrees. Turn the "
                f"pictures themselves: ffmpeg -i {path.name} turned.mp4"
            )
        yield place, frame


def _pictures(
    path: Path, container: InputContainer, stream: VideoStream, header: Header, size: Size | None, places: range
) -> Iterator[NDArray[np.uint8]]:
    """The frames at `places`, as RGB of `size`; refuses a video that has fewer frames, or more, than its index."""
    convert, num = _converter(*reversed(size or header.size)), 0
    for place, frame in _decoded(path, container, stream, header, places.start):
        if place >= header.num_frames:
            raise UserError(f"{path}: its index does not list all of its frames. Convert it: ffmpeg -i {path.name} whole.mp4")
        if place in places:
            yield convert(frame)
            num += 1
    if num < len(places):
        raise UserError(
            f"{path}: damaged, its header tells of {header.num_frames} frames, but only {num} of the {len(places)} to be read "
            "could be decoded. Write or download it again"
        )


def _converter(width: int, height: int) -> Callable[[VideoFrame], NDArray[Any]]:
    """Makes RGB arrays of one size. One serves a whole file: setting it up costs five times its use on a small frame.

    FFmpeg scales to packed RGB slowly and 1.5 of 255 too dark. Near its own size a frame is scaled in its own format, and is
    then what a video of that size would be; otherwise in planes of RGB, where the colours keep their full resolution.
    """
    from av.video.reformatter import VideoReformatter

    scale, pack = VideoReformatter(), VideoReformatter()  # each keeps what it has set up

    def convert(frame: VideoFrame) -> NDArray[Any]:
        # 0: as many threads as there are cores. For small frames, waking them costs more than the work.
        threads = 1 if max(frame.width * frame.height, width * height) < _MANY_PIXELS else 0
        if (frame.width, frame.height) != (width, height):
            own = frame.format.name == "yuv420p" and min(width / frame.width, height / frame.height) >= _NEAR
            own = own and not width % 2 and not height % 2
            frame = scale.reformat(frame, width, height, "yuv420p" if own else "gbrp", interpolation="BICUBIC", threads=threads)
        return pack.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=threads).to_ndarray()

    return convert


@contextmanager
def _picture(path: Path) -> Iterator[Image]:
    """An image whose header is read; every error becomes one UserError, and so does a decompression bomb."""
    from PIL import Image, ImageOps

    opened(path).close()  # refuses what is no file
    with (
        fault_of(path, "Write or download it again"),
        warnings.catch_warnings(),
        Image.open(path, formats=_PICTURE_FORMATS) as picture,
    ):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        refuse_size(path, picture.height, picture.width)
        yield ImageOps.exif_transpose(picture)


def _pixels_of(picture: Image, size: Size | None) -> NDArray[np.uint8]:
    from PIL.Image import Resampling

    colours = picture.convert("RGB")
    if size is not None and size != (picture.height, picture.width):
        colours = colours.resize((size[1], size[0]), Resampling.BICUBIC)
    return np.array(colours)
