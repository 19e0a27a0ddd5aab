"""Losses, sampled labels and metrics per example, against transformers' and torch's own losses and brute force."""

from __future__ import annotations

import copy
import math
import types
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.bert import BertConfig

from measured_models import CLASSIFIER, LABELS, VOCAB, made
from relevance_cases import text_batch
from reltune import losses
from reltune.errors import InputError
from reltune.losses import LOSSES, Loss, as_loss

TOKEN_TASKS = ("token_classification", "causal_lm", "masked_lm", "seq2seq")
# Of answers in a context there are two logits per token: tests/test_more_text_tasks.py. Pairs: tests/test_preference.py.
OF_LOGITS = [task for task in LOSSES if task not in ("question_answering", "preference")]
LENGTHS = (3, 11, 6, 2, 9)
N = 40_000  # copies of one example in the tests of sampling


def assert_close(found, wanted, relative=1e-9):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= relative * wanted.abs().max()


def gpt2():
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return made(GPT2LMHeadModel, GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.2))


def llama():
    return made(LlamaForCausalLM, LlamaConfig(**CLASSIFIER, num_key_value_heads=1))


def t5():
    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return made(T5ForConditionalGeneration, T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def bert(kind, **changes):
    return made(kind, BertConfig(**{**CLASSIFIER, **changes}))


def some_ignored(ids, mask, seed=3):
    """Labels of all tokens but the padding and a third of the others; of the last example none but its second."""
    keep = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) > 1 / 3
    keep[:, 1], keep[-1, 2:] = True, False
    return torch.where((mask == 1) & keep, ids, -100)


def case(task, model_of=None):
    """A model and a padded batch for it."""
    torch.manual_seed(1)
    batch = text_batch(LENGTHS)
    tokens = some_ignored(batch["input_ids"], batch["attention_mask"])
    if task == "sequence_classification":
        model = bert(BertForSequenceClassification)
    elif task == "multilabel_classification":
        model = bert(BertForSequenceClassification, problem_type="multi_label_classification")
        batch["labels"] = torch.randint(2, (len(LENGTHS), LABELS)).double()
    elif task == "regression":
        model = bert(BertForSequenceClassification, problem_type="regression")
        batch["labels"] = torch.randn(len(LENGTHS), LABELS, dtype=torch.float64)
    elif task == "token_classification":
        model = bert(BertForTokenClassification)
        batch["labels"] = torch.where(tokens == -100, -100, tokens % LABELS)
    elif task == "masked_lm":
        model, batch["labels"] = bert(BertForMaskedLM), tokens
    elif task == "causal_lm":
        model, batch["labels"] = (model_of or gpt2)(), tokens
    else:
        model = t5()
        batch["labels"] = some_ignored(torch.randint(VOCAB, (len(LENGTHS), 7)), torch.ones(len(LENGTHS), 7), seed=5)
    return model.eval(), batch


def one(batch, row):
    """A batch of one example without padding."""
    length = int(batch["attention_mask"][row].sum())
    padded = batch["input_ids"].shape[1]
    return {
        key: value[row : row + 1, :length] if value.ndim == 2 and value.shape[1] == padded else value[row : row + 1]
        for key, value in batch.items()
    }


@pytest.mark.parametrize(("task", "model_of"), [*((task, None) for task in OF_LOGITS), ("causal_lm", llama)])
def test_losses_are_those_of_transformers_one_example_at_a_time(task, model_of, monkeypatch):
    model, batch = case(task, model_of)
    # transformers narrows logits to float32 for causal models; here it must not, and rotary embeddings may
    narrow = torch.Tensor.float

    def wide(tensor):
        return tensor.dtype == torch.float64 and tensor.shape[-1] > 1  # the frequencies are a column

    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if wide(self) else narrow(self))
    with torch.no_grad():
        wanted = torch.stack([model(**one(batch, row)).loss for row in range(len(LENGTHS))])
        outputs = model(**batch)
    found = LOSSES[task].per_example(outputs, batch)
    assert found.dtype == torch.float64
    assert_close(found, wanted)
    assert torch.equal(LOSSES[task].per_example(outputs.logits, (None, batch["labels"])), found)


