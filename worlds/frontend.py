"""The frontend: an agent designs a web page, a person looks at each draft and says what is different from the page
that they have in mind, and the reward is how much the final page looks like it.

In each turn but the last the agent shows a page, and the human, who sees both pages drawn and no source, names the most
outstanding difference in plain words ("The header should be red, not blue."). `EndpointPageHuman` asks a model
that can see (both screenshots, as data URLs); the scripted human compares boxes. The reward is in [0, 1] without a
line between success and failure, so trajectories are paired when their rewards differ by .1 (as in the paper), and RFT
imitates the best dialogues of each task.

The small world has pages of six slots: background, header, navigation bar, hero, columns, footer. A request names a
topic and now and then a slot. Three slots follow from the topic (its house style), which nobody tells the agent: a
blind first guess costs corrections, of which there are only two (two drafts, one difference each). So

- a dialogue needs credit: a draft that forgets a correction, changes what was right, or an answer without a second
  draft, spoils an otherwise good dialogue, and the end alone does not say which;
- the reference tells at once how good a draft is; without it, that has to be learned topic by topic from the rewards.

The base policy imitates a demonstrator who is blind to topics, forgets, redraws what was right, and now and then
answers early. (Now and then: where a quarter of the candidates are early answers, they fill the worse halves, and turn
pairs do not compare pages any more; docs/tuning.md.) As in worlds/backend.py, half of its documents carry the reference
in front, and there pages lean towards it.

Exercised by `python -m pytest tests/test_frontend.py`; `python sweet.py --task frontend` runs everything.
"""
import base64
import random
import re
from typing import NamedTuple

from env import ANSWER_MARKER, REFERENCE_PREFIX, Task
from machinery.files import InputError, note
from machinery.optional import require
from machinery.schema import task_key
from simulator import NO_PREFERENCE, EndpointHuman, Human, make_human
from worlds import World, pages
from worlds.browser import Browser, find_browser, fonts
from worlds.pages import COLOUR_WORDS, clip_similarity, differences, load_clip, similarity
from worlds.source import page_source

INSTRUCTIONS = (
    "You are designing a web page for a person who has described it only roughly. In each of your turns, show a "
    "complete page as HTML; the person looks at it and says what should be different. Once it is right, write \""
    + ANSWER_MARKER + "\" followed by the final page. You have {max_turns} turns at most, and the answer takes one of "
    "them.\n\n")
MAX_TURNS = 3
NAMED = 1               # differences that the scripted human names in one reply


# ------------------------------------------------------------------ the reward

class PageGrader:
    """The reward of each answer: how much its page looks like the task's reference, 0 (nothing to see) to 1 (alike).
    clip: a model whose cosine is used in the place of boxes and colours. A reference that shows nothing is reported on
    stderr, once; every answer to it is worth 0."""

    def __init__(self, browser, clip=None):
        self.browser = browser
        self.clip = clip
        self.rewards = {}  # of each (page, reference): policies repeat their answers
        self.seen = set()  # references

    def __call__(self, answers, tasks):
        pairs = [(page_source(answer), task.ground_truth) for answer, task in zip(answers, tasks)]
        if not self.clip:
            self.browser.render([source for pair in pairs for source in pair])  # all at once: two workers
        for pair, task in zip(pairs, tasks):
            if task.ground_truth not in self.seen:
                self.seen.add(task.ground_truth)
                warn_of_nothing(self.browser, task)
            if pair not in self.rewards:
                self.rewards[pair] = self.reward(*pair)
        return [self.rewards[pair] for pair in pairs]

    def reward(self, answer, reference):
        one, other = self.browser.render([answer, reference], pictures=bool(self.clip))
        if not self.clip or not one.boxes or not other.boxes:
            return similarity(one, other)
        return clip_similarity(one, other, self.clip)


def warn_of_nothing(browser, task):
    """Say that nothing can look like a reference that shows nothing."""
    page, = browser.render([task.ground_truth])
    if not page.boxes:
        why = page.failure or "there is nothing to see"
        note(f"{task.where}: broken task: its reference cannot be drawn: {why}")


