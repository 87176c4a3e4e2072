"""Pages in a real browser: what is seen, that it is the same each time, that hostile pages do no harm, and what
similarity makes of graded damage to real pages."""
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hostile_pages import hostile_pages

from machinery.files import InputError
from worlds import browser, pages

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared/colbench/frontend.jsonl"


def why_not():
    """Why no page can be drawn here, or None."""
    try:
        import PIL  # noqa: F401
        import playwright  # noqa: F401
        browser.find_browser()
    except (ImportError, InputError) as error:
        return f"{error}; needs: {browser.INSTALL}"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))


@pytest.fixture(scope="module", autouse=True)
def a_busy_machine_is_no_fault():
    """Pages have ten times their time here: only the tests of that limit depend on the clock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(browser, "SECONDS", 15.0)
        yield


def texts(source):
    page, = browser.render_pages([source])
    assert not page.failure, page.failure
    return [box["text"] for box in page.boxes if box["text"]]


@pytest.fixture(scope="module")
def real():
    """The reference pages of ColBench's frontend tasks: (sources, what they look like)."""
    if not REAL.exists():
        pytest.skip(f"needs ColBench's frontend tasks at {REAL}")
    sources = [json.loads(line)["ground_truth"] for line in REAL.open(encoding="utf-8")]
    return sources, browser.render_pages(sources)


# ------------------------------------------------------------------ what is seen

def test_boxes_of_a_page_by_hand():
    page, = browser.render_pages(["""<html><body style="margin:0;background:#ff0000"><div style="width:300px;
        height:100px;background:#00ff00"></div><h1 style="margin:0;font-size:40px;color:#0000ff">Two words</h1>
        <img src="https://picsum.photos/id/1/200/50"></body></html>"""])
    block, heading, image = page.boxes
    assert page.background == (255, 0, 0) and block["rect"] == [0, 0, 300, 100] and block["back"] == [0, 255, 0]
    assert heading["text"] == "Two words" and heading["ink"] == [0, 0, 255] and heading["font"] == 40
    assert heading["rect"][0] == 0 and 100 <= heading["rect"][1] <= 101  # the font says where in its line
    assert 150 < heading["rect"][2] < 250
    assert image["tag"] == "img" and image["rect"][2:] == [200, 50]
    assert page.cells.shape == (18, 32, 3) and tuple(page.cells[0, 0]) == (0, 255, 0)
    assert tuple(page.cells[-1, -1]) == (255, 0, 0)


HIDDEN = ["display:none", "visibility:hidden", "opacity:0", "color:white", "position:absolute;left:-5000px",
          "font-size:0", "height:0;overflow:hidden", "text-indent:-9999px", "position:absolute;clip:rect(0,0,0,0)",
          "transform:scale(0)", "-webkit-text-fill-color:transparent", "color:transparent", "clip-path:circle(0)",
          "filter:opacity(0)", "position:absolute;top:9000px", "color:rgba(0,0,0,.01)",
          "mask-image:linear-gradient(transparent,transparent)"]
COVERS = ["<div style='position:absolute;inset:60px 0 0 0;background:#eee'></div>",
          "<img style='position:absolute;pointer-events:none;left:0;top:60px;width:900px;height:900px' src=x>",
          "<p style='position:absolute;top:40px;background:white;width:800px;height:99px'>--- -- -----</p>"]


def test_hidden_text_is_not_seen_and_gains_nothing():
    """Every way of hiding the reference's words: none is read, and none is worth more than hiding other words."""
    top, words, right = "<html><body><h1>A heading</h1>", "<p style='{}'>{}</p>", "The words of the reference"

    def hidden(text):
        return ([top + words.format(style, text) for style in HIDDEN]
                + [top + words.format("", text) + cover for cover in COVERS])
    seen, reference, plain = browser.render_pages([top + words.format("", right), top + words.format("", right)
                                                   + "<p>More</p>", top])
    assert [box["text"] for box in seen.boxes] == ["A heading", right]
    assert pages.similarity(plain, reference) < pages.similarity(seen, reference) - 0.1 < 0.9
    others = browser.render_pages(hidden("Zzz zzzzz zz zzz zzzzzzzzz"))
    for source, page, other in zip(hidden(right), browser.render_pages(hidden(right)), others):
        assert right not in [box["text"] for box in page.boxes], source
        assert pages.similarity(page, reference) <= pages.similarity(other, reference) + 0.001, source


