"""Trains the toy world's text encoder to fill gaps in captions.

    python -m fewstep.toyworld.train_words datasets/toyworld/train/metas --out fewstep/toyworld/stack/text_encoder

A quarter of the words of each caption is a gap; a linear layer, thrown away afterwards, names the word from the embedding. To
predict a colour, the encoder must read the other clause that names the object; a side cannot be predicted at all. The loss
that remains is what a caption leaves open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from fewstep.toyworld.captions import VOCABULARY
from fewstep.toyworld.words import GAP, PAD, WordsConfig, WordsEncoder, WordsModel

GAPS = 0.25


def train(captions: list[str], num_steps: int = 2000, batch_size: int = 64, seed: int = 0) -> tuple[WordsEncoder, list[float]]:
    """The encoder, and its loss at each step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = WordsEncoder(WordsModel(WordsConfig(VOCABULARY)))
        naming = nn.Linear(encoder.dim, len(VOCABULARY) + 2)
    weights = [*encoder.module.parameters(), *naming.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps)
    random = torch.Generator().manual_seed(seed)
    tokens, losses = encoder.padded(captions), list[float]()
    for _ in range(num_steps):
        wanted = tokens[torch.randint(len(tokens), (batch_size,), generator=random)]
        hidden = (torch.rand(wanted.shape, generator=random) < GAPS) & (wanted != PAD)
        hidden[:, 0] |= ~hidden.any(1)
        # One in twenty captions is all gap: the empty prompt must have an embedding, too.
        hidden |= (torch.rand(len(wanted), 1, generator=random) < 0.05) & (wanted != PAD)
        named = naming(encoder.module(wanted.masked_fill(hidden, GAP)))
        loss = nn.functional.cross_entropy(named[hidden], wanted[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    encoder.module.eval().requires_grad_(False)
    return encoder, losses


def main(
    captions: Annotated[Path, typer.Argument(help="Folder of captions, *.txt.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    torch.set_num_threads(1)
    texts = [path.read_text().strip() for path in sorted(captions.glob("*.txt"))]
    if not texts:
        raise typer.BadParameter(f"{captions}: holds no *.txt")
    encoder, losses = train(texts)
    encoder.save(out)
    last = torch.tensor(losses[-100:]).mean().item()
    size = sum(p.numel() for p in encoder.module.parameters())
    print(f"{out}: {len(texts)} captions, {size:,} weights; loss per gap {losses[0]:.3f} -> {last:.3f}")


if __name__ == "__main__":
    typer.run(main)
