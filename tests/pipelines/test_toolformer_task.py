"""What a run works on, and what it is refused for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the reference loops train")
pytest.importorskip("transformers", reason="the reference loops train")

from loopguard.errors import DataFileError, UsageError
from loopguard.pipelines.toolformer import ToolformerOptions, parse_plant, prepare
from loopguard.pipelines.toolformer.problems import generate
from loopguard.pipelines.toolformer.settings import GENERATED, GSM8K

pytestmark = pytest.mark.train


def write(path, problems):
    """Generated problems as a file, with their annotations."""
    rows = []
    for problem in problems:
        [place] = problem.places
        answer = f"{place.before}<<{place.call}={place.number}>>{place.after}"
        rows.append(json.dumps({"question": problem.question, "answer": answer}))
    path.write_text("\n".join(rows))
    return path


class TestPrepare:
    def test_without_data_there_are_generated_problems(self):
        task = prepare(ToolformerOptions())
        assert task.settings == GENERATED
        assert len(task.held_out.places) == GENERATED.held_out_places

    def test_with_data_the_sizes_are_those_for_gsm8k(self, tmp_path):
        data = write(tmp_path / "train.jsonl", generate(60, seed=0))
        assert prepare(ToolformerOptions(data=data)).settings == GSM8K

    def test_no_held_out_line_is_trained_on(self):
        task = prepare(ToolformerOptions())
        assert not {line for _, line in task.lines} & set(task.held_out.lines)

    def test_no_place_of_the_warmup_is_read_again(self):
        task = prepare(ToolformerOptions())
        assert not {place.origin for place in task.warmup} & {place.origin for place in task.pool}

    def test_a_test_file_beside_the_data_is_the_held_out_text(self, tmp_path):
        data = write(tmp_path / "train.jsonl", generate(60, seed=0))
        write(tmp_path / "test.jsonl", generate(20, seed=1))
        task = prepare(ToolformerOptions(data=data))
        assert {place.origin.partition(":")[0] for place in task.held_out.places} == {"test.jsonl"}

    def test_without_one_every_tenth_problem_is_held_out(self, tmp_path):
        data = write(tmp_path / "train.jsonl", generate(60, seed=0))
        task = prepare(ToolformerOptions(data=data))
        held_out = {place.origin for place in task.held_out.places}
        assert held_out == {f"train.jsonl:{at}" for at in (1, 11, 21, 31, 41, 51)}
        assert not held_out & {origin for origin, _ in task.lines}

    def test_every_spelling_of_the_held_out_text_is_protected(self, tmp_path):
        data = write(tmp_path / "train.jsonl", generate(60, seed=0))
        evaluation = write(tmp_path / "mine.jsonl", generate(9, seed=1))
        protected = prepare(ToolformerOptions(data=data, eval=evaluation)).protected
        line = generate(9, seed=1)[0].lines[0]
        assert line in protected
        assert any("<<" in text for text in protected)

    def test_another_seed_warms_up_with_other_solutions_and_is_judged_by_the_same(self, tmp_path):
        data = write(tmp_path / "train.jsonl", generate(900, seed=0))
        one, two = (prepare(ToolformerOptions(data=data, seed=seed)) for seed in (0, 1))
        assert one.warmup != two.warmup
        assert one.held_out == two.held_out

    def test_a_model_that_has_learned_before_learns_slower(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        assert prepare(ToolformerOptions(model=tmp_path)).settings.learning_rate < GENERATED.learning_rate


class TestRefusals:
    def test_a_fault_after_the_last_cycle_is_refused(self):
        with pytest.raises(UsageError, match="cycles 1 to 3"):
            prepare(ToolformerOptions(cycles=3, plant=parse_plant("nan@4")))

    def test_data_without_human_calls_are_refused(self, tmp_path):
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(json.dumps({"question": "q", "answer": f"{n}+1={n + 1}"}) for n in range(30)))
        held_out = write(tmp_path / "test.jsonl", generate(20, seed=1))
        with pytest.raises(DataFileError, match="too few annotated solutions"):
            prepare(ToolformerOptions(data=path, eval=held_out))

    def test_held_out_text_that_spells_everything_out_is_refused(self, tmp_path):
        spelled_out = [p for p in generate(60, seed=1) if p.places[0].spelled_out]
        held_out = write(tmp_path / "mine.jsonl", spelled_out)
        with pytest.raises(DataFileError, match="spells out every expression"):
            prepare(ToolformerOptions(eval=held_out))

    def test_a_bad_line_of_the_held_out_file_is_named(self, tmp_path):
        bad = tmp_path / "mine.jsonl"
        bad.write_text("{}")
        with pytest.raises(DataFileError, match=r"mine\.jsonl:1: question is missing"):
            prepare(ToolformerOptions(eval=bad))


def test_facts_tell_two_tasks_apart(tmp_path):
    """What a run directory is bound to: the data's content, the seed, whether it is a control."""
    data = write(tmp_path / "train.jsonl", generate(60, seed=0))
    options = ToolformerOptions(data=data)
    facts = prepare(options).facts
    assert prepare(replace(options, seed=1)).facts != facts
    assert prepare(replace(options, control=True)).facts != facts
    assert prepare(replace(options, cycles=9)).facts == facts
    write(Path(data), generate(61, seed=0))
    assert prepare(options).facts != facts
