"""Several adapters over one base made into one, exactly or by a lossy method, with its error measured.

A server applies one adapter to a prompt. The weighted sum of low-rank products is itself a low-rank product: with the
factors side by side (`concatenate`) it is exact at the summed rank, and so is the factorization of that (`svd`), whose
largest singular values may be kept to a smaller rank at a measured cost. `linear` averages the factors themselves.
TIES (arXiv 2306.01708) drops small changes and those against the elected sign; DARE (arXiv 2311.03099) drops changes
at random and scales up the rest.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.adapters.folder import Adapter, LowRank, refuse
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EXACT = ("concatenate", "svd")
LOSSY = ("linear", "ties", "dare-linear", "dare-ties")
METHODS = (*EXACT, *LOSSY)
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`, but for 1 (`MaxLoRARanks` of its configuration)."""
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


@dataclasses.dataclass(frozen=True)
class Part:
    """An adapter with its weight."""

    adapter: Adapter
    weight: float


@dataclasses.dataclass(frozen=True)
class Settings:
    """How parts are composed."""

    method: str = "concatenate"
    rank: int = 0
    """Largest rank of the result; 0: what the method needs."""
    density: float = 0.5
    """Share of the changes that TIES and DARE keep."""
    seed: int = 0
    """Seed of what DARE drops and of the sketch of a factorization."""


@dataclasses.dataclass(frozen=True)
class Composition:
    """Parts composed into one."""

    modules: Mapping[str, LowRank]
    """Of one rank, with scale 1, in 32 bits."""
    rank: int
    errors: Mapping[str, float]
    """By module: the norm of the difference from the exact weighted sum, relative to that sum's norm (Frobenius)."""

    @property
    def largest_error(self) -> float:
        """The error of the worst module."""
        return max(self.errors.values(), default=0.0)


def compose(parts: Sequence[Part], settings: Settings) -> Composition:
    """Compose adapters of one base. Raises TrainerError for parts that do not fit together or a rank nobody serves."""
    _check(parts)
    composed, errors = {}, {}
    for index, name in enumerate(sorted({name for part in parts for name in part.adapter.modules})):
        terms = [
            (part.weight, part.adapter.modules[name]) for part in parts if name in part.adapter.modules and part.weight
        ]
        if not terms:
            continue
        exact = _concatenate(terms)
        made = _make_module(terms, exact, dataclasses.replace(settings, seed=settings.seed + index))
        composed[name] = made
        errors[name] = _measure_error(made, exact)
    if not composed:
        raise TrainerError(
            Reason.INVALID_CONFIG, ExitCode.USAGE, "--adapter: every weight is 0", "Give one adapter another weight."
        )
    rank = fit_rank(max(module.rank for module in composed.values()))
    return Composition({name: _pad(module, rank) for name, module in composed.items()}, rank, errors)


def fit_rank(rank: int) -> int:
    """Return the smallest rank that is served and holds this one. Raises TrainerError when there is none."""
    for served in SERVED_RANKS:
        if rank <= served:
            return served
    raise TrainerError(
        Reason.INVALID_CONFIG,
        ExitCode.USAGE,
        f"--rank: the composed adapter has rank {rank}, vLLM serves {SERVED_RANKS[-1]} at most",
        f"Use --method svd --rank {SERVED_RANKS[-1]}, and look at the error it reports.",
    )


def _check(parts: Sequence[Part]) -> None:
    first = parts[0].adapter
    shapes = {name: (module.shape, first) for name, module in first.modules.items()}
    for part in parts[1:]:
        adapter = part.adapter
        if adapter.base.differs_from(first.base):
            why = f"its base is {adapter.base.label}, that of {first.label} is {first.base.label}"
            raise refuse(adapter.label, why, "Adapters add up over one base only.")
        for name, module in adapter.modules.items():
            shape, owner = shapes.setdefault(name, (module.shape, adapter))
            if shape != module.shape:
                why = f"{name} is {module.shape}, in {owner.label} it is {shape}"
                raise refuse(adapter.label, why, "Adapters add up over one base only.")


