"""What a web page looks like: a real browser draws it, and what is kept is what a person sees.

    Page.boxes       the visible elements: text, place, size, colours
    Page.background  the colour behind everything
    Page.cells       mean colour of each patch of 40 x 40 pixels
    Page.picture     the screenshot, as PNG bytes

Text counts where it can be read: not hidden, off the page, covered, without size, or of the colour around it.

The browser is Debian's or yours, driven by Playwright, one in each of two worker processes. Pages are strangers: no
scripts, no network, no files. Tailwind 2.2.19, which every page of ColBench links, comes from a local copy; pictures
are replaced by plain ones of the size that their address asks for; whatever else a page asks for is refused, and
animations stand still, so that a page looks the same each time. A worker that does not answer in time is killed with
its browser, and the page tried once more; a page that cannot be drawn has no boxes, and says why in `Page.failure`.
Not contained: a fault in Chromium itself, which runs without its own sandbox (that one does not start as root).

Place in the data flow: sources of pages -> `render_pages` -> worlds/pages.py (similarity), worlds/frontend.py (the
human's eyes). Needs `pip install playwright pillow`, a Chromium, and npm, once, for pages that link Tailwind.
Exercised by `python -m pytest tests/test_pages.py`.
"""
import atexit
import base64
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np

from machinery.files import InputError, put
from worlds import boxes

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
INSTALL = "apt install chromium-headless-shell fonts-dejavu-core fonts-liberation; pip install playwright pillow"
TAILWIND = "tailwindcss@2.2.19"
WIDTH, HEIGHT, TALLEST, CELL = 1280, 720, 8000, 40  # pixels: the window, the part of a page that counts, a cell
MOST_BOXES, MOST_CHARACTERS = 300, 200_000
WORKERS, SECONDS, RECYCLE = 2, 1.5, 400  # workers, the time they have for a page, pages until a new one (it grows)
LEFT_ALONE = 30  # seconds until a worker ends by itself, with its browser


@dataclass(frozen=True)
class Page:
    """A page as it is seen. Lengths are pixels, colours [r, g, b] in 0..255, cells [rows, columns, r g b].

    boxes: [{tag, part (the nav, header, footer ... around it), text, rect and letters (of the box, of its text:
    [x, y, width, height]), back and ink (colours), font (size), row (how many like it stand side by side), solid
    (set off from what is behind), picture}]. digest: the same for pages whose screenshots are the same, pixel by
    pixel. failure: why the page could not be drawn, or empty.
    """
    boxes: tuple = ()
    background: tuple = (255, 255, 255)
    cells: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8))
    digest: str = ""
    failure: str = ""
    picture: bytes = b""


# ------------------------------------------------------------------ the source, before a browser sees it

