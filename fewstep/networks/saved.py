"""A network whose calls keep what backward needs in the memory of the host: with recomputed blocks, the input of each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.diffusion import Cache, Prediction
from fewstep.networks.contract import Network, Wrapper

Entry = tuple[Tensor, bool]  # a tensor, and whether it is a copy on the host


@dataclass(frozen=True)
class SavedOnHost(Wrapper):
    """Copies activations to pinned memory beside the computation, and back when backward reaches them; on a CPU, within it.

    What stays where it is: weights, and what needs no gradient (text, positions), which all blocks share anyway.
    """

    inner: Network
    device: torch.device
    watchers: list[Callable[[], AbstractContextManager[None]]] = field(default_factory=list, repr=False)  # entered for a copy
    _streams: list[torch.cuda.Stream] = field(default_factory=list, repr=False)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return self.inner(x_t, t, cond, taps=taps, cache=cache)

    @torch.no_grad()
    def _pack(self, tensor: Tensor) -> Entry:
        whole = tensor if tensor._base is None else tensor._base
        if not tensor.requires_grad or whole.is_leaf:
            return tensor, False
        with ExitStack() as stack:
            for watch in self.watchers:
                stack.enter_context(watch())
            if tensor.device.type != "cuda":
                return tensor.clone(), True
            if not self._streams:
                self._streams.append(torch.cuda.Stream(tensor.device))
            (stream,) = self._streams
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                host = torch.empty_like(tensor, device="cpu", pin_memory=True)
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # its memory is not used anew before the copy is done
            return host, True

    @torch.no_grad()
    def _unpack(self, entry: Entry) -> Tensor:
        tensor, is_copy = entry
        if not is_copy:
            return tensor
        for stream in self._streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)
        return tensor.to(self.device, non_blocking=True, copy=True)
