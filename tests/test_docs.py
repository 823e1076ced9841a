"""The documentation holds: its code runs, its links lead somewhere, the files that it names are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .docs_runner import ROOT, WrongError, blocks_of, check_command, commands_of

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("effdet_kernels/ops/*/README.md"))]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(
    r"(effdet|make|pytest|pip|python -m (bench|effdet_kernels\.verify)) (?!.*(COMMAND|[|…])).*"
)
# A path that begins with one of these folders is one of this repository.
FOLDERS = ("bench", "csrc", "docs", "effdet", "effdet_kernels", "tests", ".ci", ".github")


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "docs_runner.py"), str(page), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
    )


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


@PAGE
def test_the_code_runs(page, tmp_path):
    result = run_page(page, tmp_path)
    assert result.returncode == 0, result.stderr[-6000:]


@PAGE
def test_what_is_not_run_says_why(page):
    text = page.read_text()
    blocks = blocks_of(text)
    assert all(block.not_run != "" for block in blocks), "a reason is empty"
    noted = sum((block.not_run is not None) + bool(block.needs) for block in blocks)
    written = re.findall(r"^ *<!-- *(?:needs|not run)", text, re.MULTILINE)
    assert len(written) == noted, "a comment stands before no block"
    fences = re.findall(r"^ *```", text, re.MULTILINE)
    assert len(fences) == 2 * len(blocks), "a fence that opens no block"


@PAGE
def test_commands_in_sentences(page):
    """`effdet train DATA --out RUN` and the like; also parts of commands, as `effdet eval --plots`."""
    for code in filter(PROGRAM.fullmatch, inline_code(page)):
        for words in commands_of(code):
            try:
                check_command(words)
            except WrongError as wrong:
                assert re.search("required|expected one argument", str(wrong)), f"`{code}`: {wrong}"
                check_command(words, whole=False)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: no such heading"


@PAGE
def test_files_that_are_named_exist(page):
    for code in inline_code(page):
        for word in code.replace(
            "bench/results/<machine>/", ""
        ).split():  # there are rows of some only
            path = word.split("::")[0].rstrip(".,:/")
            if "/" in path and path.split("/")[0] in FOLDERS:
                assert any(ROOT.glob(re.sub(r"<\w+>", "*", path))), f"{page.name}: {code}"


WRONG = {
    "```python\nx = 1\n```\n\n```python\nassert x == 2\n```": "AssertionError",
    "```python\nimport urllib.request\nurllib.request.urlopen('http://localhost')\n```": "no network",
    "```ruby\nputs 1\n```": "language ruby",
    '```json\n{"a": }\n```': "JSONDecodeError",
    "```\neffdet detect a.jpg --colour red\n```": "unrecognized arguments: --colour red",
    "```\neffdet eval data --split test\n```": "exit status 1",
    "<!-- not run: no such data -->\n```\neffdet eval --dpi 3 x\n```": "--dpi",
    "```\npython -m bench model --size big\n```": "invalid int value: 'big'",
    "```\nmake coffee\n```": "make coffee",
    '```\npip install ".[timm,nothing]"\n```': "extra nothing",
    "```\npip install -c none.txt .\n```": "none.txt: no such file",
    "```\npytest tests/test_nothing.py -q\n```": "tests/test_nothing.py: no such file",
    "```\nrm -r photos\n```": "rm: neither",
}


def test_what_is_wrong_is_seen(tmp_path):
    page = tmp_path / "wrong.md"
    page.write_text("\n\n".join(WRONG) + "\n")
    (tmp_path / "folder").mkdir()
    result = run_page(page, tmp_path / "folder")
    assert result.returncode == 1
    found = re.findall(r"^wrong\.md:\d+: (.*)$", result.stderr, re.MULTILINE)
    assert len(found) == len(WRONG)
    for line, message in zip(found, WRONG.values(), strict=True):
        assert message in line


def test_what_is_not_run_is_not_run(tmp_path):
    page = tmp_path / "right.md"
    page.write_text(
        "<!-- not run: it would fail -->\n```python\n1 / 0\n```\n\n"
        "<!-- needs: no_such_package -->\n```python\nimport no_such_package\n```\n\n"
        "<!-- given: x = 2 -->\n```python\nassert x == 2\nopen('ran', 'w')\n```\n"
    )
    (tmp_path / "folder").mkdir()
    assert run_page(page, tmp_path / "folder").returncode == 0
    assert (tmp_path / "folder" / "ran").exists()


PLANTED = [
    ("[x](nothing.md)", test_links_lead_somewhere),
    ("# A heading\n[x](#a-head)", test_links_lead_somewhere),
    ("`tests/nothing.py`", test_files_that_are_named_exist),
    ("`effdet/engine/nothing_<op>.py`", test_files_that_are_named_exist),
    ("<!-- not run: -->\n```\nls\n```", test_what_is_not_run_says_why),
    ("<!-- not run: too far from it -->\n\nx\n```\nls\n```", test_what_is_not_run_says_why),
    ("```python\nits end is missing\n", test_what_is_not_run_says_why),
    ("`effdet eval --plotz`", test_commands_in_sentences),
    ("`effdet scenes drawn --count many`", test_commands_in_sentences),
    ('`pip install "effdet-kernels[nothing]"`', test_commands_in_sentences),
]


@pytest.mark.parametrize(("text", "check"), PLANTED, ids=[text[:20] for text, _ in PLANTED])
def test_wrong_sentences_are_seen(text, check, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text + "\n")
    with pytest.raises((AssertionError, WrongError)):
        check(page)
