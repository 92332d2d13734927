"""The exceptions for what a user can mend, and how a program ends on them."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

from ..spoken.catalogue import translated
from ..spoken.language import in_words
from .console import tell
from .words import one_line, short

# What gloo says where the process at the other end of a connection has ended.
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer")
LONGEST_SENTENCE = 4000  # letters
PANIC = "PanicException"  # of a library written in Rust; no `Exception`, so that nobody goes on behind it
PATIENCE = 10.0  # seconds; the launcher looks ten times in one, so it has long seen the first failure
TOLD_TO_END = "SIGTERM came before."  # a note on an error of a process that the launcher has already told to end

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


class UserError(ValueError):
    """Something the user gave is wrong: a recipe, a row, an image, a folder, a bundle.

    The message is one sentence that says what is wrong, where (file, row, key) and how to mend it. The command line
    prints it without a traceback and exits with code 2. Mistakes of the program itself are `assert`s, never this.
    """


class RowError(UserError):
    """One row of a source is wrong and the rows around it are not.

    Whoever reads rows may record it and go on, instead of stopping; a plain `UserError` is about the whole source.

    Attributes:
        where: the row's place in words, such as ``captions.jsonl, line 3``.
        reason: a few fixed words to count by, such as ``marks differ``; never text of the row.
    """

    # Keywords with defaults, because torch raises an error of a worker again from its message alone.
    def __init__(self, message: str, *, where: str = "", reason: str = "other") -> None:
        super().__init__(message)
        self.where, self.reason = where, reason


def row_error(where: str, what: str, mend: str, reason: str) -> RowError:
    """The error of one row: where it is, what is wrong with it, how to mend it, and the words to count it by."""
    return RowError(f"{where and where + ': '}{what}: {mend}.", where=where, reason=reason)


def raise_it(error: RowError) -> None:
    """What is done with a wrong row unless the caller knows better: the run stops on it."""
    raise error


@contextmanager
def refused_by_library(sentence: str) -> Iterator[None]:
    """Turns whatever a library raises over what stands in somebody's file into one sentence.

    A number where a text belongs meets a library anywhere: it raises what that line happens to raise.

    Args:
        sentence: What is said, without its full stop; the library's words follow in brackets.

    Raises:
        UserError: In place of any exception but those of memory, our own assertions, and a `UserError`.
    """
    try:
        yield
    except (UserError, MemoryError, AssertionError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            raise
        said = one_line(error)[:300]
        words = said if said and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {said}"
        raise UserError(f"{sentence} ({words}).") from error


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the program with exit code 2 and one line on stderr, without a traceback, when a `UserError` is raised.

    Processes of one launch that find the same mistake say it once, and a process that only lost its peer says so in one
    line: the peer's own message tells what went wrong.

    Raises:
        SystemExit: with code 2 in place of the `UserError`; with code 1 where a peer is gone.
    """
    rank = os.environ.get("RANK", "0")
    # Other processes name themselves, because what goes wrong in one row goes wrong in one process only.
    process = "" if rank == "0" else in_words(f" (process {rank})", f"（进程 {rank}）")
    try:
        yield
    except Exception as error:
        sentence = sentence_of(error) if isinstance(error, UserError) else _of_the_disk(error)
        if sentence is not None:
            if first_to_say(sentence):
                tell(in_words(f"error{process}: ", f"错误{process}：") + translated(sentence), stderr=True)
            raise SystemExit(2) from None
        if not (isinstance(error, RuntimeError) and any(words in str(error) for words in PEER_IS_GONE)):
            raise
        tell(f"process {rank} stops: another process ended, and its own message says why.", stderr=True)
        if TOLD_TO_END not in getattr(error, "__notes__", ()):
            # The launcher ends this process once it has seen the other fail first, and reports that one as the cause.
            time.sleep(PATIENCE)
        raise SystemExit(1) from None
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        tell(f"error{process}: a library cannot read what it was given ({one_line(error)[:300]}).", stderr=True)
        raise SystemExit(2) from None


def first_to_say(sentence: str) -> bool:
    """Whether no other process of this launch, on this machine, has said it; without torch's launcher, always."""
    # …/attempt_0/<local rank>/error.json: what lies two above is shared by the processes of this machine.
    given = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not given:
        return True
    try:
        os.close(os.open(Path(given).parent.parent / f"said-{crc32(sentence.encode())}", os.O_CREAT | os.O_EXCL))
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True


def _of_the_disk(error: Exception) -> str | None:
    """The sentence for a disk that is full, a place that may not be written or a path that is none; else None."""
    found = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors and tokenizers say it
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if number in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR):
        name = getattr(error, "filename", None) or "What was given"
        return f"{short(str(name))!r} leads to no file ({os.strerror(number)}): give another path."
    if link := _leading_nowhere(error):
        return f"{short(link)!r} is a link that leads nowhere: make what it leads to, or give another path."
    if number is None or not (full or number in (errno.EROFS, errno.EACCES, errno.EPERM)):
        return None
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)  # of a copy, what was to be written
    what = f"{repr(str(name)) if name else 'A file'} cannot be {'written' if full else 'used'} ({os.strerror(number)})"
    return f"{what}: {'make room' if full else 'change its permissions'}, or choose another place; then begin again."


def _leading_nowhere(error: Exception) -> str | None:
    """The link without a target on the way to what an error is about, which the system calls there and not there."""
    if not isinstance(error, FileNotFoundError | FileExistsError) or not isinstance(error.filename, str):
        return None
    links = (str(place) for place in (Path(error.filename), *Path(error.filename).parents) if place.is_symlink())
    return next((link for link in links if not os.path.exists(link)), None)


