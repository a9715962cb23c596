"""Statistics: mean and spread of each arm of a comparison, and whether a difference of two arms exceeds the noise."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from bonn_qat.errors import UnknownName
from bonn_qat.studies.comparison import Comparison
from bonn_qat.training.results import RunResult

ArmRuns = list[RunResult]


def arms(comparison: Comparison) -> list[ArmRuns]:
    """The finished runs in the planned order, grouped by scheme and by how the latent weights were initialized."""
    place = {name: index for index, name in enumerate(comparison.planned)}
    found: dict[tuple[str, str], ArmRuns] = {}
    for run in sorted(comparison.results, key=lambda run: place.get(run.name, len(place))):
        if run.epochs:
            found.setdefault(run.arm, []).append(run)
    return list(found.values())


def binary_layers(run: RunResult) -> list[str]:
    """Names of a run's binary layers, from input to output; none for a float network."""
    return [key.removeprefix("scale/") for key in run.epochs[-1] if key.startswith("scale/")]


def labels(comparison: Comparison) -> dict[tuple[str, str], str]:
    """The label of each arm: its title, and the initialization of its latent weights if that differs between arms."""
    firsts = [arm[0] for arm in arms(comparison)]
    several = len({run.latents for run in firsts if binary_layers(run)}) > 1
    return {run.arm: label(run, start=several and bool(binary_layers(run))) for run in firsts}


def label(run: RunResult, *, start: bool) -> str:
    """The title of a run's scheme, shortened; with ``start`` also how its latent weights were initialized."""
    title = textwrap.shorten(run.title, 40, placeholder="…") or run.scheme
    return f"{title} ({_start(run.latents)})" if start else title


def _start(latents: str) -> str:
    # A label may break before the start, but not within it.
    return f"start\N{NO-BREAK SPACE}{latents}"


REFERENCE = "bonn"
NORMAL = 1.96  # two-sided 95% quantile
# Two-sided 95% quantiles of Student's t for 1, 2, ... 30 degrees of freedom; beyond, the last one is a little strict.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NO_SEED, ONE_SEED = "no common seed, so no verdict", "one seed, so no verdict"
LARGER, WITHIN = "larger than the noise", "within the noise"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm over its finished seeds. ``top1`` and ``std`` are in percent, ``mbit`` is in 10^6 bits."""

    scheme: str
    title: str
    bits: str  # weights/activations
    latents: str
    seeds: tuple[int, ...]
    top1: float
    std: float | None  # sample standard deviation over the seeds; None for one seed
    mbit: float
    compression: float
    binary_share: float  # of the MACs, 0 to 1
    flips: float | None  # percent of binary weights that change sign in an epoch, mean over epochs and seeds
    seconds_per_epoch: float

    @property
    def accuracy(self) -> str:
        """Mean ± standard deviation in percent; of one seed its accuracy alone."""
        return f"{self.top1:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Accuracy of a reference arm minus that of another arm, in points, by seed, with both margins of error."""

    reference: str
    other: str
    by_seed: dict[int, float]
    test_images: int
    test_margin: float  # points; half of the 95% interval over test images, as if each arm had its own
    std: float | None  # of one paired difference over the seeds, in points; None if unknown
    dof: int  # degrees of freedom of ``std``

    @property
    def mean(self) -> float:
        """Mean over the seeds that both arms have; NaN if there is none."""
        return fmean(self.by_seed.values()) if self.by_seed else math.nan

    @property
    def seed_margin(self) -> float | None:
        """Half of the 95% interval of the mean over the seeds, in points; None for fewer than two seeds."""
        n = len(self.by_seed)
        return None if self.std is None or n < 2 else student(self.dof) * self.std / math.sqrt(n)

    @property
    def verdict(self) -> str:
        """Whether the mean exceeds both margins, that of the seeds and that of the test images."""
        if self.seed_margin is None:
            return ONE_SEED if self.by_seed else NO_SEED
        return LARGER if abs(self.mean) > max(self.seed_margin, self.test_margin) else WITHIN

    @property
    def statement(self) -> str:
        """Which arm is ahead, and by how much."""
        if not self.by_seed:
            return f"{self.reference} and {self.other}"
        if self.mean == 0:
            return f"{self.reference} is level with {self.other}"
        side = "ahead of" if self.mean > 0 else "behind"
        return f"{self.reference} is {abs(self.mean):.2f} points {side} {self.other}"

    @property
    def noise(self) -> str:
        """Both margins in words; empty without a verdict."""
        if self.seed_margin is None:
            return ""
        seeds = f"±{self.seed_margin:.2f} from {len(self.by_seed)} seeds"
        return f"{seeds}, ±{self.test_margin:.2f} from {self.test_images:,} test images"

    def __str__(self) -> str:
        return f"{self.statement}: {self.verdict}" + (f" ({self.noise})" if self.noise else "")


def student(dof: int) -> float:
    """Two-sided 95% quantile of Student's t distribution with ``dof`` degrees of freedom."""
    return STUDENT[min(dof, len(STUDENT)) - 1]