def test_a_head_with_one_output_takes_labels_of_one_dimension():
    model = bert(BertForSequenceClassification, num_labels=1, problem_type="regression").eval()
    batch = {**text_batch(LENGTHS), "labels": torch.randn(len(LENGTHS), dtype=torch.float64)}
    with torch.no_grad():
        outputs = model(**batch)
        wanted = torch.stack([model(**one(batch, row)).loss for row in range(len(LENGTHS))])
    assert_close(LOSSES["regression"].per_example(outputs, batch), wanted)
    drawn = LOSSES["regression"].sample_labels(outputs, batch, torch.Generator())
    assert drawn.shape == batch["labels"].shape and not torch.equal(drawn, batch["labels"])


@pytest.mark.parametrize("task", TOKEN_TASKS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 6),
    classes=st.integers(1, 7),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_token_losses_by_brute_force(task, rows, length, classes, ignored, seed):
    """Mean of −log p over the label tokens and the share of them predicted; nothing of what has no label."""
    torch.manual_seed(seed)
    logits = torch.randn(rows, length, classes, dtype=torch.float64, requires_grad=True)
    labels = torch.where(torch.rand(rows, length) < ignored, -100, torch.randint(classes, (rows, length)))
    losses, right = [], []
    for s in range(rows):
        pairs = [
            (logits[s, t - 1 if task == "causal_lm" else t], int(labels[s, t]))
            for t in range(1 if task == "causal_lm" else 0, length)
            if labels[s, t] != -100
        ]
        losses.append(sum(z.exp().sum().log() - z[y] for z, y in pairs) / max(len(pairs), 1) + 0 * logits.sum())
        right.append(sum(z.tolist().index(z.max()) == y for z, y in pairs) / max(len(pairs), 1))
    found = LOSSES[task].per_example(logits, {"labels": labels})
    assert torch.allclose(found, torch.stack(losses), rtol=1e-9, atol=1e-12)
    gradient, wanted = (torch.autograd.grad(value.sum(), logits)[0] for value in (found, torch.stack(losses)))
    assert torch.allclose(gradient, wanted, rtol=1e-9, atol=1e-12)
    metric = LOSSES[task].metric(logits, {"labels": labels})
    assert torch.allclose(metric, torch.tensor(right, dtype=metric.dtype))
    drawn = LOSSES[task].sample_labels(logits, {"labels": labels}, torch.Generator().manual_seed(seed))
    assert drawn.dtype == labels.dtype and torch.equal(drawn == -100, labels == -100)
    assert drawn[labels != -100].lt(classes).all() and drawn[labels != -100].ge(0).all()


@pytest.mark.parametrize("task", [*TOKEN_TASKS, "sequence_classification"])
def test_an_example_without_labels_has_no_loss_and_no_gradient(task):
    shape = (3,) if task == "sequence_classification" else (3, 5)
    logits = torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(4, shape)
    labels[1] = -100
    losses = LOSSES[task].per_example(logits, {"labels": labels})
    losses.sum().backward()
    assert losses[1] == 0 and (losses[[0, 2]] > 0).all()
    assert (logits.grad[1] == 0).all() and (logits.grad[[0, 2]] != 0).any()
    assert LOSSES[task].metric(logits, {"labels": labels})[1] == 0


def test_metrics_by_hand():
    classes = LOSSES["sequence_classification"].metric(
        torch.tensor([[1.0, 2], [3, 2]]), {"labels": torch.tensor([1, 1])}
    )
    assert classes.tolist() == [1, 0]
    several = torch.tensor([[1.0, -1, 2, -2], [-1, -1, 1, 1]])
    right = LOSSES["multilabel_classification"].metric(several, {"labels": torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])})
    assert right.tolist() == [0.75, 0]
    numbers = torch.tensor([[1.0, 2], [3, 5]])
    error = LOSSES["regression"].metric(numbers, {"labels": torch.tensor([[1.0, 4], [2, 1]])})
    assert error.tolist() == [-1, -2.5]
    assert {task: loss.metric_name for task, loss in LOSSES.items()} == {
        "sequence_classification": "accuracy",
        "multilabel_classification": "label accuracy",
        "regression": "negative absolute error",
        "question_answering": "share of ends right",
        "preference": "negative loss",
        **dict.fromkeys(TOKEN_TASKS, "token accuracy"),
    }


def one_example(task, classes=4, length=4):
    """Logits and labels of one example in which no two positions predict alike."""
    generator = torch.Generator().manual_seed(4)
    if task in TOKEN_TASKS:
        logits = torch.randn(length, classes, generator=generator, dtype=torch.float64)
        return logits, torch.tensor([2, 0, -100, 1])
    logits = torch.randn(classes, generator=generator, dtype=torch.float64)
    if task == "sequence_classification":
        return logits, torch.tensor(2)
    return logits, torch.ones(classes, dtype=torch.float64)


