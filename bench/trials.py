"""What ``bench tune`` tries for a row of a launch.json: neighbours of its configuration, compiled and ordered.

Nothing of this needs a GPU. A neighbour that spills, takes more shared memory than the row may, or launches nothing
else than the present configuration is refused; the others are ordered by the time that ``bench.predict`` predicts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator, Sequence

from bench import configs, launches, predict, sass
from bench.configs import Config, TableRow
from effdet_kernels import _triton
from effdet_kernels.spec import Case, OpSpec, iter_specs
from effdet_kernels.verify import DTYPES

_PRUNED_ON = 6  # calls that candidates are compiled for before any is timed
Compiled = list[tuple[_triton.Launch, sass.Code]]  # the launches of a call


class RefusedError(Exception):
    """Why a configuration is not timed."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The GPU that kernels are compiled for."""

    architecture: int = 90
    shared_kb: int = sass.ARCHITECTURES[90]  # per block


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A call of an op, forward or backward, that takes a row."""

    spec: OpSpec
    case: Case
    dtype: str
    direction: str

    def launches(self, target: Target) -> list[_triton.Launch]:
        backward = self.direction == "backward"
        return launches.of_call(
            self.spec, self.case, DTYPES[self.dtype], target.shared_kb, backward
        )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A neighbour of the present configuration."""

    config: Config
    predicted: float | None  # geometric mean of its predicted time over the present one's
    reason: str = ""  # why it is not timed


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """A row, the calls that take it, and what else it could say."""

    row: TableRow
    uses: Sequence[Use]
    all_uses: int  # without --case
    target: Target
    keep: int

    @functools.cached_property
    def candidates(self) -> list[Candidate]:
        """The best first; those that were refused last."""
        some = self.uses[:: -(-len(self.uses) // _PRUNED_ON)]
        present = [compiled(self, self.row.config, use) for use in some]
        known = {_identities(present): "the present one"}  # configurations, by what they launch
        found = [self._candidate(config, some, present, known) for config in self._configs(present)]
        found.sort(key=lambda candidate: candidate.predicted or math.inf)
        for place, candidate in enumerate(found[self.keep :], self.keep):
            reason = candidate.reason or f"no. {place + 1} by predicted time, {self.keep} are timed"
            found[place] = dataclasses.replace(candidate, reason=reason)
        return found

    def _candidate(
        self,
        config: Config,
        uses: Sequence[Use],
        present: Sequence[Compiled],
        known: dict[tuple[str, ...], str],
    ) -> Candidate:
        try:
            calls = [compiled(self, config, use) for use in uses]
            resident = self._with_resident(config, calls)
            if resident != config:
                config, calls = resident, [compiled(self, resident, use) for use in uses]
            same = known.setdefault(_identities(calls), change := self.change(config))
            if same != change:
                raise RefusedError(f"launches what {same} does")
        except RefusedError as error:
            return Candidate(config, None, str(error))
        ratios = (
            predicted_time(call) / predicted_time(before)
            for call, before in zip(calls, present, strict=True)
        )
        return Candidate(config, statistics.geometric_mean(ratios))

    def _configs(self, present: Sequence[Compiled]) -> Iterator[Config]:
        resident = self._with_resident(self.row.config, present)
        if resident != self.row.config:
            yield resident
        yield from configs.neighbours(self.row)

    def _with_resident(self, config: Config, calls: Sequence[Compiled]) -> Config:
        """RESIDENT, where there is one, as the most programs that a multiprocessor holds in every one of the calls."""
        if "RESIDENT" not in config:
            return config
        launched = [pair for call in calls for pair in call]
        name = f"{self.row.op}_{self.row.kernel}_kernel"
        if all(launch.kernel.__name__ != name for launch, _ in launched):
            # Of a kernel that has rows for parts of its work: bwd_dx of bwd.
            name = f"{self.row.op}_{self.row.kernel.rpartition('_')[0]}_kernel"
        held = (
            code.resident_warps(self.target.architecture) // code.warps
            for launch, code in launched
            if launch.kernel.__name__ == name
        )
        return {**config, "RESIDENT": max(1, min(held, default=config["RESIDENT"]))}

    def change(self, config: Config) -> str:
        """What a configuration changes of the present one: "BLOCK_M 64 > 128"."""
        return configs.difference(self.row.config, config)


# Compiling -----------------------------------------------------------------------------------------


def compiled(trial: Trial, config: Config, use: Use) -> Compiled:
    """The launches of a call with a configuration of a row, and their code.

    Raises:
        RefusedError: a launch that is not as with the present configuration does not compile, spills, or takes more
            shared memory than the row may.
    """
    row, target = trial.row, trial.target
    known = set(_present_identities(trial, use)) if config != row.config else None
    with _triton.configured(*row.place, config):
        try:
            call = [
                (each, launches.compiled(each, target.architecture))
                for each in use.launches(target)
            ]
        except Exception as error:  # Triton's compiler and ptxas fail in many ways
            if known is None:
                raise
            raise RefusedError(f"does not compile: {first_line(error)}") from error
    for launch, code in call:
        if known is None or _identity(launch) in known:
            continue
        name = launch.kernel.__name__
        if code.local:
            raise RefusedError(f"spills: {code.local} bytes a thread of {name}")
        if code.shared > row.shared_kb * 1024:
            raise RefusedError(f"takes {code.shared / 1024:.0f} KB of shared memory in {name}")
    return call


@functools.lru_cache(maxsize=64)
def _present_identities(trial: Trial, use: Use) -> tuple[str, ...]:
    return tuple(_identity(launch) for launch in use.launches(trial.target))


def _identity(launch: _triton.Launch) -> str:
    """Which kernel, how many programs, and the constants."""
    return f"{launch.kernel.__name__} {launch.programs} {sorted(launch.options.items())}"


def _identities(calls: Sequence[Compiled]) -> tuple[str, ...]:
    return tuple(_identity(launch) for call in calls for launch, _ in call)


def predicted_time(call: Compiled) -> float:
    """Seconds, of one launch after another."""
    return sum(predict.predicted(*pair).alone for pair in call)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def depends(use: Use, row: TableRow, target: Target) -> bool:
    """Whether a launch of the call has the row's configuration: a launcher may look at one and take another."""
    other = {**row.config, configs.WARPS: 2 * row.config[configs.WARPS]}
    with _triton.configured(*row.place, other):
        changed = use.launches(target)
    return [*map(_identity, changed)] != [*map(_identity, use.launches(target))]


@functools.cache
def uses_of_rows(labels: tuple[str, ...], target: Target) -> dict[_triton.Place, list[Use]]:
    """By row, the calls of all ops that look at it: one op's backward may be made of another's kernels."""
    found: dict[_triton.Place, list[Use]] = {}
    for spec in iter_specs():
        for direction in ("forward", "backward"):
            if direction not in launches.directions(spec):
                continue
            for case in launches.real_cases(spec):
                for label in labels:
                    if DTYPES[label] in spec.dtypes:
                        use = Use(spec, case, label, direction)
                        with _triton.noted_rows() as places:
                            use.launches(target)
                        for place in places:
                            found.setdefault(place, []).append(use)
    return found
