from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent import config
from tightwad_agent.config import Config, load
from tightwad_agent.errors import ConfigError
from tightwad_agent.ids import Address, NodeName

EMPTY: dict[str, str] = {}


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(path: Path | None = None, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, environ=options.pop("environ", EMPTY), **options)
    return str(caught.value)


def test_it_works_without_any() -> None:
    plain = load(environ=EMPTY)
    assert (plain.mesh_port, plain.endpoint_port, plain.mdns, plain.workers) == (8089, 8088, True, -1)
    assert plain.state_dir.name == "tightwad-agent"
    assert plain.models == plain.state_dir / "models"
    assert type(plain.name) is NodeName


def test_every_key_can_be_set_in_a_file(file: Any) -> None:
    text = """
    state_dir: /s
    cache_dir: ~/c
    models_dir: /m
    max_models_bytes: 200GB
    name: attic
    mesh_port: 0
    endpoint_host: 127.0.0.1
    endpoint_port: 9000
    open_endpoint: true
    max_body_bytes: 2048
    max_head_bytes: 4096
    max_requests: 20
    max_requests_per_client: 5
    max_connections: 60
    max_connections_per_client: 7
    head_timeout_s: 3
    send_timeout_s: 4.5
    mdns: false
    interfaces: [eth0, wlan0]
    seeds: ["10.0.0.1:80", attic.lan, "[fd00::1]:81"]
    engine_dir: /e
    engine_url: http://127.0.0.1:1
    threads: 8
    devices: [CUDA0]
    workers: 2
    max_draft_tokens: 12
    stall_s: 5
    log_level: debug
    log_json: true
    """
    found = load(file(text), environ=EMPTY)
    assert found == Config(
        state_dir=Path("/s"),
        cache_dir=Path("~/c").expanduser(),
        models_dir=Path("/m"),
        max_models_bytes=200 * 10**9,
        name=NodeName("attic"),
        mesh_port=0,
        endpoint_host="127.0.0.1",
        endpoint_port=9000,
        open_endpoint=True,
        max_body_bytes=2048,
        max_head_bytes=4096,
        max_requests=20,
        max_requests_per_client=5,
        max_connections=60,
        max_connections_per_client=7,
        head_timeout_s=3.0,
        send_timeout_s=4.5,
        mdns=False,
        interfaces=("eth0", "wlan0"),
        seeds=(Address("10.0.0.1", 80), Address("attic.lan", 8089), Address("fd00::1", 81)),
        engine_dir=Path("/e"),
        engine_url="http://127.0.0.1:1",
        threads=8,
        devices=("CUDA0",),
        workers=2,
        max_draft_tokens="12",
        stall_s=5.0,
        log_level="debug",
        log_json=True,
    )
    assert found.models == Path("/m")
    assert type(found.stall_s) is float
    keys = {line.split(":")[0].strip() for line in text.splitlines() if line.strip()}
    assert {f.name for f in dataclasses.fields(Config)} - keys == set()


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n"])
def test_an_empty_file_changes_nothing(file: Any, text: str) -> None:
    assert load(file(text), environ=EMPTY) == load(environ=EMPTY)


def test_flags_win_over_the_file_and_the_file_over_the_environment(file: Any) -> None:
    environ = {"TIGHTWAD_STATE_DIR": "/env", "TIGHTWAD_LOG_LEVEL": "error", "TIGHTWAD_ENGINE_DIR": "~/e", "OTHER": "x"}
    assert load(environ=environ).state_dir == Path("/env")
    assert load(environ=environ).engine_dir == Path("~/e").expanduser()
    path = file("state_dir: /file\nlog_level: debug\n")
    assert load(path, environ=environ).state_dir == Path("/file")
    found = load(path, {"state_dir": Path("/flag"), "mesh_port": None}, environ)
    assert (found.state_dir, found.log_level, found.mesh_port) == (Path("/flag"), "debug", 8089)
    assert load(environ={"TIGHTWAD_STATE_DIR": ""}) == load(environ=EMPTY)


