"""TLS 1.3 with both sides proved, from certificates given by path."""

from __future__ import annotations

import ssl

from pagecore.migrate.address import Terms

__all__ = ["tls_context"]


def tls_context(terms: Terms, *, server: bool) -> ssl.SSLContext:
    """What either side of a link needs to prove itself, and to have the peer proved.

    Parameters
    ----------
    terms : Terms
        With certificates.
    server : bool
        The listening side. It takes whomever the authority vouches for; the other side also wants the name that it
        connects to.

    Raises
    ------
    ValueError
        Naming the file that cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    # A session that is resumed later would not prove anything anew.
    context.options |= ssl.OP_NO_TICKET
    assert terms.tls_cert is not None
    try:
        context.load_cert_chain(terms.tls_cert, terms.tls_key, password=_no_password)
    except (OSError, ValueError) as error:
        raise ValueError(f"{terms.tls_cert}, {terms.tls_key}: {_reason(error)}") from None
    try:
        context.load_verify_locations(terms.tls_ca)
    except (OSError, ValueError) as error:
        raise ValueError(f"{terms.tls_ca}: {_reason(error)}") from None
    return context


def _no_password() -> str:
    # Without this, OpenSSL would ask at the terminal.
    raise ValueError("the key is encrypted; give one that is not, readable by this user alone")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return getattr(error, "strerror", None) or str(error)
