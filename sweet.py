"""SWEET-RL on one page: the stages in order, the command line, the results.

    python sweet.py                     everything, into runs/default/ (a laptop will do)
    python sweet.py --smoke             the same in miniature, to see that it works
    python sweet.py STAGE               one stage; earlier ones must be done
    python sweet.py play                you are the human
    python sweet.py table               the README's table: several seeds of everything, and SWEET without c

Stages hand each other files under runs/NAME/, never hidden state:

    base        base/               the initial policy (the small world's; with --model, yours, and this stage is skipped)
    rollout     trajectories.jsonl  offline dialogues by the initial policy, with rewards
    critic      critic/             Bradley-Terry on whole trajectories, reading the reference            Eq. 2, 3
    samples     samples.jsonl       candidate turns at states of the offline dialogues, with pi_ref's log-probs
    candidates  candidates.jsonl    the same, with the critic's advantages
    pairs       pairs.jsonl         chosen and rejected turns (TRL's preference format)
    actor       actor/              DPO on turn pairs                                                     Eq. 4
    rft, multiturn                  the baselines on the same trajectories: rft/, multiturn/
    eval        eval.jsonl          dialogues of every policy on held-out tasks, graded
    credit      credit.json         is the critic right? against what the world knows, and against Monte Carlo
    report      report.html         what the run learned

A stage that is done is skipped; a stage that was killed goes on where it was; files made with other settings are refused.
Hyper-parameters: one dataclass a stage, below; every field is a flag, and --help shows the paper's value beside ours.
"""
import argparse
import copy
import dataclasses
import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from env import ANSWER_MARKER, DialogueEnv, InputError, JsonlWriter, Task, grade, load_tasks, read_jsonl, render, write_json


def arg(default, text, paper=None, **extra):
    """A hyper-parameter: its default for the small world, what it means, and the paper's value."""
    return field(default=default, metadata={"text": text, "paper": paper, **extra})


@dataclass(frozen=True)
class Rollout:
    tasks: int = arg(250, "training tasks", 10000)
    per_task: int = arg(8, "offline dialogues a task")
    max_turns: int = arg(4, "turns of a dialogue, the answer included", 10)
    max_tokens: int = arg(48, "tokens of a turn at most")
    temperature: float = arg(1.0, "sampling temperature of the offline dialogues")


@dataclass(frozen=True)
class Pairs:
    per_task: int = arg(6, "trajectory pairs a task at most")
    margin: float = arg(0.0, "reward difference that makes a trajectory pair; 0: success against failure", 0.0)
    per_state: int = arg(4, "turn pairs a state at most", 4)


@dataclass(frozen=True)
class Critic:
    lr: float = arg(1e-3, "learning rate", 2e-7)
    beta: float = arg(1.0, "Eq. 2's beta", 0.1)
    nll: float = arg(0.0, "weight of the chosen turns' negative log-likelihood", 0.01)
    batch_size: int = arg(8, "trajectory pairs a step", 8)
    epochs: int = arg(3, "passes over the pairs", 4)
    normalize: str = arg("turn", "length normalisation of A: turn, none or trajectory", "turn")
    reference: bool = arg(True, "the critic reads the reference solution; --no-reference is the ablation", True, flag="reference")
    rank_against: str = arg("c", "when ranking, pi_ref reads the reference (c) or not (own): the official code's way", "c")


@dataclass(frozen=True)
class Candidates:
    states: int = arg(1500, "states (turns of offline dialogues) to sample candidates at")
    n: int = arg(16, "candidates a state", 16)


@dataclass(frozen=True)
class Actor:
    lr: float = arg(1e-3, "learning rate", 2e-7)
    beta: float = arg(1.0, "Eq. 4's beta", 0.1)
    nll: float = arg(0.3, "weight of the chosen turn's negative log-likelihood", 0.01)
    batch_size: int = arg(16, "turn pairs a step", 8)
    epochs: int = arg(2, "passes over the pairs", 1)


@dataclass(frozen=True)
class Rft:
    lr: float = arg(1e-3, "learning rate", 2e-7)
    batch_size: int = arg(32, "trajectories a step", 32)
    epochs: int = arg(4, "passes over the successful trajectories", 4)


