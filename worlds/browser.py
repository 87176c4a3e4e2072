"""What a web page looks like: a real browser draws it, and what is kept is what a person sees.

    Page.boxes       the visible elements: text, place, size, colours
    Page.background  the colour behind everything
    Page.cells       mean colour of each patch of 40 x 40 pixels
    Page.picture     the screenshot, as PNG bytes

Text counts where it can be read: not hidden, off the page, covered, without size, or of the colour around it.

The browser is Debian's or yours, driven by Playwright, one in each of two worker processes. Pages are strangers: no
scripts, no network, no files. Tailwind 2.2.19, which every page of ColBench links, comes from a local copy; pictures
are replaced by plain ones of the size that their address asks for; whatever else a page asks for is refused. A worker
that does not answer in time is killed with its browser, and the page tried once more; a page that cannot be drawn has
no boxes, and says why in `Page.failure`. Not contained: a fault in Chromium itself, which runs without its own sandbox
(that one does not start as root).

A page looks the same each time and on each machine. Each one is a document of its own, so that none leaves a trace on
the next. Whatever moves is brought to rest (worlds/still.js). The fonts are the 18 files of `FONTS`, whatever else is
installed; what these cannot write (emoji, Chinese) is an empty box everywhere.

Place in the data flow: sources of pages -> `Browser.render` -> worlds/pages.py (similarity), worlds/frontend.py (the
human's eyes). Needs `pip install playwright pillow`, a Chromium, and npm, once, for pages that link Tailwind.
Exercised by `python -m pytest tests/test_pages.py`.
"""
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
import urllib.parse
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from xml.sax.saxutils import escape

import numpy as np

from machinery.files import InputError, put
from machinery.optional import pin
from worlds import boxes

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
INSTALL = ("apt install chromium-headless-shell fonts-dejavu-core fonts-liberation; pip install "
           f"{pin('playwright')} {pin('pillow')}")
TAILWIND = "tailwindcss@2.2.19"
ADDRESS = "http://page.invalid/"  # where the browser believes each page to be
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
FONTS = [f"DejaVu{family}{face}.ttf" for family in ("Sans", "SansMono", "Serif") for face in ("", "-Bold")]
FONTS += [f"Liberation{family}-{face}.ttf" for family in ("Sans", "Serif", "Mono")
          for face in ("Regular", "Bold", "Italic", "BoldItalic")]
WIDTH, HEIGHT, TALLEST, CELL = 1280, 720, 8000, 40  # pixels: the window, the part of a page that counts, a cell
MOST_BOXES, MOST_CHARACTERS = 300, 200_000
MOST_PAGES = 50_000  # kept in memory
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

    @classmethod
    def from_record(cls, boxes, background, cells, digest, picture=""):
        """A page as JSON can hold it: what `look` returns."""
        cells = np.array(cells, np.uint8)
        return cls(tuple(boxes), tuple(background), cells, digest, picture=base64.b64decode(picture))


# ------------------------------------------------------------------ the source, before a browser sees it

def cache_folder():
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sweet"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tailwind_file():
    return cache_folder() / "tailwind-2.2.19.min.css"


def keep_for_all(file, content):
    """Write a file (bytes) that all processes share, whole or not at all."""
    new = Path(f"{file}.{os.getpid()}")
    new.write_bytes(content)
    put(new, file)


