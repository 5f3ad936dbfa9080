"""README.md and README.zh.md say the same, and the documentation names only commands, options, keys and files that exist."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from torch.distributed.run import get_args_parser

from unisono import cli
from unisono.config import recipe as recipes

ROOT = Path(__file__).parents[1]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "README.zh.md", "ARCHITECTURE.md")] + sorted(ROOT.glob("docs/**/*.md"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OUTSIDE = re.compile(r"[a-z]+:")  # https:, mailto:
SWITCH = re.compile(r"\[(English|中文)\]\(README(\.zh)?\.md\)\n+")  # each page links to the other one
COMMENTED = re.compile(r"""((?:"[^"]*"|'[^']*'|[^"'])*?)(?:(?:^|\s+)# .*)?$""")  # a "#" in quotes begins none
TORCHRUN = {"--max-restarts"}  # in prose, about torchrun


@dataclass
class Page:
    """What a page consists of; translations agree in all of it."""

    blocks: list[tuple[str, list[str]]]  # fenced code: language, lines without comments
    sections: list[Section]


@dataclass
class Section:
    """A heading and what follows it, up to the next one. Numbers and `code` in prose are sets: word order is free."""

    level: int
    paragraphs: int = 0
    tables: list[list[int]] = field(default_factory=list)  # cells per row
    links: list[str] = field(default_factory=list)
    code: set[str] = field(default_factory=set)
    numbers: set[str] = field(default_factory=set)


def read_page(text: str) -> Page:
    blocks = [(language, strip_comments(language, code)) for language, code in FENCE.findall(text)]
    sections = [Section(level=0)]
    prose = FENCE.sub("\n\n```\n\n", SWITCH.sub("", text)).strip()  # a block counts as a paragraph where it stands
    for part in re.split(r"\n{2,}|\n(?=#)", prose):
        if heading := re.match(r"(#+) ", part):
            sections.append(Section(level=len(heading[1])))
            continue
        section, words = sections[-1], CODE.sub("", part)
        if part.startswith("|"):
            section.tables.append([row.count("|") - 1 for row in part.splitlines()])
        else:
            section.paragraphs += 1
        # sorted, since a translation may put them in another order
        section.links = sorted([*section.links, *(target for target in LINK.findall(words) if target[0] != "#")])
        section.code |= {normalize(code) for code in CODE.findall(part)}
        words = re.sub(r"\]\([^)\s]+\)", "]", words)
        section.numbers |= set(re.findall(r"\d+(?:[.,:]\d+)*", words))
    return Page(blocks, sections)


def normalize(code: str) -> str:
    return " ".join(code.split())


def strip_comments(language: str, code: str) -> list[str]:
    """Lines of a block without comments. Of a console block only commands have some: what is printed counts as it is."""
    lines = []
    for line in code.splitlines():
        if language in ("python", "toml") or (language == "console" and line.startswith("$ ")):
            code_only = COMMENTED.match(line)
            lines.append(code_only[1] if code_only else line)
        else:
            lines.append(line)
    return lines


def find_commands(text: str) -> list[str]:
    """Every command that a page shows: in console blocks after `$ `, and in `code` within prose."""
    consoles = [code for language, code in FENCE.findall(text) if language == "console"]
    lines = [line[2:].partition(" #")[0] for code in consoles for line in code.splitlines() if line.startswith("$ ")]
    shown = [command for line in lines for command in re.split(r" && | \| ", line)]
    return shown + [normalize(code) for code in CODE.findall(FENCE.sub("\n", text))]


def find_options(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}


def find_missing_commands(text: str) -> list[str]:
    """Sub-commands and options of `unisono`, options of torchrun and targets of `make` that do not exist."""
    root: Any = typer.main.get_command(cli.app)
    known = {name: {o for p in command.params for o in p.opts} for name, command in root.commands.items()}
    everywhere = {option for options in known.values() for option in options}
    at_root = {option for parameter in root.params for option in parameter.opts}
    of_torchrun = set(re.findall(r"--?[a-z][a-z-]*", get_args_parser().format_help()))
    everywhere |= TORCHRUN & of_torchrun
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(\w+)\s*\?=", makefile, re.MULTILINE))
    missing = []
    for command in find_commands(text):
        words = command.split()
        if words[0] == "torchrun":
            script = next((n for n, word in enumerate(words) if word == "-m" or word.endswith(".py")), len(words))
            missing += [f"{command}: {option}" for option in sorted(find_options(words[:script]) - of_torchrun)]
            words = words[script + 1 :]
        if words[:1] == ["unisono"] and len(words) > 1:
            name = "" if words[1].startswith("-") else words[1]
            options = at_root if not name else known.get(name)
            given = find_options(words)
            missing += [command] if options is None else [f"{command}: {o}" for o in sorted(given - options)]
        elif words[:1] == ["make"]:
            names = [word for word in words[1:] if "=" not in word]
            given = {word.partition("=")[0] for word in words[1:] if "=" in word}
            missing += [f"make {name}" for name in names if name not in targets] + sorted(given - variables)
        elif words[:1] and words[0].startswith("--"):
            missing += sorted({words[0].partition("=")[0]} - everywhere)
    return missing


@cache
def read_documented() -> list[dict[str, Any]]:
    return [tomllib.loads(recipes.document(model=kind)) for kind in recipes.MODELS]


def find_missing_keys(text: str, folder: Path) -> list[str]:
    """`section.key` of no recipe, and `--set` that the recipe shown on the page does not accept."""
    (shown,) = [code for language, code in FENCE.findall(text) if language == "toml"]
    recipe = folder / "shown.toml"
    recipe.write_text(shown, encoding="utf-8")
    documented = read_documented()
    missing = []
    for command in find_commands(text):
        for override in re.findall(r"--set (\S+)", command):
            try:
                recipes.load(recipe, (override,))
            except recipes.RecipeError as error:
                missing.append(f"--set {override}: {error}")
        if named := re.match(r"([a-z]+)\.([a-z_]+)(?: = .*)?$", command):
            tables = [table[named[1]] for table in documented if named[1] in table]
            missing += [command] if tables and not any(named[2] in table for table in tables) else []
        if (table := re.match(r"\[([a-z]+)\]", command)) and table[1] not in documented[0]:
            missing.append(command)
    return missing


def find_anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("\n", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find_broken_links(path: Path, text: str) -> list[str]:
    broken = []
    for target in LINK.findall(CODE.sub("", FENCE.sub("\n", text))):
        file, _, anchor = target.partition("#")
        goal = path.parent / file if file else path
        if OUTSIDE.match(target):
            continue
        if not goal.exists() or (anchor and anchor not in find_anchors(goal)):
            broken.append(f"{path.relative_to(ROOT)}: {target}")
    return broken


def test_the_pages_say_the_same() -> None:
    """Fails if something is changed, added or left out in one of the two: code, output, hashes, rows, links, keys, numbers."""
    english, chinese = read_page(ENGLISH), read_page(CHINESE)
    assert len(english.blocks) >= 10 and len(english.sections) >= 10
    assert chinese.blocks == english.blocks
    assert chinese.sections == english.sections
    hashes = [re.findall(r"\b[0-9a-f]{64}\b", text) for text in (ENGLISH, CHINESE)]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("7c85b850", "7c85b851"),
        ("--workers 4 --set", "--workers 3 --set"),
        ("epochs = 5\n", "epochs = 6\n"),
        ("workers=3, epochs=5)", "workers=2, epochs=5)"),
        ("|    0.1% |", "|    0.2% |"),
        ("| `ray` |", "| `array` |"),
        ("11,293", "11,294"),
        ("(docs/tasks.md)", "(docs/data.md)"),
        ("## ", "### "),
        ("`recovery.grace_seconds`", "`recovery.grace`"),
        ("```toml", "```ini"),
    ],
)
def test_a_difference_would_be_found(old: str, new: str) -> None:
    assert old in CHINESE
    assert read_page(CHINESE.replace(old, new, 1)) != read_page(ENGLISH)