def cache_folder():
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sweet"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.lru_cache(maxsize=1)
def tailwind_rules():
    """Tailwind, fetched once with npm: [(media query or "", rule, for each of its selectors the classes that it
    needs)], and {class: indices of rules} with the rules that need none under ""."""
    file = cache_folder() / "tailwind-2.2.19.min.css"
    if not file.exists():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                subprocess.run(["npm", "pack", "--silent", TAILWIND], cwd=scratch, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise InputError(f"{file}: is not there and `npm pack {TAILWIND}` failed ({error}); put "
                                 "dist/tailwind.min.css of that package there") from None
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as package:
                css = package.extractfile("package/dist/tailwind.min.css").read()
        new = Path(f"{file}.{os.getpid()}")
        new.write_bytes(css)
        put(new, file)
    css = re.sub(r"/\*.*?\*/|@(?:-webkit-)?keyframes[^{]*\{(?:[^{}]*\{[^{}]*\})*\}", "", file.read_text("utf-8"))
    rules, index, media = [], {}, ""
    for opens, rule, _ in re.findall(r"(@media[^{]*)\{|([^{}]+\{[^{}]*\})|(\})", css):
        media = opens if not rule else media
        if rule:
            names = [{re.sub(r"\\(?:([0-9a-f]{2}) ?|(.))", lambda m: m[2] or chr(int(m[1], 16)), name)
                      for name in re.findall(r"\.((?:\\[0-9a-f]{2} ?|\\.|[\w-])+)", selector)}
                     for selector in re.split(r"(?<!\\),", rule.split("{")[0])]
            for needed in names:
                index.setdefault(min(needed, default=""), []).append(len(rules))
            rules.append((media, rule, names))
    return rules, index


def tailwind_for(source):
    """The part of Tailwind that a page can use, in Tailwind's order: what the browser draws stays the same."""
    rules, index = tailwind_rules()
    used = set(re.split(r"[\s\"'<>=]+", source)) | {""}
    kept = sorted({i for name in used if name in index for i in index[name]})
    parts = [f"{media}{{{rule}}}" if media else rule for media, rule, names in map(rules.__getitem__, kept)
             if any(needed <= used for needed in names)]
    return f"<style>{''.join(parts)}</style>"


def placeholder(address):
    """A plain picture in the place of one from the network, of the size that its address asks for (the last two
    numbers)."""
    numbers = [int(n) for n in re.findall(r"(?<![\w.])\d{1,4}(?![\w.]*\.)", address)][-2:] or [300, 200]
    return ("data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22 width=%22{}%22 height=%22{}%22%3E%3Crect "
            "width=%22100%25%22 height=%22100%25%22 fill=%22%2394a3b8%22/%3E%3C/svg%3E").format(numbers[0], numbers[-1])


def prepare(source):
    """The page as it is handed to the browser: local stylesheet, local pictures, nothing that plays or leads away."""
    source = source.encode("utf-8", "replace").decode()
    page = re.sub(r"<meta\b[^>]*http-equiv[^>]*>", "", source, flags=re.I)
    page = re.sub(r"<(/?)(?:video|iframe|embed|object|audio|frame)\b", r"<\1svg", page, flags=re.I)
    page = re.sub(r"(?<=src=)([\"']?)(https?://[^\"'\s>]*)", lambda m: m[1] + placeholder(m[2]) if m[1] else
                  f'"{placeholder(m[2])}"', page, flags=re.I)
    page = re.sub(r"url\(\s*[\"']?https?://([^\"')]*)[\"']?\s*\)", lambda m: f"url('{placeholder(m[1])}')", page)
    return re.sub(r"<link\b[^>]*tailwind[^>]*>", lambda _: tailwind_for(source), page, flags=re.I)


# ------------------------------------------------------------------ in the worker process

STILL = ("*,::before,::after{animation:none!important;transition:none!important;caret-color:transparent!important;"
         "pointer-events:auto!important;scroll-behavior:auto!important}")
SEE = (ROOT / "worlds/see.js").read_text("utf-8")


def look(page, session, source, wanted):
    """What a person sees of one page: a record for `Page`, everything plain JSON."""
    from PIL import Image
    page.set_content(source, wait_until="load", timeout=0)
    found = page.evaluate(SEE, [TALLEST, STILL])
    layout = session.send("DOMSnapshot.captureSnapshot", {"computedStyles": boxes.STYLES, "includePaintOrder": True})
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": found["height"], "scale": 1}
    shot = session.send("Page.captureScreenshot", {"format": "png", "optimizeForSpeed": True, "clip": clip,
                                                   "captureBeyondViewport": True})
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    seen, background = boxes.see(layout, found["elements"], np.asarray(image), MOST_BOXES)
    cells = np.asarray(image.reduce(CELL))
    return {"boxes": seen, "background": background, "cells": cells.tolist(),
            "digest": hashlib.sha256(shot["data"].encode()).hexdigest(), "picture": shot["data"] if wanted else ""}


def serve():
    """The worker: one browser. For each job on stdin, [source, is the picture wanted], a line on stdout."""
    from playwright.sync_api import sync_playwright
    jobs, results = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    page = None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=[
            "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-gpu", "--mute-audio", "--force-color-profile=srgb",
            "--font-render-hinting=none", "--disable-lcd-text"])
        while True:
            if page is None or page.url != "about:blank":  # the last page led away
                context = browser.new_context(java_script_enabled=False, service_workers="block", offline=True,
                                              viewport={"width": WIDTH, "height": HEIGHT}, accept_downloads=False)
                context.route("**/*", lambda route: route.fulfill(status=204) if route.request.is_navigation_request()
                              else route.abort())
                first, page = page is None, context.new_page()
                session = context.new_cdp_session(page)
                if first:
                    print("ready", file=results, flush=True)
            line = jobs.readline()
            if not line:
                return browser.close()
            signal.alarm(LEFT_ALONE)  # who would end a page that hangs may have been killed
            print(json.dumps(look(page, session, *json.loads(line))), file=results, flush=True)
            signal.alarm(0)


# ------------------------------------------------------------------ in this process

def find_browser():
    """Where Chromium is: $SWEET_CHROMIUM, or the first of the usual names. InputError where there is none."""
    for name in (os.environ.get("SWEET_CHROMIUM"), *BROWSERS):
        if name and shutil.which(name):
            return shutil.which(name)
    raise InputError(f"no Chromium on the PATH (SWEET_CHROMIUM names another); {INSTALL}")


