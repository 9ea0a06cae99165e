"""What a task's export() leaves behind is looked at: a folder that is gone, a link that might lead anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.toy import Toy, config, run
from trainerd.contract.errors import ExportFailed
from trainerd.contract.paths import Home


class Removing(Toy):
    def export(self, model: Any, folder: Path) -> None:
        shutil.rmtree(folder)


class Linking(Toy):
    def export(self, model: Any, folder: Path) -> None:
        (folder / "words.txt").symlink_to("/etc/passwd")


@pytest.mark.parametrize(("task", "said"), [(Removing, "has removed .*models"), (Linking, "has left .*words.txt, which is a link")])
def test_what_export_leaves_is_refused_in_words_and_mended_by_the_next_start(tmp_path: Path, task: type[Toy], said: str) -> None:
    """Named as the task's own doing, at once, with the step that is saved; with export() mended, the result is written."""
    with pytest.raises(ExportFailed, match=f"The task's own export\\(\\) {said}.*All that was trained is saved"):
        run(tmp_path, config({"max_steps": 2}), task=task())
    assert run(tmp_path, config({"max_steps": 2})).outcome == "finished"
    assert Home(tmp_path).run("toy").result.exists()
