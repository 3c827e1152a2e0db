"""What is a secret: one rule for all that is written down, printed or sent, wherever a setting comes from."""

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

REMOVED = "[removed]"
SECRET_NAME = re.compile(r"(^|_)(secret|password|passwd|token|credentials?|(access|api|private|seal)_key)($|_)", re.I)
ASSIGNED = re.compile(r"(?i)\b([\w-]*(?:secret|passwor?d|passwd|token|credential|access[_-]?key|api[_-]?key|account[_-]?key|private[_-]?key)"
                      r"[\w-]*\s*[=:]\s*)([^\s&'\"]{4,})")
# of AWS, GitHub, GitLab, Google, npm, Hugging Face, Slack, OpenAI and alike; JSON web tokens; private keys
KEYS = re.compile(r"\b((AKIA|ASIA)[A-Z0-9]{16}|gh[opsru]_\w{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|"
                  r"AIza[\w-]{35}|ya29\.[\w-]{20,}|npm_[A-Za-z0-9]{36}|hf_[A-Za-z0-9]{30,}|xox[abprs]-[\w-]{10,}"
                  r"|sk-[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(-----END[A-Z -]*)?")

# of files that hold keys and credentials: what browsers, clouds, SSH and TLS call them
KEY_FILE = re.compile(
    r"(.*[._ -])?(credentials?|secrets?|passw(or)?ds?|passphrases?|tokens?|"
    r"(access|account|api|auth|private|secret|service|signing|ssh)[._ -]?(keys?|tokens?)|rootkey|keyfile|kubeconfig|"
    r"service[._ -]?account|client[._ -]?secrets?|id_(rsa|dsa|ecdsa|ed25519)(_sk)?|_?netrc|pgpass|htpasswd|npmrc|pypirc)"
    r"([._ -]?\d+)?( \(\d+\))?(\.\w+)*"
    r"|(service[._ -]?accounts?|client[._ -]?secrets?|credentials)[._ -].*"
    r"|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk|asc|gpg|pgp|ovpn|env|envrc|keytab)(\.\w+)?", re.I)


def names_a_secret(name: str) -> bool:
    """Whether a file or folder of this name holds keys or credentials, as far as names tell."""
    return KEY_FILE.fullmatch(name.lstrip(".")) is not None


def without_secrets(value: Any) -> Any:
    """The same without what must not be written down.

    That is: values whose name says so, passwords and signatures in URLs, keys that their form gives away, what the
    environment calls a secret.
    """
    hidden = [said for name, said in os.environ.items() if SECRET_NAME.search(name) and len(said) >= 8]

    def clean(value: Any, name: str = "") -> Any:
        if isinstance(value, Mapping):
            return {key: clean(inner, str(key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(inner, name) for inner in value]
        if value is not None and not isinstance(value, (bool, int, float)) and SECRET_NAME.search(name):
            return REMOVED
        if not isinstance(value, str):
            return value
        for secret in hidden:
            value = value.replace(secret, REMOVED)
        value = re.sub(r"\w+://\S+", lambda found: plain_url(found.group()), value)
        return KEYS.sub(REMOVED, ASSIGNED.sub(rf"\1{REMOVED}", value))

    return clean(value)


def plain_url(url: str) -> str:
    """Without user, password and query, in which presigned URLs carry their signature. A glob's ? is no query."""
    try:
        parts = urlsplit(url)
    except ValueError:                                  # brackets that are no address
        return re.sub(r"://[^/\s]*@", f"://{REMOVED}@", url)
    query = REMOVED if "=" in parts.query else parts.query
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query).geturl()
