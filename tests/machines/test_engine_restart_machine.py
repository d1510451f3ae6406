"""Any history of starts, exits and resets keeps what the policy promises."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tightwad_agent.engine.restart import GiveUp, Restarter, RestartPolicy

POLICY = RestartPolicy(first_delay_s=0.5, factor=2, max_delay_s=30, max_crashes=5, crash_window_s=60)


class RestartMachine(RuleBasedStateMachine):
    """A model that counts by itself: crashes in a row, without those that a healthy run forgave."""

    def __init__(self) -> None:
        super().__init__()
        self.restarter = Restarter(POLICY)
        self.now = 0.0
        self.crashes = 0
        self.last_delay = 0.0
        self.restarts = 0

    @rule(quarters=st.one_of(st.integers(0, 239), st.integers(240, 10_000)), is_crash=st.booleans())
    def one_run(self, quarters: int, is_crash: bool) -> None:
        uptime = quarters / 4  # exact in binary, as are the delays of the policy
        already = self.restarter.given_up is not None
        self.restarter.started(self.now)
        self.now += uptime
        decision = self.restarter.exited(self.now, "why", crash=is_crash)
        if already:
            assert isinstance(decision, GiveUp)
            return
        forgiven = uptime >= POLICY.crash_window_s
        self.crashes = (0 if forgiven else self.crashes) + is_crash
        if self.crashes >= POLICY.max_crashes:
            assert isinstance(decision, GiveUp)
            assert decision.reason.endswith("why")
            return
        assert not isinstance(decision, GiveUp)
        delay = decision.at - self.now
        assert POLICY.first_delay_s - 1e-6 <= delay <= POLICY.max_delay_s + 1e-6
        if forgiven:
            assert abs(delay - POLICY.first_delay_s) < 1e-6
        else:
            assert delay >= self.last_delay - 1e-6
        self.last_delay = delay
        self.restarts += 1
        self.now = decision.at

    @rule()
    def reset(self) -> None:
        self.restarter.reset()
        self.crashes = 0
        self.last_delay = 0.0

    @invariant()
    def gives_up_exactly_when_it_loops(self) -> None:
        assert (self.restarter.given_up is not None) == (self.crashes >= POLICY.max_crashes)

    @invariant()
    def counts_restarts(self) -> None:
        assert self.restarter.restarts == self.restarts


TestRestartMachine = RestartMachine.TestCase
TestRestartMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
