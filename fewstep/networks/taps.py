"""Outputs of single blocks, which discriminators read; and no more work than that where nothing else is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from fewstep.diffusion import FeaturesOnly
from fewstep.errors import UserError

StandIn = Callable[..., Any]  # of an idle block: called with it and its arguments, returns what has the form of its output


def stream(block: nn.Module, hidden_states: Tensor, *others: object, **more: object) -> Tensor:
    """Stands in for a block with one stream."""
    return hidden_states


def picture_and_text(
    block: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *others: object, **more: object
) -> tuple[Tensor, Tensor]:
    """Stands in for a block with two streams."""
    return hidden_states, encoder_hidden_states


def text_and_picture(
    block: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *others: object, **more: object
) -> tuple[Tensor, Tensor]:
    """Stands in for a block with two streams that returns the text's first."""
    return encoder_hidden_states, hidden_states


@contextmanager
def block_outputs(blocks: Sequence[nn.Module], taps: Sequence[int], stand_in: StandIn = stream) -> Iterator[dict[int, Any]]:
    """Within, the outputs of the blocks in `taps` are collected, by number.

    blocks: in the order in which they run. Where only features are wanted, those behind the last tap do not run: `stand_in` is
    called instead. What is registered on a block (FSDP, checkpointing) sees its calls all the same.
    """
    wrong = [tap for tap in taps if not 0 <= tap < len(blocks)]
    if wrong:
        raise UserError(f"tap {wrong[0]} is no block of this network, whose blocks are 0 .. {len(blocks) - 1}")
    outputs: dict[int, Any] = {}

    def keep(i: int) -> Any:
        return lambda module, inputs, output: outputs.__setitem__(i, output)

    handles = [blocks[i].register_forward_hook(keep(i)) for i in taps]
    behind = blocks[max(taps) + 1 :] if taps and isinstance(taps, FeaturesOnly) else ()
    idle = [block for block in behind if "forward" not in vars(block)]
    for block in idle:
        block.forward = partial(stand_in, block)
    try:
        yield outputs
    finally:
        for block in idle:
            del block.forward
        for handle in handles:
            handle.remove()
