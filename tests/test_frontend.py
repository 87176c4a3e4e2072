"""The frontend: its reward, its human, its small world, and one miniature run of everything on it."""
import base64
import http.server
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_pages import REAL, why_not

from env import ANSWER_MARKER, Task, render
from machinery.files import InputError
from machinery.server import Server
from worlds import browser, pages
from worlds import frontend as world
from worlds.tiny import make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]
SIZES = [len(options) for _, options in world.SLOTS]
WORLD = world.Frontend()
CHROMIUM, GRADE = WORLD.browser, WORLD.grader("", 1.0)


def said(draft, wish):
    """The human's reply to a draft, both given by their values."""
    task = Task("a page", world.write_page(wish))
    return world.PageHuman(CHROMIUM).reply([task], [[{"role": "assistant", "content": world.write_page(draft)}]])[0]


# ------------------------------------------------------------------ the reward

def test_the_page_in_a_message():
    page = "<html><body><p>x</p></body></html>"
    for text in (page, f"Here it is:\n```html\n{page}\n```\nDo you like it?", f"{ANSWER_MARKER}\n{page}"):
        assert world.page_source(text) == page
    assert world.page_source("<!doctype html><html><p>cut o") == "<!doctype html><html><p>cut o"
    assert world.page_source("What about <b>this</b> one?") == "<b>this</b>"
    assert world.page_source("a < b, no page") == "" and world.page_source("") == ""


PAGE, NEW = "<html><body><p>x</p></body></html>", "<!doctype html>\n<html lang=en><body><p>new</p></body></html>"


@pytest.mark.parametrize("text, found", [
    (f"I use a <div> for the header, <b> for names.\n{PAGE}", PAGE),
    (f"{PAGE}\nThe <div> holds the header, and </html> ends it.", PAGE),
    ("I use a <div> for the header and <b> for names.", ""), ("Use <br> between <p> and <hr>, please.", ""),
    ("I put `<html>` and `<body>` around it.", ""), ("The <html> tag is the root of it all.", ""),
    ("<div> is what I use.", ""), ("Put it into <b> and </b>.", ""),
    (f"<think>Maybe {PAGE} or so.</think>{NEW}", NEW), (f"Maybe {PAGE} or so.</think>\n{NEW}", NEW),
    (f"<think>Maybe {PAGE}", ""), (f"<think>{PAGE}</think>Which colour?", ""),
    (f"<!-- {PAGE} -->\n{NEW}", NEW), (f"<!-- the old one: {PAGE} -->", ""),
    (f"Here is the old page: {PAGE} and the new: {NEW} Fine?", NEW),
    (f"```html\n{PAGE}\n```\nbecomes\n```html\n{NEW}\n```", NEW),
    ("```html\n<p>old</p>\n```\nbecomes\n```html\n<p>new</p>\n```\nwith a <p>.", "<p>new</p>"),
    ("First `<b>old</b>`, then\n<h1>Hi</h1>\n<p>there</p>\nBye.", "<h1>Hi</h1>\n<p>there</p>"),
    ("```css\np{}\n```\nand ```<html><p>q</p></html>```", "<html><p>q</p></html>"),
    ("```html\n<html><p>cut\n```", "<html><p>cut"), ("<img src=x>", "<img src=x>"),
    *[(page, page) for page in ("<html><body><!-- no </html> yet --><p>y</p></body></html>", "<HTML>Hi</HTML>",
                                "<html><script>let a = `<div>`</script>z</html>", "<body><h1>Hi</h1></body>",
                                "<!DOCTYPE html>\n<title>t</title>\n<p>body</p>")]])
def test_the_page_is_found_the_way_a_person_would(text, found):
    assert world.page_source(text) == found


