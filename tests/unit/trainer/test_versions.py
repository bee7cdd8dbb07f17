"""Records are written where our package is not installed as one: in the image its source lies on the path."""

import json
import subprocess
import sys

from tests.support.manifests import REPOSITORY

PROGRAM = """
import importlib.metadata, sys
importlib.metadata.MetadataPathFinder.find_distributions = classmethod(lambda *_: iter(()))
sys.path.insert(0, sys.argv.pop(1))
from finetune_trainer.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_data_is_prepared_where_no_package_is_installed(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "Say hello.", "output": "Hello."}) + "\n")
    words = (str(REPOSITORY / "operator/src"), "prepare", "--source", str(rows), "--out", str(tmp_path / "out"))
    subprocess.run((sys.executable, "-c", PROGRAM, *words), check=True, capture_output=True)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["versions"] == {"finetune-operator": ""}
