"""Grade-school word problems with worked answers: a story in two or three steps, each with its small
calculation.

Knows nothing of tokens or splits. Invariant: every number of an answer follows from the request, and none
is negative.
"""

from random import Random

from deploy.demo.domains.sample import Sample

NAMES = (
    "Mia Tom Ana Ben Lily Sam Eva Max Nora Leo Ruth Ivan Rosa Omar Jane Paul Emma Jack Zoe Adam "
    "Lucy Finn Clara Hugo Sara Noah Amy Felix Julia Peter"
).split()
THINGS = (
    "apples pears books coins stickers pencils marbles cards shells eggs flowers stamps buttons cookies "
    "oranges beads tickets balloons cups candles"
).split()
HOLDERS = ("box bag basket shelf jar drawer tray case").split()
PLURALS = {"box": "boxes", "shelf": "shelves"}


def sample(rng: Random) -> Sample:
    """One word problem of a random kind."""
    request, answer = rng.choice(KINDS)(rng)
    return Sample(request, request, answer)


def _gains_and_losses(rng: Random) -> tuple[str, str]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    start, gain = rng.randint(5, 25), rng.randint(2, 20)
    total = start + gain
    loss = rng.randint(2, min(20, total - 1))
    got, gave = rng.choice(("buys", "finds", "gets")), rng.choice(("gives away", "sells", "loses"))
    left = total - loss
    request = (
        f"{name} has {start} {thing}. {name} {got} {gain} more {thing} and then {gave} {loss} of them. "
        f"How many {thing} does {name} have now?"
    )
    answer = (
        f"{name} starts with {start} {thing}. After {name} {got} {gain} more, there are "
        f"{start} + {gain} = {total} {thing}. After {name} {gave} {loss}, there are "
        f"{total} - {loss} = {left} {thing}. The answer is {left}."
    )
    return request, answer


def _holders(rng: Random) -> tuple[str, str]:
    name, thing, holder = rng.choice(NAMES), rng.choice(THINGS), rng.choice(HOLDERS)
    many = PLURALS.get(holder, f"{holder}s")
    count, each, extra = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 12)
    packed = count * each
    total = packed + extra
    request = (
        f"{name} has {count} {many} with {each} {thing} in each {holder}, and {extra} more "
        f"{thing} on the table. "
        f"How many {thing} does {name} have in total?"
    )
    answer = (
        f"There are {count} {many} with {each} {thing} in each {holder}. The {many} hold "
        f"{count} * {each} = {packed} {thing}. Together with the {extra} {thing} on the table, there are "
        f"{packed} + {extra} = {total} {thing}. The answer is {total}."
    )
    return request, answer


def _shopping(rng: Random) -> tuple[str, str]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    cost = count * price
    money = cost + rng.randint(1, 12)
    change = money - cost
    request = (
        f"{name} buys {count} {thing} for {price} dollars each and pays with {money} dollars. "
        f"How much change does {name} get?"
    )
    answer = (
        f"{name} buys {count} {thing} for {price} dollars each. The {thing} cost "
        f"{count} * {price} = {cost} dollars. {name} pays with {money} dollars, so the change is "
        f"{money} - {cost} = {change} dollars. The answer is {change}."
    )
    return request, answer


def _sharing(rng: Random) -> tuple[str, str]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    friends, each = rng.randint(2, 9), rng.randint(2, 9)
    shared = friends * each
    kept = rng.randint(2, 12)
    start = shared + kept
    request = (
        f"{name} has {start} {thing} and keeps {kept} of them. The rest is shared equally by "
        f"{friends} friends. "
        f"How many {thing} does each friend get?"
    )
    answer = (
        f"{name} starts with {start} {thing} and keeps {kept}. That leaves "
        f"{start} - {kept} = {shared} {thing}. They are shared by {friends} friends, so each friend gets "
        f"{shared} / {friends} = {each} {thing}. The answer is {each}."
    )
    return request, answer


def _two_people(rng: Random) -> tuple[str, str]:
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    start, more = rng.randint(5, 20), rng.randint(2, 12)
    second = start + more
    total = start + second
    request = (
        f"{name} has {start} {thing}. {other} has {more} more {thing} than {name}. "
        f"How many {thing} do {name} and {other} have together?"
    )
    answer = (
        f"{name} has {start} {thing}. {other} has {more} more, which is {start} + {more} = {second} {thing}. "
        f"Together they have {start} + {second} = {total} {thing}. The answer is {total}."
    )
    return request, answer


def _saving(rng: Random) -> tuple[str, str]:
    name = rng.choice(NAMES)
    weeks, each = rng.randint(2, 9), rng.randint(2, 9)
    saved = weeks * each
    start = rng.randint(2, 12)
    total = start + saved
    request = (
        f"{name} has {start} dollars and saves {each} dollars every week. "
        f"How many dollars does {name} have after {weeks} weeks?"
    )
    answer = (
        f"{name} starts with {start} dollars and saves {each} dollars every week. In {weeks} "
        f"weeks {name} saves "
        f"{weeks} * {each} = {saved} dollars. With the first {start} dollars, {name} has "
        f"{start} + {saved} = {total} dollars. The answer is {total}."
    )
    return request, answer


KINDS = (_gains_and_losses, _holders, _shopping, _sharing, _two_people, _saving)