def _make_module(terms: Sequence[tuple[float, LowRank]], exact: LowRank, settings: Settings) -> LowRank:
    wanted = settings.rank or exact.rank
    if settings.method == "concatenate":
        if exact.rank > wanted:
            message = f"--rank {wanted}: the adapters' ranks sum to {exact.rank}"
            hint = f"Raise it, leave it out, or use --method svd --rank {wanted} and look at its error."
            raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, message, hint)
        return exact
    if settings.method == "svd":
        return _truncate(exact, wanted)
    if settings.method == "linear":
        return _average(terms)
    return _factorize(_merge_changes(terms, settings), wanted, settings.seed)


def _concatenate(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    import torch

    first = torch.cat([term.first.float() for _, term in terms])
    # The scales go to one side in 64 bits, so that they are rounded once.
    second = torch.cat([(term.second.double() * (weight * term.scale)).float() for weight, term in terms], dim=1)
    return LowRank(first, second, 1.0)


def _truncate(module: LowRank, rank: int) -> LowRank:
    """Return the best approximation of a rank: by the factors' QR, the large product is never made."""
    import torch

    left, left_core = torch.linalg.qr(module.second.double())
    right, right_core = torch.linalg.qr(module.first.double().T)
    inner, values, outer = torch.linalg.svd(left_core @ right_core.T)
    roots = values[:rank].sqrt()
    second = left @ (inner[:, :rank] * roots)
    first = (outer[:rank] * roots[:, None]) @ right.T
    return LowRank(first.float().contiguous(), second.float().contiguous(), 1.0)


def _average(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    if len({term.rank for _, term in terms}) > 1:
        ranks = ", ".join(str(term.rank) for _, term in terms)
        message = f"--method linear: needs equal ranks, these are {ranks}"
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, message, "Use concatenate, which is exact.")
    roots = [math.sqrt(abs(weight * term.scale)) for weight, term in terms]
    signs = [math.copysign(1, weight) for weight, _ in terms]
    first = sum(root * term.first.float() for root, (_, term) in zip(roots, terms, strict=True))
    second = sum(sign * root * term.second.float() for sign, root, (_, term) in zip(signs, roots, terms, strict=True))
    return LowRank(first, second, 1.0)


def _merge_changes(terms: Sequence[tuple[float, LowRank]], settings: Settings) -> Any:
    """Return what a lossy method makes of the changes of a module's weight, each as a whole matrix."""
    import torch
    from peft.utils import merge_utils

    changes = [term.scale * (term.second.float() @ term.first.float()) for _, term in terms]
    weights = torch.tensor([weight for weight, _ in terms])
    merge = {"ties": merge_utils.ties, "dare-linear": merge_utils.dare_linear, "dare-ties": merge_utils.dare_ties}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return merge[settings.method](changes, weights, settings.density)


def _factorize(change: Any, rank: int, seed: int) -> LowRank:
    """Return the factors of a whole matrix at a rank, by a seeded sketch."""
    import torch

    width = min(rank + _OVERSAMPLING, *change.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(change, q=width, niter=_POWER_ITERATIONS)
    roots = values[:rank].sqrt()
    return LowRank((right[:, :rank] * roots).T.contiguous(), (left[:, :rank] * roots).contiguous(), 1.0)


def _measure_error(made: LowRank, exact: LowRank) -> float:
    """Return the relative distance of two products without making either: both are of low rank."""
    import torch

    whole = torch.linalg.norm(_core(exact.second, exact.first))
    second = torch.cat([made.second, -exact.second], dim=1)
    first = torch.cat([made.first, exact.first])
    distance = torch.linalg.norm(_core(second, first))
    return float(distance / whole) if whole else float(distance)


def _core(second: Any, first: Any) -> Any:
    """Return a small matrix with the norm of `second @ first`."""
    import torch

    left = torch.linalg.qr(second.double(), mode="r").R
    right = torch.linalg.qr(first.double().T, mode="r").R
    return left @ right.T


def _pad(module: LowRank, rank: int) -> LowRank:
    """Fill the factors up with zeros, which change nothing."""
    from torch.nn.functional import pad

    missing = rank - module.rank
    return LowRank(pad(module.first, (0, 0, 0, missing)), pad(module.second, (0, missing)), 1.0)
