"""The texts of evaluation tasks, which training data must not hold."""

import json

import pytest

from finetune_contract.run_config import QualityConfig
from finetune_trainer.data.decontamination import make_index
from finetune_trainer.data.formats import Conversation, Turn
from finetune_trainer.errors import TrainerError
from finetune_trainer.evaluation.harness import read_texts

QUESTION = "How many boats leave the harbour on a Sunday in winter when the wind blows from the north?"


def test_a_row_that_holds_a_local_task_s_question_is_found(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps({"question": QUESTION, "good": "two", "bad": "nine"}) + "\n")
    (folder / "boats.yaml").write_text(
        "task: boats\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "Q: {{question}}\\nA:"\n'
        'doc_to_choice: "{{[good, bad]}}"\ndoc_to_target: 0\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )

    texts = list(read_texts(["tasks/boats.yaml"], tmp_path))

    assert texts == [f"Q: {QUESTION}\nA:"]
    row = Conversation((Turn("user", f"Tell me: {QUESTION}", "instruction"), Turn("assistant", "Two.", "output")))
    assert make_index(texts, QualityConfig(contamination="flag")).find(row)
    with pytest.raises(TrainerError, match=r"absent\.yaml"):
        list(read_texts(["tasks/absent.yaml"], tmp_path))
