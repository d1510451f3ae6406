"""Every error the agent raises on purpose.

A class says whose fault it is and in which phase; its message is what a person reads: what was wrong, and what to
do. `code` is the stable machine-readable name, `exit_code` what a command exits with, `http_status` what the
endpoint answers.
"""

from __future__ import annotations

CTRL_C = 130
"""What commands exit with that Ctrl-C ended: 128 and the number of SIGINT, as shells have it."""


class TightwadError(Exception):
    """Something went wrong in a way that was foreseen."""

    code = "error"
    exit_code = 1
    http_status = 500

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


# What the person at the keyboard gave us


class UsageError(TightwadError):
    """A command, option or request that cannot be carried out as given."""

    code = "usage"
    exit_code = 2
    http_status = 400


class ConfigError(UsageError):
    """A configuration file or flag with an unknown key, a wrong type or a value out of range."""

    code = "config"


class TokenError(UsageError):
    """A join token that is damaged, expired, used up or of another cluster."""

    code = "token"
    http_status = 403


# This machine


class EnvironmentFault(TightwadError):
    """This machine lacks something the agent needs."""

    code = "environment"
    exit_code = 3


class PortTaken(EnvironmentFault):
    """A port the agent must listen on belongs to another program."""

    code = "port_taken"


class AgentNotRunning(EnvironmentFault):
    """The command needs a running agent and found none."""

    code = "agent_not_running"
    exit_code = 4


class AgentRunning(EnvironmentFault):
    """The command must not run beside a running agent with the same state directory."""

    code = "agent_running"


class DiskFull(EnvironmentFault):
    """A file would not fit on the disk."""

    code = "disk_full"
    http_status = 507


class StateDamaged(EnvironmentFault):
    """A file in the state directory cannot be read as what it should be."""

    code = "state_damaged"


# The engine


class EngineError(TightwadError):
    """llama.cpp is missing, does not fit or failed."""

    code = "engine"
    exit_code = 5
    http_status = 503


class EngineMissing(EngineError):
    """No engine was found, and none could be downloaded or built."""

    code = "engine_missing"


class EngineBroken(EngineError):
    """An engine was found, but its smoke test failed on this machine."""

    code = "engine_broken"


class EngineMismatch(EngineError):
    """A worker speaks another RPC protocol version or runs another build."""

    code = "engine_mismatch"


# Models


class ModelError(TightwadError):
    """A model cannot be used."""

    code = "model"
    exit_code = 6
    http_status = 400


class UnknownModel(ModelError):
    """No model of that name is in the catalogue."""

    code = "model_not_found"
    http_status = 404


class BadGguf(ModelError):
    """A file that is no GGUF, or a GGUF whose header cannot be trusted."""

    code = "bad_gguf"


class BadManifest(ModelError):
    """A manifest that breaks one of its own rules; nothing of it is used."""

    code = "bad_manifest"


class DoesNotFit(ModelError):
    """No placement on the machines that are here holds the model; the message has the arithmetic."""

    code = "does_not_fit"
    http_status = 503


class OriginError(ModelError):
    """A file could not be fetched from where it was said to be."""

    code = "origin"
    http_status = 502


# Other machines


class PeerError(TightwadError):
    """Another node did something we cannot go on with."""

    code = "peer"
    exit_code = 7
    http_status = 502


class ProtocolError(PeerError):
    """Bytes that are no message of ours, or a message where none was due. The link is closed."""

    code = "protocol"


class WeightsDiffer(ProtocolError):
    """A worker's own copy of a model does not hold what the coordinator's does."""

    code = "weights_differ"


class PeerGone(PeerError):
    """The connection ended, in the middle or between two messages."""

    code = "peer_gone"


class EngineStopped(PeerGone):
    """An engine was ended or stopped from outside, as for a new plan or a machine that is gone: no request did it."""

    code = "engine_stopped"


class PeerSilent(PeerError):
    """The peer did not answer before the deadline."""

    code = "peer_silent"


class PeerUnreachable(PeerError):
    """No address of the node accepted a connection."""

    code = "peer_unreachable"


class PortClosed(PeerUnreachable):
    """The machine answered that nothing listens there: the agent is not running, or not on that port."""

    code = "port_closed"


class PeerRefused(PeerError):
    """The peer understood and said no; the message is its reason."""

    code = "peer_refused"


class NotTrusted(PeerError):
    """The certificate is not of this cluster, or belongs to another node than the one that was meant."""

    code = "not_trusted"


class OutOfDate(NotTrusted):
    """A certificate is good but for its dates: one of the two clocks is wrong, or nobody renewed it."""

    code = "out_of_date"


class NodeRemoved(PeerRefused):
    """A member says that this machine was removed from the cluster. `denial` is the cluster's word for it,
    `lineage` leads to the key that signed."""

    code = "node_removed"
    denial: object = None
    lineage: object = ()


class DialledSelf(PeerError):
    """An address leads back to this very node."""

    code = "dialled_self"


class StaleEpoch(PeerError):
    """A command from a coordinator that has been replaced."""

    code = "stale_epoch"
    http_status = 409


class RemoteError(PeerError):
    """A call on another node failed there; `code` is the remote error's."""

    def __init__(self, message: str, *, code: str = "remote", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


# The endpoint


class NotReady(TightwadError):
    """Nothing can answer right now; `retry_after_s` says when to ask again."""

    code = "not_ready"
    http_status = 503

    def __init__(self, message: str, *, hint: str = "", retry_after_s: int = 2) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class NotBegun(NotReady):
    """The engine was lost or full before it began with a request, which may have waited long for its turn."""


class Unauthorized(TightwadError):
    """A request from another machine without the cluster's API key."""

    code = "unauthorized"
    http_status = 401


class Forbidden(TightwadError):
    """A request this caller may not make."""

    code = "forbidden"
    http_status = 403


class RequestTooLarge(TightwadError):
    """A request with more header or body bytes than the endpoint takes."""

    code = "request_too_large"
    http_status = 413


class ContextOverflow(TightwadError):
    """A prompt is longer than the context that is served."""

    code = "context_length_exceeded"
    http_status = 400


class Unsupported(TightwadError):
    """A field of a request that the engine which serves now cannot honour; `param` names it."""

    code = "unsupported_parameter"
    http_status = 400

    def __init__(self, message: str, *, hint: str = "", param: str = "") -> None:
        super().__init__(message, hint=hint)
        self.param = param