def test_the_same_page_gives_the_same_bytes_in_any_process(real):
    code = ("import sys, json, hashlib; sys.path.insert(0, sys.argv[1]); from worlds import browser\n"
            "browser.SECONDS = 15.0; sources = json.load(sys.stdin)\n"
            "print(json.dumps([hashlib.sha256(p.picture + p.cells.tobytes() + repr(p.boxes).encode()).hexdigest()\n"
            "                  for p in browser.render_pages(sources, pictures=True)]))")
    sources = real[0][:40] + ["<style>@keyframes k{to{left:900px}}p{position:absolute;animation:k 1s infinite}</style>"
                              "<p>moving</p>", "<video autoplay src=a.mp4></video><iframe src=b></iframe>x"]
    runs = [subprocess.run([sys.executable, "-c", code, str(ROOT)], input=json.dumps(order), text=True,
                           capture_output=True, check=True).stdout for order in (sources, sources[::-1])]
    first, second = (json.loads(run) for run in runs)
    assert first == second[::-1] and len(set(first)) > 40


def test_tailwind_cut_to_a_page_draws_the_same_pixels(real):
    whole = "<style>" + (browser.cache_folder() / "tailwind-2.2.19.min.css").read_text("utf-8") + "</style>"
    link = re.compile(r"<link\b[^>]*tailwind[^>]*>")
    sources = [s for s in real[0] if link.search(s)][:6]
    cut, limit = browser.render_pages(sources, pictures=True), browser.MOST_CHARACTERS
    try:
        browser.MOST_CHARACTERS = 10 ** 8
        uncut = browser.render_pages([link.sub(lambda _: whole, s) for s in sources], pictures=True)
    finally:
        browser.MOST_CHARACTERS = limit
    assert all(a.picture == b.picture and a.picture for a, b in zip(cut, uncut))


# ------------------------------------------------------------------ one look, two sources

BODY = "<!doctype html><html><body style='margin:0;font-family:sans-serif'>"
REST = "<p style='margin:20px'>Our bread is baked at night.</p><a style='background:#ddd'>Order</a>"
STRIPES = ("data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22 width=%22300%22 height=%2290%22%3E%3Crect "
           "width=%2250%22 height=%2290%22 fill=%22red%22/%3E%3C/svg%3E")
