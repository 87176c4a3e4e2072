"""A fresh install and the start of a run: versions, optional packages, and what is refused in one line before work."""
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import free_port, needs_peft, save_model

import simulator
import sweet as program
from machinery.files import InputError
from machinery.optional import PARTS, pin, require
from machinery.start import check_device, stages_to_do
from machinery.train import check_adapters
from worlds import pages

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TASK = {"problem_description": "p", "ground_truth": "def f():\n    return 1\n", "test_cases": {"a": "f()"}}
TURNS = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "x"}]


def names_in(file):
    """The packages that a requirements file names."""
    rows = [row.partition("#")[0].strip() for row in (ROOT / file).read_text().splitlines()]
    return [re.match(r"[\w-]+", row)[0].lower() for row in rows if row and not row.startswith("-")]


# ------------------------------------------------------------------ versions

def test_every_package_has_one_exact_version_in_one_place():
    rows = [row for row in (ROOT / ".ci/constraints.txt").read_text().splitlines() if row and not row.startswith("#")]
    pinned = [re.fullmatch(r"([\w-]+)==[\w.]+(; sys_platform == \"linux\")?", row)[1].lower() for row in rows]
    assert len(pinned) == len(set(pinned))
    named = names_in("requirements.txt") + names_in("requirements-dev.txt")
    assert {"torch", "transformers", "peft", "trl", "ruff"} <= set(named) <= set(pinned)
    assert {package for _, _, packages in PARTS.values() for package in packages} <= set(named)
    for file in ("requirements.txt", "requirements-dev.txt"):
        assert "==" not in (ROOT / file).read_text().replace('sys_platform == "linux"', "")
    assert "-c .ci/constraints.txt" in (ROOT / "requirements.txt").read_text()
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text()


def test_pip_installs_the_command_and_all_that_it_reads(tmp_path):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert declared["project"]["dependencies"] == names_in("requirements.txt")

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    left_out = {"tests", "docs", "bench", ".ci"}
    files = [name for name in listed if name.partition("/")[0] not in left_out]
    source, target = tmp_path / "source", tmp_path / "target"
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", target, source], check=True)
    rooms = {"kernels", "machinery", "studies", "worlds"}
    needed = [name for name in files if name.partition("/")[0] in rooms or name.endswith(".py")]
    assert [name for name in needed if not (target / name).exists()] == []

    elsewhere = {**os.environ, "PYTHONPATH": str(target)}
    said = subprocess.run([target / "bin/sweet", "status", "--run", "none"], cwd=tmp_path, env=elsewhere,
                          capture_output=True, text=True)
    assert said.stderr == "sweet: --run none: there is no such run\n"


# ------------------------------------------------------------------ optional packages

@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A function that puts another package in the place of one: its __init__.py is `source`, or it is not there (None).
    """
    kept = {}

    def forget(package):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            kept.setdefault(package, {})[name] = sys.modules.pop(name)

    def put(package, source):
        kept[package] = {}
        forget(package)
        if source is None:
            class Missing:
                @staticmethod
                def find_spec(name, path=None, target=None):
                    if name.partition(".")[0] == package:
                        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
        else:
            (tmp_path / package).mkdir()
            (tmp_path / package / "__init__.py").write_text(source)
            monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    for package in list(kept):
        before = kept.pop(package)
        forget(package)
        sys.modules.update(before)


@pytest.mark.parametrize("package", list(PARTS))
@pytest.mark.parametrize("source, fault", [(None, "is not installed"), ("", "does not fit"),
                                           ("raise ImportError('built for numpy 1')", "built for numpy 1"),
                                           ("1 / 0", "division by zero"), ("import nowhere_at_all", "nowhere_at_all")])
def test_an_optional_package_that_is_missing_or_does_not_fit(stub, package, source, fault):
    stub(PARTS[package][0].partition(".")[0], source)
    with pytest.raises(InputError) as caught:
        require(package, "--a-flag")
    line = str(caught.value)
    assert line.startswith(f"--a-flag: needs {package}") and fault in line and "\n" not in line
    command = line.partition(": pip install ")[2].split()
    assert command == [pin(name) for name in PARTS[package][2]] and all("==" in word for word in command)


def test_pins_are_those_that_the_tests_run_with():
    """Those of the optional parts: on other versions, the messages would send people to what was not tried."""
    for package in {name for _, _, packages in PARTS.values() for name in packages}:
        assert re.fullmatch(rf"{package}==\d[\w.]*", pin(package))
    assert pin("transformers") == "transformers==5.23.0" and pin("peft") == "peft==0.21.2"


def test_peft_that_transformers_refuses(monkeypatch):
    """transformers asks for a later peft than the newest: known before any work, with the pair that fits."""
    needs_peft()
    check_adapters("--lora")
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.0" if name == "peft" else real(name))
    with pytest.raises(InputError, match="^--lora: needs peft, which does not fit.*version >= 0") as caught:
        check_adapters("--lora")
    assert str(caught.value).endswith(f"pip install {pin('transformers')} {pin('peft')}")


# ------------------------------------------------------------------ the start of a run

def refused(run, *args):
    """The one line with which a run ends, before it has made anything."""
    with pytest.raises(SystemExit) as caught:
        program.main([*map(str, args), "--run", str(run)])
    line = caught.value.code
    assert isinstance(line, str) and line.startswith("sweet: ") and "\n" not in line, line
    made = [path for path in Path(run).rglob("*") if path.is_file()] if os.path.isdir(run) else []
    assert all(path.parent.name == "settings" for path in made), made
    return line


@pytest.mark.parametrize("device", ["cuda:93", "mps:1", "gpu", "meta", "", "cuda:x", "0", "xla", "CPU",
                                    "privateuseone"])
def test_a_device_that_is_not_there(tmp_path, device):
    line = refused(tmp_path / "run", "--smoke", "--device", device)
    assert f"--device {device}:" in line and "cpu" in line.partition("; expected")[2]
    check_device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("args", [("--device", "cuda"), ("--preset", "one-gpu"), ("play", "--device", "cuda"),
                                  ("table", "--device", "cuda"), ("actor", "--device", "cuda:0")])
def test_cuda_without_cuda(tmp_path, args):
    if args[0] == "play":
        (tmp_path / "run/critic").mkdir(parents=True)
        (tmp_path / "run/actor").mkdir()
    assert "--device cuda" in refused(tmp_path / "run", *args)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "none_such", "SDPA", "flash"])
def test_an_attention_implementation_that_is_not_there(tmp_path, attention):
    assert f"--attention {attention}:" in refused(tmp_path / "run", "--smoke", "--attention", attention)


HUMANS = """
import sys
class Fine:
    def reply(self, tasks, dialogues):
        return [None] * len(tasks)
