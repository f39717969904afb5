"""Rasterise the emoji atlas of the emoji world from three SVG packages; needed only to rebuild the shipped files.

Usage: ``npm pack @iconify-json/noto @iconify-json/twemoji @iconify-json/fluent-emoji-flat unicode-emoji-json`` in an
empty folder, ``pip install resvg-py``, then ``python -m magref_jax.data.build_emoji_atlas FOLDER``.
"""

import argparse
import io
import json
import re
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

from magref_jax.command import check_local, program

TILE_SIZE = 48
MARGIN = 1
COLUMNS = 48
RENDER_SIZE = 240
# 64 levels a colour channel and 16 of alpha are invisible at this size and save two fifths of the file.
COLOUR_LEVELS = 64
ALPHA_LEVELS = 16
OUTPUT_FOLDER = Path(__file__).parent

STYLES = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent-emoji-flat"}
GROUPS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")

# Most yellow faces cannot be told apart at 24 pixels, so this group lists what it keeps instead of what it drops.
KEPT_SMILEYS = frozenset(
    """
    grinning face; face with tears of joy; winking face; smiling face with halo; smiling face with heart-eyes;
    star-struck; face blowing a kiss; zany face; money-mouth face; thinking face; zipper-mouth face; sleeping face;
    face with medical mask; nauseated face; hot face; cold face; exploding head; cowboy hat face; partying face;
    smiling face with sunglasses; nerd face; loudly crying face; face screaming in fear; enraged face;
    smiling face with horns; skull; pile of poo; clown face; ogre; goblin; ghost; alien; alien monster; robot;
    grinning cat; see-no-evil monkey; love letter; kiss mark; collision
    """.replace("\n    ", " ")
    .strip()
    .split("; ")
)

# Look-alikes of a kept emoji, whole landscapes (they compete with the backgrounds), symbols and hairline drawings.
EXCLUDED = frozenset(
    """
    guide dog; service dog; ox; water buffalo; front-facing baby chick; black bird; rat; camel; shamrock; herb;
    leaf fluttering in wind; white flower; blossom; spider web; empty nest; pig nose; cooking; cooked rice;
    fork and knife with plate; pouring liquid; chopsticks; globe showing Europe-Africa; globe showing Asia-Australia;
    globe with meridians; world map; map of Japan; mountain; mount fuji; camping; beach with umbrella; desert;
    desert island; national park; building construction; brick; houses; derelict house; Japanese post office; post office;
    love hotel; convenience store; department store; wedding; foggy; night with stars; cityscape;
    sunrise over mountains; sunrise; cityscape at dusk; sunset; bridge at night; hot springs; high-speed train; train;
    light rail; station; mountain railway; tram car; trolleybus; oncoming bus; oncoming police car; oncoming taxi;
    oncoming automobile; motorway; railway track; horizontal traffic light; suspension railway; aerial tramway;
    passenger ship; motor boat; airplane departure; airplane arrival; motorized wheelchair; hourglass not done;
    timer clock; stopwatch; mantelpiece clock; sun with face; glowing star; shooting star; milky way;
    cloud with lightning and rain; sun behind small cloud; sun behind large cloud; sun behind rain cloud;
    cloud with rain; cloud with snow; fog; wind face; umbrella with rain drops; snowman without snow; fireworks;
    sparkler; sparkles; moon viewing ceremony; admission tickets; 2nd place medal; 3rd place medal; spade suit;
    heart suit; diamond suit; club suit; flower playing cards; goal net; muted speaker; speaker low volume;
    speaker medium volume; bell with slash; musical score; musical notes; level slider; control knobs;
    mobile phone with arrow; low battery; dvd; computer disk; camera with flash; magnifying glass tilted right;
    notebook with decorative cover; ledger; page with curl; bookmark tabs; yen banknote; euro banknote; pound banknote;
    chart increasing with yen; chart decreasing; e-mail; incoming envelope; envelope with arrow; outbox tray;
    closed mailbox with lowered flag; open mailbox with raised flag; open mailbox with lowered flag; open file folder;
    card index dividers; tear-off calendar; spiral calendar; paperclip; linked paperclips; unlocked; locked with pen;
    locked with key; hammer and pick; hammer and wrench; link; broken chain; white cane; bubbles; safety pin
    """.replace("\n    ", " ")
    .strip()
    .split("; ")
)
EXCLUDED_PATTERN = re.compile(r"o.clock$|-thirty$|\bmoon$|moon face$|\bheart\b|\bhearts\b|speech bubble")
KEPT_MOON = "crescent moon"