ONE_LOOK = {
    "a wrapper's background": (
        "<style>body{background:#fde68a}</style><h1 style='margin:9px'>Title</h1>",
        "<div style='background:#fde68a;position:absolute;inset:0;z-index:-1'></div><h1 style='margin:9px'>Title</h1>"),
    "gradient": ("<div style='background:red;padding:20px'>Head</div>",
                 "<div style='background:linear-gradient(red,red);padding:20px'>Head</div>"),
    "gradient behind": (
        "<div style='background:linear-gradient(#f00,#00f);padding:20px'>Head</div>",
        "<div style='position:relative;padding:20px'><div style='position:absolute;inset:0;z-index:-1;"
        "background:linear-gradient(#f00,#00f)'></div><span>Head</span></div>"),
    "oklch": ("<div style='background:rgb(0,128,0)'>Head</div>",
              "<div style='background:oklch(51.975% 0.17686 142.5)'>Head</div>"),
    "lab and color()": ("<div style='background:#f00;color:#00f'>Head</div>",
                        "<div style='background:color(srgb 1 0 0);color:lab(29.57% 68.3 -112.03)'>Head</div>"),
    "a named colour": ("<div style='background:rebeccapurple;color:white'>Head</div>",
                       "<div style='background:#663399;color:hsl(0 0% 100%)'>Head</div>"),
    "rgba": ("<div style='background:#ff8080'>Head</div>", "<div style='background:rgba(255,0,0,.498)'>Head</div>"),
    "opacity": ("<div style='background:#ff8080;height:40px'></div>",
                "<div style='background:red;opacity:.498;height:40px'></div>"),
    "filter": ("<div style='background:#00f;height:40px'></div>",
               "<div style='background:#ff0;height:40px;filter:invert(1)'></div>"),
    "blend": ("<div style='background:#f00;height:40px'></div>", "<div style='background:#ff0'><div style='"
              "mix-blend-mode:multiply;background:#f0f;height:40px'></div></div>"),
    "capitals": ("<h2>ABOUT US</h2>", "<h2 style='text-transform:uppercase'>About us</h2>"),
    "first capitals": ("<p>Our Fresh Bread</p>", "<p style='text-transform:capitalize'>our fresh bread</p>"),
    "before and after": (
        "<p>Pre words and more</p>", "<style>.a::before{content:'Pre '}.a::after{content:attr(title)}</style>"
        "<p class=a title=' more'>words and</p>"),
    "only before": ("<p>Pre words</p>", "<style>.a::before{content:'Pre words'}</style><p class=a></p>"),
    "a counter": ("<p>1. Step</p><p>2. Step</p>", "<style>.a{counter-increment:s}.a::before{content:counter(s) '. '}"
                  "</style><p class=a>Step</p><p class=a>Step</p>"),
    "quotes": ("<p>\u201cFine bread\u201d</p>", "<p><q>Fine bread</q></p>"),
    "a word in a span": ("<p>Fresh bread and cake</p>", "<p>Fresh <span>bread</span> and <a>ca</a>ke</p>"),
    "bold": ("<p>Fresh <b>bread</b></p>", "<p>Fresh <span style='font-weight:bold'>bread</span></p>"),
    "all in a span": ("<h1>Fresh bread</h1>", "<h1><span>Fresh bread</span></h1>"),
    "a heading by style": ("<h1>Fresh bread</h1>",
                           "<div style='font-size:2em;font-weight:bold;margin:.67em 0'>Fresh bread</div>"),
    "dark": ("<style>body{background:#121212;color:white}</style><p>Night shop</p>",
             "<style>html{color-scheme:dark}</style><p>Night shop</p>"),
    "border by shadow": ("<div style='border:2px solid #00f;padding:18px'>Card</div>",
                         "<div style='box-shadow:inset 0 0 0 2px #00f;padding:20px'>Card</div>"),
    "border by outline": ("<div style='margin:20px;border:2px solid #00f;padding:18px'>Card</div>",
                          "<div style='margin:22px;outline:2px solid #00f;padding:18px'>Card</div>"),
    "bullets": ("<ul><li>Rye</li><li>Oat</li></ul>", "<div style='margin:16px 0;padding-left:40px'><div style='display:"
                "list-item'>Rye</div><div style='display:list-item'>Oat</div></div>"),
    "a plain list": ("<ul style='list-style:none'><li>Rye</li><li>Oat</li></ul>",
                     "<div style='margin:16px 0;padding-left:40px'><div>Rye</div><div>Oat</div></div>"),
    "table and grid": (
        "<table cellspacing=0 cellpadding=0><tr><td width=300>Rye</td><td width=300>Oat</td></tr></table>",
        "<div style='display:grid;grid-template-columns:300px 300px'><div>Rye</div><div>Oat</div></div>"),
    "flex and grid": (
        "<style>b{width:300px;background:#ccf}</style><div style='display:flex'><b>Rye</b><b>Oat</b></div>",
        "<style>b{background:#ccf}</style><div style='display:grid;grid-template-columns:300px 300px;width:600px'>"
        "<section style='background:#ccf'><b>Rye</b></section><b>Oat</b></div>"),
    "br": ("<p>One<br>Two</p>", "<div style='margin:16px 0'><div>One</div><div>Two</div></div>"),
    "nbsp": ("<p>One two</p>", "<p>One&nbsp;two</p>"),
    "svg": ("<div style='height:50px;width:300px;background:#080'></div>", "<svg width=300 height=50 style='display:"
            "block'><rect width=300 height=50 fill='#080'/></svg>"),
    "a background picture": (f"<img src='{STRIPES}' style='display:block'>",
                             f"<div style='width:300px;height:90px;background:url(\"{STRIPES}\")'></div>"),
    "nested": ("<header style='background:#008;color:#fff;padding:20px'>Shop</header>",
               "<header><div style='background:#008;color:#fff;padding:20px'><div>Shop</div></div></header>"),
    "painted by before": (
        "<div style='height:60px;background:#8f8'>Bar</div>",
        "<style>.q{position:relative;height:60px;z-index:0}.q::before{content:'';position:absolute;inset:0;"
        "background:#8f8;z-index:-1}</style><div class=q>Bar</div>"),
    "a button's span": ("<a style='background:#c00;color:#fff'>Buy</a>",
                        "<a style='background:#c00'><span style='color:#fff'>Buy</span></a>"),
    "a plain button": ("<button style='all:unset'>Buy</button>", "<span>Buy</span>"),
    "a line": ("<hr style='border:0;height:2px;background:#888;margin:8px 0'>",
               "<div style='height:2px;background:#888;margin:8px 0'></div>"),
    "white on white": ("<div style='padding:10px'><h2>A b</h2><p>C d</p></div>", "<main style='padding:10px;background:"
                       "#fff'><section style='background:white'><h2>A b</h2><p>C d</p></section></main>"),
    "zoom": ("<p style='font-size:32px;margin:32px 0'>Big</p>", "<p style='zoom:2'>Big</p>"),
}


