"""Fields of a choice that are sent only if the request asks for them, whole or chunk by chunk."""

from serving.api.choices import ChoiceDelta
from serving.api.figures import weight_versions
from serving.api.request_plan import RequestPlan


class ChoiceExtras:
    """Follows the deltas of one answer, in order."""

    def __init__(self, plan: RequestPlan) -> None:
        self._plan = plan
        self._num_tokens = [0] * plan.num_choices

    def of(self, delta: ChoiceDelta) -> dict[str, object]:
        """`token_ids` with every delta, `weight_versions` with the last one of the choice."""
        body = self._plan.body
        extras: dict[str, object] = {}
        self._num_tokens[delta.index] += len(delta.token_ids)
        if body.return_token_ids:
            extras["token_ids"] = list(delta.token_ids)
        if body.return_weight_versions and delta.generation is not None:
            extras["weight_versions"] = weight_versions(delta.generation, self._num_tokens[delta.index])
        return extras
