"""The frozen layers below the lowest trained one, computed once for each example.

Where nothing below layer k is trained, what enters layer k is the same in every pass over the data. The first pass keeps it
(kept_states.py), and later ones begin at layer k. For it to be the same, dropout is off in the frozen layers.

An example is known by a digest of its inputs without their padding, so that another order, other batches and another length of
padding do not matter, and changed inputs are never mistaken for kept ones. States are kept of what the attention mask lets through; at
padding later layers read zeros, which no loss and no gradient depends on. Examples of a batch that are not kept go through the
frozen layers by themselves.

Results are bit for bit those without the cache where every example is computed in batches of the same shape in every pass, as with
batches of one length that fill the epoch. Elsewhere the frozen layers round otherwise, since the order in which a matrix product adds
depends on its shape (docs/frozen_prefix.md has how much).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from reltune.cost.blocks import block_lists
from reltune.layers.fingerprint import fingerprint
from reltune.tuner.kept_states import KEY_BYTES, KeptStates

# Classes of Transformers' layers that hand on hidden states and nothing else, so that a model can begin at any of them.
KNOWN = frozenset(
    """
    BertLayer RobertaLayer XLMRobertaLayer CamembertLayer ElectraLayer TransformerBlock ModernBertEncoderLayer
    LlamaDecoderLayer MistralDecoderLayer Qwen2DecoderLayer Qwen3DecoderLayer SmolLM3DecoderLayer GemmaDecoderLayer Phi3DecoderLayer
    GPT2Block GPTNeoXLayer ViTLayer DeiTLayer Dinov2Layer
    """.split()
)
TOLD = "frozen_prefix"  # what a batch calls its ``Identity``


class Unsuited(Exception):
    """Why a model's frozen layers cannot be computed once, as a phrase.

    Attributes:
        remarkable: whether a user could have expected otherwise.
    """

    def __init__(self, phrase: str, remarkable: bool = True) -> None:
        super().__init__(phrase)
        self.remarkable = remarkable


class _Reached(Exception):
    """Ends a forward pass where the frozen layers end, and carries what they gave."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def known_blocks(model: nn.Module) -> list[nn.Module]:
    """A model's layers. Raises Unsuited where it is of an unknown architecture."""
    lists = [list(blocks) for blocks in block_lists(model)]
    if len(lists) != 1 or not all(map(_is_known, lists[0])):
        name = type(getattr(model, "get_base_model", lambda: model)()).__name__
        lowest = lists[0][0] if lists else model
        raise Unsuited(f"{name} is not among the architectures whose layers are known for it", not _is_trained(lowest))
    return lists[0]


def frozen_blocks(model: nn.Module) -> tuple[list[nn.Module], int]:
    """A model's layers, and how many of them from the bottom hold nothing that is trained.

    Raises Unsuited where there are none, or where the model is of an unknown architecture.
    """
    blocks = known_blocks(model)
    depth = next((k for k, block in enumerate(blocks) if _is_trained(block)), len(blocks))
    if not depth:
        raise Unsuited("the lowest layer is trained", remarkable=False)
    return blocks, depth


def _is_known(block: nn.Module) -> bool:
    return type(block).__name__ in KNOWN and type(block).__module__.startswith("transformers.models.")


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


