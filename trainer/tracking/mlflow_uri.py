"""Checks of the address of an MLflow store, and of environment variables that would choose another one."""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, unquote, urlsplit

from trainer.core.errors import UsageError

QUERY_KEYS = {
    "sqlite": {"timeout", "mode", "cache", "immutable", "nolock", "uri", "check_same_thread", "isolation_level"},
    "postgresql": {
        *("host", "hostaddr", "port", "dbname", "service", "passfile", "connect_timeout", "client_encoding", "options"),
        *("application_name", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
        *("sslmode", "sslcert", "sslkey", "sslrootcert", "sslcrl", "ssl", "gssencmode", "channel_binding"),
        *("target_session_attrs", "prepared_statement_cache_size"),
    },
    "mysql": {
        *("charset", "collation", "unix_socket", "local_infile", "read_default_file", "read_default_group"),
        *("connect_timeout", "read_timeout", "write_timeout", "ssl", "ssl_ca", "ssl_capath", "ssl_cert", "ssl_key"),
        *("ssl_cipher", "ssl_mode", "ssl_check_hostname", "ssl_verify_cert", "ssl_verify_identity", "ssl_disabled"),
    },
    "mssql": {
        *("driver", "encrypt", "trustservercertificate", "trusted_connection", "authentication", "applicationintent"),
        *("multisubnetfailover", "mars_connection", "connectretrycount", "connectretryinterval", "longasmax"),
        *("timeout", "login_timeout", "charset", "tds_version", "app", "appname"),
    },
}
"""Keys after ? that an address may have, in lower case, by the kind of database. None of them holds a secret."""
_IGNORED_VARIABLES = {
    "MLFLOW_TRACKING_URI": "tracking.uri=ADDRESS",
    "MLFLOW_REGISTRY_URI": "tracking.uri=ADDRESS",
    "MLFLOW_EXPERIMENT_NAME": "tracking.experiment=NAME",
    "MLFLOW_EXPERIMENT_ID": "tracking.experiment=NAME",
    "MLFLOW_RUN_NAME": "name=TEXT",
    "MLFLOW_RUN_ID": "resume=FOLDER",
}
"""Variables that MLflow's fluent API reads, and what to type instead.

The client reads the others: user name, password, token and certificates of a server (MLFLOW_TRACKING_*), timeouts and
retries (MLFLOW_HTTP_REQUEST_*).
"""
_EXAMPLE = "type tracking.uri=sqlite:///path/to/mlflow.db or tracking.uri=http://host:5000"


def check_uri(uri: str) -> None:
    """Raises errors.UsageError if the URI may hold a password or if MLflow does not support it."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise UsageError(f"tracking.uri is not a valid address; {_EXAMPLE}.") from None
    kind = parts.scheme.partition("+")[0]
    # The messages end up in logs, so they do not repeat the address.
    if parts.password is not None or ":" in unquote(parts.username or "") or (parts.username and "http" in kind):
        raise UsageError(f"tracking.uri holds a password, which would end up in logs and run folders. {_ELSEWHERE}")
    known = QUERY_KEYS.get(kind, set())
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    if parts.fragment or (parts.query and not pairs) or not all(_is_harmless(*pair, known) for pair in pairs):
        allowed = f"the settings {', '.join(sorted(known))} only" if known else "no settings"
        raise UsageError(
            f"tracking.uri may have {allowed} after the question mark: anything else may be a password, which would "
            f"end up in logs and run folders. {_ELSEWHERE}"
        )
    if kind == "sqlite":
        supported = bool(re.match(r"sqlite:///[^?]", uri)) and ":memory:" not in uri
    elif kind in ("http", "https"):
        supported = bool(parts.netloc)
    else:
        supported = bool(uri == "databricks" or re.match(r"(databricks|(postgresql|mysql|mssql)(\+\w+)?)://", uri))
    if not supported:
        # What looks like a path or an address without a user may be repeated.
        shown = f"={uri}" if re.fullmatch(r"[\w./:~ -]*", uri) else ""
        raise UsageError(
            f"tracking.uri{shown} is not an MLflow database or server (MLflow no longer supports folders such as "
            f"./mlruns); {_EXAMPLE}."
        )


_ELSEWHERE = (
    "Leave it out and set the environment variables MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or "
    "MLFLOW_TRACKING_TOKEN) for a server, PGPASSWORD for PostgreSQL, and use a configuration file of the driver for "
    "another database."
)


def ignored_variables() -> str:
    """Returns a sentence about the environment variables that have no effect here; empty if none is set."""
    found = {name: setting for name, setting in _IGNORED_VARIABLES.items() if os.environ.get(name)}
    if not found:
        return ""
    verb = "has" if len(found) == 1 else "have"
    return f"{' and '.join(found)} {verb} no effect: type {' and '.join(dict.fromkeys(found.values()))}."


def _is_harmless(key: str, value: str, known: set[str]) -> bool:
    """Returns whether a setting after the question mark of an address cannot hold a password."""
    # Drivers read further settings from values such as "ODBC Driver 18;PWD=...".
    is_single = ";" not in value and ("=" not in value or key == "options")
    return key.lower() in known and is_single and not re.search(r"pass(word|wd)?\s*=|pwd", value, re.IGNORECASE)
