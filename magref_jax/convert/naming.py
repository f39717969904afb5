"""Whose names are in a file: what stands around the names of a network, which sets of them there are, which are foreign.

Trainers wrap modules, and each wrapper is a part of every name inside it. Files that hold several networks, or a network and
its moving average, put one more part before the names. All of it is told here, by tables.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from magref_jax.convert.rules import Layout

# A name that a network has in one layout and nothing else has.
SIGNATURES: tuple[tuple[str, Layout, str], ...] = (
    ("dit", "wan", "blocks.0.self_attn.q.weight"),
    ("dit", "hf", "blocks.0.attn1.to_q.weight"),
    ("vae", "wan", "encoder.downsamples.0.residual.0.gamma"),
    ("vae", "hf", "encoder.down_blocks.0.norm1.gamma"),
    ("text_encoder", "wan", "blocks.0.attn.q.weight"),
    ("text_encoder", "hf", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ("image_encoder", "wan", "visual.cls_embedding"),
    ("image_encoder", "hf", "embeddings.class_embedding"),
)
# Of torch.compile, FSDP, activation checkpoints and Lightning: at any place of a name.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
_WRAPPER = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)})\.")
# Before a name, any number of them one after another.
DIT_PREFIXES = frozenset(
    {"module", "model", "net", "network", "pipe", "pipeline"}  # around any network
    | {"dit", "transformer", "diffusion_model", "denoiser", "unet", "generator", "student"}
    | {"state_dict", "model_state_dict", "params", "weights"}  # dictionaries of a checkpoint
)
PREFIXES = DIT_PREFIXES | (
    {"vae", "first_stage_model"}
    | {"text_encoder", "text_encoders", "cond_stage_model"}
    | {"image_encoder", "clip_vision", "vision_model"}
)
_NAMED = ("text_encoders",)  # whose next part is a name of choice, such as umt5xxl
_AVERAGE = re.compile(r"(.*_)?ema(_.*)?")  # of an exponential moving average, which is taken before anything else


@dataclasses.dataclass(frozen=True)
class Set:
    """Where the names of one network lie: in a dictionary of the file (`level`, "" if there is but one), behind a prefix."""

    network: str
    layout: Layout
    level: str
    prefix: str

    @property
    def key(self) -> str:
        """What `--set source.key=` calls it."""
        return ".".join(filter(None, (self.level, self.prefix.rstrip("."))))

    @property
    def rank(self) -> int:
        """0 for a moving average, 1 for what is known, 2 for what is taken if it is asked for only."""
        parts = self.key.split(".") if self.key else []
        averages = [bool(_AVERAGE.fullmatch(part)) for part in parts]
        named = [index > 0 and parts[index - 1] in _NAMED for index in range(len(parts))]
        if not all(part in PREFIXES or any(flags) for part, *flags in zip(parts, averages, named, strict=True)):
            return 2
        return 0 if any(averages) else 1


def without_wrappers(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each name without the wrappers inside it, and which those were.

    Raises:
        ValueError: two names that differ in wrappers alone.
    """
    plain: dict[str, str] = {}
    given: dict[str, str] = {}
    wrappers: dict[str, None] = {}
    for name in names:
        wrappers |= dict.fromkeys(found.removesuffix(".") for found in _WRAPPER.findall(name))
        plain[name] = _WRAPPER.sub("", name)
        if (other := given.setdefault(plain[name], name)) != name:
            raise ValueError(f"{other!r} and {name!r} are one name in different wrappers.")
    return plain, tuple(wrappers)


def find_sets(levels: Mapping[str, Iterable[str]]) -> list[Set]:
    """Every set of names, given names without wrappers by the dictionary they lie in."""
    return [
        Set(network, layout, level, name.removesuffix(signature))
        for level, names in levels.items()
        for name in names
        for network, layout, signature in SIGNATURES
        if name == signature or name.endswith(f".{signature}")
    ]


