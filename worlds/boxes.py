"""What a person sees of a drawn page: its boxes, taken from what the browser laid out and from the pixels.

Two pages that look the same give the same boxes, however they are written: text is what stands on the page (capitals,
words of ::before, counters and list marks included), joined over the elements that share a line, and cut where a line
is broken on purpose; colours are those of the pixels; a background or a border makes a box only where it is set off
from what lies under it, and a box with a single text in it is one with its text.

Place in the data flow: a snapshot of the layout, worlds/see.js, the screenshot -> `see` -> `Page` in worlds/browser.py,
where the record of a box is described. Runs in the worker process. Exercised by `python -m pytest tests/test_pages.py`.

Lengths are pixels, rects [x, y, width, height], colours [r, g, b] in 0..255.
"""
import re
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

STYLES = ("display", "font-size", "-webkit-text-fill-color", "fill", "background-color", "background-image",
          "background-clip", "border-top-width", "border-left-width", "border-bottom-width", "border-right-width",
          "outline-style", "box-shadow", "filter", "mix-blend-mode", "zoom", "transform")
BORDERS = tuple(style for style in STYLES if style.startswith("border"))
FIELDS = ("input", "textarea", "select")
PICTURES = ("img", "svg", "canvas")
NAMED = ("a", "li", "button", "h1", "h2", "h3", "h4", "nav", "header", "footer", "aside")  # tags that tell what it is
GRID = 32            # samples of a box's pixels, across and down
LETTERS = 6_000      # samples of a text's pixels
WHOLE = 0.99         # a plain box that covers this much of the page is its background
MAIN_SHARE = 0.2     # a colour that fewer of the samples have is not the box's: then it is their mean
SET_OFF = 3          # steps of a channel by which a box differs from what lies under it
EDGE, EDGE_SHARE = 12, 0.5   # the same of a border, on this share of one side
CONTRAST = 22.0      # distance of letters from what lies around them, in RGB, from which on they can be read
UNEVEN_CONTRAST = 0.35  # and on an uneven ground: the way that they go towards their declared colour


CLEAR = r"^rgba.*, 0(\.0\d*)?\)$|/ 0(\.0\d*)?\)$"  # a colour that cannot be seen, as the browser writes it


@dataclass
class Node:
    """A node of the layout: an element, a text, or what CSS adds (named ::before, ::after, ::marker)."""
    tag: str
    parent: "Node | None"
    element: dict | None         # what see.js says of it, None for what cannot be seen
    bounds: list = field(default_factory=list)
    style: dict = field(default_factory=dict)
    order: int = 0               # in which it is painted

    def ancestors(self):
        """The node itself and all that it lies in, inside out."""
        while self is not None:
            yield self
            self = self.parent

    def within_svg(self):
        return any(up.tag == "svg" for up in self.ancestors())

    def paints(self):
        """Does it declare something that can be seen besides letters?"""
        if not self.style or self.tag.startswith("#") or self.style["background-clip"] == "text":
            return False
        return (not re.search(CLEAR, self.style["background-color"])
                or any(self.style[name] != "none" for name in ("background-image", "outline-style", "box-shadow"))
                or any(self.style[name] != "0px" for name in BORDERS)
                or self.tag in PICTURES or self.tag in FIELDS)

    def inline(self):
        return self.style.get("display", "inline") == "inline" or self.tag == "::marker"


@dataclass
class Item:
    """A box in the making: something painted, or a text."""
    node: Node                   # whose name it has
    rect: list
    painted: bool
    text: str = ""
    writer: Node | None = None   # whose style the letters have
    letters: list = field(default_factory=list)
    font: float = 0.0
    tag: str = ""
    under: int = -1              # the item that lies under it, -1 for the page
    hidden: bool = False         # nothing of it lies on top
    colours: np.ndarray | None = None  # samples of its own pixels
    back: np.ndarray | None = None
    ink: np.ndarray | None = None
    solid: bool = False
    picture: bool = False


# ------------------------------------------------------------------ the layout

