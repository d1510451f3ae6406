"""The verifier's decisions without a model: rounds, slots, turns, placement, and what it reads of logs and machines."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.engine.argv import ServerOptions, server_argv
from tightwad_agent.engine.verifier import abi, rounds, sampling, slots, threads, turn
from tightwad_agent.engine.verifier.journal import MAX_LINES, Journal, Lacking, lacking
from tightwad_agent.engine.verifier.loading import recorded_build
from tightwad_agent.engine.verifier.placement import ALL_LAYERS, HEAD, fault, placement
from tightwad_agent.engine.verifier.slots import Slots
from tightwad_agent.wire.verify import GREEDY, Ended, Load, Rollback, Sampling

ids = st.lists(st.integers(0, 5), max_size=12)


class TestRounds:
    @given(sequence=ids, tail=ids, at=st.integers(0, 12))
    def test_a_draft_that_agrees_is_cut_to_what_is_ahead(self, sequence: list[int], tail: list[int], at: int) -> None:
        draft = [*sequence[at:], *tail]
        found = rounds.ahead(draft, at, sequence)
        assert found == (tail if at <= len(sequence) else [])

    @given(sequence=st.lists(st.integers(0, 5), min_size=1, max_size=12), data=st.data())
    def test_a_draft_that_differs_from_what_was_sampled_is_dropped(
        self, sequence: list[int], data: st.DataObject
    ) -> None:
        at = data.draw(st.integers(0, len(sequence) - 1))
        wrong = data.draw(st.integers(at, len(sequence) - 1))
        draft = [*sequence[at:], 1, 2]
        draft[wrong - at] += 1
        assert rounds.ahead(draft, at, sequence) == []

    def test_a_draft_that_ends_before_the_sequence_does_says_nothing(self) -> None:
        assert rounds.ahead([1, 2], 0, [1, 2, 3]) == []

    @given(draft=st.lists(st.integers(-2, 12), max_size=8))
    def test_what_is_no_token_ends_a_draft(self, draft: list[int]) -> None:
        kept = rounds.sensible(draft, 10, {9})
        assert kept == draft[: len(kept)]
        assert all(0 <= token < 10 for token in kept)
        assert 9 not in kept[:-1]
        if len(kept) < len(draft):
            assert kept[-1:] == [9] or not 0 <= draft[len(kept)] < 10

    @given(draft=ids, said=st.lists(st.integers(0, 5), min_size=13, max_size=13))
    def test_a_round_brings_what_the_model_says_up_to_the_first_difference(
        self, draft: list[int], said: list[int]
    ) -> None:
        asked = []

        def sample(i: int) -> int:
            asked.append(i)
            return said[i]

        tokens = rounds.verify(draft, sample, {5})
        assert asked == list(range(len(tokens)))  # each position once, in order: the generator moves once a token
        assert tokens == said[: len(tokens)]
        n = rounds.agreed(draft, tokens)
        assert tokens[:n] == draft[:n]
        if tokens[-1] != 5:
            assert len(tokens) == n + 1
        else:
            assert 5 not in tokens[:-1]
            assert len(tokens) in {n, n + 1}

    @given(
        n_prompt=st.integers(1, 9), n_new=st.integers(1, 9), max_tokens=st.integers(1, 20), context=st.integers(10, 30)
    )
    def test_a_draft_as_long_as_there_is_room_ends_exactly_at_the_limit(
        self, n_prompt: int, n_new: int, max_tokens: int, context: int
    ) -> None:
        n = rounds.room(n_prompt, n_prompt + n_new, max_tokens, context)
        most = max(n_prompt + n_new + 1, min(n_prompt + max_tokens, context))
        assert n_prompt + n_new + n + 1 <= most
        if n:
            tokens = [0] * (n_prompt + n_new + n + 1)
            assert rounds.ended(tokens, n_prompt, max_tokens, context, {1}) is Ended.LENGTH
            assert rounds.ended(tokens[:-1], n_prompt, max_tokens, context, {1}) is Ended.NOT

    def test_an_eog_token_in_the_prompt_ends_nothing(self) -> None:
        assert rounds.ended([1, 2], 2, 5, 50, {2}) is Ended.NOT
        assert rounds.ended([1, 2, 2], 2, 5, 50, {2}) is Ended.EOG


class TestSlots:
    def slots(self, n: int = 2, rollback: Rollback = Rollback.FULL, window: int = 0, oldest: int = 0) -> Slots:
        return Slots(n, rollback, window, lambda _seq: oldest)

    @given(left=st.lists(st.integers(0, 1), max_size=700), right=st.lists(st.integers(0, 1), max_size=700))
    def test_common_beginning(self, left: list[int], right: list[int]) -> None:
        n = slots.common(left, right)
        assert left[:n] == right[:n]
        assert n == min(len(left), len(right)) or left[n] != right[n]

    @pytest.mark.parametrize("n", [0, 255, 256, 257, 600])
    def test_common_beginning_over_blocks(self, n: int) -> None:
        assert slots.common([*range(n), 7, 7], [*range(n), 8]) == n

    def test_the_slot_with_the_same_beginning_is_taken_and_its_last_token_evaluated_again(self) -> None:
        them = self.slots()
        them.cached[1] = [*range(30)]
        assert them.take([*range(20)]) == (1, 1, 19)

    def test_a_short_common_beginning_does_not_cost_another_conversation_its_cache(self) -> None:
        them = self.slots(rollback=Rollback.WINDOW, window=100)
        them.cached[0] = [*range(50)]
        assert them.take([*range(20), *[7] * 300]) == (1, 1, 0)

    def test_a_few_tokens_are_not_worth_it(self) -> None:
        them = self.slots()
        them.cached[0] = [*range(slots.LEAST - 1), 99]
        assert them.take([*range(slots.LEAST + 5)]) == (1, 1, 0)

    def test_a_busy_slot_lends_its_beginning(self) -> None:
        them = self.slots()
        assert them.take([*range(20)]) == (0, 0, 0)
        them.cached[0] = [*range(20)]
        assert them.take([*range(25)]) == (1, 0, 20)
        assert them.take([1, 2, 3]) is None

    def test_tokens_that_cannot_be_shared_are_evaluated_again(self) -> None:
        them = self.slots(rollback=Rollback.NONE)
        them.take([*range(20)])
        them.cached[0] = [*range(20)]
        assert them.take([*range(25)]) == (1, 1, 0)

    @given(
        n_same=st.integers(0, 60),
        cached=ids,
        prompt=st.lists(st.integers(0, 5), min_size=1, max_size=12),
        oldest=st.integers(-1, 70),
        rollback=st.sampled_from(Rollback),
    )
    def test_what_is_kept_is_a_beginning_of_the_prompt_that_memory_still_covers(
        self, n_same: int, cached: list[int], prompt: list[int], oldest: int, rollback: Rollback
    ) -> None:
        them = self.slots(1, rollback, 20, oldest)
        prompt, cached = [9] * n_same + prompt, [9] * n_same + cached
        them.cached[0] = cached
        grant = them.take(prompt)
        assert grant is not None
        n = grant.n_cached
        assert n < len(prompt)
        assert prompt[:n] == cached[:n]
        if n and rollback is Rollback.NONE:
            assert n == len(cached)
        if n and rollback is Rollback.WINDOW:
            assert oldest <= max(0, n - 20)
        most = min(len(prompt) - 1, slots.common(prompt, cached))
        if rollback is Rollback.FULL:
            assert n == (most if most >= slots.LEAST else 0)

    def test_idle_slots_are_evicted_oldest_first_and_busy_ones_never(self) -> None:
        them = self.slots(3)
        for seq in range(3):
            them.take([seq + 1])
            them.cached[seq] = [seq + 1]
        them.release(1)
        them.release(0)
        assert [them.evict(), them.evict(), them.evict()] == [1, 0, None]
        assert them.cached == [[], [], [3]]


class TestTurns:
    @given(wants=st.lists(st.integers(0, 50), max_size=8), budget=st.integers(-5, 200))
    def test_a_budget_is_divided_without_waste_or_envy(self, wants: list[int], budget: int) -> None:
        given_ = turn.fill(wants, budget)
        assert all(0 <= got <= want for got, want in zip(given_, wants, strict=True))
        assert sum(given_) == min(sum(wants), max(0, budget))
        least = min((got for got, want in zip(given_, wants, strict=True) if got < want), default=None)
        assert least is None or max(given_) <= least + 1

    @given(
        drafts=st.lists(st.integers(0, 100), max_size=8),
        prompts=st.lists(st.integers(1, 5000), max_size=8),
        chunk=st.integers(1, 600),
    )
    def test_shares_fit_and_everybody_moves(self, drafts: list[int], prompts: list[int], chunk: int) -> None:
        batch, n_outputs = 64, 40
        shares = turn.divide(drafts, prompts, batch=batch, n_outputs=n_outputs, chunk=chunk)
        assert sum(shares.drafts) + len(drafts) + sum(shares.prompts) <= batch
        assert sum(shares.drafts) + len(drafts) + len(prompts) <= n_outputs
        assert all(n >= 1 for n in shares.prompts)
        assert sum(shares.prompts) <= max(chunk, len(prompts))
        assert all(n <= want for n, want in zip(shares.drafts, drafts, strict=True))

    def test_a_prompt_beside_rounds_takes_about_as_long_as_they_do(self) -> None:
        pace = turn.Pace(512)
        for _ in range(100):
            n = pace.chunk(beside=True)
            pace.took(0.030, n_rounds=3, n_prompt=0)
            pace.took(0.030 + 0.001 * n, n_rounds=3, n_prompt=n)
        assert 20 <= pace.chunk(beside=True) <= 40

    def test_a_slow_machine_still_takes_some_of_a_prompt(self) -> None:
        pace = turn.Pace(512)
        for _ in range(50):
            pace.took(60.0, n_rounds=0, n_prompt=pace.chunk(beside=False))
        assert pace.chunk(beside=False) == turn.SMALLEST
        for _ in range(50):
            pace.took(0.01, n_rounds=0, n_prompt=pace.chunk(beside=False))
        assert pace.chunk(beside=False) == 512

    def test_who_is_slow_is_not_waited_for(self) -> None:
        assert turn.worth_waiting([0.5, 0.1], 0.0, 0.002) == 0
        assert turn.worth_waiting([0.5, 0.001], 0.0, 0.002) == 0.002
        assert turn.worth_waiting([0.001], 0.0015, 0.002) == pytest.approx(0.0005)
        assert turn.worth_waiting([0.001], 0.01, 0.002) == 0
        assert turn.worth_waiting([], 0.0, 0.002) == 0

    def test_patience_is_a_small_part_of_a_turn(self) -> None:
        assert turn.patience(0.010) == pytest.approx(0.0008)
        assert turn.patience(10.0) == turn.LONGEST_WAIT_S


def load(**fields: object) -> Load:
    return Load("/lib", "/model.gguf", 4096, **fields)  # type: ignore[arg-type]


class TestPlacement:
    """The same as llama-server is told by `engine.argv`."""

    def flags(self, asked: Load) -> dict[str, str]:
        options = ServerOptions(
            model=asked.model,
            port=1,
            context=asked.context,
            rpc_ports=asked.rpc_ports,
            rpc_shares=asked.rpc_shares,
            local_devices=asked.local_devices,
            local_shares=asked.local_shares,
            offload_layers=None if asked.offload_layers < 0 else asked.offload_layers,
        )
        argv = server_argv("llama-server", options)
        return {argv[i]: argv[i + 1] for i in range(len(argv) - 1) if argv[i].startswith("-")}

    @pytest.mark.parametrize(
        "asked",
        [
            load(rpc_ports=(7001, 7002), rpc_shares=(5, 0, 3)),
            load(rpc_ports=(7001,), rpc_shares=(5,), local_devices=("CUDA0",), local_shares=(9,), offload_layers=7),
            load(rpc_ports=(7001,), rpc_shares=(5,), offload_layers=0),
            load(local_devices=("CUDA0",), local_shares=(9,)),
            load(),
        ],
    )
    def test_equals_the_flags(self, asked: Load) -> None:
        flags, here = self.flags(asked), placement(asked)
        assert fault(asked, 16) == ""
        assert flags["-dev"] == (",".join(here.devices) or "none")
        assert flags.get("-ts", "") == ",".join(map(str, here.shares))
        layers = "all" if here.gpu_layers == ALL_LAYERS else str(here.gpu_layers)
        assert flags.get("-ngl", "all") == layers
        assert flags.get("-ot", "") == (f"{HEAD}=CPU" if here.head_on_cpu else "")

    @pytest.mark.parametrize(
        "asked",
        [
            load(rpc_ports=(7001,)),
            load(rpc_shares=(1,)),
            load(rpc_ports=(0,), rpc_shares=(1,)),
            load(rpc_ports=(1 << 16,), rpc_shares=(1,)),
            load(rpc_ports=(7001, 7001), rpc_shares=(1, 1)),
            load(rpc_ports=(7001,), rpc_shares=(1,) * 16),
            load(rpc_ports=(7001,), rpc_shares=(1,), local_devices=("CUDA0",)),
            load(local_devices=("CUDA0",), local_shares=(1, 2)),
        ],
    )
    def test_what_does_not_go_together_has_a_reason(self, asked: Load) -> None:
        assert fault(asked, 16)


class TestSampling:
    def test_ordinary_settings_are_fine(self) -> None:
        assert sampling.fault(Sampling(), 10) == ""
        assert sampling.fault(GREEDY, 10) == ""

    @pytest.mark.parametrize(
        "asked",
        [
            Sampling(temperature=-1.0),
            Sampling(temperature=1e30),
            Sampling(top_p=1.5),
            Sampling(min_p=-0.1),
            Sampling(repeat_penalty=0.0),
            Sampling(presence_penalty=1e30),
            Sampling(frequency_penalty=-1e30),
            Sampling(repeat_last_n=-2),
            Sampling(logit_bias=((10, 1.0),)),
            Sampling(logit_bias=((-1, 1.0),)),
            Sampling(logit_bias=((1, 1e30),)),
        ],
    )
    def test_what_cannot_be_computed_has_a_reason(self, asked: Sampling) -> None:
        assert "out of range" in sampling.fault(asked, 10)

    def test_penalties_that_change_nothing_are_none(self) -> None:
        assert not sampling.penalized(Sampling())
        assert not sampling.penalized(Sampling(repeat_penalty=1.3, repeat_last_n=0))
        assert sampling.penalized(Sampling(frequency_penalty=0.1))


class TestJournal:
    @pytest.mark.parametrize(
        ("line", "found"),
        [
            ("ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 2048", Lacking(2048, "CPU")),
            (
                "alloc_tensor_range: failed to allocate RPC1[127.0.0.1:7] buffer of size 99",
                Lacking(99, "RPC1[127.0.0.1:7]"),
            ),
            ("allocating 512.50 MiB on device 1: cudaMalloc failed: out of memory", Lacking(537395200, "device 1")),
            ("output_reserve: failed to allocate output buffer of size 2.00 MiB", Lacking(2 << 20, "CPU")),
        ],
    )
    def test_says_which_buffer_could_not_be_had(self, line: str, found: Lacking) -> None:
        assert lacking(["all is well", line, "failed to allocate CUDA0 buffer of size 1"]) == found

    def test_nothing_was_lacking(self) -> None:
        assert lacking(["error loading model: tensor 'x' is missing"]) is None

    def test_keeps_the_last_lines_and_the_first_error(self) -> None:
        out: list[bytes] = []
        journal = Journal(out.append)
        journal.note(4, b"it broke\n")
        journal.note(1, b"debug\n")
        journal.note(2, b"....")
        journal.note(4, b"so that broke too\n")
        for i in range(200):
            journal.note(2, b"line %d\n" % i)
        journal.note(5, b"and more \xff\n")
        assert len(journal.lines) == MAX_LINES
        assert journal.lines[-1] == "and more \N{REPLACEMENT CHARACTER}"
        assert journal.cause() == "it broke"
        assert b"debug\n" not in out
        assert out[0] == b"it broke\n"

    def test_a_failing_log_does_not_reach_the_library(self) -> None:
        def full(_line: bytes) -> None:
            raise OSError("no space")

        Journal(full).callback(4, b"x\n", None)


class TestBuild:
    """Whether a library is the one these layouts are for."""

    class Library:
        def __init__(self) -> None:
            self.model, self.context, self.chain = abi.ModelParams(), abi.ContextParams(), abi.ChainParams()
            for params, values in (
                (self.model, abi.MODEL_DEFAULTS),
                (self.context, abi.CONTEXT_DEFAULTS),
                (self.chain, abi.CHAIN_DEFAULTS),
            ):
                for name, value in values.items():
                    setattr(params, name, value)
            self.version = b"0.6.0-dev"

        def llama_version(self) -> bytes:
            return self.version

        def llama_model_default_params(self) -> abi.ModelParams:
            return self.model

        def llama_context_default_params(self) -> abi.ContextParams:
            return self.context

        def llama_sampler_chain_default_params(self) -> abi.ChainParams:
            return self.chain

    def test_every_field_has_an_expected_value(self) -> None:
        for kind, values in (
            (abi.ModelParams, abi.MODEL_DEFAULTS),
            (abi.ContextParams, abi.CONTEXT_DEFAULTS),
            (abi.ChainParams, abi.CHAIN_DEFAULTS),
        ):
            assert [name for name, _kind in kind._fields_] == list(values)

    def test_the_right_one_is_taken(self) -> None:
        abi.check(self.Library())

    def test_another_version_is_named(self) -> None:
        library = self.Library()
        library.version = b"0.7.0"
        with pytest.raises(abi.NoFit, match=r"version 0\.7\.0"):
            abi.check(library)

    def test_a_new_field_in_the_middle_shows(self) -> None:
        library = self.Library()
        data = bytes(library.context)
        moved = data[:28] + b"\0\0\0\0" + data[28:-4]
        library.context = abi.ContextParams.from_buffer_copy(moved)
        with pytest.raises(abi.NoFit, match="n_threads is 0, not 4"):
            abi.check(library)

    def test_a_missing_library_is_no_fit(self, tmp_path: Path) -> None:
        with pytest.raises(abi.NoFit, match="ggml-base"):
            abi.load(tmp_path)

    def test_names_by_system(self) -> None:
        assert [abi.file_name("llama", system) for system in ("linux", "darwin", "win32")] == [
            "libllama.so",
            "libllama.dylib",
            "llama.dll",
        ]

    @pytest.mark.parametrize(
        ("text", "build"),
        [('{"build": "b11434"}', "b11434"), ('{"build": 3}', ""), ("[1]", ""), ("{", ""), ("[" * 60000, "")],
    )
    def test_what_was_written_down_about_it(self, tmp_path: Path, text: str, build: str) -> None:
        assert recorded_build(tmp_path) == ""
        (tmp_path / "tightwad-engine.json").write_text(text)
        assert recorded_build(tmp_path) == build

    def test_layouts_have_the_sizes_of_the_pinned_build(self) -> None:
        kinds = (abi.ModelParams, abi.ContextParams, abi.Batch, abi.TokenData, abi.TokenDataArray, abi.ThreadPoolParams)
        assert [ctypes.sizeof(kind) for kind in kinds] == [80, 160, 56, 12, 32, 528]


class TestThreads:
    def test_at_least_one(self) -> None:
        assert threads.physical_cores() >= 1

    @pytest.mark.parametrize(
        ("text", "cpus"),
        [("0-3,8", {0, 1, 2, 3, 8}), ("5", {5}), ("", None), ("0-", {0}), ("a", None), ("0-99999999999", None)],
    )
    def test_lists_of_processors(self, text: str, cpus: set[int] | None) -> None:
        assert threads.cpu_list(text) == cpus
