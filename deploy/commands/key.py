"""`everdraft key new`: a key for a tenant, and the digest by which the settings know it."""

import secrets
from typing import Annotated

import typer

from deploy.commands.console import errors, fail, output

app = typer.Typer(help="Keys of tenants.", no_args_is_help=True)

_PREFIX = "sk-everdraft-"
_SECRET_BYTES = 32


@app.command()
def new(
    name: Annotated[str, typer.Option("--name", help="The tenant's name; letters, digits, _ . and -.")],
) -> None:
    """Make a key. It is shown this once and kept nowhere; the settings need its digest alone."""
    from pydantic import ValidationError

    from serving.tenants import Tenant, digest_of

    key = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    try:
        tenant = Tenant(name=name, keys=(digest_of(key),))
    except ValidationError:
        fail(f"--name {name!r} must be 1 to 64 letters, digits, '_', '.' or '-'; no key was made")
    errors().print("The tenant's key, shown this once:")
    output().print(key)
    errors().print("For the settings file:")
    for line in ("[[serving.tenants]]", f'name = "{tenant.name}"', f'keys = ["{tenant.keys[0]}"]'):
        output().print(line)
