"""The whole path on phantoms, and folders that the demo does not write into."""

import hashlib
import json
import shlex

import pytest
from click.testing import CliRunner

from featcache.cli import demo
from featcache.cli.main import cli
from featcache.errors import ConfigError, RunError


def hash_tree(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_whole_path_runs_and_its_advice_works(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NUM_PER_CLASS", 10)
    folder, lines = tmp_path / "a demo", []
    summary = demo.run_demo(folder, device="cpu", say=lines.append)
    facts = json.loads((folder / "run/evaluation/test.json").read_text())
    assert (summary.num_images, summary.num_test) == (20, facts["num_samples"])
    assert summary.accuracy == facts["accuracy"]
    assert (summary.sensitivity, summary.specificity) == (
        facts["sensitivity"],
        facts["specificity"],
    )
    json.dumps(summary.as_dict(), allow_nan=False)

    places = {}
    for path in (folder / "split").rglob("P*"):
        places.setdefault(path.name.split("_")[0], set()).add(path.relative_to(folder).parts[1])
    assert {len(splits) for splits in places.values()} == {1}

    assert not [line for line in lines if "\n" in line]  # the command line would print it as \\n
    assert any(f"accuracy {summary.accuracy:.3f}" in line for line in lines)
    commands = [line for line in lines if line.startswith("  featcache ")]
    assert len(commands) == 2
    for command in commands:
        result = CliRunner().invoke(cli, shlex.split(command)[1:])
        assert result.exit_code == 0, result.output

    # Once more into the same folder: made anew, unless something in it is not the demo's.
    (folder / "raw/covid/stray.png").write_bytes(b"")
    before = hash_tree(folder)
    with pytest.raises(RunError, match=r"found raw/covid/stray\.png"):
        demo.run_demo(folder, device="cpu")
    assert hash_tree(folder) == before
    (folder / "raw/covid/stray.png").unlink()
    again = demo.run_demo(folder, device="cpu")
    assert again.accuracy == summary.accuracy
    assert (folder / "run-linear/run.json").is_file()


@pytest.mark.parametrize("name", ["notes.txt", "demo.json"])
def test_other_peoples_folders_are_refused(tmp_path, name):
    raw = tmp_path / "raw"
    raw.mkdir()
    (tmp_path / name).write_text("{}")
    with pytest.raises(RunError, match="Choose another name"):
        demo.run_demo(tmp_path)
    assert raw.is_dir()
    with pytest.raises(RunError, match="Choose another name"):
        demo.run_demo(tmp_path / name)
    assert (tmp_path / name).read_text() == "{}"


def test_an_unknown_device_costs_nothing(tmp_path):
    with pytest.raises(ConfigError):
        demo.run_demo(tmp_path / "new", device="abacus")
    assert not (tmp_path / "new").exists()
