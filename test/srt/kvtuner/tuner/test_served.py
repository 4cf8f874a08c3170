"""What is taken from the tasks that a server answers."""

from sglang.srt.kvtuner.tuner.served import shares_of_right_answers


def test_filters_of_a_task_are_told_apart():
    found = shares_of_right_answers(
        {
            "sums": {
                "alias": "sums",
                "exact_match,strict": 0.25,
                "exact_match,loose": 0.5,
                "exact_match_stderr,loose": 0.1,
            },
            "quiz": {"acc,none": 1.0, "acc_stderr,none": "N/A"},
        }
    )
    assert found == {"sums exact_match (strict)": 0.25, "sums exact_match (loose)": 0.5, "quiz acc": 1.0}