@dataclass(frozen=True)
class Multiturn:
    lr: float = arg(3e-4, "learning rate", 2e-7)
    beta: float = arg(0.3, "DPO's beta on whole trajectories", 0.1)
    nll: float = arg(0.3, "weight of the chosen trajectory's negative log-likelihood", 0.01)
    batch_size: int = arg(8, "trajectory pairs a step", 8)
    epochs: int = arg(3, "passes over the pairs", 4)


@dataclass(frozen=True)
class Eval:
    tasks: int = arg(500, "held-out tasks", 1000)
    split: str = arg("test", "which held-out tasks: dev (to choose settings) or test (once)")
    top_p: float = arg(0.9, "the second way of decoding; the first is plain sampling at temperature 1")


@dataclass(frozen=True)
class Credit:
    states: int = arg(160, "held-out states whose candidates the critic is tested on")
    monte_carlo_states: int = arg(40, "states whose candidates are also valued by playing on")
    monte_carlo_rollouts: int = arg(24, "dialogues played on from each candidate")


def groups():
    """Every group of hyper-parameters by name; the name is the flag's prefix."""
    from worlds.backend import Base
    return {"base": Base, "rollout": Rollout, "pairs": Pairs, "critic": Critic, "candidates": Candidates, "actor": Actor, "rft": Rft,
            "multiturn": Multiturn, "eval": Eval, "credit": Credit}


SMOKE = {"base": {"documents": 7000, "epochs": 1}, "rollout": {"tasks": 60, "per_task": 8}, "critic": {"epochs": 1},
         "candidates": {"states": 60, "n": 8}, "actor": {"epochs": 1}, "rft": {"epochs": 1}, "multiturn": {"epochs": 1},
         "eval": {"tasks": 40}, "credit": {"states": 30, "monte_carlo_states": 4, "monte_carlo_rollouts": 8}}


# ---------------------------------------------------------------------------------------------------------- a run

class Run:
    """Where the files of a run are, and the rule that keeps them apart: a stage's settings are written when it starts,
    together with those of all stages before it, and whoever comes later with other ones is refused."""

    def __init__(self, options, settings):
        self.options, self.settings = options, settings
        self.root = Path(options.run)
        self.variant = self.root if settings["critic"].reference else self.root / "no-reference"
        self.device = options.device

    def path(self, name):
        """A file of the run. What depends on whether the critic reads c lies in a folder of its own when it does not."""
        own = name.split(".")[0] in ("critic", "candidates", "pairs", "actor", "eval", "credit")
        return (self.variant if own else self.root) / name

    def claim(self, stage):
        """Refuse to mix: compare the settings that `stage` stands on with those its files were begun with."""
        mine = {"seed": self.options.seed, "model": self.options.model}
        if stage != "base":
            mine |= {"tasks": self.options.tasks, "human": self.options.human}
        for name in STAGES[stage].needs:
            mine |= {f"{name}.{key}": value for key, value in dataclasses.asdict(self.settings[name]).items()}
        file = self.path(STAGES[stage].output).parent / "settings" / f"{stage}.json"
        if file.exists():
            theirs = json.loads(file.read_text(encoding="utf-8"))
            for key in sorted(set(mine) | set(theirs)):
                if mine.get(key) != theirs.get(key):
                    raise InputError(f"{file}: stage {stage} of this run was made with {key}={theirs.get(key)!r}, now it is "
                                     f"{mine.get(key)!r}; use another --run, or delete {self.root}")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, mine)

    def model(self, name):
        from kernels.fit import load_model
        path = self.options.model or self.path("base") if name == "base" else self.path(name)
        return load_model(path, self.device)

    def human(self):
        from simulator import make_human
        from worlds.backend import respond
        return make_human(self.options.human, respond, self.options.seed, self.options.human_model, self.device)

    def held_out(self):
        from worlds.backend import make_tasks
        if self.options.eval_tasks:
            return load_tasks(self.options.eval_tasks)
        return make_tasks(self.settings["eval"].tasks, self.options.seed, self.settings["eval"].split)

    def trajectories(self):
        return [record for _, record in read_jsonl(self.path("trajectories.jsonl"), ("task", "dialogue_history", "reward"))]