def check_installed(clip):
    """InputError, before any work, where what draws and compares pages is not there."""
    require("playwright", "--task frontend")
    require("pillow", "--task frontend")
    find_browser()
    fonts()
    if clip:
        load_clip(clip)


def successes(trajectories):
    """What RFT imitates: the best dialogues of each task."""
    found, best = list(trajectories), {}
    for trajectory in found:
        task = task_key(trajectory)
        best[task] = max(best.get(task, 0.0), trajectory["reward"])
    return [trajectory for trajectory in found if trajectory["reward"] == best[task_key(trajectory)] > 0]


# ------------------------------------------------------------------ the human

RIGHT = "That is exactly what I have in mind."
LOOK = ("A designer is making a web page for you. This is how the designer's page looks now:",
        "And this is the page that you have in mind, which the designer cannot see:",
        "Tell the designer, in one or two plain sentences, the one or two most outstanding differences: what should be "
        "changed, and how. Write no HTML. If both look the same, say so.")
NO_PAGE = "I cannot see a page yet, please show me one."


class PageHuman(Human):
    """Looks at the draft and at the page in mind, both drawn, and names the most outstanding difference."""

    def __init__(self, browser):
        self.browser = browser
        self.said = {}  # to each (draft, page in mind)

    def reply(self, tasks, dialogues):
        pairs = []
        for task, dialogue in zip(tasks, dialogues):
            pairs.append((page_source(dialogue[-1]["content"]), task.hidden_information))
        drawn = self.browser.render([source for pair in pairs for source in pair])
        for pair, draft, wish in zip(pairs, drawn[::2], drawn[1::2]):
            if pair not in self.said:
                differs = " ".join(differences(draft, wish)[:NAMED])
                self.said[pair] = (differs or RIGHT)[:1000] if draft.boxes else NO_PAGE
        return [self.said[pair] for pair in pairs]


class EndpointPageHuman(EndpointHuman):
    """A model behind an OpenAI-compatible server that sees both screenshots (data URLs) and says what differs."""

    silence = RIGHT

    def __init__(self, url, cfg, browser):
        super().__init__(url, cfg)
        self.browser = browser

    def reply(self, tasks, dialogues):
        drafts = self.browser.render([page_source(dialogue[-1]["content"]) for dialogue in dialogues])
        asked = [i for i, draft in enumerate(drafts) if draft.boxes]
        texts = super().reply([tasks[i] for i in asked], [dialogues[i] for i in asked])
        found = dict(zip(asked, texts))
        return [found.get(i, NO_PAGE) for i in range(len(tasks))]

    def conversation(self, task, dialogue):
        sources = [page_source(dialogue[-1]["content"]), task.hidden_information]
        pictures = []
        for page in self.browser.render(sources, pictures=True):
            url = "data:image/png;base64," + base64.b64encode(page.picture).decode()
            pictures.append({"type": "image_url", "image_url": {"url": url}})
        words = [{"type": "text", "text": text} for text in LOOK]
        return [{"role": "user", "content": [words[0], pictures[0], words[1], pictures[1], words[2]]}]


def find_human(spec, server, browser):
    """The human that `--human` names: scripted | URL | module:Class. InputError for one who cannot see."""
    if server and server.prompt:
        raise InputError("--human-prompt: who sees pages reads none; leave it out")
    if spec == "scripted":
        return PageHuman(browser)
    if spec.startswith(("http://", "https://")):
        return EndpointPageHuman(spec, server, browser)
    if ":" in spec:
        return make_human(spec)
    raise InputError(f"--human {spec}: a local language model cannot see pages; expected scripted, the URL "
                     "of a model that can, or module:Class")


# ------------------------------------------------------------------ the small world's tasks

