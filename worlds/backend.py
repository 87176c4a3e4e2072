"""The small world: procedural ColBench-style backend tasks that a language model of 114k parameters can collaborate on.

A task asks for a function that tidies a list of something ("invoices", "tides", ...). What tidying means is hidden:
three of six steps (keep, change, order, ...), each in one of four ways. *Which* steps matter depends on the topic,
and nobody tells the agent: it can ask about every step, but has only three questions, and a question about a step that
does not matter is a turn lost. So

- credit assignment is necessary: a dialogue fails because of one wasted question, or one guess in the answer, among
  good turns;
- the reference matters for questions as well as for answers: from the request alone a question's worth can only be
  learned topic by topic; whoever reads the hidden function sees at once which steps it has.

The base policy imitates a demonstrator with faults: blind to the topic, it asks about any step, sometimes twice,
answers too early, and guesses what it has not asked. In half of its training documents the reference stands in front,
in the critic's format; there most questions are about steps that the reference has, and most answers copy it. That
stands in for what a pretrained model brings along: knowing that a question belongs to a solution. The agent never
sees the reference.

Exercised by `python -m pytest tests/test_world.py`; `python sweet.py base` trains the base policy (about a minute).
"""
import random
from dataclasses import dataclass

from env import ANSWER_MARKER, INSTRUCTIONS, REFERENCE_PREFIX, Task
from machinery.files import InputError
from worlds import World, tiny
from worlds.tiny import Base as Base

MAX_TURNS = 4
RELEVANT = 3            # steps that matter to a topic
P_REVEALED = 0.35      # a step that matters is named in the request with this probability
VALUE_WEIGHTS = (0.55, 0.15, 0.15, 0.15)


@dataclass(frozen=True)
class Step:
    """One step of tidying: how it is asked for, its line of code around the value, its values as (said, written)."""
    ask: str
    before: str
    after: str
    values: tuple

    def line(self, value):
        return f"    {self.before}{self.values[value][1]}{self.after}\n"


STEPS = (
    Step(", which values should I keep?", "values = [v for v in values if ", "]",
         (("keep only the even ones", "v % 2 == 0"), ("keep only the odd ones", "v % 2 == 1"),
          ("drop everything below zero", "v >= 0"), ("drop everything above ten", "v <= 10"))),
    Step(", what should I do about repeats?", "values = [v for i, v in enumerate(values) if ", "]",
         (("keep the first of equal ones", "v not in values[:i]"), ("drop what occurs twice", "values.count(v) == 1"),
          ("keep the last of equal ones", "v not in values[i + 1:]"),
          ("drop whatever is unique", "values.count(v) > 1"))),
    Step(", should each value be changed?", "values = [", " for v in values]",
         (("double each one", "2 * v"), ("square each one", "v * v"),
          ("flip every sign", "-v"), ("add five to each one", "v + 5"))),
    Step(", how should they be ordered?", "values = sorted(values, ", ")",
         (("put the smallest first", "key=int"), ("put the largest first", "reverse=True"),
          ("order by absolute size", "key=abs"), ("order by the last digit", "key=lambda v: v % 10"))),
    Step(", should I cut the list?", "values = values[", "]",
         (("return just the first three", ":3"), ("return just the last three", "-3:"),
          ("return every second one", "::2"), ("leave out the first one", "1:"))),
    Step(", what should come at the end?", "values = values + [", "]",
         (("append the total", "sum(values)"), ("append how many there are", "len(values)"),
          ("append the largest", "max(values, default=0)"), ("append the smallest", "min(values, default=0)"))),
)
TOPICS = tuple("""
invoices tides orders scores parcels meals rainfalls wages rents votes fares heights weights depths prices loans bets
rides
shifts bills taxes grants fines tips sales gifts stocks bonds calls visits clicks steps miles laps goals points ranks
grades ages dates
""".split())
OPENERS = ("Write a Python function that tidies a list of ", "I need a Python function to clean up our ",
           "Please write a function that prepares the ", "We want a small function for our list of ")
SIGNATURE = ".The signature of the function is: def tidy_"
HINT = ". Please make sure to "
POLITE = ("", "", "Thank you. ", "All right. ")
STEMS = ("For the ", "One question about the ", "Regarding the ", "As to the ")
CONSENT = ("Please ", "I would like you to ", "Yes, ", "It should ")
NO_PREFERENCE = ("I have no preference there.", "That does not matter to me.", "I don't know, whatever you think.",
                 "No wishes about that.", "Nothing special is needed there.", "I never thought about that.")
LAST_WORDS = " Now I have to go, please send me the result."
CONFUSED = ("Sorry, I did not understand the question.", "I am not sure what you are asking.",
            "Could you put that differently?")


