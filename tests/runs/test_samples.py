"""Prompts that are answered while a model trains: by a plain loop's standard, without a trace in the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration, Trainer

from command_line import assert_refused, contents, reltune, review_rows
from reltune.runs.tuned import Tuned
from task_cases import write_rows
from tiny_models import CHAT, save_tiny_bert, save_tiny_llama, tiny_tokenizer

PROMPTS = ("the film was good", "a, b: not bad")
TALK = {"messages": [{"role": "user", "content": "good film"}, {"role": "assistant", "content": "bad book"}]}


def lively(path: Path, **options: Any) -> None:
    """A decoder that writes different things after different prompts."""
    save_tiny_llama(path, **options)
    model = AutoModelForCausalLM.from_pretrained(path)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.mul_(5)
    model.save_pretrained(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    lively(place / "model", hidden_size=64, intermediate_size=128)
    write_rows(place / "train.jsonl", [{"prompt": text, "completion": f" {label}"} for text, label in review_rows(40)])
    return place


def words(place: Path, name: str, *more: object) -> list[object]:
    return [
        *("run", "--model_name_or_path", place / "model", "--train_file", place / "train.jsonl", "--use_cpu"),
        *(
            "--output_dir",
            place / name,
            "--method",
            "lora",
            "--lora_r",
            4,
            "--lora_dropout",
            0.2,
            "--learning_rate",
            0.01,
        ),
        *("--max_steps", 6, "--per_device_train_batch_size", 4),
        *("--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2),
        *more,
    ]


def asked(*prompts: str) -> list[str]:
    return ["--max_new_tokens", "5"] + [word for prompt in prompts for word in ("--sample_prompts", prompt)]


def samples_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def continued(model: Any, tokenizer: Any, prompt: str, count: int = 5) -> str:
    """Greedy decoding as a plain loop over whole forward passes."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    while ids.shape[1] < start + count:
        with torch.no_grad():
            token = model(input_ids=ids).logits[0, -1].argmax().view(1, 1)
        ids = torch.cat([ids, token], 1)
        if int(token) == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    answer = reltune(*words(place, "asked", *asked(*PROMPTS), "--report_to", "tensorboard"))
    assert answer.code == 0, answer.err
    return place / "asked"


def test_answers_are_kept_with_their_steps(place: Path, run: Path) -> None:
    samples = samples_of(run)
    assert [(one["step"], one["prompt"]) for one in samples] == [(step, p) for step in (0, 2, 4, 6) for p in PROMPTS]
    assert len({one["answer"] for one in samples}) > 2  # they change, and differ
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    base = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    tuned, _ = Tuned.open(run).load()
    for model, step in ((base, 0), (tuned, 6)):
        wanted = [continued(model, tokenizer, prompt) for prompt in PROMPTS]
        assert [one["answer"] for one in samples if one["step"] == step] == wanted


def test_training_is_the_same_without_them(place: Path, run: Path) -> None:
    """With dropout, whose random numbers would be others, and a shuffle before each pass."""
    answer = reltune(*words(place, "unasked", "--max_new_tokens", 5))
    assert answer.code == 0, answer.err
    both = [load_file(place / name / "adapter" / "adapter_model.safetensors") for name in ("asked", "unasked")]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    assert not (place / "unasked" / "samples.jsonl").exists()


