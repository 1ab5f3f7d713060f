"""The networks of FID and FVD, written a second time from their papers as tables over the names of the published weights.

Inception-v3: Szegedy et al. 2016, figures 5 to 7, with the mean pooling of TensorFlow, which does not count its padding, and
the largest in place of the mean in the last block, as in the graph that FID is defined by. I3D: Carreira & Zisserman 2017,
figure 3, with the zeros of TensorFlow's documentation of "SAME".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.evaluation.features import i3d, inception
from fewstep.evaluation.frechet import frechet_distance

Weights = Mapping[str, Tensor]
# The branches of a block: convolutions one after the other, /2 of stride 2 without padding.
A = ("branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "mean branch_pool")
B = ("branch3x3/2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2", "max/2")
C = (
    "branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5", "mean branch_pool",
)  # fmt: skip
D = ("branch3x3_1 branch3x3_2/2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2", "max/2")
E = (
    "branch1x1", "branch3x3_1 branch3x3_2a", "branch3x3_1 branch3x3_2b", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3b",
)  # fmt: skip
INCEPTION = {
    "Mixed_5b": A, "Mixed_5c": A, "Mixed_5d": A, "Mixed_6a": B, "Mixed_6b": C, "Mixed_6c": C, "Mixed_6d": C, "Mixed_6e": C,
    "Mixed_7a": D, "Mixed_7b": (*E, "mean branch_pool"), "Mixed_7c": (*E, "max branch_pool"),
}  # fmt: skip


def folded(w: Weights, name: str, conv: str, eps: float) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution with its batch normalisation."""
    scale = w[f"{name}.bn.weight"] / (w[f"{name}.bn.running_var"] + eps).sqrt()
    kernel = w[f"{name}.{conv}.weight"]
    return kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1)), w[f"{name}.bn.bias"] - w[f"{name}.bn.running_mean"] * scale


