"""What a person sees of a drawn page: its boxes, taken from what the browser laid out and from the pixels.

Two pages that look the same give the same boxes, however they are written: text is what stands on the page (capitals,
words of ::before, counters and list marks included), joined over the elements that share a line, and cut where a line
is broken on purpose; colours are those of the pixels; a background or a border makes a box only where it is set off
from what lies under it, and a box with a single text in it is one with its text.

Place in the data flow: a snapshot of the layout, worlds/see.js, the screenshot -> `see` -> `Page` in worlds/browser.py,
where the record of a box is described. Runs in the worker process. Exercised by `python -m pytest tests/test_pages.py`.

Lengths are pixels, rects [x, y, width, height], colours [r, g, b] in 0..255.
"""
import math
import re
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

BORDERS = ("border-top-width", "border-left-width", "border-bottom-width", "border-right-width")
PAINTS = ("background-image", "outline-style", "box-shadow")
STYLES = ("display", "font-size", "-webkit-text-fill-color", "fill", "background-color", "background-clip",
          *PAINTS, *BORDERS, "filter", "mix-blend-mode", "zoom", "transform")
FIELDS = ("input", "textarea", "select")
PICTURES = ("img", "svg", "canvas")
NAMED = "a li button h1 h2 h3 h4 nav header footer aside".split()  # tags that tell what it is
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
        return (
            not re.search(CLEAR, self.style["background-color"])
            or any(self.style[name] != "none" for name in PAINTS)
            or any(self.style[name] != "0px" for name in BORDERS)
            or self.tag in PICTURES
            or self.tag in FIELDS
        )

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
    tree = document["nodes"]
    layout = document["layout"]
    lines = document["textBoxes"]
    nodes = []
    for name, parent, attributes in zip(tree["nodeName"], tree["parentIndex"], tree["attributes"]):
        names = [strings[i] for i in attributes]
        number = dict(zip(names[::2], names[1::2])).get("data-nth")
        inside = nodes[parent] if parent >= 0 else None
        tag = strings[name].lower()
        if tag.startswith(("#", "::")):
            element = inside and inside.element
        else:
            element = elements.get(number)
        nodes.append(Node(tag, inside, element))
    columns = [layout[name] for name in ("nodeIndex", "bounds", "paintOrders", "styles")]
    for index, bounds, order, values in zip(*columns):
        node = nodes[index]
        if node.style:
            continue  # the letters of ::before have the same number as its box
        node.bounds = bounds
        node.order = order
        node.style = {name: strings[value] for name, value in zip(STYLES, values)}
    last = list(range(len(nodes)))  # of what lies in a node
    for index in range(len(nodes) - 1, 0, -1):
        parent = tree["parentIndex"][index]
        last[parent] = max(last[parent], last[index])

    def written(piece):  # the browser lists ::after before what it comes after
        if nodes[piece].tag == "::after":
            return last[tree["parentIndex"][piece]], 1, -piece
        return piece, 0, 0
    pieces = []
    columns = [lines[name] for name in ("layoutIndex", "bounds", "start", "length")]
    for index, bounds, start, length in zip(*columns):
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
            numbers = re.findall(r"-?[\d.]+(?:e-?\d+)?", up.style["transform"])
            matrix = list(map(float, numbers))
            if len(matrix) == 6:
                a, b, c, d, *_ = matrix
                size *= abs(a * d - b * c) ** 0.5
    return size


def around(rects, height, width):
    """The smallest rect around others, cut at the page's edges, or None."""
    real = np.array([rect for rect in rects if min(rect[2:]) > 0])
    if not len(real):
        return None
    corner, size = real[:, :2], real[:, 2:]
    left, top = corner.min(0).clip(0)
    right, bottom = (corner + size).max(0).clip(None, (width, height))
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
    for (_, _, before), (_, piece, after) in pairwise(run):
        x, y, width, height = before
        below = abs(after[1] - y) > height / 2
        beside = after[0] - (x + width) > height / 5
        text += " " + piece if below or beside else piece
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"^[•◦▪■●‣▸▾]\s*", "", text)[:500]


def owner(run):
    """The element that a person would name for a run: the link, the heading ... that holds all of it."""
    first = run[0][0]
    block = block_of(first)
    around_all = [set(map(id, piece.ancestors())) for piece, *_ in run]
    for node in first.ancestors():
        shared = all(id(node) in ancestors for ancestors in around_all)
        if shared and node.tag in NAMED:
            return node
        if node is block:
            break
    return block


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
        rect = around([node.bounds], height, width)
        if rect is None:
            continue  # out of sight
        image = node.style["background-image"] != "none"
        if node.tag == "body" and image:
            rect = [0, 0, width, height]  # it is spread over the whole page
        if not image and rect[2] * rect[3] >= WHOLE * width * height:
            continue  # the ground of the whole page, whoever declares it
        item = Item(node, rect, True)
        if node.tag in FIELDS:
            item.text = node.element["text"][:500]
            item.writer = node
            item.letters = rect
            item.font = font_size(node)
        items.append(item)
    return sorted(items, key=lambda item: item.node.order)


# ------------------------------------------------------------------ the pixels

def sample(array, rect):
    """At most GRID x GRID values of an image within a rect, in a row."""
    x, y, width, height = rect
    down, across = math.ceil(height / GRID), math.ceil(width / GRID)
    part = array[y:y + height:down, x:x + width:across]
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
    red, green, blue = packed >> 16, packed >> 8 & 255, packed & 255
    return np.array((red, green, blue), float), share


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
    colours = pixels[::8, ::8].reshape(-1, 3)
    free = top[::8, ::8].reshape(-1) == 0
    if free.mean() > 0.01:
        colours = colours[free]
    return main_colour(colours)[0]


