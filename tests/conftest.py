"""Fixtures: tiny random models in float32 and float64, the world's tokenizer, and dialogues written by hand."""
import contextlib
import copy
import http.server
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).resolve().parent.parent
COVERAGE = coverage.Coverage(source=[str(ROOT)], omit=["tests/*", "bench/*", "docs/*"], data_file=None)
COVERAGE.start()  # before anything of ours is imported; stopped where not all fast tests, and only they, run

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported

from env import end_of_turn
from machinery.files import InputError
from machinery.train import check_adapters
from worlds import backend as world

torch.set_num_threads(1)


# ------------------------------------------------------------------ the fast tests, and all of them

def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="the slow tests, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --all, or if its file is named")
    if config.getoption("--all") or config.option.file_or_dir:
        COVERAGE.stop()


def pytest_collection_modifyitems(config, items):
    """Leave out what is slow, unless everything is asked for, or its file."""
    if config.getoption("--all"):
        return
    named = {Path(name.partition("::")[0]).resolve() for name in config.option.file_or_dir}
    slow, fast = [], []
    for item in items:
        left_out = item.get_closest_marker("slow") and item.path not in named
        (slow if left_out else fast).append(item)
    config.hook.pytest_deselected(items=slow)
    items[:] = fast


def pytest_terminal_summary(terminalreporter, config):
    """The lines that the fast tests run, in this process."""
    if not config.getoption("--all") and not config.option.file_or_dir:
        COVERAGE.stop()
        terminalreporter.section("lines that the fast tests cover")
        COVERAGE.report(file=terminalreporter._tw._file, skip_empty=True)


def tiny_llama(vocab_size, seed=0, layers=2, kv_heads=2, tie=True, spread=0.3, **extra):
    """A random LlamaForCausalLM of width 16 whose logits are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
                         num_attention_heads=2, num_key_value_heads=kv_heads, max_position_embeddings=1024,
                         tie_word_embeddings=tie, initializer_range=spread, bos_token_id=None, eos_token_id=None,
                         **extra)
    return LlamaForCausalLM(config).eval()


def perturbed(model, seed=1, size=0.1):
    """A copy of a model with other weights: what the model might be after some steps."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (size * noise).to(parameter.dtype)
    return changed


@pytest.fixture(scope="session")
def tokenizer():
    return world.make_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    """float32, tied head, as many key heads as query heads."""
    return tiny_llama(len(tokenizer))


@pytest.fixture(scope="session")
def grouped(tokenizer):
    """float32, untied head, grouped-query attention."""
    return tiny_llama(len(tokenizer), seed=3, layers=1, kv_heads=1, tie=False)


@pytest.fixture(scope="session")
def model64(model):
    return copy.deepcopy(model).double()


@pytest.fixture(scope="session")
def grouped64(grouped):
    return copy.deepcopy(grouped).double()


@pytest.fixture(scope="session")
def tasks():
    return world.make_tasks(12, seed=5)


@pytest.fixture(scope="session")
def trajectories(tokenizer):
    """Dialogues of 1 to 4 turns with rewards, some of their turns with output_ids, one of them cut off."""
    result = []
    for i, (messages, _) in enumerate(world.documents(24, seed=7)):
        messages = [dict(message) for message in messages]
        topic = messages[0]["content"].split("def tidy_")[1].split("(")[0]
        values = {step: i % 4 for step in world.TOPIC_STEPS[topic]}
        if i % 3 == 0:
            for message in messages[1::2]:
                ids = tokenizer(message["content"], add_special_tokens=False).input_ids
                message["output_ids"] = ids + [end_of_turn(tokenizer)]
        if i == 6:
            messages[1]["output_ids"] = messages[1]["output_ids"][:2]
        request = messages[0]["content"].split("takes one of them.\n\n")[1]
        result.append({"task": {"problem_description": request, "ground_truth": world.write_function(topic, values),
                                "test_cases": {"test1": f"tidy_{topic}([3, 1, 2])"}},
                       "dialogue_history": messages, "answer": messages[-1]["content"], "reward": float(i % 2)})
    return result


