"""What tests hand on to a tracker, twice as if by a process that was killed and one that goes on. Without torch, so
that a process of its own starts quickly: `python tests/handed_on.py FOLDER TRACKER` prints what the run is called."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from adapters.trackers import Tracker

FIGURES = {("critic", 1): {"loss": 0.75, "accuracy": 0.5}, ("critic", 2): {"loss": 0.5, "accuracy": 1.0},
           ("actor", 1): {"loss": 0.25}}
CONFIG = {"critic.lr": 0.125, "task": "backend", "model": None}
TABLE = ["method", "success %"], [["SWEET", "62.0"]], "| method | success % |\n| --- | --- |\n| SWEET | 62.0 |"


def run_of(folder, kind, redo=()):
    folder.mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(machine=SimpleNamespace(track=kind), variant=folder, redo=redo,
                           record=SimpleNamespace(values=CONFIG))


def handed_on(folder, kind):
    """Two processes of one run: the second begins where the first was stopped."""
    parts = list(FIGURES.items())
    for part in (parts[:1], parts[1:]):
        tracker = Tracker(run_of(folder, kind))
        for (stage, step), figures in part:
            tracker(stage, step, figures)
        if part == parts[1:]:
            tracker.table(*TABLE)
        tracker.close()
    return json.loads((folder / "tracker.json").read_text())["name"]


if __name__ == "__main__":
    print(handed_on(Path(sys.argv[1]), sys.argv[2]))
