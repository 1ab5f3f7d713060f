"""Cached latents are the codec's answer to the very pixels that training would have read, and never those of another codec."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep import cli
from fewstep.data.check.survey import survey
from fewstep.data.controls import Edge, Seg
from fewstep.data.files import video
from fewstep.data.folder.dataset import Folder
from fewstep.networks.encoders.codecs import Autoencoder, codec_of, open_codec
from fewstep.prepare import latents
from fewstep.prepare.summary import Summary
from fewstep.toyworld.dataset import stem_of
from fewstep.toyworld.dataset import write as write_toyworld
from fewstep.toyworld.physics import World

NUM, SEED = 3, 5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "set"
    write_toyworld(out, NUM, SEED, World())  # 17 frames of 32 x 32
    return out


@pytest.fixture
def toy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "set"))


def tiny_vae(seed: int = 0) -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4, latents_std=[0.5] * 4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def codec() -> Autoencoder:
    return codec_of(tiny_vae())


def spec(root: Path, **changes: Any) -> Folder:
    return replace(Folder(str(root), text=None), **changes)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_batch_of_latents_is_the_encoded_batch_of_pixels(toy: Path, codec: Autoencoder) -> None:
    assert latents.write(spec(toy, control=Seg()), codec) == Summary(2 * NUM, 2 * NUM, dropped=0)
    index = torch.tensor([2, 0, 1])
    pixels = spec(toy, control=Seg()).open().batch(index)
    cached = spec(toy, x0="latents", control=Seg()).open()
    batch = cached.batch(index)
    assert pixels.x0 is not None and batch.x0 is not None and batch.cond.fps is not None
    wanted = torch.cat([codec.encode(row) for row in pixels.x0.split(1)])
    assert batch.x0.shape == (3, *codec.shape(17, 32, 32)) and batch.x0.dtype == torch.float32
    torch.testing.assert_close(batch.x0, wanted, rtol=2**-11, atol=2**-20)  # float16 rounds to 11 bits
    control = torch.cat([codec.encode(row) for row in pixels.cond.control["seg"].split(1)])
    torch.testing.assert_close(batch.cond.control["seg"], control, rtol=2**-11, atol=2**-20)
    assert batch.cond.fps.tolist() == [16.0] * 3
    assert cached.stems == [stem_of(n) for n in range(NUM)]


def test_windows_are_cached_as_windows(toy: Path, codec: Autoencoder) -> None:
    windows: dict[str, Any] = {"num_frames": 5, "sequence_interval": 2, "start_frame_interval": 3, "video_size": (16, 24)}
    wanted = spec(toy, **windows, resize="crop").open()
    assert latents.write(wanted.spec, codec).num == len(wanted) == NUM * 3
    data = spec(toy, x0="latents", num_frames=5).open()
    assert [s.span for s in data.samples] == [s.span for s in wanted.samples] and data.stems == wanted.stems
    pixels, found = (part.batch(torch.tensor([4])) for part in (wanted, data))
    assert pixels.x0 is not None and found.x0 is not None and found.cond.fps is not None
    torch.testing.assert_close(found.x0, codec.encode(pixels.x0), rtol=2**-11, atol=2**-20)
    assert found.cond.fps.tolist() == [8.0]
    with pytest.raises(ValueError, match="9 of 9 latents are not of 17 frames"):
        spec(toy, x0="latents", num_frames=17).open()
    shutil.copytree(toy / "metas", toy / "noise")
    with pytest.raises(ValueError, match="a pair is the whole clip"):
        spec(toy, x0="latents", pairs=("noise",)).open()


def test_a_rerun_encodes_what_is_new_or_changed_and_drops_what_is_gone(toy: Path, codec: Autoencoder) -> None:
    assert latents.write(spec(toy), codec).new == NUM
    before = content(toy / "latents")
    for _ in range(2):
        assert latents.write(spec(toy), codec) == Summary(NUM, 0, dropped=0)
    for path in (toy / "videos").iterdir():
        shutil.copy(path, path.with_suffix(".copy"))
        path.with_suffix(".copy").replace(path)  # another time, the same bytes
    assert latents.write(spec(toy), codec).new == 0
    assert content(toy / "latents") == before
    frames = video.read(toy / "videos" / "clip_000001.mp4").frames
    video.write(toy / "videos" / "clip_000001.mp4", 255 - frames, 16, quality="lossless")
    (toy / "videos" / "clip_000002.mp4").unlink()
    with pytest.raises(ValueError, match="1 of 3 latents are of another file than videos/ holds: clip_000001"):
        spec(toy, x0="latents").open()
    assert latents.write(spec(toy), codec) == Summary(2, 1, dropped=2)
    pixels, found = (spec(toy, x0=x0).open().batch(torch.tensor([1])).x0 for x0 in ("pixels", "latents"))
    assert pixels is not None and found is not None
    torch.testing.assert_close(found, codec.encode(pixels), rtol=2**-11, atol=2**-20)


def test_a_clip_that_was_added_since_is_not_left_out_without_a_word(toy: Path, codec: Autoencoder) -> None:
    latents.write(spec(toy), codec)
    shutil.copy(toy / "videos" / "clip_000000.mp4", toy / "videos" / "new.mp4")
    with pytest.raises(ValueError, match=f"1 of {NUM + 1} clips have no latents: new. Run fewstep prepare latents again"):
        spec(toy, x0="latents").open()
    data = spec(toy, x0="latents", max_bad=1).open()
    assert len(data) == NUM and data.left_out == {"new": "has no latents"}


def test_another_codec_or_setting_is_refused_by_name_before_anything_is_encoded(toy: Path, codec: Autoencoder) -> None:
    latents.write(spec(toy), codec)
    before = content(toy / "latents")
    other = codec_of(tiny_vae(seed=1))
    with pytest.raises(ValueError, match=f"codec is '{codec.fingerprint}', not '{other.fingerprint}'"):
        latents.write(spec(toy), other)
    with pytest.raises(ValueError, match="codec is "):
        latents.write(spec(toy), codec_of(tiny_vae(), scale=0.5))
    with pytest.raises(ValueError, match="num_frames is 'whole', not '5', start_frame_interval"):
        latents.write(spec(toy, num_frames=5), codec)
    with pytest.raises(ValueError, match="dtype is 'float16', not 'bfloat16'"):
        latents.write(spec(toy), codec, dtype="bfloat16")
    assert content(toy / "latents") == before
    with pytest.raises(ValueError, match="AutoencoderKLWan: 16 frames do not fit"):
        latents.write(spec(toy, num_frames=16), codec)
    assert content(toy / "latents") == before


def test_control_latents_of_another_codec_are_refused(toy: Path, codec: Autoencoder) -> None:
    latents.write(spec(toy, control=Edge()), codec)
    shutil.rmtree(toy / "latents")
    latents.write(spec(toy), codec, dtype="bfloat16")
    with pytest.raises(ValueError, match="edge_latents/ and latents/ were made with another dtype"):
        spec(toy, x0="latents", control=Edge()).open()
    shutil.rmtree(toy / "edge_latents")
    with pytest.raises(ValueError, match=r"lack edge_latents/.*Encode them: fewstep prepare latents"):
        spec(toy, x0="latents", control=Edge()).open()


def test_a_clip_that_cannot_be_decoded_is_told_of_when_the_others_are_done(toy: Path, codec: Autoencoder) -> None:
    path = toy / "videos" / "clip_000001.mp4"
    sound = path.read_bytes()
    middle = sound.index(b"mdat") + 300
    path.write_bytes(sound[:middle] + bytes(len(sound) // 2 - middle) + sound[len(sound) // 2 :])
    with pytest.raises(ValueError, match=r"1 of 3 could not be encoded, the others are done: .*clip_000001"):
        latents.write(spec(toy), codec)
    path.write_bytes(sound)
    assert latents.write(spec(toy), codec) == Summary(NUM, 1, dropped=0)


def test_a_disk_without_room_is_told_of_before(toy: Path, codec: Autoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "free_bytes", lambda _: 10)
    with pytest.raises(ValueError, match=r"3 latents of \(4, 5, 4, 4\) need 0\.0 MiB, 0\.0 are free"):
        latents.write(spec(toy), codec)
    assert not (toy / "latents" / "packs" / "00000.safetensors").exists()


def test_the_command(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_vae().save_pretrained(tmp_path / "pipeline" / "vae")
    words = ["prepare", "latents", str(toy), "--codec", str(tmp_path / "pipeline"), "--control", "edge", "--device", "cpu"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{toy}: 6 latents, 6 of them new\n"
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{toy}: 6 latents, 0 of them new\n"
    assert spec(toy, x0="latents", control=Edge()).open().batch(torch.tensor([0])).size() == 1
    assert cli.main([*words, "--height", "16", "--width", "16"]) == 1
    assert "video_size is 'own', not '16x16'" in capsys.readouterr().err
    assert cli.main([*words, "--dtype", "float8"]) == 2
    assert "'float8' is not one of float16, bfloat16" in capsys.readouterr().err
    assert cli.main([*words[:6], "edges"]) == 2
    assert "'edges' is not one of edge, vis, depth, seg, keypoint" in capsys.readouterr().err


def latents_command(toy: Path, folder: Path, *more: str) -> int:
    return cli.main(["prepare", "latents", str(toy), "--codec", str(folder), "--device", "cpu", *more])


def test_windows_lie_side_by_side_and_are_counted(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A window at every frame was 13 times the work, unannounced."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    assert latents_command(toy, tmp_path / "vae", "--num-frames", "5", "--measure", "0") == 0
    shown = capsys.readouterr()
    assert "9 windows of 3 clips, 5 frames each, one every 5 frames" in shown.err and "9 latents, 9 of them new" in shown.out
    starts = [sample.span.start for sample in spec(toy, x0="latents").open().samples]
    assert starts == [0, 5, 10] * NUM
    assert latents.side_by_side(5, 2) == 9
    assert latents_command(toy, tmp_path / "vae", "--num-frames", "5", "--start-frame-interval", "4") == 1
    assert "start_frame_interval is '5', not '4'" in capsys.readouterr().err


def test_reconstruction_is_measured_and_a_poor_codec_is_named(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")  # of random weights
    assert latents_command(toy, tmp_path / "vae", "--measure", "2") == 0
    shown = capsys.readouterr().err
    codec = open_codec(tmp_path / "vae")
    pixels = spec(toy).open().batch(torch.tensor([0, 1])).x0
    assert pixels is not None
    errors = [(codec.decode(codec.encode(one)).clamp(-1, 1) - one).square().mean() for one in pixels.split(1)]
    expected = sum(10 * float(torch.log10(4 / error)) for error in errors) / 2
    assert f"reconstruction: {expected:.1f} dB PSNR, mean of 2 clips" in shown
    assert "warning: below 15 dB" in shown and "fewstep prepare codec" in shown
    record = json.loads((toy / "latents" / "reconstruction.json").read_text())
    assert abs(record["psnr_db"] - expected) < 0.01 and record["codec"] == codec.fingerprint
    assert latents_command(toy, tmp_path / "vae", "--measure", "2", "--into", "own") == 0
    capsys.readouterr()
    assert latents_command(toy, fewstep.TOY, "--into", "toy", "--scale", "0.5", "--measure", "1") == 0
    assert "warning" not in capsys.readouterr().err
    one, other = (spec(toy, x0="latents", latents=name).open().batch(torch.tensor([0])).x0 for name in ("own", "toy"))
    assert one is not None and other is not None and (one.shape[1], other.shape[1]) == (4, 8)
    report = survey(toy)
    assert report.is_trainable, [str(problem) for problem in report.problems]


def test_controls_of_a_second_codec_have_a_folder_of_their_own(toy: Path, codec: Autoencoder) -> None:
    latents.write(spec(toy, control=Edge()), codec, into="own")
    batch = spec(toy, x0="latents", latents="own", control=Edge()).open().batch(torch.tensor([1]))
    pixels = spec(toy, control=Edge()).open().batch(torch.tensor([1])).cond.control["edge"]
    torch.testing.assert_close(batch.cond.control["edge"], codec.encode(pixels), rtol=2**-11, atol=2**-20)
    assert (toy / "edge_own" / "packs").is_dir() and not (toy / "edge_latents").exists()


def test_padded_clips_keep_their_margins(toy: Path, codec: Autoencoder) -> None:
    padded = spec(toy, video_size=(32, 48), resize="pad")
    latents.write(padded, codec)
    one, other = (data.open().batch(torch.tensor([0])).cond.padding for data in (padded, spec(toy, x0="latents")))
    assert one is not None and other is not None and torch.equal(one, other) and bool(one.any()) and not bool(one.all())