@pytest.mark.parametrize("look", ONE_LOOK)
def test_one_look_from_two_sources(look):
    """Equal pictures are equal, and one word more is all that differs, whichever way the page is written."""
    one, other = (BODY + source for source in ONE_LOOK[look])
    slight = REST.replace("night", "noon")
    seen = browser.render_pages([one + REST, other + REST, one + slight, other + slight], pictures=True)
    a, b, slight_a, slight_b = seen
    assert a.picture == b.picture and slight_a.picture == slight_b.picture != a.picture
    assert pages.similarity(a, b) == 1.0 and pages.differences(a, b) == []
    wanted = pages.differences(slight_a, a)
    assert len(wanted) == 1 and "noon" in wanted[0]
    for draft, wish in ((slight_b, a), (slight_a, b), (slight_b, b)):
        assert pages.similarity(draft, wish) == pytest.approx(pages.similarity(slight_a, a), abs=0.01)
        assert pages.differences(draft, wish) == wanted
    assert a.background == b.background


def test_nearly_one_look():
    """Letters that come out a shade different: next to nothing is lost, and the human has nothing to say."""
    pairs = [("<p style='color:#808080'>Grey words</p>", "<p style='opacity:.498'>Grey words</p>"),
             ("<div style='background:#00f;color:#fff'>Head</div>",
              "<div style='background:#ff0;color:#000;filter:invert(1)'>Head</div>"),
             ("<div style='height:30px;line-height:30px'>Words</div>",
              "<svg width=300 height=30 style='display:block'><text x=0 y=21 font-size=16>Words</text></svg>")]
    for one, other in pairs:
        a, b = browser.render_pages([BODY + one + REST, BODY + other + REST])
        assert pages.similarity(a, b) > 0.998 and pages.differences(a, b) == []


def test_what_a_colour_scheme_paints():
    page, white = browser.render_pages(["<html style='color-scheme:dark'><p>Night</p>", "<p>Day</p>"])
    assert max(page.background) < 40 and page.boxes[0]["ink"] == [255, 255, 255]
    assert tuple(white.background) == (255, 255, 255)
    assert "The page background should be white, not black." in pages.differences(page, white)


