"""SWEET-RL on one page: the stages in order, the command line, the results.

    python sweet.py                     everything, into runs/default/ (a laptop will do)
    python sweet.py --smoke             the same in miniature, to see that it works
    python sweet.py STAGE               one stage, after what it needs and what is missing
    python sweet.py play                you are the human
    python sweet.py table               the README's table: several seeds of everything, and SWEET without c

Stages hand each other files under runs/NAME/, never hidden state:

    base        base/               the initial policy of the small world (with --model: yours)
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

A stage that is done is skipped; a stage that was killed goes on where it was; files made with other settings are
refused. Hyper-parameters: one dataclass a stage, beside the code that uses it; every field is a flag, and --help
shows the paper's value beside ours.
"""
import argparse
import copy
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait are slow on a busy machine

import torch
from tqdm import tqdm

import actor
import critic
import report
from env import DialogueEnv
from env import load_tasks, read_trajectories, render
from machinery.files import fingerprint, holds_something, InputError, JsonlWriter, read_jsonl, write_groups, write_json
from machinery.server import Server
from machinery.start import check_start
from machinery.train import ONE_GPU, SMOKE, Given, Machine, arg, check_values, flag_of, load_model, save_to
from kernels.prefix import use_plain_path
from simulator import ConsoleHuman
from worlds import backend, frontend


@dataclass(frozen=True)
class Eval:
    """Held-out dialogues."""
    tasks: int = arg(500, "held-out tasks (with --heldout: all of the file, unless given)", 1000)
    split: str = arg("test", "held-out tasks of the small world: dev (to choose settings) or test (once)",
                     among=("dev", "test"))
    top_p: float = arg(0.9, "the second way of decoding; the first is plain sampling at temperature 1", most=1)


@dataclass(frozen=True)
class Credit:
    """How the critic is checked."""
    states: int = arg(200, "held-out states whose candidates the critic is tested on")
    monte_carlo_states: int = arg(20, "states whose candidates are also valued by playing on", least=0)
    monte_carlo_rollouts: int = arg(24, "dialogues played on from each candidate")


@dataclass(frozen=True)
class Table:
    """The stage table: several seeds of everything."""
    seeds: int = arg(5, "number of seeds", flag="seeds")
    jobs: int = arg(2, "seeds that run at the same time", flag="jobs")


GROUPS = {"given": Given, "machine": Machine, "human": Server, "base": backend.Base, "rollout": actor.Rollout,
          "pairs": critic.Pairs, "critic": critic.Critic, "candidates": actor.Candidates, "actor": actor.Actor,
          "rft": actor.Rft, "multiturn": actor.Multiturn, "eval": Eval, "credit": Credit, "table": Table}
WORLDS = {"backend": backend, "frontend": frontend}
METHODS = {"base": "base", "rft": "RFT", "multiturn": "multi-turn DPO", "actor": "SWEET"}


# ------------------------------------------------------------------ a run

class Run:
    """Where the files of a run are, and the rule that keeps them apart: a stage's settings are written when it starts,
    together with those of all stages before it, and whoever comes later with other ones is refused."""

    def __init__(self, options, settings):
        self.options, self.settings, self.seed = options, settings, options.seed
        self.root, self.given, self.machine = Path(options.run), settings["given"], settings["machine"]
        self.world = WORLDS[options.task]
        self.grade = self.world.grader(self.given.clip, settings["rollout"].call_seconds)
        self.rules = {"grade": self.grade, "instructions": self.world.INSTRUCTIONS}
        self.variant = self.root if settings["critic"].reference else self.root / "no-reference"

    def path(self, name):
        """A file of the run. What depends on whether the critic reads c lies in a folder of its own when it does
        not."""
        if name == "trajectories.jsonl" and self.given.trajectories:
            return Path(self.given.trajectories)
        own = name.split(".")[0] in ("critic", "candidates", "pairs", "actor", "eval", "credit")
        return (self.variant if own else self.root) / name

    def claim(self, stage):
        """Refuse to mix: compare the settings that `stage` stands on with those its files were begun with."""
        mine = {"task": self.options.task, "seed": self.seed,
                **{key: getattr(self.machine, key) for key in ("dtype", "attention", "lora")}}
        for name in STAGES[stage].needs:
            group, _, one = name.partition(".")
            values = dataclasses.asdict(self.settings[group])
            mine |= {one: fingerprint(values[one])} if one else {f"{group}.{key}": v for key, v in values.items()}
        if "://" in (mine.get("human") or ""):  # a server may move to another address, its model may not change
            mine["human"] = f"server: {self.settings['human'].model}"
        output = self.path(STAGES[stage].output)
        file = output.parent / "settings" / f"{stage}.json"
        if file.exists() and any(map(holds_something, output.parent.glob(f"{output.name}*"))):
            theirs = json.loads(file.read_text(encoding="utf-8"))
            for key in sorted(set(mine) | set(theirs)):
                if mine.get(key) != theirs.get(key):
                    raise InputError(f"{file}: this run's {stage} was made with {key} = {theirs.get(key)!r}, now it is "
                                     f"{mine.get(key)!r}; use another --run, or delete {output}* and what follows it")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, mine)

    def model(self, name, train=False):
        path = self.given.model if name == "base" and self.given.model else self.path(name)
        return load_model(path, self.machine, train, self.seed)

    def human(self):
        return self.world.human(self.given.human, self.settings["human"], self.machine, self.seed)

    def tasks(self, file, group, split):
        if file:
            return load_tasks(file)[:getattr(self.options, f"{group}.tasks")]
        return self.world.make_tasks(self.settings[group].tasks, self.seed, split)

    def held_out(self):
        return self.tasks(self.given.heldout, "eval", self.settings["eval"].split)

    def records(self, name, *required):
        return (record for _, record in read_jsonl(self.path(name), required))

    def trajectories(self):
        return read_trajectories(self.path("trajectories.jsonl"))


