from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent import decide
from tightwad_agent.decide import Entry, catalogue, choose_draft, find, next_version, stem, wanted_files
from tightwad_agent.errors import UnknownModel, UsageError
from tightwad_agent.ids import ModelId, NodeName, SafeName
from tightwad_agent.testing import node_id
from tightwad_agent.wire.rows import HeldModel, ModelFacts, NodeRow, Role, ServeRecord, Want

LLAMA = ModelFacts("llama", "Q4_1", vocab="0123456789abcdef")
GEMMA = ModelFacts("gemma3", "Q4_K", vocab="fedcba9876543210")


def model_id(name: str) -> ModelId:
    return ModelId(hashlib.sha256(name.encode()).hexdigest())


def held(name: str, size: int, have: int | None = None, facts: ModelFacts = LLAMA) -> HeldModel:
    return HeldModel(model_id(name), SafeName(name), size, size if have is None else have, facts)


def row(name: str, *models: HeldModel) -> NodeRow:
    return NodeRow(node_id(name), NodeName(name), Role.NODE, 1, 0, 0, True, 1, 8088, models=models)


BIG, MID, SMALL = held("Big-32B.gguf", 1000), held("Mid-8B.gguf", 500), held("Small-1B.gguf", 100)
OTHER = held("gemma-270m.gguf", 50, facts=GEMMA)
NOTES = held("notes.txt", 10, facts=ModelFacts())


def models(*of: HeldModel) -> dict[ModelId, Entry]:
    return catalogue([row("attic", *of)])


# The catalogue


def test_a_catalogue_counts_the_bytes_of_each_holder() -> None:
    found = catalogue([row("attic", BIG), row("cellar", replace(BIG, have=400)), row("desk")])
    entry = found[BIG.model]
    assert entry.have == {node_id("attic"): 1000, node_id("cellar"): 400}
    assert entry.complete_on == (node_id("attic"),)
    assert entry.holders == {node_id("attic"), node_id("cellar")}
    assert catalogue([]) == {}


def test_a_holder_that_contradicts_the_size_is_left_out_and_facts_come_from_whoever_has_them() -> None:
    first, second, third = sorted(["attic", "cellar", "desk"], key=node_id)
    blank = replace(BIG, facts=ModelFacts())
    found = catalogue([row(third, replace(BIG, size=7)), row(second, BIG), row(first, blank)])
    assert found[BIG.model].facts == LLAMA
    assert found[BIG.model].holders == {node_id(first), node_id(second)}


@pytest.mark.parametrize(("size", "have"), [(0, 0), (-5, 3), (-(2**63), -(2**63))])
def test_a_model_without_bytes_is_a_lie_and_ignored(size: int, have: int) -> None:
    assert catalogue([row("attic", replace(BIG, size=size, have=have))]) == {}


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_whatever_a_row_claims_shares_stay_shares_and_drafts_can_be_chosen(size: int, have: int) -> None:
    wild = replace(SMALL, size=size, have=have)
    found = catalogue([row("attic", wild, BIG, replace(wild, model=model_id("x")))])
    for entry in found.values():
        assert all(0 <= n <= entry.size for n in entry.have.values())
        choose_draft(entry, found, "auto")
    decide.candidates(found)


# Finding


@pytest.mark.parametrize(
    "text",
    [
        "Big-32B.gguf",
        "Big-32B",
        "big-32b",
        "BIG-32B.GGUF",
        "32B",
        "g-32",
        BIG.model,
        BIG.model.short,
        BIG.model.upper(),
    ],
)
def test_a_person_may_say_it_in_many_ways(text: str) -> None:
    assert find(text, models(BIG, MID, SMALL)).model == BIG.model


def test_an_exact_name_wins_over_names_that_contain_it() -> None:
    found = models(held("llama.gguf", 10), held("llama-big.gguf", 20), held("my-llama.gguf", 30))
    assert find("llama", found).name == "llama.gguf"


