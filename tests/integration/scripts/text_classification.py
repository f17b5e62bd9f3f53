"""Text classification in the manner of transformers' run_glue.py: same arguments, same flow, no hf_lowrank."""

import sys
from dataclasses import dataclass, field

import datasets
import evaluate
import numpy as np
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import check_min_version


check_min_version("4.57.0.dev0")


@dataclass
class DataTrainingArguments:
    task_name: str | None = field(default=None, metadata={"help": "Task of GLUE, for its metric."})
    train_file: str | None = field(default=None, metadata={"help": "A .csv or .json file with the column label."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut."})
    pad_to_max_length: bool = field(default=True, metadata={"help": "Pad every text to max_seq_length."})


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Encoder."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where data sets and models are cached."})


def load(data_args, cache_dir):
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    return datasets.load_dataset(files["train"].split(".")[-1], data_files=files, cache_dir=cache_dir)


def labels_of(rows):
    """Return the classes in order, or None where the labels are real numbers: a regression."""
    if rows.features["label"].dtype in ("float32", "float64"):
        return None
    return sorted(rows.unique("label"))


def encode(raw, tokenizer, classes, data_args, training_args):
    columns = [name for name in raw["train"].column_names if name != "label"]
    columns = ["sentence1", "sentence2"] if "sentence1" in columns and "sentence2" in columns else columns[:2]
    numbers = {value: index for index, value in enumerate(classes)} if classes else None
    padding = "max_length" if data_args.pad_to_max_length else False

    def row(batch):
        texts = [batch[column] for column in columns]
        found = tokenizer(*texts, padding=padding, max_length=data_args.max_seq_length, truncation=True)
        found["label"] = [numbers[value] for value in batch["label"]] if numbers else batch["label"]
        return found

    with training_args.main_process_first(desc="tokenizing"):
        return raw.map(row, batched=True)


def metric_for(data_args, regression, cache_dir):
    if data_args.task_name is not None:
        return evaluate.load("glue", data_args.task_name, cache_dir=cache_dir)
    return evaluate.load("mse" if regression else "accuracy", cache_dir=cache_dir)


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load(data_args, model_args.cache_dir)
    classes = labels_of(raw["train"])
    name = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(name, num_labels=len(classes or [0]), finetuning_task=data_args.task_name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, config=config)
    data = encode(raw, tokenizer, classes, data_args, training_args)
    metric = metric_for(data_args, classes is None, model_args.cache_dir)

    def compute_metrics(prediction):
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        found = np.squeeze(logits) if classes is None else logits.argmax(axis=1)
        return metric.compute(predictions=found, references=prediction.label_ids)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer),
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate(eval_dataset=data["validation"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tasks="text-classification", finetuned_from=name)


if __name__ == "__main__":
    main()