def sentence_of(error: UserError) -> str:
    """The sentence of an error on one line, without the traceback in which a data-loader worker of torch wraps it."""
    text = str(error)
    if "\nOriginal Traceback (most recent call last):" in text:
        text = text.rpartition(f".{type(error).__name__}: ")[2]
    text = without_tokens(" ".join(line.strip() for line in text.strip().splitlines()))
    # A stranger's name may be as long as its file.
    return text if len(text) <= LONGEST_SENTENCE else f"{text[: LONGEST_SENTENCE - 1000]} … {text[-900:]}"


def without_tokens(text: str) -> str:
    """A text without tokens, passwords and keys, to be shown to anyone."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name):
            text = text.replace(token, "hf_…")
    text = TOKEN.sub("hf_…", text)
    for secret in sorted({found for _, found in find_secrets([text])}, key=len, reverse=True):
        text = re.sub(rf"{re.escape(secret)}[\w+/=-]*", "…", text)  # some rules see the beginning alone
    return text


# Names of environment variables whose values nobody is to see; `PATH`, `PWD` and `SSH_AUTH_SOCK` hold no secrets.
SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|PRIVATE|BEARER|WEBHOOK|(?:KEY|PASS|JWT|SALT)$"
    r"|(?:^|_)(?:KEY|PASS|PWD|PAT|AUTH|DSN|COOKIE|JWT)(?:$|_(?!SOCK|ID$))",
    re.IGNORECASE,
)
SHORTEST_SECRET, LONGEST_WORD = 8, 12  # letters
# Rules of detect-secrets that know the form of a key. Those that only see long random texts take fingerprints for keys.
_RULES = (
    *("artifactory", "aws", "azure_storage_key", "basic_auth", "cloudant", "discord", "github_token", "gitlab_token"),
    *("ibm_cloud_iam", "ibm_cos_hmac", "jwt", "mailchimp", "npm", "openai", "private_key", "pypi_token", "sendgrid"),
    *("slack", "softlayer", "square_oauth", "stripe", "telegram_token", "twilio"),
)
_PIECE, _OVERLAP = 4000, 500  # letters that a rule sees at a time: on long lines some take quadratic time
# What every such key has in it. The rules take half a second to import, and most texts can do without.
_MAY_BE_KEY = re.compile(r"[A-Za-z0-9_+/=-]{20,}|://[^\s/@]+:[^\s/@]+@|PRIVATE KEY|xox|_authToken")
_OWN_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgithub_pat_\w{20,}|\bsk-[\w-]{20,}|\bAIza[\w-]{35}|\bnpm_[A-Za-z0-9]{36}"
    r"|\bgsk_[A-Za-z0-9]{40,}|\br8_[A-Za-z0-9]{37,}|\bdo[opr]_v1_[0-9a-f]{64}|\bxai-[A-Za-z0-9]{40,}|\b[rs]k_live_\w{20,}"
)


def find_secrets(texts: Iterable[str], words: bool = False, forms: bool = True) -> Iterator[tuple[str, str]]:
    """(what it is, the secret itself) of every token, password and key in texts.

    A secret is the value of an environment variable that is named like one, or holds a password in an address; or has a
    form that detect-secrets knows.

    Args:
        texts: Where to look.
        words: They are vocabularies, in which `API_KEY=password` makes no secret of a word that each of them has.
        forms: Look for the forms of keys too, which what is no text may have by chance.
    """
    own = {name: value for name, value in os.environ.items() if _is_secret(name, value)}
    if words:
        own = {name: value for name, value in own.items() if not (value.isalpha() and len(value) <= LONGEST_WORD)}
    for text in texts:
        yield from ((f"the value of the environment variable {name}", v) for name, v in own.items() if v in text)
        if not forms:
            continue
        yield from (("what looks like a token or key", found) for found in _OWN_FORMS.findall(text))
        for line in text.splitlines() if _MAY_BE_KEY.search(text) else ():
            for start in range(0, len(line), _PIECE - _OVERLAP):
                piece = line[start : start + _PIECE]
                if _MAY_BE_KEY.search(piece):
                    found = ((rule.secret_type, secret) for rule in _rules() for secret in rule.analyze_string(piece))
                    yield from ((f"what looks like a key ({kind})", secret) for kind, secret in found if secret)


def _is_secret(name: str, value: str) -> bool:
    if len(value) < SHORTEST_SECRET or value.startswith("~/"):  # a file in which a secret lies is none
        return False
    top = f"/{value[1:].partition('/')[0]}" if value.startswith("/") else ""  # a key of AWS may begin so too
    if top and (os.path.exists(top) or name.upper().endswith(("FILE", "FILES", "PATH", "DIR"))):
        return False
    return SECRET_NAME.search(name) is not None or re.search(r"://[^\s/@]*:[^\s/@]+@", value) is not None


@cache
def _rules() -> list[Any]:
    from importlib import import_module

    from detect_secrets.plugins.base import BasePlugin

    modules = {f"detect_secrets.plugins.{name}" for name in _RULES}
    found = {each for module in modules for each in vars(import_module(module)).values() if isinstance(each, type)}
    rules = [kind for kind in found if issubclass(kind, BasePlugin) and kind.__module__ in modules]
    return [rule() for rule in sorted(rules, key=lambda rule: rule.__name__)]
