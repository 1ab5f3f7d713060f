"""Names on the hub, asked of a server of our own: what comes, and one clear line where nothing does."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).parent.parent / "stories"))
import materials

from fewstep.cli import main
from fewstep.export.base import Base
from fewstep.inference.teacher import teacher_at
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.files.pipeline import PipelineFolder

SMALL = CosmosSpec(
    latent_channels=2, num_heads=2, head_dim=12, num_layers=1, mlp_ratio=2, text_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8)
)
COMMIT = "0123456789" * 4
# What diffusers asks of the hub's library, which warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks.*:UserWarning")


class _Hub(BaseHTTPRequestHandler):
    """team/pipeline is a folder; team/gated and team/none answer as the hub does."""

    root: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if "team/gated" in path:
            return self._send(403, {"X-Error-Code": "GatedRepo"})
        if "team/broken" in path:
            return self._send(400, {})
        if "team/pipeline" not in path:
            return self._send(401, {"X-Error-Code": "RepoNotFound"})
        files = sorted(file for file in self.root.rglob("*") if file.is_file())
        names = [str(file.relative_to(self.root)) for file in files]
        if path.startswith("/api/models/team/pipeline/tree"):
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": n} for n, f in zip(names, files)]
            return self._send(200, {}, json.dumps(tree).encode() if with_body else b"")
        if path.startswith("/api/models/team/pipeline"):
            told = {"id": "team/pipeline", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self._send(200, {}, json.dumps(told).encode() if with_body else b"")
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name not in names:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        body = (self.root / name).read_bytes()
        etag = hashlib.sha256(body).hexdigest()
        size = {"Content-Length": str(len(body))}
        return self._send(200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, **size}, body if with_body else b"")

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a hub with one pipeline; the cache is empty."""
    torch.manual_seed(0)
    SMALL.build().module.save_pretrained(str(tmp_path / "hub/transformer"))
    (tmp_path / "hub/model_index.json").write_text(json.dumps({"_class_name": "Cosmos2_5_PredictBasePipeline"}))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"root": tmp_path / "hub"}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    _point_to(f"http://127.0.0.1:{server.server_port}", tmp_path, monkeypatch)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def _point_to(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_pipelines_name_gives_its_transformer(hub: str, tmp_path: Path) -> None:
    """And once it is in the cache, no network is needed."""
    wanted = CosmosSpec(pretrained=str(tmp_path / "hub")).build().module.state_dict()
    found = CosmosSpec(pretrained="team/pipeline").build().module.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert PipelineFolder("team/pipeline").index == {"_class_name": "Cosmos2_5_PredictBasePipeline"}
    assert PipelineFolder("team/pipeline").scheduler == {}  # it has no scheduler
    assert main(["convert", "team/pipeline", str(tmp_path / "model.pt")]) == 0
    assert len(torch.load(tmp_path / "model.pt", weights_only=True)) == len(wanted)


def test_a_small_teacher_is_known_by_its_sizes_before_its_weights_come(hub: str, tmp_path: Path) -> None:
    parts = {"transformer": ["diffusers", "CosmosTransformer3DModel"]}
    (tmp_path / "hub/model_index.json").write_text(json.dumps({"_class_name": "Cosmos2_5_PredictBasePipeline", **parts}))
    num = sum(tensor.numel() for tensor in SMALL.build().module.parameters())
    teacher = teacher_at("team/pipeline")
    assert (teacher.num_weights, teacher_at(str(tmp_path / "hub")).num_weights) == (num, num) and teacher.is_small
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_an_export_takes_the_parts_of_a_pipeline_and_not_its_denoiser(hub: str, tmp_path: Path) -> None:
    """Files in the hub's cache are links to its blobs; no other link is followed."""
    materials.t5(tmp_path / "hub/text_encoder")
    (tmp_path / "hub/model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "text_encoder": ["transformers", "T5EncoderModel"]})
    )
    base, index = Base.of("team/pipeline"), dict[str, Any]()
    assert base.copy_parts(tmp_path, index) == "WanPipeline" and index == {"text_encoder": ["transformers", "T5EncoderModel"]}
    for name in ("config.json", "model.safetensors"):
        copied = tmp_path / "text_encoder" / name
        assert not copied.is_symlink() and copied.read_bytes() == (tmp_path / "hub/text_encoder" / name).read_bytes()
    assert not list((tmp_path / "cache").rglob("diffusion_pytorch_model.safetensors"))
    assert list((tmp_path / "cache").rglob("transformer/config.json"))  # says whether a teacher is of the same class


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("team/gated", "'team/gated' is gated: accept its terms at {hub}/team/gated, then log in here with: hf auth login"),
        ("team/none", "there is no 'team/none' here, and the hub knows none, or not for you"),
        ("team/broken", "'team/broken': the hub failed: "),
    ],
)
def test_what_does_not_come_is_said_in_one_line(
    name: str, told: str, hub: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = told.format(hub=hub)
    with pytest.raises(ValueError) as refusal:
        CosmosSpec(pretrained=name).build()
    assert str(refusal.value).startswith(wanted) and "\n" not in str(refusal.value)
    with pytest.raises(ValueError) as refusal:
        _ = PipelineFolder(name).scheduler
    assert str(refusal.value).startswith(wanted)
    capsys.readouterr()
    assert main(["convert", name, str(tmp_path / "x.pt")]) == 1
    assert capsys.readouterr().err.startswith(f"fewstep: {wanted}")


@pytest.mark.parametrize("is_offline", [False, True])
def test_without_a_network(
    is_offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _point_to("http://127.0.0.1:9", tmp_path, monkeypatch)  # the port of discard, where nobody listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the library tries five times more, ever later
    why = "HF_HUB_OFFLINE is set" if is_offline else "the hub cannot be reached"
    wanted = f"there is no 'team/pipeline' here, nor in the hub's cache, and {why}. Download it where there is a network"
    with pytest.raises(ValueError) as refusal:
        CosmosSpec(pretrained="team/pipeline").build()
    assert str(refusal.value) == wanted
    assert main(["convert", "team/pipeline", str(tmp_path / "x.pt")]) == 1
    assert capsys.readouterr().err == f"fewstep: {wanted}\n"


def test_a_folder_that_is_not_there_is_no_name(tmp_path: Path) -> None:
    for place in (str(tmp_path / "none"), "a/b/c", "./transformer"):
        with pytest.raises(ValueError, match="there is no such folder, and it is no name on the hub"):
            CosmosSpec(pretrained=place).build()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"it has neither config\.json nor transformer/config\.json"):
        CosmosSpec(pretrained=str(tmp_path / "empty")).build()
