"""How much two pages look alike, in what they differ, and how that is shown.

`similarity` compares what worlds/browser.py sees of two pages, never their sources: 0.7 x matched boxes + 0.1 x
background + 0.2 x colours of patches; 1 for pages that look the same, 0 where there is nothing to see. A box is matched
with the one most like it in text, place, size and colour, and counts by the root of its area. With weights at hand,
`clip_similarity` is the paper's measure instead: the cosine of CLIP's embeddings of both screenshots. `differences`
puts into words what a person would say of the boxes that do not match.

Place in the data flow: Page, Page -> similarity and differences -> the reward and the human of worlds/frontend.py;
eval.jsonl -> pictures in the report. Exercised by `python -m pytest tests/test_pages.py`.

Shapes: A boxes of the one page, R of the other.
"""
import base64
import functools
import io
import zlib
from html import escape
from itertools import pairwise

import numpy as np

from env import ANSWER_MARKER
from machinery.files import InputError
from machinery.optional import first_line
from worlds.browser import HEIGHT, WIDTH
from worlds.source import page_source

PAPER = {"base": "72.4", "RFT": "75.2", "multi-turn DPO": "76.9", "SWEET": "77.7"}  # Table 2, CLIP cosine


# ------------------------------------------------------------------ similarity

W_BOXES, W_BACKGROUND, W_CELLS = 0.7, 0.1, 0.2                 # of a page
W_TEXT, W_PLACE, W_SIZE, W_COLOUR = 0.35, 0.25, 0.15, 0.25     # of a pair of boxes
FAR = 60.0          # in Lab: colours that far apart have nothing in common
LEAST_LIKE = 0.4    # boxes less like each other are no pair
TO_XYZ = np.array([
    [.4124, .2126, .0193],
    [.3576, .7152, .1192],
    [.1805, .0722, .9505],
])
WHITE = np.array([.9505, 1.0, 1.089])


def lab(rgb):
    """sRGB, 0..255 in the last axis -> CIELAB (D65), in which distances are as large as they look."""
    c = np.asarray(rgb, float) / 255
    linear = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    xyz = linear @ TO_XYZ / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    fx, fy, fz = np.moveaxis(f, -1, 0)
    lightness = 116 * fy - 16
    return np.stack([lightness, 500 * (fx - fy), 200 * (fy - fz)], -1)


@functools.lru_cache(maxsize=50_000)
def letter_pairs(text):
    """How often each pair of letters occurs, in 64 bins: two texts share as many pairs as the smaller counts say."""
    bins = []
    for pair in pairwise(f" {text} "):
        code = "".join(pair).encode("utf-8", "replace")
        bins.append(zlib.crc32(code) % 64)
    return np.bincount(bins, minlength=64).astype(np.float32)


def table(page):
    """A page's boxes as arrays: centre and size [A, 4] (pixels), back and ink [A, 2, 3] (Lab), letter pairs [A, 64],
    text or not [A]."""
    rects = np.array([box["rect"] for box in page.boxes], float).reshape(-1, 4)
    sizes = rects[:, 2:]
    middles = rects[:, :2] + sizes / 2
    colours, pairs, has_text = [], [], []
    for box in page.boxes:
        has_text.append(bool(box["text"]))
        colours.append([box["back"], box["ink" if box["text"] else "back"]])
        pairs.append(letter_pairs(box["text"]))
    place = np.concatenate([middles, sizes], -1)
    colours = lab(np.array(colours, float).reshape(-1, 2, 3))
    return place, colours, np.array(pairs).reshape(-1, 64), np.array(has_text, bool)


def likeness(one, other):
    """How alike each box of the one page and each of the other are: [A, R] in 0..1."""
    place_A, colour_A, pairs_A, text_A = table(one)
    place_R, colour_R, pairs_R, text_R = table(other)
    # every box of the one page against every one of the other
    place_A1, colour_A1, pairs_A1, text_A1 = (array[:, None] for array in (place_A, colour_A, pairs_A, text_A))
    shared_AR = np.minimum(pairs_A1, pairs_R).sum(-1)
    in_both_AR = pairs_A1.sum(-1) + pairs_R.sum(-1)
    text_AR = np.where(text_A1 & text_R, 2 * shared_AR / in_both_AR, text_A1 == text_R)
    moved_AR = np.abs(place_A1 - place_R)[..., :2] / (WIDTH / 2, HEIGHT)
    smaller_AR = np.minimum(place_A1, place_R)[..., 2:]
    larger_AR = np.maximum(place_A1, place_R)[..., 2:]
    apart_AR = np.linalg.norm(colour_A1 - colour_R, axis=-1).mean(-1)  # back and ink
    place_AR = (1 - moved_AR.sum(-1)).clip(0)
    size_AR = (smaller_AR / larger_AR).prod(-1)
    colour_AR = (1 - apart_AR / FAR).clip(0)
    return W_TEXT * text_AR + W_PLACE * place_AR + W_SIZE * size_AR + W_COLOUR * colour_AR


