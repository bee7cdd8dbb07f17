"""What is known of a training whose ranks were killed."""

import os

from finetune_trainer.training.ledger import WorkLedger


def test_what_a_forked_rank_notes_outlives_it():
    ledger = WorkLedger()
    pid = os.fork()
    if pid == 0:
        ledger.begin(4, 8.0)
        ledger.note(5, 10.5)
        os._exit(0)
    os.waitpid(pid, 0)

    assert ledger.to_details() == {"step": 5, "steps_lost": 0, "productive_seconds": 10.5}


def test_each_restart_in_the_pod_adds_the_steps_it_threw_away():
    ledger = WorkLedger()
    for start, end in ((0, 9), (8, 8), (8, 12), (4, 5)):
        ledger.begin(start, float(start))
        for step in range(start + 1, end + 1):
            ledger.note(step, float(step))

    # 9 to 8, none, 12 to 4.
    assert ledger.to_details() == {"step": 5, "steps_lost": 9, "productive_seconds": 5.0}


def test_a_pod_whose_training_never_began_reports_no_work():
    assert WorkLedger().to_details() == {}