def save_to(model, tokenizer):
    """What `fit` calls when it is done: write a Hugging Face directory."""
    def save(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return save


def bare(messages):
    """Messages as the model needs them: without the texts that trajectories keep for the reader."""
    return [{key: value for key, value in message.items() if key not in ("input", "output")} for message in messages]


# ---------------------------------------------------------------------------------------------------------- stages

def stage_base(run):
    from worlds.backend import train_base
    if not run.options.model:
        train_base(run.settings["base"], run.options.seed, run.path("base"))


def play_tasks(run, model, tokenizer, tasks, keys, **decoding):
    """Play one dialogue on each task to its end and grade it: a list of trajectories in ColBench's format."""
    from actor import play_out
    cfg = run.settings["rollout"]
    envs = [DialogueEnv(cfg.max_turns) for _ in tasks]
    for env, task in zip(envs, tasks):
        env.reset(task)
    play_out(model, tokenizer, envs, run.human(), keys, max_tokens=cfg.max_tokens, **decoding)
    rewards = grade([env.answer for env in envs], tasks)
    return [{"task": env.task.to_record(), "dialogue_history": env.messages, "answer": env.answer, "reward": reward}
            for env, reward in zip(envs, rewards)]


def write_groups(path, items, size, make, label):
    """Write make(i, items[i:i + size]) for every group of items, one record an item, with a bar; resumes at a whole group."""
    writer = JsonlWriter(path, size)
    with tqdm(total=len(items), initial=writer.done, desc=f"{label:>12}", mininterval=0.5) as bar:
        for i in range(writer.done, len(items), size):
            records = make(i, items[i:i + size])
            writer.write(records)
            bar.update(len(records))
            if "reward" in records[0]:
                bar.set_postfix(reward=f"{np.mean([record['reward'] for record in records]):.3f}", refresh=False)
    writer.close()


def stage_rollout(run):
    from worlds.backend import make_tasks
    cfg = run.settings["rollout"]
    tasks = load_tasks(run.options.tasks) if run.options.tasks else make_tasks(cfg.tasks, run.options.seed, "train")
    model, tokenizer = run.model("base")
    todo = [(i, k) for i in range(len(tasks)) for k in range(cfg.per_task)]

    def group(_, part):
        return play_tasks(run, model, tokenizer, [tasks[i] for i, _ in part],
                          [(run.options.seed, "rollout", *key) for key in part], temperature=cfg.temperature)
    write_groups(run.path("trajectories.jsonl"), todo, 512, group, "rollout")


def learning_pairs(run):
    from critic import trajectory_pairs
    cfg = run.settings["pairs"]
    pairs = trajectory_pairs(run.trajectories(), cfg.per_task, cfg.margin or None, random.Random(f"pairs {run.options.seed}"))
    if not pairs:
        raise InputError(f"{run.path('trajectories.jsonl')}: no task has both a successful and a failed dialogue, so there is nothing "
                         "to learn from; roll out more dialogues (--rollout-per-task), or start from a better --model")
    return pairs


def stage_critic(run):
    import critic
    model, tokenizer = run.model("base")
    critic.train(model, tokenizer, learning_pairs(run), run.path("critic"), run.settings["critic"], run.options.seed,
                 save_to(model, tokenizer))


def sample_states(model, tokenizer, states, keys, n, max_tokens, temperature=1.0):
    """n sampled turns for each {"task", "messages"}, repeated ones dropped: adds "candidates", [{"content", "output_ids"}]."""
    from actor import sample, turn_text
    prompts = [render(tokenizer, state["messages"])[0] for state in states for _ in range(n)]
    turns = sample(model, tokenizer, prompts, [(*key, k) for key in keys for k in range(n)], max_tokens=max_tokens,
                   temperature=temperature)
    for i, state in enumerate(states):
        distinct = dict.fromkeys(tuple(turn) for turn in turns[i * n:(i + 1) * n] if turn)
        state["candidates"] = [{"content": turn_text(tokenizer, list(turn)), "output_ids": list(turn)} for turn in distinct]


def score_reference(run, model, tokenizer, states, use_reference):
    """Adds pi_ref's log-prob to every candidate, given c or not, as the critic's own was in training."""
    from critic import candidate_views
    from kernels.logprob import reference_sums
    sums = iter(reference_sums(model, [v for state in states for v in candidate_views(tokenizer, state, use_reference)]))
    for state in states:
        for candidate in state["candidates"]:
            candidate["ref_sum" if use_reference else "ref_sum_without_c"] = next(sums)[0]


def stage_samples(run):
    cfg, rng = run.settings["candidates"], random.Random(f"states {run.options.seed}")
    model, tokenizer = run.model("base")
    states = [{"task": t["task"], "messages": bare(t["dialogue_history"][:turn])} for t in run.trajectories()
              for turn in range(1, len(t["dialogue_history"]), 2)]
    states = rng.sample(states, min(cfg.states, len(states)))

    def group(first, part):
        part = copy.deepcopy(part)
        sample_states(model, tokenizer, part, [(run.options.seed, "samples", first + i) for i in range(len(part))], cfg.n,
                      run.settings["rollout"].max_tokens)
        score_reference(run, model, tokenizer, part, True)
        score_reference(run, model, tokenizer, part, False)
        return part
    write_groups(run.path("samples.jsonl"), states, 64, group, "samples")


def rank_states(run, model, tokenizer, states):
    from critic import rank
    cfg = run.settings["critic"]
    same = cfg.reference and cfg.rank_against == "c"
    return rank(model, tokenizer, states, cfg.reference, cfg.normalize, "ref_sum" if same else "ref_sum_without_c")


def stage_candidates(run):
    model, tokenizer = run.model("critic")
    states = [record for _, record in read_jsonl(run.path("samples.jsonl"), ("task", "messages", "candidates"))]

    def group(_, part):
        for state, advantages in zip(part, rank_states(run, model, tokenizer, part)):
            for candidate, advantage in zip(state["candidates"], advantages):
                candidate["advantage"] = round(advantage, 6)
        return part
    write_groups(run.path("candidates.jsonl"), states, 256, group, "candidates")


def stage_pairs(run):
    from actor import turn_pairs
    rng, writer = random.Random(f"turn pairs {run.options.seed}"), JsonlWriter(run.path("pairs.jsonl"), 10 ** 9)
    for _, state in read_jsonl(run.path("candidates.jsonl"), ("messages", "candidates")):
        found = state["candidates"]
        for a, b in turn_pairs([c["advantage"] for c in found], run.settings["pairs"].per_state, rng):
            turns = [[{"role": "assistant", "content": found[i]["content"], "output_ids": found[i]["output_ids"]}] for i in (a, b)]
            writer.write([{"prompt": state["messages"], "chosen": turns[0], "rejected": turns[1],
                           "advantages": [found[a]["advantage"], found[b]["advantage"]]}])
    writer.close()


def stage_actor(run):
    from actor import train_preferences, turn_view
    model, tokenizer = run.model("base")
    examples = [{side: turn_view(tokenizer, pair["prompt"], pair[side][0]) for side in ("chosen", "rejected")}
                for _, pair in read_jsonl(run.path("pairs.jsonl"), ("prompt", "chosen", "rejected"))]
    train_preferences(model, examples, run.path("actor"), run.settings["actor"], run.options.seed, save_to(model, tokenizer), "actor")


def stage_rft(run):
    from actor import train_imitation
    model, tokenizer = run.model("base")
    views = [render(tokenizer, t["dialogue_history"]) for t in run.trajectories() if t["reward"] == 1.0]
    if not views:
        raise InputError(f"{run.path('trajectories.jsonl')}: no successful dialogue to imitate; roll out more (--rollout-per-task)")
    train_imitation(model, views, run.path("rft"), run.settings["rft"], run.options.seed, save_to(model, tokenizer), "rft")


def stage_multiturn(run):
    from actor import train_preferences
    model, tokenizer = run.model("base")
    examples = [{"chosen": render(tokenizer, better["dialogue_history"]), "rejected": render(tokenizer, worse["dialogue_history"])}
                for better, worse in learning_pairs(run)]
    train_preferences(model, examples, run.path("multiturn"), run.settings["multiturn"], run.options.seed,
                      save_to(model, tokenizer), "multiturn")


def stage_eval(run):
    methods = ["base", "rft", "multiturn", "actor"] if run.variant == run.root else ["actor"]
    tasks, cfg = run.held_out(), run.settings["eval"]
    todo = [(method, top_p, i) for method in methods for top_p in (1.0, cfg.top_p) for i in range(len(tasks))]
    loaded = {}

    def group(_, part):
        method, top_p, _ = part[0]
        if method not in loaded:
            loaded.clear()
            loaded[method] = run.model(method)
        played = play_tasks(run, *loaded[method], [tasks[i] for _, _, i in part],
                            [(run.options.seed, "eval", i) for _, _, i in part], top_p=top_p)
        return [{"method": METHODS[method] if run.variant == run.root else "SWEET without c", "top_p": top_p, **trajectory,
                 "dialogue_history": bare(trajectory["dialogue_history"])} for trajectory in played]
    write_groups(run.path("eval.jsonl"), todo, len(tasks), group, "eval")


def stage_credit(run):
    from critic import agreement_with_labels, agreement_with_monte_carlo
    from worlds.backend import judge
    cfg, seed, rng = run.settings["credit"], run.options.seed, random.Random(f"credit {run.options.seed}")
    tasks = run.held_out()[:cfg.states]
    model, tokenizer = run.model("base")
    states = []
    for trajectory in play_tasks(run, model, tokenizer, tasks, [(seed, "credit", i) for i in range(len(tasks))]):
        turn = rng.randrange(1, len(trajectory["dialogue_history"]), 2)
        states.append({"task": trajectory["task"], "messages": bare(trajectory["dialogue_history"][:turn])})
    sample_states(model, tokenizer, states, [(seed, "credit", i, "candidates") for i in range(len(states))],
                  run.settings["candidates"].n, run.settings["rollout"].max_tokens)
    for use_reference in (True, False):
        score_reference(run, model, tokenizer, states, use_reference)
    play_on(run, model, tokenizer, states[:cfg.monte_carlo_states], cfg.monte_carlo_rollouts)
    model, tokenizer = run.model("critic")
    for state, advantages in zip(states, rank_states(run, model, tokenizer, states)):
        task = Task.from_record(state["task"])
        right = grade([c["content"].split(ANSWER_MARKER, 1)[-1] for c in state["candidates"]], [task] * len(advantages))
        for candidate, advantage, reward in zip(state["candidates"], advantages, right):
            kind, good = judge(task, state["messages"], candidate["content"])
            candidate |= {"advantage": advantage, "kind": kind, "good": reward == 1.0 if kind == "answer" else good}
    write_json(run.path("credit.json"), {**agreement_with_labels(states),
                                         "monte_carlo": agreement_with_monte_carlo(states[:cfg.monte_carlo_states])})


def play_on(run, model, tokenizer, states, n):
    """Value every candidate by Monte Carlo: adds "returns", the rewards of n dialogues that the policy plays on from it."""
    from actor import play_out
    cfg, envs, keys, human = run.settings["rollout"], [], [], run.human()
    for s, state in enumerate(states):
        for c, candidate in enumerate(state["candidates"]):
            for k in range(n):
                env = DialogueEnv(cfg.max_turns)
                env.reset(Task.from_record(state["task"]))
                env.messages, env.turns = list(state["messages"]), len(state["messages"]) // 2
                env.step(candidate["content"], output_ids=candidate["output_ids"])
                envs.append(env)
                keys.append((run.options.seed, "play on", s, c, k))
    going = [i for i, env in enumerate(envs) if env.answer is None]
    for i, reply in zip(going, human.reply([envs[i].task for i in going], [envs[i].messages for i in going])):
        envs[i].observe(reply)
    for first in range(0, len(going), 512):
        part = going[first:first + 512]
        play_out(model, tokenizer, [envs[i] for i in part], human, [keys[i] for i in part], max_tokens=cfg.max_tokens)
    rewards = iter(grade([env.answer for env in envs], [env.task for env in envs]))
    for state in states:
        for candidate in state["candidates"]:
            candidate["returns"] = [next(rewards) for _ in range(n)]


def stage_report(run):
    import report
    report.write(run.root, run.path("report.html"))


@dataclass(frozen=True)
class Stage:
    """A stage: what it runs, what it leaves behind, the stages it reads from, the hyper-parameters it adds to theirs."""
    work: object
    output: str
    after: tuple = ()
    own: tuple = ()

    @property
    def needs(self):
        return sorted({*self.own, *(name for stage in self.after for name in STAGES[stage].needs)})


STAGES = {
    "base": Stage(stage_base, "base", (), ("base",)),
    "rollout": Stage(stage_rollout, "trajectories.jsonl", ("base",), ("rollout",)),
    "critic": Stage(stage_critic, "critic", ("rollout",), ("pairs", "critic")),
    "samples": Stage(stage_samples, "samples.jsonl", ("rollout",), ("candidates",)),
    "candidates": Stage(stage_candidates, "candidates.jsonl", ("samples", "critic")),
    "pairs": Stage(stage_pairs, "pairs.jsonl", ("candidates",)),
    "actor": Stage(stage_actor, "actor", ("pairs",), ("actor",)),
    "rft": Stage(stage_rft, "rft", ("rollout",), ("rft",)),
    "multiturn": Stage(stage_multiturn, "multiturn", ("rollout",), ("pairs", "multiturn")),
    "eval": Stage(stage_eval, "eval.jsonl", ("actor", "rft", "multiturn"), ("eval",)),
    "credit": Stage(stage_credit, "credit.json", ("critic",), ("eval", "candidates", "credit")),
    "report": Stage(stage_report, "report.html", ("eval", "credit")),
}
METHODS = {"base": "base", "rft": "RFT", "multiturn": "multi-turn DPO", "actor": "SWEET"}


def run_stage(run, name):
    """Run a stage unless it is done, after the stages it reads from; writes down how long it took."""
    stage = STAGES[name]
    for earlier in stage.after:
        if run.variant == run.root or earlier not in ("rft", "multiturn"):
            run_stage(run, earlier)
    if name == "base" and run.options.model:
        return
    run.claim(name)
    if run.path(stage.output).exists() and name != "report":
        return
    start = time.monotonic()
    stage.work(run)
    if name != "report":
        file = run.path("eval").parent / "seconds.json"
        spent = json.loads(file.read_text()) if file.exists() else {}
        write_json(file, {**spent, name: round(spent.get(name, 0) + time.monotonic() - start, 1)})


# ---------------------------------------------------------------------------------------------------------- play and table

def play(run):
    """You are the human: talk with the trained agent, then see its answer graded and its turns judged by the critic."""
    from actor import play_out
    from critic import critic_view, turn_advantages
    from kernels.logprob import collate, turn_logprobs
    from simulator import ConsoleHuman
    task = random.Random(time.time_ns() if run.options.seed is None else run.options.seed).choice(run.held_out())
    env = DialogueEnv(run.settings["rollout"].max_turns)
    env.reset(task)
    print(f"You asked for this:\n\n    {task.problem_description}\n\nWhat you have in mind, and the agent cannot see:\n\n{task.ground_truth}")
    play_out(*run.model("actor"), [env], ConsoleHuman(), ["play"], top_p=run.settings["eval"].top_p,
             max_tokens=run.settings["rollout"].max_tokens)
    view = []
    for name in ("critic", "base"):
        model, tokenizer = run.model(name)
        trajectory = {"task": task.to_record(), "dialogue_history": env.messages}
        view.append(turn_logprobs(model, collate([critic_view(tokenizer, trajectory, run.settings["critic"].reference)])))
    (sums, lengths), (ref_sums, _) = view
    print(f"\nagent: {env.messages[-1]['content']}\n\nThe critic's advantage of each turn (nats a token, 0: as before training):")
    for k, advantage in enumerate(turn_advantages(sums, ref_sums, lengths)[0].tolist()):
        print(f"  turn {k + 1}  {advantage:+.2f}  {env.messages[2 * k + 1]['content'][:90]!r}")
    print(f"\nTests passed: {grade([env.answer], [task])[0]:.0%}")


def table(argv, options):
    """The README's table: `sweet.py` with --seed 0, 1, ... under one folder, each with and without c; then one table of all."""
    import subprocess
    from concurrent.futures import ThreadPoolExecutor
    import report
    runs = [Path(options.run) / f"seed{seed}" for seed in range(options.seeds)]

    def one(seed):
        common = [sys.executable, __file__, *argv, "--run", str(runs[seed]), "--seed", str(seed)]
        for extra in ([], ["--no-reference"]):
            with open(f"{runs[seed]}.log", "a") as log:
                subprocess.run(common[:2] + ["all"] + common[2:] + extra, check=True, stdout=log, stderr=log)
    Path(options.run).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(tqdm(pool.map(one, range(options.seeds)), total=options.seeds, desc="seeds"))
    text = report.results_table(runs)
    print(text)
    Path(options.run, "table.md").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- command line

def parser():
    """One flag for each field of each group, with its default and the paper's value."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    top.add_argument("stage", nargs="?", default="all", choices=["all", *STAGES, "play", "table"], metavar="STAGE")
    top.add_argument("--run", default="runs/default", help="folder of the run (default runs/default)")
    top.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    top.add_argument("--smoke", action="store_true", help="everything in miniature; writes to runs/smoke")
    top.add_argument("--preset", choices=["small", "paper"], default="small", help="defaults: of the small world, or the paper's")
    top.add_argument("--model", help="initial policy and critic: a Hugging Face directory or name (default: the small world's base)")
    top.add_argument("--tasks", help="training tasks: a ColBench file (default: the small world's)")
    top.add_argument("--eval-tasks-file", dest="eval_tasks", help="held-out tasks: a ColBench file (default: the small world's)")
    top.add_argument("--human", default="scripted", help="scripted | me | URL | module:Class | a model's directory or name")
    top.add_argument("--human-model", help="the model to ask for at a URL")
    top.add_argument("--device", default="cpu", help="cpu, cuda or mps (default cpu)")
    top.add_argument("--threads", type=int, default=1, help="processor threads of torch (default 1)")
    top.add_argument("--seeds", type=int, default=5, help="table: number of seeds (default 5)")
    top.add_argument("--jobs", type=int, default=2, help="table: seeds that run at the same time (default 2)")
    for group, kind in groups().items():
        section = top.add_argument_group(group, (kind.__doc__ or "").split("\n")[0] if not kind.__doc__.startswith(kind.__name__) else None)
        for f in dataclasses.fields(kind):
            paper = f.metadata.get("paper")
            text = f"{f.metadata['text']} (default {f.default}{'' if paper is None else f', paper {paper}'})".replace("%", "%%")
            flag = f.metadata.get("flag", f"{group}-{f.name}".replace("_", "-"))
            how = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {"type": type(f.default)}
            section.add_argument(f"--{flag}", dest=f"{group}.{f.name}", default=None, help=text, **how)
    return top


def settings_of(options):
    """The hyper-parameters: flags over --smoke over --preset over the defaults."""
    settings = {}
    for group, kind in groups().items():
        values = {}
        for f in dataclasses.fields(kind):
            if options.preset == "paper" and f.metadata.get("paper") is not None:
                values[f.name] = f.metadata["paper"]
            if options.smoke and f.name in SMOKE.get(group, {}):
                values[f.name] = SMOKE[group][f.name]
            if getattr(options, f"{group}.{f.name}") is not None:
                values[f.name] = getattr(options, f"{group}.{f.name}")
        settings[group] = kind(**values)
    return settings


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    if options.smoke and options.run == "runs/default":
        options.run = "runs/smoke"
    import torch
    torch.set_num_threads(options.threads)
    try:
        run = Run(options, settings_of(options))
        if options.stage == "table":
            table([a for a in argv if a != "table"], options)
        elif options.stage == "play":
            play(run)
        else:
            run.variant.mkdir(parents=True, exist_ok=True)
            run_stage(run, "report" if options.stage == "all" else options.stage)
            if options.stage in ("all", "report"):
                import report
                print(report.results_table([run.root]))
                print(f"report: {run.path('report.html')}")
    except InputError as error:
        sys.exit(f"sweet: {error}")
    except OSError as error:
        sys.exit(f"sweet: {error.filename or run.root}: {error.strerror}; what was finished is kept, run the same command again")


if __name__ == "__main__":
    main()
