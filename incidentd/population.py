"""The population: who can be paid, and what is drawn for one payment.

Owns the skew of the load. Must not know what a script does with what it is given.
"""

from __future__ import annotations

import bisect
import itertools
import random
import uuid
from dataclasses import dataclass

from psycopg import AsyncConnection

from incidentd.database import Row, queries, run

HOT_MERCHANTS = 3


@dataclass(frozen=True, slots=True)
class Account:
    """Somebody who can be paid: ids as text, and how busy the merchant is, in payments a month."""

    account_id: str
    merchant_id: str
    weight: float


class Population:
    """Draws who is paid and how much, as skewed as the merchants' monthly volume."""

    def __init__(self, accounts: list[Account], seed: int | None = None) -> None:
        self._random = random.Random(seed)
        self._accounts = accounts
        self._heights = list(itertools.accumulate(account.weight for account in accounts))
        busiest: dict[str, float] = {}
        for account in accounts:
            busiest[account.merchant_id] = busiest.get(account.merchant_id, 0) + account.weight
        self._hot = sorted(busiest, key=busiest.__getitem__, reverse=True)[:HOT_MERCHANTS]

    def draw(self) -> dict[str, str | None]:
        """The supplied parameters (DESIGN §4) of one pass, `session` and `session_count` excepted."""
        height = self._random.random() * self._heights[-1]
        account = self._accounts[bisect.bisect(self._heights, height, hi=len(self._heights) - 1)]
        return {
            "account_id": account.account_id,
            "merchant_id": account.merchant_id,
            "hot_merchant_id": self._random.choice(self._hot),
            "amount": f"{self._random.lognormvariate(3.2, 0.9):.2f}",
            "reference": f"pay_{uuid.uuid4().hex[:24]}",
        }


async def load(conn: AsyncConnection[Row]) -> Population:
    """The population of the database. Raises psycopg.Error."""
    rows = await run(conn, queries("install.sql")["population"])
    return Population([Account(str(row["account_id"]), str(row["merchant_id"]), float(row["weight"] or 0)) for row in rows])