def read_layout(snapshot, elements):
    """(nodes, pieces of text: [(node, text, rect)]) of a DOMSnapshot. elements: what see.js says, by number."""
    strings, document = snapshot["strings"], snapshot["documents"][0]
    tree, layout, lines = document["nodes"], document["layout"], document["textBoxes"]
    nodes = []
    for name, parent, attributes in zip(tree["nodeName"], tree["parentIndex"], tree["attributes"]):
        names = [strings[i] for i in attributes]
        number = dict(zip(names[::2], names[1::2])).get("data-nth")
        inside = nodes[parent] if parent >= 0 else None
        tag = strings[name].lower()
        element = inside and inside.element if tag.startswith(("#", "::")) else elements.get(number)
        nodes.append(Node(tag, inside, element))
    for index, bounds, order, values in zip(layout["nodeIndex"], layout["bounds"], layout["paintOrders"],
                                            layout["styles"]):
        node = nodes[index]
        if node.style:
            continue  # the letters of ::before have the same number as its box
        node.bounds, node.order = bounds, order
        node.style = dict(zip(STYLES, (strings[value] for value in values)))
    last = list(range(len(nodes)))  # of what lies in a node
    for index in range(len(nodes) - 1, 0, -1):
        parent = tree["parentIndex"][index]
        last[parent] = max(last[parent], last[index])

    def written(piece):  # the browser lists ::after before what it comes after
        if nodes[piece].tag == "::after":
            return last[tree["parentIndex"][piece]], 1, -piece
        return piece, 0, 0
    pieces = []
    for index, bounds, start, length in zip(*(lines[key] for key in ("layoutIndex", "bounds", "start", "length"))):
        units = strings[layout["text"][index]].encode("utf-16-le", "surrogatepass")  # offsets count UTF-16
        text = units[2 * start:2 * (start + length)].decode("utf-16-le", "replace")
        pieces.append((layout["nodeIndex"][index], text, bounds))
    pieces.sort(key=lambda piece: written(piece[0]))
    return nodes, [(nodes[index], *piece) for index, *piece in pieces]


def font_size(node):
    """As it is drawn: zoomed and scaled by what the text lies in."""
    size = float(node.style["font-size"].removesuffix("px"))
    for up in node.ancestors():
        if up.style and not up.tag.startswith("#"):
            size *= float(up.style["zoom"])
            matrix = [float(n) for n in re.findall(r"-?[\d.]+(?:e-?\d+)?", up.style["transform"])]
            if len(matrix) == 6:
                a, b, c, d, *_ = matrix
                size *= abs(a * d - b * c) ** 0.5
    return size


def around(rects, height, width):
    """The smallest rect around others, cut at the page's edges, or None."""
    real = np.array([rect for rect in rects if rect[2] > 0 and rect[3] > 0]).reshape(-1, 4)
    if not len(real):
        return None
    left, top = real[:, :2].min(0).clip(0)
    right, bottom = (real[:, :2] + real[:, 2:]).max(0).clip(None, (width, height))
    if right - left < 1 or bottom - top < 1:
        return None
    return [round(float(value)) for value in (left, top, right - left, bottom - top)]


def block_of(piece):
    """The element in whose lines a piece of text stands."""
    node = piece if piece.tag.startswith("::") else piece.parent
    while node.inline() and not node.paints() and node.parent is not None:
        node = node.parent
    return node


def text_runs(pieces):
    """Pieces of text that are read in one go: of one block, without a forced line break in between."""
    runs, last = [], None
    for node, text, bounds in pieces:
        block = block_of(node)
        if block is not last:
            runs.append([])
        if node.element and text.strip() and bounds[2] > 0:
            runs[-1].append((node, text, bounds))
        last = None if text.endswith("\n") else block
    return [run for run in runs if run]


def words(run):
    """The text of a run, with a space where the eye sees one and without a list's bullet."""
    text = run[0][1]
    for (*_, (x, y, width, height)), (_, after, (next_x, next_y, *_)) in pairwise(run):
        apart = abs(next_y - y) > height / 2 or next_x - (x + width) > height / 5
        text += " " * apart + after
    return re.sub(r"^[•◦▪■●‣▸▾]\s*", "", re.sub(r"\s+", " ", text).strip())[:500]


def owner(run):
    """The element that a person would name for a run: the link, the heading ... that holds all of it."""
    block = block_of(run[0][0])
    shared = [node for node in run[0][0].ancestors() if all(node in list(piece.ancestors()) for piece, *_ in run)]
    within = shared[:shared.index(block) + 1] if block in shared else [block]
    named = [node for node in within if node.tag in NAMED]
    return (named or [block])[0]


def text_items(pieces, height, width):
    items = []
    for run in text_runs(pieces):
        letters = around([bounds for *_, bounds in run], height, width)
        if letters and words(run):
            writer = run[0][0]
            items.append(Item(owner(run), letters, False, words(run), writer, letters, font_size(writer)))
    return items