class FrozenPart:
    """The layers of a model below its lowest trained one, with what comes before them.

    Attributes:
        depth, of: how many layers are frozen from the bottom, of how many.
        below: all modules that are finished before what is kept is known.
        width, dtype, tokens: of the hidden states of the example that was looked at.
        draws: whether these modules draw random numbers in training, as dropout does.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], autocast: torch.dtype | None = None) -> None:
        """Look at a model with the inputs of one example (B = 1). Leaves it as it is.

        Raises Unsuited, as ``frozen_blocks`` does, and where something before the layers is trained.
        """
        blocks, self.depth = frozen_blocks(model)
        self.frozen, self.of = blocks[: self.depth], len(blocks)
        self.body = _body(model, blocks[0])
        self.model = model
        self.autocast = autocast
        self.computes = False
        self.instead: Tensor | None = None  # what the frozen layers' result is to be
        device = next(model.parameters()).device
        given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        states, finished = self._tried(given, train=False)
        inner = [module for block in self.frozen for module in block.modules()]
        self.below = list(dict.fromkeys([*finished, *inner]))
        if any(p.requires_grad for module in self.below for p in module.parameters(recurse=False)):
            raise Unsuited("the embeddings are trained", remarkable=False)
        mask = given.get("attention_mask")
        wanted = (1, mask.shape[-1]) if mask is not None and mask.ndim == 2 else (1, states.shape[1])
        if states.ndim != 3 or states.shape[:2] != wanted:
            raise Unsuited(
                f"its layers hand on states of the shape {list(states.shape)}, not one vector for each token"
            )
        self.width, self.dtype, self.tokens = states.shape[2], states.dtype, states.shape[1]
        before = _random_state(device)
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            self._tried(given, train=True)
            self.draws = not all(map(torch.equal, before, _random_state(device)))

    def _tried(self, inputs: Mapping[str, Any], train: bool) -> tuple[Tensor, list[nn.Module]]:
        """What the frozen part gives for the inputs, and the modules that were finished by then."""
        finished: list[nn.Module] = []
        modes = {module: module.training for module in self.model.modules()}
        handles = [module.register_forward_hook(lambda m, *_: finished.append(m)) for module in modes]
        device = next(self.model.parameters()).device.type
        try:
            for module in modes:
                module.training = train
            with (
                self.spliced(),
                torch.no_grad(),
                torch.autocast(device, self.autocast, enabled=self.autocast is not None),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")  # checkpoints that re-enter autograd miss it here
                self.computes = True
                self.model(**inputs)
        except _Reached as reached:
            return reached.states, finished
        finally:
            self.computes = False
            for module, mode in modes.items():
                module.training = mode
            for handle in handles:
                handle.remove()
        raise Unsuited("a forward pass does not come by its layers")

    @contextlib.contextmanager
    def spliced(self) -> Iterator[None]:
        """Let ``compute`` end a forward pass inside above the frozen layers, and ``instead`` take the place of their result."""
        own = [block.__dict__.get("forward") for block in self.frozen]
        for block in self.frozen:
            instead = self._last if block is self.frozen[-1] else self._lower
            block.forward = functools.partial(instead, block.forward)
        try:
            yield
        finally:
            for block, forward in zip(self.frozen, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _lower(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.instead is None:
            return forward(*args, **kwargs)
        return args[0] if args else kwargs["hidden_states"]

    def _last(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.computes:
            raise _Reached(forward(*args, **kwargs))
        if self.instead is None:
            return forward(*args, **kwargs)
        embedded: Tensor = args[0] if args else kwargs["hidden_states"]
        states = self.instead
        # Checkpoints that re-enter autograd have made the embeddings' output require a gradient, and need it of theirs.
        return states.requires_grad_() if embedded.requires_grad and torch.is_grad_enabled() else states

    def compute(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The hidden states (B, T, width) above the frozen layers, for what the model's body is called with; inside
        ``spliced``."""
        self.computes = True
        try:
            with torch.no_grad():
                self.body.forward(*args, **kwargs)
        except _Reached as reached:
            return reached.states
        finally:
            self.computes = False
        raise RuntimeError("a forward pass did not come by the frozen layers.")

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Keep the frozen part in evaluation mode, whatever mode the model is put in."""
        own = [module for module in self.below if "train" not in module.__dict__]
        modes = [module.training for module in own]
        for module in own:
            module.training = False
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, misc]
        try:
            yield
        finally:
            for module, mode in zip(own, modes, strict=True):
                del module.train
                module.training = mode

    def origin(self) -> str:
        """Of what the states are made: weights, precision, and the code that computes them."""
        config = getattr(self.body, "config", None)
        about = (
            fingerprint(nn.ModuleList(self.below), as_held=True),
            config.to_json_string() if config is not None else "",
            *map(str, (type(self.body), self.depth, self.dtype, self.autocast, torch.__version__)),
            transformers.__version__,
            str(getattr(config, "_attn_implementation", "")),
            next(self.model.parameters()).device.type,
        )
        return hashlib.sha256("\n".join(about).encode()).hexdigest()[:32]


def _body(model: nn.Module, block: nn.Module) -> nn.Module:
    """The smallest of Transformers' models that a layer is in: what comes with a head is around it."""
    around = [
        m for m in model.modules() if isinstance(m, PreTrainedModel) and any(part is block for part in m.modules())
    ]
    if not around:
        raise Unsuited(f"{type(model).__name__} is no model of Transformers")
    return around[-1]


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


# -- which example is which --------------------------------------------------------------------------------------------


class Identity:
    """What tells a batch's examples apart, and where their tokens are. It has no ``to``, so that it stays on the CPU.

    Attributes:
        keys: a digest of each example's inputs, without padding.
        tokens: the columns (n) of each example's tokens, of ``length`` columns; None where every column is one.
    """

    def __init__(self, keys: list[bytes], tokens: list[Tensor] | None = None, length: int = 0) -> None:
        self.keys, self.tokens, self.length = keys, tokens, length