def match(one, other):
    """Pair the boxes of two pages, best pairs first: [(a, r, likeness in 0..1)], each box at most once."""
    like_AR = likeness(one, other)
    free_A = set(range(len(one.boxes)))
    free_R = set(range(len(other.boxes)))
    pairs = []
    for flat in np.argsort(-like_AR, axis=None, kind="stable"):
        a, r = divmod(int(flat), max(1, len(other.boxes)))
        if like_AR[a, r] < LEAST_LIKE or not free_A:
            break
        if a in free_A and r in free_R:
            free_A.remove(a)
            free_R.remove(r)
            pairs.append((a, r, float(like_AR[a, r])))
    return pairs


def size(box):
    return (box["rect"][2] * box["rect"][3]) ** 0.5


def same_picture(one, other):
    return bool(one.digest) and one.digest == other.digest


def cell_colours(page, rows):
    """Lab of a page's patches, black where it is shorter than these rows."""
    missing = rows - len(page.cells)
    return lab(np.pad(page.cells, ((0, missing), (0, 0), (0, 0))))


def colour_likeness(one, other):
    """How alike colours are (Lab in the last axis): 1 for the same, 0 from FAR on."""
    return (1 - np.linalg.norm(one - other, axis=-1) / FAR).clip(0)


def similarity(one, other):
    """How alike two pages look: 1 for the same looks, 0 where one of them shows nothing."""
    if not one.boxes or not other.boxes:
        return 0.0
    if same_picture(one, other):
        return 1.0
    weight_A = list(map(size, one.boxes))
    weight_R = list(map(size, other.boxes))
    matched = 0.0
    for a, r, like in match(one, other):
        matched += (weight_A[a] + weight_R[r]) * like
    boxes = matched / sum(weight_A + weight_R)
    background = colour_likeness(lab(one.background), lab(other.background))
    rows = max(len(one.cells), len(other.cells))
    cells = colour_likeness(cell_colours(one, rows), cell_colours(other, rows)).mean()
    return round(float(W_BOXES * boxes + W_BACKGROUND * background + W_CELLS * cells), 6)


# ------------------------------------------------------------------ differences, in words

COLOUR_WORDS = {
    "white": "#ffffff",
    "light grey": "#e1e4e8",
    "grey": "#949ba5",
    "dark grey": "#4b505a",
    "black": "#0a0a0f",
    "red": "#dc2626",
    "pink": "#f4a0c8",
    "orange": "#f5821e",
    "yellow": "#facc15",
    "light yellow": "#fef3b4",
    "green": "#1e9646",
    "light green": "#bef0cd",
    "teal": "#148c8c",
    "blue": "#2563eb",
    "light blue": "#c8defa",
    "dark blue": "#1e3282",
    "purple": "#7e28cd",
    "light purple": "#decdfa",
    "brown": "#78461e",
}
NOUNS = {
    "nav": "navigation bar",
    "header": "header",
    "footer": "footer",
    "aside": "sidebar",
    "button": "button",
    "input": "field",
    "textarea": "field",
    "select": "field",
    "a": "link",
    "h1": "heading",
    "h2": "heading",
    "h3": "heading",
    "h4": "heading",
    "li": "list item",
}
QUOTED = ("heading", "text", "button", "link", "list item", "box", "field")
THIN = 4            # pixels: a box that is not thicker is a line
APART = 8.0         # in Lab: colours nearer than this are not told apart, whatever they are called
ALIKE = 0.9         # boxes of different kinds with the same text and this likeness are the same to the eye
LARGER = 4 / 3      # times as large a font, from which on a person sees it


@functools.lru_cache(maxsize=10_000)
def colour_word(rgb):
    known = [list(bytes.fromhex(code[1:])) for code in COLOUR_WORDS.values()]
    distances = np.linalg.norm(lab(known) - lab(rgb), axis=-1)
    return list(COLOUR_WORDS)[int(distances.argmin())]


def colour_of(box, part):
    """What a person calls the "back" or the "ink" of a box."""
    return colour_word(tuple(box[part]))


def told_apart(one, other):
    """Would a person give two colours different names?"""
    return (colour_word(tuple(one)) != colour_word(tuple(other))
            and bool(np.linalg.norm(lab(one) - lab(other)) >= APART))


