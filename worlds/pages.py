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
import re
import zlib
from html import escape

import numpy as np

from env import ANSWER_MARKER
from machinery.files import InputError
from machinery.optional import first_line
from worlds.browser import HEIGHT, WIDTH, render_pages

PAPER = dict(zip(("base", "RFT", "multi-turn DPO", "SWEET", "SWEET without c"),
                 ("72.4", "75.2", "76.9", "77.7", "-")))  # Table 2, CLIP cosine


def page_source(text):
    """The page in what an agent wrote: from <html to </html>, or else from the first tag to the last; "" without
    one."""
    found = re.search(r"(?:<!doctype[^>]*>\s*)?<html\b.*?(?:</html>|\Z)", text, re.S | re.I)
    return (found or re.search(r"<.*>|\Z", text, re.S))[0]


# ------------------------------------------------------------------ similarity

def lab(rgb):
    """sRGB, 0..255 in the last axis -> CIELAB (D65), in which distances are as large as they look."""
    c = np.asarray(rgb, float) / 255
    c = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    xyz = c @ np.array([[.4124, .2126, .0193], [.3576, .7152, .1192], [.1805, .0722, .9505]]) / (.9505, 1.0, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


@functools.lru_cache(maxsize=50_000)
def letter_pairs(text):
    """How often each pair of letters occurs, in 64 bins: two texts share as many pairs as the smaller counts say."""
    bins = [zlib.crc32(f" {text} "[i:i + 2].encode("utf-8", "replace")) % 64 for i in range(len(text) + 1)]
    return np.bincount(bins, minlength=64).astype(np.float32)


def table(page):
    """A page's boxes as arrays: centre and size [.., 4] (pixels), back and ink (Lab), letter pairs, text or not."""
    rects = np.array([box["rect"] for box in page.boxes], float).reshape(-1, 4)
    colours = lab(np.array([[box["back"], box["ink"] if box["text"] else box["back"]] for box in page.boxes],
                           float).reshape(-1, 2, 3))
    pairs = np.array([letter_pairs(box["text"]) for box in page.boxes]).reshape(-1, 64)
    return np.c_[rects[:, :2] + rects[:, 2:] / 2, rects[:, 2:]], colours, pairs, np.array([bool(b["text"])
                                                                                          for b in page.boxes], bool)


def match(one, other):
    """Pair the boxes of two pages, best pairs first: [(a, r, likeness in 0..1)], each box at most once."""
    (place_A, colour_A, pairs_A, text_A), (place_R, colour_R, pairs_R, text_R) = table(one), table(other)
    shared_AR = np.minimum(pairs_A[:, None], pairs_R).sum(-1)
    text_AR = 2 * shared_AR / (pairs_A.sum(-1)[:, None] + pairs_R.sum(-1))
    text_AR = np.where(text_A[:, None] & text_R, text_AR, text_A[:, None] == text_R)
    moved_AR = np.abs(place_A[:, None, :2] - place_R[:, :2]) / (WIDTH / 2, HEIGHT)
    size_AR = (np.minimum(place_A[:, None, 2:], place_R[:, 2:]) / np.maximum(place_A[:, None, 2:], place_R[:, 2:]))
    colour_AR = np.linalg.norm(colour_A[:, None] - colour_R, axis=-1).mean(-1)
    like_AR = (0.35 * text_AR + 0.25 * (1 - moved_AR.sum(-1)).clip(0) + 0.15 * size_AR.prod(-1)
               + 0.25 * (1 - colour_AR / 60).clip(0))
    pairs, free_A, free_R = [], set(range(len(text_A))), set(range(len(text_R)))
    for flat in np.argsort(-like_AR, axis=None, kind="stable"):
        a, r = divmod(int(flat), max(1, len(text_R)))
        if like_AR[a, r] < 0.4 or not free_A:
            break
        if a in free_A and r in free_R:
            free_A.remove(a)
            free_R.remove(r)
            pairs.append((a, r, float(like_AR[a, r])))
    return pairs


def similarity(one, other):
    """How alike two pages look: 1 for the same looks, 0 where one of them shows nothing."""
    if not one.boxes or not other.boxes:
        return 0.0
    weight_A, weight_R = ([(box["rect"][2] * box["rect"][3]) ** 0.5 for box in page.boxes] for page in (one, other))
    boxes = sum((weight_A[a] + weight_R[r]) * like for a, r, like in match(one, other)) / sum(weight_A + weight_R)
    background = max(0.0, 1 - np.linalg.norm(lab(one.background) - lab(other.background)) / 60)
    rows = max(len(one.cells), len(other.cells))
    lab_A, lab_R = (lab(np.pad(p.cells, ((0, rows - len(p.cells)), (0, 0), (0, 0)))) for p in (one, other))
    cells = (1 - np.linalg.norm(lab_A - lab_R, axis=-1) / 60).clip(0).mean()
    return round(float(0.7 * boxes + 0.1 * background + 0.2 * cells), 6)


# ------------------------------------------------------------------ differences, in words

COLOUR_WORDS = {
    "white": (255, 255, 255), "light grey": (225, 228, 232), "grey": (148, 155, 165), "dark grey": (75, 80, 90),
    "black": (10, 10, 15), "red": (220, 38, 38), "pink": (244, 160, 200), "orange": (245, 130, 30),
    "yellow": (250, 204, 21), "light yellow": (254, 243, 180), "green": (30, 150, 70), "light green": (190, 240, 205),
    "teal": (20, 140, 140), "blue": (37, 99, 235), "light blue": (200, 222, 250), "dark blue": (30, 50, 130),
    "purple": (126, 40, 205), "light purple": (222, 205, 250), "brown": (120, 70, 30)}
NOUNS = {"nav": "navigation bar", "header": "header", "footer": "footer", "aside": "sidebar", "button": "button",
         "img": "picture", "svg": "picture", "input": "field", "textarea": "field", "select": "field", "a": "link",
         "h1": "heading", "h2": "heading", "h3": "heading", "h4": "heading", "hr": "line", "li": "list item"}


@functools.lru_cache(maxsize=10_000)
def colour_word(rgb):
    distances = np.linalg.norm(lab(list(COLOUR_WORDS.values())) - lab(rgb), axis=-1)
    return list(COLOUR_WORDS)[int(distances.argmin())]


def noun(box):
    """What a person calls a box."""
    plain = "box" if box["solid"] else "picture" if box["picture"] else "text"
    return "button" if box["tag"] == "a" and box["solid"] else NOUNS.get(box["tag"], plain)


def name(box):
    quoted = box["text"] and noun(box) in ("heading", "text", "button", "link", "list item", "box", "field")
    return f"{noun(box)} \"{box['text'][:40]}\"" if quoted else noun(box)


def place(box, page):
    """Where a box stands, in words."""
    x, y, w, h = box["rect"]
    bottom = max(b["rect"][1] + b["rect"][3] for b in page.boxes)
    down, across = (y + h / 2) / bottom, (x + w / 2) / WIDTH
    return (("at the top" if down < 1 / 3 else "in the middle" if down < 2 / 3 else "at the bottom")
            + (" on the left" if across < 1 / 3 else "" if across < 2 / 3 else " on the right"))


def differences(draft, wish):
    """Every difference between two drawn pages that a person would name, most outstanding first: sentences about the
    draft."""
    said = {}
    pairs = [(a, r) for a, r, _ in match(draft, wish) if noun(draft.boxes[a]) == noun(wish.boxes[r])]

    def say(weight, sentence):
        said[sentence] = said.get(sentence, 0.0) + weight

    def size(box):
        return (box["rect"][2] * box["rect"][3]) ** 0.5
    if colour_word(draft.background) != colour_word(wish.background):
        say(0.5 * (WIDTH * HEIGHT) ** 0.5, f"The page background should be {colour_word(wish.background)}, not "
                                           f"{colour_word(draft.background)}.")
    rows = [{noun(b): max(c["row"] for c in page.boxes if noun(c) == noun(b)) for b in page.boxes}
            for page in (draft, wish)]
    order = [sorted(pairs, key=lambda pair: page.boxes[pair[side]]["rect"][1])
             for side, page in ((0, draft), (1, wish))]
    for pair in pairs:
        a, r = draft.boxes[pair[0]], wish.boxes[pair[1]]
        jump = abs(order[0].index(pair) - order[1].index(pair))
        if rows[0][noun(a)] != rows[1][noun(a)]:
            wished = f"{rows[1][noun(a)]} side by side" if rows[1][noun(a)] > 1 else "one under the other"
            say(size(r), f"The {'boxes' if noun(r) == 'box' else noun(r) + 's'} should stand {wished}.")
        elif 3 * jump > len(pairs) and place(a, draft) != place(r, wish):
            say(size(r), f"The {name(r)} should be {place(r, wish)}, not {place(a, draft)}.")
        if colour_word(tuple(a["back"])) != colour_word(tuple(r["back"])) and (r["solid"] or a["solid"]):
            say(0.7 * size(r), f"The {name(r)} should be {colour_word(tuple(r['back']))}, not "
                               f"{colour_word(tuple(a['back']))}.")
        if a["text"] and r["text"]:
            if a["text"] != r["text"]:
                say(0.6 * size(r), f"The {noun(r)} \"{a['text'][:40]}\" should say \"{r['text'][:60]}\".")
            if colour_word(tuple(a["ink"])) != colour_word(tuple(r["ink"])):
                say(0.3 * size(r), f"The letters of the {name(r)} should be {colour_word(tuple(r['ink']))}.")
            if not 0.75 < a["font"] / r["font"] < 1.33:
                say(0.3 * size(r), f"The {name(r)} should be {'larger' if a['font'] < r['font'] else 'smaller'}.")
    for gone in set(range(len(wish.boxes))) - {r for _, r in pairs}:
        box = wish.boxes[gone]
        colour = f"{colour_word(tuple(box['back']))} " if box["solid"] else ""
        say(size(box), f"There should be a {colour}{name(box)} {place(box, wish)}.")
    for more in set(range(len(draft.boxes))) - {a for a, _ in pairs}:
        say(0.8 * size(draft.boxes[more]), f"There should be no {name(draft.boxes[more])}.")
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
    return float(a @ b)


# ------------------------------------------------------------------ in the report

def headers(settings):
    """What the two figures of `figures` are called."""
    return f"similarity ({'CLIP' if settings.get('clip') else 'boxes'})", "win rate against base"


def figures(record, base):
    """Two figures of an evaluated dialogue, in %: similarity, and whether it beats the base policy's on the same task
    (a tie counts half)."""
    return 100 * record["reward"], 50 * (1 + (record["reward"] > base["reward"]) - (record["reward"] < base["reward"]))


def verdict(record):
    return f"similarity {record['reward']:.2f}"


def brief(text):
    """A message as the dialogue shows it: a page is shown as a picture, not as source."""
    source = page_source(text)
    return text.replace(source, " [page]") if source else text


def _thumbnail(picture):
    from PIL import Image
    small, image = io.BytesIO(), Image.open(io.BytesIO(picture)).convert("RGB")
    image.crop((0, 0, image.width, min(image.height, 2 * WIDTH))).reduce(4).save(small, "JPEG", quality=80)
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}'>"


def evidence(record):
    """Round by round: the picture of the draft beside that of the reference, and how alike they are."""
    drafts = [message["content"] for message in record["dialogue_history"] if message["role"] == "assistant"]
    sources = [page_source(draft.replace(ANSWER_MARKER, "")) for draft in drafts]
    try:
        *drawn, wish = render_pages([*sources, record["task"]["ground_truth"]], pictures=True)
    except InputError as error:
        return f"<p>No pictures: {escape(str(error))}</p>"
    kinds = ["answer" if ANSWER_MARKER in draft else "draft" for draft in drafts]
    return "".join(f"<h4>turn {k}, {kind}: {similarity(page, wish):.2f} by boxes</h4>"
                   f"{_thumbnail(page.picture) if page.picture else escape(page.failure)}{_thumbnail(wish.picture)}"
                   for k, (kind, page) in enumerate(zip(kinds, drawn), 1))