@pytest.mark.parametrize("text", ["", "nope", "Big-32B.gguf.gguf", BIG.model[:8] + "z", "\x00", "a" * 5000])
def test_an_unknown_model_is_refused_with_what_is_there(text: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        find(text, models(BIG, SMALL))
    assert "Big-32B, Small-1B" in caught.value.hint


def test_an_empty_catalogue_says_how_to_fill_it() -> None:
    with pytest.raises(UnknownModel, match="add"):
        find("x", {})


def test_an_ambiguous_name_lists_the_candidates_by_id() -> None:
    with pytest.raises(UsageError) as caught:
        find("b", models(BIG, MID, SMALL))
    assert all(m.model.short in caught.value.message for m in (BIG, MID, SMALL))


def test_two_files_of_one_name_are_told_apart_by_id() -> None:
    twin = replace(BIG, model=model_id("twin"))
    found = models(BIG, twin)
    with pytest.raises(UsageError):
        find("Big-32B", found)
    assert find(twin.model.short, found).model == twin.model


names = st.from_regex(r"[a-c]{1,3}(\.gguf)?", fullmatch=True)


@given(st.sets(names, max_size=6), st.text("abc.guf", max_size=8))
def test_find_gives_a_model_that_fits_or_an_error_that_names_the_reason(of: set[str], text: str) -> None:
    found = models(*[held(n, 10) for n in of])
    try:
        entry = find(text, found)
    except UnknownModel:
        assert not any(text and text in n for n in of)
    except UsageError:
        assert sum(text in n for n in of) > 1
    else:
        assert text in entry.name
    for name in of:
        if sum(n in (name, name + ".gguf") or stem(n) == name for n in of) == 1:
            assert find(name, found).name == name


# The target


def test_complete_models_stand_for_choice_the_largest_first() -> None:
    half = replace(BIG, have=999)
    assert [e.model for e in decide.candidates(models(SMALL, MID, half, NOTES))] == [MID.model, SMALL.model]
    assert decide.candidates({}) == []


@given(st.permutations([BIG, MID, SMALL, OTHER, held("Also-Big.gguf", 1000)]))
def test_the_choice_does_not_depend_on_the_order(of: list[HeldModel]) -> None:
    assert decide.candidates(models(*of)) == decide.candidates(models(*sorted(of, key=lambda m: m.name)))


# The draft


def test_the_smallest_of_the_same_vocabulary_drafts() -> None:
    found = models(BIG, MID, SMALL, OTHER, NOTES)
    choice = choose_draft(found[BIG.model], found, "auto")
    assert choice.model == SMALL.model
    assert "10%" in choice.reason


def test_no_draft_is_better_than_a_large_incomplete_or_foreign_one() -> None:
    found = models(MID, held("Nearly-8B.gguf", 251), replace(SMALL, have=99), OTHER, NOTES)
    choice = choose_draft(found[MID.model], found, "auto")
    assert choice.model is None
    assert "half the size" in choice.reason


def test_files_without_a_vocabulary_draft_for_nobody() -> None:
    blank, tiny = held("a.gguf", 100, facts=ModelFacts("x")), held("b.gguf", 10, facts=ModelFacts("x"))
    found = models(blank, tiny)
    assert choose_draft(found[blank.model], found, "auto").model is None
    assert choose_draft(found[blank.model], found, tiny.model).model is None


def test_a_draft_by_hand_is_taken_if_it_can_draft() -> None:
    found = models(BIG, MID, OTHER)
    target = found[BIG.model]
    assert choose_draft(target, found, MID.model).model == MID.model
    foreign = choose_draft(target, found, OTHER.model)
    assert foreign.model is None
    assert "another vocabulary" in foreign.reason
    assert choose_draft(target, found, SMALL.model) == decide.DraftChoice(
        None, f"the draft {SMALL.model.short} is no longer in the catalogue"
    )
    assert choose_draft(target, found, BIG.model).model is None, "a model cannot draft for itself"
    assert choose_draft(target, found, "off").model is None


@given(st.text(max_size=64))
def test_a_wish_from_a_peer_may_be_any_text(wish: str) -> None:
    found = models(BIG, SMALL)
    choice = choose_draft(found[BIG.model], found, wish)
    assert choice.model in ((SMALL.model,) if wish == "auto" else (None,))
    assert choice.reason


# What should be where, and versions


def test_target_and_draft_are_wanted() -> None:
    found = models(BIG, SMALL)
    assert wanted_files(ServeRecord(Want.PINNED, BIG.model), found) == {BIG.model, SMALL.model}
    assert wanted_files(ServeRecord(Want.PINNED, BIG.model, draft="off"), found) == {BIG.model}
    assert wanted_files(ServeRecord(Want.NONE, BIG.model), found) == frozenset()
    assert wanted_files(ServeRecord(Want.AUTO), found) == frozenset()
    assert wanted_files(ServeRecord(Want.PINNED, MID.model), found) == frozenset()
    assert wanted_files(ServeRecord(Want.PINNED, BIG.model, draft="damaged"), found) == {BIG.model}


Q8, Q4 = held("Big-32B-Q8_0.gguf", 800), held("Big-32B.Q4_K_M.gguf", 500)
Q2, IQ1 = held("big-32b-IQ2_XS.gguf", 300), held("Big-32B-IQ1_S.gguf", 200)


def test_a_smaller_quantisation_is_of_the_same_model_and_whole_somewhere() -> None:
    f16 = held("Big-32B-F16.gguf", 1000)
    parts = held("Big-32B-Q6_K.gguf", 700, 699)
    foreign = held("Big-32B-Q5_0.gguf", 600, facts=GEMMA)
    tuned, deeper = (
        held("Big-32B-Chat-Q4_0.gguf", 400),
        held("Big-32B-Q3_K_S.gguf", 350, facts=replace(LLAMA, n_layers=9)),
    )
    found = models(f16, parts, foreign, tuned, deeper, Q2, Q4, IQ1, Q8)
    assert [e.model for e in decide.smaller(found[f16.model], found)] == [Q8.model, Q4.model]
    assert [e.model for e in decide.smaller(found[Q4.model], found)] == [Q2.model, IQ1.model]
    assert decide.smaller(found[IQ1.model], found) == []


def test_smaller_ones_are_kept_ready_only_where_that_is_allowed() -> None:
    found = models(Q8, Q4)
    record = ServeRecord(Want.PINNED, Q8.model, draft="off")
    assert wanted_files(record, found) == {Q8.model}
    assert decide.stand_ins(record, found[Q8.model], found) == []
    allowed = replace(record, allow_smaller=True)
    assert wanted_files(allowed, found) == {Q8.model, Q4.model}
    assert [e.model for e in decide.stand_ins(allowed, found[Q8.model], found)] == [Q4.model]
    notes = models(NOTES)
    assert decide.stand_ins(replace(allowed, model=NOTES.model), notes[NOTES.model], notes) == []


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("SmolLM2-135M-F32.gguf", "smollm2-135m"),
        ("m_bf16.gguf", "m"),
        ("m-UD-IQ2_XXS.gguf", "m"),
        ("m-MXFP4_MOE.gguf", "m"),
        ("q4.gguf", "q4"),
        ("Qwen2.gguf", "qwen2"),
    ],
)
def test_the_base_of_a_name(name: str, base: str) -> None:
    assert decide.base(name) == base


small = st.integers(0, 5)


@given(st.tuples(small, small, st.sampled_from(["", "a", "z"])), small)
def test_an_edit_is_newer_than_what_it_replaces(version: tuple[int, int, str], epoch: int) -> None:
    new = next_version(ServeRecord(version=version), epoch, node_id("m"))
    assert new > version
    assert new[0] >= epoch
