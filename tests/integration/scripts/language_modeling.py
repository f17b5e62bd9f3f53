"""Causal language modeling in the manner of transformers' run_clm.py: same arguments, same flow, no hf_lowrank."""

import math
import sys
from dataclasses import dataclass, field

import datasets
import evaluate
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import check_min_version


check_min_version("4.57.0.dev0")


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Weights to go on from."})
    model_type: str | None = field(default=None, metadata={"help": "From scratch: kind of model."})
    config_overrides: str | None = field(default=None, metadata={"help": "From scratch: key=value,key=value."})
    config_name: str | None = field(default=None, metadata={"help": "From scratch: folder of a configuration."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where data sets and models are cached."})


@dataclass
class DataTrainingArguments:
    train_file: str | None = field(default=None, metadata={"help": "A .txt, .csv or .json file."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use that many blocks."})
    block_size: int | None = field(default=None, metadata={"help": "Tokens in a block."})


def load(data_args, cache_dir):
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    kind = files["train"].split(".")[-1].replace("txt", "text")
    return datasets.load_dataset(kind, data_files=files, cache_dir=cache_dir)


def build(model_args):
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    if model_args.model_name_or_path:
        return tokenizer, AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    if model_args.config_name:
        config = AutoConfig.from_pretrained(model_args.config_name)
    else:
        config = CONFIG_MAPPING[model_args.model_type]()
        if model_args.config_overrides:
            config.update_from_string(model_args.config_overrides)
    model = AutoModelForCausalLM.from_config(config)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return tokenizer, model


def blocks(raw, tokenizer, block_size, training_args):
    columns = raw["train"].column_names
    text = "text" if "text" in columns else columns[0]

    def group(rows):
        joined = [token for row in rows["input_ids"] for token in row]
        whole = len(joined) // block_size * block_size
        cut = [joined[i : i + block_size] for i in range(0, whole, block_size)]
        return {"input_ids": cut, "attention_mask": [[1] * block_size for _ in cut], "labels": cut}

    with training_args.main_process_first(desc="tokenizing"):
        tokens = raw.map(lambda rows: tokenizer(rows[text]), batched=True, remove_columns=columns)
        return tokens.map(group, batched=True, remove_columns=tokens["train"].column_names)


def compute_metrics_with(metric):
    def compute(prediction):
        labels, tokens = prediction.label_ids[:, 1:].reshape(-1), prediction.predictions[:, :-1].reshape(-1)
        return metric.compute(predictions=tokens, references=labels)

    return compute


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    set_seed(training_args.seed)
    tokenizer, model = build(model_args)
    data = blocks(load(data_args, model_args.cache_dir), tokenizer, data_args.block_size, training_args)
    if data_args.max_train_samples:
        data["train"] = data["train"].select(range(min(len(data["train"]), data_args.max_train_samples)))
    metric = evaluate.load("accuracy", cache_dir=model_args.cache_dir) if training_args.do_eval else None
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics_with(metric),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
    )
    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint
        checkpoint = get_last_checkpoint(training_args.output_dir) if checkpoint == "true" else checkpoint
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tasks="text-generation")


if __name__ == "__main__":
    main()