def test_tensorboard_shows_them(run: Path) -> None:
    (folder,) = (run / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    for place, prompt in enumerate(PROMPTS, start=1):
        found = {
            event.step: event.tensor_proto.string_val[0].decode()
            for event in events.Tensors(f"samples/{place}/text_summary")
        }
        assert found == {
            one["step"]: f"    {prompt}\n\n---\n\n    {one['answer']}"
            for one in samples_of(run)
            if one["prompt"] == prompt
        }


def test_an_interrupted_training_goes_on_without_doubles(
    place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, count = Trainer.evaluate, 0

    def stopped(self: Trainer, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        found = evaluate(self, *args, **options)
        if count == 2:
            raise KeyboardInterrupt  # answers of step 4 are kept, its checkpoint is not
        return found

    command = words(place, "stopped", *asked(*PROMPTS))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", stopped)
        assert reltune(*command).code == 130
    assert [one["step"] for one in samples_of(place / "stopped")] == [0, 0, 2, 2, 4, 4]
    assert (place / "stopped" / "checkpoint-2").is_dir() and not (place / "stopped" / "checkpoint-4").exists()
    assert reltune(*command).code == 0
    assert (place / "stopped" / "samples.jsonl").read_bytes() == (run / "samples.jsonl").read_bytes()


def test_an_existing_run_is_asked_other_prompts(place: Path, run: Path) -> None:
    """Texts of a file and chats; a model without a chat template is asked no chat."""
    again = Path(shutil.copytree(run, place / "again"))
    (place / "prompts.txt").write_text("good film\n\n very  bad, dull \n", encoding="utf-8")
    before = contents(again)
    write_rows(place / "chats.jsonl", [{"prompt": "book"}, TALK])
    answer = reltune("tune", again, "--sample_prompts", place / "chats.jsonl", "--overwrite_output_dir")
    assert_refused(answer, "prompt 2", "no chat template")
    assert contents(again) == before
    more = ("--sample_prompts", "one", "--sample_prompts", place / "prompts.txt")
    answer = reltune("tune", again, *more, "--overwrite_output_dir")
    assert answer.code == 0, answer.err
    assert [one["prompt"] for one in samples_of(again)][:3] == ["one", "good film", "very  bad, dull"]


def test_chats_are_asked_as_training_asks(tmp_path: Path) -> None:
    lively(tmp_path / "model", chat_template=CHAT)
    write_rows(tmp_path / "train.jsonl", [TALK, *({"messages": [{"role": "user", "content": f"{a} film"}, {"role": "assistant", "content": b}]}
                                                  for a, b in review_rows(20))])  # fmt: skip
    write_rows(tmp_path / "chats.jsonl", [TALK, {"prompt": "good film"}])
    answer = reltune(*words(tmp_path, "run", *asked(str(tmp_path / "chats.jsonl"), "good film")))
    assert answer.code == 0, answer.err
    samples = samples_of(tmp_path / "run")
    assert {one["prompt"] for one in samples} == {"good film"}  # the last answer is not told
    for step in (0, 2, 4, 6):
        assert len({one["answer"] for one in samples if one["step"] == step}) == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    text = tokenizer.apply_chat_template(TALK["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert samples[0]["answer"] == continued(base, tokenizer, text.strip())


def test_a_source_is_translated(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=3))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", [{"source": text, "target": label} for text, label in review_rows(30)])
    answer = reltune(*words(tmp_path, "run", *asked("good film", "bad, book")))
    assert answer.code == 0, answer.err
    samples = samples_of(tmp_path / "run")
    assert [(one["step"], one["prompt"]) for one in samples][2:4] == [(2, "good film"), (2, "bad, book")]
    ids = tokenizer("good film", return_tensors="pt").input_ids
    written = model.eval().generate(input_ids=ids, max_length=6, do_sample=False)
    assert samples[0]["answer"] == tokenizer.decode(written[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--sample_prompts", "absent.txt"], "absent.txt does not exist"),
        (["--sample_prompts", "PLACE/bad.jsonl"], "neither 'messages' nor a 'prompt' on line 2"),
        (["--sample_prompts", "PLACE/many.txt"], "at most 100"),
        (["--sample_prompts", " "], "sample_prompts is empty"),
        (["--sample_prompts", "good", "--eval_strategy", "no"], "eval_strategy is no"),
        (["--sample_prompts", "good", "--task", "sequence_classification"], "writes no texts"),
    ],
)
def test_what_cannot_be_asked_is_refused(place: Path, more: list[str], named: str) -> None:
    (place / "bad.jsonl").write_text('{"prompt": "good"}\n{"question": "bad"}\n', encoding="utf-8")
    (place / "many.txt").write_text("good film\n" * 101, encoding="utf-8")
    answer = reltune(*words(place, "refused", *(word.replace("PLACE", str(place)) for word in more)))
    assert_refused(answer, named)
    assert not (place / "refused").exists()


def test_a_model_that_writes_nothing_is_asked_nothing(tmp_path: Path) -> None:
    """The task is read off the columns here."""
    save_tiny_bert(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", [{"text": text, "label": label} for text, label in review_rows(20)])
    answer = reltune(*words(tmp_path, "run", "--sample_prompts", "good"))
    assert_refused(answer, "a model for sequence_classification writes no texts")
    assert not (tmp_path / "run").exists()


def test_a_sweep_keeps_the_best_trials_answers(place: Path) -> None:
    swept = [word for word in words(place, "swept", *asked("good film")) if word not in ("--learning_rate", 0.01)]
    answer = reltune(*swept, "--sweep", "learning_rate=1e-3,1e-2")
    assert answer.code == 0, answer.err
    best = json.loads((place / "swept" / "sweep.json").read_text(encoding="utf-8"))["best"]["number"]
    assert [one["step"] for one in samples_of(place / "swept")] == [0, 2, 4, 6]
    others = [path.parent.name for path in (place / "swept").glob("sweep/trial-*/samples.jsonl")]
    assert others == [f"trial-{1 - best}"]