def copies(value, requires_grad=False):
    return value.expand(N, *value.shape).clone().requires_grad_(requires_grad)


def within(sample, wanted, deviations=5.0):
    """The mean of the sample (N, …) is ``wanted`` but for its standard error."""
    error = sample.std(0) / math.sqrt(len(sample))
    return bool(((sample.mean(0) - wanted).abs() <= deviations * error + 1e-12).all())


SAMPLED = {
    **{task: LOSSES[task] for task in OF_LOGITS},
    "CrossEntropyLoss": as_loss(None),
    "BCE": as_loss(nn.BCEWithLogitsLoss()),
    "MSE": as_loss(nn.MSELoss()),
}
LIKE = {"CrossEntropyLoss": "sequence_classification", "BCE": "multilabel_classification", "MSE": "regression"}


@pytest.mark.parametrize("task", SAMPLED)
def test_labels_are_drawn_from_the_distribution_whose_likelihood_the_loss_is(task):
    """The score is 0 on average, and its mean square is the curvature (Fisher's identities).

    The first holds only if each label is drawn at the position whose logits its loss uses, the second only for the
    right variance. A mean over n label tokens (or labels) is the negative log likelihood over n, so that n times the
    mean square is the curvature.
    """
    logits, labels = one_example(LIKE.get(task, task))
    z = copies(logits, requires_grad=True)
    drawn = SAMPLED[task].sample_labels(z, {"labels": copies(labels)}, torch.Generator().manual_seed(0))
    assert drawn.shape == (N, *labels.shape) and drawn.dtype == labels.dtype
    SAMPLED[task].per_example(z, {"labels": drawn}).sum().backward()
    assert within(z.grad, torch.zeros_like(logits))

    kind = LIKE.get(task, task)
    p = logits.sigmoid() if kind == "multilabel_classification" else logits.softmax(-1)
    curvature = torch.full_like(logits, 2) if kind == "regression" else p * (1 - p)
    terms = logits.numel() if kind in ("regression", "multilabel_classification") else 1
    if task in TOKEN_TASKS:
        labelled = labels != -100
        used = F.pad(labelled[1:], (0, 1)) if task == "causal_lm" else labelled
        curvature, terms = curvature * used[:, None], int(used.sum())
    averaged = 1 if kind == "regression" else terms  # a Gaussian's variance has made up for the mean
    assert within(averaged * z.grad.square(), curvature / terms)
    assert curvature.max() > 0.01


@pytest.mark.parametrize("task", ["sequence_classification", *TOKEN_TASKS])
def test_sampled_classes_follow_the_softmax(task):
    """Pearson's χ² per label position, below its 1 − 1e-6 quantile for 3 degrees of freedom."""
    logits, labels = one_example(task)
    drawn = LOSSES[task].sample_labels(copies(logits), (None, copies(labels)), torch.Generator().manual_seed(1))
    positions = [((), ())] if labels.ndim == 0 else [((t,), (t,)) for t in range(4)]
    if task == "causal_lm":
        positions = [((t,), (t - 1,)) for t in range(1, 4)]
        assert (drawn[:, 0] == 2).all()  # nothing predicts the first label
    checked = 0
    for at, predicted_at in positions:
        if labels[at] == -100:
            assert (drawn[:, *at] == -100).all()
            continue
        expected = N * logits[predicted_at].softmax(-1)
        counts = torch.bincount(drawn[:, *at], minlength=4)
        assert ((counts - expected).square() / expected).sum() < 30.7
        checked += 1
    assert checked == {"sequence_classification": 1, "causal_lm": 2}.get(task, 3)


def test_sampled_labels_and_numbers_have_the_models_mean_and_variance():
    logits = torch.tensor([-2.0, 0, 0.7, 3], dtype=torch.float64)
    batch = {"labels": torch.zeros(N, 4, dtype=torch.long)}
    drawn = LOSSES["multilabel_classification"].sample_labels(copies(logits), batch, torch.Generator().manual_seed(2))
    assert drawn.dtype == torch.long and set(drawn.unique().tolist()) == {0, 1}
    assert within(drawn.double(), logits.sigmoid())
    batch = {"labels": torch.zeros(N, 4, dtype=torch.float64)}
    drawn = LOSSES["regression"].sample_labels(copies(logits), batch, torch.Generator().manual_seed(2))
    assert within(drawn, logits)
    assert within((drawn - logits).square(), torch.full((4,), 4 / 2, dtype=torch.float64))