def test_a_part_left_out_would_be_found() -> None:
    """Any paragraph, row or block of the Chinese page."""
    parts = [part for part in re.split(r"\n(?=\|)|\n\n", CHINESE) if part.strip() and part != "[English](README.md)"]
    missed = [part for part in parts if read_page(CHINESE.replace(part, "", 1)) == read_page(ENGLISH)]
    assert len(parts) > 60 and missed == []


def test_comments_may_differ_and_nothing_else() -> None:
    assert strip_comments("console", "$ a '#b'  # c d\n# e\n") == ["$ a '#b'", "# e"]
    assert strip_comments("console", "$ a 'b # c'  # d") == ["$ a 'b # c'"]
    assert strip_comments("toml", 'a = "b"   # "c", d\n# e\n') == ['a = "b"', ""]
    assert strip_comments("python", "print(1)  # 一\n") == strip_comments("python", "print(1)  # it's one\n")


def test_the_pages_link_to_each_other() -> None:
    assert CHINESE.startswith("[English](README.md)\n") and "[中文](README.zh.md)" in ENGLISH


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    assert find_broken_links(path, path.read_text(encoding="utf-8")) == []


def test_a_broken_link_would_be_found() -> None:
    text = (
        "[a](docs/none.md) [`b`](docs/tasks.md#none) [c](#none) [d](https://e.org) [e](docs/tasks.md#metrics) `[f](g)`"
    )
    assert [fault.split(": ")[1] for fault in find_broken_links(ROOT / "README.md", text)] == [
        "docs/none.md",
        "docs/tasks.md#none",
        "#none",
    ]


