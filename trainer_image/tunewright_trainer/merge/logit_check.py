"""Proof that merged files are base and adapter: logits of four runs over the same probe prompts.

All are computed in float32 and layer by layer (lazy_model.py), so that a model of any size is checked in the memory of
its largest layer:

    adapted    base with adapter, as peft runs it: what the merged model stands for
    rounded    the same with the adapter merged by peft and rounded to the number formats of the merged files
    base       the base alone
    merged     the merged files

`merged` must equal `rounded`: both round the same sums, which differ in their last bits at most, so that few weights
fall to the other side. That is far sharper than comparing with `adapted` alone, where rounding to 16 bits hides the
smaller parts of an adapter. How far `rounded` is from `adapted` is what the rounding itself does, and `base` tells how
much there was to be seen.

Shapes: B prompts, T tokens, K compared positions, V vocabulary (or outputs of a classifier: then there is no K).
"""

from __future__ import annotations

import inspect
import json
import math
import resource
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from peft import PeftModel
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedConfig, PreTrainedModel

from tunewright_trainer.errors import InvalidAdapter, InvalidModel, VerificationFailed
from tunewright_trainer.merge.changes import BaseQuantization
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.lazy_model import (
    TORCH_DTYPES,
    LazyWeights,
    attach,
    attach_merging,
    build_empty,
    hooked,
    loaded,
    own_name,
    quantizable,
    with_adapter,
)
from tunewright_trainer.merge.loading import (
    Files,
    check_files,
    check_tokenizer,
    fetch_small,
    has_tokenizer,
    listed_names,
    model_class,
    probe_ids,
)
from tunewright_trainer.merge.verification import LogitsOutcome, LogitsTask, open_location
from tunewright_trainer.storage import Storage

COMPARED_POSITIONS = 16
"""At the end of each prompt; the tokens before have their part in what comes out there."""
FLOAT32_STEPS = 256
"""Largest difference of two ways to compute the same in float32, in rounding steps at the size of the largest logit.
SmolLM2's 30 layers show 17 to 26."""
ROUNDING_SHARE = 0.05
"""Largest difference between the merged model and peft's own rounded merge, as a share of what the rounding itself
makes. SmolLM2 shows 0.0006 to 0.006."""
ROUNDING_STEPS = 8
"""Largest difference that rounding the weights to 16 bits makes in most models, in rounding steps at the size of the
largest logit. SmolLM2 shows 0.4 to 1.8. It may be more where a small change turns a choice: a token goes to another
expert. Then it is what peft's own merge, rounded in the same way, shows."""
_SAME_WEIGHT = 3e-4
"""Norm of the difference of two roundings of the same weight, relative to the weight, that is still no difference."""
_CLEAR = 0.3
"""Share of a difference that a cause leaves unexplained and is still named."""
_TOKEN_LOGITS_DIMENSIONS = 3
"""Prompt, position, vocabulary; a classifier has one row of logits per prompt."""


@dataclass(frozen=True)
class Logits:
    """Of the four runs, BKV or BV, in float32."""

    adapted: torch.Tensor
    rounded: torch.Tensor
    base: torch.Tensor
    merged: torch.Tensor


@dataclass(frozen=True)
class Differences:
    """What `LogitsOutcome` says of logits."""

    max_divergence: float
    allowed_divergence: float
    mean_kl: float
    rounding: float
    deviation: float
    allowed_deviation: float
    effect: float


def check(task: LogitsTask) -> LogitsOutcome:
    """Compare the merged files with base and adapter.

    Raises:
        VerificationFailed: They differ; the message names what is off.
        InvalidAdapter: The adapter is not one of this base.
        InvalidModel: The base cannot be loaded.
    """
    started = time.monotonic()
    storage = Storage(task.storage, local=task.local, pvc_root=task.pvc_root)
    with tempfile.TemporaryDirectory(prefix="tunewright-logits-") as scratch, torch.inference_mode():
        files = []
        for location, name in ((task.base, "base"), (task.merged, "merged")):
            reader = open_location(location, storage)
            fetch_small(reader, Path(scratch) / name)
            files.append(Files(location.uri, Path(scratch) / name, Checkpoint(reader)))
        return Comparison(task, *files).outcome(started)


