"""Runs the code of a page of documentation, block after block, in one folder and one namespace.

    python tests/docs_runner.py PAGE FOLDER

Python is executed. Of shell commands arguments are parsed, targets, extras and paths looked up, and those in `RUN` run.
Comments on the lines before a block say what a reader need not see:

    <!-- given: images = torch.rand(1, 3, 64, 64) -->   Python that runs before the block
    <!-- needs: timm -->                                it runs where this package is installed
    <!-- not run: it takes an hour -->                  it is checked, but not run

The folder has `photos/*.jpg` and `data/` (COCO format, 8 + 2 scenes of 128 pixels), which is `DATA` too. There is no
network; for published weights there are random ones, in a cache of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
SHELL = ("", "sh", "bash", "console")
# Programs whose arguments are parsed, and where each has its main().
PROGRAMS = {
    "effdet": "effdet.cli",
    "bench": "bench.__main__",
    "effdet_kernels.verify": "effdet_kernels.verify",
}
RUN = ("detect", "eval", "export", "info", "models", "scenes", "train")
# A run of record in small; of an option that is given twice the last one counts.
SHORT = ["--epochs", "1", "--batch-size", "8", "--size", "128", "--workers", "0", "--quiet"]
COMMENT = re.compile(r"<!-- (given|needs|not run):(.*?)-->\s*", re.DOTALL)
BLOCK = re.compile(
    r"^(?P<comments>(?:<!--(?:(?!-->).)*-->\s*?\n)*)"
    r"(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


class WrongError(Exception):
    """What a page says does not hold."""


@dataclass(frozen=True)
class Block:
    """A fenced block: the line of its fence, its language and text, and what comments before it say."""

    line: int
    language: str
    text: str
    given: str = ""
    needs: str = ""
    not_run: str | None = None

    @property
    def runs(self) -> bool:
        return self.not_run is None and (not self.needs or is_installed(self.needs))


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    for match in BLOCK.finditer(text):
        notes = {kind: note.strip() for kind, note in COMMENT.findall(match["comments"])}
        line = text[: match.start("indent")].count("\n") + 1
        code = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        settings = {kind.replace(" ", "_"): note for kind, note in notes.items()}
        found.append(Block(line, match["language"], code, **settings))
    return found


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands of a shell block as lists of words, without prompts, comments and variables."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while "&&" in words:
            end = words.index("&&")
            yield words[:end]
            words = words[end + 1 :]
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words


@cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser that one of `PROGRAMS` makes."""
    made: list[argparse.ArgumentParser] = []

    def stop(self: argparse.ArgumentParser, *_: object) -> None:
        made.append(self)
        raise InterruptedError

    module = importlib.import_module(PROGRAMS[program])
    with patch.object(argparse.ArgumentParser, "parse_args", stop), suppress(InterruptedError):
        module.main()
    return made[0]


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """The name of the program that a command starts, and its arguments."""
    name = Path(words[0]).name
    if name in ("python", "python3", "torchrun") and "-m" in words:
        at = words.index("-m") + 1
        return words[at], words[at + 1 :]
    return name, words[1:]


def parse(program: str, arguments: list[str]) -> str:
    """What is printed when one of `PROGRAMS` parses these arguments; `WrongError` where it refuses them."""
    printed = StringIO()
    try:
        with redirect_stderr(printed), redirect_stdout(printed):
            parser_of(program).parse_args(arguments)
    except SystemExit as end:
        if end.code:
            raise WrongError(printed.getvalue().strip().splitlines()[-1]) from None
    return printed.getvalue()