RENAMED = {
    "face with tears of joy": "laughing face",
    "smiling face with heart-eyes": "heart eyes face",
    "star-struck": "star eyes face",
    "face blowing a kiss": "kissing face",
    "face with medical mask": "masked face",
    "smiling face with sunglasses": "sunglasses face",
    "loudly crying face": "crying face",
    "face screaming in fear": "screaming face",
    "smiling face with horns": "devil face",
    "smiling face with halo": "angel face",
    "two-hump camel": "camel",
    "T-Rex": "trex",
    "fork and knife": "cutlery",
    "hot beverage": "hot coffee",
    "teacup without handle": "green tea",
    "bottle with popping cork": "champagne bottle",
    "globe showing Americas": "globe",
    "snow-capped mountain": "snowy mountain",
    "shinto shrine": "shrine gate",
    "articulated lorry": "lorry",
    "construction": "construction barrier",
    "vertical traffic light": "traffic light",
    "police car light": "siren light",
    "manual wheelchair": "wheelchair",
    "hourglass done": "hourglass",
    "umbrella on ground": "beach umbrella",
    "high voltage": "lightning bolt",
    "1st place medal": "gold medal",
    "mahjong red dragon": "mahjong tile",
    "joker": "joker card",
    "performing arts": "theater masks",
    "flag in hole": "golf flag",
    "yo-yo": "yoyo",
    "bullseye": "dart target",
    "jack-o-lantern": "pumpkin lantern",
    "game die": "dice",
    "woman’s hat": "sun hat",
    "woman’s clothes": "blouse",
    "rescue worker’s helmet": "rescue helmet",
    "speaker high volume": "speaker",
    "magnifying glass tilted left": "magnifying glass",
    "closed book": "red book",
    "page facing up": "document page",
    "closed mailbox with raised flag": "mailbox",
    "ballot box with ballot": "ballot box",
    "locked": "padlock",
    "chart increasing": "line chart",
    "couch and lamp": "couch",
    "t-shirt": "tshirt",
    "x-ray": "xray",
    "bow and arrow": "archery bow",
    "nut and bolt": "steel bolt",
}


def short_name(unicode_name: str) -> str:
    """The name used in captions: lowercase ASCII words without hyphens, apostrophes or accents."""
    name = RENAMED.get(unicode_name, unicode_name).replace("’", "").replace("-", " ").lower()
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()


def is_kept(unicode_name: str, group: str) -> bool:
    """Whether an emoji becomes a subject of the emoji world."""
    if group == "Smileys & Emotion":
        return unicode_name in KEPT_SMILEYS
    if unicode_name == KEPT_MOON:
        return True
    return group in GROUPS and unicode_name not in EXCLUDED and not EXCLUDED_PATTERN.search(unicode_name)


def read_member(folder: Path, package: str, member: str) -> dict:
    """One JSON file of the npm tarball of ``package``.

    Raises:
        FileNotFoundError: the folder does not hold exactly one version of the package.
    """
    tarballs = sorted(folder.glob(f"{package}-[0-9]*.tgz"))
    if len(tarballs) != 1:
        raise FileNotFoundError(f"{folder} must hold exactly one {package}-VERSION.tgz, found {len(tarballs)}")
    with tarfile.open(tarballs[0]) as tarball:
        file = tarball.extractfile(f"package/{member}")
        if file is None:
            raise FileNotFoundError(f"{tarballs[0]} has no file package/{member}")
        return json.load(file)


