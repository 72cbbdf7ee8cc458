"""Where an experiment finds its models, requests and recorded answers, and keeps what it worked out.

Invariant: everything kept is named by what it follows from (the models' revisions, the asking, the folder's
rows), so another pair or folder never meets it.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path

from benchmarks.osd.corpus import exchanges
from benchmarks.osd.recorded_answers import Asking, RecordedAnswer, recorded_once
from benchmarks.osd.replay import Replay
from serving.models.loading import ModelPair, load_pair

Report = Callable[[str], None]


@dataclass(frozen=True)
class ExperimentCache:
    """Paths alone, so that a process may be given it."""

    target: str
    draft: str
    data: Path
    cache: Path
    asking: Asking = field(default_factory=Asking)
    num_stream: int = 2000
    num_held_out: int = 200

    def pair(self) -> ModelPair:
        """Loaded once a process."""
        return _pair(self.target, self.draft)

    def folder(self) -> Path:
        """Of this target and asking."""
        pair = self.pair()
        named = [pair.target_revision, asdict(self.asking), self.num_stream, self.num_held_out]
        return self.cache / "osd" / sha256(json.dumps(named).encode()).hexdigest()[:16]

    def stream(self, domain: str, temperature: float) -> list[RecordedAnswer]:
        """What the target answered to the domain's streamed requests."""
        return self._recorded(domain, "stream", self.num_stream, temperature)

    def held_out(self, domain: str, temperature: float) -> list[RecordedAnswer]:
        return self._recorded(domain, "heldout", self.num_held_out, temperature)

    def replay(self, num_draft_tokens: int) -> Replay:
        return Replay(self.pair().target_revision, num_draft_tokens)

    def _recorded(self, domain: str, split: str, count: int, temperature: float) -> list[RecordedAnswer]:
        file = self.folder() / "recorded" / f"{domain}-{split}-{temperature:g}.npz"
        return recorded_once(
            file,
            self.pair(),
            lambda: exchanges(self.data, domain, split)[:count],
            temperature,
            self.asking,
        )


@cache
def _pair(target: str, draft: str) -> ModelPair:
    return load_pair(target, draft)