def check_command(words: list[str], whole: bool = True) -> None:
    """Raise `WrongError` unless these arguments, targets, extras and paths exist.

    Of a command that is not `whole`, arguments may be missing: `effdet eval --plots`.
    """
    program, arguments = program_of(words)
    if program in PROGRAMS and not whole:
        described = parse(program, [*[a for a in arguments[:1] if a[0] != "-"], "--help"])
        _known("option", [a for a in arguments if a.startswith("--")], described.split())
    elif program in PROGRAMS:
        parse(program, arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        _known("make", [a for a in arguments if "=" not in a], targets)
    elif program == "pip":
        extras = re.search(
            r"^\[project.optional-dependencies\]\n(.*?)\n\n",
            (ROOT / "pyproject.toml").read_text(),
            re.MULTILINE | re.DOTALL,
        )
        wanted = re.findall(
            r"(?:^|\s)(?:\S*/)?(?:effdet-kernels|\.)\[([\w,]+)\]", " ".join(arguments)
        )
        names = re.findall(r"^(\w+) =", extras[1], re.MULTILINE) if extras else []
        _known("extra", [name for group in wanted for name in group.split(",")], names)
        files = [arguments[i + 1] for i, a in enumerate(arguments) if a in ("-c", "-r")]
        _exist(files)
    elif program == "pytest":
        _exist([a.split("::")[0] for a in arguments if "/" in a or a == "tests"])
    else:
        raise WrongError(f"{program}: neither a program that is checked, nor marked as not run")


def _known(what: str, names: list[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise WrongError(f"{what} {name}: there are {', '.join(known)}")


def _exist(files: list[str]) -> None:
    for file in files:
        if not (ROOT / file).exists():
            raise WrongError(f"{file}: no such file")


def run_command(words: list[str]) -> None:
    """Run an `effdet` command that is in `RUN`, training in small; leave out the others."""
    from effdet.cli import main

    program, arguments = program_of(words)
    if program != "effdet" or not arguments or arguments[0] not in RUN:
        return
    short = SHORT if arguments[0] == "train" else []
    if code := main([*arguments, *short]):
        raise WrongError(f"{shlex.join(words)}: exit status {code}")


def run_block(block: Block, page: Path, names: dict[str, object]) -> None:
    """Run a block, or check it if it is not to be run."""
    if block.given:
        exec(block.given, names)
    if block.language == "python":
        code = compile("\n" * block.line + block.text, str(page), "exec")
        if block.runs:
            exec(code, names)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language in SHELL:
        for words in commands_of(block.text):
            try:
                check_command(words)
            except WrongError:
                if block.runs or program_of(words)[0] in ("effdet", "bench", "make", "pip"):
                    raise
            if block.runs:
                run_command(words)
    elif block.language != "text":
        raise WrongError(f"language {block.language}: takes python, json, text, {', '.join(SHELL)}")


def prepare(folder: Path) -> None:
    """Files that pages take for granted, a cache for weights, and no network."""
    from effdet.scenes import draw_scene, generate_scenes

    def refuse(address: object, *_: object, **__: object) -> None:
        raise OSError(f"no network for documentation: {address}")

    socket.create_connection = refuse  # type: ignore[assignment]
    os.environ["TORCH_HOME"] = str(folder / "cache")
    for split, count in (("train", 8), ("val", 2)):
        generate_scenes(folder / "data", count, seed=0, size=128, split=split)
    (folder / "DATA").symlink_to("data")
    (folder / "photos").mkdir()
    for index, name in enumerate(("street", "yard")):
        draw_scene(1, index, 128)[0].save(folder / f"photos/{name}.jpg")
    stand_in_for_weights()


def stand_in_for_weights() -> None:
    """Put random weights into the cache for those of `pretrained=True`, when they are asked for.

    What is published has a hash in its name, which random weights cannot match; so the URLs in the table of models lose
    it. All else is as ever: the name is looked for in torch hub's cache, the file read and loaded.
    """
    import torch

    import effdet
    import effdet.helpers
    from effdet.config.model_config import efficientdet_model_param_dict as models
    from effdet.download import download

    for config in models.values():
        config["url"] = re.sub(r"-[0-9a-f]{8}(?=\.pth$)", "", config["url"])
    model_of = {config["url"]: name for name, config in models.items() if config["url"]}

    def place_and_find(url: str) -> Path:
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        if url in model_of and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            model = effdet.create_model(model_of[url], pretrained_backbone=False)
            torch.save(model.state_dict(), file)
        return download(url)

    effdet.helpers.download = place_and_find


def main() -> int:
    """Run a page; print what is wrong with each block, and return whether anything is."""
    page, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    os.chdir(folder)
    prepare(folder)
    names: dict[str, object] = {"__name__": "__main__"}
    wrong = 0
    for block in blocks_of(page.read_text()):
        try:
            run_block(block, page, names)
        except (Exception, SystemExit) as error:
            wrong += 1
            if not isinstance(error, WrongError):
                traceback.print_exc()
            print(f"{page.name}:{block.line}: {type(error).__name__}: {error}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
