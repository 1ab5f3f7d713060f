"""Thousands of damaged files and commands that nobody meant, in one warm process: see process.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import UserError
from fewstep.networks.encoders.codecs import form_of
from fewstep.untrusted.torch_files import load_torch

PROCESS = Path(__file__).with_name("process.py")
PART = 5000


def run(num: int, seed: int, *words: str) -> dict[str, Any]:
    command = [sys.executable, str(PROCESS), str(num), str(seed), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    report = json.loads(done.stdout.splitlines()[-1])
    failures = report["failures"]
    assert not failures, f"{len(failures)} of {report['num']} cases:\n" + "\n\n".join(failures[:5])
    assert report["num"] >= 0.9 * num
    return report


def test_a_thousand_cases() -> None:
    run(1000, 20261130)


@pytest.mark.slow
def test_many_cases_of_every_verb() -> None:
    """How many, and from which seed: FEWSTEP_HOSTILE=50000 FEWSTEP_SEED=2. A process takes 5,000: each case costs more than the
    one before, because no case is taken twice."""
    num, first = int(os.environ.get("FEWSTEP_HOSTILE", "10000")), int(os.environ.get("FEWSTEP_SEED", "1"))
    for part in range(-(-num // PART)):
        print(json.dumps(run(min(PART, num - part * PART), first + part, "deep"), indent=1))


# --- what they have found


def test_a_codec_of_a_class_that_is_no_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": ["AutoencoderKLWan"]}')
    with pytest.raises(UserError, match="no codec of ours"):
        form_of(tmp_path)


def test_a_torch_file_whose_index_claims_more_than_there_is(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(3)}, file)
    whole = bytearray(file.read_bytes())
    others = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist()[1:])
    entry = whole.index(b"PK\x01\x02")  # of data.pkl, the first: as large as can be, and so beyond the end of the file
    for at in (entry + 20, entry + 24):
        whole[at : at + 4] = (len(whole) - others).to_bytes(4, "little")
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"weights\.pt: not tensors .*: it ends too early"):
        load_torch(file)
