"""Trackers: what was handed on is what their own readers find; a step once; a tracker that fails costs a line."""
import copy
import datetime
import http.server
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from handed_on import FIGURES, TABLE, handed_on, run_of

import sweet as program
from adapters import trackers
from adapters.trackers import Tracker
from machinery.train import fit

ROOT = Path(__file__).resolve().parent.parent
def expected():
    """{(name, step): value}"""
    return {(f"{stage}/{name}", step): value for (stage, step), figures in FIGURES.items()
            for name, value in figures.items()}


# ------------------------------------------------------------------ read back

@pytest.mark.slow
def test_tensorboard_reads_it_back(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    name = handed_on(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run/tensorboard" / name)).Reload()
    rows = [((tag, event.step), event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    assert dict(rows) == expected() and len(rows) == len(expected())
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert texts["results/text_summary"] == TABLE[2] and "| critic.lr | 0.125 |" in texts["config/text_summary"]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_trackio_reads_it_back(tmp_path):
    """In a process of its own, as it takes its folder from the environment when it is imported."""
    pytest.importorskip("trackio")
    environment = {**quiet(), "TRACKIO_DIR": str(tmp_path / "trackio")}
    name = in_a_process(tmp_path / "run", "trackio", environment)
    code = ("import json; from trackio.sqlite_storage import SQLiteStorage as stored; run, = stored.get_runs('sweet')\n"
            "print(json.dumps([run, stored.get_logs('sweet', run), stored.get_run_config('sweet', run)]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    run, logs, config = json.loads(done.stdout)
    rows = [((key, row["step"]), value) for row in logs for key, value in row.items() if key.count("/") == 1]
    assert name == run and dict(rows) == expected() and len(rows) == len(expected())
    assert [row["results"] for row in logs if "results" in row][0]["_value"] == TABLE[2]
    assert config["critic.lr"] == 0.125


def quiet():
    """The environment without what says to a tracker where to send."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "TRACKIO"))}


def in_a_process(folder, tracker, environment):
    """handed_on.py in a process of its own; its stdout is the name alone."""
    done = subprocess.run([sys.executable, "tests/handed_on.py", str(folder), tracker], cwd=ROOT, capture_output=True,
                          text=True, env={**environment, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    name, = done.stdout.split()
    return name


def wandb_records(file):
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.slow
def test_wandb_offline_reads_it_back_and_calls_nobody(tmp_path):
    """With a key and a server that could be reached: nobody was asked to send."""
    pytest.importorskip("wandb")
    calls = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            calls.append(self.path)
            self.send_error(404)
        do_GET = do_POST

        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        environment = {**quiet(), "WANDB_BASE_URL": url, "WANDB_API_KEY": "k" * 40, "HTTP_PROXY": url,
                       "HTTPS_PROXY": url, "WANDB_CACHE_DIR": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path)}
        name = in_a_process(tmp_path / "run", "wandb", environment)
        server.shutdown()
    assert calls == []
    files = sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{name}"}
    rows, config, tables = [], {}, []
    for record in (record for file in files for record in wandb_records(file)):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            stage, _, figure = name.partition("/")
            if f"{stage}/step" in row and figure != "step":
                rows.append(((name, row[f"{stage}/step"]), value))
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if "results/path" in row:
            tables.append(file_of(tmp_path / "run/wandb", row["results/path"]))
    assert dict(rows) == expected() and len(rows) == len(expected())
    assert config["critic.lr"] == 0.125
    assert tables == [{"columns": TABLE[0], "data": TABLE[1]}]


def file_of(folder, name):
    """What a file of a run of wandb's holds."""
    file, = folder.glob(f"offline-run-*/files/{name}")
    return json.loads(file.read_text())


# ------------------------------------------------------------------ a step once

class Killed(Exception):
    pass


@pytest.mark.parametrize("every", [0.0, 1e9])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_killed_and_resumed_training_hands_each_step_on_once(tmp_path, every, steps):
    """every: seconds between checkpoints; at 1e9 there is none, and all steps are taken again."""
    points = [(torch.tensor([float(i), 1.0]), float(i)) for i in range(12)]
    cfg = SimpleNamespace(lr=0.1, batch_size=2, epochs=1)
    torch.manual_seed(0)
    start, seen, calls = torch.nn.Linear(2, 1), [], []

    def loss(model, part, batch):
        calls.append(part)
        if len(calls) == steps + 1 and len(seen) <= steps:
            raise Killed
        return sum((model(x) - y) ** 2 for x, y in part).mean(), {}

    def train():
        model = copy.deepcopy(start)
        return fit(model, points, loss, tmp_path / "out", cfg, 0, lambda folder: None, label="critic",
                   checkpoint_seconds=every, track=lambda *row: seen.append(copy.deepcopy(row)))
    with pytest.raises(Killed):
        train()
    assert len(seen) == steps
    calls.extend([None] * 99)  # it is not killed again
    log = train()
    assert seen == [("critic", step, row) for step, row in enumerate(log, 1)] and len(seen) == 6
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.json"]


def test_what_is_made_again_is_another_run(tmp_path, monkeypatch):
    days = (datetime.datetime(2026, 1, day) for day in (1, 2, 3))
    monkeypatch.setattr(trackers, "datetime", SimpleNamespace(datetime=SimpleNamespace(now=lambda: next(days))))
    folder = tmp_path / "runs" / "mine"
    names = [Tracker(run_of(folder, "off", redo)).name(folder) for redo in ((), (), ("critic",), ())]
    assert names == ["runs-mine-20260101-000000"] * 2 + ["runs-mine-20260102-000000"] * 2


# ------------------------------------------------------------------ off, and out of order

def test_off_is_off(tmp_path):
    tracker = Tracker(run_of(tmp_path / "run", "off"))
    tracker("critic", 1, {"loss": 1.0})
    tracker.table(*TABLE)
    tracker.close()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("method", ["__init__", "log", "table", "close"])
def test_a_tracker_that_fails_costs_a_line(tmp_path, monkeypatch, capsys, method):
    said = []

    class Broken:
        def __init__(self, name, folder, config):
            pass

        log = table = close = lambda self, *_: said.append("ok")

    def fails(self, *_):
        said.append("fails")
        raise ConnectionError("nobody\nanswers")
    setattr(Broken, method, fails)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Broken)
    tracker = Tracker(run_of(tmp_path / "run", "wandb"))
    for step in (1, 2, 3):
        tracker("critic", step, {"loss": 1.0})
    tracker.table(*TABLE)
    tracker.close()
    assert said.count("fails") == 1 and said[-1] == "fails"
    line = "sweet: note: --track wandb: nobody answers; the run goes on without it"
    assert capsys.readouterr().err.splitlines() == [line]


def test_a_tracker_that_is_missing_is_known_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="^sweet: --track: needs wandb, which .*: pip install wandb==") as caught:
        program.main(["base", "--run", str(tmp_path / "run"), "--track", "wandb"])
    assert "\n" not in str(caught.value)
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []
