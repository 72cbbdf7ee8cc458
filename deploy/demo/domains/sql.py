"""Questions to SQL over invented tables: the table and a question in, the query and a sentence about it out.

Knows nothing of tokens or splits. Invariant: a query names only columns of the table that the request shows.
"""

from dataclasses import dataclass
from random import Random

from deploy.demo.domains.sample import Sample

CITIES = "Paris London Berlin Madrid Rome Vienna Oslo Lisbon Athens Dublin Prague Warsaw".split()
YEARS = tuple(range(2015, 2025))


@dataclass(frozen=True, slots=True)
class Table:
    """An invented table: text columns to group by, numeric ones to measure."""

    name: str
    labels: tuple[str, ...]
    measures: tuple[str, ...]

    def shown(self, rng: Random) -> str:
        """The table as a request shows it, its columns in random order."""
        columns = [*self.labels, *self.measures, "city", "year"]
        rng.shuffle(columns)
        return f"Table {self.name}(id, {', '.join(columns)})."


TABLES = tuple(
    Table(name, tuple(labels.split()), tuple(measures.split()))
    for name, labels, measures in (
        ("orders", "customer status", "total discount"),
        ("employees", "name department", "salary age"),
        ("products", "name category", "price stock"),
        ("students", "name course", "score age"),
        ("flights", "airline status", "price distance"),
        ("books", "author genre", "pages price"),
        ("invoices", "customer status", "amount tax"),
        ("hotels", "name owner", "rooms price"),
        ("movies", "director genre", "rating budget"),
        ("players", "name team", "goals age"),
        ("sensors", "model status", "voltage reading"),
        ("patients", "name doctor", "weight age"),
        ("shipments", "carrier status", "weight cost"),
        ("tickets", "agent status", "priority cost"),
        ("cars", "brand owner", "price mileage"),
        ("courses", "teacher level", "seats hours"),
    )
)
AGGREGATES = {"average": "AVG", "total": "SUM", "highest": "MAX", "lowest": "MIN"}


def sample(rng: Random) -> Sample:
    """One question with its query."""
    table = rng.choice(TABLES)
    question, query, account = rng.choice(KINDS)(table, rng)
    request = f"{table.shown(rng)} Write a SQL query: {question}"
    return Sample(request, request, f"```sql\n{query}\n```\n{account}")


def _condition(table: Table, rng: Random) -> tuple[str, str]:
    kind = rng.randrange(3)
    if kind == 0:
        city = rng.choice(CITIES)
        return f"city is {city}", f"city = '{city}'"
    if kind == 1:
        year = rng.choice(YEARS)
        return f"year is after {year}", f"year > {year}"
    measure, bound = rng.choice(table.measures), rng.choice((10, 20, 30, 50, 80, 100, 200, 500))
    return f"{measure} is at least {bound}", f"{measure} >= {bound}"


def _aggregate(table: Table, rng: Random) -> tuple[str, str, str]:
    word, measure = rng.choice(list(AGGREGATES)), rng.choice(table.measures)
    said, clause = _condition(table, rng)
    query = f"SELECT {AGGREGATES[word]}({measure}) AS {word}_{measure}\nFROM {table.name}\nWHERE {clause};"
    account = (
        f"The query keeps the rows of {table.name} where {said} and returns the {word} {measure} "
        "of those rows."
    )
    return f"what is the {word} {measure} of the {table.name} where {said}?", query, account


def _grouped(table: Table, rng: Random) -> tuple[str, str, str]:
    word, measure, label = rng.choice(list(AGGREGATES)), rng.choice(table.measures), rng.choice(table.labels)
    query = (
        f"SELECT {label}, {AGGREGATES[word]}({measure}) AS {word}_{measure}\nFROM {table.name}\n"
        f"GROUP BY {label}\nORDER BY {word}_{measure} DESC;"
    )
    account = (
        f"The query groups the rows of {table.name} by {label} and returns the {word} {measure} "
        "of each group."
    )
    return f"what is the {word} {measure} of the {table.name} for each {label}?", query, account


def _listed(table: Table, rng: Random) -> tuple[str, str, str]:
    label, measure = rng.choice(table.labels), rng.choice(table.measures)
    said, clause = _condition(table, rng)
    query = f"SELECT {label}, {measure}\nFROM {table.name}\nWHERE {clause}\nORDER BY {label};"
    account = (
        f"The query keeps the rows of {table.name} where {said} and lists {label} and {measure}, "
        f"sorted by {label}."
    )
    return f"list {label} and {measure} of the {table.name} where {said}, sorted by {label}.", query, account


def _counted(table: Table, rng: Random) -> tuple[str, str, str]:
    label = rng.choice(table.labels)
    said, clause = _condition(table, rng)
    query = f"SELECT {label}, COUNT(*) AS number\nFROM {table.name}\nWHERE {clause}\nGROUP BY {label};"
    account = (
        f"The query keeps the rows of {table.name} where {said}, groups them by {label} and "
        "counts each group."
    )
    return f"how many {table.name} are there for each {label} where {said}?", query, account


def _top(table: Table, rng: Random) -> tuple[str, str, str]:
    label, measure, count = rng.choice(table.labels), rng.choice(table.measures), rng.choice((3, 5, 10, 20))
    query = f"SELECT {label}, {measure}\nFROM {table.name}\nORDER BY {measure} DESC\nLIMIT {count};"
    account = (
        f"The query sorts the rows of {table.name} by {measure}, the highest first, and returns "
        f"the first {count} rows."
    )
    return (
        f"which {count} {table.name} have the highest {measure}? Return {label} and {measure}.",
        query,
        account,
    )


KINDS = (_aggregate, _grouped, _listed, _counted, _top)