def steps_of(topics):
    """For each topic, the sorted steps that matter to it. A fact of the world, the same for every seed."""
    rng = random.Random("topics")
    return {topic: tuple(sorted(rng.sample(range(len(STEPS)), RELEVANT))) for topic in topics}


TOPIC_STEPS = steps_of(TOPICS)


LINES = {}  # a line of code: (step, value)
for step, spec in enumerate(STEPS):
    LINES |= {spec.line(value)[:-1]: (step, value) for value in range(4)}


# ------------------------------------------------------------------ tasks

def write_function(topic, values):
    """Source of the function for {step: value}: the steps in the world's order."""
    lines = "".join(STEPS[step].line(values[step]) for step in sorted(values))
    return f"def tidy_{topic}(values):\n{lines}    return values"


def read_function(source):
    """{step: value} of the world's lines found in a source; empty for code that is not of this world."""
    return dict(sorted(LINES[line] for line in source.split("\n") if line in LINES))


def split_of(topic, values):
    """train, dev or test, decided by what is hidden: splits are disjoint by construction, whatever the seed."""
    draw = random.Random(f"split {topic} {sorted(values.items())}").random()
    return "train" if draw < 0.5 else "dev" if draw < 0.7 else "test"


def make_tasks(n, seed, split="train", topic_steps=TOPIC_STEPS, write=write_function):
    """n different tasks of a split as ColBench records (see Task). ValueError when the split is asked for more than
    it holds. topic_steps, write: of this world, or of one that is built on it."""
    rng, tasks = random.Random(f"tasks {seed} {split}"), {}
    topics = list(topic_steps)
    for _ in range(1000 * n):
        topic = rng.choice(topics)
        values = {step: rng.choices(range(4), VALUE_WEIGHTS)[0] for step in topic_steps[topic]}
        shown = [step for step in values if rng.random() < P_REVEALED]
        source = write(topic, values)
        if split_of(topic, values) == split and source not in tasks:
            tasks[source] = Task(_request(rng, topic, values, shown), source, _test_cases(rng, topic))
        if len(tasks) == n:
            return list(tasks.values())
    raise ValueError(f"the {split} split holds fewer than {n} different tasks")


def _request(rng, topic, values, shown):
    hints = "".join(HINT + STEPS[step].values[values[step]][0] for step in shown)
    return f"{rng.choice(OPENERS)}{topic}{hints}{SIGNATURE}{topic}(values)"


def _test_cases(rng, topic):
    """Ten calls on lists of 7 to 10 numbers, some of them repeated: enough to tell different functions apart."""
    inputs = []
    for _ in range(10):
        length = rng.randint(4, 7)
        inputs.append([rng.randint(-15, 25) for _ in range(length)])
    return {f"test{k}": f"tidy_{topic}({row + rng.choices(row, k=3)})" for k, row in enumerate(inputs, 1)}


# ------------------------------------------------------------------ the human

def asked_step(question):
    """The step that a question asks about, or None."""
    return next((i for i, step in enumerate(STEPS) if step.ask in question), None)


