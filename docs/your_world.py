"""A world of one question: which way should these numbers be rounded? Run it: see your-own.md."""
import random

from env import ANSWER_MARKER, INSTRUCTIONS, REFERENCE_PREFIX, Task
from worlds import World

THINGS = "prices weights heights ages scores fares rents tips miles goals points votes loans taxes bills wages".split()
WAYS = {"up": "math.ceil(x)", "down": "math.floor(x)", "to even": "round(x)", "towards zero": "math.trunc(x)"}
REQUEST, QUESTION, REPLY = "Please write a function that rounds ", "Which way should I round?", "Please round them "


class Rounding(World):
    DEFAULTS = {"rollout": {"max_turns": 2, "tasks": 20}, "eval": {"tasks": 10}}
    TURN = ("question", "useful", "useless")

    def write(self, thing, way):
        return f"import math\ndef round_{thing}(x):\n    return {WAYS[way]}"

    def make_tasks(self, n, seed, split):
        found = []
        for thing in THINGS:
            for way in WAYS:
                draw = random.Random(f"{thing} {way}").random()  # splits are disjoint, whatever the seed
                if split == ("train" if draw < 0.5 else "dev" if draw < 0.7 else "test"):
                    calls = {f"test{k}": f"round_{thing}({x})" for k, x in enumerate((2.5, -2.5, 1.2, 3.7), 1)}
                    found.append(Task(REQUEST + thing, self.write(thing, way), calls))
        random.Random(seed).shuffle(found)
        return found[:n]

    def respond(self, task, dialogue, rng):
        way, = [way for way, code in WAYS.items() if code in task.hidden_information]
        return REPLY + way

    def judge(self, task, dialogue, action):
        if action == QUESTION:
            return "question", len(dialogue) == 1
        return super().judge(task, dialogue, action)

    def phrases(self):
        fixed = [INSTRUCTIONS.replace("{max_turns}", "2"), *REFERENCE_PREFIX.split("{reference}"), ANSWER_MARKER,
                 REQUEST, QUESTION, REPLY, "\n", "import math\ndef round_", "(x):\n    return "]
        return [*fixed, *THINGS, *WAYS, *WAYS.values()]

    def documents(self, n, seed):
        """A demonstrator who asks in half of the dialogues, and guesses in the others; half can read the reference."""
        rng, found = random.Random(f"documents {seed}"), []
        for _ in range(n):
            thing, way, reads = rng.choice(THINGS), rng.choice(list(WAYS)), rng.random() < 0.5
            dialogue = [{"role": "user", "content": INSTRUCTIONS.replace("{max_turns}", "2") + REQUEST + thing}]
            asks = rng.random() < 0.5
            if asks:
                dialogue += [{"role": "assistant", "content": QUESTION}, {"role": "user", "content": REPLY + way}]
            known = way if asks or reads else rng.choice(list(WAYS))
            dialogue.append({"role": "assistant", "content": f"{ANSWER_MARKER}\n{self.write(thing, known)}"})
            found.append((dialogue, self.write(thing, way) if reads else None))
        return found
