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
import functools
import random
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from itertools import zip_longest

from env import ANSWER_MARKER, INSTRUCTIONS, REFERENCE_PREFIX, Task, grade
from machinery.files import InputError
from simulator import make_human

MAX_TURNS = 4
DEFAULTS = {}           # this world's settings are the defaults everywhere
REWARD = "Tests passed"
OPTIONAL = ()           # fields that a task file may lack
PAIRED = False          # the second figure of the results is not against the base policy
LEGEND = "Underlined: a line that reference or answer lacks."
PAPER = dict(zip(("base", "RFT", "multi-turn DPO", "SWEET", "SWEET without c"),
                 ("22.4", "28.2", "34.4", "40.4", "31.2")))  # Tables 2 and 3
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
OFFERS = NO_PREFERENCE[:1]  # replies that anybody can give, in `play`
CONFUSED = ("Sorry, I did not understand the question.", "I am not sure what you are asking.",
            "Could you put that differently?")


def _topic_steps():
    """For each topic, the sorted steps that matter to it. A fact of the world, the same for every seed."""
    rng = random.Random("topics")
    return {topic: tuple(sorted(rng.sample(range(len(STEPS)), RELEVANT))) for topic in TOPICS}


TOPIC_STEPS = _topic_steps()


LINES = {spec.line(value)[:-1]: (step, value) for step, spec in enumerate(STEPS) for value in range(4)}


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


def make_tasks(n, seed, split="train"):
    """n different tasks of a split as ColBench records (see Task). ValueError when the split is asked for more than
    it holds."""
    rng, tasks = random.Random(f"tasks {seed} {split}"), {}
    for _ in range(1000 * n):
        topic = rng.choice(TOPICS)
        values = {step: rng.choices(range(4), VALUE_WEIGHTS)[0] for step in TOPIC_STEPS[topic]}
        shown = [step for step in values if rng.random() < P_REVEALED]
        if split_of(topic, values) == split and write_function(topic, values) not in tasks:
            source = write_function(topic, values)
            tasks[source] = Task(_request(rng, topic, values, shown), source, _test_cases(rng, topic))
        if len(tasks) == n:
            return list(tasks.values())
    raise ValueError(f"the {split} split holds fewer than {n} different tasks")


def _request(rng, topic, values, shown):
    hints = "".join(HINT + STEPS[step].values[values[step]][0] for step in shown)
    return f"{rng.choice(OPENERS)}{topic}{hints}{SIGNATURE}{topic}(values)"


def _test_cases(rng, topic):
    """Ten calls on lists of 7 to 10 numbers, some of them repeated: enough to tell different functions apart."""
    inputs = [[rng.randint(-15, 25) for _ in range(rng.randint(4, 7))] for _ in range(10)]
    return {f"test{k}": f"tidy_{topic}({row + rng.choices(row, k=3)})" for k, row in enumerate(inputs, 1)}


def check_installed(clip):
    """Nothing but the core is needed."""


def grader(clip, call_seconds):
    """grade(answers, tasks) -> rewards."""
    return functools.partial(grade, call_seconds=call_seconds)


def successes(trajectories):
    """What RFT imitates."""
    return [t for t in trajectories if t["reward"] == 1.0]


# ------------------------------------------------------------------ the human

def human(spec, server, machine, seed):
    """The human that `--human` names."""
    return make_human(spec, respond, seed, server, machine)


def asked_step(question):
    """The step that a question asks about, or None."""
    return next((i for i, step in enumerate(STEPS) if step.ask in question), None)


def respond(task, dialogue, rng):
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
    return {i: v for i, step in enumerate(STEPS) for v in range(4) if step.values[v][0] in said}


def judge(task, dialogue, action):
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


def make_tokenizer(texts=None):
    """Unigram over a world's phrases (this one's; fewest tokens win), with letters and bytes below them so that any
    text can be encoded."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    texts = texts or phrases()
    vocab = [("<unk>", -1000.0)] + [(f"<0x{byte:02X}>", -1000.0) for byte in range(256)]
    vocab += [(chr(code), -20.0) for code in range(32, 127) if chr(code) not in texts]
    core = Tokenizer(models.Unigram(vocab + [(text, -1.0) for text in texts], unk_id=0, byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|agent|>"], model_max_length=4096)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|agent|>{{ m.content }}<|end|>"
        "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|agent|>{% endif %}")
    return tokenizer


@dataclass(frozen=True)
class Base:
    """Hyper-parameters of the base policy."""
    documents: int = 16000
    """Dialogues of the demonstrator to imitate."""
    epochs: int = 2
    """Passes over them."""
    batch_size: int = 24
    """Dialogues a step."""
    lr: float = 6e-3
    """Learning rate."""
    hidden: int = 64
    """Width of the model."""
    layers: int = 2
    """Layers of the model."""


def new_model(cfg, seed, tokenizer=None):
    """A tiny untrained Llama and its tokenizer (this world's, or another's)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    tokenizer = tokenizer or make_tokenizer()
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=cfg.hidden, intermediate_size=2 * cfg.hidden,
        num_hidden_layers=cfg.layers, num_attention_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.08)), tokenizer  # the usual 0.02 learns nothing at this width