def identified(batch: Mapping[str, Any]) -> Identity:
    """The identity of a batch of tensors (B, …) on the CPU. Padding is what an ``attention_mask`` (B, T) hides."""
    tensors = {name: x for name, x in sorted(batch.items()) if isinstance(x, Tensor) and x.ndim}
    mask = tensors.get("attention_mask")
    tokens, length = None, 0
    if mask is not None and mask.ndim == 2:
        tokens, length = [row.nonzero().flatten() for row in mask], mask.shape[1]
    count = len(next(iter(tensors.values())))
    keys = []
    for i in range(count):
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        if tokens is not None:
            digest.update(_bytes(tokens[i]))  # positions may be counted from the left, with padding there
        for name, x in tensors.items():
            row = x[i] if len(x) == count else x
            if tokens is not None and row.ndim and len(row) == length:
                row = row[tokens[i]]
            digest.update(f"{name} {row.dtype} {list(row.shape)}".encode())
            digest.update(_bytes(row))
        keys.append(digest.digest())
    return Identity(keys, tokens, length)


def _bytes(x: Tensor) -> Any:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy()


class Identifying:
    """A collator that adds its batch's ``Identity``."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        batch = self.collate(items)
        batch[TOLD] = identified(batch)
        return batch


# -- training with it --------------------------------------------------------------------------------------------------


class FrozenPrefix:
    """Lets a training pass over known examples begin above the frozen part.

    Attributes:
        read, computed: how many examples came from the file, and how many went through the frozen layers.
    """

    def __init__(self, part: FrozenPart, kept: KeptStates) -> None:
        self.part, self.kept = part, kept
        self.read = self.computed = 0
        self._batch: Identity | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The model inside takes kept states for the batches that ``batch`` names; other passes are its own."""
        body = self.part.body
        before = body.register_forward_pre_hook(self._before, with_kwargs=True)
        after = body.register_forward_hook(self._after, always_call=True)
        try:
            with self.part.spliced(), self.part.evaluating():
                yield
        finally:
            before.remove()
            after.remove()

    @contextlib.contextmanager
    def batch(self, identity: Identity) -> Iterator[None]:
        """The next forward pass inside is of this batch."""
        self._batch = identity
        try:
            yield
        finally:
            self._batch = None

    def _before(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        identity, self._batch = self._batch, None
        if identity is not None:
            self.part.instead = self._states(identity, args, kwargs)

    def _after(self, *_: Any) -> None:
        self.part.instead = None

    def _states(self, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The states (B, T, width) of a batch, computed where they are not kept. At padding they are zeros, or what was computed."""
        keys, count = identity.keys, len(identity.keys)
        missing = [i for i, key in enumerate(keys) if key not in self.kept]
        there = [i for i in range(count) if i not in set(missing)]
        self.read, self.computed = self.read + len(there), self.computed + len(missing)
        computed = None
        if missing:
            wanted = functools.partial(_rows, missing if there else None, count)
            computed = self.part.compute([wanted(x) for x in args], {name: wanted(x) for name, x in kwargs.items()})
            self._keep(identity, missing, computed)
            if not there:
                return computed
        device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        kept = self.kept.get([keys[i] for i in there], pinned=device.type == "cuda").to(device, non_blocking=True)
        length = identity.length or len(kept) // len(there)
        if computed is None and len(kept) == count * length:
            return kept.view(count, length, -1)
        states = kept.new_zeros(count, length, self.part.width)
        tokens = identity.tokens or [torch.arange(length)] * count
        places = torch.cat([tokens[i] + i * length for i in there])
        states.view(count * length, -1).index_copy_(0, places.to(device), kept)
        if computed is not None:
            states[missing] = computed
        return states

    def _keep(self, identity: Identity, missing: list[int], computed: Tensor) -> None:
        """Keep what was computed of some examples, along their tokens."""
        if self.kept.full:
            return
        length = computed.shape[1]
        flat, counts = computed.reshape(-1, self.part.width), [length] * len(missing)
        if identity.tokens is not None:
            tokens = [identity.tokens[i] for i in missing]
            counts = [len(one) for one in tokens]
            if sum(counts) < len(flat):
                places = torch.cat([one + j * length for j, one in enumerate(tokens)])
                flat = flat[places.to(flat.device)]
        self.kept.put([identity.keys[i] for i in missing], counts, flat)


def _rows(rows: list[int] | None, count: int, x: Any) -> Any:
    """These rows of a tensor (B, n, …), and anything else as it is."""
    return x[rows] if rows is not None and isinstance(x, Tensor) and x.ndim > 1 and len(x) == count else x
