"""The errors a user meets: what was asked, what was found, where in the user's model, and what to do."""


class DspError(Exception):
    """Base of every error of `dsp_auto`.

    Reads as one paragraph, the module path first where one is known:

        blocks.3.attn: cannot shard T (51 frames) over 64 ranks: T has 51 places. Use at most 51 ranks.

    asked: what could not be done ("cannot shard T (51 frames) over 64 ranks"), or the whole message.
    found: what stood in the way.
    where: path of the user's module ("blocks.3.attn").
    remedy: what the user can do about it.

    The four parts stay readable as attributes, and errors pickle: they cross from a rank to the launcher.
    """

    def __init__(self, asked: str, found: str | None = None, where: str | None = None, remedy: str | None = None):
        self.asked, self.found, self.where, self.remedy = asked, found, where, remedy
        if found is None and where is None and remedy is None:
            message = asked
        else:
            problem = ": ".join(part.rstrip(".") for part in (where, asked, found) if part)
            message = f"{problem}. {remedy[0].upper()}{remedy[1:].rstrip('.')}." if remedy else f"{problem}."
        # Unpickling calls cls(message) and then restores __dict__, so the one argument is enough.
        super().__init__(message)


class CaptureError(DspError):
    """The model does not export, or the exported program would lose gradients that the model has."""


class LayoutError(DspError):
    """A layout that does not exist: a factor the tensor lacks, one shard too many, mesh dims that clash."""


class ConstraintError(LayoutError):
    """An op of the model has no strategy that the user's constraints leave."""


class MeshError(DspError):
    """The mesh is larger than every shardable factor, or is not a mesh this process knows."""


class NoShardableFactorError(DspError):
    """The model has no factor that the strategy may shard."""


class StrategyError(DspError):
    """An option that does not exist, or that is not possible beside the others: a strategy, an objective, a capacity, a profile
    of hardware, a training state."""


class AgreementError(DspError):
    """The ranks do not hold the same plan, model or inputs."""


class CommunicationError(DspError, RuntimeError):
    """Another rank died, stopped at an error of its own, or did not come within the process group's timeout.

    What is raised on every rank that waited for it. After it, the process group is of no use any more.
    missing: ranks of the world that have not told of the failure themselves: those to look at.
    """

    missing: tuple[int, ...] = ()


class PlanError(DspError):
    """What should be a plan is none, or it is one of another model, mesh or version."""


class RuleError(DspError):
    """The notation of a sharding rule is malformed, or does not fit the op's arguments."""


class ProofError(DspError):
    """Running a rule on shards gave something else than the whole call."""


class InfeasibleError(DspError):
    """No plan fits the memory capacity.

    point: the program point that does not fit ("backward of blocks.3.attn").
    needed_bytes: what the best plan needs there, per device.
    capacity_bytes: what a device may use.
    least_bytes: the smallest peak, per device, that any plan reaches.

    `found` is written from these where it is not given.
    """

    def __init__(
        self,
        asked: str = "no plan fits the memory capacity",
        found: str | None = None,
        where: str | None = None,
        remedy: str | None = None,
        *,
        point: str | None = None,
        needed_bytes: int | None = None,
        capacity_bytes: int | None = None,
        least_bytes: int | None = None,
    ):
        self.point, self.needed_bytes = point, needed_bytes
        self.capacity_bytes, self.least_bytes = capacity_bytes, least_bytes
        if found is None and needed_bytes is not None and capacity_bytes is not None:
            found = (
                f"{point or 'the worst program point'} needs {_size(needed_bytes)} per device, "
                f"{_size(needed_bytes - capacity_bytes)} over the capacity of {_size(capacity_bytes)}"
            )
            if least_bytes is not None:
                found += f"; the least any plan needs is {_size(least_bytes)}"
            remedy = remedy or "use more ranks or a smaller batch"
        super().__init__(asked, found, where, remedy)


def _size(n: int) -> str:
    """Bytes for people: '12 bytes', '3.50 MiB'."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n} bytes"


def first_lines(error: Exception, limit: int = 600) -> str:
    """Another library's error on one line, cut where it goes on for pages."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[:limit] + " …"
