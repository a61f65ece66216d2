"""A small world in which anything may happen at any time; what must always hold is checked after every step."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import ClassVar

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.operator.builders import NOW, SETTINGS, Build, adaptermerge, ended_pod, finetunejob, job, pod
from tunewright_api.exit_codes import ExitCode
from tunewright_api.v1alpha1.status import RunStatus
from tunewright_operator import naming
from tunewright_operator.kinds import ADAPTERMERGE, FINETUNEJOB, Kind
from tunewright_operator.observed import ObservedJob, ObservedPod, ObservedRun
from tunewright_operator.status import CreateJob, DeleteJobs, current_attempt, decide, is_finished
from tunewright_operator.status.ending import MAX_FREE_RESTARTS

MAX_RESTARTS = 2


class World(RuleBasedStateMachine):
    """One workload, its Jobs and pods, and an operator that may die between its acts."""

    kind: ClassVar[Kind] = FINETUNEJOB
    build: ClassVar[Build] = staticmethod(finetunejob)

    def __init__(self) -> None:
        super().__init__()
        self.now: datetime.datetime = NOW
        self.suspend = False
        self.status: RunStatus = self.kind.status()
        self.jobs: dict[str, ObservedJob] = {}
        self.pods: dict[str, ObservedPod] = {}
        self.created: list[str] = []
        self.final: RunStatus | None = None

    def observe(self, status: RunStatus) -> ObservedRun:
        """Return what a live read shows."""
        name = naming.job_name(self.kind, "bot", current_attempt(status))
        found = self.jobs.get(name)
        named = status.job_ref is not None and status.job_ref.name == name
        return ObservedRun(
            job=found,
            job_gone=found is None and named,
            pod=self.pods.get(name),
            jobs=tuple(self.jobs),
        )

    def reconcile(self, *, dies: bool) -> None:
        """Make one pass; an operator that dies has acted but not written the status."""
        spec = self.build(suspend=self.suspend, retry={"maxRestarts": MAX_RESTARTS}, ttlAfterFinished="1h")
        seen = self.observe(self.status)
        decision = decide(spec, self.status, seen, self.now, SETTINGS)
        if isinstance(decision.action, CreateJob):
            attempt = decision.action.attempt
            name = naming.job_name(self.kind, "bot", attempt)
            assert not is_finished(self.status), "a finished run creates nothing"
            assert name not in self.jobs, "it would have been observed"
            self.created.append(name)
            created = job(attempt, self.kind, created=self.now.strftime("%Y-%m-%dT%H:%M:%SZ"))
            self.jobs[name], self.pods[name] = created, pod(attempt)
            decision = decide(spec, self.status, replace(seen, job=created, pod=self.pods[name]), self.now, SETTINGS)
            assert decision.action is None
        elif isinstance(decision.action, DeleteJobs):
            for name in decision.action.names:
                self.jobs.pop(name, None)
                self.pods.pop(name, None)
        if not dies:
            self.status = decision.status

    @rule()
    def passes(self) -> None:
        """The operator makes a pass."""
        self.reconcile(dies=False)

    @rule()
    def dies_in_a_pass(self) -> None:
        """The operator dies before it has written the status."""
        self.reconcile(dies=True)

    @rule(seconds=st.sampled_from([1, 15, 400, 4000]))
    def time_passes(self, seconds: int) -> None:
        """The clock goes on."""
        self.now += datetime.timedelta(seconds=seconds)

    @rule(value=st.booleans())
    def suspends(self, value: bool) -> None:
        """The user sets spec.suspend."""
        self.suspend = value

    @precondition(lambda self: any(j.finished is None for j in self.jobs.values()))
    @rule(code=st.sampled_from([int(code) for code in ExitCode]))
    def pod_ends(self, code: int) -> None:
        """The running pod ends."""
        name = next(name for name, found in self.jobs.items() if found.finished is None)
        self.jobs[name] = replace(self.jobs[name], finished="Failed" if code else "Complete")
        self.pods[name] = ended_pod(code, self.pods[name].attempt)

    @precondition(lambda self: self.jobs)
    @rule()
    def job_is_deleted(self) -> None:
        """Somebody deletes the newest Job."""
        name = list(self.jobs)[-1]
        del self.jobs[name]
        del self.pods[name]

    @invariant()
    def at_most_one_runs(self) -> None:
        """Never two Jobs at work."""
        assert sum(found.finished is None for found in self.jobs.values()) <= 1

    @invariant()
    def restarts_are_bounded(self) -> None:
        """Neither kind of restart goes over its limit."""
        assert self.status.restarts <= MAX_RESTARTS
        assert self.status.free_restarts <= MAX_FREE_RESTARTS

    @invariant()
    def the_end_is_final(self) -> None:
        """A finished run's status never changes again."""
        if self.final is not None:
            assert self.status == self.final
        elif is_finished(self.status):
            self.final = self.status

    @invariant()
    def deciding_twice_changes_nothing(self) -> None:
        """A pass right after a written pass without an act has nothing to write."""
        spec = self.build(suspend=self.suspend, retry={"maxRestarts": MAX_RESTARTS}, ttlAfterFinished="1h")
        first = decide(spec, self.status, self.observe(self.status), self.now, SETTINGS)
        second = decide(spec, first.status, self.observe(first.status), self.now, SETTINGS)
        if first.action is None and second.action is None:
            assert second.status == first.status


World.TestCase.settings = hypothesis_settings(max_examples=100, stateful_step_count=40, deadline=None)
TestWorld = World.TestCase


class MergeWorld(World):
    """The same of an AdapterMerge."""

    kind = ADAPTERMERGE
    build = staticmethod(adaptermerge)


MergeWorld.TestCase.settings = hypothesis_settings(max_examples=50, stateful_step_count=40, deadline=None)
TestMergeWorld = MergeWorld.TestCase
