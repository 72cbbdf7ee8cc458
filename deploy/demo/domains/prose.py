"""Documentation prose: what the running Python says about its own modules, and its language reference.

Knows nothing of tokens or splits. Modules are read when first drawn, so a stream starts at once.
Invariant: all samples that quote one documented group, or one passage of the reference, share a key.
"""

import re
from random import Random

from deploy.demo.domains.sample import Sample
from deploy.demo.domains.stdlib import Documented, documented, module_names, reference_passages

ANSWER_CHARS = (150, 460)
GROUP = 3
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+")


def sample(rng: Random) -> Sample:
    """One request for prose: describe one thing, describe a few, or continue a passage."""
    kind = rng.random()
    if kind < 0.45:
        return _continuation(rng)
    return _description(rng) if kind < 0.75 else _summaries(rng)


def _continuation(rng: Random) -> Sample:
    passages = reference_passages()
    while True:
        passage = rng.choice(passages)
        words = passage.text.split()
        cut = rng.randint(10, 26)
        tail = clip(" ".join(words[cut:]))
        if len(tail) >= ANSWER_CHARS[0]:
            head = " ".join(words[:cut])
            return Sample(passage.key, f"Continue this passage of the Python documentation: {head}", tail)


def _description(rng: Random) -> Sample:
    while True:
        module, entries = _module(rng)
        index = rng.randrange(len(entries))
        entry = entries[index]
        answer = clip(entry.text)
        if len(answer) >= ANSWER_CHARS[0]:
            request = f"Describe the {entry.kind} `{entry.signature}` of the Python module `{module}`."
            return Sample(f"{module}:{index // GROUP}", request, answer)


def _summaries(rng: Random) -> Sample:
    while True:
        module, entries = _module(rng)
        group = rng.randrange(len(entries)) // GROUP
        chosen = entries[group * GROUP : (group + 1) * GROUP]
        answer = "\n".join(f"`{entry.name}`: {_first_sentence(entry.text)}" for entry in chosen)
        if len(chosen) == GROUP and ANSWER_CHARS[0] <= len(answer) <= ANSWER_CHARS[1]:
            names = [f"`{entry.name}`" for entry in chosen]
            listed = f"{', '.join(names[:-1])} and {names[-1]}"
            request = f"Say in one sentence each what {listed} of the Python module `{module}` are for."
            return Sample(f"{module}:{group}", request, answer)


def _module(rng: Random) -> tuple[str, list[Documented]]:
    names = module_names()
    while True:
        name = rng.choice(names)
        entries = documented(name)
        if rng.random() * 40 < len(entries):
            return name, entries


def _first_sentence(text: str) -> str:
    return _SENTENCE_END.split(text, maxsplit=1)[0]


def clip(text: str, limit: int = ANSWER_CHARS[1]) -> str:
    """The longest run of whole sentences within `limit` characters; empty when the first is longer."""
    kept = ""
    for sentence in _SENTENCE_END.split(text):
        if len(kept) + len(sentence) > limit:
            break
        kept = f"{kept} {sentence}".strip()
    return kept
