"""A step of the whole training loop on a small encoder, with ``--cuda_graphs`` and without.

On one GPU, without a network, with the wheels of the command line's packages unpacked in PEERS, from the repository's root (about two
minutes):

    PYTHONPATH=src:PEERS python3 benchmarks/graphed_step.py --device cuda --commit COMMIT --output_dir benchmarks/results

and on any machine, in seconds: python benchmarks/graphed_step.py --tiny --output_dir /tmp (on a CPU nothing is recorded)

The loop is ``reltune.runs.training.train`` with a classification task, as `reltune run` calls it. Models have the shapes of MiniLM-L6
and of BERT base and random weights in float32; texts have 33 to 64 tokens, so that all batches come to one shape once they are padded. Its
first steps, in which recordings are made, are not counted; the seconds from the first to the last step that is are divided by
their number. Dropout is off, and the weights that come out are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from harness import Machine, Method, Timed, arguments, benchmark
from llama import made_up_tokenizer
from reltune.runs import training
from reltune.tasks.sequence_classification import SequenceClassification
from reltune.tasks.task import Examples
from training_loop import Ticks
from tuner_minilm import columns, lora, single_weights
from tuner_step import SHARE, Prepare

SKIPPED = 6
SIZES = {
    "MiniLM-L6": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "num_hidden_layers": 6},
    "BERT base": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
}


@dataclasses.dataclass
class Loop:
    """Trainings of one model on the same texts, each from the same start."""

    base: nn.Module
    prepare: Prepare
    tokenizer: PreTrainedTokenizerFast
    examples: Examples
    batch: int
    steps: int
    graphs: bool
    machine: Machine

    @contextmanager
    def adapted(self) -> Iterator[None]:
        start = {name: tensor.detach().clone() for name, tensor in self.base.state_dict().items()}
        torch.manual_seed(0)
        self.model = self.prepare(self.base)
        try:
            yield
        finally:
            self.trained = [p.detach().clone() for p in self.model.parameters() if p.requires_grad]
            if self.model is not self.base:
                self.model.unload()
            self.base.requires_grad_(False).load_state_dict(start)
            del self.model

    def run(self) -> Timed:
        ticks = Ticks(self.machine, self.steps, SKIPPED)
        task = SequenceClassification(labels=["a", "b"])
        with tempfile.TemporaryDirectory() as directory:
            fields = {
                "max_steps": SKIPPED + self.steps,
                "per_device_train_batch_size": self.batch,
                "learning_rate": 1e-4,
                "eval_strategy": "no",
                "save_strategy": "no",
                "use_cpu": self.machine.device.type == "cpu",
                "disable_tqdm": True,
            }
            args = training.arguments(directory, "selection", 0, fields, task)
            training.train(self.model, args, task, self.tokenizer, self.examples, callbacks=[ticks], graphs=self.graphs)
        return Timed(ticks.seconds)


def texts(count: int, tokens: int, vocabulary: int) -> Examples:
    generator = torch.Generator().manual_seed(0)
    items = []
    for number in range(count):
        length = int(torch.randint(tokens // 2 + 1, tokens + 1, (1,), generator=generator))
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        items.append({"input_ids": ids, "attention_mask": [1] * length, "labels": number % 2})
    return Examples(items)


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    off = torch.stack([(one - other).float().norm() for one, other in zip(found, wanted, strict=True)]).norm()
    return float(off / torch.stack([other.float().norm() for other in wanted]).norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: does the script run?")
    parser.add_argument("--shapes", nargs="+", default=["MiniLM-L6", "BERT base"], choices=list(SIZES))
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    options = arguments(parser, "graphed_step")
    if options.tiny:
        options.shapes, options.examples, options.tokens, options.steps, options.repeats = ["tiny"], 2, 64, 3, 1
    bench = benchmark(options, ["trl", "datasets", "accelerate"])
    for shape in options.shapes:
        vocabulary = 100 if shape == "tiny" else 30522
        torch.manual_seed(0)
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(num_labels=2, vocab_size=vocabulary, **no_dropout, **SIZES[shape])
        base = BertForSequenceClassification(config).requires_grad_(False).to(options.device)
        ways = {
            f"single weights, {SHARE:.2%}": single_weights(base, SHARE),
            "columns, r = 8": columns(8),
            "LoRA, r = 8": lora(8),
        }
        ways["full"] = lambda base: base.requires_grad_(True)
        examples = texts(4 * options.examples, options.tokens, vocabulary)
        tokenizer = made_up_tokenizer(vocabulary)
        loops = {
            f"{name}{', CUDA graphs' * graphs}": Loop(
                base, prepare, tokenizer, examples, options.examples, options.steps, graphs, bench.machine
            )
            for name, prepare in ways.items()
            for graphs in (False, True)[: 1 + (bench.machine.device.type == "cuda")]
        }
        methods = [Method(name, loop.run, loop.adapted) for name, loop in loops.items()]
        bench.measure(
            shape, {**SIZES[shape], "examples": options.examples, "tokens": options.tokens}, methods, options.repeats
        )
        for name in ways:
            if (graphs := f"{name}, CUDA graphs") in loops:
                bench.value(
                    f"{shape}: {name}, CUDA graphs / without, time",
                    bench.median(shape, graphs) / bench.median(shape, name),
                )
                bench.check(
                    f"{shape}: {name}, difference of what is trained",
                    distance(loops[graphs].trained, loops[name].trained),
                    1e-3,
                )
        bench.save(options.output_dir, options.name)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