@pytest.mark.parametrize("task", OF_LOGITS)
def test_the_generator_decides_what_is_drawn(task):
    logits, labels = (value[:50] for value in map(copies, one_example(task)))
    first, again, other = (
        LOSSES[task].sample_labels(logits, {"labels": labels}, torch.Generator().manual_seed(seed))
        for seed in (7, 7, 8)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(LOSSES[task].sample_labels(logits, {"labels": labels}, None), first)


def test_what_is_drawn_does_not_depend_on_padding():
    logits, labels = torch.randn(5, 7, 6), torch.randint(6, (5, 7))
    wider = F.pad(logits, (0, 0, 0, 3)), F.pad(labels, (0, 3), value=-100)
    for task in TOKEN_TASKS:
        drawn, padded = (
            LOSSES[task].sample_labels(z, (None, y), torch.Generator().manual_seed(0))
            for z, y in ((logits, labels), wider)
        )
        assert torch.equal(padded, F.pad(drawn, (0, 3), value=-100))


MODULES = [
    (nn.CrossEntropyLoss(), (5, 3), "classes"),
    (nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"), (5, 3), "classes"),
    (nn.CrossEntropyLoss(ignore_index=1), (5, 3), "classes"),
    (nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1), (5, 3, 4), "classes"),
    (nn.CrossEntropyLoss(), (5, 3, 4, 2), "classes"),
    (nn.CrossEntropyLoss(), (5, 3), "probabilities"),
    (nn.CrossEntropyLoss(), (5, 3, 4), "probabilities"),
    (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2, 3]).double()), (5, 3), "numbers"),
    (nn.BCEWithLogitsLoss(), (5,), "numbers"),
    (nn.MSELoss(), (5, 3), "numbers"),
    (nn.MSELoss(), (5, 2, 3), "numbers"),
    (nn.L1Loss(), (5, 3), "numbers"),
]


@pytest.mark.parametrize(("module", "shape", "kind"), MODULES)
def test_torch_losses_are_torchs_own_on_each_example(module, shape, kind):
    torch.manual_seed(0)
    logits = torch.randn(shape, dtype=torch.float64)
    if kind == "classes":
        labels = torch.randint(3, (shape[0], *shape[2:]))
        labels.view(-1)[0] = 0
    else:
        labels = torch.rand(shape, dtype=torch.float64)
        labels = labels.softmax(1) if kind == "probabilities" else labels.round()
    reduction = module.reduction
    mean = copy.copy(module)
    mean.reduction = "mean"
    wanted = torch.stack([mean(logits[s : s + 1], labels[s : s + 1]) for s in range(5)]).nan_to_num()
    loss = as_loss(module)
    assert_close(loss.per_example(logits, (None, labels)), wanted)
    assert_close(loss.per_example(types.SimpleNamespace(logits=logits), {"labels": labels}), wanted)
    assert module.reduction == reduction
    if isinstance(module, nn.L1Loss):
        assert loss.metric_name == "negative loss"
        assert_close(loss.metric(logits, (None, labels)), -wanted)
        with pytest.raises(InputError, match=r"cannot be drawn for L1Loss.*attribute sample_labels"):
            loss.sample_labels(logits, (None, labels), None)
        return
    drawn = loss.sample_labels(logits, (None, labels), torch.Generator())
    assert drawn.shape == labels.shape and drawn.dtype == labels.dtype
    if kind == "classes":
        kept = labels == module.ignore_index
        assert torch.equal(drawn[kept], labels[kept])
        hits = [(logits[s].argmax(0) == labels[s])[~kept[s]].double() for s in range(5)]
        right = torch.stack([hit.mean() if len(hit) else torch.zeros(()) for hit in hits])
    elif kind == "probabilities":
        assert torch.equal(drawn.sum(1), torch.ones_like(drawn.sum(1))) and set(drawn.unique().tolist()) == {0, 1}
        right = (logits.argmax(1) == labels.argmax(1)).double().reshape(5, -1).mean(1)
    elif isinstance(module, nn.MSELoss):
        right = -(logits - labels).abs().reshape(5, -1).mean(1)
    else:
        right = ((logits > 0) == (labels == 1)).double().reshape(5, -1).mean(1)
    assert torch.allclose(loss.metric(logits, (None, labels)).double(), right.double())


