"""`vixml serve` under many clients: errors, time of a request, and memory before and after.

  python benchmarks/serve.py --workdir=runs/demo/vixml
  python benchmarks/serve.py --workdir=runs/demo/vixml --clients=64 --seconds=60 --json=serve.json

Starts the service, batching as it comes and then with batches of one, and for each has --clients threads ask
without a pause, each on a connection of its own: titles of the run's test split, every --picture_every-th
with its picture where the run has pictures. Every answer is checked: status 200, k labels, scores in falling
order. Memory is the resident set of the service once the clients have run for --settle seconds, and at the
end; clients and service share the machine's cores.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from vixml_jax import config as config_lib
from vixml_jax import data, files

K = 10


class Client(threading.Thread):
    """Asks until it is told to stop; keeps the seconds of each request and what went wrong."""

    def __init__(self, port: int, bodies: list[bytes], seed: int, stop: threading.Event):
        super().__init__(daemon=True)
        self._port, self._bodies, self._stopped = port, bodies, stop
        self._rng = np.random.default_rng(seed)
        self.seconds: list[float] = []
        self.errors: list[str] = []

    def run(self) -> None:
        """Asks."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        while not self._stopped.is_set():
            body = self._bodies[self._rng.integers(len(self._bodies))]
            start = time.perf_counter()
            try:
                connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = json.loads(response.read())
                scores = [label["score"] for label in answer.get("labels", [])]
                if response.status != 200 or len(scores) != K or scores != sorted(scores, reverse=True):
                    self.errors.append(f"{response.status}: {str(answer)[:200]}")
            except Exception as error:  # whatever it answers: a client that ended here would not be counted
                self.errors.append(repr(error))
                connection.close()
            self.seconds.append(time.perf_counter() - start)
        connection.close()


def bodies_of(workdir: Path, picture_every: int) -> list[bytes]:
    """Requests made of the run's test split."""
    config = config_lib.load(workdir / "config.json")
    test = data.load(config.dataset.dir).test
    bodies = []
    for row in range(min(len(test), 2000)):
        record = {"title": test.titles[row], "content": test.contents[row], "k": K}
        if config.vision.images and picture_every and row % picture_every == 0:
            pictures = [picture for picture in test.images[row] if picture]
            record["images"] = [base64.b64encode(picture).decode() for picture in pictures[:1]]
        if record["title"] or record["content"] or record.get("images"):
            bodies.append(json.dumps(record).encode())
    return bodies


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def measure(options: argparse.Namespace, bodies: list[bytes], max_batch: int) -> dict[str, float]:
    """Figures of one service."""
    command = [sys.executable, "-m", "vixml_jax", "serve", f"--workdir={options.workdir}", "--port=0"]
    command.append(f"--max_batch={max_batch}")
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    try:
        begun = time.perf_counter()
        port = 0
        for line in service.stdout:
            if "http://" in line:
                port = int(line.split("http://")[1].split()[0].rpartition(":")[2])
                break
        assert port, "the service did not start"
        start_up = time.perf_counter() - begun
        stop = threading.Event()
        clients = [Client(port, bodies, seed, stop) for seed in range(options.clients)]
        for client in clients:
            client.start()
        time.sleep(options.settle)
        before = resident_mb(service.pid)
        counts = [len(client.seconds) for client in clients]
        start = time.perf_counter()
        time.sleep(options.seconds)
        after, elapsed = resident_mb(service.pid), time.perf_counter() - start
        seconds = np.concatenate(
            [client.seconds[count:] for client, count in zip(clients, counts, strict=True)]
        )
        stop.set()
        for client in clients:
            client.join(120)
        errors = [error for client in clients for error in client.errors]
        errors += ["a client waits for ever" for client in clients if client.is_alive()]
        if errors:
            print(f"first of {len(errors)} errors: {errors[0]}", file=sys.stderr)
        return {
            "requests": len(seconds),
            "errors": len(errors),
            "requests_per_s": len(seconds) / elapsed,
            "p50_ms": 1e3 * float(np.percentile(seconds, 50)),
            "p99_ms": 1e3 * float(np.percentile(seconds, 99)),
            "max_ms": 1e3 * float(seconds.max()),
            "memory_before_mb": before,
            "memory_after_mb": after,
            "start_up_s": start_up,
        }
    finally:
        service.terminate()
        try:
            service.wait(60)
        except subprocess.TimeoutExpired:
            service.kill()
            service.wait()
            raise


def main() -> None:
    """Runs both services and prints their figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="a trained run")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--settle", type=float, default=15, help="seconds before memory is first looked at")
    parser.add_argument("--picture_every", type=int, default=4)
    parser.add_argument("--json", default="serve.json", help="where the figures go")
    options = parser.parse_args()
    bodies = bodies_of(options.workdir, options.picture_every)
    figures = {name: measure(options, bodies, batch) for name, batch in (("batched", 64), ("one_by_one", 1))}
    print(f"{options.clients} clients for {options.seconds:g} s")
    print(f"{'':18}" + "".join(f"{name:>14}" for name in figures))
    for name in figures["batched"]:
        print(f"{name:18}" + "".join(f"{column[name]:>14,.1f}" for column in figures.values()))
    settings = {name: str(value) for name, value in vars(options).items()}
    files.write_json(options.json, {"settings": settings, **figures})


if __name__ == "__main__":
    main()
