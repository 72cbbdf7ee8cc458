"""What can go wrong in starting and looking after everdraft. Every message names value and consequence.

DeployError
├── SettingsError            a setting is unknown, malformed or missing; one line for each fault
├── ModelPairError           target or draft cannot be loaded or do not fit
├── StateFolderInUseError    another everdraft runs with this state folder
├── AdminCallError           the Admin API refused a call, or did not answer
└── ClusterError             Ray, Redis or the endpoint did not start; what had been started was stopped
"""


class DeployError(Exception):
    """Root of every error of this folder; nothing was left running."""


class SettingsError(DeployError, ValueError):
    """A setting that is unknown, malformed or missing; the message names where it was given."""


class ModelPairError(DeployError, ValueError):
    """A model that cannot be served; the message says why and what would work."""


class StateFolderInUseError(DeployError):
    """Another everdraft runs with this state folder."""


class AdminCallError(DeployError):
    """The Admin API refused a call, or did not answer."""


class ClusterError(DeployError):
    """Ray, Redis or the endpoint could not be started."""