def test_class_weights_multiply_the_losses():
    """As in nn.CrossEntropyLoss(reduction="none"): the mean over one example would cancel them."""
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 2])
    weight = torch.tensor([1.0, 5, 0.2]).double()
    found = as_loss(nn.CrossEntropyLoss(weight=weight)).per_example(logits, (None, labels))
    assert_close(found, weight[labels] * F.cross_entropy(logits, labels, reduction="none"))


def test_probabilities_are_drawn_with_classes_in_their_own_dimension():
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # classes × positions
    labels = torch.zeros(N, 2, 3, dtype=torch.float64)
    drawn = as_loss(None).sample_labels(copies(logits), (None, labels), torch.Generator().manual_seed(0))
    assert within(drawn, logits.softmax(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("task", [*OF_LOGITS, "module"])
def test_half_precision_logits_are_widened(task, dtype):
    logits, labels = (
        value[:9]
        for value in map(copies, one_example(LIKE.get(task, "sequence_classification" if task == "module" else task)))
    )
    loss = as_loss(None) if task == "module" else LOSSES[task]
    labels = labels.float() if labels.is_floating_point() else labels
    narrow = logits.to(dtype).requires_grad_()
    found = loss.per_example(narrow, (None, labels))
    assert found.dtype == torch.float32
    assert torch.equal(found, loss.per_example(narrow.float(), (None, labels)))
    found.sum().backward()
    assert narrow.grad.dtype == dtype
    assert loss.sample_labels(narrow, (None, labels), None).dtype == labels.dtype
    assert loss.metric(narrow, (None, labels)).shape == (9,)


class WideTensors(TorchDispatchMode):
    """Counts the float32 tensors of ``numel`` elements or more that are alive at once."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.seen, self.most = numel, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32 and made.numel() >= self.numel:
            self.seen.append(weakref.ref(made))
        self.most = max(self.most, len({t.data_ptr() for ref in self.seen if (t := ref()) is not None}))
        return made


@pytest.mark.parametrize("shape", [(5,), (7, 5), (3, 9, 5), (2, 0, 5)])
@pytest.mark.parametrize("numbers", [1, 40])
def test_the_gradient_comes_a_few_rows_at_a_time(shape, numbers, monkeypatch):
    monkeypatch.setattr(losses, "WIDE_NUMBERS", numbers)
    logits, labels = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randint(5, shape[:-1])
    weight = torch.randn(shape[:-1], dtype=torch.float64)
    (losses._CrossEntropy.apply(logits, labels) * weight).sum().backward()
    found, logits.grad = logits.grad, None
    plain = F.cross_entropy(logits.reshape(-1, 5), labels.reshape(-1), reduction="none")
    (plain * weight.reshape(-1)).sum().backward()
    torch.testing.assert_close(found, logits.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("task", TOKEN_TASKS)
def test_one_wide_copy_of_the_logits_at_a_time_and_none_kept(task, monkeypatch):
    logits = torch.randn(3, 10, 50, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(50, (3, 10))
    labels[0, :5] = -100
    kept = []
    with WideTensors(20 * 50) as forward, torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        LOSSES[task].per_example(logits, (None, labels))
    assert forward.most == 1
    assert {t.data_ptr() for t in kept if t.numel() >= 20 * 50} == {logits.data_ptr()}
    found = LOSSES[task].per_example(logits, (None, labels))
    with WideTensors(20 * 50) as backward:
        found.sum().backward(retain_graph=True)
    assert backward.most == 1
    monkeypatch.setattr(losses, "WIDE_NUMBERS", 400)
    with WideTensors(20 * 50) as backward:
        found.sum().backward()
    assert backward.most == 0
    with WideTensors(20 * 50) as sampling:
        LOSSES[task].sample_labels(logits, (None, labels), None)
    assert sampling.most == 1
    with WideTensors(20 * 50) as metric:
        LOSSES[task].metric(logits, (None, labels))
    assert metric.most == 0


def test_token_losses_take_several_backward_passes_and_masked_classes():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 2, -100], [3, 1, 2]])
    masked = logits.masked_fill(torch.arange(4) == 0, -torch.inf)  # an ignored label stands at class 0 on the way
    losses = LOSSES["masked_lm"].per_example(masked, (None, labels))
    wanted = torch.stack([F.cross_entropy(z, y) for z, y in zip(masked, labels, strict=True)])
    assert_close(losses, wanted)
    for s in (0, 1, 0):
        found = torch.autograd.grad(losses[s], logits, retain_graph=True)[0]
        assert_close(found, torch.autograd.grad(wanted[s], logits, retain_graph=True)[0])


@pytest.mark.parametrize("label", [4, -1])
def test_a_label_that_is_no_class_is_refused(label):
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        LOSSES["sequence_classification"].per_example(torch.randn(2, 4), (None, torch.tensor([0, label])))


def test_a_callable_is_a_loss():
    def loss_fn(outputs, batch):
        return (outputs - batch[1]).abs().sum(1)

    outputs, batch = torch.randn(4, 3, requires_grad=True), (None, torch.randn(4, 3))
    loss = as_loss(loss_fn)
    assert torch.equal(loss.per_example(outputs, batch), loss_fn(outputs, batch))
    assert torch.equal(loss.metric(outputs, batch), -loss_fn(outputs, batch)) and loss.metric_name == "negative loss"
    assert not loss.metric(outputs, batch).requires_grad
    with pytest.raises(InputError, match=r"the loss loss_fn; give it an attribute sample_labels"):
        loss.sample_labels(outputs, batch, None)
    loss_fn.sample_labels = lambda outputs, batch, generator: batch[1] + 1
    assert torch.equal(as_loss(loss_fn).sample_labels(outputs, batch, None), batch[1] + 1)


def test_names_and_finished_losses_are_taken_as_they_are():
    for task, loss in LOSSES.items():
        assert as_loss(task) is loss
        assert as_loss(loss) is loss
    own = types.SimpleNamespace(per_example=lambda outputs, batch: outputs)
    assert as_loss(own) is own
    assert all(isinstance(loss, Loss) for loss in LOSSES.values())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("causal_ml", "'causal_ml' is unknown; did you mean 'causal_lm'"),
        ("xyz", "'xyz' is unknown; known: sequence_classification, "),
        (nn.MSELoss, r"the class MSELoss; pass an object"),
        (3, "3 is no loss; give a name"),
    ],
)
def test_what_is_no_loss_is_refused(loss, message):
    with pytest.raises(InputError, match=message):
        as_loss(loss)


INTEGERS = torch.zeros(4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("loss", "logits", "labels", "message"),
    [
        ("causal_lm", (4, 6, 9), INTEGERS, r"labels of shape \(4, 5\).*logits of shape \(4, 6, 9\).*shape \(4, 6\)"),
        ("causal_lm", (4, 9), INTEGERS[:, 0], r"labels of shape \(4,\) do not fit logits of shape \(4, 9\)"),
        ("sequence_classification", (4, 9), INTEGERS, r"labels of shape \(4, 5\)"),
        ("sequence_classification", (4, 9), torch.rand(4), "floating-point numbers and not classes.*'regression'"),
        ("regression", (4, 2), torch.rand(4), r"labels of shape \(4,\).*logits of shape \(4, 2\)"),
        ("multilabel_classification", (4, 2), torch.rand(4, 3), "give both the same shape"),
        (nn.CrossEntropyLoss(), (4, 5, 5 + 1), INTEGERS, "dimension 1 is CrossEntropyLoss's classes.*'causal_lm'"),
        (nn.CrossEntropyLoss(), (4, 3), torch.rand(4), "do not fit logits"),
    ],
)
def test_labels_that_do_not_fit_are_refused(loss, logits, labels, message):
    loss = as_loss(loss)
    for function in (loss.per_example, loss.metric, lambda *of: loss.sample_labels(*of, None)):
        with pytest.raises(InputError, match=message):
            function(torch.randn(logits), {"labels": labels})


def test_labels_that_broadcast_against_logits_are_refused():
    loss = as_loss(nn.MSELoss())
    with pytest.warns(UserWarning, match="target size"), pytest.raises(InputError, match="mixes examples"):
        loss.per_example(torch.randn(7, 1), (None, torch.randn(7)))


def test_missing_labels_or_logits_and_integer_targets_are_refused():
    with pytest.raises(InputError, match="no labels, only input_ids, token_type_ids; add a column 'labels'"):
        as_loss("regression").per_example(torch.randn(2, 1), {"input_ids": 0, "token_type_ids": 0})
    with pytest.raises(InputError, match="gave a SimpleNamespace without logits"):
        as_loss(None).per_example(types.SimpleNamespace(hidden=1), {"labels": torch.zeros(2)})
    with pytest.raises(InputError, match="cannot be drawn as integers"):
        as_loss("regression").sample_labels(torch.randn(2), {"labels": torch.tensor([1, 2])}, None)
