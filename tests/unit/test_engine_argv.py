"""Golden command lines: a changed flag must be seen in review."""

import pytest

from tightwad_agent.engine.argv import ServerOptions, server_argv, verifier_argv, verifier_load, worker_argv
from tightwad_agent.engine.verifier.placement import ALL_LAYERS, HEAD, placement
from tightwad_agent.wire.verify import Load

COMMON_TAIL = ["--jinja", "--metrics", "--slots", "--no-ui", "--offline", "--cors-origins", "localhost"]


def head(port: int = 9000, context: int = 4096) -> list[str]:
    return [
        *["/e/llama-server", "--host", "127.0.0.1", "--port", str(port), "-m", "/m/big.gguf", "-c", str(context)],
        *["-b", "512", "-np", "4", "--kv-unified"],
    ]


def options(**changes: object) -> ServerOptions:
    return ServerOptions(**({"model": "/m/big.gguf", "port": 9000, "context": 4096} | changes))  # type: ignore[arg-type]


def test_worker() -> None:
    assert worker_argv("/e/ggml-rpc-server", port=7000, devices=["CUDA0", "CUDA1"], threads=3) == [
        *["/e/ggml-rpc-server", "-H", "127.0.0.1", "-p", "7000", "-d", "CUDA0,CUDA1", "-t", "3"],
    ]


def test_worker_without_threads_lets_llama_cpp_choose_and_never_caches() -> None:
    argv = worker_argv("w", port=7000, devices=["CPU"])
    assert argv == ["w", "-H", "127.0.0.1", "-p", "7000", "-d", "CPU"]


def test_worker_without_devices_would_expose_all() -> None:
    with pytest.raises(ValueError, match="device"):
        worker_argv("w", port=7000, devices=[])


def test_one_machine_without_accelerator() -> None:
    expected = [*head(), "-dev", "none", "--cache-ram", "1024", *COMMON_TAIL]
    assert server_argv("/e/llama-server", options()) == expected


def test_one_machine_with_accelerator_threads_and_alias() -> None:
    asked = options(local_devices=("CUDA0",), local_shares=(8000,), threads=6, alias="big")
    expected = [*head(), "--alias", "big", "-t", "6", "-dev", "CUDA0", "--cache-ram", "1024", *COMMON_TAIL]
    assert server_argv("/e/llama-server", asked) == expected


def test_pool_over_two_workers_keeps_the_head_here() -> None:
    argv = server_argv("/e/llama-server", options(rpc_ports=(7001, 7002), rpc_shares=(3000, 1000)))
    assert argv == [
        *head(),
        *["--rpc", "127.0.0.1:7001,127.0.0.1:7002", "-dev", "RPC0,RPC1", "-ts", "3000,1000", "-ngl", "all"],
        *["--fit", "off", "-ot", r"^(output|token_embd)\.weight=CPU", "--cache-ram", "0"],
        *COMMON_TAIL,
    ]


def test_pool_with_a_local_device_lets_it_hold_the_head() -> None:
    asked = options(rpc_ports=(7001,), rpc_shares=(3, 4), local_devices=("CUDA0",), local_shares=(5,))
    argv = server_argv("/e/llama-server", asked)
    assert argv[argv.index("-dev") + 1] == "RPC0,RPC1,CUDA0"
    assert argv[argv.index("-ts") + 1] == "3,4,5"
    assert "-ot" not in argv


def test_layers_that_stay_here_count_the_head_as_offloaded() -> None:
    argv = server_argv("s", options(rpc_ports=(7001,), rpc_shares=(1,), offload_layers=20))
    assert argv[argv.index("-ngl") + 1] == "21"


def test_a_share_is_never_nothing() -> None:
    argv = server_argv("s", options(rpc_ports=(7001,), rpc_shares=(0, 5)))
    assert argv[argv.index("-ts") + 1] == "1,5"


def test_draft_of_a_pool_stays_off_the_workers() -> None:
    asked = options(rpc_ports=(7001,), rpc_shares=(1,), draft="/m/small.gguf")
    argv = server_argv("s", asked)
    at = argv.index("-md")
    assert argv[at : at + 8] == [
        *["-md", "/m/small.gguf", "--spec-type", "draft-simple", "--spec-draft-n-max", "8", "-devd", "none"],
    ]


def test_draft_of_a_pool_uses_the_local_device() -> None:
    asked = options(rpc_ports=(1,), rpc_shares=(1,), draft="/d", local_devices=("CUDA0",), local_shares=(1,))
    argv = server_argv("s", asked)
    assert argv[argv.index("-devd") + 1] == "CUDA0"


def test_draft_on_one_machine_follows_the_target() -> None:
    argv = server_argv("s", options(draft="/m/small.gguf"))
    assert "-md" in argv
    assert "-devd" not in argv


def test_an_alias_with_a_comma_would_be_two() -> None:
    assert "--alias" not in server_argv("s", options(alias="a,b"))


# The verifier is told the same


def as_told(load: Load) -> dict[str, str]:
    """The flags of llama-server that say what the verifier makes of `load`."""
    here = placement(load)
    flags = {"-m": load.model, "-c": str(load.context), "-np": str(load.slots), "-b": str(load.batch)}
    flags["-dev"] = ",".join(here.devices) or "none"
    if load.threads:
        flags["-t"] = str(load.threads)
    if here.shares:
        flags["-ts"] = ",".join(map(str, here.shares))
    if load.rpc_ports:
        flags["--rpc"] = ",".join(f"127.0.0.1:{port}" for port in load.rpc_ports)
        flags["-ngl"] = "all" if here.gpu_layers == ALL_LAYERS else str(here.gpu_layers)
    if here.head_on_cpu:
        flags["-ot"] = f"{HEAD}=CPU"
    return flags


PLACED = ["-m", "-c", "-np", "-b", "-t", "--rpc", "-dev", "-ts", "-ngl", "-ot"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"threads": 3, "slots": 9},
        {"local_devices": ("CUDA0", "CUDA1"), "local_shares": (8000, 7000)},
        {"rpc_ports": (7001, 7002), "rpc_shares": (3000, 1000)},
        {"rpc_ports": (7001,), "rpc_shares": (0, 5), "offload_layers": 20},
        {"rpc_ports": (7001,), "rpc_shares": (3, 4), "local_devices": ("CUDA0",), "local_shares": (0,)},
        {"rpc_ports": (7001,), "rpc_shares": (3,), "offload_layers": 0, "alias": "big", "draft": "/d"},
    ],
)
def test_the_verifier_places_the_model_as_llama_server_would(changes: dict[str, object]) -> None:
    argv = server_argv("/e/llama-server", options(**changes))
    load = verifier_load("/e", options(**changes))
    assert as_told(load) == {flag: argv[argv.index(flag) + 1] for flag in PLACED if flag in argv}
    assert load.library == "/e"


def test_the_verifier_imports_from_where_the_agent_does_and_nowhere_else() -> None:
    argv = verifier_argv("/usr/bin/python3", fd=7, paths=["/a", "/b"])
    assert argv[:4] == ["/usr/bin/python3", "-I", "-S", "-c"]
    assert argv[5:] == ["7", "/a", "/b"]