def respond(task, dialogue, rng, asked_step=asked_step):
    """The scripted human: answers from the hidden solution, in varied words, and says so when the question is not in
    it."""
    step, values = asked_step(dialogue[-1]["content"]), read_function(task.hidden_information)
    if not values:
        raise InputError(f"{task.where}: the scripted human knows the small world's tasks; your own need a --human")
    if step is None:
        reply = rng.choice(CONFUSED)
    elif step not in values:
        reply = rng.choice(NO_PREFERENCE)
    else:
        reply = f"{rng.choice(CONSENT)}{STEPS[step].values[values[step]][0]}."
    return reply + (LAST_WORDS if len(dialogue) // 2 == MAX_TURNS - 1 else "")


def known_steps(dialogue):
    """{step: value} of everything that the human has said so far."""
    said = " ".join(message["content"] for message in dialogue if message["role"] == "user")
    known = {}
    for i, step in enumerate(STEPS):
        for value, (phrase, _) in enumerate(step.values):
            if phrase in said:
                known[i] = value
    return known


def judge(task, dialogue, action, asked_step=asked_step):
    """What the world knows about a turn: (kind, good). kind is answer, question or other; a question is good when it
    is about a step that matters and is not yet known, an answer when it is the reference (up to formatting), anything
    else never."""
    if ANSWER_MARKER in action:
        code = action.split(ANSWER_MARKER, 1)[1].strip()
        return "answer", code == task.ground_truth.strip()
    step = asked_step(action)
    if step is None:
        return "other", False
    return "question", step in read_function(task.ground_truth) and step not in known_steps(dialogue)


# ------------------------------------------------------------------ the base policy

def phrases():
    """Every phrase of the world: one token each, so that a dialogue is about a hundred tokens."""
    texts = [*TOPICS, *OPENERS, *POLITE, *STEMS, *CONSENT, *NO_PREFERENCE, *CONFUSED, LAST_WORDS, SIGNATURE, HINT,
             "(values)", ".",
             INSTRUCTIONS.replace("{max_turns}", str(MAX_TURNS)), *REFERENCE_PREFIX.split("{reference}"),
             ANSWER_MARKER, "\n", "def tidy_", "(values):\n", "    return values"]
    for step in STEPS:
        texts += [step.ask, f"    {step.before}", f"{step.after}\n", *(text for value in step.values for text in value)]
    return list(dict.fromkeys(text for text in texts if text))


def _demonstrate(rng, topic, values, dialogue, turn, reads):
    """One turn of the imperfect demonstrator; with `reads` it has looked at the reference, and is better but not
    perfect."""
    known = known_steps(dialogue)
    asked = {asked_step(message["content"]) for message in dialogue if message["role"] == "assistant"}
    open_steps = [s for s in range(len(STEPS)) if s not in known and s not in asked]
    ready = reads and set(values) <= set(known)
    p_answer = 0.6 if ready else 0.01
    if turn == MAX_TURNS:
        p_answer = 0.98
    if open_steps and rng.random() > p_answer:
        useful = [s for s in open_steps if s in values]
        if reads and useful and rng.random() < 0.6:
            step = rng.choice(useful)
        else:
            step = rng.choice(open_steps if rng.random() < 0.9 else range(len(STEPS)))
        return f"{rng.choice(POLITE)}{rng.choice(STEMS)}{topic}{STEPS[step].ask}"
    if reads and rng.random() < 0.8:
        chosen = values
    else:
        chosen = dict(known)
        for guessed in open_steps:
            if rng.random() < 0.1:
                chosen[guessed], = rng.choices(range(4), VALUE_WEIGHTS)
    return f"{ANSWER_MARKER}\n{write_function(topic, chosen)}"


def documents(n, seed, topics=TOPICS, write=write_function, respond=respond, demonstrate=_demonstrate):
    """Dialogues of the demonstrator: a list of (messages, reference or None), a reference in half of them. The rest: of
    this world, or of one that is built on it."""
    rng, out = random.Random(f"documents {seed}"), []
    for _ in range(n):
        topic = rng.choice(topics)
        # any steps go with any topic here: the base policy cannot learn what matters to which topic
        steps = rng.sample(range(len(STEPS)), rng.choice((2, 3, 3, 4)))
        values = {s: rng.choices(range(4), VALUE_WEIGHTS)[0] for s in steps}
        shown = [step for step in values if rng.random() < P_REVEALED]
        source = write(topic, values)
        task, reads = Task(_request(rng, topic, values, shown), source), rng.random() < 0.5
        instructions = INSTRUCTIONS.replace("{max_turns}", str(MAX_TURNS))
        dialogue = [{"role": "user", "content": instructions + task.problem_description}]
        for turn in range(1, MAX_TURNS + 1):
            action = demonstrate(rng, topic, values, dialogue, turn, reads)
            dialogue.append({"role": "assistant", "content": action})
            if ANSWER_MARKER in action:
                break
            dialogue.append({"role": "user", "content": respond(task, dialogue, rng)})
        out.append((dialogue[:2 * turn], source if reads else None))
    return out


def make_tokenizer():
    return tiny.make_tokenizer(phrases())


def new_model(cfg, seed):
    """A tiny untrained Llama and its tokenizer. cfg: a Base."""
    return Backend().new_model(cfg, seed)


# ------------------------------------------------------------------ the world

def known_share(task, messages):
    """The share of what matters that the human has said so far; None for a task that is not of this world."""
    steps = read_function(task.ground_truth)
    if not steps:
        return None
    known = steps.keys() & known_steps(messages).keys()
    return len(known) / len(steps)


class Backend(World):
    """All of the above, as everything else asks for it."""
    PAPER = {"base": "22.4", "RFT": "28.2", "multi-turn DPO": "34.4", "SWEET": "40.4",  # Table 2
             "SWEET without c": "31.2", "SWEET, sums": "3.6", "regression critic": "36.2"}  # Table 3
    TURN = ("question", "useful", "useless")
    KNOWN = "Steps that matter and are known"
    OFFERS = NO_PREFERENCE[:1]
    LAST_WORDS = LAST_WORDS
    make_tasks = staticmethod(make_tasks)
    respond = staticmethod(respond)
    phrases = staticmethod(phrases)
    documents = staticmethod(documents)
    judge = staticmethod(judge)
    known_share = staticmethod(known_share)