def noun(box):
    """What a person calls a box."""
    if not box["text"] and min(box["rect"][2:]) <= THIN:
        return "line"
    if box["tag"] in ("a", "button"):
        return "button" if box["solid"] else "link" if box["tag"] == "a" else "text"
    plain = "box" if box["solid"] else "picture" if box["picture"] else "text"
    return NOUNS.get(box["tag"], plain)


def name(box):
    if box["text"] and noun(box) in QUOTED:
        return f"{noun(box)} \"{box['text'][:40]}\""
    return noun(box)


def place(box, page):
    """Where a box stands, in words."""
    x, y, w, h = box["rect"]
    bottoms = [top + height for _, top, _, height in (other["rect"] for other in page.boxes)]
    third_down = 3 * (y + h / 2) / max(bottoms)
    third_across = 3 * (x + w / 2) / WIDTH
    down = ("at the top", "in the middle", "at the bottom")[min(2, int(third_down))]
    across = (" on the left", "", " on the right")[min(2, int(third_across))]
    return down + across


def same_kind(draft, wish, pair):
    i, k, like = pair
    a, r = draft.boxes[i], wish.boxes[k]
    return noun(a) == noun(r) or a["text"] == r["text"] and like >= ALIKE


def longest_rows(page):
    """{noun: how many of these stand side by side at most}."""
    rows = {}
    for box in page.boxes:
        rows[noun(box)] = max(rows.get(noun(box), 1), box["row"])
    return rows


def jumps(draft, wish, pairs):
    """For each pair, over how many others its box jumped, from top to bottom."""
    in_draft = sorted(pairs, key=lambda pair: draft.boxes[pair[0]]["rect"][1])
    in_wish = sorted(pairs, key=lambda pair: wish.boxes[pair[1]]["rect"][1])
    return [abs(in_draft.index(pair) - in_wish.index(pair)) for pair in pairs]


# Each yields (weight, sentence); the weight is the root of an area, times how much the kind of difference strikes.

def background_differences(draft, wish):
    if told_apart(draft.background, wish.background):
        wanted, found = colour_word(tuple(wish.background)), colour_word(tuple(draft.background))
        yield 0.5 * (WIDTH * HEIGHT) ** 0.5, f"The page background should be {wanted}, not {found}."


def place_differences(draft, wish, pairs):
    rows_draft, rows_wish = longest_rows(draft), longest_rows(wish)
    for (i, k, _), jump in zip(pairs, jumps(draft, wish, pairs)):
        a, r = draft.boxes[i], wish.boxes[k]
        wanted = rows_wish[noun(r)]
        if noun(a) == noun(r) and rows_draft[noun(a)] != wanted:
            stand = f"{wanted} side by side" if wanted > 1 else "one under the other"
            yield size(r), f"The {'boxes' if noun(r) == 'box' else noun(r) + 's'} should stand {stand}."
        elif 3 * jump > len(pairs) and place(a, draft) != place(r, wish):
            yield size(r), f"The {name(r)} should be {place(r, wish)}, not {place(a, draft)}."


def colour_differences(a, r):
    if (a["solid"] or r["solid"]) and told_apart(a["back"], r["back"]):
        yield 0.7 * size(r), f"The {name(r)} should be {colour_of(r, 'back')}, not {colour_of(a, 'back')}."


def text_differences(a, r):
    if not a["text"] or not r["text"]:
        return
    if a["text"] != r["text"]:
        yield 0.6 * size(r), f"The {noun(r)} \"{a['text'][:40]}\" should say \"{r['text'][:60]}\"."
    if told_apart(a["ink"], r["ink"]):
        yield 0.3 * size(r), f"The letters of the {name(r)} should be {colour_of(r, 'ink')}."
    if not 1 / LARGER < a["font"] / r["font"] < LARGER:
        yield 0.3 * size(r), f"The {name(r)} should be {'larger' if a['font'] < r['font'] else 'smaller'}."


def missing(wish, matched):
    for k in set(range(len(wish.boxes))) - matched:
        box = wish.boxes[k]
        colour = f"{colour_of(box, 'back')} " if box["solid"] else ""
        yield size(box), f"There should be a {colour}{name(box)} {place(box, wish)}."


def superfluous(draft, matched):
    for i in set(range(len(draft.boxes))) - matched:
        yield 0.8 * size(draft.boxes[i]), f"There should be no {name(draft.boxes[i])}."