class Worker:
    """A worker process and its browser, in a process group of their own."""

    def __init__(self):
        start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from worlds import browser; browser.serve()"
        self.errors, self.pages = tempfile.TemporaryFile(), 0
        self.process = subprocess.Popen([sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, start_new_session=True)
        if self.tell(b"", 60.0) != b"ready\n":
            self.kill()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines() or ["no word"]
            why = [row for mark in ("[err]", "did exit", "") for row in said[::-1] if mark in row][0]
            raise InputError(f"the browser does not start: {why.strip(' -')}; {INSTALL}")

    def tell(self, order, seconds):
        """Hand over an order and hear the next line: None when it does not come in time or the process is gone."""
        clock = threading.Timer(seconds, self.kill)
        clock.start()
        try:
            self.process.stdin.write(order)
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            return None
        finally:
            clock.cancel()
        return line if line.endswith(b"\n") else None

    def ask(self, source, wanted, seconds):
        self.pages += 1
        return self.tell(json.dumps([prepare(source), wanted]).encode() + b"\n", seconds)

    def kill(self):
        """The process, the browser that it started, and what that one started."""
        family, listed = {self.process.pid}, subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True)
        pairs = [tuple(map(int, row.split())) for row in listed.stdout.splitlines()]
        for _ in range(6):
            family |= {pid for pid, parent in pairs if parent in family}
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()


_PAGES, _WORKERS = {}, SimpleQueue()  # what was drawn, by source (without its picture); workers at rest


@atexit.register
def close():
    """Send all workers home."""
    while not _WORKERS.empty():
        _WORKERS.get().kill()


def _draw(source, wanted):
    if len(source) > MOST_CHARACTERS:
        return Page(failure=f"the source is longer than {MOST_CHARACTERS} characters")
    start = time.monotonic()
    for attempt in range(2):
        try:
            worker = _WORKERS.get_nowait()
        except Empty:
            worker = Worker()
        left = max(SECONDS / 2, 2.2 * SECONDS - (time.monotonic() - start))  # the new browser takes its share
        answer = worker.ask(source, wanted, left if attempt else SECONDS)
        if answer is not None:
            _WORKERS.put(worker) if worker.pages < RECYCLE else worker.kill()
            found = json.loads(answer)
            return Page(tuple(found["boxes"]), tuple(found["background"]), np.array(found["cells"], np.uint8),
                        found["digest"], picture=base64.b64decode(found["picture"]))
        worker.kill()
    return Page(failure=f"the browser hung or died, twice; it has {SECONDS:g} s a page")


@functools.lru_cache(maxsize=1)
def _shelf():
    """A database of pages drawn before, and the key that they were drawn under: this code and this browser."""
    browser = Path(find_browser()).resolve()
    parts = [Path(__file__).read_bytes(), Path(boxes.__file__).read_bytes(), SEE.encode(),
             f"{browser} {browser.stat().st_mtime_ns}".encode()]
    shelf = sqlite3.connect(cache_folder() / "pages.db", timeout=60.0, check_same_thread=False)
    shelf.execute("create table if not exists pages (key text primary key, page text)")
    return shelf, hashlib.sha256(b"".join(parts)).hexdigest()


def _remember(sources):
    """Take to memory what was drawn in an earlier run."""
    shelf, stamp = _shelf()
    for source in sources:
        row = shelf.execute("select page from pages where key = ?", (_key(stamp, source),)).fetchone()
        if row:
            found, background, cells, digest = json.loads(row[0])
            _PAGES[source] = Page(tuple(found), tuple(background), np.array(cells, np.uint8), digest)


def _key(stamp, source):
    return hashlib.sha256(f"{stamp} {source}".encode("utf-8", "replace")).hexdigest()


def render_pages(sources, pictures=False):
    """What each page (HTML source) looks like, in the same order. pictures: with the screenshot. What was drawn once
    is not drawn again, in later runs neither (~/.cache/sweet/pages.db)."""
    missing = [source for source in dict.fromkeys(sources) if pictures or source not in _PAGES]
    if not pictures and missing:
        _remember(missing)
    new = [source for source in missing if pictures or source not in _PAGES]
    with ThreadPoolExecutor(WORKERS) as pool:
        drawn = dict(zip(new, pool.map(lambda source: _draw(source, pictures), new)))
    if not pictures and drawn:
        _PAGES.update(drawn)
        shelf, stamp = _shelf()
        shelf.executemany("insert or ignore into pages values (?, ?)", [
            (_key(stamp, source), json.dumps([page.boxes, page.background, page.cells.tolist(), page.digest]))
            for source, page in drawn.items() if not page.failure])
        shelf.commit()
        while len(_PAGES) > 50_000:
            del _PAGES[next(iter(_PAGES))]  # the oldest
    return [drawn[source] if source in drawn else _PAGES[source] for source in sources]
