"""What Cosmos calls its weights, and what they are called here: diffusers' names, with `base.` and `branches.NAME.` around them
where there are control branches. One table for the first generation (Predict1, Transfer1), one for the second (2 and 2.5).

The original files differ in their wrapping, too:

    X, net.X                                 a transformer: Predict1, Predict2, Predict2.5
    base_model.net.X, net.X                  Transfer1: base_model.pt and edge_control.pt, and the two as one file
    net.base_model.net.X, net.net_ctrl.X     Transfer1, distilled: iter_N_full.pt
    net.X, net.control_blocks.X, ...         Transfer2.5: one file with base and branch
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.errors import UserError

# Parts of the base that a Transfer2.5 branch holds a second time. Originally they are one and the same tensors.
SHARED = {
    "patch_embed": "patch_embed_base",
    "time_embed": "time_embed",
    "learnable_pos_embed": "learnable_pos_embed",
    "img_context_proj": "img_context_proj",
    "crossattn_proj": "crossattn_proj",
}
HINT_WIDTHS = (16, 16, 32, 32, 96, 96, 256)  # of the small MLP that reads Transfer1's control

Generation = Literal["1", "2"]
Table = tuple[tuple[str, str], ...]  # (original, ours), starts of names; # is a block's number

_MODULATION = ("self_attn", "cross_attn", "mlp")

_BLOCK_1: Table = (
    *(
        (f"blocks.{k}.block.attn.{theirs}.", f"attn{k + 1}.{ours}.")
        for k in (0, 1)
        for theirs, ours in (
            ("to_q.0", "to_q"),
            ("to_q.1", "norm_q"),
            ("to_k.0", "to_k"),
            ("to_k.1", "norm_k"),
            ("to_v.0", "to_v"),
            ("to_out.0", "to_out.0"),
        )
    ),
    ("blocks.2.block.layer1.", "ff.net.0.proj."),
    ("blocks.2.block.layer2.", "ff.net.2."),
    *((f"blocks.{k}.adaLN_modulation.{i}.", f"norm{k + 1}.linear_{i}.") for k in (0, 1, 2) for i in (1, 2)),
)
_EMBED_1: Table = (
    ("x_embedder.proj.1.", "patch_embed.proj."),
    ("t_embedder.1.", "time_embed.t_embedder."),
    ("affline_norm.", "time_embed.norm."),
    ("extra_pos_embedder.", "learnable_pos_embed."),
)
TRANSFORMER_1: Table = (
    *_EMBED_1,
    *((f"blocks.block#.{theirs}", f"transformer_blocks.#.{ours}") for theirs, ours in _BLOCK_1),
    ("final_layer.adaLN_modulation.1.", "norm_out.linear_1."),
    ("final_layer.adaLN_modulation.2.", "norm_out.linear_2."),
    ("final_layer.linear.", "proj_out."),
)
BRANCH_1: Table = (
    *_EMBED_1,
    *((f"blocks.block#.{theirs}", f"control_blocks.#.{ours}") for theirs, ours in _BLOCK_1),
    ("x_embedder2.proj.1.", "patch_embed_hint.proj."),
    ("input_hint_block.#.", "hint.#."),
    ("zero_blocks.block#.", "after.#."),
)
_BLOCK_2: Table = (
    *(
        (f"{kind}_attn.{theirs}.", f"attn{k}.{ours}.")
        for k, kind in ((1, "self"), (2, "cross"))
        for theirs, ours in (
            ("q_proj", "to_q"),
            ("q_norm", "norm_q"),
            ("k_proj", "to_k"),
            ("k_norm", "norm_k"),
            ("v_proj", "to_v"),
            ("output_proj", "to_out.0"),
        )
    ),
    *((f"cross_attn.{name}.", f"attn2.{name}.") for name in ("q_img", "k_img", "v_img", "q_img_norm", "k_img_norm")),
    ("mlp.layer1.", "ff.net.0.proj."),
    ("mlp.layer2.", "ff.net.2."),
    *((f"adaln_modulation_{kind}.{i}.", f"norm{k}.linear_{i}.") for k, kind in enumerate(_MODULATION, 1) for i in (1, 2)),
)
TRANSFORMER_2: Table = (
    ("x_embedder.proj.1.", "patch_embed.proj."),
    ("t_embedder.1.", "time_embed.t_embedder."),
    ("t_embedding_norm.", "time_embed.norm."),
    ("crossattn_proj.", "crossattn_proj."),
    ("img_context_proj.", "img_context_proj."),
    *((f"blocks.#.{theirs}", f"transformer_blocks.#.{ours}") for theirs, ours in _BLOCK_2),
    ("final_layer.adaln_modulation.1.", "norm_out.linear_1."),
    ("final_layer.adaln_modulation.2.", "norm_out.linear_2."),
    ("final_layer.linear.", "proj_out."),
)
_CONTROL_BLOCK_2: Table = (*_BLOCK_2, ("before_proj.", "before_proj."), ("after_proj.", "after_proj."))
BRANCH_2: Table = (
    ("control_embedder.proj.1.", "patch_embed.proj."),
    *((f"control_blocks.#.{theirs}", f"control_blocks.#.{ours}") for theirs, ours in _CONTROL_BLOCK_2),
)

# What stands behind a start, where it is not "weight" alone.
_ENDS: dict[str, tuple[str, ...]] = {
    "t_embedder.1.": ("linear_1.weight", "linear_2.weight"),
    "extra_pos_embedder.": ("pos_emb_t", "pos_emb_h", "pos_emb_w"),
    **dict.fromkeys(("crossattn_proj.", "img_context_proj."), ("0.weight", "0.bias")),
    **dict.fromkeys(("input_hint_block.#.", "zero_blocks.block#."), ("weight", "bias")),
    **dict.fromkeys(("control_blocks.#.before_proj.", "control_blocks.#.after_proj."), ("weight", "bias")),
}
# Not in every network, but whole where they are: positions that are learned, projected text, the features of a picture.
_OPTIONAL = ("extra_pos_embedder.", "crossattn_proj.", "_img", "img_context_proj.")

# Beside the weights: the counters and tables of the training, and the state of Transformer Engine.
_NO_WEIGHTS = re.compile(r"(^|\.)(logvar\.|pos_embedder\.|conditioner\.|accum_)|_extra_state$")
_HINT_MARKS = ("x_embedder2.", "zero_blocks.", "input_hint_block.")


@dataclass(frozen=True)
class Match:
    """Where each of our tensors comes from."""

    sources: dict[str, str]  # our name: the file's
    unused: tuple[str, ...] = ()  # of the file: no weights, or weights that no output depends on
    unknown: tuple[str, ...] = ()  # of the file: in no table
    generation: Generation | None = None  # None: the names were ours already


def match(names: Collection[str], controls: Sequence[str] = ()) -> Match:
    """Our names for those of a file; `controls` are the names that its branches are to have here."""
    generation = generation_of(names)
    if generation is None:
        return Match({name: name for name in names})
    sources: dict[str, str] = {}
    unused: list[str] = []
    unknown: list[str] = []
    for name, (part, plain) in _parts(names, generation).items():
        if part is None:
            unused.append(name)
            continue
        ours: str | None
        if part == "base":
            ours = translate(plain, TRANSFORMER_1 if generation == "1" else TRANSFORMER_2)
            if ours is not None and controls:
                ours = f"base.{ours}"
        elif isinstance(part, int) and part < len(controls):  # else there are more branches than names for them
            ours = translate(plain, BRANCH_1 if generation == "1" else BRANCH_2)
            if ours is not None:
                ours = f"branches.{controls[part]}.{ours}"
        else:
            ours = None
        if ours is None or ours in sources:
            unknown.append(name)
        else:
            sources[ours] = name
    if generation == "2":
        sources |= {name: sources[base] for name, base in repeated(sources, controls).items()}
    return Match(sources, tuple(unused), tuple(unknown), generation)


def num_branches(names: Collection[str]) -> int:
    """How many control branches an original file holds."""
    generation = generation_of(names)
    parts = {} if generation is None else _parts(names, generation)
    return len({part for part, _ in parts.values() if isinstance(part, int)})


def original_names(ours: Iterable[str], generation: Generation) -> dict[str, str]:
    """The original name of each of ours, as the released files wrap them; what a Transfer2.5 branch repeats of its base has
    none. A name that no table knows is refused."""
    ours = list(ours)
    controls = list(dict.fromkeys(name.split(".")[1] for name in ours if name.startswith("branches.")))
    names: dict[str, str] = {}
    for name in ours:
        part, plain = "base", name.removeprefix("base.")
        if name.startswith("branches."):
            part, plain = name.split(".", 2)[1:]
        if generation == "1":
            if len(controls) > 1:
                raise UserError("the original format holds one control branch a file; export them one by one")
            theirs = translate(plain, TRANSFORMER_1 if part == "base" else BRANCH_1, backwards=True)
            prefix = "base_model.net." if controls and part == "base" else "net."
        elif part != "base" and any(plain.startswith(f"{again}.") for again in SHARED.values() if again != "patch_embed"):
            continue
        else:
            theirs = translate(plain, TRANSFORMER_2 if part == "base" else BRANCH_2, backwards=True)
            if theirs is not None and part != "base" and len(controls) > 1:
                theirs = _number(theirs, controls.index(part))
            prefix = "net."
        if theirs is None:
            raise UserError(f"'{name}' has no name in the original Cosmos format of generation {generation}")
        names[name] = prefix + theirs
    return names


def odd_names(names: Collection[str]) -> tuple[list[str], list[str]]:
    """Of an original file: the names it lacks, and those that are none. How many blocks it has, it says itself."""
    generation = generation_of(names)
    if generation is None or any("lora" in name for name in names):  # ours, or adapters, which lie wherever they were put
        return [], []
    inside: dict[str | int, dict[str, str]] = {}  # part: the name in it: the file's
    for name, (part, plain) in _parts(names, generation).items():
        if part is not None:
            inside.setdefault(part, {})[plain] = name
    missing: list[str] = []
    extra: list[str] = []
    for part, have in inside.items():
        first, second = (TRANSFORMER_1, TRANSFORMER_2) if part == "base" else (BRANCH_1, BRANCH_2)
        table_names = _names_of(have, first if generation == "1" else second)
        plain, name = next(iter(have.items()))
        several = isinstance(part, int) and not name.endswith(plain)  # of a file of several branches
        start = "net." if several else name.removesuffix(plain)
        missing += [start + (_number(lacks, int(part)) if several else lacks) for lacks in table_names if lacks not in have]
        extra += [name for plain, name in have.items() if plain not in table_names]
    return missing, extra


def _names_of(have: Collection[str], table: Table) -> list[str]:
    """Every name of a network of this table, with as many blocks as the names there speak of."""
    blocks = [int(match.group(1)) for name in have if (match := re.match(r"(?:control_)?blocks\.(?:block)?(\d+)\.", name))]
    out: list[str] = []
    for start, _ in table:
        if start.startswith("input_hint_block."):
            numbers = list(range(0, 2 * len(HINT_WIDTHS) + 1, 2))  # the odd ones are activations
        elif ".before_proj." in start:
            numbers = [0]  # the later ones go on from the one before
        else:
            numbers = list(range(max(blocks, default=0) + 1)) if "#" in start else [0]
        names = [start.replace("#", str(number)) + end for number in numbers for end in _ENDS.get(start, ("weight",))]
        kind = next((kind for kind in _OPTIONAL if kind in start), None)
        if kind is None or any(kind in name for name in have):
            out += names
    return out


def generation_of(names: Collection[str]) -> Generation | None:
    """Which table fits; None for names that are not of an original Cosmos file."""
    for name in names:
        if "blocks.block0.blocks." in name:
            return "1"
        if re.search(r"(^|\.)(control_)?blocks(_\d+)?\.0\.(self_attn\.q_proj|adaln_modulation_self_attn)\.", name):
            return "2"
    return None


def translate(name: str, table: Table, *, backwards: bool = False) -> str | None:
    """The name on the other side of the table; None where no line fits."""
    for pair in table:
        start, other = reversed(pair) if backwards else pair
        pattern = re.escape(start).replace(r"\#", "#").replace("#", r"(\d+)")
        match = re.match(pattern, name)
        if match:
            rest = name[match.end() :]
            return (other.replace("#", match.group(1)) if match.groups() else other) + rest
    return None


def _parts(names: Collection[str], generation: Generation) -> dict[str, tuple[str | int | None, str]]:
    """For each name of a file: the base, the number of a branch, or None for what is no weight; and the name inside it."""
    parts: dict[str, tuple[str | int | None, str]] = {}
    is_control = generation == "1" and any(name.removeprefix("net.").startswith(_HINT_MARKS) for name in names)
    for name in names:
        if _NO_WEIGHTS.search(name):
            parts[name] = None, name
        elif generation == "1":
            parts[name] = _part_1(name, is_control)
        else:
            plain = name.removeprefix("net.")
            several = re.match(r"control_(blocks_|embedder\.)(\d+)\.", plain)
            if several:
                kind = "control_blocks." if several.group(1) == "blocks_" else "control_embedder."
                parts[name] = int(several.group(2)), kind + plain[several.end() :]
            else:
                parts[name] = (0 if plain.startswith("control_") else "base"), plain
    return parts


def _part_1(name: str, is_control: bool) -> tuple[str | int | None, str]:
    for start in ("net.base_model.net.", "base_model.net."):
        if name.startswith(start):
            return "base", name.removeprefix(start)
    if name.startswith("net.net_ctrl."):
        part, plain = 0, name.removeprefix("net.net_ctrl.")
    elif name.startswith("net_ctrl."):
        part, plain = 0, name.removeprefix("net_ctrl.")
    else:
        part, plain = (0 if is_control else "base"), name.removeprefix("net.")
    if part == 0 and plain.startswith("final_layer."):
        return None, plain  # the branch is a whole transformer by class; its last layer is never asked
    return part, plain


def repeated(names: Collection[str], controls: Sequence[str], beside: Collection[str] = ()) -> dict[str, str]:
    """What Transfer2.5's branches repeat of their base: name in the branch -> name in the base, both ours."""
    more: dict[str, str] = {}
    for control in controls:
        if not any(name.startswith(f"branches.{control}.") for name in (*names, *beside)):
            continue
        for own, again in SHARED.items():
            start = f"base.{own}."
            there = [name.removeprefix(start) for name in names if name.startswith(start)]
            more |= {f"branches.{control}.{again}.{rest}": f"{start}{rest}" for rest in there}
    return {name: base for name, base in more.items() if name not in names}


def refuse_apart(tensors: Mapping[str, Callable[[], Tensor]]) -> None:
    """Refuses a Transfer2.5 branch that has come away from what it repeats of its base: the original format holds that once."""
    mark = SHARED["patch_embed"]  # a branch of Transfer1 has embeddings of its own
    paths = [name.split(".", 3) for name in tensors if name.startswith("branches.")]
    controls = list(dict.fromkeys(parts[1] for parts in paths if parts[2] == mark))
    for again, own in repeated([name for name in tensors if name.startswith("base.")], controls, tensors).items():
        if again in tensors and not torch.equal(tensors[again](), tensors[own]()):
            raise UserError(
                f"{again} differs from {own}, which it should repeat: the original Cosmos format holds the two as one. Write "
                "safetensors or a folder of diffusers, which hold both"
            )


def _number(name: str, branch: int) -> str:
    """The name in a file of several branches."""
    return re.sub(
        r"^control_blocks\.", f"control_blocks_{branch}.", name.replace("control_embedder.", f"control_embedder.{branch}.", 1)
    )
