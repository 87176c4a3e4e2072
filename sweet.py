"""SWEET-RL on one page: the stages in order, the command line, the results.

    python sweet.py [STAGE] [--flags]   without STAGE all of them (a laptop will do)
    python sweet.py status              what is done in a run, and what comes next
    python sweet.py play                you are the human
    python sweet.py table               the README's table: several seeds of everything
    python sweet.py study NAME          critics, best-of-n, data or rounds, over several seeds
    python sweet.py export NAME         merged (LoRA as plain weights) or trl (tasks for TRL)

Stages hand each other files under runs/NAME/, never hidden state. One that is done is
skipped, one that was killed goes on where it was. A run remembers its flags; where new
ones contradict what is there, they are refused.

    base        base/               the initial policy of the small world (or --model, fine-tuned)
    rollout     trajectories.jsonl  offline dialogues by the initial policy, with rewards
    critic      critic/             Bradley-Terry on whole trajectories, given c  (Eq. 2, 3)
    samples     samples.jsonl       candidate turns at states of the offline dialogues
    candidates  candidates.jsonl    the same, with the critic's advantages
    pairs       pairs.jsonl         chosen and rejected turns (TRL's preference format)
    actor       actor/              DPO on turn pairs  (Eq. 4)
    rft, multiturn                  the baselines on the same trajectories
    eval        eval.jsonl          dialogues of every policy on held-out tasks, graded
    credit      credit.json         is the critic right?
    report      report.html         what there is of a run, on one page
    best-of-n   best-of-n.jsonl     the critic picks each turn; only if asked for
"""
import copy
import functools
import itertools
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from machinery.process import InUse, alone, one_line, stop_on_signals

if __name__ == "__main__":
    stop_on_signals()  # already while the slow imports run
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait are slow on a busy machine

import torch

import actor
import critic
import play
import report
from adapters import EXPORTS, export, finished
from adapters.trackers import Tracker
from env import ANSWER_MARKER
from env import end_of_turn, load_tasks, read_trajectories, render
from machinery import schema
from machinery.bars import note, whole_bars
from machinery.files import InputError, forgive, put_text, read_lines, read_prompt, write_groups, write_lines
from machinery.flags import Flags, read_settings
from machinery.folder import closing, critic_folder, flags_given, further_critics, keep, measured, place, recall
from machinery.folder import remembering, show_status, to_redo
from machinery.policy_server import policy_server, tell_how_to_serve
from machinery.provenance import remember
from machinery.reasons import why_no_pair, why_no_success, why_no_turn_pair
from machinery.seeds import run_chains
from machinery.server import Server
from machinery.several import humans_of
from machinery.settings import HELD_OUT, HUMAN, LOADED, PLAYED, TRAINED
from machinery.settings import Record, flat, stages_of_run
from machinery.start import check_start, machine_here, stages_to_do
from machinery.speed import Speed
from machinery.train import Given, Machine, arg, check_finite, check_views, load_model, save_to
from simulator import tell_leaks
from studies import best_of_n, credit, faults, study
from studies.critics import find_critic, title_of
from worlds import find_world, tiny


@dataclass(frozen=True)
class Eval:
    """Held-out dialogues."""
    tasks: int = 500
    """Held-out tasks (with --heldout: all of the file, unless given)."""
    first: int = arg(0, least=0)
    """Held-out tasks that --tasks begins with, where there is no --heldout; 0: none."""
    split: Literal["dev", "test"] = "test"
    """Held-out tasks of the small world: dev (to choose settings) or test (once)."""
    top_p: float = arg(0.9, most=1)
    """The second way of decoding; the first is plain sampling at temperature 1. 1: that alone."""
    methods: str = "base,rft,multiturn,actor"
    """Whom to evaluate: METHOD[,METHOD]. With base alone the stage eval trains nothing."""

    @property
    def names(self):
        """The methods. InputError on one that there is not."""
        found = self.methods.split(",")
        if not set(found) <= METHODS.keys():
            raise InputError(f"--eval-methods {self.methods}: expected {', '.join(METHODS)}, or some of them")
        return found


