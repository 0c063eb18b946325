"""What the self-test works on (a model cut short, a few documents), and a step of it in one way or another."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fsdpsft.batch import Sample
from fsdpsft.checkpoint.export import carried_files
from fsdpsft.checkpoint.parameters import full, hf_name
from fsdpsft.checkpoint.tensor_plan import StoredDtypes
from fsdpsft.config.schema import Config, ModelConfig
from fsdpsft.data.batches.loader import Loader, LoaderSettings, Step
from fsdpsft.distributed.mesh import Mesh, choose_device, env_world_size, init_mesh
from fsdpsft.errors import ConfigError
from fsdpsft.filesystem import copy_file
from fsdpsft.model.block_proof import sampled, worst
from fsdpsft.model.load import build_meta_model, load_model_config, load_weights, resolve_model_path
from fsdpsft.model.memory import Work
from fsdpsft.model.sft_model import cut_layers
from fsdpsft.parallelize import ParallelModel, build_model
from fsdpsft.prepare import prepare_data
from fsdpsft.testing import run_distributed
from fsdpsft.tools.tool_keys import whole_number
from fsdpsft.train import train_step

_KEPT = 1 << 16  # gradient entries of a parameter that are compared, at equal distances


@dataclass(frozen=True)
class Options:
    """The tool's own settings; see ``selftest.USAGE``."""

    layers: int = 2
    documents: int = 12
    length: int = 192

    @classmethod
    def parse(cls, values: dict[str, str]) -> Options:
        """Read the values of ``selftest.*``.

        Raises:
            ConfigError: one of them is not usable.
        """
        least = {"layers": 1, "documents": 4, "length": 8}
        return cls(**{key: whole_number(f"selftest.{key}", text, least[key]) for key, text in values.items()})


class Documents:
    """A few samples in memory, as the loader wants a store (see ``loader.SampleStore``)."""

    source_names: tuple[str, ...] = ("self-test",)

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples, self.source_counts = samples, (len(samples),)
        counted = [s.loss_weights[1:] for s in samples]
        self.lengths = np.array([len(s.input_ids) for s in samples], dtype=np.int32)
        self.trained = np.array([(weights > 0).sum() for weights in counted], dtype=np.int32)
        self.weights = np.array([weights.sum(dtype=np.float64) for weights in counted])

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> Sample:
        """One of them."""
        return self.samples[index]

    def describe(self, index: int) -> str:
        """Its name in messages."""
        return f"document {index} of the self-test"


@dataclass(frozen=True)
class Subject:
    """What all checks work on.

    Attributes:
        folder: the model, cut to a few layers.
        own: the ``model`` section of the run under test.
        plain: the same without anything that saves time or memory, in float32.
        packed: whether the run packs documents into one row.
        device: of the run.
        documents: one step's samples.
        heads: query heads of a layer.
        has_experts: whether tokens are routed.
    """

    folder: Path
    own: ModelConfig
    plain: ModelConfig
    packed: bool
    device: torch.device
    documents: Documents
    heads: int
    has_experts: bool

    @property
    def tokens(self) -> int:
        """Of all documents together."""
        return int(self.documents.lengths.sum())


@dataclass(frozen=True)
class Outcome:
    """A step's loss, and for every parameter its gradient at up to 65,536 places."""

    loss: float
    gradients: dict[str, Tensor]

    def difference(self, reference: Outcome) -> float:
        """Largest relative difference of the loss and of any parameter's gradient; see ``block_proof.worst``."""
        loss = abs(self.loss - reference.loss) / abs(reference.loss)
        shared = {name: reference.gradients[name] for name in self.gradients}
        gradient = worst(self.gradients, shared)[1] if shared else 0.0
        return float("nan") if np.isnan(loss + gradient) else max(loss, gradient)