def test_nothing_to_see_is_worth_nothing():
    for source in ("", "<html></html>", "<body style='background:#abc'>", "<p> </p>"):
        page, again = browser.render_pages([source, source + " "], pictures=True)
        assert page.picture == again.picture and page.boxes == ()
        assert pages.similarity(page, again) == 0.0


# ------------------------------------------------------------------ hostile pages

@pytest.fixture
def server():
    """A web server on this machine that notes who asks for what."""
    asked = []

    class Note(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<h1>reached</h1>")

        def log_message(self, *_):
            pass
    local = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Note)
    threading.Thread(target=local.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{local.server_port}", asked
    local.shutdown()


def test_hostile_pages_do_no_harm(server, monkeypatch):
    """No page reaches a server or a file, every page gets an answer, and the next honest page looks as it always
    does."""
    host, asked = server
    hostile = hostile_pages(host)
    honest = "<html><body><h1>An honest page</h1><p>after all</p></body></html>"
    before, = browser.render_pages([honest], pictures=True)
    must = ("loop", "alert", "redirect", "hard redirect", "links", "file", "base", "odd")
    for name, source in hostile.items():
        monkeypatch.setattr(browser, "SECONDS", 15.0 if name in must else 1.5)
        page, = browser.render_pages([source])
        seen = " ".join(box["text"] for box in page.boxes)
        assert "root:" not in seen and "reached" not in seen, name
        assert page.failure or page.boxes or name in ("no letters", "deep", "table"), name
        assert pages.similarity(page, before) < 0.9
        monkeypatch.setattr(browser, "SECONDS", 15.0)
        after, = browser.render_pages([honest], pictures=True)
        assert after.picture == before.picture and after.boxes == before.boxes, name
    for name in must:
        assert "after" in texts(hostile[name]), name
    assert asked == []


def test_a_browser_that_dies_or_hangs_is_replaced(monkeypatch):
    """Killed under a page: drawn by another one. Never done: tried twice, then a failure with its reason. No process
    is left over."""
    browser.close()
    texts(f"<p>warm {random.random()}</p>")
    worker = browser._WORKERS.get_nowait()
    browser._WORKERS.put(worker)
    worker.process.kill()
    worker.process.wait()
    text = f"drawn all the same {random.random()}"
    assert texts(f"<p>{text}</p>") == [text]
    assert worker.process.poll() is not None
    deaf = browser.Worker()
    deaf.process.send_signal(signal.SIGSTOP)
    assert deaf.tell(200_000 * b"x", 0.1) is None and deaf.process.wait() == -signal.SIGKILL
    monkeypatch.setattr(browser, "SECONDS", 0.0)
    page, = browser.render_pages([f"<p>no time for this one {random.random()}</p>"])
    assert page.boxes == () and "twice" in page.failure
    assert pages.similarity(page, page) == 0.0
    browser.close()
    alive = subprocess.run(["ps", "-eo", "ppid=,args="], capture_output=True, text=True).stdout
    assert not [row for row in alive.splitlines() if "browser.serve()" in row and "ps -eo" not in row
                and row.split()[0] == str(os.getpid())]


def test_without_a_browser_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("SWEET_CHROMIUM", "")
    with pytest.raises(InputError, match="apt install"):
        browser.find_browser()


@pytest.mark.parametrize("script, why", [("exit 3", "exitCode=3"), ("echo no libnss3.so >&2; exit 1", "libnss3")])
def test_a_browser_that_does_not_start_is_an_error_that_says_why(monkeypatch, tmp_path, script, why):
    (tmp_path / "chromium").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "chromium").chmod(0o755)
    monkeypatch.setenv("SWEET_CHROMIUM", str(tmp_path / "chromium"))
    with pytest.raises(InputError, match=f"the browser does not start: .*{why}.*; apt install"):
        browser.Worker()


# ------------------------------------------------------------------ similarity

