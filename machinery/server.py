"""Many questions to a language-model server that may fail at any moment.

Any OpenAI-compatible server will do (vLLM, llama.cpp, `transformers serve`, a provider's). Three things make asking
it many thousand times bearable, and none is particular to SWEET-RL: some requests are in flight at a time and no more;
a request that failed in a way that may pass is sent again after a pause, longer each time and never quite the same
(back-off and jitter, so that a server which comes back is not met by everybody at once); and when the server is gone
for good, everybody stops asking, so that the caller can keep what is finished.

Used by `simulator.EndpointHuman`. Exercised by `python -m pytest tests/test_humans.py`.
"""
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from machinery.files import InputError
from machinery.optional import require
from machinery.train import arg

PAUSE = 0.5  # seconds before the second try


@dataclass(frozen=True)
class Server:
    """The human behind a URL."""
    model: str = arg("", "the model to ask for (default: the only one that the server lists)")
    parallel: int = arg(16, "requests in flight at most")
    timeout: float = arg(60.0, "seconds until a request counts as lost")
    retries: int = arg(8, "further tries of a request that failed; then the server counts as gone", least=0)
    max_tokens: int = arg(128, "tokens of a reply at most")


class Endpoint:
    """A model behind an OpenAI-compatible server. The key, if it needs one, is read from OPENAI_API_KEY and appears in
    no message.

    Made with a URL and a `Server`; InputError if the URL holds a key, nobody is there, the key is refused, or it is
    open which model to ask for.
    """

    def __init__(self, url, cfg):
        openai = require("openai", url)
        parts = urlsplit(url)
        if not parts.hostname or parts.username or parts.password or parts.query:
            raise InputError("a server's URL should be like http://host:8000/v1, without a key: keys go into the "
                             "environment variable OPENAI_API_KEY")
        self.openai, self.cfg, self.jitter = openai, cfg, random.Random(0)
        self.key, self.gone, self.status = os.environ.get("OPENAI_API_KEY") or "none", None, 0
        self.client = openai.OpenAI(base_url=url, api_key=self.key, max_retries=0, timeout=cfg.timeout)
        served = self._try(lambda: [model.id for model in self.client.models.list().data], 3, patient=not cfg.model)
        if served is None and self.status in (0, 401, 403):  # any other answer shows that somebody is there
            raise InputError(f"{url}: {self.gone}")
        if not cfg.model and len(served or ()) != 1:
            raise InputError(f"{url}: which model? It lists {served or 'none'}; name one with --human-model")
        self.model, self.gone = cfg.model or served[0], None

    def _try(self, ask, retries, patient=True):
        """ask(), again while it fails in a way that may pass; None, and the reason in self.gone, if it failed for
        good. patient: an answer that says "not now" is one of these ways."""
        for attempt in range(retries + 1):
            if self.gone:
                return None
            try:
                return ask()
            except (self.openai.OpenAIError, ValueError, TypeError, AttributeError, IndexError) as error:
                # 0: nobody answered; 200: the body is cut off or of another shape
                status = getattr(error, "status_code", 0 if isinstance(error, self.openai.OpenAIError) else 200)
                text = f"{type(error).__name__}: {error}"
                if getattr(error, "code", None) == "content_filter":  # how some providers refuse
                    return ""
            passing = status < 400 or patient and (status >= 500 or status in (408, 409, 429))
            if not passing or attempt == retries:
                break
            time.sleep(min(30.0, PAUSE * 2 ** attempt) * (0.5 + 0.5 * self.jitter.random()))
        self.status, self.gone = status, " ".join(text.replace(self.key, "***").split())[:300]
        return None

    def _complete(self, messages):
        def ask():
            message = self.client.chat.completions.create(
                model=self.model, messages=messages, max_tokens=self.cfg.max_tokens, temperature=0.0).choices[0].message
            return "" if message.refusal else (message.content or "").strip()
        return self._try(ask, self.cfg.retries)

    def complete(self, conversations):
        """The model's message after each conversation (a list of messages): "" if it was empty or refused, None if the
        server is gone, with the reason in `.gone`."""
        with ThreadPoolExecutor(self.cfg.parallel) as pool:
            return list(pool.map(self._complete, conversations))
