"""The example references that `sample.py` uses without arguments: drawings of emoji that training never shows.

    python -m magref_jax.data.emoji_examples

writes `magref_jax/bundled/examples` anew: cut-outs on a transparent ground and `examples.txt`, which says how to use them.
"""

import argparse
import pathlib

from PIL import Image

from magref_jax.command import check_local, program
from magref_jax.data.emoji_world import load_atlas, split_identities

FOLDER = pathlib.Path(__file__).parent.parent / "bundled" / "examples"
SIZE = 96  # pixels

# Key, prompt, and the name and drawing style of every reference.
EXAMPLES = (
    (
        "penguin_banana",
        "the penguin at the top left slides right and the banana at the bottom right bounces over a meadow",
        (("penguin", "noto"), ("banana", "fluent")),
    ),
    (
        "panda_hibiscus_ambulance",
        "the panda at the bottom left rises, the hibiscus at the top stays still and the ambulance at the bottom right "
        "slides left over a desert",
        (("panda", "twemoji"), ("hibiscus", "noto"), ("ambulance", "fluent")),
    ),
)

HEADER = """\
# One video per line: key@@prompt@@image@@image...
# After an image and a colon, the words of the prompt that name it. Images are looked for here and in the working directory.
"""


def cut_out(name: str, style: str) -> Image.Image:
    """The enlarged drawing of a held-out emoji.

    Raises:
        ValueError: no held-out emoji has this name.
    """
    atlas = load_atlas()
    found = [index for index in split_identities(atlas)["held_out"] if atlas.identities[index].name == name]
    if not found:
        raise ValueError(f"name={name!r} is no held-out emoji.")
    return Image.fromarray(atlas.sprite(found[0], style)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def write_examples(folder: pathlib.Path) -> None:
    """Writes the cut-outs and `examples.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for key, prompt, references in EXAMPLES:
        for name, style in references:
            cut_out(name, style).save(folder / f"{name}.png", optimize=True)
        lines.append("@@".join((key, prompt, *(f"{name}.png:{name}" for name, _ in references))))
    (folder / "examples.txt").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default=FOLDER)
    arguments = parser.parse_args()
    with program("data.emoji_examples"):
        check_local("folder", arguments.folder)
        write_examples(arguments.folder)


if __name__ == "__main__":
    main()