def differences(draft, wish):
    """Every difference between two drawn pages that a person would name, most outstanding first: sentences about the
    draft; none where both are the same picture."""
    if same_picture(draft, wish):
        return []
    pairs = [pair for pair in match(draft, wish) if same_kind(draft, wish, pair)]
    found = [*background_differences(draft, wish), *place_differences(draft, wish, pairs)]
    for i, k, _ in pairs:
        found += colour_differences(draft.boxes[i], wish.boxes[k])
        found += text_differences(draft.boxes[i], wish.boxes[k])
    found += missing(wish, {k for _, k, _ in pairs})
    found += superfluous(draft, {i for i, _, _ in pairs})
    said = {}
    for weight, sentence in found:
        said[sentence] = said.get(sentence, 0.0) + weight
    return sorted(said, key=lambda sentence: (-said[sentence], sentence))


# ------------------------------------------------------------------ CLIP

@functools.lru_cache(maxsize=1)
def load_clip(name):
    """A CLIP model and its processor, tried on a picture. name: a Hugging Face directory or name. InputError where
    there is none."""
    from PIL import Image
    from transformers import AutoProcessor, CLIPModel
    try:
        model, report = CLIPModel.from_pretrained(name, output_loading_info=True)
        if report["missing_keys"]:  # of another kind of model: they would be random
            raise ValueError(f"it lacks {sorted(report['missing_keys'])[0]}")
        loaded = model.eval(), AutoProcessor.from_pretrained(name)
        clip_embeddings(*loaded, [Image.new("RGB", (WIDTH, HEIGHT))])
    except Exception as error:  # loading has many ways to fail
        raise InputError(f"--clip {name}: cannot be loaded as a CLIP model with its processor "
                         f"({first_line(error)})") from None
    return loaded


def clip_embeddings(model, processor, pictures):
    """Unit vectors [pictures, width]."""
    import torch
    with torch.no_grad():
        found = model.get_image_features(**processor(images=pictures, return_tensors="pt"))
    return torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)


def clip_similarity(one, other, name):
    """The paper's measure: cosine of CLIP's image embeddings of both pictures."""
    from PIL import Image
    pictures = [Image.open(io.BytesIO(page.picture)).convert("RGB") for page in (one, other)]
    a, b = clip_embeddings(*load_clip(name), pictures)
    return min(1.0, float(a @ b))  # which rounding makes a little more


# ------------------------------------------------------------------ in the report

def headers(settings):
    """What the two figures of `figures` are called."""
    return f"similarity ({'CLIP' if settings.get('clip') else 'boxes'})", "win rate against base"


def figures(record, base):
    """Two figures of an evaluated dialogue, in %: similarity, and whether it beats the base policy's on the same task
    (a tie counts half)."""
    ours, theirs = record["reward"], base["reward"]
    return 100 * ours, 50 * (ours >= theirs) + 50 * (ours > theirs)


def verdict(record):
    return f"similarity {record['reward']:.2f}"


def brief(text):
    """A message as the dialogue shows it: a page is shown as a picture, not as source."""
    source = page_source(text)
    return text.replace(source, " [page]") if source else text


def _thumbnail(picture):
    from PIL import Image
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    height = min(image.height, 2 * WIDTH)
    image = image.crop((0, 0, image.width, height)).reduce(4)
    small = io.BytesIO()
    image.save(small, "JPEG", quality=80)
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}'>"


def evidence(browser, record):
    """Round by round: the picture of the draft beside that of the reference, and how alike they are. Nothing is
    folded here."""
    drafts = [message["content"] for message in record["dialogue_history"] if message["role"] == "assistant"]
    sources = [page_source(draft.replace(ANSWER_MARKER, "")) for draft in drafts]
    try:
        *drawn, wish = browser.render([*sources, record["task"]["ground_truth"]], pictures=True)
    except InputError as error:
        return f"<p>No pictures: {escape(str(error))}</p>"
    kinds = ["answer" if ANSWER_MARKER in draft else "draft" for draft in drafts]
    return "".join(f"<h4>turn {k}, {kind}: {similarity(page, wish):.2f} by boxes</h4>"
                   f"{_thumbnail(page.picture) if page.picture else escape(page.failure)}{_thumbnail(wish.picture)}"
                   for k, (kind, page) in enumerate(zip(kinds, drawn), 1))


# ------------------------------------------------------------------ in play

def drawn(browser, text):
    """The page in a text as a picture, "" where there is none."""
    source = page_source(text.replace(ANSWER_MARKER, ""))
    if not source:
        return ""
    page, = browser.render([source], pictures=True)
    return _thumbnail(page.picture) if page.picture else escape(page.failure)


def summary(browser, record):
    """What still differs, as lines for a terminal."""
    answer, wish = browser.render([page_source(record["answer"]), record["task"]["ground_truth"]])
    found = differences(answer, wish) if answer.boxes else ["There is nothing to see."]
    return ["What still differs:", *found] if found else ["Nothing differs."]
