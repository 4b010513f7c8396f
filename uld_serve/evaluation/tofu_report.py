"""All figures of one TOFU log. Called by the eval command. Knows no model and no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from uld_serve.errors import DataError
from uld_serve.evaluation import tofu
from uld_serve.evaluation.eval_log import SECTIONS, EvalLog


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """`probability` is the right answer's, on real authors and world facts over the sum with the wrong ones';
    `truth_ratio` is of what is forgotten or of what is kept, as the section is."""

    n: int
    probability: float
    rougeL_recall: float
    truth_ratio: float

    @classmethod
    def of(cls, name: str, samples: tofu.Samples, variant: tofu.TruthRatio) -> Section:
        has_choice = name in ("real_authors", "world_facts")
        truth_ratio = tofu.truth_ratio_of_forgotten if name == "forget" else tofu.truth_ratio_of_kept
        return cls(
            n=len(samples.loss_N),
            probability=(tofu.normalised_probability if has_choice else tofu.probability)(samples),
            rougeL_recall=tofu.rouge(samples),
            truth_ratio=truth_ratio(samples, variant),
        )


def forget_samples(reference: EvalLog, count: int) -> tofu.Samples:
    """Of a reference for `count` questions. Raises DataError for another number: forget quality compares two models on
    one forget set, and between two sets p tells of the questions."""
    samples = reference.section("forget")
    if len(samples.loss_N) != count:
        raise DataError(
            f"{reference.name} has {len(samples.loss_N)} forget samples where {count} are compared with it; take a "
            "reference's log of the same questions"
        )
    return samples


@dataclass(frozen=True, slots=True, kw_only=True)
class TofuReport:
    variant: tofu.TruthRatio
    model_utility: float
    forget_quality: tofu.ForgetQuality | None
    """None without a reference."""
    sections: Mapping[str, Section]

    @classmethod
    def of(cls, log: EvalLog, reference: EvalLog | None, *, variant: tofu.TruthRatio) -> TofuReport:
        """Raises DataError where a log lacks a section that is needed, or the reference is of other questions."""
        samples = {name: log.section(name) for name in SECTIONS}
        kept = {name: samples[name] for name in SECTIONS if name != "forget"}
        return cls(
            variant=variant,
            model_utility=tofu.model_utility(**kept, variant=variant),
            forget_quality=None
            if reference is None
            else tofu.forget_quality(
                samples["forget"], forget_samples(reference, len(samples["forget"].loss_N)), variant
            ),
            sections={name: Section.of(name, samples[name], variant) for name in SECTIONS},
        )

    def record(self) -> dict[str, object]:
        """For JSON."""
        return {
            "model_utility": self.model_utility,
            "forget_quality": None if self.forget_quality is None else asdict(self.forget_quality),
            "truth_ratio": self.variant,
            "sections": {name: asdict(section) for name, section in self.sections.items()},
        }
