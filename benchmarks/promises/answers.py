"""The server's responses to any kind of request, and what it does not disclose."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from benchmarks.promises.attackers import FORM, form_with
from benchmarks.promises.promise import Outcome, Promise
from benchmarks.real_server import KEY, Served
from server.requests.schema import CHOICES, GenerateRequest

__all__ = ["PROMISES"]

CANARY: Final = "canary-in-a-coal-mine"
WRONG: Final[tuple[Any, ...]] = (
    None,
    True,
    -1,
    2**70,
    1e300,
    "",
    "../../../etc/passwd",
    "%2e%2e%2f",
    "\x00",
    "x" * 9000,
    [],
    [[]],
    {},
    {"name": "no"},
    {"name": None},
    [{"name": "cfg", "scale": "x"}] * 3,
)


def _malformed(server: Served) -> Outcome:
    """Send every field of a request, and of every choice, with every kind of wrong value."""
    bodies = [{field: value} for field in GenerateRequest.model_fields for value in WRONG]
    for field, members in CHOICES.items():
        if field in GenerateRequest.model_fields:
            for name, member in members.items():
                bodies += [
                    {field: {"name": name, inner: WRONG[k % len(WRONG)]}}
                    for k, inner in enumerate(member.model_fields)
                ]

    def status_of(body: dict[str, Any]) -> int:
        # A body that happens to be valid must not cost time.
        asked = {"prompt": "x", "steps": 1, "width": 32, "height": 32} | body
        return server.ask("POST", "/v1/generate", json.dumps(asked).encode())[0]

    with ThreadPoolExecutor(4) as threads:
        statuses = list(threads.map(status_of, bodies))
    broken = sum(status >= 500 or status == 0 for status in statuses)
    return Outcome(f"{broken} of {len(statuses)} answered with 5xx or not at all", broken == 0)


def _same_seed(server: Served) -> Outcome:
    def needle() -> str:
        content = json.loads(server.generate(seed=7, steps=6)[2])
        return content["images"][0]["b64_json"]

    alone = needle()
    equal = 0
    with ThreadPoolExecutor(4) as threads:
        for turn in range(20):
            company = [
                threads.submit(server.generate, seed=100 + k, steps=3 + k, guidance="cfg")
                for k in range(turn % 4)
            ]
            equal += needle() == alone
            for one in company:
                one.result()
    return Outcome(f"{equal} of 20 equal to the byte", equal == 20)


def _private(server: Served) -> Outcome:
    picture = base64.b64encode(CANARY.encode()).decode()
    server.generate(prompt=CANARY, steps=1)
    server.generate(prompt=f"\x07{CANARY}")
    server.generate(prompt="x", image=picture)
    server.generate(prompt="x", sampler=CANARY)
    server.generate(model=CANARY)
    server.generate(adapters=[CANARY])
    server.generate(**{CANARY: 1})
    server.ask("POST", "/v1/images/edits", form_with(f"{CANARY}.png", "x"), FORM)
    server.ask("POST", "/v1/images/edits", form_with(f"{CANARY}/../x", "\x07"), FORM)
    server.ask("GET", f"/v1/models/{CANARY}")
    server.ask("GET", f"/{CANARY}")
    server.ask("GET", "/metrics", headers={"authorization": f"Bearer {CANARY}"})
    output = server.log.read_bytes() + server.ask("GET", "/metrics")[2]
    hits = sum(output.count(secret.encode()) for secret in (CANARY, picture, KEY))
    return Outcome(f"{hits} found", hits == 0)


PROMISES: Final = (
    Promise(
        "Malformed input never gives a server error.",
        "every field of a request and of every sampler, spacing and guidance rule with wrong "
        "values",
        "0 answers of 5xx",
        "an error while an error is explained",
        _malformed,
    ),
    Promise(
        "The same seed gives the same image in any company (`--deterministic`).",
        "one request alone, and 20 times beside 0 to 3 others",
        "20 of 20 equal to the byte",
        "noise that does not come from the seed",
        _same_seed,
    ),
    Promise(
        "Prompts, pictures, keys and names stay private.",
        "a canary in each, and in the names of adapters, models, fields and uploads, in requests "
        "that succeed and that fail; searched for in the log and the metrics",
        "0 found",
        "requests written to the log",
        _private,
    ),
)
