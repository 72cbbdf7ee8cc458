"""What an operator may choose, in one frozen, validated tree; every section belongs to its folder.

Knows no file format and no environment variable (see `settings_source`), and starts nothing.
Invariant: an unknown key is an error, never a silent default.
"""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from learner.settings import LearnerSettings
from serving.log_lines import LogFormat
from serving.settings import ServingSettings


class RedisSettings(BaseModel):
    """Where records and adapters are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(default=None, repr=False)
    """`redis://`, `rediss://` or `unix://`, with its password; None starts a server of our own."""
    memory_url: str | None = Field(default=None, repr=False)
    """Another server, which persists nothing, for records of capture mode `memory`; None starts one of our
    own where a mode is `memory`."""

    @model_validator(mode="after")
    def _are_two(self) -> Self:
        if self.memory_url is not None and self.memory_url == self.url:
            raise ValueError("memory_url is that of url, whose records outlive it; give another server")
        return self


class MlflowSettings(BaseModel):
    """Where runs, adapters and versions are logged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    """False: no run is tracked; the learner learns all the same."""
    tracking_uri: str | None = Field(default=None, repr=False)
    """May hold a password. None: SQLite in the state folder, artifacts beside it."""


class ClusterSettings(BaseModel):
    """The processes: Ray, the HTTP endpoint, and the folder that outlives them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ray_address: str | None = None
    """A running Ray (`auto`, `host:port`); None starts one of our own on loopback."""
    namespace: str = "everdraft"
    """Of named actors in Ray."""
    host: str = "127.0.0.1"
    """Where the endpoint listens; another address than loopback opens it to the network."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Of the endpoint."""
    state_dir: Path = Path(".everdraft")
    """Checkpoints, MLflow's database, and the note that tells `status` and `drafts` what runs. One service
    and one learner at a time may use it."""
    object_store_bytes: int = Field(default=80 * 2**20, ge=80 * 2**20)
    """Shared memory of a Ray of our own; no tensors travel through it."""
    num_gpus_per_replica: float = Field(default=0.0, ge=0)
    """What each replica asks Ray for; Ray shows a replica no GPU that it did not ask for. 0 on a
    processor."""
    learn: bool = True
    """Whether a learner runs beside the replicas."""
    log_format: LogFormat = "text"
    """`json`: `everdraft serve` and `learn` write one JSON object a line to standard error, of replicas and
    learner, too, with a line for each request. No line holds text of users."""


class Settings(BaseModel):
    """Everything, by section. `serving.target` is the one value without a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    serving: ServingSettings
    learner: LearnerSettings = LearnerSettings()
    redis: RedisSettings = RedisSettings()
    mlflow: MlflowSettings = MlflowSettings()
    cluster: ClusterSettings = ClusterSettings()

    @field_validator("learner")
    @classmethod
    def _one_name_for_tracking(cls, learner: LearnerSettings) -> LearnerSettings:
        if learner.tracking_uri:
            raise ValueError("tracking_uri is set by mlflow.tracking_uri")
        return learner

    @property
    def state_dir(self) -> Path:
        """Absolute, so that processes with another working directory agree on it."""
        return self.cluster.state_dir.expanduser().resolve()

    @property
    def tracking_uri(self) -> str:
        """Where MLflow keeps runs; empty when it is switched off. SQLite paths are absolute."""
        if not self.mlflow.enabled:
            return ""
        return self.mlflow.tracking_uri or f"sqlite:///{self.state_dir / 'mlflow' / 'mlflow.db'}"
