"""The population: who is paid, how often and how much."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from incidentd.catalog import SUPPLIED
from incidentd.population import HOT_MERCHANTS, Account, Population

DRAWS = 20_000

# Twenty merchants with two accounts each, as skewed as Zipf's law: the first is twenty times as busy as the last.
ACCOUNTS = [Account(f"a{number}{side}", f"m{number}", 1 / number) for number in range(1, 21) for side in "xy"]


def draws(accounts: list[Account], count: int = DRAWS, seed: int = 7) -> list[dict[str, str | None]]:
    population = Population(accounts, seed)
    return [population.draw() for _ in range(count)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_accounts_are_drawn_as_often_as_their_weight_says(seed: int) -> None:
    drawn = Counter(each["account_id"] for each in draws(ACCOUNTS, seed=seed))
    total = sum(account.weight for account in ACCOUNTS)
    expected = {account.account_id: DRAWS * account.weight / total for account in ACCOUNTS}
    chi_square = sum((drawn[name] - count) ** 2 / count for name, count in expected.items())
    assert chi_square < 80  # 39 degrees of freedom: a fair draw stays below in 9999 of 10000 seeds


def test_a_merchant_comes_with_an_account_of_its_own() -> None:
    merchants = {account.account_id: account.merchant_id for account in ACCOUNTS}
    assert all(merchants[str(each["account_id"])] == each["merchant_id"] for each in draws(ACCOUNTS, 1000))


@pytest.mark.parametrize("place", [0, 5, 39])
def test_an_account_of_no_weight_is_never_drawn(place: int) -> None:
    accounts = list(ACCOUNTS)
    accounts[place] = Account("idle", "idle", 0.0)
    assert "idle" not in {each["account_id"] for each in draws(accounts)}


def test_every_account_is_drawn_where_all_are_alike() -> None:
    alike = [Account(str(number), str(number), 1.0) for number in range(50)]
    assert {each["account_id"] for each in draws(alike)} == {account.account_id for account in alike}


def test_an_only_account_is_always_drawn() -> None:
    for weight in (0.0, 1e-9, 5.0):
        only = draws([Account("a", "m", weight)], 10)
        assert {(each["account_id"], each["merchant_id"], each["hot_merchant_id"]) for each in only} == {("a", "m", "m")}


def test_hot_merchants_are_the_busiest_by_all_their_accounts() -> None:
    # No account of m9 is among the busiest, but together they are.
    accounts = [*(Account(f"a{n}", f"m{n}", 10.0 + n) for n in range(4)), *(Account(f"b{n}", "m9", 4.0) for n in range(5))]
    drawn = Counter(each["hot_merchant_id"] for each in draws(accounts))
    assert set(drawn) == {"m9", "m3", "m2"}
    assert len(drawn) == HOT_MERCHANTS
    assert min(drawn.values()) > DRAWS / HOT_MERCHANTS * 0.9


def test_references_are_unique_even_between_daemons_with_the_same_seed() -> None:
    references = [str(each["reference"]) for each in draws(ACCOUNTS) + draws(ACCOUNTS)]
    assert len(set(references)) == 2 * DRAWS
    assert all(re.fullmatch(r"pay_[0-9a-f]{24}", reference) for reference in references)


def test_amounts_are_positive_with_two_decimals_and_mostly_small() -> None:
    amounts = [str(each["amount"]) for each in draws(ACCOUNTS)]
    assert all(re.fullmatch(r"\d+\.\d\d", amount) for amount in amounts)
    in_order = sorted(map(float, amounts))
    assert in_order[0] > 0
    assert 20 < in_order[DRAWS // 2] < 30
    assert in_order[-1] > 10 * in_order[DRAWS // 2]


def test_one_seed_draws_the_same_payments_and_another_does_not() -> None:
    def without_references(seed: int) -> list[dict[str, str | None]]:
        return [{**each, "reference": None} for each in draws(ACCOUNTS, 50, seed)]

    assert without_references(1) == without_references(1) != without_references(2)


def test_a_draw_supplies_all_parameters_but_those_of_the_session() -> None:
    (only,) = draws(ACCOUNTS, 1)
    assert only.keys() == SUPPLIED - {"session", "session_count"}
    assert all(isinstance(value, str) for value in only.values())