def documents(n, seed):
    """Dialogues of the demonstrator: a list of (messages, reference or None), a reference in half of them."""
    rng, out = random.Random(f"documents {seed}"), []
    for _ in range(n):
        topic = rng.choice(TOPICS)
        # any steps go with any topic here: the base policy cannot learn what matters to which topic
        steps = rng.sample(range(len(STEPS)), rng.choice((2, 3, 3, 4)))
        values = {s: rng.choices(range(4), VALUE_WEIGHTS)[0] for s in steps}
        shown = [step for step in values if rng.random() < P_REVEALED]
        source = write_function(topic, values)
        task, reads = Task(_request(rng, topic, values, shown), source), rng.random() < 0.5
        instructions = INSTRUCTIONS.replace("{max_turns}", str(MAX_TURNS))
        dialogue = [{"role": "user", "content": instructions + task.problem_description}]
        for turn in range(1, MAX_TURNS + 1):
            action = _demonstrate(rng, topic, values, dialogue, turn, reads)
            dialogue.append({"role": "assistant", "content": action})
            if ANSWER_MARKER in action:
                break
            dialogue.append({"role": "user", "content": respond(task, dialogue, rng)})
        out.append((dialogue[:2 * turn], source if reads else None))
    return out


def _demonstrate(rng, topic, values, dialogue, turn, reads):
    """One turn of the imperfect demonstrator; with `reads` it has looked at the reference, and is better but not
    perfect."""
    known = known_steps(dialogue)
    asked = {asked_step(message["content"]) for message in dialogue if message["role"] == "assistant"}
    open_steps = [s for s in range(len(STEPS)) if s not in known and s not in asked]
    ready = reads and set(values) <= set(known)
    if open_steps and rng.random() > (0.98 if turn == MAX_TURNS else 0.6 if ready else 0.01):
        useful = [s for s in open_steps if s in values]
        if reads and useful and rng.random() < 0.6:
            step = rng.choice(useful)
        else:
            step = rng.choice(open_steps if rng.random() < 0.9 else range(len(STEPS)))
        return f"{rng.choice(POLITE)}{rng.choice(STEMS)}{topic}{STEPS[step].ask}"
    if reads and rng.random() < 0.8:
        chosen = values
    else:
        guesses = {s: rng.choices(range(4), VALUE_WEIGHTS)[0] for s in open_steps if rng.random() < 0.1}
        chosen = {**known, **guesses}
    return f"{ANSWER_MARKER}\n{write_function(topic, chosen)}"


# ------------------------------------------------------------------ in the report

TURN = ("question", "useful", "useless")  # what a turn before the answer is called, a good one, a bad one
KNOWN = "Steps that matter and are known"


def known_share(task, messages):
    """The share of what matters that the human has said so far; None for a task that is not of this world."""
    steps = read_function(task.ground_truth)
    return len(steps.keys() & known_steps(messages).keys()) / len(steps) if steps else None


def headers(settings):
    """What the two figures of `figures` are called."""
    return "success", "tests passed"


def figures(record, base):
    """Two figures of an evaluated dialogue, in %: success, and the share of tests passed. base: the base policy's on
    the same task."""
    return 100 * (record["reward"] == 1), 100 * record["reward"]


def verdict(record):
    return "success" if record["reward"] == 1 else "failure"


def brief(text):
    """A message as the dialogue shows it."""
    return text


def _program(title, text, other):
    """A program under a title, the lines that the other one lacks marked."""
    theirs = {line.strip() for line in other.splitlines()}
    rows = [escape(row) if row.strip() in theirs else f"<mark>{escape(row)}</mark>" for row in text.splitlines()]
    return f"<h4>{title}</h4><pre>{'<br>'.join(rows)}</pre>"


def tests(record):
    """[(call, whether the answer passes it)], each test graded as a task of its own."""
    task = Task.from_record(record["task"])
    calls = task.test_cases.values()
    single = [Task(task.problem_description, task.ground_truth, {"test": call}) for call in calls]
    passed = grade([record["answer"]] * len(single), single)
    return [(call, ok == 1) for call, ok in zip(calls, passed)]


def evidence(record, unfolded=False):
    """Reference, answer, and which tests the answer passes. unfolded: the tests are in sight at once."""
    reference, answer, found = record["task"]["ground_truth"], record["answer"], tests(record)
    passed = sum(ok for _, ok in found)
    calls = "".join(f"<li>{'✓' if ok else '✗'} {escape(call)}" for call, ok in found)
    return f"""{_program("reference", reference, answer)}
        {_program("answer", answer, reference)}<details{" open" if unfolded else ""}><summary>passes {passed} of
        {len(found)} tests</summary><ul>{calls}</ul></details>"""


# ------------------------------------------------------------------ in play

def drawn(text):
    """A message as a picture: there is none here."""
    return ""


def beside(reference, answer):
    """Lines of two programs side by side, as sdiff shows them: "|" between different ones, "<" where the answer lacks
    a line, ">" where it has one more."""
    left, right = reference.splitlines(), answer.splitlines()
    width, rows = max(map(len, left), default=0), []
    for kind, *ends in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        a, b, c, d = ends
        for ours, theirs in zip_longest(left[a:b], right[c:d]):
            mark = " " if kind == "equal" else "<" if theirs is None else ">" if ours is None else "|"
            rows.append(f"{ours or '':{width}} {mark} {theirs or ''}".rstrip())
    return rows


def summary(record):
    """The same as `evidence` for a terminal, as lines."""
    calls = [f"{'passed' if ok else 'failed'}  {call}" for call, ok in tests(record)]
    rows = beside(record["task"]["ground_truth"], record["answer"])
    return [*calls, "", "The reference, and the answer beside it:", *rows]
