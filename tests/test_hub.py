"""Files by their name on the hub: which one is meant, that a path wins, and what is said where there is no network."""
import os
import subprocess
import sys

import huggingface_hub
import pytest
from conftest import ROOT

import sweet as program
from machinery.files import InputError
from machinery.hub import local_file

NAME = "facebook/collaborative_agent_bench"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that lists these names, and writes down what is fetched."""
    listed, fetched, file = [], [], tmp_path / "cache" / "tasks.jsonl"
    file.parent.mkdir()
    file.write_text('{"problem_description": "p", "ground_truth": "def f(): return 1", "test_cases": {"a": "f()"}}\n')

    def fetch(repo, name, repo_type):
        fetched.append((repo, name, repo_type))
        return str(file)

    def names(_, repo, repo_type):
        assert (repo, repo_type) == (NAME, "dataset")
        return listed
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", names)
    monkeypatch.chdir(tmp_path)
    return listed, fetched, str(file)


def test_a_file_that_is_named(hub):
    _, fetched, file = hub
    assert local_file(f"{NAME}:a/b.jsonl", "--tasks") == file and fetched == [(NAME, "a/b.jsonl", "dataset")]


def test_the_only_file(hub):
    listed, fetched, file = hub
    listed += ["README.md", "test.jsonl", "x.parquet"]
    assert local_file(NAME, "--tasks") == file and fetched == [(NAME, "test.jsonl", "dataset")]


@pytest.mark.parametrize("names", [["a.jsonl", "b.jsonl", "README.md"], ["x.parquet", "README.md"], []])
def test_which_file_is_open(hub, names):
    listed, fetched, _ = hub
    listed += names
    with pytest.raises(InputError) as caught:
        local_file(NAME, "--heldout")
    lines = [name for name in names if name.endswith(".jsonl")]
    assert str(caught.value).startswith(f"--heldout {NAME}: which file?") and not fetched
    assert str(caught.value).endswith(f"one of {', '.join(lines or names)}")


@pytest.mark.parametrize("name", [NAME, f"{NAME}:test.jsonl"])
def test_a_path_wins(hub, tmp_path, name):
    _, fetched, _ = hub
    (tmp_path / "facebook").mkdir()
    (tmp_path / name).write_text("{}")
    assert local_file(name, "--tasks") == name and not fetched


@pytest.mark.parametrize("value", ["data/tasks.jsonl", "./data/x", "/data/x", "tasks", "a/b/c", "data/tasks.json"])
def test_what_is_a_path_is_not_asked_for(hub, value):
    _, fetched, _ = hub
    assert local_file(value, "--tasks") == value and not fetched


@pytest.mark.parametrize("flag", ["tasks", "heldout", "trajectories", "candidates"])
def test_a_run_remembers_the_file_that_was_fetched(hub, flag, tmp_path):
    _, fetched, file = hub
    options = program.recall(program.parser(), [f"--run={tmp_path / 'run'}", f"--{flag}={NAME}:x.jsonl"])
    assert getattr(options, flag) == file and fetched == [(NAME, "x.jsonl", "dataset")]
    again = program.recall(program.parser(), [f"--run={tmp_path / 'run'}", f"--{flag}={file}"])
    assert getattr(again, flag) == file and len(fetched) == 1


@pytest.mark.parametrize("name", [NAME, f"{NAME}:test.jsonl"])
def test_no_network_is_one_line_before_any_work(name, tmp_path, monkeypatch):
    """A connection that fails in the transport's own way, which is no OSError in every version."""
    class Gone(Exception):
        pass

    def fail(*_, **__):
        raise Gone("nobody there\nat all")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(SystemExit) as caught:
        program.main(["eval", f"--run={tmp_path / 'run'}", f"--heldout={name}"])
    line = str(caught.value.code)
    assert f"--heldout {name}: no such file here, and not to be had" in line and "nobody there" in line
    assert "\n" not in line and not (tmp_path / "run").exists()


def test_offline_the_package_itself_is_one_line(tmp_path):
    """The real package, told that there is no network."""
    done = subprocess.run([sys.executable, "sweet.py", f"--run={tmp_path / 'run'}", f"--tasks={NAME}"], cwd=ROOT,
                          capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert done.returncode and "Traceback" not in done.stderr
    assert f"--tasks {NAME}: no such file here" in done.stderr.strip().splitlines()[-1]