def choose_sets(file: pathlib.Path, sets: Sequence[Set], key: str | None) -> tuple[Set, ...]:
    """One of each network: those of `key` if there are such, or moving averages, or what is known.

    Raises:
        ValueError: several that are as good, or none but of an unknown name; the message lists their keys.
    """
    chosen = []
    for network, found in _by_network(sets).items():
        asked = [each for each in found if key and has_key(each, key)]
        found = asked or found
        rank = min(each.rank for each in found)
        best = [each for each in found if each.rank == rank]
        # The same network under two layouts' names of one key is told apart by neither rank nor key.
        if len(best) > 1 or (rank == 2 and not asked):
            keys = ", ".join(sorted({each.key or "(none)" for each in found}))
            reason = "under these keys" if len(best) > 1 else "under a key that is unknown here"
            raise ValueError(f"{file}: {network} lies {reason}: {keys}. Choose one by --set source.key=KEY.")
        chosen += best
    return tuple(chosen)


def has_key(each: Set, key: str) -> bool:
    return f"{each.key}.".startswith(f"{key}.")


def _by_network(sets: Iterable[Set]) -> dict[str, list[Set]]:
    found = collections.defaultdict(list)
    for each in sets:
        found[each.network].append(each)
    return found


def split_names(names: Iterable[str], sets: Sequence[Set], chosen: Sequence[Set]) -> dict[str, dict[str, str]]:
    """By network, the network's own names of those in one dictionary of a file.

    Names of a set that was not chosen are left out. Names of none belong to the network whose prefix is most like theirs: what
    that network has no use for is refused where names are matched.

    Raises:
        ValueError: a name that is there with and without a prefix.
    """
    owned: dict[str, dict[str, str]] = {each.network: {} for each in chosen}
    taken: dict[tuple[str, str], str] = {}
    for name in names:
        prefix = max((each.prefix for each in sets if name.startswith(each.prefix)), key=len, default=None)
        if prefix is None:
            owner = max(chosen, key=lambda each: len(_common(name, each.prefix)))
            prefix = _common(name, owner.prefix)
        elif (owner := next((each for each in chosen if each.prefix == prefix), None)) is None:
            continue
        own = name.removeprefix(prefix)
        if (other := taken.setdefault((owner.network, own), name)) != name:
            raise ValueError(
                f"{own!r} is there both with and without the prefix {owner.prefix!r}: {other!r}, {name!r}."
            )
        owned[owner.network][name] = own
    return owned


def _common(name: str, prefix: str) -> str:
    """The parts that both begin with, dot included."""
    count = 0
    for ours, theirs in zip(name.split(".")[:-1], prefix.split(".")[:-1], strict=False):
        if ours != theirs:
            break
        count += len(ours) + 1
    return name[:count]


def notes(chosen: Set, sets: Sequence[Set], wrappers: Sequence[str]) -> tuple[str, ...]:
    """What a plan says of how a network was found."""
    said = []
    key, keys = chosen.key or "(none)", {each.key or "(none)" for each in sets if each.network == chosen.network}
    average = ", the moving average," if chosen.rank == 0 else ""
    if others := sorted(keys - {key}):
        said.append(f"{key}{average} is taken, not {', '.join(others)}; --set source.key=KEY takes another")
    elif average:
        said.append(f"{key}{average} is taken; there is no other")
    if taken_off := [*filter(None, (chosen.key,)), *wrappers]:
        said.append(f"names are taken without {', '.join(map(repr, taken_off))}")
    return tuple(said)


# What is known and not supported

