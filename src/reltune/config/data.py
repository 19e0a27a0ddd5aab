"""The data: where rows come from, what their columns mean, and how they become examples."""

from __future__ import annotations

import dataclasses
from dataclasses import field

from reltune.config.fields import Subject, about
from reltune.errors import InputError
from reltune.names import CHAT_TEMPLATES, DATASETS, ON_BAD_ROWS, ON_LEAK, TASKS, WITHOUT_DATA


@dataclasses.dataclass(kw_only=True)
class DataConfig(Subject):
    """The data: where rows come from, what their columns mean, and how they become examples."""

    train_file: str | None = field(
        default=None,
        metadata=about(
            "The training data: a CSV, TSV, JSONL, JSON or Parquet file, a directory that the library datasets saved, or a "
            f"folder of images. Not needed if every criterion is one of {', '.join(WITHOUT_DATA)}: these read the model's "
            "weight files only.",
            "PATH",
        ),
    )
    dataset_name: str | None = field(
        default=None,
        metadata=about(
            f"A data set to train on instead of train_file: one that a Python package brings ({', '.join(DATASETS)}), or one "
            "of the Hugging Face Hub.",
            "NAME",
        ),
    )
    dataset_config: str | None = field(
        default=None,
        metadata=about("Which variant of dataset_name to read; for reasoning_gym, the name of its task.", "NAME"),
    )
    dataset_path: str | None = field(
        default=None,
        metadata=about("Where the files of dataset_name are, if its Python package does not bring them.", "PATH"),
    )
    validation_file: str | None = field(
        default=None,
        metadata=about("The validation data. If not given, a part of the training data is split off.", "PATH"),
    )
    test_file: str | None = field(
        default=None, metadata=about("The test data. If not given, a part of the training data is split off.", "PATH")
    )
    task: str | None = field(
        default=None,
        metadata=about(
            f"What the model learns to do: {', '.join(TASKS)}. If not given, the columns of the data decide.",
            "TASK",
            TASKS,
        ),
    )
    text_column: str = field(default="text", metadata=about("Name of the column that holds the text.", "NAME"))
    text_pair_column: str | None = field(
        default=None,
        metadata=about("Name of a column that holds a second text, which the model reads with the first.", "NAME"),
    )
    label_column: str = field(
        default="label",
        metadata=about(
            "Name of the column that holds the label; or, with commas between, of several columns of 0 and 1.", "NAME"
        ),
    )
    encoding: str = field(
        default="utf-8", metadata=about("Character encoding of text files; a byte order mark is allowed.", "NAME")
    )
    on_bad_rows: str = field(
        default="error",
        metadata=about(
            "What to do about rows that cannot be used. error: refuse the data; skip: leave these rows out and list them.",
            "HOW",
            ON_BAD_ROWS,
        ),
    )
    on_leak: str = field(
        default="warn",
        metadata=about(
            "What to do about held-out rows that the training data have too. warn: say how many; error: refuse the data.",
            "HOW",
            ON_LEAK,
        ),
    )
    streaming: bool = field(
        default=False,
        metadata=about("Read training rows while training instead of loading all of them first. Needs max_steps."),
    )
    max_length: int = field(
        default=128, metadata=about("Longest example in tokens; longer examples are cut.", "N", least=1)
    )
    chat_template: str | None = field(
        default=None,
        metadata=about(
            "For chats: write them by this template instead of the model's own: a file in Jinja's language, or one of "
            f"{', '.join(CHAT_TEMPLATES)}. It is saved with the tuned model's tokenizer.",
            "FILE|NAME",
        ),
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata=about(
            "For causal_lm: compute the loss on completions only, not on prompts. If not given, this is done where rows "
            "have prompts."
        ),
    )
    packing: bool = field(
        default=False,
        metadata=about("For causal_lm: join short training examples into sequences of max_length tokens."),
    )
    forgetting_file: str | None = field(
        default=None,
        metadata=about(
            "A second data set for the same task that is never trained on. It is measured before and after training, to "
            "show what the model forgets.",
            "PATH",
        ),
    )

    @property
    def has_data(self) -> bool:
        """Whether data to train on are named; without them only criteria that read weights alone can be measured."""
        return self.train_file is not None or self.dataset_name is not None

    def check_data(self) -> None:
        """Raise InputError unless exactly one source of training data is named."""
        if (self.train_file is None) == (self.dataset_name is None):
            raise InputError("exactly one of train_file and dataset_name says what to train on; give one of them.")

    def check(self) -> None:
        super().check()
        if self.text_column == self.label_column:
            raise InputError(f"text_column and label_column are both {self.text_column!r}; name two columns.")
        for name in ("text_column", "label_column"):
            if self.text_pair_column == getattr(self, name):
                raise InputError(f"{name} and text_pair_column are both {self.text_pair_column!r}; name two columns.")
        for name in ("dataset_config", "dataset_path"):
            if getattr(self, name) is not None and self.dataset_name is None:
                raise InputError(
                    f"{name} is given without dataset_name, which it belongs to; name both, or leave it out."
                )
        if self.streaming and self.packing:
            raise InputError("packing needs all examples at once; leave out packing or streaming.")
        if self.has_data or self.validation_file is not None or self.test_file is not None:
            self.check_data()
