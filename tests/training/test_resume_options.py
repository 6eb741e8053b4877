"""A resume notices other options, data and processes, says what changed, and takes what is accepted."""

import json

import pytest
from helpers.small_run import SmallBatches, same_bits, small_train_state
from PIL import Image

from diffadapt.data.examples import Example, OrderedExamples, ShuffledOrder
from diffadapt.training.checkpoint import checkpoint_io
from diffadapt.training.checkpoint.data_record import data_changes, data_record
from diffadapt.training.checkpoint.resume_options import ResumeFacts, check_resumable
from diffadapt.training.loop import train


def record(folder, captions, classes=None):
    """The data record of images of one colour each: name -> (colour, caption)."""
    folder.mkdir(exist_ok=True)
    examples = []
    for name, (colour, caption) in captions.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), colour).save(path, "bmp")  # files of one size
        examples.append(Example(path, caption))
    order = OrderedExamples(examples, (), ShuffledOrder(len(examples), 0, 0))
    return json.loads(json.dumps(data_record(order, classes)))


TWO = {"a.bmp": ("red", "a disc"), "b.bmp": ("blue", "a disc")}


def test_equal_data_in_another_place_are_no_change(tmp_path):
    first, second = record(tmp_path / "one", TWO), record(tmp_path / "two", TWO)
    assert data_changes(first, second) == []


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({**TWO, "c.bmp": ("red", "a disc")}, "images added: c.bmp"),
        ({"a.bmp": TWO["a.bmp"]}, "images removed: b.bmp"),
        ({**TWO, "b.bmp": ("green", "a disc")}, "images with other content: b.bmp"),
        ({**TWO, "b.bmp": ("blue", "a ring")}, "images with another caption: b.bmp"),
        (dict(reversed(TWO.items())), "the images are in another order"),
    ],
)
def test_what_changed_is_named(tmp_path, now, line):
    assert data_changes(record(tmp_path / "one", TWO), record(tmp_path / "two", now)) == [line]


def test_a_label_that_means_another_class_is_named(tmp_path):
    before = record(
        tmp_path / "one", {"bee/1.bmp": ("red", 0), "cow/1.bmp": ("blue", 1)}, {0: "bee", 1: "cow"}
    )
    more = {"ant/1.bmp": ("green", 0), "bee/1.bmp": ("red", 1), "cow/1.bmp": ("blue", 2)}
    now = record(tmp_path / "two", more, {0: "ant", 1: "bee", 2: "cow"})
    assert data_changes(before, now)[:3] == [
        "class 'ant' is new, with label 0",
        "class 'bee' had label 0 then, has 1 now",
        "class 'cow' had label 1 then, has 2 now",
    ]


OPTIONS = {"lr_scheduler": "cosine", "learning_rate": 1.0, "train_data_dir": "x", "accept_changes": None}


def facts(*, processes=1, data=None, **options):
    return ResumeFacts({**OPTIONS, **options}, data or {}, processes)


def test_changes_are_refused_with_the_option_that_accepts_them(tmp_path):
    with pytest.raises(ValueError, match=r"--accept_changes learning_rate,processes") as error:
        check_resumable(facts(), facts(learning_rate=0.5, processes=2), tmp_path)
    assert "learning_rate: 1.0 then, 0.5 now" in str(error.value)
    assert "processes: 1 then, 2 now" in str(error.value)
    now = facts(learning_rate=0.5, processes=2, accept_changes="learning_rate, processes")
    assert check_resumable(facts(), now, tmp_path) == {"learning_rate", "processes"}


def test_other_data_are_accepted_by_name_and_a_moved_folder_needs_no_word(tmp_path):
    one = record(tmp_path / "one", TWO)
    other = record(tmp_path / "two", {**TWO, "b.bmp": ("green", "a disc")})
    assert check_resumable(facts(data=one), facts(data=one, train_data_dir="y"), tmp_path) == set()
    with pytest.raises(ValueError, match="--accept_changes data"):
        check_resumable(facts(data=one), facts(data=other), tmp_path)
    accepted = facts(data=other, accept_changes="data")
    assert check_resumable(facts(data=one), accepted, tmp_path) == {"data"}
    with pytest.raises(ValueError, match="train_data_dir: 'x' then, 'y' now"):  # a stream is not compared
        check_resumable(facts(), facts(train_data_dir="y"), tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [("learning_rat", "did you mean learning_rate"), ("rank", "start anew")],
)
def test_what_cannot_be_accepted_is_said(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        check_resumable(facts(), facts(accept_changes=names), tmp_path)


def test_an_accepted_rate_is_the_rate_of_the_next_step(tmp_path):
    first = small_train_state(max_train_steps=6)
    steps = train(first, SmallBatches())
    for _ in range(3):
        next(steps)
    checkpoint = checkpoint_io.save_checkpoint(first, tmp_path)
    accepted = {"accept_changes": "learning_rate,adam_beta1", "learning_rate": 5e-4, "adam_beta1": 0.8}
    second = small_train_state(max_train_steps=6, **accepted)
    checkpoint_io.restore_checkpoint(second, checkpoint)
    assert next(train(second, SmallBatches())).lr == 5e-4
    assert second.optimizer.param_groups[0]["betas"][0] == 0.8


def test_another_batch_size_goes_on_with_the_samples_that_were_next(tmp_path):
    first = small_train_state(max_train_steps=6, train_batch_size=2)
    steps = train(first, SmallBatches())
    for _ in range(2):
        next(steps)
    checkpoint = checkpoint_io.save_checkpoint(first, tmp_path)
    second = small_train_state(max_train_steps=6, train_batch_size=4, accept_changes="train_batch_size")
    checkpoint_io.restore_checkpoint(second, checkpoint)
    assert second.position == 4
    unchanged = small_train_state(max_train_steps=6, train_batch_size=2)
    checkpoint_io.restore_checkpoint(unchanged, checkpoint)
    assert [step.loss for step in train(unchanged, SmallBatches())] == [step.loss for step in steps]
    assert same_bits(dict(first.adapter.state_dict()), dict(unchanged.adapter.state_dict()))