# By network: a part of a name that only these have, and what they are.
FOREIGN: tuple[tuple[str, str, str], ...] = (
    ("dit", r"img_emb\.emb_pos|image_embedder\.pos_embed", "Wan for a first and a last frame (FLF2V)"),
    ("dit", r"vace_(blocks|patch_embedding)\.", "VACE, or its module for a text-to-video model"),
    ("dit", r"ref_conv\.", "Wan Fun-Control, which takes a control video"),
    ("dit", r"control_adapter\.", "Wan Fun-Control, which takes camera paths"),
    (
        "dit",
        r"(pose_patch_embedding|face_adapter|face_encoder|motion_encoder)\.",
        "Wan-Animate, which takes a motion video",
    ),
    ("dit", r"(casual_audio_encoder|audio_injector|frame_packer)\.", "Wan 2.2 S2V, which takes speech"),
    ("dit", r"(audio_proj|audio_cross_attn\w*|music_encoder)\.", "a Wan that takes sound, such as HuMo or MultiTalk"),
    ("dit", r"patch_embedding_(pose|mask|global)\.", "a Wan with further patch embeddings, such as SCAIL"),
    ("dit", r"blocks\.\d+\.(cam_encoder|projector)\.", "ReCamMaster, which takes a video and a camera path"),
    ("vae", r"encoder\.downsamples\.\d+\.downsamples\.", "the VAE of Wan 2.2 5B, with 48 latent channels"),
    ("vae", r"encoder\.down_blocks\.\d+\.resnets\.", "the VAE of Wan 2.2 5B, with 48 latent channels"),
)
_FOREIGN = tuple((network, re.compile(rf"(?:^|\.)(?:{part})"), what) for network, part, what in FOREIGN)
PAIR = "Wan 2.2, two transformers that take turns (for high and for low noise)"
HALF = f"half of a model: one of the pair of {PAIR}"
# Names of files and folders: the tensors of the text-to-video halves are called and shaped as those of Wan 2.1.
_HALF = re.compile(
    r"(?:high|low)[ ._-]?noise|^transformer_2$|wan.?2[._]2.*[ ._-](?:high|low)(?:[ ._-]|$)", re.IGNORECASE
)
# By network: sizes that only these have.
FOREIGN_SIZES: tuple[tuple[str, Mapping[str, Any], str], ...] = (
    ("dit", {"in_channels": 48, "out_channels": 48}, "Wan 2.2 TI2V 5B, for a VAE with 48 latent channels"),
    ("dit", {"in_channels": 48, "out_channels": 16}, "Wan Fun-Control, which takes a control video"),
    ("dit", {"in_channels": 52, "out_channels": 16}, "Wan Fun-Control, which takes a control video"),
    ("dit", {"in_channels": 32, "out_channels": 16}, "Wan Fun-Control, which takes camera paths"),
    ("dit", {"in_channels": 36, "out_channels": 16, "image_dim": None}, f"{HALF}, image-to-video without CLIP"),
)
_END = "Not supported; nothing was written."


def refuse_foreign(file: pathlib.Path, names: Iterable[str], networks: Collection[str]) -> None:
    """Refuses names of what is known and not supported.

    Raises:
        ValueError: a name belongs to one of `FOREIGN`, of these networks.
    """
    for name in names:
        for network, pattern, what in _FOREIGN:
            if network in networks and pattern.search(name):
                raise ValueError(f"{file} is {what}: it has {name!r}. {_END}")


def refuse_foreign_sizes(file: pathlib.Path, network: str, fields: Mapping[str, Any]) -> None:
    """Refuses sizes of what is known and not supported, and halves of a pair.

    Raises:
        ValueError: sizes of one of `FOREIGN_SIZES`, or a file that calls itself one half of a pair.
    """
    for each, sizes, what in FOREIGN_SIZES:
        if each == network and all(fields[field] == size for field, size in sizes.items()):
            told = ", ".join(f"{field}={size}" for field, size in sizes.items())
            raise ValueError(f"{file} is {what}: it has {told}. {_END}")
    if network == "dit":
        for name in (file.name, file.parent.name):
            if found := _HALF.search(name):
                raise ValueError(f"{file} is {HALF}, as {found[0]!r} in its name says. {_END}")
