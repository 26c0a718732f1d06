"""RunConfig: every knob of one training run, and the run id that follows from it."""

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from samlib.mix import Mix


class UserError(ValueError):
    """Something the user can mend: its text is one sentence that says what, where, and what to do."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows: the sentence alone
        return [f"UserError: {self}"]


def first_line(error: BaseException) -> str:
    """What an error of a library says, as a part of a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


Fraction = Annotated[float, Field(gt=0, le=1)]
Every = Annotated[int, Field(ge=0, le=10**9)]


class RunConfig(BaseModel):
    """One training run. The defaults are the first document's; unknown names and wrong types are refused.

    Intervals are in epochs unless they say steps; 0 means never. What is measured every n epochs is measured after
    epochs n, 2n, ... and always after the last, so an interval larger than `epochs` means "at the end only".

    >>> RunConfig(mix="sam", noise_fraction=0.2).run_id
    'cifar10-resnet18-w64-sam-rho0.05-d1-n0.2-s42-73047286'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # Data
    dataset: Literal["digits", "cifar10", "cifar100", "fashion-mnist", "imagefolder"] = "cifar10"
    root: Annotated[str, Field(min_length=1, max_length=1000)] = "data"  # where the dataset is read from
    image_size: Annotated[int, Field(ge=4, le=512)] | None = None  # pixels a side; None: the dataset's own
    data_fraction: Fraction = 1.0  # of each class of the training set
    noise_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the subset's labels, flipped to another class
    augment: bool = True  # random crop, and flip where mirrored images keep their meaning
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the subset, kept out of training, as noisy
    drop_last: bool = False  # leave out the last, smaller batch of an epoch

    # Model
    model: Literal["resnet6", "resnet10", "resnet18", "resnet34"] = "resnet18"
    stem: Literal["imagenet", "cifar"] = "imagenet"  # 7x7 stride 2 and pooling, or 3x3
    width: Annotated[int, Field(ge=1, le=512)] = 64  # channels of the first stage

    # Optimizer
    mix: str = "sgd"  # see samlib.sam.Mix
    mix_warmup: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of the epochs from SAM's eight numbers to the mix's
    rho: Annotated[float, Field(ge=0, le=1e3)] = 0.05  # radius of SAM's ascent step, and of the probes'
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 100
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = 128
    lr: Annotated[float, Field(gt=0, le=1e3)] = 0.1  # at the first epoch; cosine to zero, epoch by epoch
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 5e-4
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42  # initial weights, batches, augmentation
    data_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None  # subset and label noise; None: the seed

    # What is measured
    eval_every: Annotated[int, Field(ge=1, le=10**9)] = 10  # an evaluation costs up to an epoch's time: not every one
    probe_every: Every = 0  # steps
    probe_rho: Annotated[float, Field(ge=0, le=1e3)] | None = None  # a second radius, for probes and ascent sharpness
    persistence_steps: tuple[Annotated[int, Field(ge=0)], ...] = ()  # reference steps of Experiments 2 and 3
    persistence_lags: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 5, 20)  # steps after them that are probed too
    persistence_window: Annotated[int, Field(ge=1, le=1000)] = 10  # consecutive steps of the running intersection
    threshold_every: Every = 0  # Project 1's table
    noise_every: Every = 0  # what flipped labels bring to g and g', by checkpoint
    sharpness_every: Every = 0  # random-direction and ascent sharpness
    curvature_every: Every = 0  # Hessian eigenvalues, trace, diagonal; the second-order prediction of the codes
    convergence_every: Every = 0  # which parameters' mean gradients differ from zero, over the whole training set
    scan_every: Every = 0  # codes over a grid of rho on fixed weights
    scan_rhos: tuple[Annotated[float, Field(gt=0, le=1e3)], ...] = tuple(
        round(10 ** (-3 + k / 6), 6) for k in range(19)
    )
    measure_samples: Annotated[int, Field(ge=2, le=100_000)] = 512  # images of the fixed sample measured on

    # How it is run
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    graph: bool = True  # on CUDA: the whole step as one graph
    deterministic: bool = False  # on CUDA: such algorithms and no graph (a CPU run always is, for fixed threads)
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    state_seconds: Annotated[float, Field(ge=0, le=1e6)] = 60.0  # at least this long between two resume states
    keep_weights: bool = False

    @field_validator("persistence_steps", "persistence_lags", "scan_rhos", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("*")
    @classmethod
    def _no_negative_zero(cls, value: Any) -> Any:  # which would give one configuration two ids
        return value + 0.0 if isinstance(value, float) else value

    @field_validator("mix")
    @classmethod
    def _known_mix(cls, value: str) -> str:
        Mix.parse(value)
        return value

    @field_validator("scan_rhos")
    @classmethod
    def _increasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("the grid of rho is empty: give at least one positive number, or leave the field out")
        if any(a >= b for a, b in zip(value, value[1:], strict=False)):
            raise ValueError("the grid of rho must increase")
        return value

    @field_validator("root")
    @classmethod
    def _plain_path(cls, value: str) -> str:
        if any(ord(c) < 32 for c in value):
            raise ValueError("a path must not hold control characters")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if len(set(self.persistence_steps)) < len(self.persistence_steps):
            raise ValueError("persistence_steps names a step twice")
        if self.persistence_steps and not self.probe_every:
            raise ValueError("persistence_steps needs probes: set probe_every to a number of steps above 0")
        if self.probe_rho is not None and not (self.probe_every or self.sharpness_every):
            raise ValueError("probe_rho is for probes and sharpness: set probe_every or sharpness_every above 0")
        if self.noise_every and not self.noise_fraction:
            raise ValueError("noise_every needs flipped labels: set noise_fraction above 0, or leave noise_every out")
        if self.mix_warmup and self.mix in ("sgd", "sam"):
            raise ValueError(f"mix_warmup leads from sam to another mix, not to {self.mix}: leave it out")
        return self

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "") -> "RunConfig":
        """The configuration, or a UserError of one sentence a field: where, what was found and what is allowed."""
        if not isinstance(values, dict):
            raise UserError(f"{where}configuration: found {_shown(values)}; it should be a mapping of fields to values")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(where + describe(error, cls)) from None

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON values, sorted by name."""
        return dict(sorted(self.model_dump(mode="json", exclude_defaults=True).items()))

    @property
    def run_id(self) -> str:
        """Readable and unique; follows from the fields that differ from their defaults: new fields rename nothing."""
        text = json.dumps(self.changed(), sort_keys=True, separators=(",", ":"))
        rho = "" if self.mix == "sgd" else f"-rho{self.rho:g}"
        return (
            f"{self.dataset}-{self.model}-w{self.width}-{self.mix}{rho}-d{self.data_fraction:g}-n{self.noise_fraction:g}"
            f"-s{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        )

    @property
    def subset_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def passes(self) -> int:
        """Forward and backward passes a step."""
        return 1 + Mix.parse(self.mix).second_pass

    @property
    def radii(self) -> list[float]:
        """Those of the probes and the ascent sharpness: the run's own, and the one that runs have in common."""
        return [self.rho] + [rho for rho in (self.probe_rho,) if rho not in (None, self.rho)]

    def learning_rate(self, epoch: int) -> float:
        """Cosine annealing by epoch, epoch counted from 0 (torch's CosineAnnealingLR with T_max = epochs)."""
        return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2

    def mix_progress(self, epoch: int) -> float:
        """How far the mix is on its way from SAM's numbers (0) to its own (1) in this epoch, counted from 0."""
        warmup = round(self.mix_warmup * self.epochs, 6)  # 0.1 of 30 epochs are 3, not 3 and a rounding error
        return 1.0 if epoch >= warmup else epoch / warmup

    def due(self, every: int, epochs_done: int) -> bool:
        """Whether something measured every so many epochs is measured after this many: also always after the last."""
        return every > 0 and (epochs_done % every == 0 or epochs_done == self.epochs)


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """A pydantic error as sentences: field, what was found, what is allowed."""
    sentences = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "configuration"
        if item["type"] in ("extra_forbidden", "invalid_key"):
            field = field if field.isprintable() else repr(field)
            sentences.append(f"{field}: there is no such field; the fields are {', '.join(model.model_fields)}")
        else:
            message = item["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
            message = message[0].lower() + message[1:]
            found = "" if field == "configuration" else f"found {_shown(item['input'])}; "
            sentences.append(f"{field}: {found}{message}")
    return "; ".join(sentences)


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.100}"
    except ValueError:  # an integer of more digits than Python prints
        return "a number too long to print"
