"""How much two pages look alike, and how that is shown.

`similarity` compares what worlds/browser.py sees of two pages, never their sources: 0.7 x matched boxes + 0.1 x
background + 0.2 x colours of patches; 1 for pages that look the same, 0 where there is nothing to see. A box is matched
with the one most like it in text, place, size and colour, and counts by the root of its area. With weights at hand,
`clip_similarity` is the paper's measure instead: the cosine of CLIP's embeddings of both screenshots.

Place in the data flow: Page, Page -> similarity -> the reward of worlds/frontend.py; eval.jsonl -> pictures in the
report. Exercised by `python -m pytest tests/test_pages.py`.

Shapes: A boxes of the one page, R of the other.
"""
import functools
import io
import zlib

import numpy as np

from worlds.browser import HEIGHT, WIDTH

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


@functools.lru_cache(maxsize=1)
def _clip(name):
    from transformers import AutoProcessor, CLIPModel
    return CLIPModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)


def clip_similarity(one, other, name):
    """The paper's measure: cosine of CLIP's image embeddings of both pictures. name: a Hugging Face directory or
    name."""
    import torch
    from PIL import Image
    model, processor = _clip(name)
    images = [Image.open(io.BytesIO(page.picture)).convert("RGB") for page in (one, other)]
    with torch.no_grad():
        found = model.get_image_features(**processor(images=images, return_tensors="pt"))
    a, b = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)
    return float(a @ b)
