"""Kill a server again and again while it accepts and runs durable jobs, and count what is left.

    python -m benchmarks.killed_jobs                        # 50 kills, 200 jobs
    python -m benchmarks.killed_jobs --kills 5 --jobs 20

Starts the real server on a folder of jobs, lets clients send jobs, and ends it with SIGKILL at a
random moment, while it accepts jobs, draws or stores; then starts it on the same folder again. A
client that got no response sends its job again with the same `Idempotency-Key`. At the end, every
job that a server acknowledged must have succeeded under one identifier and with one stored image,
and the database must be intact. Prints one table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import sys
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from threading import Thread
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Final

from benchmarks.real_server import SERVE, Served, served

if TYPE_CHECKING:
    from collections.abc import Sequence

PATH: Final = "/v1/predictions"
OPTIONS: Final = ("--row-budget", "8")
MAX_LIFE_S: Final = 2.0
"""Maximum seconds from the readiness of a server to the signal; half of that on average."""

END_S: Final = 600.0
ENDED: Final = frozenset({"succeeded", "failed", "canceled"})


@dataclass(slots=True)
class Sent:
    """A job as known to its client.

    Attributes:
        seed: seed of its image, which makes its key and its body unique.
        answers: identifiers under which servers acknowledged it.
    """

    seed: int
    answers: list[str] = field(default_factory=list)

    def send(self, server: Served) -> None:
        """Send it once; the server may end before it answers."""
        body = {"input": {"prompt": "a red circle", "steps": 8, "seed": self.seed}}
        headers = {"idempotency-key": f"job-{self.seed}"}
        try:
            status, _, content = server.ask("POST", PATH, json.dumps(body).encode(), headers)
        except HTTPException:
            # The server ended during its response.
            return
        if status in (201, 202):
            self.answers.append(json.loads(content)["id"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if a job was lost, duplicated or failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args(arguments)
    random = Random(given.seed)
    sent = [Sent(seed) for seed in range(given.jobs)]
    with TemporaryDirectory() as folder:
        environment = {
            "WEFT_JOBS__FOLDER": folder,
            "WEFT_JOBS__RUNNING": "8",
            # By default a job fails after three attempts during which its process ended.
            "WEFT_JOBS__ATTEMPTS": "100",
        }
        for kill in range(given.kills):
            due = sent[: given.jobs * (kill + 1) // given.kills]
            live_and_die(environment, [one for one in due if not one.answers], random)
            print(f"kill {kill + 1} of {given.kills}", file=sys.stderr)
        figures = survey(environment, Path(folder), sent)
    for name, found, expected in figures:
        print(f"| {name} | {found} | {'' if found == expected else f'not {expected}'} |")
    return int(any(found != expected for _, found, expected in figures))


def live_and_die(environment: dict[str, str], due: Sequence[Sent], random: Random) -> None:
    """Start a server, send it the jobs that are due, and kill it at a random moment."""
    with served([*SERVE, *OPTIONS], **environment) as server:
        client = Thread(target=lambda: [one.send(server) for one in due])
        client.start()
        sleep(random.uniform(0, MAX_LIFE_S))
        os.kill(server.process, signal.SIGKILL)
        client.join()


def survey(
    environment: dict[str, str], folder: Path, sent: Sequence[Sent]
) -> list[tuple[str, Any, Any]]:
    """Let a last server finish all jobs, and count the results: name, found, expected."""
    with served([*SERVE, *OPTIONS], **environment) as server:
        for one in sent:
            if not one.answers:
                one.send(server)
            # Sent once more: the key of an acknowledged job always stands for the same job.
            one.send(server)
        until = monotonic() + END_S
        while any(job["status"] not in ENDED for job in listed(server)) and monotonic() < until:
            sleep(1)
        jobs = listed(server)
        images = sum(
            server.ask("GET", path)[2].startswith(b"\x89PNG")
            for job in jobs
            for path in job["output"] or ()
        )
    acknowledged = {identifier for one in sent for identifier in one.answers}
    stored = [path for path in (folder / "pictures").rglob("*") if path.is_file()]
    with sqlite3.connect(folder / "jobs.sqlite") as connection:
        (sound,) = connection.execute("PRAGMA integrity_check").fetchone()
    count = len(sent)
    begun_again = sum(job["attempts"] > 1 for job in jobs)
    print(f"{begun_again} of {count} jobs were begun more than once", file=sys.stderr)
    return [
        ("jobs acknowledged", sum(bool(one.answers) for one in sent), count),
        ("identifiers under which they were", len(acknowledged), count),
        ("jobs in the list", len(jobs), count),
        ("of them acknowledged", len(acknowledged & {job["id"] for job in jobs}), count),
        ("succeeded", sum(job["status"] == "succeeded" for job in jobs), count),
        ("images served", images, count),
        ("images in the folder", len(stored), count),
        ("SQLite's integrity_check", sound, "ok"),
    ]


def listed(server: Served) -> list[dict[str, Any]]:
    """All jobs, page by page."""
    jobs: list[dict[str, Any]] = []
    path: str | None = PATH
    while path is not None:
        page = json.loads(server.ask("GET", path)[2])
        jobs += page["results"]
        path = page["next"]
    return jobs


if __name__ == "__main__":
    sys.exit(main())
