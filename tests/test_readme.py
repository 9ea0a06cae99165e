"""The README is true: its tree has every file, what it names exists, its task runs, and no path of anybody's machine is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import readme_tree
from tests.person import ROOT, Person
from trainerd.contract import status

README = (ROOT / "README.md").read_text("utf-8")


def test_the_file_tree_is_that_of_the_code() -> None:
    """Every file has its line, made from its own first sentence (`python -m tests.readme_tree` prints them)."""
    assert readme_tree.tree() in README


def test_every_link_leads_somewhere() -> None:
    """Relative links of the README and of docs/ name files that exist."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_of_the_table_exists() -> None:
    """The commands the README names are those of the program."""
    from client.cli import COMMANDS

    table = README.split("| command | what it does |")[1].split("\n\n")[0]
    named = {word for cell in re.findall(r"^\| (.*?) \|", table, re.M) for word in re.findall(r"`([a-z]+)", cell)}
    assert named - {"pip"} == set(COMMANDS) - {"menu", "foreground"}


@pytest.mark.parametrize("document", ["docs/write-a-task.md"])
def test_the_tutorial_task_runs_as_written(document: str, tmp_path: Path) -> None:
    """docs/write-a-task.md: under 60 lines, saved as it is, started as it says, on a table of one's own: completed."""
    code = re.search(r'```python\n(""".*?)```', (ROOT / document).read_text("utf-8"), re.S)
    assert code and len(code[1].splitlines()) < 60
    file, table = tmp_path / "my_task.py", tmp_path / "table.csv"
    file.write_text(code[1], encoding="utf-8")
    table.write_text("a,b,c\n" + "\n".join(f"{i},{i % 7},{2 * i + i % 7}" for i in range(400)), encoding="utf-8")
    person = Person(tmp_path / "home")
    try:
        words = ["--task", f"{file}:MyTask", "--data", str(table), "--epochs", "4", "--set", "settings.hidden=16"]
        done = person.types("start", *words, "--set", "polite.priority=normal", "--wait", timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr + person.log()
        assert person.sees().state == status.COMPLETED
        assert (person.home.run(person.run()).model / "my_task.py").read_text("utf-8") == code[1]
    finally:
        person.leaves()