TOPICS = tuple("""bakery museum dentist florist brewery library zoo theatre gym hotel farm school cinema garage circus
choir bank vineyard pharmacy airline casino castle harbour market""".split())
OPENERS = ("Please design a web page for a ", "I need a page that presents our ", "We want a new web page for the ")
HOUSE = 3        # slots of a topic's house style
P_HOUSE = 0.9    # a task keeps to each of them with this probability
P_SAID = 0.12    # a request names a slot with this probability
P_EARLY = 0.04   # the demonstrator answers before the last turn with this probability, though something is wrong
CARDS = "".join(f"<div style='padding:70px;background:#4b505a;color:white'>{word}</div>" for word in ("A", "B", "C"))


class Option(NamedTuple):
    """A value of a slot: how a page has it, how a request says it, and a pattern of the words that tell it."""
    html: str
    said: str
    pattern: str


class Slot(NamedTuple):
    """A part of a page: what stands before its value, and its values."""
    before: str
    options: list


SLOTS = [Slot(before, [Option(*option) for option in options]) for before, options in (
    ("<html><body style='display:flex;flex-direction:column;gap:12px;margin:0;font-family:sans-serif;background:", (
        ("#ffffff'>", "The page background should be white.", "background should be white"),
        ("#fef3b4'>", "The page background should be light yellow.", "background should be light yellow"),
        ("#c8defa'>", "The page background should be light blue.", "background should be light blue"),
        ("#949ba5'>", "The page background should be grey.", "background should be grey"))),
    ("<header style='order:0;padding:24px;color:white;background:", (
        ("#2563eb'>Our page</header>", "The header should be blue.", "header should be blue"),
        ("#dc2626'>Our page</header>", "The header should be red.", "header should be red"),
        ("#1e9646'>Our page</header>", "The header should be green.", "header should be green"),
        ("#7e28cd'>Our page</header>", "The header should be purple.", "header should be purple"))),
    ("<nav style='padding:14px;color:white;background:#4b505a;", (
        ("order:1'>Offers</nav>", "The navigation bar should be at the top.", "bar (should be )?at the top"),
        ("order:9'>Offers</nav>", "The navigation bar should be at the bottom.", "bar (should be )?at the bottom"),
        ("display:none'></nav>", "There should be no navigation bar.", "no navigation bar"))),
    ("<section style='order:2;text-align:center'>", (
        ("<img width=1200 height=160 src=x></section>", "There should be a picture.", "a picture"),
        ("<h1>Welcome</h1></section>", "There should be a heading.", "a heading"),
        ("</section>", "There should be no picture.", "no (picture|heading)"))),
    ("<main style='order:3;display:grid;gap:12px;padding:12px;grid-template-columns:repeat(", (
        ("1,1fr)'>", "The boxes should stand one under the other.", "one under the other"),
        ("2,1fr)'>", "The boxes should stand 2 side by side.", "2 side by side"),
        ("3,1fr)'>", "The boxes should stand 3 side by side.", "3 side by side"))),
    (f"{CARDS}</main><footer style='order:8;padding:20px;color:white;", (
        ("background:#0a0a0f'>Bye</footer>", "The footer should be black.", "footer should be black|black footer"),
        ("background:#148c8c'>Bye</footer>", "The footer should be teal.", "footer should be teal|teal footer"),
        ("background:#f5821e'>Bye</footer>", "The footer should be orange.", "footer should be orange|orange footer"),
        ("display:none'></footer>", "There should be no footer.", "no footer"))),
)]
END = "</body></html>"


def _house_styles():
    """For each topic, {slot: value} of its house style. A fact of the world, the same for every seed."""
    rng = random.Random("house styles")
    styles = {}
    for topic in TOPICS:
        slots = sorted(rng.sample(range(len(SLOTS)), HOUSE))
        styles[topic] = {slot: rng.randrange(len(SLOTS[slot].options)) for slot in slots}
    return styles


HOUSE_STYLES = _house_styles()


def write_page(values):
    """Source of the page with these values, one a slot."""
    parts = [slot.before + slot.options[value].html for slot, value in zip(SLOTS, values)]
    return "".join(parts) + END