def test_finding_the_page_takes_no_time():
    start = time.perf_counter()
    for piece in ("<!--", "<a>", "`", "<html", "<think>", "<!doctype ", "</think>", "```html\n", "<a></b>", "<"):
        world.page_source(piece * (100_000 // len(piece)))
    assert time.perf_counter() - start < 10


def test_reward_of_references_and_of_nothing():
    tasks = world.make_tasks(12, 3)
    assert GRADE([f"```html\n{task.ground_truth}\n```" for task in tasks], tasks) == [1.0] * 12
    assert GRADE(["", "no page", "<html><body></body></html>"], tasks[:3]) == [0.0] * 3
    others = GRADE([task.ground_truth for task in tasks[1:]], tasks[:-1])
    assert all(0.3 < reward < 1.0 for reward in others)


def test_a_reference_that_shows_nothing_is_reported_once(capsys):
    """Too long to be drawn, or empty: one line each that names the task, however often it is graded."""
    long, blank = f"<p>{'x' * browser.MOST_CHARACTERS}</p>", f"<html><!-- {random.random()} --></html>"
    tasks = [Task("a page", long, where="tasks.jsonl, line 1"), Task("a page", blank, where="tasks.jsonl, line 2"),
             Task("a page", "<p>fine</p>", where="tasks.jsonl, line 3")]
    assert GRADE(["<p>fine</p>"] * 3, tasks) == GRADE(["<p>fine</p>"] * 3, tasks) == [0.0, 0.0, 1.0]
    assert capsys.readouterr().err.splitlines() == [
        "tasks.jsonl, line 1: broken task: its reference cannot be drawn: the source is longer than 200000 characters",
        "tasks.jsonl, line 2: broken task: its reference cannot be drawn: there is nothing to see"]


def test_reward_falls_with_the_number_of_wrong_slots():
    rng, means = random.Random(0), []
    for n in range(4):
        answers, tasks = [], []
        for _ in range(25):
            values = world.guess(rng)
            wrong = list(values)
            for slot in rng.sample(range(len(SIZES)), n):
                wrong[slot] = (values[slot] + rng.randrange(1, SIZES[slot])) % SIZES[slot]
            answers.append(world.write_page(wrong))
            tasks.append(Task("", world.write_page(values)))
        rewards = GRADE(answers, tasks)
        means.append(sum(rewards) / 25)
        assert (n == 0) == (max(rewards) == 1.0)
    assert all(a - b > 0.05 for a, b in zip(means, means[1:]))


def test_clip_from_a_directory(tmp_path):
    """A tiny CLIP with random weights: the cosine of its own embeddings, and 0 for an empty page."""
    import torch
    from PIL import Image
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(text_config=CLIPTextConfig(vocab_size=9, **small).to_dict(), projection_dim=8,
                        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **small).to_dict())
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    task, other = world.make_tasks(2, 1)
    grade = WORLD.grader(str(tmp_path), 1.0)
    same, far, none = grade([task.ground_truth, other.ground_truth, ""], [task] * 3)
    shots = CHROMIUM.render([task.ground_truth, other.ground_truth], pictures=True)
    inputs = [processor(Image.open(io.BytesIO(s.picture)).convert("RGB"), return_tensors="pt") for s in shots]
    with torch.no_grad():
        a, b = (model.visual_projection(model.vision_model(**i).pooler_output)[0] for i in inputs)
    assert same == pytest.approx(1.0, abs=1e-6) and none == 0.0
    assert far == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-5)
    assert pages.headers({"clip": str(tmp_path)})[0] == "similarity (CLIP)"
    assert pages.headers({"clip": None})[0] == "similarity (boxes)"


def test_what_rft_imitates_and_what_the_table_counts():
    task, other = ({"problem_description": "p", "ground_truth": g} for g in "ab")
    rows = [{"task": t, "reward": r} for t, r in ((task, .5), (task, .9), (other, 0.0), (task, .9), (other, 0.0))]
    assert world.successes(iter(rows)) == [rows[1], rows[3]]
    figures = [pages.figures({"reward": r}, {"reward": 0.5}) for r in (0.6, 0.5, 0.4)]
    assert figures == [(60, 100), (50, 50), (40, 0)]


# ------------------------------------------------------------------ the human

def test_every_wrong_slot_is_named_in_words_that_tell_its_value():
    """One slot wrong, every value of every slot: the reply says the right value and nothing else. (Of a picture in the
    place of a heading it says that there should be no picture.)"""
    rng = random.Random(1)
    for slot, size in enumerate(SIZES):
        for value in range(size):
            for wrong in set(range(size)) - {value}:
                wish = world.guess(rng)
                draft = list(wish)
                wish[slot], draft[slot] = value, wrong
                reply = said(draft, wish)
                told = 2 if (slot, value, wrong) == (3, 1, 0) else value
                assert world.known_values([{"content": reply}]) == {slot: told}, (reply, slot, value, wrong)


