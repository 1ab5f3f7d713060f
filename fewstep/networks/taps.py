"""Outputs of single blocks, which discriminators read; and no more work than that where nothing else is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from fewstep.diffusion import FeaturesOnly
from fewstep.errors import UserError
from fewstep.networks.tokens import whole

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
def block_outputs(
    module: nn.Module, blocks: Sequence[nn.Module], taps: Sequence[int], stand_in: StandIn = stream
) -> Iterator[dict[int, Any]]:
    """Within, the outputs of the blocks in `taps` are collected, by number, and `module` returns them behind its own outputs.

    blocks: those of `module`, in the order in which they run. Where only features are wanted, those behind the last tap do not
    run (`idle_blocks`). `module` must return a tuple. FSDP looks for what needs a gradient in the outputs of its root alone:
    without the features there, its outermost weights would not be gathered for their backward.
    """
    outputs: dict[int, Any] = {}

    def collect(i: int) -> Any:
        return lambda block, args, kwargs, output: outputs.__setitem__(i, whole(output, (*args, *kwargs.values())))

    with idle_blocks(blocks, taps, stand_in):
        handles = [blocks[i].register_forward_hook(collect(i), with_kwargs=True) for i in taps]
        if taps:
            behind = module.register_forward_hook(lambda module, inputs, output: (*output, dict(outputs)), prepend=True)
            handles.append(behind)
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def idle_blocks(blocks: Sequence[nn.Module], taps: Sequence[int], stand_in: StandIn = stream) -> Iterator[None]:
    """Within, where only features are wanted, `stand_in` is called instead of each block behind the last tap.

    What is registered on a block (FSDP, checkpointing) sees its calls all the same.
    """
    wrong = [tap for tap in taps if not 0 <= tap < len(blocks)]
    if wrong:
        raise UserError(f"tap {wrong[0]} is no block of this network, whose blocks are 0 .. {len(blocks) - 1}")
    behind = blocks[max(taps) + 1 :] if taps and isinstance(taps, FeaturesOnly) else ()
    idle = [block for block in behind if "forward" not in vars(block)]
    for block in idle:
        block.forward = partial(stand_in, block)
    try:
        yield
    finally:
        for block in idle:
            del block.forward
