"""What is done to a network before it is used changes memory and speed, and no gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.batch import Condition
from fewstep.data.mock import Mock
from fewstep.methods import DMD2
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks, build
from fewstep.networks.tiny import Tiny, TinySpec
from fewstep.parallel import World, average_gradients, join_world, place
from fewstep.training.crew import assemble
from fewstep.training.run import Run, Trainer

ALONE = World(0, 1, torch.device("cpu"), None)


def network(architecture: Any) -> Tiny:
    torch.manual_seed(0)
    built = TinySpec(architecture, width=24, depth=3, num_heads=2, text_dim=5 if architecture == "dit" else 0).build()
    for parameter in built.module.parameters():  # the DiT's modulation starts at 0, which would hide its gradients
        nn.init.normal_(parameter, std=0.2)
    return built


def gradients(net: Tiny, architecture: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(3, 2, 2, 3, 3) if architecture == "dit" else torch.randn(3, 2)
    cond = Condition(text=torch.randn(3, 4, 5)) if architecture == "dit" else Condition()
    net(x, torch.tensor([0.2, 0.6, 0.999]), cond).x0.square().mean().backward()
    found = {name: parameter.grad for name, parameter in net.module.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


def saved_bytes(net: Tiny, architecture: str) -> int:
    x = torch.randn(3, 2, 2, 3, 3) if architecture == "dit" else torch.randn(3, 2)
    return saved_bytes_of(lambda: net(x, torch.tensor([0.2, 0.6, 0.9]), Condition()))


def saved_bytes_of(forward: Callable[[], Any]) -> int:
    """What autograd keeps of one forward for its backward."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return total


@pytest.mark.parametrize("architecture", ["mlp", "dit"])
def test_recomputed_blocks_give_the_same_gradients(architecture: Any) -> None:
    plain, recomputed = network(architecture), network(architecture)
    place(plain.module, plain.blocks, ALONE, mode="ddp", compute=torch.float32, trained=True)
    place(recomputed.module, recomputed.blocks, ALONE, mode="ddp", compute=torch.float32, trained=True, checkpointing=True)
    assert saved_bytes(recomputed, architecture) < 0.7 * saved_bytes(plain, architecture)
    want, got = gradients(plain, architecture), gradients(recomputed, architecture)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_selective_recomputation_repeats_no_product_and_keeps_less_than_all() -> None:
    """The gradients of plain blocks; matrix products and attention run once, as often as without any recomputation."""
    plain, whole, selective = network("dit"), network("dit"), network("dit")
    place(plain.module, plain.blocks, ALONE, mode="ddp", compute=torch.float32, trained=True)
    place(whole.module, whole.blocks, ALONE, mode="ddp", compute=torch.float32, trained=True, checkpointing=True)
    place(
        selective.module, selective.blocks, ALONE,
        mode="ddp", compute=torch.float32, trained=True, checkpointing=True, selective=True,
    )  # fmt: skip
    found: list[dict[str, Tensor]] = []
    counts: list[int] = []
    for each in (plain, selective, whole):
        with CountProducts() as counted:
            found.append(gradients(each, "dit"))
        counts.append(counted.num)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])
    assert counts[0] == counts[1] < counts[2]


@pytest.mark.parametrize(
    ("roles", "adapters", "expected"),
    [((), False, {"student", "critic", "teacher"}), (("student",), False, {"student"}), (("critic",), True, {"teacher"})],
)
def test_blocks_of_the_roles_that_are_named_run_again(roles: tuple[str, ...], adapters: bool, expected: set[str]) -> None:
    """Of a backbone that roles share, the blocks do if one of them is named; it is counted by what autograd keeps."""
    spec = TinySpec("dit", width=24, depth=2, num_heads=2)
    method, parts = DMD2(), (Lora(rank=2), Lora(rank=2)) if adapters else (Full(), Full())
    kept: dict[bool, dict[str, int]] = {}
    for on in (False, True):
        trainer = Trainer(checkpointing=on, recompute_roles=roles if on else ())
        run = Run(method, Networks(spec, *parts), Mock((2, 2, 4, 4), None), trainer=trainer)
        crew = assemble(run, build(run.networks, method.roles, 0), ALONE)
        modules = {"teacher": crew.modules[0]} if adapters else dict(zip(("student", "teacher", "critic"), crew.modules))
        sizes = kept[on] = {}
        for name, whole in modules.items():
            for parameter in whole.module.parameters():
                parameter.requires_grad_(True)
            network = crew.networks["student" if adapters else name]
            sizes[name] = saved_bytes_of(
                lambda network=network: network(torch.randn(1, 2, 2, 4, 4), torch.tensor([0.5]), Condition())
            )
    assert {name for name in kept[True] if kept[True][name] < 0.8 * kept[False][name]} == expected


class CountProducts(TorchDispatchMode):
    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        words = ("aten::mm", "aten::addmm", "aten::bmm", "attention")
        self.num += any(word in func.name() for word in words)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor has many
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["mlp", "dit"])
def test_compiled_blocks_give_the_same_gradients(architecture: Any, checkpointing: bool) -> None:
    torch._dynamo.reset()
    plain, compiled = network(architecture), network(architecture)
    place(plain.module, plain.blocks, ALONE, mode="ddp", compute=torch.float32, trained=True)
    place(
        compiled.module, compiled.blocks, ALONE,
        mode="ddp", compute=torch.float32, trained=True, compiled=True, checkpointing=checkpointing,
    )  # fmt: skip
    want, got = gradients(plain, architecture), gradients(compiled, architecture)
    assert all("_orig_mod" not in name for name in got)  # a checkpoint has the same names
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("frequencies", torch.tensor([0.1, 0.001]))


def test_a_frozen_network_is_rounded_in_its_weights_and_not_in_its_tables() -> None:
    module = WithTable()
    place(module, (), ALONE, mode="ddp", compute=torch.bfloat16, trained=False)
    assert module.layer.weight.dtype == torch.bfloat16 and not module.layer.weight.requires_grad and not module.training
    assert module.frequencies.dtype == torch.float32


def test_a_trained_network_stays_fp32_until_its_role_takes_it() -> None:
    module = WithTable()
    place(module, (), ALONE, mode="ddp", compute=torch.bfloat16, trained=True)
    assert module.layer.weight.dtype == torch.float32 and module.layer.weight.requires_grad and module.training


def test_a_process_alone_averages_nothing() -> None:
    parameter = nn.Parameter(torch.ones(2))
    average_gradients([parameter], ALONE)
    assert parameter.grad is None


def test_a_world_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"parallel\.device=cuda, but torch sees no GPU"):
            join_world("cuda")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"parallel\.num_replicas=2 does not divide the 3 processes"):
        join_world("cpu", num_replicas=2)
