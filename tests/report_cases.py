"""Records to report on, and what a browser or a terminal would show of them."""

import io
import json
import math
from html.parser import HTMLParser

from rich.console import Console

from reltune.relevance.heatmap import Heatmap
from reltune.report.page import write_report
from reltune.report.record import ComparisonRecord, Difference, Output, RunRecord, WayResult, WayTable

BERT = [
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "attention.output.LayerNorm"),
    *("intermediate.dense", "output.dense", "output.LayerNorm"),
]


LLAMA = [
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
]


EVIL = "<script>alert(1)</script>"


def relevance(layers=12, columns=BERT, criterion="fisher", prefix="bert.encoder.layer"):
    """Value 1, 2, 3, … from the first cell on; an embedding norm of value 1 stands outside the layers."""
    rows = ["bert.embeddings.LayerNorm", *(f"{prefix}.{i}" for i in range(layers))]
    count = len(columns)
    values = [[None] * count + [1.0]]
    values += [[float(i * count + j + 1) for j in range(count)] + [None] for i in range(layers)]
    total = 1 + layers * count * (layers * count + 1) / 2
    shares = [math.fsum(v for v in row if v is not None) / total for row in values]
    return Heatmap(criterion, rows, [*columns, "(outside the layers)"], values, shares)


def shown(renderable, width):
    """Lines as a console of that width prints them, without colour. A wider line would be folded or cut."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text().splitlines()


def scores(accuracy, f1_macro):
    return {"accuracy": accuracy, "f1_macro": f1_macro}


def way(label, trained, accuracy, between, differences, **fields):
    """A row whose macro F1 is one point below its accuracy."""
    fields = {"seeds": 3, "learning_rate": 2e-3, "steps": 94, "head_parameters": 3845, **fields}
    metrics, deviations = scores(accuracy, accuracy - 0.01), scores(between, between)
    return WayResult(
        label,
        label.split()[0],
        trained,
        fields.pop("head_parameters"),
        metrics,
        deviations,
        differences=differences,
        **fields,
    )


WAYS = ComparisonRecord(
    metric="accuracy",
    chosen_by="accuracy",
    seeds=[42, 43, 44],
    tables=[
        WayTable(
            "equal",
            "Equal size: 547,000 trainable parameters, or as near as a method comes",
            [
                WayResult("before training", "", metrics=scores(0.8111, 0.8), deviations=scores(0.002, 0.002), seeds=3),
                way(
                    "columns 547,000", 547072, 0.9713, 0.0112,
                    {"lora": Difference(0.0125, -0.0031, 0.0247), "full": Difference(-0.1, -0.2, 0.05)},
                    edge=True, seconds_per_step=0.1234, peak_memory_bytes=2 * 2**30, adapter_bytes=3 * 2**20,
                    analysis_seconds=12.4, seconds=24.0, forgetting=scores(-0.0625, -0.05),
                ),
                way("lora r=13", 547200, 0.9588, 0.0089, {"full": Difference(0.001, None, None)}, seconds=11.0),
                WayResult("dora r=13", "dora", failed="training diverged, some weights are not finite any more."),
            ],
        )
    ],
    notes=["Every method has the same data."],
)  # fmt: skip


FULL = RunRecord(
    title="News by topic",
    config={"model_name_or_path": "some/model", "training": {"learning_rate": 0.003}, "criteria": ["fisher"]},
    heatmaps=[relevance(), relevance(criterion="magnitude")],
    depth_sentence="By fisher, layer 11 matters most.",
    plan_lines=["712 columns in 58 modules", "the backward pass ends at layer 4"],
    selected_by_layer={"bert.encoder.layer.10": 1024, "bert.encoder.layer.11": 4096},
    metrics={
        "test_accuracy": 0.97213,
        "test_f1_macro": 0.9643,
        "eval_loss": 0.1234,
        "eval_accuracy": 0.5,
        "trainable_parameters": 5120,
    },
    history=[
        {"loss": 1.5, "step": 10, "epoch": 0.5},
        {"loss": float("nan"), "step": 15, "epoch": 0.75},
        {"loss": 0.75, "step": 20, "epoch": 1.0},
        {"eval_loss": 0.625, "eval_accuracy": 0.875, "eval_f1_macro": 0.8125, "step": 20, "epoch": 1.0},
        {"train_runtime": 3.0, "step": 20, "epoch": 1.0},
    ],
    notes=["Measured on two cores."],
    ways=WAYS,
)


EMPTY = RunRecord("Nothing yet", {}, [], "", [], {}, {}, [], [])


class Page(HTMLParser):
    """What a browser would see: text outside scripts and styles, and every element with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.text, self.elements, self.code, self.inside = [], [], [], False
        self.cells, self.cell = [], None  # of the outputs' table: attributes, and text with its tags left out
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "td" and ("dir", "auto") in attrs:
            self.cell = ""
        if tag in ("script", "style"):
            self.inside = True
            self.code.append((tag, dict(attrs).get("id"), ""))

    def handle_endtag(self, tag):
        self.inside = False
        if tag == "td" and self.cell is not None:
            self.cells.append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data
        if self.inside:
            tag, name, code = self.code.pop()
            self.code.append((tag, name, code + data))
        elif data.strip():
            self.text.append(data.strip())

    @property
    def figures(self):
        return next(json.loads(code) for _, name, code in self.code if name == "figures")


def page_of(tmp_path, record):
    write_report(tmp_path / "report.html", record)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


OUTPUTS = [
    Output("Wie viel ist 1 + 1?", "2", " 2\n", "zwei"),
    Output("كم يساوي ٢ + ٢؟", "٤", "", "٤"),
    Output("写\n" * 9, "好", "很" * 300, "[bold]好[/bold] \x1b[31m"),
    *[Output(f"question {i}", "answer", "base", "tuned") for i in range(5)],
]