# ------------------------------------------------------------------ stages

def stage_base(run):
    cfg = run.settings["base"]
    model, tokenizer = run.world.new_model(cfg, run.seed)
    documents = run.world.documents(cfg.documents, run.seed)
    views = [render(tokenizer, messages, reference) for messages, reference in documents]
    actor.train_imitation(model, views, run.path("base"), cfg, run.seed, save_to(model, tokenizer), "base")


def stage_rollout(run):
    cfg, human = run.settings["rollout"], run.human()
    tasks = run.tasks(run.given.tasks, "rollout", "train")
    model, tokenizer = run.model("base")
    actor.check_tasks(model, tokenizer, tasks, cfg)

    def group(part, _):
        return actor.play_tasks(model, tokenizer, [tasks[i] for i, _ in part], human,
                                [(run.seed, "rollout", *key) for key in part], cfg, temperature=cfg.temperature,
                                **run.rules)
    write_groups(run.path("trajectories.jsonl"), [(i, k) for i in range(len(tasks)) for k in range(cfg.per_task)],
                 run.machine.rows, group, "rollout")


def better_and_worse(run, per_task):
    margin = run.settings["pairs"].margin
    pairs = critic.trajectory_pairs(run.trajectories(), per_task, margin, random.Random(f"pairs {run.seed}"))
    if not pairs:
        raise InputError(f"{run.path('trajectories.jsonl')}: no task has both a successful and a failed dialogue: "
                         "nothing to learn from; roll out more (--rollout-per-task) or start from a better --model")
    return pairs


def stage_critic(run):
    model, tokenizer = run.model("base", train=True)
    pairs = better_and_worse(run, run.settings["pairs"].per_task)
    critic.train(model, tokenizer, pairs, run.path("critic"), run.settings["critic"], run.seed,
                 save_to(model, tokenizer))


