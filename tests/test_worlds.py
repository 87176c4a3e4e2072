"""A world of one's own, by --task module:Class: the one that docs/your-own.md shows, from start to end."""
import json
from pathlib import Path

import pytest

import sweet as program
from machinery.files import InputError
from worlds import World, find_world
from worlds.backend import Backend

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def test_the_documentation_shows_the_world_that_is_tested():
    source = (ROOT / "docs/your_world.py").read_text(encoding="utf-8")
    assert source in (ROOT / "docs/your-own.md").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60


def test_a_third_world_runs_from_start_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    run = tmp_path / "run"
    program.main(["--task", "your_world:Rounding", "--smoke", "--run", str(run), "--base-documents", "3000",
                  "--rollout-tasks", "20", "--eval-tasks", "10", "--credit-states", "10",
                  "--credit-monte-carlo-states", "2"])
    records = [json.loads(line) for line in (run / "eval.jsonl").open(encoding="utf-8")]
    assert {record["method"] for record in records} == {"base", "RFT", "multi-turn DPO", "SWEET"}
    assert any(record["reward"] == 1 for record in records)
    assert "Which way should I round?" in (run / "report.html").read_text(encoding="utf-8")
    assert "| SWEET" in capsys.readouterr().out
    program.main(["report", "--run", str(run)])  # the run remembers its world


def test_what_is_no_world_is_one_line(monkeypatch):
    assert isinstance(find_world("backend"), Backend)
    for spec, said in (("bakend", "expected backend or frontend or blind or module:Class (perhaps backend)"),
                       ("nowhere:W", "No module named 'nowhere'"), ("json:JSONDecoder", "subclass of worlds.World"),
                       ("json:Nothing", "has no attribute 'Nothing'")):
        with pytest.raises(InputError) as error:
            find_world(spec)
        assert f"--task {spec}" in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("call, needed", [
    (lambda world: world.make_tasks(1, 0, "train"), "--tasks"),
    (lambda world: world.respond(None, [], None), "--human"),
    (lambda world: world.new_model(None, 0), "--model"),
    (lambda world: world.documents(1, 0), "--model"),
])
def test_what_a_world_lacks_is_asked_for(call, needed):
    with pytest.raises(InputError, match=needed):
        call(World())