def read_page(source):
    """The values of a page of this world, or None for any other."""
    values = []
    for slot in SLOTS:
        found = [v for v, option in enumerate(slot.options) if slot.before + option.html in source]
        if not found:
            return None
        values.append(found[0])
    return tuple(values) if write_page(values) == source.strip() else None


def known_values(dialogue):
    """{slot: value} of everything that the human has said so far, the last word on each."""
    known = {}
    for message in dialogue[::2]:
        for s, slot in enumerate(SLOTS):
            said = [v for v, option in enumerate(slot.options) if re.search(option.pattern, message["content"])]
            if said:
                known[s] = said[0]
    return known


def guess(rng):
    return [rng.randrange(len(slot.options)) for slot in SLOTS]


def say_some(rng, values):
    """What a request says of a page."""
    said = [f" {slot.options[value].said}" for slot, value in zip(SLOTS, values) if rng.random() < P_SAID]
    return "".join(said)


def make_tasks(n, seed, split="train"):
    """n different tasks of a split (disjoint whatever the seed) as ColBench records. ValueError if there are fewer."""
    rng, tasks = random.Random(f"pages {seed} {split}"), {}
    for _ in range(1000 * n):
        topic, values = rng.choice(TOPICS), guess(rng)
        for slot, value in HOUSE_STYLES[topic].items():
            values[slot] = value if rng.random() < P_HOUSE else values[slot]
        said = say_some(rng, values)
        draw, opener = random.Random(f"split {topic} {values}").random(), rng.choice(OPENERS)
        if split == ("train" if draw < 0.5 else "dev" if draw < 0.7 else "test"):
            tasks.setdefault((topic, *values), Task(f"{opener}{topic}.{said}", write_page(values)))
        if len(tasks) == n:
            return list(tasks.values())
    raise ValueError(f"the {split} split holds fewer than {n} different tasks")


def judge(task, dialogue, action):
    """What the world knows about a turn: (kind, good). A draft (kind question) is good when at most two slots are
    wrong, as many as two replies can name; an answer when it is the reference."""
    values, wish = read_page(page_source(action)), read_page(task.ground_truth)
    wrong = sum(a != b for a, b in zip(values, wish)) if values and wish else len(SLOTS)
    if ANSWER_MARKER in action:
        return "answer", wrong == 0
    return ("question" if page_source(action) else "other"), wrong <= 2


def known_share(task, messages):
    """The share of slots that the last draft has right; None before the first, and for a task that is not of this
    world."""
    drafts = [page_source(message["content"]) for message in messages if message["role"] == "assistant"]
    wish = read_page(task.ground_truth)
    if not drafts or not wish:
        return None
    return sum(a == b for a, b in zip(read_page(drafts[-1]) or (), wish)) / len(wish)


# ------------------------------------------------------------------ the base policy

def phrases():
    """Every phrase of the world: one token each, so that a page is 13 tokens."""
    texts = [INSTRUCTIONS.replace("{max_turns}", str(MAX_TURNS)), *REFERENCE_PREFIX.split("{reference}"), ANSWER_MARKER,
             "\n", END, *TOPICS, *OPENERS, ".", " ", ", not ", RIGHT, NO_PAGE, "There should be a ",
             "There should be no ", "The page background should be ", "The header should be ", "The footer should be ",
             "The navigation bar should be ", "The boxes should stand ", "navigation bar", "picture", "heading",
             "heading \"Welcome\"", "footer",
             " at the top", " in the middle", " at the bottom", "at the top", "in the middle", "at the bottom",
             "one under the other", "2 side by side", "3 side by side", *COLOUR_WORDS]
    for slot in SLOTS:
        texts += [slot.before, *(option.html for option in slot.options)]
    return list(dict.fromkeys(texts))


def documents(n, seed, human):
    """Dialogues of the demonstrator with a PageHuman: a list of (messages, reference or None), a reference in half of
    them."""
    rng = random.Random(f"page documents {seed}")
    out, live, instructions = [], [], INSTRUCTIONS.replace("{max_turns}", str(MAX_TURNS))
    for _ in range(n):
        values = guess(rng)  # any style goes with any topic here: the base policy cannot learn the house styles
        said = say_some(rng, values)
        request = f"{instructions}{rng.choice(OPENERS)}{rng.choice(TOPICS)}.{said}"
        reads, task = rng.random() < 0.5, Task(request, write_page(values))
        out.append(([{"role": "user", "content": request}], task.ground_truth if reads else None))
        live.append((task, out[-1][0], values if reads else None))
    for turn in range(1, MAX_TURNS + 1):
        for _, dialogue, reads in live:
            dialogue.append({"role": "assistant", "content": _demonstrate(rng, dialogue, turn, reads)})
        live = [one for one in live if ANSWER_MARKER not in one[1][-1]["content"] and turn < MAX_TURNS]
        replies = human.reply([task for task, *_ in live], [dialogue for _, dialogue, _ in live])
        for (_, dialogue, _), reply in zip(live, replies):
            dialogue.append({"role": "user", "content": reply})
    return out


def _demonstrate(rng, dialogue, turn, reads):
    """One turn of the imperfect demonstrator; reads: the values of the reference, when it has looked at it."""
    last = read_page(dialogue[-2]["content"]) if turn > 1 else None
    p_answer = P_EARLY
    if turn == MAX_TURNS:
        p_answer = 0.98
    elif dialogue[-1]["content"] == RIGHT:
        p_answer = 0.9
    answers = rng.random() < p_answer
    values, known = guess(rng), known_values(dialogue)
    for slot in range(len(SLOTS)):
        if reads and rng.random() < (0.85 if answers else 0.6):
            values[slot] = reads[slot]
        elif slot in known and rng.random() < 0.85:
            values[slot] = known[slot]
        elif last and rng.random() < 0.85:
            values[slot] = last[slot]
    return f"{ANSWER_MARKER}\n" * answers + write_page(values)


# ------------------------------------------------------------------ the world

class Frontend(World):
    """All of the above, as everything else asks for it."""
    INSTRUCTIONS = INSTRUCTIONS
    OPTIONAL = ("test_cases",)
    REWARD = "Similarity"
    PAIRED = True
    PAPER = pages.PAPER
    LEGEND = "Pictures: the draft of each round on the left, the reference on the right."
    TURN = ("draft", "close", "distant")
    KNOWN = "Parts of the last draft that are as wished"
    OFFERS = (RIGHT, NO_PREFERENCE)
    DEFAULTS = {
        "base": {"documents": 9000},
        "rollout": {"max_turns": MAX_TURNS, "max_tokens": 24},
        "pairs": {"margin": 0.1, "per_state": 4},
        "critic": {"kind": "own"},
        "candidates": {"states": 2400},
        "actor": {"lr": 3e-3, "beta": 0.3, "nll": 0.5, "epochs": 2},
        "rft": {"lr": 3e-3, "epochs": 20},
        "multiturn": {"lr": 3e-3, "nll": 1.0, "epochs": 8},
        "eval": {"tasks": 150},
        "credit": {"states": 100, "monte_carlo_states": 6, "monte_carlo_rollouts": 16},
    }
    make_tasks = staticmethod(make_tasks)
    check_installed = staticmethod(check_installed)
    successes = staticmethod(successes)
    phrases = staticmethod(phrases)
    judge = staticmethod(judge)
    known_share = staticmethod(known_share)
    headers = staticmethod(pages.headers)
    figures = staticmethod(pages.figures)
    verdict = staticmethod(pages.verdict)
    brief = staticmethod(pages.brief)

    def __init__(self):
        self.browser = Browser()  # it keeps what it has drawn

    def human(self, spec, server, machine, seed):
        return find_human(spec, server, self.browser)

    def grader(self, clip, call_seconds):
        return PageGrader(self.browser, clip)

    def documents(self, n, seed):
        return documents(n, seed, PageHuman(self.browser))

    def evidence(self, record, grade, unfolded=False):
        return pages.evidence(self.browser, record)

    def drawn(self, text):
        return pages.drawn(self.browser, text)

    def summary(self, record, grade):
        return pages.summary(self.browser, record)
