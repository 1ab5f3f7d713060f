"""Our checkpoints against torch.distributed.checkpoint: either reads what the other wrote."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

from fewstep.networks.files.distributed import open_distributed, write_distributed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def state() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "student.weights.w": nn.Parameter(torch.randn(4, 3, generator=rng)),
        "student.weights.part": torch.randn(8, 8, generator=rng)[2:4, ::2],
        "student.weights.half": torch.randn(5, generator=rng).bfloat16(),
        "student.optim.w.step": torch.tensor(7.0),
        "student.buffers.flags": torch.tensor([True, False]),
        "student.buffers.empty": torch.zeros(0, 3),
    }


def test_torch_reads_what_we_write_and_finds_the_same_contents(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    write_distributed(ours, state())
    dcp.save(state(), checkpoint_id=theirs, no_dist=True)
    contents = [replace(dcp.FileSystemReader(path).read_metadata(), storage_meta=None) for path in (ours, theirs)]
    for one in contents:
        for entry in one.state_dict_metadata.values():
            entry.properties.requires_grad = False  # a deprecated field: a weight as it is in the file needs none
        one.storage_data = {place: info.relative_path for place, info in one.storage_data.items()}
    assert contents[0] == contents[1]
    into = {name: torch.zeros_like(tensor.detach()) for name, tensor in state().items()}
    dcp.load(into, checkpoint_id=ours, no_dist=True)
    assert all(torch.equal(into[name], tensor) for name, tensor in state().items())
    assert sum(file.stat().st_size for file in ours.iterdir()) < 20_000


def test_we_read_what_torch_writes(tmp_path: Path) -> None:
    dcp.save(state(), checkpoint_id=tmp_path, no_dist=True)
    stored = open_distributed(tmp_path)
    assert stored.keys() == state().keys()
    for name, tensor in state().items():
        read = stored[name].read()
        assert torch.equal(read, tensor) and read.dtype == stored[name].dtype == tensor.dtype
        assert stored[name].shape == tuple(tensor.shape)


def test_a_checkpoint_that_lacks_a_chunk_is_refused(tmp_path: Path) -> None:
    dcp.save(state(), checkpoint_id=tmp_path, no_dist=True)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    metadata.state_dict_metadata["student.weights.w"].chunks.clear()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"cannot be read at student\.weights\.w: its chunks are not the whole of it"):
        open_distributed(tmp_path)["student.weights.w"].read()