class Comparison:
    """One check: the models, built when they are needed."""

    def __init__(self, task: LogitsTask, base: Files, merged: Files) -> None:
        self._task = task
        self._base = base
        self._merged = merged
        self._config = merged.config()
        adapter = json.loads((task.adapter / "adapter_config.json").read_text())
        self._kind = model_class(adapter.get("task_type"), self._config)
        dtypes = {TORCH_DTYPES[tensor.dtype] for tensor in merged.checkpoint.tensors.values()}
        self._step = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
        """A rounding step of the coarsest number format in the merged files."""

    def outcome(self, started: float) -> LogitsOutcome:
        """Check files and tokenizer, which takes seconds, then the logits."""
        model, _ = self._merged_model
        check_files(model, self._merged, self._base)
        tokenizer = None
        source, uri = (
            (self._task.adapter, "the adapter")
            if has_tokenizer(self._task.adapter)
            else (self._base.folder, self._base.uri)
        )
        if has_tokenizer(source):
            tokenizer = check_tokenizer(self._merged, source, uri)
        ids_BT = probe_ids(tokenizer, self._task.prompts, self._config.get_text_config().vocab_size)
        logits = self._run(ids_BT)
        differences = measure(logits, self._step, self._task.max_divergence)
        fault = fault_of(logits, differences)
        if fault is not None:
            raise VerificationFailed(f"{fault}{self._culprits()}; nothing is published")
        return LogitsOutcome(
            **vars(differences),
            prompts=len(ids_BT),
            tokens=ids_BT.numel(),
            architecture=type(model).__name__,
            has_chat_template=tokenizer is not None and tokenizer.chat_template is not None,
            notes=notes_of(differences),
            seconds=round(time.monotonic() - started, 1),
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def _run(self, ids_BT: torch.Tensor) -> Logits:
        adapted = run(self._adapted_model, ids_BT)
        if not adapted.isfinite().all():
            raise InvalidAdapter("base with adapter gives logits that are no numbers: one of the two is damaged")
        rounded = adapted
        if self._step > torch.finfo(torch.float32).eps:
            rounded = run(self._rounded_model, ids_BT)
        base = build_empty(self._kind, self._reference_config())
        weights = LazyWeights(base, self._base.checkpoint, may_lack=True)
        self._dequantize(weights, self._adapted_model)
        attach(base, weights)
        return Logits(adapted, rounded, run(base, ids_BT), run(self._merged_model[0], ids_BT))

    @cached_property
    def _merged_model(self) -> tuple[PreTrainedModel, LazyWeights]:
        model = build_empty(self._kind, self._config)
        weights = LazyWeights(model, self._merged.checkpoint)
        attach(model, weights)
        return model, weights

    @cached_property
    def _adapted_model(self) -> PeftModel:
        model = build_empty(self._kind, self._reference_config())
        # What the adapter brings itself, such as a head, its base may lack.
        weights = LazyWeights(model, self._base.checkpoint, may_lack=True)
        adapted, tensors = with_adapter(model, self._task.adapter)
        self._dequantize(weights, adapted)
        attach(adapted, weights, tensors)
        brought = {own_name(name) for name in tensors}
        if lacking := [name for name in weights.lacking if name not in brought]:
            raise InvalidModel(f"{self._base.uri} lacks parameters that the adapter needs: {listed_names(lacking)}")
        return adapted

    @cached_property
    def _rounded_model(self) -> PeftModel:
        # The same modules: nothing is computed without merging from here on.
        attach_merging(self._adapted_model, self._merged_model[1])
        return self._adapted_model

    def _reference_config(self) -> PreTrainedConfig:
        """Return the base's configuration, with what adapters add to their bases: a head, and tokens."""
        config = self._base.config()
        config.get_text_config().vocab_size = self._config.get_text_config().vocab_size
        if self._config.id2label != config.id2label:
            config.id2label, config.label2id = self._config.id2label, self._config.label2id
        return config

    def _dequantize(self, weights: LazyWeights, adapted: PeftModel) -> None:
        """Let the weights that the adapter acts on be what they were when it was trained, if that is asked for."""
        if self._task.dequantized is not None:
            there_and_back = partial(quantized_and_back, quantization=self._task.dequantized)
            weights.transforms = {name: there_and_back for name in quantizable(adapted) if name in weights}

    def _culprits(self) -> str:
        """Say which weights differ from those that peft's merge makes."""
        merged = self._merged_model[1]
        differing = {}
        for name, module in hooked(self._rounded_model):
            hook = module.__dict__["_hf_hook"]
            hook.pre_forward(module)
            for own, tensor in loaded(name, module):
                if own in merged:
                    distance = ((merged[own] - tensor).norm() / tensor.norm()).item()
                    if not distance <= _SAME_WEIGHT:
                        differing[own] = math.inf if math.isnan(distance) else distance
            hook.post_forward(module, None)
        worst = sorted(differing, key=lambda name: differing[name], reverse=True)
        if not worst:
            return ""
        names = list(dict.fromkeys(tensor for name in worst for tensor in merged.tensors_of(name)))
        return f"; of the weights, those differ most: {listed_names(names)}"


@torch.inference_mode()
def run(model: PreTrainedModel | PeftModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the logits of a model, BKV of the last positions or BV."""
    own = model.get_base_model() if isinstance(model, PeftModel) else model
    given: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    if own.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids_BT
    if "logits_to_keep" in inspect.signature(type(own).forward).parameters:
        given["logits_to_keep"] = COMPARED_POSITIONS
    logits: torch.Tensor = model(**given)[0]
    return logits[:, -COMPARED_POSITIONS:].clone() if logits.dim() == _TOKEN_LOGITS_DIMENSIONS else logits


def measure(logits: Logits, step: float, max_divergence: float | None = None) -> Differences:
    """Compare the four runs.

    Args:
        logits: Of them.
        step: A rounding step at 1 of the number format of the merged files, the coarsest where they have several.
        max_divergence: What is allowed between `merged` and `adapted`. Default: what rounding explains.
    """
    largest = logits.adapted.abs().max().item()
    same = FLOAT32_STEPS * torch.finfo(torch.float32).eps * largest
    rounding = _distance(logits.rounded, logits.adapted)
    allowed_deviation = same + ROUNDING_SHARE * rounding
    return Differences(
        max_divergence=_distance(logits.merged, logits.adapted),
        allowed_divergence=max_divergence or max(ROUNDING_STEPS * step * largest, rounding + allowed_deviation),
        mean_kl=_mean_kl(logits.adapted, logits.merged),
        rounding=rounding,
        deviation=_distance(logits.merged, logits.rounded),
        allowed_deviation=allowed_deviation,
        effect=_distance(logits.adapted, logits.base),
    )


def fault_of(logits: Logits, found: Differences) -> str | None:
    """Say what is wrong with the merged model, None where nothing is."""
    if not logits.merged.isfinite().all():
        return "the merged model gives logits that are no numbers"
    if not found.deviation <= found.allowed_deviation:
        return (
            "the merged model does not give the logits of base and adapter: the largest difference from their merge by "
            f"peft is {found.deviation:.3g}, allowed {found.allowed_deviation:.3g}{_likely_cause(logits)}"
        )
    if not found.max_divergence <= found.allowed_divergence:
        return (
            "the merged model does not give the logits of base with adapter: the largest difference is "
            f"{found.max_divergence:.3g}, allowed {found.allowed_divergence:.3g}, of which rounding the merged weights "
            f"explains {found.rounding:.3g}: merge with dtype Float32, or raise verification.maxDivergence"
        )
    return None


def notes_of(found: Differences) -> list[str]:
    """Return what a reader of a good result should know."""
    if found.effect <= found.allowed_deviation:
        return [
            f"the adapter moves no logit of the probe prompts by more than {found.effect:.3g}, less than the "
            f"{found.allowed_deviation:.3g} that comparing logits can tell apart: give verification.prompts of the "
            "kind that it was trained on"
        ]
    if found.rounding > found.effect / 2:
        return [
            f"rounding the merged weights moves logits by up to {found.rounding:.3g}, the adapter by up to "
            f"{found.effect:.3g}: merge with dtype Float32 to keep its smaller effects"
        ]
    return []


def _likely_cause(logits: Logits) -> str:
    """Compare what the merged model adds to the base with what it should."""
    wanted, got = (side - logits.base for side in (logits.rounded, logits.merged))
    if got.norm() < _CLEAR * wanted.norm():
        return "; it gives the logits of the base, as if the adapter had not been applied"
    share = ((wanted * got).sum() / wanted.square().sum()).item()
    rest = (got - share * wanted).norm() / got.norm()
    return f"; it shows {share:.2f} of the adapter's effect" if rest < _CLEAR else ""


def quantized_and_back(weight: torch.Tensor, dtype: torch.dtype, quantization: BaseQuantization) -> torch.Tensor:
    """Return a weight as bitsandbytes gives it back after quantizing it.

    Args:
        weight: In float32.
        dtype: Number format of the base, in which it is quantized and comes back.
        quantization: How.
    """
    if quantization.bits == 8:
        rows, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        whole: torch.Tensor = functional.int8_vectorwise_dequant(rows, scales).to(dtype).float()
        return whole
    kind = quantization.type.lower()
    packed, state = functional.quantize_4bit(
        weight.to(dtype), quant_type=kind, compress_statistics=quantization.double_quant
    )
    back: torch.Tensor = functional.dequantize_4bit(packed, state)
    return back.float()


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def _mean_kl(wanted: torch.Tensor, got: torch.Tensor) -> float:
    # Prompt by prompt: with 250,000 tokens the intermediate results of all would take more memory than the layers.
    sums = [
        kl_div(log_softmax(g, -1), log_softmax(w, -1), log_target=True, reduction="none").sum(-1).mean()
        for w, g in zip(wanted, got, strict=True)
    ]
    # Of equal probabilities it is 0, give or take the last bits.
    return max(0.0, torch.stack(sums).mean().item())
