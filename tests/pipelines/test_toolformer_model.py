"""Tokens, examples, loss and generation."""

import math

import pytest

torch = pytest.importorskip("torch", reason="the reference loops train")
pytest.importorskip("transformers", reason="the reference loops train")

from loopguard.errors import UsageError
from loopguard.pipelines.toolformer import codec as codecs
from loopguard.pipelines.toolformer import model as models
from loopguard.pipelines.toolformer.examples import Examples, completion_of
from loopguard.pipelines.toolformer.problems import generate
from loopguard.pipelines.toolformer.propose import Draft, gains
from loopguard.pipelines.toolformer.settings import GENERATED

pytestmark = pytest.mark.train

LINES = [problem.lines[0] for problem in generate(300, seed=0)]


@pytest.fixture(scope="module")
def codec():
    return codecs.train(LINES, vocabulary=200)


@pytest.fixture(scope="module")
def model(codec):
    torch.manual_seed(0)
    vocabulary = models.Vocabulary(size=len(codec), pad=codec.pad, begin=codec.begin, end=codec.end)
    return models.from_nothing(vocabulary, GENERATED)


@pytest.fixture(scope="module")
def examples(codec):
    return Examples(codec, GENERATED)


class TestCodec:
    @pytest.mark.parametrize("text", [LINES[0], "so 12*4=<<12*4=48>>48 figs.", "a=$ .5 (3-1)"])
    def test_text_comes_back_as_it_was(self, codec, text):
        assert codec.decode(list(codec.encode(text))) == text

    def test_the_marks_of_a_call_are_one_token_each(self, codec):
        assert codec.encode("<<") == (codec.open,)
        assert codec.encode(">>") == (codec.close,)

    def test_digits_stand_alone(self, codec):
        assert len(codec.encode("4711")) == 4

    def test_training_twice_gives_the_same_tokenizer(self, codec):
        assert codecs.train(LINES, vocabulary=200).to_json() == codec.to_json()

    def test_a_call_ends_at_an_equals_sign_and_a_number_at_anything_but_digits(self, codec):
        [equals] = codec.encode("=")
        [digit] = codec.encode("7")
        assert equals in codec.ends_call
        assert digit not in codec.ends_call | codec.ends_number
        assert equals in codec.ends_number


class TestExamples:
    def test_the_result_comes_from_the_tool_and_is_not_learned(self, codec, examples):
        example = examples.call("so 12*4=", completion_of("12*4", "48", "48 figs."))
        learned = [token for token, weight in zip(example.tokens, example.weights, strict=True) if weight == 1.0]
        assert codec.decode(learned) == "<<12*4=>>48 figs."

    def test_only_the_end_of_a_long_prompt_is_seen(self, codec, examples):
        assert len(examples.prompt("figs " * 500)) == 1 + GENERATED.before_length

    def test_a_completion_without_a_call_is_refused(self, examples):
        with pytest.raises(ValueError, match="without a call"):
            examples.call("so 12*4=", "48 figs.")

    def test_an_expression_may_hold_an_equals_sign(self, codec, examples):
        example = examples.call("x", completion_of("a==b", "1", "1"))
        assert "a==b=" in codec.decode(list(example.tokens))


class TestLoss:
    def test_it_is_the_weighted_mean_over_tokens(self, codec, model, examples):
        batch = models.collate([examples.line(line) for line in LINES[:4]], pad=codec.pad)
        with torch.no_grad():
            loss = models.weighted_mean(models.token_losses(models.logits(model, batch), batch), batch)
        assert math.isclose(loss.item(), math.log(len(codec)), rel_tol=0.05)

    def test_padding_changes_no_score(self, codec, model, examples):
        short, long = examples.line("so 1+1=2"), examples.line(LINES[0])
        alone = models.score(model, [short], pad=codec.pad)[0][0]
        beside = models.score(model, [short, long], pad=codec.pad)[0][0]
        assert math.isclose(alone, beside, rel_tol=1e-4)


class TestGenerate:
    def test_prompts_of_different_lengths_are_continued_as_if_alone(self, codec, model, examples):
        prompts = [examples.prompt(line[: 5 + 7 * at]) for at, line in enumerate(LINES[:6])]
        settings = {"pad": codec.pad, "length": 6, "stop": frozenset[int]({codec.end})}
        together = models.generate(model, prompts, **settings)
        assert together == [models.generate(model, [prompt], **settings)[0] for prompt in prompts]

    def test_it_ends_with_the_first_stop_token(self, codec, model, examples):
        everything = frozenset(range(len(codec)))
        rows = models.generate(model, [examples.prompt("so")], pad=codec.pad, length=6, stop=everything)
        assert [len(row) for row in rows] == [1]

    def test_a_forbidden_token_is_never_written(self, codec, model, examples):
        prompts = [examples.prompt(line) for line in LINES[:8]]
        free = models.generate(model, prompts, pad=codec.pad, length=5, stop=frozenset())
        banned = sorted({token for row in free for token in row})
        rows = models.generate(model, prompts, pad=codec.pad, length=5, stop=frozenset(), forbid=banned)
        assert not {token for row in rows for token in row} & set(banned)

    def test_samples_follow_from_the_seed(self, codec, model, examples):
        def sampled(seed):
            torch.manual_seed(seed)
            prompts = [examples.prompt(line) for line in LINES[:8]]
            return models.generate(model, prompts, pad=codec.pad, length=8, stop=frozenset(), temperature=1.0)

        assert sampled(1) == sampled(1)
        assert sampled(1) != sampled(2)


def test_gain_is_against_the_better_of_no_call_and_a_call_without_a_result(codec, model, examples):
    """Toolformer's criterion, put together from single scores."""
    place = generate(1, seed=5)[0].places[0]
    draft = Draft(place=place, prompt=place.before, expression="1+1")

    def mean(expression, result):
        example = examples.following(draft.prompt, expression, result, place.after)
        [(total, weight)] = models.score(model, [example], pad=codec.pad)
        return total / weight

    expected = min(mean(None, ""), mean("1+1", "")) - mean("1+1", place.number)
    assert gains(model, [draft], codec=codec, examples=examples) == [pytest.approx(expected, rel=1e-5)]


class TestPretrained:
    def save(self, folder):
        """A tiny model with a tokenizer that does not know the marks of a call."""
        from tokenizers import Tokenizer, decoders, pre_tokenizers
        from tokenizers.models import BPE
        from tokenizers.trainers import BpeTrainer
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(
            vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator(LINES, trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
        config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=128, eos_token_id=0)
        GPT2LMHeadModel(config).save_pretrained(folder)
        return folder

    def test_a_saved_model_learns_the_marks_of_a_call(self, tmp_path):
        codec, model = models.from_folder(self.save(tmp_path))
        assert codec.encode("<<1+1=2>>")[0] == codec.open
        assert model.get_input_embeddings().num_embeddings >= len(codec)

    def test_a_saved_model_runs_through_the_loop(self, tmp_path, open_guard, small):
        from loopguard.pipelines.toolformer import run

        options, task = small(cycles=1, model=self.save(tmp_path / "gpt2"))
        with open_guard() as guard:
            result = run(guard, options, task=task)
        assert [row["cycle"] for row in result.rows] == [0, 1]

    def test_a_folder_without_a_model_is_refused(self, tmp_path):
        with pytest.raises(UsageError, match=r"--model .*: no config\.json there"):
            models.from_folder(tmp_path)

    def test_a_folder_with_something_else_is_refused(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
        with pytest.raises(UsageError, match="not a causal language model"):
            models.from_folder(tmp_path)
