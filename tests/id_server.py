"""A small server of token ids, in a process of its own: it speaks as vLLM does, and samples by a loop of its own.

    python tests/id_server.py PORT NAME=DIR [NAME=DIR ...]

`/v1/completions` with `prompt` as ids, n, seed, logprobs, stop_token_ids, ignore_eos and return_token_ids; `/v1/models`
lists the names. Nothing of the project is imported: a row is sampled by itself and draws from a generator of its own,
seeded with seed + row, so that equal requests have equal answers.
"""
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM

NEEDED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "return_token_ids": True}
MODELS, LOCK = {}, threading.Lock()


def nucleus(probs, top_p):
    """The smallest set of likeliest tokens that holds top_p, with the probabilities as they are."""
    kept, mass = torch.zeros_like(probs), 0.0
    for token in probs.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept[token] = probs[token]
        mass += probs[token].item()
    return kept


@torch.no_grad()
def speak(model, ask, row):
    """One turn after the prompt: its choice in the answer."""
    generator = torch.Generator().manual_seed(ask["seed"] + row)
    ids, logprobs, reason, read, cache = [], [], "length", ask["prompt"], None
    for _ in range(ask["max_tokens"]):
        out = model(torch.tensor([read]), past_key_values=cache, use_cache=True)
        logits, cache = out.logits[0, -1].double(), out.past_key_values
        probs = nucleus((logits / ask["temperature"]).softmax(-1), ask["top_p"])
        token = int(torch.multinomial(probs, 1, generator=generator))
        ids.append(token)
        read = [token]
        logprobs.append(float(logits.log_softmax(-1)[token]))
        if token in ask["stop_token_ids"]:
            reason = "stop"
            break
    return {"index": row, "text": "", "finish_reason": reason, "token_ids": ids,
            "logprobs": {"tokens": [""] * len(ids), "token_logprobs": logprobs}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.say(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]})

    def do_POST(self):
        ask = json.loads(self.rfile.read(int(self.headers["content-length"])))
        wrong = {name: ask.get(name) for name, value in NEEDED.items() if ask.get(name) != value}
        if ask["model"] not in MODELS or wrong:
            return self.say(404, {"error": {"message": f"no {ask['model']} here, or not with {wrong}"}})
        with LOCK:
            choices = [speak(MODELS[ask["model"]], ask, row) for row in range(ask["n"])]
        self.say(200, {"id": "x", "object": "text_completion", "created": 0, "model": ask["model"], "choices": choices})

    def say(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    for pair in sys.argv[2:]:
        name, _, folder = pair.partition("=")
        MODELS[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
