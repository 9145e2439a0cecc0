"""An OpenAI-compatible endpoint that answers for a policy: `python -m chat --serve`. docs/endpoints.md describes it."""

from __future__ import annotations

import itertools
import math
import queue
import random
import sys
import time
import traceback
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from threading import Thread

from config import Config
from dialogue import SYSTEM_PROMPT, Candidate, ChatTokenizer, Dialogue, render_turn, stream_seed
from endpoints.wire import Message, RequestError, parse_request
from model import Qwen2ForCausalLM
from rewards import read_candidate
from sampler import Draw, Sampler, kv_budget, make_sampler
from untrusted.plain_text import clean_text, json_type, say

MAX_SAMPLERS = 4  # temperatures that are served at once; a fifth takes the place of one that is idle
MAX_WAITING = 256  # requests that may wait for a place; more are sent away
TEMPERATURES = (0.01, 100.0)  # allowed beside 0
HOT = "[{:g}, {:g}]".format(*TEMPERATURES)
NEUTRAL = {  # fields that are not supported, and the values with which they change nothing
    "stop": (None, []),
    "tools": (None, []),
    "logprobs": (None, False),
    "response_format": (None, {"type": "text"}),
    "top_p": (None, 1),
    "top_k": (None, -1, 0),
    "min_p": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
}


@dataclass
class Job:
    """A turn that somebody waits for."""

    prompt_ids: list[int]
    temperature: float
    seed: int
    draw: Future[Draw]