def step(w: Weights, block: str, word: str, x: Tensor) -> Tensor:
    name, _, stride = word.partition("/")
    if name == "mean":
        ones = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype)
        sums, counts = (functional.conv2d(v, ones, padding=1, groups=x.shape[1]) for v in (x, torch.ones_like(x)))
        return sums / counts
    if name == "max":
        padding, stride = (0, 2) if stride else (1, 1)
        x = functional.pad(x, [padding] * 4, value=-torch.inf)
        return x.unfold(2, 3, stride).unfold(3, 3, stride).amax(dim=(-2, -1))
    kernel, bias = folded(w, f"{block}.{name}" if block else name, "conv", 1e-3)
    padding = (0, 0) if stride else tuple(side // 2 for side in kernel.shape[2:])
    return functional.conv2d(x, kernel, bias, 2 if stride else 1, padding).relu()


def inception_by_table(w: Weights, x: Tensor) -> Tensor:
    def through(words: Sequence[str], x: Tensor, block: str = "") -> Tensor:
        for word in words:
            x = step(w, block, word, x)
        return x

    x = through(("Conv2d_1a_3x3/2",), x)
    x = functional.conv2d(x, *folded(w, "Conv2d_2a_3x3", "conv", 1e-3)).relu()
    x = through(("Conv2d_2b_3x3", "max/2", "Conv2d_3b_1x1"), x)
    x = functional.conv2d(x, *folded(w, "Conv2d_4a_3x3", "conv", 1e-3)).relu()
    x = through(("max/2",), x)
    for block, branches in INCEPTION.items():
        x = torch.cat([through(branch.split(), x, block) for branch in branches], dim=1)
    return x.flatten(2).mean(-1)


def padded(x: Tensor, kernel: Sequence[int], stride: Sequence[int], value: float = 0.0) -> Tensor:
    """TensorFlow, "SAME": max(k - s, 0) zeros where the stride divides the size, else max(k - size % s, 0), more behind."""
    for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), 2):
        size = x.shape[axis]
        num = max(k - (size % s or s), 0)
        ends = [torch.full_like(x.narrow(axis, 0, 1), value)] * num
        x = torch.cat([*ends[: num // 2], x, *ends[num // 2 :]], dim=axis)
    return x


def largest(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    x = padded(x, kernel, stride)  # zeros, and the values are none below: they come out of a rectification
    for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), 2):
        x = x.unfold(axis, k, s).amax(-1)
    return x


def i3d_by_table(w: Weights, x: Tensor, eps: float) -> Tensor:
    def unit(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel, bias = folded(w, name, "conv3d", eps)
        return functional.conv3d(padded(x, kernel.shape[2:], (stride,) * 3), kernel, bias, stride).relu()

    x = largest(unit(x, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = largest(unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    for stage, blocks, pool in ((3, "bc", ((3, 3, 3), (2, 2, 2))), (4, "bcdef", ((2, 2, 2), (2, 2, 2))), (5, "bc", None)):
        for letter in blocks:
            name = f"Mixed_{stage}{letter}"
            parts = [unit(x, f"{name}.b0")]
            parts += [unit(unit(x, f"{name}.b{n}a"), f"{name}.b{n}b") for n in (1, 2)]
            x = torch.cat([*parts, unit(largest(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")], dim=1)
        x = x if pool is None else largest(x, *pool)
    means = x.mean(dim=(3, 4)).unfold(2, 2, 1).mean(-1)  # 2 x 7 x 7, of pictures of 7 x 7
    return torch.einsum("oc,bct->bot", w["logits.conv3d.weight"].flatten(1), means).mean(-1) + w["logits.conv3d.bias"]


def with_statistics(network: nn.Module) -> nn.Module:
    """Random weights, and statistics of batch normalisation that are not 0 and 1."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.1, 0.3), (module.running_var, 0.5, 1.5)):
                assert tensor is not None
                nn.init.uniform_(tensor, low, high)
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight)
    return network.eval()


@pytest.mark.slow
@torch.no_grad()
def test_fid_is_the_distance_of_the_features_of_inception() -> None:
    network = with_statistics(inception.InceptionV3()).double()
    pictures = torch.randn(2, 3, 139, 107, dtype=torch.float64).clamp(-1, 1)
    wanted = inception_by_table(network.state_dict(), pictures)
    assert wanted.shape == (2, 2048) and float(wanted.std()) > 0
    torch.testing.assert_close(network(pictures), wanted, rtol=1e-9, atol=1e-9)
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 20, 30), dtype=np.uint8))
    scaled = inception.scaled(frames)
    assert scaled.shape == (4, 3, 299, 299) and float(scaled.min()) >= -1 and float(scaled.max()) <= 1
    corner = frames[:, :, 0, 0].float() / 127.5 - 1  # edges of pixels align: the first lies on the first
    torch.testing.assert_close(scaled[:, :, 0, 0], corner)
    some, others = torch.randn(40, 5, dtype=torch.float64), 2 * torch.randn(40, 5, dtype=torch.float64) + 1
    a, b = (np.cov(rows.numpy(), rowvar=False) for rows in (some, others))
    values = np.linalg.eigvals(a @ b).real.clip(0)
    exact = float((some.mean(0) - others.mean(0)).square().sum()) + np.trace(a + b) - 2 * np.sqrt(values).sum()
    assert frechet_distance(some, others) == pytest.approx(exact, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("eps", [1e-3, 1e-5])
@torch.no_grad()
def test_fvd_is_the_distance_of_the_logits_of_i3d(eps: float) -> None:
    network = with_statistics(i3d.Network())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps = eps
    clip = torch.randn(1, 3, 11, 224, 224).clamp(-1, 1)
    wanted = i3d_by_table(network.state_dict(), clip, eps)
    assert wanted.shape == (1, 400) and float(wanted.std()) > 0
    torch.testing.assert_close(network(clip), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