def test_commands_exist() -> None:
    assert len([command for command in find_commands(ENGLISH) if re.match(r"unisono |make |torchrun ", command)]) >= 20
    assert find_missing_commands(ENGLISH) == []


@pytest.mark.parametrize(
    "command",
    [
        "unisono learn a.toml",
        "unisono --verbose",
        "unisono evaluate runs/a --profile",
        "unisono resize RUN -n 2",
        "make tests",
        "make demo WORKER=3",
        "torchrun --nodes 2 -m unisono train RECIPE",
        "torchrun --nnodes 2 -m unisono train RECIPE --folder F",
    ],
)
def test_a_missing_command_would_be_found(command: str) -> None:
    assert len(find_missing_commands(f"```console\n$ {command}  # why\n```\n")) == 1
    assert len(find_missing_commands(f"As `{command}` does.\n")) == 1


def test_keys_exist(tmp_path: Path) -> None:
    """And the recipe that the page shows loads."""
    assert find_missing_keys(ENGLISH, tmp_path) == []


@pytest.mark.parametrize(
    "code",
    [
        "unisono train a.toml --set train.rate=1",
        "--set train.epochs=many",
        "train.microbatch",
        "[recover]",
        "model.kinds",
    ],
)
def test_a_missing_key_would_be_found(code: str, tmp_path: Path) -> None:
    assert len(find_missing_keys(f"{ENGLISH}\n`{code}`\n", tmp_path)) == 1


def test_files_named_in_the_readme_exist() -> None:
    named = [code for code in CODE.findall(ENGLISH) if re.match(r"(examples|benchmarks|tests|docs)/", code)]
    assert len(named) >= 6
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["README.md", "README.zh.md"])
def test_blocks_are_python_and_toml(text: str) -> None:
    blocks = FENCE.findall(text)
    for language, code in blocks:
        if language == "python":
            compile(code, "README", "exec")
        elif language == "toml":
            assert tomllib.loads(code)
    assert {"python", "toml", "console", ""} == {language for language, _ in blocks}