def stage_samples(run):
    cfg, rng = run.settings["candidates"], random.Random(f"states {run.seed}")
    model, tokenizer = run.model("base")
    if run.given.candidates:
        states = actor.read_candidates(tokenizer, run.given.candidates)
    else:
        states = [{"task": t["task"], "messages": t["dialogue_history"][:turn]} for t in run.trajectories()
                  for turn in range(1, len(t["dialogue_history"]), 2)]
        chosen = rng.sample(range(len(states)), min(cfg.states, len(states)))
        states = [states[i] for i in sorted(chosen)]  # in order, so that states of one task share what they can

    def group(part, first):
        part, keys = copy.deepcopy(part), [(run.seed, "samples", first + i) for i in range(len(part))]
        if not run.given.candidates:
            actor.sample_candidates(model, tokenizer, part, keys, cfg.n, run.settings["rollout"].max_tokens)
        critic.score_reference(model, tokenizer, part)
        return part
    write_groups(run.path("samples.jsonl"), states, max(1, run.machine.rows // 8), group, "samples")


def stage_candidates(run):
    model, tokenizer = run.model("critic")

    def group(part, _):
        critic.rank(model, tokenizer, part, run.settings["critic"])
        return part
    states = list(run.records("samples.jsonl", "task", "messages", "candidates"))
    write_groups(run.path("candidates.jsonl"), states, 256, group, "candidates")


def stage_pairs(run):
    rng, cfg = random.Random(f"turn pairs {run.seed}"), run.settings["pairs"]
    writer = JsonlWriter(run.path("pairs.jsonl"), 10 ** 9)
    for state in run.records("candidates.jsonl", "messages", "candidates"):
        turns = state["candidates"]
        advantages, counts = [c["advantage"] for c in turns], [c.get("count", 1) for c in turns]
        for pair in actor.turn_pairs(advantages, counts, cfg.per_state, rng):
            chosen, rejected = ([{"role": "assistant", **{key: turns[i][key] for key in ("content", "output_ids")}}]
                                for i in pair)
            writer.write([{"prompt": state["messages"], "chosen": chosen, "rejected": rejected,
                           "advantages": [advantages[i] for i in pair]}])
    writer.close()


def stage_actor(run):
    model, tokenizer = run.model("base", train=True)
    examples = [{side: actor.turn_view(tokenizer, pair["prompt"], pair[side][0]) for side in ("chosen", "rejected")}
                for pair in run.records("pairs.jsonl", "prompt", "chosen", "rejected")]
    if not examples:
        raise InputError(f"{run.path('pairs.jsonl')}: holds no pair; sample more candidates (--candidates-states)")
    actor.train_preferences(model, examples, run.path("actor"), run.settings["actor"], run.seed,
                            save_to(model, tokenizer), "actor")


def stage_rft(run):
    model, tokenizer = run.model("base", train=True)
    views = [render(tokenizer, t["dialogue_history"]) for t in run.world.successes(run.trajectories())]
    if not views:
        raise InputError(f"{run.path('trajectories.jsonl')}: no successful dialogue to imitate; roll out more of them "
                         "(--rollout-per-task), or start from a better --model")
    actor.train_imitation(model, views, run.path("rft"), run.settings["rft"], run.seed, save_to(model, tokenizer),
                          "rft")


def stage_multiturn(run):
    model, tokenizer = run.model("base", train=True)
    pairs = better_and_worse(run, run.settings["multiturn"].per_task)
    examples = [{"chosen": render(tokenizer, better["dialogue_history"]),
                 "rejected": render(tokenizer, worse["dialogue_history"])} for better, worse in pairs]
    actor.train_preferences(model, examples, run.path("multiturn"), run.settings["multiturn"], run.seed,
                            save_to(model, tokenizer), "multiturn")


def stage_eval(run):
    tasks, cfg, loaded = run.held_out(), run.settings["eval"], {}
    names = METHODS if run.variant == run.root else {"actor": "SWEET without c"}
    todo = [(method, top_p, i) for method in names for top_p in (1.0, cfg.top_p) for i in range(len(tasks))]

    def group(part, _):
        method, top_p, _ = part[0]
        if method not in loaded:
            loaded.clear()
            loaded[method] = run.model(method)
        played = actor.play_tasks(*loaded[method], [tasks[i] for _, _, i in part], run.human(),
                                  [(run.seed, "eval", i) for _, _, i in part], run.settings["rollout"], top_p=top_p,
                                  **run.rules)
        return [{"method": names[method], "top_p": top_p, **t, "dialogue_history": actor.bare(t["dialogue_history"])}
                for t in played]
    write_groups(run.path("eval.jsonl"), todo, len(tasks), group, "eval")


def stage_credit(run):
    cfg, rng, play = run.settings["credit"], random.Random(f"credit {run.seed}"), run.settings["rollout"]
    tasks, human = run.held_out()[:cfg.states], run.human()
    model, tokenizer = run.model("base")
    states = []
    keys = [(run.seed, "credit", i) for i in range(len(tasks))]
    for trajectory in actor.play_tasks(model, tokenizer, tasks, human, keys, play, **run.rules):
        turns = range(1, len(trajectory["dialogue_history"]), 2)
        turn = turns[-1] if len(states) % 2 else rng.choice(turns)  # half of them where answers are given
        states.append({"task": trajectory["task"], "messages": actor.bare(trajectory["dialogue_history"][:turn])})
    keys = [(run.seed, "credit candidates", i) for i in range(len(states))]
    actor.sample_candidates(model, tokenizer, states, keys, run.settings["candidates"].n, play.max_tokens)
    critic.score_reference(model, tokenizer, states)
    valued = states[:cfg.monte_carlo_states]
    actor.play_on(model, tokenizer, valued, human, cfg.monte_carlo_rollouts, play, run.seed, run.grade)
    critic.rank(*run.model("critic"), states, run.settings["critic"])
    critic.label(states, run.world.judge, run.grade)
    write_json(run.path("credit.json"), {**critic.agreement_with_labels(states),
                                         "monte_carlo": critic.agreement_with_monte_carlo(valued)})


def stage_report(run):
    report.write(run.root, run.path("report.html"), world=run.world)


@dataclass(frozen=True)
class Stage:
    """What a stage runs and leaves behind, the stages it reads from, and the hyper-parameters (whole groups, or one
    as group.name) that it adds to theirs."""
    work: object
    output: str
    after: tuple = ()
    own: tuple = ()

    @property
    def needs(self):
        return sorted({*self.own, *(name for stage in self.after for name in STAGES[stage].needs)})


STAGES = {
    "base": Stage(stage_base, "base", (), ("base", "given.model")),
    "rollout": Stage(stage_rollout, "trajectories.jsonl", ("base",),
                     ("rollout", "given.tasks", "given.human", "given.clip", "given.trajectories")),
    "critic": Stage(stage_critic, "critic", ("rollout",), ("pairs", "critic")),
    "samples": Stage(stage_samples, "samples.jsonl", ("rollout",), ("candidates", "given.candidates")),
    "candidates": Stage(stage_candidates, "candidates.jsonl", ("critic", "samples")),
    "pairs": Stage(stage_pairs, "pairs.jsonl", ("candidates",)),
    "actor": Stage(stage_actor, "actor", ("pairs",), ("actor",)),
    "rft": Stage(stage_rft, "rft", ("rollout",), ("rft",)),
    "multiturn": Stage(stage_multiturn, "multiturn", ("rollout",), ("pairs", "multiturn")),
    "eval": Stage(stage_eval, "eval.jsonl", ("actor", "rft", "multiturn"), ("eval", "given.heldout")),
    "credit": Stage(stage_credit, "credit.json", ("critic",), ("eval", "given.heldout", "candidates", "credit")),
    "report": Stage(stage_report, "report.html", ("eval", "credit")),
}


def run_stage(run, name):
    """Run a stage unless it is done, after the stages it reads from; writes down how long it took."""
    stage = STAGES[name]
    for earlier in stage.after:
        if run.variant == run.root or earlier not in ("rft", "multiturn"):
            run_stage(run, earlier)
    if name == "base" and run.given.model or name == "rollout" and run.given.trajectories:
        return
    if name != "report":  # a report is made anew, of whatever is there
        run.claim(name)
        if run.path(stage.output).exists():
            return
    start = time.monotonic()
    stage.work(run)
    file = run.path(stage.output).parent / "seconds.json"
    spent = json.loads(file.read_text()) if file.exists() else {}
    write_json(file, {**spent, name: round(time.monotonic() - start, 1)})


# ------------------------------------------------------------------ play and table

def play(run):
    """You are the human: talk with the trained agent, then see its answer graded and its turns judged by the critic."""
    task, cfg = random.Random(time.time_ns()).choice(run.held_out()), run.settings["rollout"]
    env = DialogueEnv(cfg.max_turns, run.world.INSTRUCTIONS)
    env.reset(task)
    print(f"You asked for this:\n\n    {task.problem_description}\n")
    print(f"What you have in mind, and the agent cannot see:\n\n{task.ground_truth}")
    actor.play_out(*run.model("actor"), [env], ConsoleHuman(), ["play"], top_p=run.settings["eval"].top_p,
                   max_tokens=cfg.max_tokens)
    print(f"\nagent: {env.messages[-1]['content']}\n\n{run.world.REWARD}: "
          f"{run.grade([env.answer], [task])[0]:.0%}")
    print("\nThe critic's advantage of each turn, in nats a token (0: like the initial policy's average turn):")
    trajectory = {"task": task.to_record(), "dialogue_history": env.messages}
    for k, advantage in enumerate(critic.judge_turns(run.model("critic"), run.model("base")[0], trajectory,
                                                     run.settings["critic"])):
        print(f"  turn {k + 1}  {advantage:+.2f}  {env.messages[2 * k + 1]['content'][:90]!r}")


def table(argv, options, cfg):
    """The README's table: everything with several seeds from --seed on, with and without c, under one folder; then one
    table of all."""
    seeds = range(options.seed, options.seed + cfg.seeds)
    runs = {seed: Path(options.run) / f"seed{seed}" for seed in seeds}

    def one(seed):
        for extra in ([], ["--no-reference"]):
            with open(f"{runs[seed]}.log", "a") as log:
                subprocess.run([sys.executable, __file__, *argv, "--run", str(runs[seed]), "--seed", str(seed), *extra],
                               check=True, stdout=log, stderr=log)
    Path(options.run).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(cfg.jobs) as pool:
        list(tqdm(pool.map(one, seeds), total=len(seeds), desc="seeds"))
    text = report.results_table(list(runs.values()), WORLDS[options.task])
    print(text)
    (Path(options.run) / "table.md").write_text(text, encoding="utf-8")


# ------------------------------------------------------------------ command line

def parser():
    """One flag for each field of each group of hyper-parameters, with its default and the paper's value."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                  allow_abbrev=False, usage="python sweet.py [STAGE] [--flags]")
    top.add_argument("stage", nargs="?", default="all", choices=["all", *STAGES, "play", "table"], metavar="STAGE")
    top.add_argument("--task", choices=list(WORLDS), default="backend", help="what to collaborate on (default backend)")
    top.add_argument("--run", default="runs/default", help="folder of the run (default runs/default or runs/smoke)")
    top.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    top.add_argument("--smoke", action="store_true", help="everything in miniature")
    top.add_argument("--preset", choices=["small", "paper", "one-gpu"], default="small",
                     help="defaults: those of the small world, the paper's, or a small run on one GPU")
    top.add_argument("--plain", action="store_true", help="the plain path: no shared prefixes, all logits held (slow)")
    for group, kind in GROUPS.items():
        section = top.add_argument_group(group, kind.__doc__)
        for f in dataclasses.fields(kind):
            paper = "" if f.metadata["paper"] is None else f", paper {f.metadata['paper']}"
            how = {"type": type(f.default), "metavar": f.name.upper()}
            how = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else how
            section.add_argument(flag_of(group, f), dest=f"{group}.{f.name}", default=None,
                                 help=f"{f.metadata['text']} (default {f.default!r}{paper})", **how)
    return top


def settings_of(options):
    """The hyper-parameters: flags over --smoke over --preset over the defaults."""
    settings = {}
    for group, kind in GROUPS.items():
        fields, values = dataclasses.fields(kind), dict(WORLDS[options.task].DEFAULTS.get(group, {}))
        if options.preset == "one-gpu":
            values |= ONE_GPU.get(group, {})
        if options.preset == "paper":
            values |= {f.name: f.metadata["paper"] for f in fields if f.metadata["paper"] is not None}
        flags = {f.name: getattr(options, f"{group}.{f.name}") for f in fields}
        flags = {name: value for name, value in flags.items() if value is not None}
        settings[group] = kind(**{**values, **(SMOKE.get(group, {}) if options.smoke else {}), **flags})
        check_values(group, settings[group])
    return settings


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    if options.smoke and options.run == "runs/default":
        options.run = "runs/smoke"
    use_plain_path(options.plain)
    try:
        run = Run(options, settings_of(options))
        torch.set_num_threads(run.machine.threads)
        check_start(run, STAGES, options.stage)
        for file in filter(None, (run.given.tasks, run.given.heldout)):
            load_tasks(file, run.world.OPTIONAL)  # bad input is known before any long work starts
        if options.stage == "table":
            return table([a for a in argv if a != "table"], options, run.settings["table"])
        if options.stage == "play":
            if not run.path("critic").exists() or not run.path("actor").exists():
                raise InputError(f"{run.root}: holds no trained actor and critic to play with; the same flags without "
                                 "'play' train them")
            return play(run)
        run_stage(run, "report" if options.stage == "all" else options.stage)
        if options.stage in ("all", "report"):
            print(f"\n{report.results_table([run.root], run.world)}\nreport: {run.path('report.html')}")
    except InputError as error:
        sys.exit(f"sweet: {error}")
    except Exception as error:  # a disk can fill up in any library, each with an exception of its own
        if not isinstance(error, OSError) and "No space left" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        where = getattr(error, "filename", None) or options.run
        sys.exit(f"sweet: {where}: {reason}; what is finished is kept, run the same command again")


if __name__ == "__main__":
    main()