def test_real_pages_against_themselves_and_others(real):
    _, seen = real
    assert not [page.failure for page in seen if page.failure]
    assert [pages.similarity(page, page) for page in seen] == [1.0] * len(seen)
    others = [pages.similarity(page, seen[(i + k) % len(seen)]) for i, page in enumerate(seen) for k in (1, 7, 33)]
    assert np.mean(others) < 0.8
    assert max(others) < 1.0
    blank, = browser.render_pages(["<html><body></body></html>"])
    assert {pages.similarity(blank, page) for page in seen} == {0.0}


def test_lab_of_known_colours():
    """White, black, and the sRGB primaries, from the tables (D65)."""
    known = {(255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20),
             (0, 255, 0): (87.73, -86.18, 83.18), (0, 0, 255): (32.30, 79.19, -107.86)}
    assert np.allclose(pages.lab(list(known)), list(known.values()), atol=0.3)


COLOURS = "red green blue yellow purple pink indigo gray".split()


def edits_of(source, rng, n):
    """n edits that a designer could make, each in a place of its own: [(start, end, new text)]. Another colour,
    another text, an element less, another size."""
    elements = re.finditer(r"<(p|h1|h2|h3|a|button|li|img|section|footer|nav)\b[^>]*>(?:[^<]*</\1>)?", source)
    colours = re.finditer(r"(?<=[\s\"])(bg|text)-(?:%s|white)(?:-\d00)?(?=[\s\"])" % "|".join(COLOURS), source)
    words = re.finditer(r"(?<=>)\s*([A-Z][^<>]{3,})(?=<)", source)
    sizes = re.finditer(r"(?<=[\s\"])(p|py|mb|text)-(\d|\dxl|lg)(?=[\s\"])", source)
    lorem = "Lorem ipsum dolor sit amet elit sed eiusmod tempor magna".split()
    kinds = [[(m.span(), "") for m in elements],
             [(m.span(), f"{m[1]}-{rng.choice(COLOURS)}-{rng.choice((300, 800))}") for m in colours],
             [(m.span(), " ".join(rng.sample(lorem, 4))) for m in words],
             [(m.span(), "text-6xl" if m[1] == "text" else f"{m[1]}-20") for m in sizes]]
    chosen = []
    for _ in range(50 * n):
        (start, end), new = rng.choice(rng.choice([kind for kind in kinds if kind]))
        if len(chosen) < n and all(end <= a or start >= b for a, b, _ in chosen):
            chosen.append((start, end, new))
    return chosen


def chain_of(source, rng, steps=(0, 1, 3, 8)):
    """A page after its first 0, 1, 3 and 8 edits."""
    edits, chain = edits_of(source, rng, steps[-1]), []
    for n in steps:
        page = source
        for start, end, new in sorted(edits[:n], reverse=True):
            page = page[:start] + new + page[end:]
        chain.append(page)
    return chain


def test_graded_damage_is_ordered(real):
    """Pages after 1, 3 and 8 edits: at least 95 % of the chains fall in similarity at every step, and one edit is
    told from another task's page with an AUC of at least .97. A chain with a step that changes no pixel is drawn
    again."""
    rng, chains = random.Random(0), []
    for source in real[0]:
        for _ in range(20):
            chain = chain_of(source, rng)
            seen = browser.render_pages(chain, pictures=True)
            if all(a.picture != b.picture for a, b in zip(seen, seen[1:])):
                chains.append([pages.similarity(page, seen[0]) for page in seen])
                break
    assert len(chains) >= 50
    ordered = np.mean([all(a > b for a, b in zip(values, values[1:])) for values in chains])
    one = [values[1] for values in chains]
    other = [pages.similarity(page, real[1][(i + k) % 100]) for i, page in enumerate(real[1]) for k in (1, 7)]
    area = np.mean([[(a > b) + 0.5 * (a == b) for b in other] for a in one])
    print(f"{len(chains)} chains, {ordered:.3f} ordered, AUC {area:.4f}")
    assert ordered >= 0.95 and area >= 0.97