class GradientProbe(torch.optim.Optimizer):
    """Takes the optimiser's place in the train step, and keeps the gradients instead of applying them."""

    def __init__(self, model: nn.Module) -> None:
        """For the trainable parameters of a causal LM."""
        self.named = {hf_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.gradients: dict[str, Tensor] = {}
        super().__init__(list(self.named.values()), {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep every gradient's sample; collective where parameters are sharded."""
        self.gradients = {name: sampled(full(p.grad), _KEPT) for name, p in self.named.items() if p.grad is not None}


@contextmanager
def prepare_subject(config: Config, options: Options) -> Iterator[Subject]:
    """Cut the model and choose the documents; the model's files are deleted at the end.

    Raises:
        UserError: model or data that training would refuse.
    """
    if env_world_size() > 1:
        raise ConfigError("start fsdpsft.selftest without torchrun: it starts its own processes")
    source = resolve_model_path(config.model.partial_pretrain)
    documents = _given_documents(config, options) if config.data.train_files else None
    with tempfile.TemporaryDirectory(prefix="fsdpsft-selftest-") as folder:
        model = write_cut_model(source, Path(folder), config.model, options.layers)
        text = model.config.get_text_config()
        yield Subject(
            Path(folder),
            config.model,
            _plainest(config.model),
            config.use_remove_padding,
            choose_device(config.trainer.device),
            documents or random_documents(options, text.vocab_size),
            text.num_attention_heads,
            any(parameter.ndim > 2 for parameter in model.parameters()),
        )


def write_cut_model(source: Path, folder: Path, settings: ModelConfig, layers: int) -> PreTrainedModel:
    """Write a model of its first ``layers`` layers, without dropout, and return it."""
    config = load_model_config(source, trust_remote_code=settings.trust_remote_code)
    cut_layers(config, layers)
    for name, value in vars(config).items():
        if ("drop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    stored = StoredDtypes.of(source).usual
    model = build_meta_model(
        config, attn_implementation="eager", dtype=stored, trust_remote_code=settings.trust_remote_code
    )
    load_weights(model, source, device="cpu", strict=False)
    for file in carried_files(source):
        copy_file(file, folder / file.relative_to(source))
    model.save_pretrained(folder)
    return model


def _plainest(settings: ModelConfig) -> ModelConfig:
    fsdp = replace(settings.fsdp_config, model_dtype="float32", reduce_dtype="float32", offload_params=False)
    return replace(
        settings,
        fsdp_config=fsdp,
        dtype="float32",
        attn_implementation="sdpa",
        enable_gradient_checkpointing="none",
        activation_offload=False,
        mlp_tiles=1,
        use_liger=False,
        compile="false",
        lora_rank=0,
        lora_adapter_path=None,
    )


def random_documents(options: Options, vocabulary: int) -> Documents:
    """Documents of very different lengths, about a third of their tokens trained."""
    generator = np.random.default_rng(0)
    longest = options.length
    lengths = [longest, 2, *generator.integers(2, max(3, longest // 2), options.documents - 2).tolist()]
    samples = []
    for row, length in enumerate(lengths):
        weights = (generator.random(length) < 1 / 3).astype(np.float32)
        weights[-1] = 1.0
        samples.append(Sample(generator.integers(0, vocabulary, length).astype(np.uint32), weights, row))
    return Documents(samples)


def _given_documents(config: Config, options: Options) -> Documents:
    """The first samples of the training data, cut to ``selftest.length``."""
    store = prepare_data(replace(config, data=replace(config.data, train_batch_size=1, val_files=None))).train
    samples: list[Sample] = []
    for index in range(min(len(store), 50 * options.documents)):
        whole = store.sample(index)
        sample = Sample(whole.input_ids[: options.length], whole.loss_weights[: options.length], len(samples))
        if (sample.loss_weights[1:] > 0).any():
            samples.append(sample)
        if len(samples) == options.documents:
            break
    if not samples:
        raise ConfigError(
            f"no training sample has a trained token in its first {options.length}; raise selftest.length"
        )
    return Documents(samples)


def plain_model(subject: Subject, folder: Path | None = None) -> PreTrainedModel:
    """What transformers makes of a folder, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder or subject.folder,
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=subject.own.trust_remote_code,
    )
    return model.to(subject.device).train()


def reference_outcome(subject: Subject) -> Outcome:
    """The slow and obvious way: one document at a time through transformers, all logits, summed."""
    model, loss = plain_model(subject), 0.0
    probe = GradientProbe(model)
    denominator = float(subject.documents.weights.sum())
    for sample in subject.documents.samples:
        ids = torch.from_numpy(sample.input_ids.astype(np.int64)).to(subject.device)
        weights = torch.from_numpy(sample.loss_weights[1:]).to(subject.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        losses = nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        part = (losses * weights).sum() / denominator
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
    probe.step()
    return Outcome(loss, probe.gradients)


def build(subject: Subject, settings: ModelConfig, mesh: Mesh, *, packed: bool) -> ParallelModel:
    """The trainer's model, for documents as long as the subject's."""
    longest = int(subject.documents.lengths.max())
    work = Work(packed, longest, subject.tokens)
    return build_model(subject.folder, settings, mesh, work, seed=0)


def outcome(
    subject: Subject,
    settings: ModelConfig,
    device: torch.device | str,
    *,
    sp_size: int = 1,
    padded: bool | None = None,
    budget: int | None = None,
) -> Outcome:
    """The trainer's way: its loader, its model, its step, in this process and those it has been started with."""
    padded = not subject.packed if padded is None else padded
    offload = settings.fsdp_config.offload_params
    mesh = init_mesh(choose_device(torch.device(device).type), sp_size=sp_size, shard_alone=offload)
    model = build(subject, settings, mesh, packed=not padded)
    probe = GradientProbe(model.module.causal_lm)
    stats = train_step(model, probe, one_step(subject, mesh, padded=padded, budget=budget), None)
    return Outcome(float(stats.losses[0]), probe.gradients)


def one_step(subject: Subject, mesh: Mesh, *, padded: bool, budget: int | None = None) -> Step:
    """All documents as one optimiser step, for this process's place."""
    settings = LoaderSettings(
        len(subject.documents),
        budget or subject.tokens,
        pad_token_id=0,
        padded=padded,
        max_rows=3 if padded else None,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        sp_size=mesh.sp_size,
    )
    return Loader(subject.documents, settings).step(0)


def together(subject: Subject, reference: Outcome, processes: int, sp_size: int = 1, **fsdp: Any) -> float:
    """The largest difference that any of several processes finds when they take the step together, sharded."""
    settings = replace(subject.plain, fsdp_config=replace(subject.plain.fsdp_config, replicate_size=1, **fsdp))
    device = subject.device.type if enough_gpus(subject, processes) else "cpu"
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    work = partial(outcome, subject, settings, device, sp_size=sp_size)
    found: list[Outcome] = run_distributed(work, processes, backend=backend)
    return max(part.difference(reference) for part in found)


def enough_gpus(subject: Subject, processes: int) -> bool:
    """Whether each process can have a GPU to itself."""
    return subject.device.type == "cuda" and torch.cuda.device_count() >= processes
