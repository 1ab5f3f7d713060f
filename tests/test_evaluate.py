"""What `fewstep evaluate` decides before anything is scored."""

from pathlib import Path

import pytest

import fewstep
from fewstep.evaluate import Job, codec_of
from fewstep.inference.model import Model, open_model

TOY = str(Path(fewstep.__file__).parent / "toy")


def test_a_model_without_a_codec_asks_for_one_and_takes_the_one_that_is_named() -> None:
    here = Path()
    whole = open_model(TOY)
    bare = Model(whole.network, whole.spec, folder=None)  # as a run's own checkpoint is
    with pytest.raises(ValueError, match=r"somebody/run: has no codec beside it\. Add --codec"):
        codec_of(bare, Job("somebody/run", here, here, here))
    named = codec_of(bare, Job("somebody/run", here, here, here, codec=TOY))
    assert named.fingerprint == codec_of(whole, Job(TOY, here, here, here)).fingerprint