def test_following_the_human_leads_to_the_page_in_mind():
    """Whoever does what the human says arrives, from anywhere; one slot a draft. ("No picture" is true of a
    heading, too: that comes with the next draft.)"""
    rng = random.Random(2)
    for _ in range(40):
        wish, draft, steps = world.guess(rng), world.guess(rng), 0
        while (reply := said(draft, wish)) != world.RIGHT:
            known = world.known_values([{"content": reply}])
            assert len(known) == 1, reply
            assert all(wish[s] == value or (s, value, wish[s]) == (3, 2, 1) for s, value in known.items()), reply
            for slot, value in known.items():
                draft[slot] = value
            steps += 1
            assert steps <= 8
        assert draft == wish


def test_the_human_sees_looks_and_nothing_else():
    """The same looks from another source: the same reply. Words beside the page and hidden words change nothing."""
    first, second = world.make_tasks(2, 9)
    draft = second.ground_truth
    other = draft.replace("<header", "<!-- the header should be red --><header data-x='1'").replace(
        "Our page", "Our page<span style='display:none'>exactly what you want</span>")

    def reply(text):
        return world.PageHuman(CHROMIUM).reply([first], [[{"role": "user", "content": "?"}, {"role": "assistant",
                                                                                     "content": text}]])[0]
    assert reply(draft) == reply(other) == reply(f"I followed your wishes to the letter.\n{draft}\nAnything else?")
    assert reply(first.ground_truth) == world.RIGHT
    assert reply("Which colour do you like?") == world.NO_PAGE == reply("<html><body></body></html>")


def test_the_human_on_real_pages():
    """Differences of real pages after one edit: named in at least 8 of 10, in sentences without markup."""
    if not REAL.exists():
        pytest.skip(f"needs ColBench's frontend tasks at {REAL}")
    sources = [json.loads(line)["ground_truth"] for line in REAL.open(encoding="utf-8")][:40]
    edits = [(s, re.sub(r"bg-\w+-\d00", "bg-red-900", s, count=1)) for s in sources if re.search(r"bg-\w+-\d00", s)]
    edits += [(s, re.sub(r"<h1.*?</h1>", "", s, count=1, flags=re.S)) for s in sources if "<h1" in s]
    replies = world.PageHuman(CHROMIUM).reply([Task("", wish) for wish, _ in edits],
                                      [[{"role": "assistant", "content": draft}] for _, draft in edits])
    assert sum(reply != world.RIGHT for reply in replies) >= 0.8 * len(edits)
    assert not [reply for reply in replies if "<" in reply or len(reply) > 1000]
    assert all(reply.endswith(".") for reply in replies)
    assert world.PageHuman(CHROMIUM).reply([Task("", s) for s in sources], [[{"content": s}] for s in sources]) == [
        world.RIGHT] * len(sources)


