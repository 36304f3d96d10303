"""A server of OpenAI's /completions on loopback, in this process, that draws from a tiny policy with a loop of its own.
What it gets wrong is switched on by name. It keeps what it was sent."""
import http.server
import json
import threading

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class StubEngine:
    """`with StubEngine(folder) as server`. Faults: `top_k`, `temperature` (used in the place of what was asked), `seed`
    (drawn anew each time), `n` (one answer, whatever was asked), `logprobs` (none given), `reads` (tokens of the prompt),
    `cut` (tokens of an answer), `later` (the temperature from the second token on), `penalty` (of tokens that were drawn),
    `alike` (one seed for all n), `unbiased` (whatever is asked), `cuts_prompt` (tokens that are read, and not said),
    `strict` (no bias on tokens that it does not have). No fault: `processed` (log-probs after temperature and cuts, as
    SGLang says them). At /score it is a reward: the length of a text."""

    def __init__(self, folder=None, owner="llamacpp", **faults):
        self.owner, self.faults, self.received, self.loads, self.hook = owner, faults, [], [], lambda count: None
        self.scored = []
        self.lock, self.server, self.port, self.anew = threading.Lock(), None, 0, iter(range(10**6, 10**9))
        self.first = folder
        if folder is not None:
            self.load(folder)
        self.loads.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def load(self, folder, url=None):
        self.loads.append(str(folder))
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def sampled(self, tokens) -> list[dict]:
        "The requests that are none of a probe, which has answers of 1 and of 16 tokens."
        return [body for body in self.received if body["max_tokens"] == tokens]

    @torch.no_grad()
    def answer(self, body) -> dict:
        wrong, prompt, count = self.faults, body["prompt"], 1 if "n" in self.faults else body["n"]
        assert "strict" not in wrong or all(int(k) < 96 for k in body.get("logit_bias", {}))
        prompt = prompt[-wrong.get("cuts_prompt", 10**6) :]
        bias = {} if "unbiased" in wrong else {int(k): v for k, v in body.get("logit_bias", {}).items()}
        first = next(self.anew) if "seed" in wrong else wrong.get("fixed_seed", body["seed"])
        rngs = [torch.Generator().manual_seed(first + k * ("alike" not in wrong)) for k in range(count)]
        heat, keep = wrong.get("temperature", body["temperature"]), wrong.get("top_k", max(body["top_k"], 0))
        rows, logps, running = [[] for _ in rngs], [[] for _ in rngs], list(range(count))
        by = [None] * count
        for _ in range(min(wrong.get("more", body["max_tokens"]), wrong.get("cut", 10**6))):
            logits = self.model(torch.tensor([prompt + rows[k] for k in running])).logits[:, -1].double()
            for k, own in zip(list(running), logits):
                scores = own.clone()
                for token, more in bias.items():
                    scores[token] += more
                for token in set(rows[k]) if "penalty" in wrong else ():
                    scores[token] -= wrong["penalty"]
                if not rows[k] and body.get("min_tokens"):
                    scores[self.tokenizer.eos_token_id] = -torch.inf
                now = wrong.get("later", heat) if rows[k] else heat
                if not now:
                    scores[scores < scores.max()] = -torch.inf
                scores = scores / (now or 1)
                if keep:
                    scores[scores < scores.topk(keep).values[-1]] = -torch.inf
                cdf = scores.softmax(-1).cumsum(-1)
                token = int((cdf < torch.rand((), generator=rngs[k], dtype=torch.float64) * cdf[-1]).sum())
                rows[k].append(token)
                logps[k].append(float((scores if "processed" in wrong else own).log_softmax(-1)[token]))
                if len(rows[k]) > 1 and self.tokenizer.decode([token]) in wrong.get("own_stop", ""):
                    by[k] = self.tokenizer.decode([rows[k].pop()])
                    logps[k].pop()
                if by[k] or token == self.tokenizer.eos_token_id and "ignore_eos" not in wrong:
                    running.remove(k)
            if not running:
                break
        choices = [{"text": self.tokenizer.decode(ids, skip_special_tokens=True), "finish_reason":
                    "stop" if why or ids[-1] == self.tokenizer.eos_token_id else "length", "token_ids": ids,
                    **({"stop_reason": why} if why else {}),
                    "logprobs": None if "logprobs" in wrong else {"tokens": [f"token_id:{i}" for i in ids],
                                                                  "token_logprobs": said}}
                   for ids, said, why in zip(rows, logps, by)]
        return {"choices": choices, **({} if "cuts_prompt" in wrong else
                                      {"usage": {"prompt_tokens": wrong.get("reads", len(prompt))}})}

    def start(self) -> "StubEngine":
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send(200, {"data": [{"id": "tiny", "owned_by": outer.owner}]} if self.path == "/v1/models" else {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/score":
                    outer.scored.append(len(body["completions"]))
                    return self.send(200, {"rewards": [float(len(text)) for text in body["completions"]]})
                with outer.lock:
                    outer.received.append(body)
                    outer.hook(len(outer.received))
                    self.send(200, outer.answer(body))

            def send(self, status, value):
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc):
        self.stop()