@dataclass(frozen=True)
class Table:
    """The stage table: several seeds of everything."""
    seeds: int = 5
    """Number of seeds."""
    jobs: int = 2
    """Seeds that run at the same time."""
    critics: str = arg("without-c,untrained,oracle", flag="table-critics")
    """Critics that the table has beside SWEET's: KIND[,KIND], or nothing."""

    @property
    def further(self):
        return [kind for kind in self.critics.split(",") if kind]


GROUPS = {
    "given": Given,
    "machine": Machine,
    "human": Server,
    "base": tiny.Base,
    "rollout": actor.Rollout,
    "pairs": critic.Pairs,
    "critic": critic.CriticSettings,
    "candidates": actor.Candidates,
    "actor": actor.ActorSettings,
    "rft": actor.Rft,
    "multiturn": actor.Multiturn,
    "eval": Eval,
    "credit": credit.Credit,
    "table": Table,
    "study": study.Study,
    "play": play.Play,
}
STUDIES = [f"study {name}" for name in study.NAMES]
METHODS = {"base": "base", "rft": "RFT", "multiturn": "multi-turn DPO", "actor": "SWEET"}


# ------------------------------------------------------------------ a run

class Run:
    """Where the files of a run are, what they are made from, and the settings that they are made with."""

    def __init__(self, options, settings):
        self.options = options
        self.settings = settings
        self.seed = options.seed
        self.root = Path(options.run)
        self.given = settings["given"]
        self.machine = settings["machine"]
        self.world = find_world(options.task)
        documents = getattr(options, "base.documents")
        self.tunes = bool(self.given.model and documents)
        if not self.given.model and documents == 0:
            raise InputError("--base-documents 0: without --model, base/ is made of documents")
        self.speed = Speed(self.machine)
        self.critic = find_critic(settings["critic"].kind)
        for further in settings["table"].further:
            find_critic(further, "--table-critics")
        self.grade = self.world.grader(self.given.clip, settings["rollout"].call_seconds)
        plain = settings_of(options, flags=False)
        kind = settings["critic"].kind
        self.further = kind != plain["critic"].kind  # a critic beside SWEET's: what depends on it is made beside
        self.variant = self.root / critic_folder(kind) if self.further else self.root
        self.methods = {**METHODS, "actor": title_of(kind)} if self.further else METHODS
        self.stages = stages_of_run(STAGES, self)
        values = flat(settings, task=options.task, seed=self.seed)
        defaults = flat(plain, task=options.task, seed=self.seed)
        if self.given.model and documents is not None:
            defaults["base.documents"] = 0  # of a run whose --model was taken as it is
        self.redo = to_redo(self)
        self.record = Record(self.stages, values, defaults, self.outputs, self.redo)
        self.track = Tracker(self)

    @property
    def initial(self):
        """The user's model, where it is the initial policy as it is; "" where the stage base makes one."""
        return "" if self.tunes else self.given.model

    @functools.cached_property
    def instructions(self):
        """What the agent reads before the request."""
        file = self.given.instructions
        return read_instructions(file) if file else self.world.INSTRUCTIONS

    @functools.cached_property
    def sampling(self):
        """Who is told how many tokens are sampled, and the server that samples them, if there is one."""
        return {"count": self.speed.wrote, "server": policy_server(self.machine)}

    @property
    def rules(self):
        return {"grade": self.grade, "instructions": self.instructions, **self.sampling}

    def path(self, name):
        """A file of the run. What depends on the critic lies in a folder of its own where --critic names another."""
        if name == "trajectories.jsonl" and self.given.trajectories:
            return Path(self.given.trajectories)
        return (self.variant if self.is_variant(name) else self.root) / name

    def is_variant(self, name):
        return name.split(".")[0] in ("critic", "candidates", "pairs", "actor", "eval", "credit", "best-of-n")

    def outputs(self, stage):
        """Where a stage leaves its files: in this run, and with other critics, if that is elsewhere. Nowhere if they
        are given."""
        name = STAGES[stage].output
        if stage == "base" and self.initial or stage == "rollout" and self.given.trajectories:
            return []
        if not self.is_variant(name):
            return [self.path(name)]
        others = [half for half in (self.root, *further_critics(self.root).values()) if half != self.variant]
        return [self.path(name), *(half / name for half in others)]

    def claim(self, stage):
        """Refuse to mix files that were made with different settings (machinery/settings.py)."""
        self.record.claim(stage)

    def model(self, name, train=False):
        path = self.initial if name == "base" and self.initial else self.path(name)
        model, tokenizer = load_model(path, self.machine, train, self.seed)
        return self.speed.watch(model), tokenizer

    def human(self, held_out=False):
        """Who replies in offline dialogues, or in held-out ones."""
        def make(spec, cfg):
            return self.world.human(spec, cfg, self.machine, self.seed)
        return humans_of(make, self.given, self.settings["human"], self.seed, held_out)

    def training_tasks(self):
        cfg, first = self.settings["rollout"], self.settings["eval"].first
        if not self.given.tasks:
            return self.world.make_tasks(cfg.tasks, cfg.seed or self.seed, "train")
        found = load_tasks(self.given.tasks)
        if not self.given.heldout:
            if len(found) <= first:
                raise InputError(f"--tasks {self.given.tasks}: holds {len(found)} tasks, of which --eval-first keeps "
                                 f"{first} for evaluation: none is left to train on; lower it, or name --heldout")
            found = found[first:]
        return found[:getattr(self.options, "rollout.tasks")]

    def held_out(self):
        cfg = self.settings["eval"]
        if self.given.heldout:
            found = load_tasks(self.given.heldout)
        elif self.given.tasks:
            found = load_tasks(self.given.tasks)[:cfg.first]
        else:
            return self.world.make_tasks(cfg.tasks, self.seed, cfg.split)
        return found[:getattr(self.options, "eval.tasks")]

    def learning(self, model, tokenizer):
        """What a stage hands on to machinery.train.fit: how to save, what fits into memory, who else sees the steps."""
        return {"save": save_to(model, tokenizer), "micro_batch": self.machine.micro_batch, "track": self.track}

    def better_and_worse(self, per_task, model, tokenizer, view):
        """Pairs of offline dialogues. view(trajectory): what `model` will read of it."""
        margin = self.settings["pairs"].margin
        found = list(self.trajectories(tokenizer))
        pairs = critic.trajectory_pairs(found, per_task, margin, random.Random(f"pairs {self.seed}"))
        if not pairs:
            why = why_no_pair(found, self.settings["rollout"], ANSWER_MARKER, self.given.trajectories, margin)
            nothing(self, "trajectories.jsonl", "pair", why)
        used = [trajectory for pair in pairs for trajectory in pair]
        check_views(model, map(view, used), [trajectory["where"] for trajectory in used])
        return pairs

    def records(self, name, kind):
        return (record for _, record in schema.read_records(self.path(name), kind))

    def trajectories(self, tokenizer):
        return read_trajectories(self.path("trajectories.jsonl"), tokenizer)


