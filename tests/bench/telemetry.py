"""What telemetry costs at saturation: payments per second with it and without it, side by side in one run.

    python tests/bench/telemetry.py --seconds 10 --rounds 3

makes payments back to back through the service's own pool, first with no telemetry, then with metrics, log records and 5 %
of the payments traced and sent to a real OTLP receiver in a process of its own, in turn; prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from otlp_receiver import Receiver

from incidentd import catalog, database, install, otlp, population
from incidentd.catalog import Actor
from incidentd.metrics import Metrics
from incidentd.population import Population
from incidentd.postgres import Cluster
from incidentd.tracing import Tracing
from incidentd.workload import PAYMENT, Workload

PAYMENTS = 100_000
CLIENTS = 8


def receive(ports: multiprocessing.Queue[int]) -> None:
    """A receiver that takes everything, on a port that it tells."""
    receiver = Receiver().start()
    ports.put(receiver.http_port)
    while True:
        time.sleep(1)
        receiver.spans.clear()
        receiver.records.clear()


async def saturate(server: database.Server, people: Population, payment: Actor, seconds: float, *, telemetry: bool) -> float:
    """Payments per second of eight clients that never pause."""
    metrics, environment = Metrics(), dict(os.environ)
    export = otlp.Export(metrics, environment if telemetry else {"OTEL_SDK_DISABLED": "true"})
    tracing = Tracing(export.spans, environment)
    workload = Workload(server, CLIENTS, people, metrics, tracing)
    await workload.open(payment)
    clock = asyncio.get_running_loop().time

    async def client(until: float) -> int:
        made = 0
        while clock() < until:
            await workload.request(payment, clock())
            made += 1
        return made

    await asyncio.gather(*(client(clock() + 1) for _ in range(CLIENTS)))  # statements prepared, caches warm
    begun = clock()
    made = sum(await asyncio.gather(*(client(begun + seconds) for _ in range(CLIENTS))))
    rate = made / (clock() - begun)
    await workload.close()
    tracing.close()
    export.close()
    return rate


async def measure(server: database.Server, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Both ways in turn, `rounds` times."""
    async with await database.connect(server.control()) as conn:
        await install.install(conn, PAYMENTS, lambda doing, done: None)
        people = await population.load(conn)
    payment = catalog.load([]).normal[PAYMENT]
    rates: dict[str, list[float]] = {"without telemetry": [], "with telemetry": []}
    for _ in range(rounds):
        for name, way in rates.items():
            way.append(await saturate(server, people, payment, seconds, telemetry=name == "with telemetry"))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("telemetry.json"))
    chosen = parser.parse_args()
    ports: multiprocessing.Queue[int] = multiprocessing.Queue()
    receiver = multiprocessing.Process(target=receive, args=[ports], daemon=True)
    receiver.start()
    otlp.environment()
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{ports.get(timeout=10)}"
    directory = Path(tempfile.mkdtemp(prefix="incidentd-bench-"))
    directory.chmod(0o755)
    cluster = Cluster(directory / "server", settings={"synchronous_commit": "off"})
    try:
        cluster.start()
        rates = asyncio.run(measure(database.Server(cluster.connection), chosen.seconds, chosen.rounds))
    finally:
        cluster.stop()
        receiver.terminate()
        shutil.rmtree(directory, ignore_errors=True)
    table = Table("payments", "median /s", "each round /s", "ratio")
    peer = statistics.median(rates["without telemetry"])
    for name, way in rates.items():
        median = statistics.median(way)
        table.add_row(name, f"{median:.0f}", ", ".join(f"{rate:.0f}" for rate in way), f"{median / peer:.2f}")
    Console().print(table)
    chosen.json.write_text(
        json.dumps({"clients": CLIENTS, "seconds": chosen.seconds, "payments_per_second": rates}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