class Mute:
    pass
class Spoilt(Fine):
    reply = "text"
class Needy(Fine):
    def __init__(self, key):
        self.key = key
class Broken(Fine):
    def __init__(self):
        raise RuntimeError("no\\nkey")
class Leaving(Fine):
    def __init__(self):
        sys.exit("bye")
"""


@pytest.mark.parametrize("spec, words", [
    ("nowhere_at_all:Human", "nowhere_at_all"), ("sweet_humans:Absent", "Absent"), ("sweet_humans:Mute", "reply"),
    ("sweet_humans:Spoilt", "reply"), ("sweet_humans:Needy", "key"), ("sweet_humans:Broken", "no key"),
    ("sweet_humans:Leaving", "bye"), ("sweet_humans:", "attribute"), (":Human", "module"), ("sweet_torn:A", "Syntax"),
    ("sweet_fails:A", "division"), ("sweet_humans:sys", "module"), ("no/such/model", "no/such/model"),
    ("http://127.0.0.1:1/v1", "onnection"), ("https://", "URL"), ("http://user:key@127.0.0.1/v1", "without a key")])
@pytest.mark.parametrize("stage", ["all", "eval"])
def test_a_human_that_is_not_to_be_had(tmp_path, monkeypatch, spec, words, stage):
    (tmp_path / "sweet_humans.py").write_text(HUMANS)
    (tmp_path / "sweet_torn.py").write_text("class A(:\n")
    (tmp_path / "sweet_fails.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("machinery.server.PAUSE", 0.01)
    args = ["--human-model", "m"] * spec.startswith("http")
    line = refused(tmp_path / "run", stage, "--smoke", "--human", spec, *args)
    assert words in line and (spec in line or "http" in spec), line
    assert callable(simulator.make_human("sweet_humans:Fine").reply)


def test_a_page_of_another_server_is_no_human(tmp_path):
    """Somebody listens, but which model to ask is open."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"data": []}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    pytest.importorskip("openai")
    served = http.server.HTTPServer(("127.0.0.1", free_port()), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{served.server_address[1]}/v1"
        assert "--human-model" in refused(tmp_path / "run", "--smoke", "--human", url)
    finally:
        served.shutdown()
        served.server_close()


@pytest.mark.parametrize("kind", ["missing", "empty", "a language model", "a file", "torn"])
def test_a_clip_that_is_none(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    clip = tmp_path / "clip"
    if kind == "a file":
        clip.write_text("clip")
    elif kind != "missing":
        clip.mkdir()
    if kind == "a language model":
        save_model(clip)
    if kind == "torn":
        from transformers import CLIPConfig
        CLIPConfig().save_pretrained(clip)
        (clip / "model.safetensors").write_bytes(b"\x10\0\0")
    monkeypatch.setattr("worlds.frontend.find_browser", lambda: "chromium")  # before it, in the order of checks
    line = refused(tmp_path / "run", "--smoke", "--task", "frontend", "--clip", clip)
    assert f"--clip {clip}: cannot be loaded" in line


def test_a_clip_without_its_processor(tmp_path, monkeypatch):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(text_config=CLIPTextConfig(vocab_size=9, **small).to_dict(), projection_dim=8,
                        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **small).to_dict())
    CLIPModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="--clip"):
        pages.load_clip(str(tmp_path))


