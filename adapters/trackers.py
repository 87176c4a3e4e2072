"""Trackers: what the bars show, where people already look at it (`--track trackio`, `wandb` or `tensorboard`).

Each step of a training gives STAGE/loss and the others, each group of dialogues STAGE/reward; the settings are the
tracker's config, and the table of results comes last. A run folder is one run of the tracker, named in tracker.json; it
goes on where the folder does, and --redo begins another.

Nothing leaves this machine unless you say so: wandb is offline (`wandb sync --append` sends it later) unless WANDB_MODE
is set, and trackio is local unless its own variables name a Space or a server. A tracker that fails is left out with a
line, and the run goes on. A step is handed on once, also where a killed training takes it again (machinery/train.py);
what a tracker held in memory at a hard kill, some steps at most, it lacks: log.json beside the model has all.

Exercised by `python -m pytest tests/test_adapters_trackers.py`.
"""
import contextlib
import datetime
import os
import sys

from kernels import ranks
from machinery.bars import note
from machinery.files import read_json, write_json
from machinery.optional import first_line, require

PROJECT = "sweet"


class Trackio:
    """Hugging Face's, in a local database: `trackio show`."""

    def __init__(self, name, folder, config):
        self.trackio = require("trackio", "--track trackio")
        self.run = self.trackio.init(
            PROJECT, name, config=config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def log(self, figures, stage, step):
        self.run.log(figures, step=step)

    def table(self, header, rows, text):
        self.run.log({"results": self.trackio.Markdown(text)})

    def close(self):
        self.trackio.finish()  # of the run alone, it would be finished again at the end of the process


class Wandb:
    """Weights & Biases, in RUN/wandb. Its own count of steps runs through all stages: a stage's figures are drawn over
    STAGE/step."""

    def __init__(self, name, folder, config):
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":  # which does not keep its own reports, of errors and use, from being sent
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.wandb = require("wandb", "--track wandb")
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=name,
            config=config,
            dir=folder,
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=self.wandb.Settings(console="off", silent=True))
        self.stages = set()

    def log(self, figures, stage, step):
        if stage not in self.stages:
            self.stages.add(stage)
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log({**figures, f"{stage}/step": step})

    def table(self, header, rows, text):
        self.run.log({"results": self.wandb.Table(columns=header, data=rows)})

    def close(self):
        self.run.finish()


class TensorBoard:
    """Event files in RUN/tensorboard: `tensorboard --logdir runs`."""

    def __init__(self, name, folder, config):
        require("tensorboard", "--track tensorboard")
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder / "tensorboard" / name)
        rows = [f"| {field} | {value} |" for field, value in config.items()]
        self.writer.add_text("config", "\n".join(["| setting | value |", "| --- | --- |", *rows]))

    def log(self, figures, stage, step):
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def table(self, header, rows, text):
        self.writer.add_text("results", text)

    def close(self):
        self.writer.close()


TRACKERS = {"trackio": Trackio, "wandb": Wandb, "tensorboard": TensorBoard}


class Tracker:
    """Hands on what the bars show to the tracker that a run asks for, if it does. It is opened at the first figure."""

    def __init__(self, run):
        self.run, self.kind, self.tracker = run, TRACKERS.get(run.machine.track), None

    def __call__(self, stage, step, figures):
        """{name: number} of a step of a stage, counted from 1."""
        self.use("log", {f"{stage}/{name}": value for name, value in figures.items()}, stage, step)

    def table(self, header, rows, text):
        """The results: as texts, and as Markdown."""
        self.use("table", header, rows, text)

    def close(self):
        if self.tracker:
            self.use("close")

    def use(self, method, *arguments):
        """Call a method of the tracker. It runs code of others: where that fails, the run does without."""
        if not self.kind:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what trackers say is no result
                if self.tracker is None:
                    folder = self.run.variant
                    name = self.name(folder)
                    if ranks.rank():  # of several processes one hands on
                        self.kind = None
                        return
                    self.tracker = self.kind(name, folder, self.run.record.values)
                getattr(self.tracker, method)(*arguments)
        except Exception as error:
            note(f"sweet: note: --track {self.run.machine.track}: {first_line(error)}; the run goes on without it")
            self.kind = self.tracker = None

    def name(self, folder):
        """What the tracker calls this run: where the folder is, and when it began."""
        file = folder / "tracker.json"
        known = read_json(file, {})
        if self.run.redo or "name" not in known:
            words = [*folder.absolute().parts[-2:], f"{datetime.datetime.now():%Y%m%d-%H%M%S}"]
            known = {"name": "-".join(words).replace("/", "")}
            write_json(file, known)
        return known["name"]
