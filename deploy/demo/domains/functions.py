"""Small Python functions on request: what it shall do in, a documented function out.

Knows nothing of tokens or splits. Invariant: every function parses, and does what its request says.
"""

from random import Random

from deploy.demo.domains.sample import Sample

ITEMS = {
    "numbers": "number",
    "values": "value",
    "scores": "score",
    "prices": "price",
    "ages": "age",
    "lengths": "length",
    "weights": "weight",
    "totals": "total",
    "counts": "count",
    "sizes": "size",
}
WORDS = {
    "words": "word",
    "names": "name",
    "lines": "line",
    "titles": "title",
    "tokens": "token",
    "labels": "label",
    "cities": "city",
    "colors": "color",
    "files": "file",
    "keys": "key",
}
CLASSES = "Invoice Account Book Car Player Ticket Order Product Student Sensor Flight Room".split()
FIELDS = {
    "name": "str",
    "price": "float",
    "count": "int",
    "owner": "str",
    "status": "str",
    "total": "float",
    "year": "int",
    "label": "str",
    "weight": "float",
    "score": "int",
    "city": "str",
    "size": "int",
}


def sample(rng: Random) -> Sample:
    """One function or small class with the request for it."""
    request, source = rng.choice(KINDS)(rng)
    return Sample(request, request, f"```python\n{source}\n```")


def _numeric_test(rng: Random, item: str) -> tuple[str, str, str]:
    bound = rng.choice((0, 1, 5, 10, 20, 50, 100))
    divisor = rng.choice((2, 3, 4, 5, 7, 10))
    return rng.choice(
        (
            ("large", f"greater than {bound}", f"{item} > {bound}"),
            ("small", f"less than {bound}", f"{item} < {bound}"),
            ("divisible", f"divisible by {divisor}", f"{item} % {divisor} == 0"),
            ("equal", f"equal to {bound}", f"{item} == {bound}"),
        )
    )


def _text_test(rng: Random, item: str) -> tuple[str, str, str]:
    letter, bound = rng.choice("abcdehkmprst"), rng.randint(2, 9)
    return rng.choice(
        (
            ("prefixed", f"starting with {letter}", f'{item}.startswith("{letter}")'),
            ("suffixed", f"ending with {letter}", f'{item}.endswith("{letter}")'),
            ("long", f"longer than {bound} characters", f"len({item}) > {bound}"),
            ("containing", f"containing {letter}", f'"{letter}" in {item}'),
        )
    )


def _subject(rng: Random) -> tuple[str, str, str, tuple[str, str, str]]:
    if rng.random() < 0.5:
        many = rng.choice(list(ITEMS))
        return many, ITEMS[many], "int", _numeric_test(rng, ITEMS[many])
    many = rng.choice(list(WORDS))
    return many, WORDS[many], "str", _text_test(rng, WORDS[many])


def _count(rng: Random) -> tuple[str, str]:
    many, one, kind, (adjective, said, test) = _subject(rng)
    request = f"Write a Python function `count_{adjective}_{many}` that counts the {many} {said}."
    source = (
        f"def count_{adjective}_{many}({many}: list[{kind}]) -> int:\n"
        f'    """Return how many {many} are {said}."""\n'
        f"    count = 0\n    for {one} in {many}:\n        if {test}:\n            count += "
        "1\n    return count"
    )
    return request, source


def _keep(rng: Random) -> tuple[str, str]:
    many, one, kind, (adjective, said, test) = _subject(rng)
    request = f"Write a Python function `keep_{adjective}_{many}` that returns a list of the {many} {said}."
    source = (
        f"def keep_{adjective}_{many}({many}: list[{kind}]) -> list[{kind}]:\n"
        f'    """Return a list of the {many} {said}."""\n'
        f"    result = []\n    for {one} in {many}:\n        if {test}:\n            result.append({one})\n"
        f"    return result"
    )
    return request, source


def _find(rng: Random) -> tuple[str, str]:
    many, one, kind, (adjective, said, test) = _subject(rng)
    request = (
        f"Write a Python function `find_{adjective}_{one}` that returns the first of the {many} "
        f"{said}, or None."
    )
    source = (
        f"def find_{adjective}_{one}({many}: list[{kind}]) -> {kind} | None:\n"
        f'    """Return the first of the {many} {said}, or None."""\n'
        f"    for {one} in {many}:\n        if {test}:\n            return {one}\n    return None"
    )
    return request, source


def _check(rng: Random) -> tuple[str, str]:
    many, one, kind, (adjective, said, test) = _subject(rng)
    every = rng.random() < 0.5
    word, quantifier = ("all", "all") if every else ("any", "any of")
    request = (
        f"Write a Python function `{word}_{adjective}_{many}` that says whether {quantifier} the "
        f"{many} are {said}."
    )
    source = (
        f"def {word}_{adjective}_{many}({many}: list[{kind}]) -> bool:\n"
        f'    """Return True if {quantifier} the {many} are {said}."""\n'
        f"    for {one} in {many}:\n        if {'not ' if every else ''}{test}:\n"
        f"            return {not every}\n    return {every}"
    )
    return request, source


def _total(rng: Random) -> tuple[str, str]:
    many = rng.choice(list(ITEMS))
    one = ITEMS[many]
    adjective, said, test = _numeric_test(rng, one)
    request = f"Write a Python function `sum_{adjective}_{many}` that adds up the {many} {said}."
    source = (
        f"def sum_{adjective}_{many}({many}: list[int]) -> int:\n"
        f'    """Return the sum of the {many} {said}."""\n'
        f"    total = 0\n    for {one} in {many}:\n        if {test}:\n            total += "
        f"{one}\n    return total"
    )
    return request, source


def _record(rng: Random) -> tuple[str, str]:
    name, fields = rng.choice(CLASSES), rng.sample(list(FIELDS), 3)
    listed = f"{fields[0]}, {fields[1]} and {fields[2]}"
    body = "".join(f"    {field}: {FIELDS[field]}\n" for field in fields)
    request = f"Write a Python dataclass `{name}` with the fields {listed}, and a method `describe`."
    source = (
        f"@dataclass\nclass {name}:\n"
        f'    """A {name.lower()} with {listed}."""\n\n{body}\n    def describe(self) -> str:\n'
        f'        """Return a short description."""\n'
        f'        return f"{name}: {{self.{fields[0]}}}, {{self.{fields[1]}}}, {{self.{fields[2]}}}"'
    )
    return request, source


KINDS = (_count, _keep, _find, _check, _total, _record)
