"""Models and data sets as a FineTuneJob names them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from trimtab_operator.api.base import ApiModel, SecretReference, Uri, rules
from trimtab_trainer.settings import (
    Cap,
    ExampleCount,
    ExampleMaximum,
    FewShotProportion,
    MinimumImprovement,
    Patience,
    ReplayFraction,
    TaskName,
    TemplateText,
    ValidationEverySteps,
    VocabularySize,
    Weight,
)

_SPECIAL_TOKEN = Annotated[str, Field(min_length=1, max_length=64)]

_PINNED = (
    "!self.uri.startsWith('hf://') || has(self.revision)",
    "an hf:// source needs revision: the full 40-character commit hash",
)

Revision = Annotated[str, Field(max_length=40, pattern=r"^[0-9a-f]{40}$")]

ModelUri = Annotated[
    str,
    Field(
        min_length=6,
        max_length=1024,
        pattern=r"^((hf|s3|gs|az|https|pvc|file)://[^\s@\\]+"
        r"|job://[a-z0-9]([-a-z0-9]*[a-z0-9])?/[a-z0-9]([-a-z0-9]*[a-z0-9])?)$",
    ),
]


class DataSource(ApiModel):
    """One data set. Its format is recognised: chat, prompt and completion, Alpaca, ShareGPT, FLAN TSV, plain text."""

    model_config = ApiModel.model_config | {"json_schema_extra": rules(_PINNED)}

    uri: Uri = Field(
        description="hf://, s3://, gs://, az://, https:// or pvc://claim/path; file:/// in local mode only."
    )
    revision: Revision | None = Field(default=None, description="Commit of an hf:// source.")
    secret_ref: SecretReference | None = Field(
        default=None,
        description="Secret with the store's keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, HF_TOKEN, …).",
    )
    weight: Weight | None = Field(default=None)
    cap: Cap | None = Field(default=None)


DataSources = Annotated[list[DataSource], Field(min_length=1, max_length=32)]


class Template(ApiModel):
    """One wording of a task, in Jinja."""

    prompt: TemplateText = Field(description="What is asked; {{ field }} puts in a field of the record.")
    completion: TemplateText = Field(description="What is answered.")


class FewShot(ApiModel):
    """Examples from the same data set as earlier turns, before a record's own question; they bear no loss."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(("has(self.count) != has(self.maximum)", "give exactly one of count and maximum"))
    }

    count: ExampleCount | None = None
    maximum: ExampleMaximum | None = None
    proportion: FewShotProportion | None = None


class TaskSource(DataSource):
    """A data set whose records may be worded by templates, with examples before them."""

    templates: Annotated[list[Template], Field(min_length=1, max_length=16)] | None = Field(
        default=None, description="Wordings; each pass over the data set gives a record the next one."
    )
    few_shot: FewShot | None = Field(default=None, description="Examples before a record's own question.")


TaskSources = Annotated[list[TaskSource], Field(min_length=1, max_length=32)]


class MixtureSource(TaskSource):
    """One data set of a mixture: trained on, replayed against forgetting, or a task that is held out."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(
            _PINNED,
            (
                "(has(self.replay) && self.replay) == has(self.fraction)",
                "replay needs fraction, and fraction needs replay: true",
            ),
            (
                "!has(self.fraction) || !(has(self.weight) || has(self.cap))",
                "replay is mixed in by its fraction; remove weight and cap",
            ),
            (
                "!has(self.heldOutTask) || !(has(self.weight) || has(self.fraction))",
                "a held-out task is never trained on; remove weight, replay and fraction, or heldOutTask",
            ),
        )
    }

    replay: bool | None = Field(
        default=None,
        description="Data of an earlier stage, against forgetting; running text is welcome and all of it bears loss.",
    )
    fraction: ReplayFraction | None = Field(default=None)
    held_out_task: TaskName | None = Field(default=None)


MixtureSources = Annotated[
    list[MixtureSource],
    Field(
        min_length=1,
        max_length=32,
        json_schema_extra=rules(
            (
                "self.exists(d, !has(d.fraction) && !has(d.heldOutTask))",
                "data needs at least one data set that is neither replay nor a held-out task",
            ),
            (
                "self.filter(d, has(d.fraction)).map(d, d.fraction).sum() < 1.0",
                "the replay fractions must sum to less than 1",
            ),
        ),
    ),
]


class EarlyStopping(ApiModel):
    """Stop where the validation loss no longer falls; the result has the weights of the best measurement."""

    patience: Patience | None = None
    minimum_improvement: MinimumImprovement | None = None


class Validation(ApiModel):
    """Held-out rows for the validation loss."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(("has(self.data) != has(self.fraction)", "give exactly one of data and fraction"))
    }

    data: DataSources | None = Field(default=None, description="Data sets of their own.")
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Part of the training records that is held out, chosen by the seed."
    )
    every_steps: ValidationEverySteps | None = Field(default=None)


