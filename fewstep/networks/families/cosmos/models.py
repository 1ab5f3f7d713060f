"""The published Cosmos models by name: the dimensions with which each was trained. No weights are read here.

Sources: the configuration files of cosmos-predict1, -predict2, -predict2.5, -transfer1 and -transfer2.5, and what diffusers
writes into config.json when it converts them. All share 16 latent channels, patches of 1 x 2 x 2 and heads of 128.
"""

from __future__ import annotations

from collections.abc import Mapping

from fewstep.config import alike
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.cosmos.predict import PREDICT, PREDICT1_7B, PREDICT2_5_2B


def transfer1_7b(*controls: str) -> CosmosControlSpec:
    """Cosmos-Transfer1 7B conditioned on `controls`: of depth, edge, keypoint, seg, vis."""
    return alike(CosmosControlSpec, PREDICT1_7B, style="transfer1", num_control_blocks=3, controls=controls or ("edge",))


def transfer2_5_2b(*controls: str) -> CosmosControlSpec:
    """Cosmos-Transfer2.5 2B conditioned on `controls`: of depth, edge, seg, vis (which it calls blur)."""
    branch = {"image_context_dim": 1152, "num_control_blocks": 4}  # SigLIP
    return alike(CosmosControlSpec, PREDICT2_5_2B, controls=controls or ("edge",), **branch)


# Frames, height, width and rate of the clips that the inference commands of a generation make where none are given.
FIRST_CLIPS = (121, 704, 1280, 24.0)
SECOND_CLIPS = (93, 704, 1280, 16.0)

MODELS: Mapping[str, CosmosSpec] = {
    **PREDICT,
    "transfer1_7b": transfer1_7b("edge"),
    "transfer2_5_2b": transfer2_5_2b("edge"),
}