def read_drawings(folder: Path, icon_set: str) -> dict[str, str]:
    """SVG documents of one drawing style by code point; variation selectors are dropped from the keys."""
    icons = read_member(folder, f"iconify-json-{icon_set}", "icons.json")
    characters = read_member(folder, f"iconify-json-{icon_set}", "chars.json")
    drawings = {}
    for code_point, name in characters.items():
        while name in icons.get("aliases", {}):
            name = icons["aliases"][name]["parent"]
        icon = icons["icons"][name]
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        drawings[code_point.replace("-fe0f", "")] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )
    return drawings


def rasterise(svg: str) -> np.ndarray:
    """A drawing cropped to its opaque square and shrunk to a tile, [TILE_SIZE, TILE_SIZE, 4] with straight alpha."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE, skip_system_fonts=True))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    opaque = image.getchannel("A").point(lambda value: 255 * (value > 16)).getbbox()
    if opaque is None:
        raise ValueError("the drawing is empty")
    left, top, right, bottom = opaque
    side = max(right - left, bottom - top)
    left, top = (left + right - side) // 2, (top + bottom - side) // 2
    inner = TILE_SIZE - 2 * MARGIN
    # Pillow resizes RGBA with premultiplied colours.
    image = image.crop((left, top, left + side, top + side)).resize((inner, inner), Image.Resampling.LANCZOS)
    tile = np.pad(np.asarray(image), ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    steps = np.array([COLOUR_LEVELS - 1] * 3 + [ALPHA_LEVELS - 1]) / 255
    tile = np.round(np.round(tile * steps) / steps)
    return np.where(tile[..., 3:] > 0, tile, 0).astype(np.uint8)


def build(folder: Path) -> None:
    """Write ``emoji_atlas.webp`` (tiles row by row, the styles of an identity adjacent) and ``emoji_atlas.json``.

    Raises:
        ValueError: two identities share a name, or a name has more than four words.
    """
    drawings = {style: read_drawings(folder, icon_set) for style, icon_set in STYLES.items()}
    identities = {}
    for emoji, record in read_member(folder, "unicode-emoji-json", "data-by-emoji.json").items():
        code_point = "-".join(f"{ord(character):x}" for character in emoji if ord(character) != 0xFE0F)
        if is_kept(record["name"], record["group"]) and all(code_point in drawings[style] for style in STYLES):
            identities[code_point] = (short_name(record["name"]), record["group"])
    names = [name for name, _ in identities.values()]
    wrong = sorted({name for name in names if names.count(name) > 1 or len(name.split()) > 4})
    if wrong:
        raise ValueError(f"names must be unique and have at most four words, got {wrong}; extend RENAMED or EXCLUDED")

    code_points = sorted(identities)
    tiles = [rasterise(drawings[style][code_point]) for code_point in code_points for style in STYLES]
    rows = -(-len(tiles) // COLUMNS)
    sheet = np.zeros((rows * COLUMNS, TILE_SIZE, TILE_SIZE, 4), np.uint8)
    sheet[: len(tiles)] = tiles
    sheet = sheet.reshape(rows, COLUMNS, TILE_SIZE, TILE_SIZE, 4).swapaxes(1, 2)
    image = Image.fromarray(sheet.reshape(rows * TILE_SIZE, COLUMNS * TILE_SIZE, 4))
    image.save(OUTPUT_FOLDER / "emoji_atlas.webp", lossless=True, quality=100, method=4, exact=True)
    lines = [json.dumps([code_point, *identities[code_point]]) for code_point in code_points]
    header = f'"tile_size": {TILE_SIZE}, "columns": {COLUMNS}, "styles": {json.dumps(list(STYLES))}'
    listing = ",\n".join(lines)
    (OUTPUT_FOLDER / "emoji_atlas.json").write_text(f'{{{header}, "identities": [\n{listing}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the four npm tarballs")
    arguments = parser.parse_args()
    with program("data.build_emoji_atlas"):
        check_local("folder", arguments.folder)
        build(arguments.folder)


if __name__ == "__main__":
    main()