class Service:
    """Answers chat completion requests: threads read them and wait, one thread samples for all of them together.

    Nothing is remembered of a client. But where a prompt continues what a row of the cache holds to the last id, as in
    a dialogue that goes on, the row's keys and values are used again.
    """

    def __init__(self, policy: Qwen2ForCausalLM, chat: ChatTokenizer, config: Config, model: str, temperature: float):
        self.policy, self.chat, self.config, self.model, self.temperature = policy, chat, config, model, temperature
        self.kv_bytes = kv_budget(config, policy.head_weight.device) // MAX_SAMPLERS
        self.samplers: dict[float, Sampler] = {}
        self.asked: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.waiting: deque[Job] = deque()  # taken from `asked`, not yet started
        self.running: dict[int, Job] = {}  # by the key of their row
        self.keys = itertools.count()
        Thread(target=self.work, daemon=True).start()

    # ------------------------------------------------------------------------------------ in the threads of the server

    def answer(self, raw: bytes) -> dict:
        """Answer the body of a chat completion request; RequestError if it cannot be."""
        request = parse_request(raw)
        temperature, limit = self.read_settings(request)
        prompt_ids, whole = self.read_messages(request["messages"])
        if len(prompt_ids) + self.config.max_new_tokens > (longest := self.policy.config.max_position_embeddings):
            room = longest - self.config.max_new_tokens
            raise RequestError(400, f"the dialogue has {len(prompt_ids)} tokens; with a reply, {room} have room")
        if self.asked.qsize() + len(self.waiting) >= MAX_WAITING:
            raise RequestError(503, f"{MAX_WAITING} requests wait already; try again later")
        seed = request.get("seed")
        seed = random.SystemRandom().getrandbits(31) if seed is None else stream_seed("serve", seed)
        job = Job(prompt_ids, temperature, seed, Future())
        self.asked.put(job)
        try:
            draw = job.draw.result()
        except ValueError as error:  # the cache has no room for it, ever
            flags = f"the flags are the server's, whose {MAX_SAMPLERS} temperatures share --kv-gib"
            raise RequestError(400, f"{error}; {flags}") from None
        cut = len(draw.token_ids) > limit
        stop_reason = "length" if cut else draw.stop_reason
        reply = read_candidate(draw.token_ids[:limit], [], stop_reason, Dialogue(0, "client", ()), self.chat)
        return self.completion(reply, len(prompt_ids), whole)

    def read_settings(self, request: dict) -> tuple[float, int]:
        """Return a request's temperature and most tokens; RequestError for what this server cannot do."""
        for name, neutral in NEUTRAL.items():
            if (value := request.get(name)) not in neutral:
                raise RequestError(422, f'"{name}" is {json_type(value)}; that is not supported here; leave it out')
        temperature = request.get("temperature")
        temperature = self.temperature if temperature is None else temperature
        if type(temperature) not in (int, float) or not is_temperature(temperature):
            raise RequestError(422, f'"temperature" is {json_type(temperature)}; it must be 0 or lie in {HOT}')
        most = self.config.max_new_tokens
        names = ("max_completion_tokens", "max_tokens")
        name, limit = next(((name, request[name]) for name in names if request.get(name) is not None), ("", most))
        if type(limit) is not int or limit < 1:
            raise RequestError(
                422,
                f'"{name}" is {json_type(limit)}; it must be a whole number from 1; above {most} (the server\'s'
                f" --max-new-tokens) it counts as {most}",
            )
        return float(temperature), min(limit, most)

    def read_messages(self, messages: list[Message]) -> tuple[list[int], bool]:
        """Return the policy's prompt, and whether the client speaks in whole turns, profile blocks included.

        It does if it sends the system prompt of training, or the default one, as the evaluation of an endpoint does:
        the policy's own is read in its place. Else an assistant message is a response, and its profile is the list in
        its "profile" field; without one the history has no profile block there, as an older turn with
        --history-profile latest.
        """
        whole = messages[0]["role"] == "system"
        if whole and messages[0]["content"].strip() not in (self.chat.system_prompt.strip(), SYSTEM_PROMPT):
            raise RequestError(422, "the policy knows one system prompt, its own; send no system message")
        said = messages[whole:]
        if len(said) % 2 == 0 or any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(said)):
            raise RequestError(422, '"user" and "assistant" messages must take turns, and the first and last be "user"')
        ids = self.chat.message("system", self.chat.system_prompt)
        for i, message in enumerate(said):
            told = not whole and (self.config.history_profile == "all" or i == len(said) - 2)
            text = as_written(message, i + whole) if told else message["content"]
            ids += self.chat.message(message["role"], valid_unicode(text))
        return ids + self.chat.generation_header, whole

    def completion(self, reply: Candidate, n_prompt: int, whole: bool) -> dict:
        """Write a reply in OpenAI's shape, with the profile, and why it could not be read if so, beside the content."""
        n_reply = len(reply.token_ids)
        message = {"role": "assistant", "content": reply.text if whole else reply.response, "profile": reply.profile}
        return {
            "id": f"chatcmpl-{random.SystemRandom().getrandbits(64):016x}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model,
            "choices": [
                {
                    "index": 0,
                    "message": message | ({"failure": reply.failure} if reply.failure else {}),
                    "finish_reason": reply.stop_reason,
                }
            ],
            "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_reply, "total_tokens": n_prompt + n_reply},
        }

    # ----------------------------------------------------------------------------------------- in the sampler's thread

    def work(self) -> None:
        """Start what was asked, and take one step for all that run, for ever."""
        while True:
            try:
                self.start_waiting()
                for sampler in self.samplers.values():
                    for draw in sampler.step() if sampler.running else ():
                        sampler.adopt(draw.key, 0)
                        self.running.pop(draw.key).draw.set_result(draw)
            except Exception as error:  # out of memory, or a bug: those who wait must hear of it, and others be served
                say(traceback.format_exc(), sys.stderr)
                for job in (*self.running.values(), *self.waiting):
                    job.draw.set_exception(RuntimeError(str(error)))
                self.samplers.clear()
                self.running.clear()
                self.waiting.clear()

    def start_waiting(self) -> None:
        """Take in new requests, waiting for one if nothing runs, and start as many as there is room for, in order."""
        if not self.running and not self.waiting:
            self.waiting.append(self.asked.get())
        while not self.asked.empty():
            self.waiting.append(self.asked.get())
        while self.waiting:
            job = self.waiting[0]
            sampler = self.sampler_of(job.temperature)
            if sampler is None:
                return
            key = self.row_key(sampler, job.prompt_ids)
            try:
                if not sampler.start(key, job.prompt_ids, [job.seed]):
                    return
            except ValueError as error:
                job.draw.set_exception(error)
            else:
                self.running[key] = job
            self.waiting.popleft()

    def sampler_of(self, temperature: float) -> Sampler | None:
        """Return the sampler of a temperature; None if all there may be are busy with others."""
        if temperature not in self.samplers and len(self.samplers) == MAX_SAMPLERS:
            idle = next((t for t, sampler in self.samplers.items() if not sampler.running), None)
            if idle is None:
                return None
            del self.samplers[idle]
        if temperature not in self.samplers:
            rows = self.config.decode_batch_size
            self.samplers[temperature] = make_sampler(
                self.policy, self.chat, self.config, 1, temperature, rows, self.kv_bytes
            )
        return self.samplers[temperature]

    def row_key(self, sampler: Sampler, prompt_ids: list[int]) -> int:
        """Return the key of the parked dialogue that this prompt continues, or a new one."""
        parked = [row for row in sampler.rows if row is not None and not row.running]
        continued = [row for row in parked if prompt_ids[: len(row.token_ids)] == row.token_ids]
        return max(continued, key=lambda row: len(row.token_ids)).key if continued else next(self.keys)


def is_temperature(value: float) -> bool:
    """Tell whether a policy can be sampled at a temperature: 0, which is greedy, or neither tiny nor huge."""
    return value == 0 or math.isfinite(value) and TEMPERATURES[0] <= value <= TEMPERATURES[1]


def as_written(message: dict, i: int) -> str:
    """Return messages[i] as the policy wrote or read it: an assistant's with its profile block, if that was sent."""
    content, profile = message["content"], message.get("profile")
    if message["role"] == "user" or profile is None:
        return content
    if not isinstance(profile, list) or not all(isinstance(line, str) for line in profile):
        raise RequestError(422, f"messages[{i}].profile is {json_type(profile)}, not a list of strings")
    return render_turn([line for line in map(clean_text, profile) if line], content)


def valid_unicode(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and a tokenizer cannot."""
    return text.encode("utf-8", "replace").decode()


def serve(server: ThreadingHTTPServer, service: Service) -> None:
    """Let a server answer for a policy until Ctrl-C."""
    server.answer = service.answer
    address = f"http://{server.server_address[0]}:{server.server_address[1]}/v1"
    say(f"{clean_text(service.model)} at {address}{' (with a key)' if server.key else ''}")
    with server:
        server.serve_forever(poll_interval=0.1)