class LossValidation(Validation):
    """Held-out rows for the validation loss, which can end the stage."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(
            ("has(self.data) != has(self.fraction)", "give exactly one of data and fraction"),
            (
                "!has(self.earlyStopping) || has(self.everySteps)",
                "earlyStopping compares measurements of the validation loss; add everySteps",
            ),
        )
    }

    early_stopping: EarlyStopping | None = Field(
        default=None,
        description="Stop where the validation loss no longer falls, and take the weights with the best; absent: "
        "train to the last step, whose weights are the result.",
    )


class TaskValidation(LossValidation):
    """Held-out rows for the validation loss; held-out tasks are measured beside them."""

    data: TaskSources | None = Field(default=None, description="Data sets of their own.")  # type: ignore[assignment]


class SpecialTokens(ApiModel):
    """Names of the tokens that are never text."""

    document_separator: _SPECIAL_TOKEN | None = Field(default=None, description="Stands between two documents.")
    end_of_turn: _SPECIAL_TOKEN | None = Field(default=None, description="Ends a message; generation stops at it.")
    padding: _SPECIAL_TOKEN | None = Field(default=None, description="Fills a batch; never bears loss.")
    additional: Annotated[list[_SPECIAL_TOKEN], Field(max_length=64)] | None = Field(
        default=None, description="More tokens, e.g. those of the chat template's roles."
    )


class TokenizerTraining(ApiModel):
    """A byte-level BPE tokenizer, trained on the first root stage's training data."""

    vocabulary_size: VocabularySize | None = Field(default=None)
    special_tokens: SpecialTokens | None = Field(
        default=None, description="Names of the special tokens; they all differ."
    )
    chat_template: Annotated[str, Field(max_length=16_384)] | None = Field(
        default=None, description="Jinja chat template; absent: a plain one of the special tokens."
    )


class Tokenizer(ApiModel):
    """Where the tokenizer comes from, where the model brings none."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(("has(self.train) != has(self.uri)", "give exactly one of train and uri"))
    }

    train: TokenizerTraining | None = Field(default=None, description="Train one.")
    uri: Uri | None = Field(default=None, description="Folder with tokenizer.json and tokenizer_config.json.")


class BaseModelSource(ApiModel):
    """Starting weights of the stages that have no `from`: a URI, or a configuration for random weights."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(
            ("has(self.uri) != has(self.config)", "give exactly one of uri and config"),
            (
                "!has(self.uri) || !self.uri.startsWith('hf://') || has(self.revision)",
                "an hf:// model needs revision: the full 40-character commit hash",
            ),
            (
                "!has(self.config) || has(self.tokenizer)",
                "a model from config has no tokenizer; add tokenizer.train or tokenizer.uri",
            ),
            ("!has(self.config) || has(self.config.model_type)", "config needs model_type, e.g. llama"),
            ("!has(self.uri) || !has(self.tokenizer)", "a model from uri brings its tokenizer; remove tokenizer"),
        )
    }

    uri: ModelUri | None = Field(
        default=None,
        description="hf://, s3://, gs://, az://, https://, pvc://claim/path, or job://name/stage of this namespace.",
    )
    revision: Revision | None = Field(default=None, description="Commit of an hf:// model.")
    secret_ref: SecretReference | None = Field(default=None, description="Secret with the store's keys or HF_TOKEN.")
    config: dict[str, Any] | None = Field(
        default=None,
        description="Random weights: Hugging Face's own configuration keys, such as model_type and hidden_size.",
        json_schema_extra={
            "type": "object",
            "maxProperties": 64,
            "properties": {
                "model_type": {"type": "string", "maxLength": 64, "description": "Architecture, e.g. llama."}
            },
            "x-kubernetes-preserve-unknown-fields": True,
        },
    )
    tokenizer: Tokenizer | None = Field(default=None, description="Only with config.")