def sides(rect, outside, shape):
    """Indices of the line of pixels along each side, so many pixels outside, where the page goes on that far."""
    x, y, width, height = rect
    found = []
    for row in (y - outside, y + height - 1 + outside):
        if 0 <= row < shape[0]:
            found.append((row, slice(x, x + width)))
    for column in (x - outside, x + width - 1 + outside):
        if 0 <= column < shape[1]:
            found.append((slice(y, y + height), column))
    return found


def edged(item, k, under, pixels, top):
    """Is there a line along one of its sides, inside, or outside where it has an outline or a shadow?"""
    def line(colours, ground):
        apart = np.abs(colours - ground).max(-1)
        return len(colours) and (apart >= EDGE).mean() >= EDGE_SHARE
    for side in sides(item.rect, 0, pixels.shape):
        own = top[side] == k + 1
        if line(pixels[side][own], item.back):
            return True
    style = item.node.style
    if style["outline-style"] == style["box-shadow"] == "none":
        return False
    return any(line(pixels[side], under) for side in sides(item.rect, 1, pixels.shape))


def look_at_paint(items, pixels, top, background):
    """Fills in back, solid and picture of the painted items, and back of the texts."""
    for k, item in enumerate(items):
        item.colours = sample(pixels, item.rect)
        own = sample(top, item.rect) == k + 1
        item.hidden = not own.any()
        if item.painted and not item.hidden:
            item.colours = item.colours[own]
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
            item.solid = bool(
                differs
                or image != "none" and uneven
                or item.node.tag in FIELDS
                or edged(item, k, under, pixels, top)
            )


def declared_ink(node):
    """The colour that a text's style asks for: [r, g, b], or None where something changes it on the way."""
    def recolours(style):
        return (style["background-clip"] == "text"
                or style["filter"] != "none"
                or style["mix-blend-mode"] != "normal")
    if any(up.style and recolours(up.style) for up in node.ancestors()):
        return None
    colour = node.style["fill" if node.within_svg() else "-webkit-text-fill-color"]
    numbers = re.fullmatch(r"rgba?\((\d+), (\d+), (\d+)(?:, [\d.]+)?\)", colour)
    return numbers and np.array(numbers.groups(), float)


def look_at_letters(item, pixels):
    """Fills in the ink; a text that cannot be read becomes empty."""
    x, y, width, height = item.letters
    inset = 3 if item.painted else 0  # the frame of a field is no letter
    rows = slice(y + inset, y + height - inset)
    columns = slice(x + inset, x + width - inset)
    patch = pixels[rows, columns].reshape(-1, 3)
    step = 1 + len(patch) // LETTERS
    patch = patch[::step].astype(np.float32)
    if not len(patch):
        item.text = ""
        return
    ground, share = main_colour(patch)
    even = share >= MAIN_SHARE
    if not even:
        ground = np.median(patch, axis=0)
    away = patch - ground
    distance = np.linalg.norm(away, axis=-1)
    needed = CONTRAST
    wanted = declared_ink(item.writer)
    if wanted is not None:
        way = wanted - (patch[0] - away[0])
        length = np.linalg.norm(way)
        distance = away @ way / max(length, 1.0)
        if not even:
            needed = UNEVEN_CONTRAST * length
        if length < CONTRAST:
            needed = np.inf
    item.ink = patch[distance.argmax()]
    if distance.max() < needed:
        item.text = ""


# ------------------------------------------------------------------ boxes

def tag_of(node):
    """The tag that tells what a box is: of the node, or of an element around it of the same size."""
    for up in node.ancestors():
        if up.tag in NAMED and up.bounds:
            apart = np.abs(np.subtract(up.bounds, node.bounds)).max()
            if apart <= 2:
                return up.tag
    return node.tag


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
        box.text = text.text
        box.letters = text.letters
        box.ink = text.ink
        box.font = text.font
        if box.tag not in NAMED and box.tag not in FIELDS:
            box.tag = text.node.tag
        kept = [item for item in kept if item is not text]
    return [item for item in kept if not (item.painted and item.hidden)]


def side_by_side(item, items):
    """How many like it stand on one line with it, itself included."""
    def kind(one):
        return one.solid, one.picture, bool(one.text)

    def like(other):
        level = abs(other.rect[1] - item.rect[1]) <= 3
        as_high = abs(other.rect[3] - item.rect[3]) <= 3
        return level and as_high and kind(other) == kind(item)
    return sum(map(like, items))


def whole_numbers(colour):
    return [round(float(value)) for value in colour]


def record(item, items):
    return {
        "tag": item.tag,
        "part": (item.writer or item.node).element["part"],
        "text": item.text,
        "letters": item.letters or item.rect,
        "solid": item.solid,
        "picture": item.picture,
        "rect": item.rect,
        "back": whole_numbers(item.back),
        "ink": whole_numbers(item.back if item.ink is None else item.ink),
        "font": item.font,
        "row": side_by_side(item, items),
    }


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
    items_by_size = sorted(items, key=lambda item: -item.rect[2] * item.rect[3])
    largest = items_by_size[:most]
    largest.sort(key=lambda item: (item.rect[1], item.rect[0]))
    return [record(item, items) for item in largest], whole_numbers(background)