def fetch_tailwind(file):
    """Tailwind with npm, once."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            subprocess.run(["npm", "pack", "--silent", TAILWIND], cwd=scratch, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(f"{file}: is not there and `npm pack {TAILWIND}` failed ({error}); put "
                             "dist/tailwind.min.css of that package there") from None
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as package:
            keep_for_all(file, package.extractfile("package/dist/tailwind.min.css").read())


def classes_of(selector):
    r"""The classes that a selector needs: {"md:w-1/2", "flex"} of ".md\:w-1\/2 .flex > a"."""
    def letter(escaped):
        return escaped[2] or chr(int(escaped[1], 16))
    names = re.findall(r"\.((?:\\[0-9a-f]{2} ?|\\.|[\w-])+)", selector)
    return {re.sub(r"\\(?:([0-9a-f]{2}) ?|(.))", letter, name) for name in names}


@functools.lru_cache(maxsize=1)
def tailwind_rules():
    """Tailwind's rules in its order: [(media query or "", rule, for each of its selectors the classes that it
    needs)]."""
    file = tailwind_file()
    if not file.exists():
        fetch_tailwind(file)
    comments, animations = r"/\*.*?\*/", r"@(?:-webkit-)?keyframes[^{]*\{(?:[^{}]*\{[^{}]*\})*\}"
    css = re.sub(f"{comments}|{animations}", "", file.read_text("utf-8"))
    rules, media = [], ""
    for opened, rule, _ in re.findall(r"(@media[^{]*)\{|([^{}]+\{[^{}]*\})|(\})", css):
        if rule:
            selectors = re.split(r"(?<!\\),", rule.split("{")[0])
            rules.append((media, rule, list(map(classes_of, selectors))))
        else:
            media = opened  # "" where a media query ends
    return rules


def tailwind_for(source):
    """The part of Tailwind that a page can use: what the browser draws stays the same, seven times as fast."""
    used = set(re.split(r"[\s\"'<>=]+", source))
    parts = []
    for media, rule, needed in tailwind_rules():
        if any(classes <= used for classes in needed):
            parts.append(f"{media}{{{rule}}}" if media else rule)
    return f"<style>{''.join(parts)}</style>"


NUMBER = r"([1-9]\d{0,3})(?!\d)"
SIZES = [re.compile(pattern.replace("N", NUMBER), re.I) for pattern in (
    r"N[x*\u00d7]N",                                                # 300x200
    r"^/N/N(?!\w)", r"/N/N[^/?]*/?\?",                               # /300/200/grey, /seed/a/300/200.jpg
    r"^/N(?!\w)", r"/N/?\?",                                        # /300.jpg, /seed/a/300
    r"(?<![a-z])(?:w|h|width|height|s|size)[=_:-]N")]               # ?w=300
PICTURE = ("<svg xmlns='http://www.w3.org/2000/svg' width='{}' height='{}'><rect width='100%' height='100%' "
           "fill='#94a3b8'/></svg>")


def picture_size(address):
    """Width and height that the address of a picture asks for. One number: a square; none: 300 x 200."""
    parts = urllib.parse.urlsplit(address)
    text = urllib.parse.unquote(re.sub("/(?:id|seed)/[^/]+", "", parts.path) + "?" + parts.query)
    sides = [re.search(fr"(?<![a-z]){side}[=_:-]{NUMBER}", text, re.I) for side in ("w(?:idth)?", "h(?:eight)?")]
    if all(sides):
        return tuple(int(side[1]) for side in sides)
    found = next(filter(None, (pattern.search(text) for pattern in SIZES)), None)
    numbers = [int(number) for number in found.groups()] if found else [300, 200]
    return numbers[0], numbers[-1]


PARTS = re.compile(r"""<!--(?:-?>|.*?(?:--!?>|\Z))
                       | <(?P<raw>noscript|script|style|textarea|title)\b.*?(?:</(?P=raw)\b[^<>]*>?|\Z)
                       | <(?P<end>/?)(?:video|iframe|embed|object|audio|frame)\b
                       | <(?P<tag>marquee|(?:meta|link)\b[^<>]*>)""", re.S | re.I | re.X)


def prepare(source):
    """The page as it is handed to the browser: local stylesheet, nothing that plays or leads away, and no <noscript>,
    which shows only where scripts are off (here, but not where a person looks)."""
    source = source.encode("utf-8", "replace").decode()

    def change(part):
        text = part[0].lower()
        if part["end"] is not None:
            return f"<{part['end']}svg"
        if text.startswith("<link") and "tailwind" in text:
            return tailwind_for(source)
        if text == "<marquee":
            return "<marquee scrollamount=0"
        return "" if text.startswith("<noscript") or text.startswith("<meta") and "http-equiv" in text else part[0]
    return PARTS.sub(change, source)


# ------------------------------------------------------------------ in the worker process

STILL, SEE = ((ROOT / "worlds" / name).read_text("utf-8") for name in ("still.js", "see.js"))


def look(page, session, wanted):
    """What a person sees of the page at `ADDRESS`: a record for `Page`, everything plain JSON."""
    from PIL import Image
    page.goto(ADDRESS, wait_until="load", timeout=0)
    program = f"({STILL})().then(() => ({SEE})({TALLEST}))"
    said = session.send("Runtime.evaluate", {"expression": program, "awaitPromise": True, "returnByValue": True})
    found = said["result"]["value"]
    layout = session.send("DOMSnapshot.captureSnapshot", {"computedStyles": boxes.STYLES, "includePaintOrder": True})
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": found["height"], "scale": 1}
    shot = session.send("Page.captureScreenshot", {"format": "png", "optimizeForSpeed": True, "clip": clip,
                                                   "captureBeyondViewport": True})
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    seen, background = boxes.see(layout, found["elements"], np.asarray(image), MOST_BOXES)
    cells = np.asarray(image.reduce(CELL))
    return {"boxes": seen, "background": background, "cells": cells.tolist(),
            "digest": hashlib.sha256(shot["data"].encode()).hexdigest(), "picture": shot["data"] if wanted else ""}


# In a sandbox a page takes no focus, does not refresh itself, and has no origin ("null").
PAGE_HEADERS = {"content-type": "text/html; charset=utf-8", "content-security-policy": "sandbox"}
PICTURE_HEADERS = {"content-type": "image/svg+xml", "access-control-allow-origin": "null",
                   "access-control-allow-credentials": "true"}


def reply(route, sources):
    """Answer what the browser asks for: the page that is due, a plain picture for any picture, nothing for the rest."""
    request = route.request
    if request.is_navigation_request():
        due = sources and request.url == ADDRESS
        route.fulfill(status=200, headers=PAGE_HEADERS, body=sources.pop()) if due else route.fulfill(status=204)
    elif request.resource_type == "image":
        route.fulfill(status=200, headers=PICTURE_HEADERS, body=PICTURE.format(*picture_size(request.url)))
    else:
        route.abort()


def serve():
    """The worker: one browser. For each job on stdin, [source, is the picture wanted], a line on stdout."""
    from playwright.sync_api import sync_playwright
    jobs, results, sources = sys.stdin, os.fdopen(os.dup(1), "w"), []
    os.dup2(2, 1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=[
            "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-gpu", "--mute-audio", "--force-color-profile=srgb",
            "--font-render-hinting=none", "--disable-lcd-text", "--blink-settings=imageAnimationPolicy=2",
            "--disable-features=RenderDocument,PaintHolding,HttpsUpgrades"])  # the first: documents start faster
        context = browser.new_context(java_script_enabled=False, service_workers="block", offline=True, locale="en-US",
                                      viewport={"width": WIDTH, "height": HEIGHT}, accept_downloads=False)
        context.route("**/*", lambda route: reply(route, sources))
        page = context.new_page()
        session = context.new_cdp_session(page)
        print("ready", file=results, flush=True)
        for line in iter(jobs.readline, ""):
            source, wanted = json.loads(line)
            sources[:] = [source]
            signal.alarm(LEFT_ALONE)  # who would end a page that hangs may have been killed
            print(json.dumps(look(page, session, wanted)), file=results, flush=True)
            signal.alarm(0)
        browser.close()


# ------------------------------------------------------------------ in this process

def find_browser():
    """Where Chromium is: $SWEET_CHROMIUM, or the first of the usual names. InputError where there is none."""
    for name in (os.environ.get("SWEET_CHROMIUM"), *BROWSERS):
        if name and shutil.which(name):
            return shutil.which(name)
    raise InputError(f"no Chromium on the PATH (SWEET_CHROMIUM names another); {INSTALL}")


@functools.lru_cache(maxsize=1)
def fonts():
    """The fontconfig file that shows the browser the files of `FONTS` and no others, and a hash of all these."""
    files = {file.name: file for folder in FONT_FOLDERS[::-1] for file in Path(folder).expanduser().rglob("*.ttf")}
    missing = [name for name in FONTS if name not in files]
    if missing:
        raise InputError(f"fonts are missing: {', '.join(missing)}; {INSTALL}")
    paths = [escape(str(files[name])) for name in FONTS]
    here = "".join(sorted({f"<dir>{os.path.dirname(path)}</dir>" for path in paths}))
    shown = "".join(f"<glob>{path}</glob>" for path in paths)
    text = (ROOT / "worlds/fonts.conf").read_text("utf-8").replace("<!-- files -->", (
        f"{here}<cachedir>{escape(str(cache_folder() / 'fontconfig'))}</cachedir>"
        f"<selectfont><rejectfont><glob>*</glob></rejectfont><acceptfont>{shown}</acceptfont></selectfont>"))
    digest = hashlib.sha256(text.encode() + b"".join(files[name].read_bytes() for name in FONTS)).hexdigest()
    file = cache_folder() / f"fonts-{digest[:16]}.conf"
    if not file.exists():
        keep_for_all(file, text.encode())
    return file, digest


class Worker:
    """A worker process and its browser, in a process group of their own."""

    def __init__(self):
        start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from worlds import browser; browser.serve()"
        self.errors, self.pages = tempfile.TemporaryFile(), 0
        self.process = subprocess.Popen([sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, start_new_session=True,
                                        env={**os.environ, "FONTCONFIG_FILE": str(fonts()[0])})
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


def send_home(workers):
    """End the workers in a queue."""
    while not workers.empty():
        workers.get().kill()


class Browser:
    """Draws pages, in worker processes, and keeps what was drawn: in memory, and for later runs in
    ~/.cache/sweet/pages.db."""

    def __init__(self):
        self.pages = {}  # by source, without their pictures
        self.workers = SimpleQueue()  # at rest
        weakref.finalize(self, send_home, self.workers)  # at the end of the program, too

    def render(self, sources, pictures=False):
        """What each page (HTML source) looks like, in the same order. pictures: with the screenshot, which is not
        kept."""
        for oldest in list(self.pages)[:-MOST_PAGES]:
            del self.pages[oldest]
        different = list(dict.fromkeys(sources))
        if pictures:
            drawn = self.draw(different, True)
            return [drawn[source] for source in sources]
        self.recall(source for source in different if source not in self.pages)
        drawn = self.draw([source for source in different if source not in self.pages], False)
        self.pages.update(drawn)
        self.keep(drawn)
        return [self.pages[source] for source in sources]

    def draw(self, sources, wanted):
        """{source: Page}, each drawn anew."""
        with ThreadPoolExecutor(WORKERS) as pool:
            return dict(zip(sources, pool.map(lambda source: self.draw_one(source, wanted), sources)))

    def draw_one(self, source, wanted):
        if len(source) > MOST_CHARACTERS:
            return Page(failure=f"the source is longer than {MOST_CHARACTERS} characters")
        start = time.monotonic()
        for attempt in range(2):
            try:
                worker = self.workers.get_nowait()
            except Empty:
                worker = Worker()
            left = max(SECONDS / 2, 2.2 * SECONDS - (time.monotonic() - start))  # the new browser takes its share
            answer = worker.ask(source, wanted, left if attempt else SECONDS)
            if answer is not None:
                self.workers.put(worker) if worker.pages < RECYCLE else worker.kill()
                return Page.from_record(**json.loads(answer))
            worker.kill()
        return Page(failure=f"the browser hung or died, twice; it has {SECONDS:g} s a page")

    # ------------------------------------------------------------------ from run to run

    @functools.cached_property
    def shelf(self):
        """A database of pages, and the key that they are drawn under: this code, these fonts, this browser."""
        browser = Path(find_browser()).resolve()
        tailwind = tailwind_file().read_bytes() if tailwind_file().exists() else b""
        code = [Path(file).read_bytes() for file in (__file__, boxes.__file__)]
        age = f"{browser} {browser.stat().st_mtime_ns}"
        parts = [*code, STILL.encode(), SEE.encode(), fonts()[1].encode(), tailwind, age.encode()]
        shelf = sqlite3.connect(cache_folder() / "pages.db", timeout=60.0, check_same_thread=False)
        shelf.execute("create table if not exists pages (key text primary key, page text)")
        return shelf, hashlib.sha256(b"".join(parts)).hexdigest()

    def key(self, source):
        return hashlib.sha256(f"{self.shelf[1]} {source}".encode("utf-8", "replace")).hexdigest()

    def recall(self, sources):
        """Take to memory what was drawn in an earlier run."""
        for source in sources:
            query = "select page from pages where key = ?"
            row = self.shelf[0].execute(query, (self.key(source),)).fetchone()
            if row:
                self.pages[source] = Page.from_record(*json.loads(row[0]))

    def keep(self, drawn):
        rows = []
        for source, page in drawn.items():
            if not page.failure:
                record = page.boxes, page.background, page.cells.tolist(), page.digest
                rows.append((self.key(source), json.dumps(record)))
        if rows:
            self.shelf[0].executemany("insert or ignore into pages values (?, ?)", rows)
            self.shelf[0].commit()