# ------------------------------------------------------------------ stages

def stage_base(run):
    cfg = run.settings["base"]
    if run.tunes:
        model, tokenizer = load_model(run.given.model, run.machine, True, run.seed)
        documents = run.world.documents_without_c(cfg.documents, run.seed)
    else:
        model, tokenizer = run.world.new_model(cfg, run.seed)
        documents = run.world.documents(cfg.documents, run.seed)
    run.speed.watch(model)
    views = [render(tokenizer, messages, reference) for messages, reference in documents]
    check_views(model, views, ["a dialogue of the demonstrator"] * len(views))
    longest = max(max(Counter(filter(None, turn_ids)).values()) for _, turn_ids in views)
    if longest > run.settings["rollout"].max_tokens:
        note(f"sweet: note: the demonstrator's turns have up to {longest} tokens: --rollout-max-tokens "
             f"{run.settings['rollout'].max_tokens} cuts such turns off")
    actor.train_imitation(model, views, run.path("base"), cfg, run.seed, label="base",
                          **run.learning(model, tokenizer))


def stage_rollout(run):
    cfg, human = run.settings["rollout"], run.human()
    seed = cfg.seed or run.seed
    tasks = run.training_tasks()
    model, tokenizer = run.model("base")
    actor.check_tasks(model, tokenizer, tasks, cfg, run.instructions)

    def group(part, _):
        keys = [(seed, "rollout", *key) for key in part]
        played = actor.play_tasks(model, tokenizer, [tasks[i] for i, _ in part], human, keys, cfg,
                                  temperature=cfg.temperature, **run.rules)
        faults.add_faults(list(filter(None, played)), end_of_turn(tokenizer), cfg, run.grade)
        return actor.for_files(played)
    dialogues = list(itertools.product(range(len(tasks)), range(cfg.per_task)))
    if cfg.dialogues:
        dialogues = dialogues[:cfg.dialogues]
    write_groups(run.path("trajectories.jsonl"), dialogues, run.machine.rows, group, "rollout", run.track)
    tell_leaks(human)
    faults.tell("rollout", read_lines(run.path("trajectories.jsonl")))