def painted_items(nodes, height, width):
    """Items of all elements that declare a background, a border or a picture, or are a field, as they are painted."""
    items = []
    for node in nodes:
        drawn = node.bounds and node.element and node.paints()
        if not drawn or node.parent.within_svg():
            continue
        image, rect = node.style["background-image"] != "none", around([node.bounds], height, width)
        if node.tag == "body" and image:
            rect = [0, 0, width, height]  # it is spread over the whole page
        if rect is None or not image and rect[2] * rect[3] >= WHOLE * width * height:
            continue  # out of sight, or the ground of the whole page, whoever declares it
        items.append(Item(node, rect, True))
        if node.tag in FIELDS:
            items[-1] = Item(node, rect, True, node.element["text"][:500], node, rect, font_size(node))
    return sorted(items, key=lambda item: item.node.order)


# ------------------------------------------------------------------ the pixels

def sample(array, rect):
    """At most GRID x GRID values of an image within a rect, in a row."""
    x, y, width, height = rect
    part = array[y:y + height:-(-height // GRID), x:x + width:-(-width // GRID)]
    return part.reshape(-1, *array.shape[2:])


def main_value(values):
    """The most frequent of some whole numbers, and the share of them that it is."""
    found, counts = np.unique(values, return_counts=True)
    return found[counts.argmax()], counts.max() / len(values)


def main_colour(colours):
    """The most frequent colour of some [.., 3], or their mean where none is frequent; and its share."""
    packed, share = main_value(colours.astype(np.int32) @ (65536, 256, 1))
    if share < MAIN_SHARE:
        return colours.mean(0), share
    return np.array((packed >> 16, packed >> 8 & 255, packed & 255), float), share


def layer(items, shape):
    """Which item lies on top at each pixel: [rows, columns], 0 the page, k + 1 item k. Says each item what lies under
    it."""
    top = np.zeros(shape, np.int16)
    for k, item in enumerate(items):
        x, y, width, height = item.rect
        item.under = int(main_value(sample(top, item.rect))[0]) - 1
        top[y:y + height, x:x + width] = k + 1
    return top


def page_background(pixels, top):
    """The most frequent colour outside of all boxes, or of everything where they leave nothing free."""
    step = slice(None, None, 8)
    colours, free = pixels[step, step].reshape(-1, 3), top[step, step].reshape(-1) == 0
    return main_colour(colours[free] if free.mean() > 0.01 else colours)[0]


def sides(rect, outside, shape):
    """Indices of the line of pixels along each side, so many pixels outside, where the page goes on that far."""
    x, y, width, height = rect
    rows, columns = (y - outside, y + height - 1 + outside), (x - outside, x + width - 1 + outside)
    return ([(row, slice(x, x + width)) for row in rows if 0 <= row < shape[0]]
            + [(slice(y, y + height), column) for column in columns if 0 <= column < shape[1]])


def edged(item, k, under, pixels, top):
    """Is there a line along one of its sides, inside, or outside where it has an outline or a shadow?"""
    lines = [(pixels[side][top[side] == k + 1], item.back) for side in sides(item.rect, 0, pixels.shape)]
    if item.node.style["outline-style"] != "none" or item.node.style["box-shadow"] != "none":
        lines += [(pixels[side], under) for side in sides(item.rect, 1, pixels.shape)]
    return any(len(line) and (np.abs(line - ground).max(-1) >= EDGE).mean() >= EDGE_SHARE for line, ground in lines)


def look_at_paint(items, pixels, top, background):
    """Fills in back, solid and picture of the painted items, and back of the texts."""
    for k, item in enumerate(items):
        colours, own = sample(pixels, item.rect), sample(top, item.rect) == k + 1
        item.hidden = not own.any()
        item.colours = colours[own] if item.painted and not item.hidden else colours
        item.back, _ = main_colour(item.colours)
    for k, item in enumerate(items):
        while item.under >= 0 and items[item.under].hidden:
            item.under = items[item.under].under
        under = background if item.under < 0 else items[item.under].back
        if not item.painted:
            continue
        differs = np.abs(item.back - under).max() >= SET_OFF
        uneven = np.ptp(item.colours, axis=0).max() >= EDGE
        image = item.node.style["background-image"]
        if item.node.tag in PICTURES or "url(" in image:
            item.picture = bool(item.node.tag == "img" or uneven)
        if not item.picture:
            item.solid = bool(differs or image != "none" and uneven or item.node.tag in FIELDS
                              or edged(item, k, under, pixels, top))


RECOLOURS = {"filter": "none", "mix-blend-mode": "normal"}


def declared_ink(node):
    """The colour that a text's style asks for: [r, g, b], or None where something changes it on the way."""
    style = node.style
    colour = style["fill" if node.within_svg() else "-webkit-text-fill-color"]
    changed = any(up.style and (up.style["background-clip"] == "text"
                                or any(up.style[name] != plain for name, plain in RECOLOURS.items()))
                  for up in node.ancestors())
    numbers = re.fullmatch(r"rgba?\((\d+), (\d+), (\d+)(?:, [\d.]+)?\)", colour)
    return None if changed or not numbers else np.array([float(n) for n in numbers.groups()])


def look_at_letters(item, pixels):
    """Fills in the ink; a text that cannot be read becomes empty."""
    x, y, width, height = item.letters
    inset = 3 if item.painted else 0  # the frame of a field is no letter
    patch = pixels[y + inset:y + height - inset, x + inset:x + width - inset].reshape(-1, 3)
    patch = patch[::1 + len(patch) // LETTERS].astype(np.float32)
    if not len(patch):
        item.text = ""
        return
    ground, share = main_colour(patch)
    away = patch - (ground if share >= MAIN_SHARE else np.median(patch, axis=0))
    distance, wanted = np.linalg.norm(away, axis=-1), declared_ink(item.writer)
    needed = CONTRAST
    if wanted is not None:
        way = wanted - (patch[0] - away[0])
        length = np.linalg.norm(way)
        distance = away @ way / max(length, 1.0)
        needed = CONTRAST if share >= MAIN_SHARE else UNEVEN_CONTRAST * length
        needed = needed if length >= CONTRAST else np.inf
    item.ink = patch[distance.argmax()]
    if distance.max() < needed:
        item.text = ""


# ------------------------------------------------------------------ boxes

def tag_of(node):
    """The tag that tells what a box is: of the node, or of an element around it of the same size."""
    same = [up for up in node.ancestors() if up.bounds and np.abs(np.subtract(up.bounds, node.bounds)).max() <= 2]
    return next((up.tag for up in same if up.tag in NAMED), node.tag)


def join_texts(items):
    """A box with one text and no other box in it takes the text in. Returns the items that are left."""
    kept = [item for item in items if item.text or item.solid or item.picture]
    inside = {}
    for item in kept:
        k = item.under
        while k >= 0 and not (items[k].solid and not items[k].hidden):
            k = items[k].under
        inside.setdefault(k, []).append(item)
    for k, members in inside.items():
        texts = [item for item in members if not item.painted]
        if k < 0 or len(texts) != 1 or items[k].text or any(item.solid for item in members):
            continue
        box, text = items[k], texts[0]
        box.text, box.letters, box.ink, box.font = text.text, text.letters, text.ink, text.font
        box.tag = box.tag if box.tag in NAMED or box.tag in FIELDS else text.node.tag
        kept = [item for item in kept if item is not text]
    return [item for item in kept if not (item.painted and item.hidden)]


def side_by_side(item, items):
    """How many like it stand on one line with it, itself included."""
    x, y, width, height = item.rect

    def like(other):
        near = abs(other.rect[1] - y) <= 3 and abs(other.rect[3] - height) <= 3
        return near and (other.solid, other.picture, bool(other.text)) == (item.solid, item.picture, bool(item.text))
    return sum(map(like, items))


def record(item, items):
    ink = item.back if item.ink is None else item.ink
    back, ink = ([round(float(value)) for value in colour] for colour in (item.back, ink))
    part = (item.writer or item.node).element["part"]
    return {"tag": item.tag, "part": part, "text": item.text, "letters": item.letters or item.rect,
            "solid": item.solid, "picture": item.picture, "rect": item.rect, "back": back, "ink": ink,
            "font": item.font, "row": side_by_side(item, items)}


def see(snapshot, elements, pixels, most):
    """(boxes, background) of a page. elements: {number: what see.js says}; pixels: [rows, columns, 3]; most: boxes at
    most, the largest."""
    height, width, _ = pixels.shape
    nodes, pieces = read_layout(snapshot, elements)
    items = painted_items(nodes, height, width)
    items += text_items(pieces, height, width)  # last: what lies over a text would hide it
    top = layer(items, (height, width))
    background = page_background(pixels, top)
    look_at_paint(items, pixels, top, background)
    for item in items:
        item.tag = tag_of(item.node) if item.painted else item.node.tag
        if item.text:
            look_at_letters(item, pixels)
    items = join_texts(items)
    painters = {id(item.node) for item in items if item.painted}
    for item in items:
        if not item.painted and id(item.node) in painters:
            item.tag = ""  # one of several texts in a button is no button
    largest = sorted(items, key=lambda item: -item.rect[2] * item.rect[3])[:most]
    boxes = [record(item, items) for item in sorted(largest, key=lambda item: (item.rect[1], item.rect[0]))]
    return boxes, [round(float(value)) for value in background]
