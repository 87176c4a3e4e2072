"""You are the human: talk with a trained agent, in the terminal or in a browser, and see each of its turns judged.

    python sweet.py play                    in the terminal
    python sweet.py play --web              on a page of your own browser (needs gradio)
    python sweet.py play --play-seed 7      the seventh held-out task, with the same draws each time

You have a finished function or page in mind and the agent has your vague request. After each of its turns you see how
many of the initial policy's own turns the critic finds worse at that state (as in the report: raw advantages have no
meaning across states), and at the end what was tested. The dialogue is kept in plays.jsonl, a file of trajectories.

Place in the data flow: held-out tasks, base/, critic/ and a policy -> `Dialogue` -> plays.jsonl. One `Dialogue` is one
of yours with one policy; the terminal and the page only show it. Exercised by `python -m pytest tests/test_play.py`.
"""
import contextlib
import copy
import functools
import json
import random
import socket
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import actor
import report
from env import ANSWER_MARKER
from machinery.files import InputError, clean, forgive, put_text
from machinery.optional import first_line, require
from machinery.train import arg
from simulator import Human, cut

STYLE = Path(__file__).resolve().parent / "machinery/page/play.css"
LAST_WORDS = ("The scripted human says here: \"{}\" An agent that was trained with this sentence mostly goes on asking "
              "without it.")


@dataclass(frozen=True)
class Play:
    """A dialogue with you."""
    web: bool = arg(False, flag="web")
    """A page in your browser (needs gradio) in the place of the terminal."""
    host: str = arg("127.0.0.1", flag="host")
    """The address that the page listens on; 0.0.0.0: the whole network."""
    port: int = arg(0, flag="port", least=0, most=65535)
    """The port that it listens on; 0: the first free one from 7860 on."""
    policy: Literal["base", "rft", "multiturn", "actor"] = "actor"
    """Whom you talk with first."""
    seed: int = arg(0, least=0)
    """Which held-out task, and the agent's draws; 0: another one each time, which is shown."""


class Pause(Human):
    """Leaves after each turn of the agent: you come back when you have made up your mind."""

    def reply(self, tasks, dialogues):
        return [None] * len(tasks)


class Dialogue:
    """One dialogue of yours with a policy.

    load(name) -> (model, tokenizer); seed: which of the tasks, counted from 1; 0: any. states: what the agent said and
    could have said, a state a turn (report.judge_states); record: the graded trajectory, once it is over.
    """

    def __init__(self, run, load, tasks, policy, seed):
        self.run, self.load, self.policy = run, load, policy
        self.seed = seed or random.SystemRandom().randint(1, len(tasks))
        self.task = tasks[(self.seed - 1) % len(tasks)]
        self.env = actor.begin(self.task, run.settings["rollout"], run.instructions)
        self.scripted = run.world.human("scripted", None, None, run.seed)
        self.states, self.record = [], None
        self.hear()

    def hear(self):
        """The agent's next turn, and what the critic says of it."""
        cfg, top_p = self.run.settings["rollout"], self.run.settings["eval"].top_p
        model, tokenizer = self.load(self.policy)
        key = (self.run.seed, "play", self.seed)
        actor.play_out(model, tokenizer, [self.env], Pause(), [key],
                       top_p=top_p, max_tokens=cfg.max_tokens)
        if self.env.turns == len(self.states):  # it stopped without a turn
            raise InputError("that does not fit into the model's context; say less")
        record = {"task": self.task.to_record(), "dialogue_history": self.env.messages, "answer": self.env.answer}
        state = report.agent_states(record)[-1]
        loaded = SimpleNamespace(
            model=self.load, world=self.run.world, grade=self.run.grade, path=self.run.path)
        report.judge_states(loaded, [state], self.run.settings["critic"], cfg.max_tokens)
        if self.env.answer is not None:
            reward, = self.run.grade([self.env.answer], [self.task])
            self.record = {**record, "reward": reward, "policy": self.policy, "seed": self.seed}
            self.keep()
        self.states.append(state)

    def keep(self):
        """One more line: another process may add to the same file."""
        with open(self.run.root / "plays.jsonl", "a", encoding="utf-8") as file:
            record, = actor.for_files([self.record])
            file.write(json.dumps(clean(record)) + "\n")

    def reply(self, text):
        """Say something. Where the agent cannot go on from it (InputError), nothing was said."""
        before = copy.deepcopy(self.env)
        self.env.observe(cut(text, self.task))
        try:
            self.hear()
        except InputError:
            self.env = before
            raise

    def offers(self):
        """Replies to choose from, the scripted human's own first, and what is to be said before the last one."""
        world, found, words = self.run.world, [], ""
        with contextlib.suppress(InputError):  # it knows the small world's tasks, but not yours
            found = self.scripted.reply([self.task], [self.env.messages])
        if self.env.turns < self.env.max_turns - 1:
            hint = ""
        else:
            hint = "This is your last reply."
            if world.LAST_WORDS and found and found[0].endswith(world.LAST_WORDS):
                words = world.LAST_WORDS
                hint += " " + LAST_WORDS.format(words.strip())
        found += [text + words for text in world.OFFERS]
        return list(dict.fromkeys(found)), hint

    def verdict(self, state):
        judged = state["judged"]
        nats = f"advantage {report.number(judged['advantage'], 2, '+')} nats a token"
        if "share" not in judged:
            return f"it says nothing else here ({nats})"
        return f"better than {100 * judged['share']:.0f} % of what it could have said ({nats})"

    def candidates(self, state):
        """The sampled turns and the one that was said, in the critic's order, as lines."""
        lines = ["advantage, how often it was sampled, turn"]
        for candidate in sorted(state["candidates"], key=lambda candidate: -candidate["advantage"]):
            often = f"{candidate['count']} x" if "count" in candidate else "said"
            text = self.run.world.brief(candidate["content"]).replace("\n", "\n" + 13 * " ")
            lines.append(f"{report.number(candidate['advantage'], 2, '+')}  {often:>4}  {text}")
        return lines

    def outcome(self):
        """How it ended, in a line, and the record as it is to be shown."""
        world, reward = self.run.world, self.record["reward"]
        end, record = f"{world.REWARD}: {reward:.0%}.", self.record
        if ANSWER_MARKER not in self.env.messages[-1]["content"] and not self.env.in_code:
            end = f"It did not answer: its last turn is graded as it is. {end}"
            record = {**record, "answer": record["answer"] if reward else ""}
        return end, record


