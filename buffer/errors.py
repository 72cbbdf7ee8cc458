"""The exceptions of the buffer. Every error is picklable and gives name, value and consequence.

SeamError
├── SchemaVersionError     bytes written by another schema; nothing was decoded
├── CorruptRecordError     bytes that are no record or manifest; nothing was decoded
├── StoreUnavailableError  the store cannot be reached now; nothing was stored, try again
│   └── PersistentStoreError  it can, and writes to a disk what must reach none; nothing was stored
├── VersionConflictError   a publish whose draft_version is not the next one; nothing was published
├── UnknownVersionError    no adapter with that route and draft_version; nothing changed
├── UnknownNameError       no route or replica of that name; nothing changed
└── OrderRefusedError      an operator's order that contradicts another one; nothing changed
"""


class SeamError(Exception):
    """Root of every error that the buffer raises."""


class SchemaVersionError(SeamError):
    """The bytes carry a schema version that this build does not read."""


class CorruptRecordError(SeamError):
    """The bytes are not a record, manifest or status of this project."""


class StoreUnavailableError(SeamError):
    """The store cannot be reached; nothing was stored or changed."""


class PersistentStoreError(StoreUnavailableError):
    """The store writes what it holds to a disk, and was given what must not be; nothing was stored."""


class VersionConflictError(SeamError):
    """A published draft_version must be greater than every earlier one of its route."""


class UnknownVersionError(SeamError):
    """No adapter with this route and draft_version is kept."""


class UnknownNameError(SeamError):
    """No route or replica has the name; the message says which there are."""


class OrderRefusedError(SeamError):
    """An operator's order cannot be followed beside those that stand; the message says what to do first."""
