"""What is a secret: one rule for all that is written down, printed or sent, wherever a setting comes from."""

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

REMOVED = "[removed]"
WORDS = (r"(?:secret|passwords?|passwd|pwd|passphrase|token|credentials?|"
         r"(?:access|account|api|auth|encryption|private|seal|secret|session|shared|signing)[_-]?(?:access)?[_-]?(?:key|token)|"
         r"bearer|authorization)")
SECRET_NAME = re.compile(rf"(^|_){WORDS}($|_)", re.I)
NO_SECRETS = {"PWD", "OLDPWD"}                          # of the environment: folders
_PROMPTS = {"prompt", "negative_prompt"}                 # they are data, and stay as they are
# Authorization: Basic ..., Cookie: ...: to the end of the line or of the quotation
HEADER = re.compile(r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie)([\"']?\s*[=:]\s*+[\"']?+)(?!\[removed\])[^\n\"']+")
# password=..., "pwd": "...", TOKEN_X: ...
ASSIGNED = re.compile(rf"(?i)({WORDS}(?:s|[_-][\w-]{{0,40}}|\d+|id|key|value|string|hash)?[\"']?\s*[=:]\s*+)"
                      r"(?!\[removed\])(\"[^\"]+\"|'[^']+'|[^\s&'\"]+)")
# --password ..., --api-key ...
FLAG = re.compile(rf"(?i)(?<!\S)(--?[\w-]{{0,40}}{WORDS}(?:s|[_-][\w-]{{0,40}}|\d+)?\s++)(?!\[removed\])(\"[^\"]*\"|'[^']*'|[^\s-]\S*)")
# password hunter2, Bearer ...: not where a sentence goes on
GOES_ON = (r"(?!(?:a|an|and|are|as|at|be|by|can|could|file|for|from|has|have|if|in|is|it|may|must|needed|needs|nor|not|of|on|"
           r"or|that|the|to|token|tokens|was|were|which|will|with)\b)")
SAID = re.compile(rf"(?i)\b((?:passwords?|passwd|pwd|passphrase|bearer)\s++){GOES_ON}(?!\[removed\])[\"']?[^\s\"',;]+")
# token ..., Basic ...: only what looks like one, since both are words of every day
LIKELY = re.compile(r"(?i:\b((?:token|secret|basic|(?<!unknown )key)\s+))[\"']?"
                    r"(?=\S{0,40}\d|\S{0,40}[=+/$!#%^*_]|\S{0,40}[a-z][A-Z]|\S{20})[^\s\"',;.]{6,}")
# of AWS, GitHub, GitLab, Google, npm, Hugging Face, Slack, OpenAI and alike; JSON web tokens; private keys
KEYS = re.compile(r"\b((AKIA|ASIA)[A-Z0-9]{16}|gh[opsru]_\w{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|"
                  r"AIza[\w-]{35}|ya29\.[\w-]{20,}|npm_[A-Za-z0-9]{36}|hf_[A-Za-z0-9]{30,}|xox[abprs]-[\w-]{10,}"
                  r"|sk-[\w-]{30,}|eyJ[\w-]{10,2000}\.[\w-]{10,}\.[\w-]{10,})|-----BEGIN [A-Z ]*PRIVATE KEY-----"
                  r"[^-]*(-----END[A-Z -]*)?")

# of files that hold keys and credentials: what browsers, clouds, SSH and TLS call them
KEY_FILE = re.compile(
    r"(.*[._ -])?(credentials?|secrets?|passw(or)?ds?|passphrases?|tokens?|"
    r"(access|account|api|auth|private|secret|service|signing|ssh)[._ -]?(keys?|tokens?)|rootkey|keyfile|kubeconfig|"
    r"service[._ -]?account|client[._ -]?secrets?|"
    r"id_(rsa|dsa|ecdsa|ed25519)(_sk)?|_?netrc|pgpass|htpasswd|npmrc|pypirc)"
    r"([._ -]?\d+)?( \(\d+\))?(\.\w+)*"
    r"|(service[._ -]?accounts?|client[._ -]?secrets?|credentials)[._ -].*"
    r"|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk|asc|gpg|pgp|ovpn|env|envrc|keytab)(\.\w+)?", re.I)


def names_a_secret(name: str) -> bool:
    """Whether a file or folder of this name holds keys or credentials, as far as names tell."""
    return KEY_FILE.fullmatch(name.lstrip(".")) is not None


def without_secrets(value: Any) -> Any:
    """The same without what must not be written down.

    That is: values whose name says so, passwords and signatures in URLs, keys that their form gives away, what the
    environment calls a secret. What stands under the name of a prompt is left as it is.
    """
    hidden = [said for name, said in os.environ.items()
              if SECRET_NAME.search(name) and name not in NO_SECRETS and len(said) >= 8]

    def clean(value: Any, name: str = "") -> Any:
        if name in _PROMPTS:
            return value
        if isinstance(value, Mapping):
            return {key: clean(inner, name if is_secret(name) else str(key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):            # a command's words: the one behind --token is one
            flags = ["",
                     *(each.lstrip("-") if isinstance(each, str) and each.startswith("-") else "" for each in value)]
            return [clean(inner, flag if is_secret(flag) else name) for flag, inner in zip(flags, value, strict=False)]
        if value is not None and not isinstance(value, (bool, int, float)) and is_secret(name):
            return REMOVED
        if not isinstance(value, str):
            return value
        for secret in hidden:
            value = value.replace(secret, REMOVED)
        value = re.sub(r"\b\w{1,32}://\S+", lambda found: plain_url(found.group()), value)
        value = HEADER.sub(rf"\1\2{REMOVED}", value)
        for rule in (ASSIGNED, FLAG, SAID, LIKELY):
            value = rule.sub(rf"\1{REMOVED}", value)
        return KEYS.sub(REMOVED, value)

    return clean(value)


def is_secret(name: str) -> bool:
    """Of a setting or flag, spelt with underscores, dashes or capitals."""
    return SECRET_NAME.search(re.sub(r"(?<=[a-z])(?=[A-Z])|\W", "_", name)) is not None


def plain_url(url: str) -> str:
    """Without user, password and query, in which presigned URLs carry their signature. A glob's ? is no query."""
    try:
        parts = urlsplit(url)
    except ValueError:                                  # brackets that are no address
        return re.sub(r"://[^/\s]*@", f"://{REMOVED}@", url)
    query = REMOVED if "=" in parts.query else parts.query
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query).geturl()