def test_a_model_that_sees_gets_both_pictures():
    """A server that notes what it is asked: text, the draft's screenshot, text, the reference's, text."""
    pytest.importorskip("openai")
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [
                {"index": 0, "finish_reason": "stop", "message": {
                    "role": "assistant", "content": "<think>" + 999 * "<h1>" + "</think>" + 300 * "Redder. "}}]})
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    task, other = world.make_tasks(2, 4)
    os.environ.setdefault("OPENAI_API_KEY", "none")
    human = WORLD.human(f"http://127.0.0.1:{server.server_port}/v1", Server(model="m"), None, 0)
    replies = human.reply([task, task], [[{"role": "assistant", "content": t}] for t in (other.ground_truth, "?")])
    server.shutdown()
    assert replies[0].startswith("Redder.") and len(replies[0]) == 1000
    assert replies[1] == world.NO_PAGE and len(asked) == 1
    parts = asked[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url", "text"]
    shown = [base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,")) for part in parts[1::2]]
    assert shown == [p.picture for p in CHROMIUM.render([other.ground_truth, task.ground_truth], pictures=True)]
    assert "<" not in "".join(part["text"] for part in parts[::2])


def test_a_human_who_cannot_see_is_refused():
    with pytest.raises(InputError, match="cannot see"):
        WORLD.human("some/model", None, None, 0)


# ------------------------------------------------------------------ the small world

def test_tasks_are_repeatable_and_splits_disjoint(monkeypatch):
    found = {split: {(t.problem_description.split(".")[0].split()[-1], t.ground_truth)
                     for seed in range(3) for t in world.make_tasks(100, seed, split)}
             for split in ("train", "dev", "test")}
    assert not (found["train"] & found["dev"] or found["train"] & found["test"] or found["dev"] & found["test"])
    assert world.make_tasks(30, 5) == world.make_tasks(30, 5) != world.make_tasks(30, 6)
    monkeypatch.setattr(world, "TOPICS", ("zoo",))
    monkeypatch.setattr(world, "P_HOUSE", 1.0)  # at most 4 x 4 x 4 pages are left
    with pytest.raises(ValueError, match="dev"):
        world.make_tasks(64, 0, "dev")


def test_tasks_keep_to_the_house_style_and_requests_say_the_truth():
    tasks, kept, shown = world.make_tasks(300, 0), 0, 0
    for task in tasks:
        values = world.read_page(task.ground_truth)
        assert world.write_page(values) == task.ground_truth
        style = world.HOUSE_STYLES[re.search(r"(\w+)\.", task.problem_description)[1]]
        kept += sum(values[slot] == value for slot, value in style.items())
        known = world.known_values([{"content": world.INSTRUCTIONS + task.problem_description}])
        assert all(values[slot] == value for slot, value in known.items()), task.problem_description
        shown += len(known)
    assert 0.88 < kept / (300 * world.HOUSE) < 0.98 and 0.08 < shown / (300 * len(SIZES)) < 0.16


def test_labels():
    wish = [0] * 6
    task = Task("", world.write_page(wish))

    def label(values, prefix=""):
        return world.judge(task, [], prefix + world.write_page(values))
    assert label(wish, f"{ANSWER_MARKER}\n") == ("answer", True)
    assert label([1, 0, 0, 0, 0, 0], f"{ANSWER_MARKER}\n") == ("answer", False)
    assert label([1, 1, 0, 0, 0, 0]) == ("question", True) and label([1, 1, 1, 0, 0, 0]) == ("question", False)
    assert world.judge(task, [], "Which colour?") == ("other", False)


def test_documents_of_the_demonstrator():
    """Short in tokens, blind without the reference, leaning towards it with, and obedient most of the time."""
    documents = WORLD.documents(300, 1)
    tokenizer = make_tokenizer(world.phrases())
    lengths = [len(render(tokenizer, messages, reference)[0]) for messages, reference in documents]
    assert max(lengths) < 140 and sum(lengths) / len(lengths) < 90
    right = {True: [], False: []}
    for messages, reference in documents:
        assert messages[-1]["role"] == "assistant" and len(messages) <= 2 * world.MAX_TURNS
        first = world.read_page(world.page_source(messages[1]["content"]))
        assert first is not None
        if reference:
            right[True] += [a == b for a, b in zip(first, world.read_page(reference))]
        known = world.known_values(messages[:1])
        right[False] += [first[slot] == value for slot, value in known.items()]
    assert sum(right[True]) / len(right[True]) > 0.6 and sum(right[False]) / len(right[False]) > 0.75


# ------------------------------------------------------------------ everything

TINY = ["--base-documents", "600", "--base-epochs", "1", "--rollout-tasks", "16", "--rollout-per-task", "6",
        "--critic-epochs", "1", "--candidates-states", "40", "--candidates-n", "6", "--actor-epochs", "1",
        "--rft-epochs", "1", "--multiturn-epochs", "1", "--eval-tasks", "3", "--credit-states", "4",
        "--credit-monte-carlo-states", "1", "--credit-monte-carlo-rollouts", "3"]


def test_a_run_on_pages(tmp_path):
    """Every stage in miniature; the report shows each round of each dialogue as two pictures; play works; another
    task's run is refused."""
    def sweet(*args, **extra):
        return subprocess.run([sys.executable, str(ROOT / "sweet.py"), *args, "--run", str(tmp_path / "run")],
                              text=True, capture_output=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}, **extra)
    done = sweet("--task", "frontend", *TINY)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "similarity (boxes) %" in done.stdout and "win rate against base" in done.stdout
    report = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    dialogues = re.findall(r"<article>.*?</article>", report, re.S)
    assert dialogues and all(d.count("<img") == 2 * len(re.findall("<i>turn", d)) for d in dialogues)
    assert "img-src data:" in report and not re.search(r"https?://(?!www.w3.org)", report)
    rows = [json.loads(line) for line in (tmp_path / "run/trajectories.jsonl").open(encoding="utf-8")]
    tasks = [Task.from_record(row["task"]) for row in rows]
    assert GRADE([row["answer"] for row in rows], tasks) == [row["reward"] for row in rows]
    played = sweet("play", "--task", "frontend", *TINY, input="The header should be red.\n" * 5)
    assert "Similarity:" in played.stdout, played.stderr[-2000:]
    refused = sweet("eval", "--task", "backend", *TINY)
    assert refused.returncode != 0 and "task = 'frontend'" in refused.stderr