def shown(world, text):
    """A message as HTML, with its picture where the world has one."""
    brief = world.brief(text)
    tag = "pre" if "\n" in brief else "p"
    return f"<{tag}>{escape(brief)}</{tag}>{world.drawn(text)}"


# ------------------------------------------------------------------ in the terminal

def ask(prompt):
    """A line of yours, None at the end of the input. What nobody types is printed, so that whatever comes next (a
    note of the grader's) does not land behind the prompt."""
    try:
        line = input(prompt)
    except EOFError:
        print()
        return None
    if not sys.stdin.isatty():
        print(line)
    return line.strip()


def show_pictures(dialogue, html):
    """Pictures, which a terminal cannot show, as a page in the run's folder."""
    if "<img" in html:
        path = dialogue.run.root / "play.html"
        put_text(path, f"<!doctype html><meta charset=utf-8><style>{STYLE.read_text('utf-8')}</style>{html}")
        print(f"       pictures: {path}")


def show_turn(dialogue):
    world, said = dialogue.run.world, dialogue.env.messages[-1]["content"]
    print(f"\nagent: {world.brief(said)}\n       {dialogue.verdict(dialogue.states[-1])}")
    mind = shown(world, dialogue.task.hidden_information)
    show_pictures(dialogue, f"{shown(world, said)}<details><summary>what you have in mind</summary>{mind}</details>")


def your_reply(dialogue):
    """What you say. InputError at the end of the input."""
    offers, hint = dialogue.offers()
    for number, text in enumerate(offers, 1):
        print(f"  {number}  {text}")
    if hint:
        print(hint)
    while True:
        line = ask("you:   ")
        if line is None:
            raise InputError("the input ended before the dialogue did")
        if line == "?":
            print(dialogue.task.hidden_information)
        elif line == "!":
            print(*dialogue.candidates(dialogue.states[-1]), sep="\n")
        elif line:
            return dict(zip(map(str, range(1, 10)), offers)).get(line, line)


def in_terminal(begin, policies, policy, seed):
    forgive(sys.stdin, sys.stdout)  # what the terminal cannot encode or decode ends no dialogue
    while True:
        dialogue = begin(policy, seed)
        print(f"You talk with {policies[policy]} (--play-policy {policy} --play-seed {dialogue.seed}) and want this:"
              f"\n\n{dialogue.task.problem_description}\n\n"
              "Reply by number or in your own words. ?: what you have in mind. !: what else the agent could have said.")
        show_turn(dialogue)
        while dialogue.record is None:
            text = your_reply(dialogue)
            try:
                dialogue.reply(text)
            except InputError as error:
                print(f"       {error}")
            else:
                show_turn(dialogue)
        run = dialogue.run
        end, record = dialogue.outcome()
        print("", end, *run.world.summary(record, run.grade), "", sep="\n")
        show_pictures(dialogue, run.world.evidence(record, run.grade))
        choice = "unknown"
        while choice not in ("", "q", *policies):
            choice = ask(f"Enter: another task. {', '.join(policies)}: the same task with that policy. q: the end. ")
            choice = "q" if choice is None else choice
        if choice == "q":
            return
        policy, seed = choice or policy, dialogue.seed if choice else 0


# ------------------------------------------------------------------ in the browser

