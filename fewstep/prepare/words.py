"""`fewstep prepare words`: a small text encoder for the captions of a data set, trained to fill gaps in them.

A quarter of the words of each caption is a gap; a linear layer, thrown away afterwards, names the word from the embedding. To
predict a word, the encoder must read the others. The loss that remains is what a caption leaves open.

It is meant for small worlds with some hundreds of words. A prompt with a word that no caption has is refused, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fewstep.data.folder.texts import opened
from fewstep.errors import UserError, some
from fewstep.files import whole_folder
from fewstep.networks.encoders.words import GAP, PAD, WordsConfig, WordsEncoder, WordsModel, open_words
from fewstep.networks.encoders.words_alone import split
from fewstep.prepare.text import captions as captions_of
from fewstep.progress import track

GAPS = 0.25
MAX_TOKENS = 40  # of an encoder, unless a caption is longer
MAX_WORDS = 20000


def vocabulary(captions: Sequence[str]) -> tuple[str, ...]:
    """Every word and mark of the captions, the most frequent first; equally frequent ones in their order."""
    counts: dict[str, int] = {}
    for caption in captions:
        for word in split(caption):
            counts[word] = counts.get(word, 0) + 1
    return tuple(sorted(counts, key=lambda word: (-counts[word], word)))


def train(
    captions: Sequence[str],
    words: tuple[str, ...],
    num_steps: int = 2000,
    batch_size: int = 64,
    seed: int = 0,
    dim: int = 64,
) -> tuple[WordsEncoder, list[float]]:
    """The encoder, and its loss at each step."""
    longest = max(len(split(caption)) for caption in captions)
    config = WordsConfig(words, dim=dim, max_tokens=max(MAX_TOKENS, longest + longest // 4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = WordsEncoder(WordsModel(config))
        naming = nn.Linear(encoder.dim, len(words) + 2)
    weights = [*encoder.module.parameters(), *naming.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps)
    random = torch.Generator().manual_seed(seed)
    tokens, losses = encoder.padded(captions), list[float]()
    for _ in track(range(num_steps), num_steps, "training the text encoder"):
        targets = tokens[torch.randint(len(tokens), (batch_size,), generator=random)]
        hidden = (torch.rand(targets.shape, generator=random) < GAPS) & (targets != PAD)
        hidden[:, 0] |= ~hidden.any(1)
        # One in twenty captions is all gap: the empty prompt must have an embedding, too.
        hidden |= (torch.rand(len(targets), 1, generator=random) < 0.05) & (targets != PAD)
        logits = naming(encoder.module(targets.masked_fill(hidden, GAP)))
        loss = nn.functional.cross_entropy(logits[hidden], targets[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    encoder.module.eval().requires_grad_(False)
    return encoder, losses


def write(dataset_dir: Path, out: Path, *, num_steps: int = 2000, dim: int = 64, seed: int = 0) -> str:
    """Trains an encoder on the captions of a data set and writes its folder; returns a line for the user."""
    if dim % 4:
        raise UserError(f"--dim {dim}: a multiple of 4, the number of attention heads")
    texts = list(captions_of(opened(dataset_dir)).values())
    words = vocabulary(texts)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        config = open_words(out).module.config
        if (config.words, config.dim) == (words, dim):
            return f"{out}: is there, with the {len(words)} words of these captions"
        raise UserError(f"{out}: is an encoder of other words. Choose another --out, or remove it")
    if len(words) > MAX_WORDS:
        raise UserError(
            f"{dataset_dir}: its captions have {len(words)} different words, more than {MAX_WORDS}: use a text encoder that "
            "was trained on a language, T5 for instance"
        )
    encoder, losses = train(texts, words, num_steps, seed=seed, dim=dim)
    with whole_folder(out) as partial:
        encoder.save(partial)
    last = sum(losses[-100:]) / len(losses[-100:])
    size = sum(p.numel() for p in encoder.module.parameters())
    return (
        f"{out}: {len(words)} words of {len(texts)} captions ({some(words, 8)}), up to {encoder.module.config.max_tokens} "
        f"tokens, {size:,} weights; loss per gap {losses[0]:.3f} -> {last:.3f}"
    )
