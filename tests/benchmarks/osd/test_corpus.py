"""Real requests by domain: splits never meet, and a folder that lacks rows is named before anything runs."""

import json
from pathlib import Path

import pytest

from benchmarks.osd.corpus import CorpusError, check_domains, exchanges, split_of
from tests.benchmarks.osd.rows import write_rows


def test_no_prompt_is_in_two_splits_and_every_prompt_is_in_one(tmp_path: Path) -> None:
    write_rows(tmp_path, 300)
    splits = {split: {row.question for row in exchanges(tmp_path, "gsm8k", split)} for split in SPLITS}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == 300
    assert all(split_of(question) == split for split, questions in splits.items() for question in questions)
    assert len(splits["train"]) > len(splits["stream"]) > len(splits["heldout"]) > 0


SPLITS = ("train", "stream", "heldout")


def test_a_prompt_that_stands_twice_is_streamed_once(tmp_path: Path) -> None:
    row = {"prompt": "How many?", "response": "Two."}
    file = tmp_path / "gsm8k" / "train.jsonl"
    file.parent.mkdir()
    file.write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    assert sum(len(exchanges(tmp_path, "gsm8k", split)) for split in SPLITS) == 1


def test_a_line_separator_inside_an_answer_does_not_end_its_row(tmp_path: Path) -> None:
    row = {"prompt": "How many?", "response": "One\u2028two."}
    file = tmp_path / "gsm8k" / "train.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (found,) = [row for split in SPLITS for row in exchanges(tmp_path, "gsm8k", split)]
    assert found.answer == "One\u2028two."


def test_a_folder_without_a_domains_rows_and_an_unknown_domain_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"lacks spider/train.jsonl .* nothing was measured"):
        check_domains(tmp_path, ["spider"])
    with pytest.raises(CorpusError, match=r"domain='poetry' is none of gsm8k, spider, python, chat"):
        check_domains(tmp_path, ["poetry"])