def nothing(run, name, what, why):
    raise InputError(f"{run.path(name)}: no {what} to learn from: {why}")


def stage_critic(run):
    run.critic.fit(run, run.path("critic"))


def stage_samples(run):
    cfg, rng = run.settings["candidates"], random.Random(f"states {run.seed}")
    model, tokenizer = run.model("base")
    if run.given.candidates:
        states = actor.read_candidates(tokenizer, run.given.candidates)
        names = [f"{run.given.candidates}, state {i}" for i in range(1, len(states) + 1)]
    else:
        states, names = [], []
        for trajectory in run.trajectories(tokenizer):
            for turn in range(1, len(trajectory["dialogue_history"]), 2):
                messages = trajectory["dialogue_history"][:turn]
                states.append({"task": trajectory["task"], "messages": messages})
                names.append(f"{trajectory['where']}, its reference and turn {turn // 2 + 1}")
        n = max(1, round(cfg.share * len(states)))
        n = min(n, len(states), cfg.states or n)
        chosen = rng.sample(range(len(states)), n)
        chosen.sort()  # so that states of one task share what they can
        states = [states[i] for i in chosen]
        names = [names[i] for i in chosen]
    actor.check_states(model, tokenizer, states, names, run.settings["rollout"].max_tokens)

    def group(part, first):
        part = copy.deepcopy(part)
        numbers = range(first, first + len(part))
        keys = [(run.seed, "samples", number) for number in numbers]
        if not run.given.candidates:
            max_tokens = run.settings["rollout"].max_tokens
            actor.sample_candidates(model, tokenizer, part, keys, cfg.n, max_tokens, **run.sampling)
        critic.score_reference(model, tokenizer, part)
        return part
    size = max(1, run.machine.rows // 8)
    write_groups(run.path("samples.jsonl"), states, size, group, "samples")


def stage_candidates(run):
    def group(part, _):
        run.critic.score(run, part, run.settings["critic"])
        return part
    states = list(run.records("samples.jsonl", schema.state("ref_sum", "ref_sum_without_c")))
    write_groups(run.path("candidates.jsonl"), states, 256, group, "candidates")


def stage_pairs(run):
    rng = random.Random(f"turn pairs {run.seed}")
    cfg = run.settings["pairs"]
    found = []
    for state in run.records("candidates.jsonl", schema.state("advantage")):
        turns = state["candidates"]
        advantages = [turn["advantage"] for turn in turns]
        counts = [turn.get("count", 1) for turn in turns]
        check_finite(advantages, run.path("candidates.jsonl"))

        def message(i, turns=turns):
            turn = turns[i]
            return [{"role": "assistant", "content": turn["content"], "output_ids": turn["output_ids"]}]
        for chosen, rejected in actor.turn_pairs(advantages, counts, cfg.per_state, rng):
            found.append({
                "prompt": schema.unfold(state["messages"]),
                "chosen": message(chosen),
                "rejected": message(rejected),
                "advantages": [advantages[chosen], advantages[rejected]],
            })
    if not found:
        states = list(run.records("candidates.jsonl", schema.state("advantage")))
        nothing(run, "candidates.jsonl", "pair of turns",
                why_no_turn_pair(states, run.settings["candidates"].n, run.given.candidates))
    write_lines(run.path("pairs.jsonl"), found)


def stage_actor(run):
    model, tokenizer = run.model("base", train=True)
    pairs = list(run.records("pairs.jsonl", schema.pair()))
    if not pairs:
        raise InputError(f"{run.path('pairs.jsonl')}: holds no pair; delete it, and the same command says why")
    examples = []
    for i, pair in enumerate(pairs, 1):
        example = {}
        for side in ("chosen", "rejected"):
            turn, = pair[side]
            example[side] = actor.turn_view(tokenizer, pair["prompt"], turn)
        check_views(model, example.values(), [f"{run.path('pairs.jsonl')}, line {i}"] * 2)
        examples.append(example)
    actor.train_preferences(model, examples, run.path("actor"), run.settings["actor"], run.seed,
                            label="actor", **run.learning(model, tokenizer))


def stage_rft(run):
    model, tokenizer = run.model("base", train=True)
    found = list(run.trajectories(tokenizer))
    won = run.world.successes(found)
    if not won:
        nothing(run, "trajectories.jsonl", "successful dialogue",
                why_no_success(found, run.settings["rollout"], ANSWER_MARKER, run.given.trajectories))
    views = [render(tokenizer, trajectory["dialogue_history"]) for trajectory in won]
    check_views(model, views, [trajectory["where"] for trajectory in won])
    cfg = run.settings["rft"]
    actor.train_imitation(model, views, run.path("rft"), cfg, run.seed, label="rft",
                          **run.learning(model, tokenizer))


def stage_multiturn(run):
    model, tokenizer = run.model("base", train=True)

    def view(trajectory):
        return render(tokenizer, trajectory["dialogue_history"])
    pairs = run.better_and_worse(run.settings["multiturn"].per_task, model, tokenizer, view)
    examples = []
    for better, worse in pairs:
        examples.append({"chosen": view(better), "rejected": view(worse)})
    actor.train_preferences(model, examples, run.path("multiturn"), run.settings["multiturn"], run.seed,
                            label="multiturn", **run.learning(model, tokenizer))


def stage_eval(run):
    tasks, cfg, loaded = run.held_out(), run.settings["eval"], {}
    names = [name for name in METHODS if name in cfg.names] if run.variant == run.root else ["actor"]
    todo = list(itertools.product(names, dict.fromkeys((1.0, cfg.top_p)), range(len(tasks))))
    human = run.human(held_out=True)

    def play(method, top_p, chosen):
        if method not in loaded:
            loaded.clear()
            loaded[method] = run.model(method)
            actor.check_tasks(*loaded[method], tasks, run.settings["rollout"], run.instructions, with_c=False)
        keys = [(run.seed, "eval", i) for i in chosen]
        played = actor.play_tasks(*loaded[method], [tasks[i] for i in chosen], human, keys,
                                  run.settings["rollout"], top_p=top_p, **run.rules)
        _, tokenizer = loaded[method]
        faults.add_faults(list(filter(None, played)), end_of_turn(tokenizer), run.settings["rollout"], run.grade)
        records = []
        for trajectory in actor.for_files(played):
            if trajectory is None:  # the human left
                records.append(None)
                continue
            history = actor.bare(trajectory["dialogue_history"])
            records.append({"method": run.methods[method], "top_p": top_p, **trajectory, "dialogue_history": history})
        return records

    def group(part, _):
        records = []
        for (method, top_p), same in itertools.groupby(part, lambda item: item[:2]):
            records += play(method, top_p, [i for _, _, i in same])
        return records
    write_groups(
        run.path("eval.jsonl"), todo, min(run.machine.rows, len(tasks)), group,
        "eval", run.track)
    tell_leaks(human)
    faults.tell("eval", read_lines(run.path("eval.jsonl")))


def stage_report(run):
    plain = copy.copy(run.options)
    plain.smoke, plain.preset = False, "small"
    defaults = flat(settings_of(plain, flags=False), task="backend", seed=0)
    report.write(run.root, run.path("report.html"), world=run.world, machine=run.machine,
                 defaults=defaults)


@dataclass(frozen=True)
class Stage:
    """What a stage runs and leaves behind, the stages it reads from, and the settings that its files depend on, beside
    those that the files of these stages do. `given`: what the user may bring in its place; the settings that do not
    matter then are `replaced`."""
    work: object
    output: str
    after: tuple = ()
    own: tuple = ()
    given: str = ""
    replaced: tuple = ()


STAGES = {
    "base": Stage(stage_base, "base", own=("model",), given="model", replaced=("base.*",)),
    "rollout": Stage(
        stage_rollout, "trajectories.jsonl", after=("base",), own=("trajectories",), given="trajectories",
        replaced=("tasks", *HUMAN, "instructions", "clip", "eval.first", "rollout.*", *LOADED)),
    "critic": Stage(
        stage_critic, "critic", after=("rollout",), own=("pairs.per_task", "pairs.margin", "critic.*", *TRAINED)),
    "samples": Stage(
        stage_samples, "samples.jsonl", after=("rollout",), own=("candidates", *LOADED), given="candidates",
        replaced=("candidates.*", "rollout.max_tokens")),
    "candidates": Stage(stage_candidates, "candidates.jsonl", after=("critic", "samples")),
    "pairs": Stage(stage_pairs, "pairs.jsonl", after=("candidates",), own=("pairs.per_state",)),
    "actor": Stage(stage_actor, "actor", after=("pairs",), own=("actor.*",)),
    "rft": Stage(stage_rft, "rft", after=("rollout",), own=("rft.*", *TRAINED)),
    "multiturn": Stage(
        stage_multiturn, "multiturn", after=("rollout",), own=("pairs.margin", "multiturn.*", *TRAINED)),
    "eval": Stage(
        stage_eval, "eval.jsonl", after=("base", "actor", "rft", "multiturn"),
        own=("eval.*", "tasks", "heldout", "heldout_human", *PLAYED, *LOADED)),
    "credit": Stage(
        credit.check, "credit.json", after=("critic",), own=(*HELD_OUT, "candidates.n", "credit.*", *PLAYED)),
    "report": Stage(stage_report, "report.html", after=("actor", "rft", "multiturn", "eval", "credit")),
    "best-of-n": Stage(
        best_of_n.play, "best-of-n.jsonl", after=("critic",), own=(*HELD_OUT, "heldout_human", *PLAYED)),
}


def run_stage(run, name):
    """Run a stage unless it is done, after the stages it reads from; writes down how long it took."""
    stage, output = run.stages[name], run.path(STAGES[name].output)
    run.claim(name)
    for earlier in stage.after:
        run_stage(run, earlier)
    if not run.outputs(name) or output.exists() and name != "report":  # given; a report is made anew
        return
    if name in run.todo:
        note(place(run, name))
    start, run.options.running = time.monotonic(), name
    stage.work(run)
    run.options.running = ""
    seconds = time.monotonic() - start
    if name != "report":
        remember(output.parent, name, seconds, run.speed.end(seconds))
        tell_how_to_serve(output, run.machine)
    finished(run, name)


# ------------------------------------------------------------------ tables and studies

def several(run, make_chains):
    """Make all runs of make_chains(seeds) that are not made yet, some side by side (machinery/seeds.py); returns the
    seeds."""
    if run.variant != run.root:
        raise InputError(f"--critic {run.settings['critic'].kind}: with several seeds, further critics are named by "
                         "--table-critics or --study-critics")
    words = parser().words(flags_given(run.options))
    cfg = run.settings["table"]
    seeds = range(run.seed, run.seed + cfg.seeds)
    chains = make_chains(seeds)

    def unfinished(own):
        here = open_run([*words, *own])
        goal = "report" if here.options.stage == "all" else here.options.stage
        here.record.check(goal)
        for name in here.record.needs(goal):
            if not all(output.exists() for output in here.outputs(name)[:1]):
                return name
        return ""
    with alone(run.root):
        keep(run)
    run_chains([sys.executable, __file__, *words], run.root, chains, cfg.jobs, unfinished)
    return seeds


def table(run):
    """The README's table: everything with several seeds from --seed on, and with further critics, under one folder;
    then one table of all."""
    critics = run.settings["table"].further

    def chains(seeds):
        return {f"seed{seed}": study.with_critics(f"seed {seed}", study.of_seed(run, seed), critics) for seed in seeds}
    seeds = several(run, chains)
    text = report.results_table([run.root / f"seed{seed}" for seed in seeds], run.world)
    print(text)
    put_text(run.root / "table.md", text)


def run_study(run, name):
    """One of studies/study.py."""
    seeds = several(run, functools.partial(study.chains, run, name))
    print(study.finish(run, name, seeds, open_run))


# ------------------------------------------------------------------ command line

@functools.cache
def parser():
    return Flags(__doc__, GROUPS, stage=["all", *STAGES, "play", "table", "status", *STUDIES, *EXPORTS])


def settings_of(options, flags=True):
    """The hyper-parameters, with what the command line says or without."""
    return read_settings(options, GROUPS, find_world(options.task).DEFAULTS, flags)


def work(run, stage):
    """Run a stage, or all, alone in the folder of the run."""
    run.variant.mkdir(parents=True, exist_ok=True)
    name = "report" if stage == "all" else stage
    with alone(run.root), remembering(run):
        run_stage(run, name)
    if name != "report":
        print(f"{stage} is done{'' if run.todo else ' already'}: {run.path(STAGES[name].output)}")
        if name == "eval":
            print(f"\n{report.results_table([run.root], run.world)}")
        return
    if not run.todo:
        print("everything is done already: only the report is made anew")
    print(f"\n{report.results_table([run.root], run.world)}\n{closing(run)}")


def report_alone(run):
    """A report of what is there. It needs no lock, as it only reads; flags are compared if some are given."""
    if set(run.options.given) - {"run"}:
        run.claim("report")
    try:
        if not os.access(run.root, os.W_OK):
            raise InUse(f"{run.root} can only be read")
        with alone(run.root):
            stage_report(run)
    except InUse as error:
        note(f"sweet: note: {error}: a report of what is there so far")
        stage_report(run)
    print(f"\n{report.results_table([run.root], run.world)}\n{closing(run)}")


def read_instructions(file):
    return read_prompt(file, "--instructions", optional=["max_turns"]).rstrip() + "\n\n"


def check_files(run):
    """InputError on bad input, before any long work starts."""
    if run.given.instructions:
        read_instructions(run.given.instructions)
    for file in filter(None, (run.given.tasks, run.given.heldout)):
        load_tasks(file, run.world.OPTIONAL)
    if run.given.tasks:
        run.training_tasks()
    kinds = {run.given.trajectories: schema.trajectory(), run.given.candidates: schema.outside_state()}
    for file in filter(None, kinds):
        for _ in schema.read_records(file, kinds[file], "record"):
            pass  # reading is the check; which ids the tokenizer has is checked when it is there


def open_run(argv):
    options = recall(parser(), argv)
    return Run(options, settings_of(options))


def one_name(argv):
    """A command line with `study NAME` or `export NAME` as one word, as the stages know it."""
    found = []
    for word in argv:
        if found and f"{found[-1]} {word}" in (*STUDIES, *EXPORTS):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def main(argv=None):
    forgive(sys.stdin, sys.stdout)
    options = recall(parser(), one_name(sys.argv[1:] if argv is None else argv))
    with one_line(options), whole_bars():
        if options.stage == "status":
            return show_status(Path(options.run), open_run)
        begin(Run(options, settings_of(options)), options.stage)


def begin(run, stage):
    """Check what can be known before any work, and do what is asked for."""
    torch.set_num_threads(run.machine.threads)
    run.record.check_redo(run.redo, stage)
    if stage in EXPORTS:
        return export(run, stage)
    if stage in ("report", "play") and "device" not in run.options.given:
        run.machine = machine_here(run.machine)
    todo = stages_to_do(run, run.stages, stage)
    if todo:
        check_files(run)
    check_start(run, stage, todo)
    run.todo = {name: measured(run, name) for name in STAGES if name in todo}
    if stage == "table":
        return table(run)
    if stage in STUDIES:
        return run_study(run, stage.removeprefix("study "))
    if stage == "play":
        if not run.path("critic").exists() or not run.path("actor").exists():
            raise InputError(f"{run.root}: holds no trained actor and critic to play with; the same flags without "
                             "'play' train them")
        return play.main(run, run.methods)
    if stage == "report":
        return report_alone(run)
    work(run, stage)


if __name__ == "__main__":
    main()