def test_the_real_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTWAD_LOG_LEVEL", "warning")
    assert load().log_level == "warning"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: yes", "name: expected text, got true/false ('True')"),
        ("name: 12", "name: expected text, got a number ('12')"),
        ("name: a b", "name: 'a b' is not a NodeName"),
        ("name: 2026-01-02", "name: expected text, got date"),
        ("mesh_port: '8089'", "mesh_port: expected a whole number, got text ('8089')"),
        ("mesh_port: true", "mesh_port: expected a whole number, got true/false"),
        ("mesh_port: 80.0", "mesh_port: expected a whole number, got a number"),
        ("mesh_port: null", "mesh_port: expected a whole number, got NoneType"),
        ("mdns: 1", "mdns: expected true or false, got a number"),
        ("mdns: 'no'", "mdns: expected true or false, got text"),
        ("interfaces: eth0", "interfaces: expected a list, got text ('eth0')"),
        ("interfaces: [1]", "interfaces: expected text, got a number"),
        ("interfaces: {eth0: 1}", "interfaces: expected a list, got a map"),
        ("seeds: ['http://x:1']", "seeds: 'http://x:1' is not an address"),
        ("seeds: [10.0.0.1:99999]", "seeds: '10.0.0.1:99999' is not an address"),
        ("state_dir: []", "state_dir: expected text, got a list"),
        ("state_dir: ''", "state_dir: expected a path, got empty text"),
        ("state_dir: ~nosuchuser0/x", "state_dir: Could not determine home directory"),
        ("stall_s: '5'", "stall_s: expected a number, got text"),
        ("mesh_prot: 1", "mesh_prot: unknown key"),
        ("12: 1", "12: unknown key"),
        ("null: 1", "None: unknown key"),
        ("? [a, b]\n: 1", "not YAML"),
        ("- mesh_port", "expected `key: value` lines, got list"),
        ("just words", "expected `key: value` lines, got str"),
        ("a: [", "not YAML"),
        ("a: b: c", "not YAML"),
        ("\tmesh_port: 1", "not YAML"),
        (b"name: \xff", "not YAML"),
        (b"name: \x00", "not YAML"),
        ("name: 2026-13-45", "not YAML: month must be in 1..12"),
        ("threads: " + "9" * 5000, "not YAML: Exceeds the limit"),
        ("a: " + "[" * 1500, "not YAML"),
        ("!!python/object/apply:os.system [id]", "not YAML"),
        ("name: !!python/name:os.system", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_path_and_the_key(file: Any, text: str | bytes, said: str) -> None:
    path = file(text)
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert said in message


def test_an_unknown_key_lists_those_there_are(file: Any) -> None:
    assert "known keys: cache_dir, devices, endpoint_host, " in refused(file("x: 1"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mesh_port", -1), ("mesh_port", 65536), ("endpoint_port", 70000), ("threads", -1), ("workers", -2),
        ("workers", 17),
        ("stall_s", 0), ("stall_s", ".nan"), ("stall_s", ".inf"), ("max_body_bytes", 0), ("max_body_bytes", 2**32 + 1),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(file: Any, key: str, value: Any) -> None:
    message = refused(file(f"{key}: {value}"))
    assert message.startswith(f"{key}: ")
    assert "is out of range" in message


def test_ranges_hold_for_flags_and_choices_for_all(file: Any) -> None:
    assert refused(overrides={"mesh_port": 70000}).startswith("mesh_port: 70000 is out of range, 0 to 65535")
    assert "'loud' is none of debug, info" in refused(file("log_level: loud"))
    assert "'loud' is none of" in refused(environ={"TIGHTWAD_LOG_LEVEL": "loud"})
    assert refused(environ={"TIGHTWAD_STATE_DIR": "~nosuchuser0"}).startswith("$TIGHTWAD_STATE_DIR: ")


def test_files_that_cannot_be_read_say_why(tmp_path: Path, file: Any) -> None:
    assert refused(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: No such file or directory"
    assert "directory" in refused(tmp_path)
    assert "larger than 1 MiB" in refused(file(b"#" * (config.MAX_CONFIG_BYTES + 1)))


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(environ=EMPTY).mesh_port = 1  # type: ignore[misc]


@settings(deadline=None)
@given(
    st.sampled_from([f.name for f in dataclasses.fields(Config)]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.dates(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_value_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    try:
        converted = config._convert(key, value, f"here: {key}")
    except ConfigError as exc:
        message = exc.message
    else:
        assert dataclasses.replace(Config(), **{key: converted})
        return
    assert message.startswith(f"here: {key}: ")
    assert len(message) < 300


@pytest.mark.parametrize(("text", "says"), [("max_models_bytes: lots", "no size"), ("max_models_bytes: -1", "range")])
def test_a_limit_of_room_that_is_none_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load(tmp_path / "c.yaml", environ={})
    assert "max_models_bytes" in caught.value.message


@pytest.mark.parametrize(("text", "limit"), [("auto", 0), ("1", 1), ("64", 64)])
def test_the_limit_of_draft_tokens(text: str, limit: int) -> None:
    assert load(overrides={"max_draft_tokens": text}, environ={}).max_draft == limit


def test_the_limit_of_draft_tokens_may_be_a_number_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("max_draft_tokens: 8\n")
    assert load(tmp_path / "c.yaml", environ={}).max_draft == 8


@pytest.mark.parametrize("text", ["0", "65", "-1", "many", "", "8.5", "٣", "9" * 5000])
def test_a_limit_of_draft_tokens_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="max_draft_tokens"):
        load(overrides={"max_draft_tokens": text}, environ={})
