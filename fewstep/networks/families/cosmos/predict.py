"""The published Cosmos-Predict models: the dimensions with which each was trained. Sources: see models.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fewstep.networks.families.cosmos.network import CosmosSpec

PREDICT1_7B = CosmosSpec(  # Video2World
    family="edm",
    sigma_data=0.5,
    use_fps=True,
    clean_time=None,
    frame_noise=0.001,
    num_heads=32,
    num_layers=28,
    rope_scale=(2.0, 1.0, 1.0),
    learnable_positions=True,
)
PREDICT1_14B = replace(PREDICT1_7B, num_heads=40, num_layers=36, rope_scale=(2.0, 2.0, 2.0))
PREDICT1_7B_TEXT2WORLD = replace(PREDICT1_7B, frame_mask=False)
PREDICT1_14B_TEXT2WORLD = replace(PREDICT1_14B, frame_mask=False)

PREDICT2_2B = CosmosSpec(num_heads=16, num_layers=28, use_fps=True)  # Video2World
PREDICT2_14B = replace(PREDICT2_2B, num_heads=40, num_layers=36, rope_scale=(20 / 24, 2.0, 2.0))
PREDICT2_2B_TEXT2IMAGE = replace(PREDICT2_2B, use_fps=False, rope_scale=(1.0, 4.0, 4.0), frame_mask=False)
PREDICT2_14B_TEXT2IMAGE = replace(PREDICT2_2B_TEXT2IMAGE, num_heads=40, num_layers=36)

PREDICT2_5_2B = CosmosSpec(num_heads=16, num_layers=28, text_projection_from=100352)  # 28 layers of Qwen2.5-VL, 3584 each
PREDICT2_5_14B = replace(PREDICT2_5_2B, num_heads=40, num_layers=36, clean_time=None)

PREDICT: Mapping[str, CosmosSpec] = {
    "predict1_7b": PREDICT1_7B,
    "predict1_14b": PREDICT1_14B,
    "predict1_7b_text2world": PREDICT1_7B_TEXT2WORLD,
    "predict1_14b_text2world": PREDICT1_14B_TEXT2WORLD,
    "predict2_2b": PREDICT2_2B,
    "predict2_14b": PREDICT2_14B,
    "predict2_2b_text2image": PREDICT2_2B_TEXT2IMAGE,
    "predict2_14b_text2image": PREDICT2_14B_TEXT2IMAGE,
    "predict2_5_2b": PREDICT2_5_2B,
    "predict2_5_14b": PREDICT2_5_14B,
}