def byte_tokenizer(template, control=(), plain=(), eos=None, bos=None, **extra):
    """A byte-level tokenizer with 256 letters and no merges: `control` are special tokens, `plain` added ones that are
    not special (as <think> is in many families)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    core.add_tokens([AddedToken(token, normalized=False) for token in plain])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos, **extra)
    made.chat_template = template
    return made


# ------------------------------------------------------------------ a real model on disk, a real server, a bad line

CHAT = ("{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% for m in messages %}{{ "
        "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}")


def save_model(folder, seed=0, context=8192, template=CHAT, control=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
               eos="<|endoftext|>", pad="<|endoftext|>", **extra):
    """A random Llama with a byte-level tokenizer as a Hugging Face directory; turns end with <|im_end|>, not EOS."""
    made = byte_tokenizer(template, control, eos=eos, pad_token=pad)
    model = tiny_llama(len(made), seed=seed, **extra)
    model.config.max_position_embeddings = context
    model.config.eos_token_id = model.generation_config.eos_token_id = made.eos_token_id
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


def needs_peft():
    """Skip a test of adapters where peft is missing, or is not the one that transformers asks for."""
    try:
        check_adapters("the test")
    except InputError as error:
        pytest.skip(str(error))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """An OpenAI-compatible server as a process of its own (`transformers serve`) with a small random model: (URL, the
    model's name)."""
    pytest.importorskip("fastapi", reason="needs pip install transformers[serving]")
    pytest.importorskip("openai", reason="needs pip install openai")
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    name = save_model(folder / "model", seed=11)
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([str(Path(sys.executable).parent / "transformers"), "serve", name, "--host",
                                    "127.0.0.1", "--port", str(port), "--device", "cpu"], stdout=log, stderr=log,
                                   env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    break
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", name
    finally:
        process.kill()
        process.wait()


class Proxy:
    """Stands between a client and a server on loopback and spoils a share of the requests, by a seeded draw each.

    fault(number of the request, its body) -> None, the name of a fault, an answer of its own (a dictionary), or a
    function of the handler that answers in its own way. `.log` holds (fault, body) of each request,
    `.busy` the largest number of requests at a time.
    """

    FAULTS = ("delay", "reset", "429", "500", "cut", "cut short", "schema", "not json")

    def __init__(self, target, fault, port=0, delay=8.0):
        self.target, self.fault, self.delay, self.log = target, fault, delay, []
        self.now = self.busy = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            do_GET = do_POST = lambda handler: outer.serve(handler)

            def log_message(self, *_):
                pass
        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.httpd.daemon_threads = True
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()
        self.port = self.httpd.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def close(self):
        """Dead for good: nobody listens any more, and what is under way is dropped."""
        self.fault = lambda *_: "reset"
        threading.Thread(target=lambda: (self.httpd.shutdown(), self.httpd.server_close())).start()

    def serve(self, handler):
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        with self.lock:
            number = len(self.log)
            kind = self.fault(number, body)
            self.log.append((kind, body))
            self.now += 1
            self.busy = max(self.busy, self.now)
        try:
            with contextlib.suppress(OSError):
                self.answer(handler, kind, body)
        finally:
            with self.lock:
                self.now -= 1

    def answer(self, handler, kind, body):
        if kind == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True
            return
        if callable(kind):
            return kind(handler)
        if kind == "delay":
            time.sleep(self.delay)
        status, answer = 200, b""
        if kind in ("429", "500", "401"):
            status = int(kind)
            answer = json.dumps({"error": {"message": f"no: {handler.headers.get('authorization')}"}}).encode()
        elif kind == "schema":
            answer = json.dumps({"ok": True}).encode()
        elif kind == "not json":
            answer = b"<html>busy</html>"
        elif isinstance(kind, dict):  # a whole answer of its own
            status, answer = kind.pop("status", 200), json.dumps(kind).encode()
        else:
            request = urllib.request.Request(self.target.removesuffix("/v1") + handler.path, body or None,
                                             {"content-type": "application/json"}, method=handler.command)
            try:
                with urllib.request.urlopen(request) as inner:
                    answer = inner.read()
            except urllib.error.HTTPError as error:
                status, answer = error.code, error.read()
        length = len(answer)
        if kind == "cut":  # the connection ends in the middle of the body
            answer = answer[:length // 2]
        if kind == "cut short":  # half of the JSON, as if that were all
            answer, length = answer[:length // 2], length // 2
        handler.send_response(status)
        handler.send_header("content-type", "text/html" if kind == "not json" else "application/json")
        handler.send_header("content-length", str(length))
        handler.end_headers()
        handler.wfile.write(answer)
        if kind == "cut":
            handler.close_connection = True


def three_in_ten(seed):
    """A fault function that spoils three of every ten requests, at random places, each kind of fault equally often."""
    def fault(number, _):
        block, place = divmod(number, 10)
        places = random.Random(f"{seed} {block}").sample(range(10), 3)
        return Proxy.FAULTS[(3 * block + places.index(place)) % len(Proxy.FAULTS)] if place in places else None
    return fault


def gemma2(vocab, sliding_window=6, **more):
    """Windows, and a cap on the logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=sliding_window, initializer_range=0.5,
        max_position_embeddings=256, **more)).eval()


def eager(hidden, weight, targets):
    """Log-probs of the targets with all logits at once, at least in float32."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