def bubbles(gradio, dialogue, offers):
    """The dialogue as gradio's chat shows it; each turn's candidates are folded behind the critic's verdict."""
    shown_messages = []
    for i, message in enumerate(dialogue.env.messages[1:]):
        text = gradio.HTML(shown(dialogue.run.world, message["content"]))
        shown_messages.append({"role": message["role"], "content": text})
        if message["role"] == "user":
            continue
        state = dialogue.states[i // 2]
        lines = "".join(f"<li>{escape(line)}" for line in dialogue.candidates(state))
        verdict = {"title": dialogue.verdict(state), "status": "done"}
        shown_messages.append({"role": "assistant", "content": gradio.HTML(f"<ul>{lines}</ul>"), "metadata": verdict})
    shown_messages[-1]["options"] = [{"value": text} for text in offers]
    return shown_messages


def ending(dialogue):
    """What was tested, as HTML."""
    line, record = dialogue.outcome()
    world = dialogue.run.world
    evidence = world.evidence(record, dialogue.run.grade, unfolded=True)
    return f"<h3>{escape(line)}</h3><p>{world.LEGEND}</p><div class=tests>{evidence}</div>"


def in_browser(begin, policies, cfg):
    """A page on this machine alone, unless --host says otherwise. It asks nothing of any other server."""
    gradio = require("gradio", "--web")
    with gradio.Blocks(title="sweet: play", analytics_enabled=False) as page:
        held, request = gradio.State(), gradio.HTML()
        with gradio.Accordion("What you have in mind, and the agent cannot see", open=False):
            mind = gradio.HTML()
        chat = gradio.Chatbot(show_label=False, height="auto", buttons=[], feedback_options=None)
        words = gradio.Textbox(label="Your reply", submit_btn=True)
        end = gradio.HTML(elem_id="end")
        with gradio.Row():
            choices = [(label, name) for name, label in policies.items()]
            policy = gradio.Radio(choices, value=cfg.policy, label="You talk with")
            seed = gradio.Number(cfg.seed, label="Task", precision=0, minimum=0)
        with gradio.Row():
            again, other = gradio.Button("Talk about this task"), gradio.Button("Another task")

        def show(make):
            try:
                dialogue = make()
            except InputError as error:
                raise gradio.Error(str(error)) from None
            world, over = dialogue.run.world, dialogue.record is not None
            offers, hint = ([], "") if over else dialogue.offers()
            wish = shown(world, dialogue.task.problem_description)
            return {
                held: dialogue,
                request: f"<h4>You want this from {policies[dialogue.policy]}:</h4>{wish}",
                mind: shown(world, dialogue.task.hidden_information),
                chat: bubbles(gradio, dialogue, offers),
                words: gradio.Textbox(value="", info=hint, visible=not over),
                end: ending(dialogue) if over else "",
                seed: dialogue.seed,
            }

        def start(policy, seed):
            return show(lambda: begin(policy, int(seed or 0)))

        def answer(dialogue, text):
            def make():
                if text.strip() and dialogue.record is None:
                    dialogue.reply(text)
                return dialogue
            return show(make)

        def pick(dialogue, event: gradio.SelectData):
            return answer(dialogue, event.value)

        one = {"outputs": [held, request, mind, chat, words, end, seed], "concurrency_id": "models"}  # at a time
        page.load(start, [policy, seed], **one)
        again.click(start, [policy, seed], **one)
        other.click(lambda policy: start(policy, 0), [policy], **one)
        words.submit(answer, [held, words], **one)
        chat.option_select(pick, [held], **one)
    serve(gradio, page, cfg)


def serve(gradio, page, cfg):
    """Until Ctrl-C."""
    theme = gradio.themes.Default(font="system-ui", font_mono="monospace")  # its own fonts come from elsewhere
    try:
        socket.create_server((cfg.host, cfg.port)).close()  # gradio would wait five seconds for each of 100 ports
        _, url, _ = page.launch(server_name=cfg.host, server_port=cfg.port or None, share=False, ssr_mode=False,
                                footer_links=[], run_history=False, css_paths=STYLE, theme=theme, quiet=True,
                                prevent_thread_lock=True)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {cfg.host} --port {cfg.port}: {first_line(error)}") from None
    print(f"play: {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def main(run, names):
    """Play until you leave. names: {policy: what the tables call it}."""
    cfg = run.settings["play"]
    policies = {}
    for name, label in names.items():
        if name == "base" or run.path(name).exists():
            policies[name] = label
    if cfg.policy not in policies:
        raise InputError(f"--play-policy {cfg.policy}: {run.root} holds no {cfg.policy}; expected one of "
                         f"{', '.join(policies)}, or train it: python sweet.py {cfg.policy}")
    load = functools.lru_cache(maxsize=3)(run.model)  # the initial policy, the critic, and whom you talk with
    begin = functools.partial(Dialogue, run, load, run.held_out())
    if cfg.web:
        in_browser(begin, policies, cfg)
    else:
        in_terminal(begin, policies, cfg.policy, cfg.seed)