def rows(comparison: Comparison) -> list[Row]:
    """One row per arm with a finished run, in the planned order."""
    return [_row(arm) for arm in arms(comparison)]


def differences(comparison: Comparison, reference: tuple[str, str] | None = None) -> list[Difference]:
    """Paired differences of a reference arm (scheme, latents) against every other arm.

    Without ``reference``, each BONN arm is compared with the arms that have the same ``latents`` and with float
    networks. Equal latents are not equal outputs, unless they are ``"equal-output"``: BONN's scale starts from the
    float weights, XNOR-Net's from its latents. An arm whose initialization no BONN arm shares is compared with all of
    them. The spread over the seeds is estimated from all arms together (:func:`residual_spread`) if they have two seeds
    in common, else from the two arms alone. Raises UnknownName if no run of ``reference`` is finished.
    """
    by_key = {arm[0].arm: arm for arm in arms(comparison)}
    if reference is not None and reference not in by_key:
        raise UnknownName("arm", "/".join(reference), map("/".join, by_key))
    plain = [key for key in by_key if key[0] == REFERENCE]
    references = [reference] if reference else plain or [key for key in by_key if key[0].startswith(f"{REFERENCE}:")]
    return [
        _difference(comparison, by_key[one], by_key[other])
        for one in references
        for other in by_key
        if other not in references and (reference or _comparable(by_key[other][0], one, references))
    ]


def difference(comparison: Comparison, reference: tuple[str, str], other: tuple[str, str]) -> Difference:
    """The paired difference of two arms, each (scheme, latents), as in :func:`differences`.

    Raises UnknownName for an arm without a finished run.
    """
    by_key = {arm[0].arm: arm for arm in arms(comparison)}
    for arm in (reference, other):
        if arm not in by_key:
            raise UnknownName("arm", "/".join(arm), map("/".join, by_key))
    return _difference(comparison, by_key[reference], by_key[other])


def residual_spread(arms: Sequence[Mapping[int, float]]) -> tuple[float, int] | None:
    """Standard deviation of one paired difference and its degrees of freedom, from ``arms``: seed -> accuracy.

    A randomized block design of A arms and the n seeds that all of them have: ``sqrt(2 S / d)``, where S is the sum of
    the squared residuals after removing the means of arms and seeds, and ``d = (A - 1)(n - 1)``. It assumes the same
    spread in all arms; for two arms it is the standard deviation of their paired differences. None if d is 0.

    >>> residual_spread([{0: 60.0, 1: 62.0}, {0: 50.0, 1: 54.0}])
    (1.4142135623730951, 1)
    """
    common = sorted(set.intersection(*(set(arm) for arm in arms))) if arms else []
    dof = (len(arms) - 1) * (len(common) - 1)
    if not common or dof < 1:
        return None
    grand = fmean(arm[seed] for arm in arms for seed in common)
    effects = {seed: fmean(arm[seed] for arm in arms) - grand for seed in common}
    squares = 0.0
    for arm in arms:
        mean = fmean(arm[seed] for seed in common)
        squares += sum((arm[seed] - mean - effects[seed]) ** 2 for seed in common)
    return math.sqrt(2 * squares / dof), dof


def _row(arm: ArmRuns) -> Row:
    first, accuracies = arm[0], [run.top1 for run in arm]
    return Row(
        scheme=first.scheme,
        title=first.title,
        bits=first.bits,
        latents=first.latents if binary_layers(first) else "-",
        seeds=tuple(run.seed for run in arm),
        top1=fmean(accuracies),
        std=stdev(accuracies) if len(arm) > 1 else None,
        mbit=first.size["mbit"],
        compression=first.size["compression"],
        binary_share=first.size["binary_macs"] / max(first.size["macs"], 1),
        flips=_flips(arm),
        seconds_per_epoch=fmean(run.seconds / len(run.epochs) for run in arm),
    )


def _comparable(other: RunResult, reference: tuple[str, str], references: Iterable[tuple[str, str]]) -> bool:
    shared = {latents for _, latents in references}
    return not binary_layers(other) or other.latents == reference[1] or other.latents not in shared


def _difference(comparison: Comparison, reference: ArmRuns, other: ArmRuns) -> Difference:
    names, images = labels(comparison), int(comparison.data["test"])
    ours, theirs = ({run.seed: run.top1 for run in arm} for arm in (reference, other))
    shares = [fmean(accuracies.values()) / 100 for accuracies in (ours, theirs)]
    everyone = [{run.seed: run.top1 for run in arm} for arm in arms(comparison)]
    std, dof = residual_spread(everyone) or residual_spread([ours, theirs]) or (None, 0)
    return Difference(
        reference=names[reference[0].arm],
        other=names[other[0].arm],
        by_seed={seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())},
        test_images=images,
        test_margin=100 * NORMAL * math.sqrt(sum(p * (1 - p) for p in shares) / images),
        std=std,
        dof=dof,
    )


def _flips(arm: ArmRuns) -> float | None:
    shares = [epoch["flips"] for run in arm for epoch in run.epochs if "flips" in epoch]
    return 100 * fmean(shares) if shares else None