@pytest.mark.parametrize("where", ["file", "file/run", "file/a/b", "x" * 300])
@pytest.mark.parametrize("args", [("--smoke",), ("table",), ("report",), ("--critic=without-c",)])
def test_a_run_that_is_no_folder(tmp_path, where, args):
    (tmp_path / "file").write_text("here")
    assert f"--run {tmp_path / where}" in refused(tmp_path / where, *args)
    assert (tmp_path / "file").read_text() == "here"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """Permissions do not bind root, so the refusal is made by hand."""
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))
    monkeypatch.setattr("machinery.start.tempfile.TemporaryFile", refuse)
    line = refused(tmp_path / "run", "--smoke")
    assert f"--run {tmp_path / 'run'}" in line and "Permission denied" in line


@pytest.mark.parametrize("kind", ["missing", "empty", "torn", "no template"])
def test_a_model_that_is_none(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tasks = tmp_path / "model", tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps(TASK) + "\n")
    if kind == "empty":
        model.mkdir()
    if kind == "torn":
        save_model(model)
        (model / "config.json").write_text("{")
    if kind == "no template":
        save_model(model, template=None)
    args = ("--model", model, "--tasks", tasks, "--heldout", tasks)
    assert str(model) in refused(tmp_path / "run", *args)
    (tmp_path / "t.jsonl").write_text(json.dumps({"task": TASK, "dialogue_history": TURNS, "reward": 1.0}) + "\n")
    assert str(model) in refused(tmp_path / "run", "rft", *args, "--trajectories", tmp_path / "t.jsonl")


def test_adapters_without_peft(tmp_path, stub):
    """--lora, and a --model that is adapters: peft is missed at the start."""
    needs_peft()
    from machinery.train import Machine, load_model, save_to
    agent = save_model(tmp_path / "agent")
    save_to(*load_model(agent, Machine(lora=2), train=True))(tmp_path / "adapters")
    stub("peft", None)
    line = refused(tmp_path / "run", "--smoke", "--lora", "4")
    assert "--lora: needs peft" in line and f"pip install {pin('transformers')} {pin('peft')}" in line
    line = refused(tmp_path / "run", "--smoke", "--model", tmp_path / "adapters")
    assert str(tmp_path / "adapters") in line and pin("peft") in line


def test_a_gguf_file_without_gguf(tmp_path, stub):
    stub("gguf", None)
    for flags in (("--model", "m.gguf"), ("--human", "m.gguf"), ("--human", "scripted,m.gguf")):
        line = refused(tmp_path / "run", "--smoke", *flags)
        assert "m.gguf: needs gguf, which is not installed" in line
        assert line.endswith(f"pip install {pin('transformers')} {pin('accelerate')} {pin('gguf')}")


def test_what_a_finished_run_needs(tmp_path):
    """Nothing but its files: not its server, not its GPU."""
    def todo(stage, *args):
        options = program.parser().parse_args([stage, "--run", str(tmp_path), *args])
        return stages_to_do(program.Run(options, program.settings_of(options)), program.STAGES, stage)
    everything = set(program.STAGES) - {"report", "best-of-n"}
    assert todo("all") == everything == todo("table") and todo("rollout") == {"base", "rollout"}
    assert todo("critic", "--model", "m") == {"rollout", "critic"}
    assert todo("critic", "--model", "m", "--trajectories", "t.jsonl") == {"critic"}
    for name in everything:
        (tmp_path / program.STAGES[name].output).touch()
    assert todo("all") == todo("report") == todo("eval") == set() and todo("play") == {"play"}
    (tmp_path / "eval.jsonl").unlink()
    assert todo("all") == {"eval"}


def test_no_word_on_the_bars(tmp_path):
    """Stages with adapters and checkpointing on stderr: bars, the stage above them, and whole notes."""
    needs_peft()
    agent, tasks = save_model(tmp_path / "agent"), tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps(TASK) + "\n")
    rows = [{"task": TASK, "dialogue_history": TURNS, "reward": float(i % 2)} for i in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run([sys.executable, str(ROOT / "sweet.py"), "critic", "--run", str(tmp_path / "run"), "--model",
                           agent, "--tasks", str(tasks), "--heldout", str(tasks), "--lora", "2", "--checkpointing",
                           "--trajectories", str(tmp_path / "t.jsonl")], cwd=tmp_path, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    said = [part for part in re.split(r"[\r\n]", done.stderr) if part.strip() and not re.search(r"\d+%\|", part)]
    assert said == ["sweet: 1 of 1, critic", "note: under gradient checkpointing a cache carries no gradients; every "
                    "sequence is computed in full", f"serve it: vllm serve {agent} --dtype float32 --enable-lora "
                    f"--lora-modules {tmp_path / 'run/critic'}={tmp_path / 'run/critic'}"]
