"""What can be chosen, checked before anything is sent."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypedDict

import torch

from arc_topk import _C

TWO_COLLECTIVES = ("arc_topk", "low_rank")
COMPRESSORS = ("arc_topk", "dense", "low_rank", "rand_k", "top_k")
FEEDBACKS = ("ef14", "ef21", "ef21m", "none")
WIRE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8)
SKETCH_DTYPES = (torch.bfloat16,)
WARMUPS = ("exponential", "linear")
STATE_DTYPES = (torch.float32, torch.bfloat16)
DEFAULT_ETA = 0.1
_SOME = 8  # names that an error lists


@dataclass(frozen=True, kw_only=True)
class Config:
    """How gradients are averaged. Ranks must agree: a difference is an error on every rank.

    All fields are keywords.

    Attributes:
        compressor: ``"arc_topk"`` (arXiv 2510.26709), ``"low_rank"`` (PowerSGD's form: Vogels,
            Karimireddy, Jaggi, NeurIPS 2019), ``"top_k"``, ``"rand_k"`` or ``"dense"``. ARC-Top-K
            is the default because its time is small and the same at every ratio. It loses as little
            as low rank at 10 % of dense bytes (ratio 0.3), and much more at 2.5 %
            (docs/results.md); low rank's time grows with its columns (docs/algorithm.md).
        feedback: ``"ef14"``, ``"ef21"``, ``"ef21m"`` (the paper's, EF21-SGDM of Fatkhullin et al.,
            NeurIPS 2023) or ``"none"``. EF14 is the default because it reached lower losses at
            equal bytes in every trial of ours, with half of EF21M's state: docs/algorithm.md.
            Low rank takes ``"ef14"`` or ``"none"`` only.
        ratio: kept share of a matrix's rows (Top-K: of its elements), in (0, 1]. The share of
            *bytes* is larger by the sketch and the tensors that stay dense: see ``State.plan()``.
            Low rank: share of a matrix's bytes that its two factors may take, one column at least.
        ratios: ratios of some parameters of their own, by patterns of names as ``State.plan()``
            shows them: ``{"*embed*": 0.02, "head.*": 1}``. ``*``, ``?`` and ``[...]`` are the
            shell's (`fnmatch.fnmatchcase`); the first pattern that matches counts, and where none
            does, ``ratio``. 1 leaves a parameter dense (in the sketches' type on a narrower wire;
            low rank on bytes has nothing dense, and sends it whole, in bytes). Not with ``rank``.
            Kept as a tuple of pairs.
        rank: low rank's k, the columns of its factors, 1 or more, the same for every matrix (at
            most min(m, n)); None: by ``ratio``. A step costs about ``6 d k`` multiplications and as
            many additions for d elements: docs/algorithm.md has what that comes to.
        sketch_dim: r, the columns of the sketch, from 1 to 64. A sketch costs ``4 r`` bytes a row
            (``2 r`` with ``sketch_dtype``).
        row_width: None keeps whole rows (dimension 0 against the rest). An integer c keeps runs of
            c elements, and then compresses 1-D tensors too. Rand-K over single elements: 1.
        eta: EF21M's momentum, in (0, 1]; None means 0.1. With any other feedback it must be None.
        start_step: synchronised backward passes of plain averaging before compression begins.
        warmup_steps: steps behind ``start_step`` in which the ratio, that of ``ratios`` too, falls
            from near 1 to what it is for good (Lin et al., ICLR 2018), in eight stages: each makes
            payloads anew. Not with ``rank``. 0: none.
        warmup: ``"exponential"``: stage s of S has ``ratio ** (s / (S + 1))``; or ``"linear"``:
            ``1 + (ratio - 1) * s / (S + 1)``.
        wire_dtype: what rows, and low rank's second factor, travel in. None: ``torch.uint8`` with
            ``"arc_topk"`` and ``"low_rank"`` under EF14, because it lost least at equal bytes in
            every trial of ours (docs/results.md), the first behind bfloat16 sketches; with all
            else, and beside a ``sketch_dtype`` of low rank's, the gradient's dtype. What a narrower
            type rounds away stays in the error feedback. ``torch.uint8``, with these two alone:
            integers, which cannot overflow and sum exactly, in a unit that the ranks agree on row
            by row, for one more number of the first collective each. They have 127 / N levels
            either way of zero for N ranks; above 32 ranks bfloat16 takes their place. Low rank
            sends all that it sends in them: both factors, for 2 N bytes a column more, and 1-D
            tensors too, with error feedback of their own (docs/algorithm.md).
        sketch_dtype: what the first collective travels in, with ``"arc_topk"`` and ``"low_rank"``:
            sketches, low rank's first factor, and tensors that stay dense where ``wire_dtype`` is
            narrower than the gradient's. None: float32 (low rank with ``wire_dtype=torch.uint8``:
            that, and nothing else), but bfloat16 before bytes that are the default themselves; or
            ``torch.bfloat16``, half the bytes. float64 gradients always keep float64 sketches. What
            that rounds of a sketch, or of a first factor, loses nothing of the gradient; a dense
            tensor is rounded as torch's own ``bf16_compress_hook`` rounds it. A matrix whose rows
            or factors would be no fewer bytes than that stays dense.
        state_dtype: what error feedback is kept in: None or ``torch.float32``, or
            ``torch.bfloat16``. float64 gradients always keep float64 state.
        seed: of the random projection V, of Rand-K's draw and of low rank's first basis, in
            [0, 2**64). torch's own generators are not touched.
        spike_limit: a number above 1, or None. Each rank scales a bucket's gradients down, before
            anything else is done with them, to at most so many times their running norm: error
            feedback would keep a spike and hand it out over many steps. 3 is what was measured;
            what it costs, and what it does not replace: docs/clipping.md.
        check_every: every so many steps all ranks compare the rows that they selected and what they
            now hold (the shared estimate, else the average), and raise an error on every rank where
            these differ. One small collective a bucket more, and a pass over the result, in those
            steps alone; on a GPU the host waits in them. 0: never.
        resync_every: EF21's and EF21M's shared estimate drifts away from the mean of the ranks' own
            by what sums on the wire round. Every so many steps it is set to that mean again, at
            dense bytes. None: 32 on a bfloat16 wire, 2048 on a float16 or uint8 one, 512 on a
            float32 one (docs/algorithm.md has what is left). 0: never. With any other feedback, and
            with ``"top_k"``, whose values are not summed on their way, nothing drifts.
        adaptive: all ranks choose together, bucket by bucket, between plain averaging, plain
            averaging in bfloat16 (of float32 gradients; they are rounded once, and then summed in
            it) and compression: what ends a step soonest, and the gentlest of what is as fast
            within noise. The first seven steps try each form; every 24th step they choose again, by
            what collectives and the hook's own work took meanwhile. ``State.plan()`` says what was
            chosen, and why. With feedback ``"ef14"`` or ``"none"``, for gradients on the CPU: what
            EF14 still owes goes along with the first plain average. What is chosen depends on
            times: two runs do not end with the same bits.

    Raises:
        ValueError, TypeError: a field's value is not one of the above; the message names the field,
            the value and what is expected.
    """

    compressor: str = "arc_topk"
    feedback: str = "ef14"
    ratio: float = 0.1
    ratios: Mapping[str, float] | tuple[tuple[str, float], ...] | None = None
    rank: int | None = None
    sketch_dim: int = 4
    row_width: int | None = None
    eta: float | None = None
    start_step: int = 0
    warmup_steps: int = 0
    warmup: str = "exponential"
    wire_dtype: torch.dtype | None = None
    sketch_dtype: torch.dtype | None = None
    state_dtype: torch.dtype | None = None
    seed: int = 0
    spike_limit: float | None = None
    check_every: int = 0
    resync_every: int | None = None
    adaptive: bool = False

    def __post_init__(self) -> None:
        _one_of("compressor", self.compressor, COMPRESSORS)
        _one_of("feedback", self.feedback, FEEDBACKS)
        if self.compressor == "low_rank" and self.feedback not in ("ef14", "none"):
            raise ValueError(
                f"feedback is '{self.feedback}' with compressor='low_rank', which has no such "
                "form; expected 'ef14' (the default) or 'none'"
            )
        self._take("ratio", _share("ratio", self.ratio))
        self._take("ratios", _shares("ratios", self.ratios))
        if self.rank is not None:
            self._take("rank", _integer("rank", self.rank, 1, 2**31 - 1))
            if self.compressor != "low_rank":
                raise ValueError(
                    f"rank is {self.rank} with compressor='{self.compressor}'; only compressor="
                    "'low_rank' has one: leave rank out, or choose compressor='low_rank'"
                )
            if self.ratios:
                raise ValueError(
                    f"rank is {self.rank} with ratios={self.ratios}; rank is every matrix's, and "
                    "no ratio would count: leave one of them out"
                )
        self._take("sketch_dim", _integer("sketch_dim", self.sketch_dim, 1, 64))
        if self.row_width is not None:
            self._take("row_width", _integer("row_width", self.row_width, 1, 2**31 - 1))
        if self.eta is not None:
            if self.feedback != "ef21m":
                raise ValueError(
                    f"eta is {self.eta} with feedback='{self.feedback}'; only feedback='ef21m' has "
                    "a momentum: leave eta out, or choose feedback='ef21m'"
                )
            self._take("eta", _share("eta", self.eta))
        self._take("start_step", _integer("start_step", self.start_step, 0, 2**62))
        self._take("warmup_steps", _integer("warmup_steps", self.warmup_steps, 0, 2**31 - 1))
        _one_of("warmup", self.warmup, WARMUPS)
        if self.warmup_steps and (self.compressor == "dense" or self.rank is not None):
            why = f"rank={self.rank}" if self.rank is not None else "compressor='dense'"
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} with {why}, where no ratio counts that could "
                "fall; expected 0, or a compressor that goes by ratio"
            )
        if self.wire_dtype is not None:
            _one_of("wire_dtype", self.wire_dtype, WIRE_DTYPES)
        if self.wire_dtype == torch.uint8 and self.compressor not in TWO_COLLECTIVES:
            raise ValueError(
                f"wire_dtype is torch.uint8 with compressor='{self.compressor}'; expected "
                "compressor='arc_topk' or 'low_rank', whose first collective tells all ranks the "
                "units: choose one of these, or wire_dtype=torch.bfloat16"
            )
        if self.sketch_dtype is not None:
            _one_of("sketch_dtype", self.sketch_dtype, SKETCH_DTYPES)
            if self.compressor not in TWO_COLLECTIVES:
                raise ValueError(
                    f"sketch_dtype is {self.sketch_dtype} with compressor='{self.compressor}', "
                    "which has no sketches; expected None, or compressor='arc_topk' or 'low_rank'"
                )
            if self.compressor == "low_rank" and self.wire_dtype == torch.uint8:
                raise ValueError(
                    f"sketch_dtype is {self.sketch_dtype} with compressor='low_rank' and "
                    "wire_dtype=torch.uint8, which sends both factors as bytes; expected None"
                )
        if self.state_dtype is not None:
            _one_of("state_dtype", self.state_dtype, STATE_DTYPES)
        self._take("seed", _integer("seed", self.seed, 0, 2**64 - 1))
        if self.spike_limit is not None:
            self._take("spike_limit", _factor("spike_limit", self.spike_limit))
        self._take("check_every", _integer("check_every", self.check_every, 0, 2**62))
        if self.resync_every is not None:
            self._take("resync_every", _integer("resync_every", self.resync_every, 0, 2**62))
        self._check_adaptive()

    def _check_adaptive(self) -> None:
        if not isinstance(self.adaptive, bool):
            raise TypeError(
                f"adaptive is {self.adaptive!r} ({type(self.adaptive).__name__}); expected True or "
                "False"
            )
        if self.adaptive and self.compressor == "dense":
            raise ValueError(
                "adaptive is True with compressor='dense', which leaves nothing to choose; "
                "expected a compressor, or adaptive=False"
            )
        if self.adaptive and self.feedback not in ("ef14", "none"):
            raise ValueError(
                f"adaptive is True with feedback='{self.feedback}', whose estimates grow old while "
                "gradients are averaged plainly; expected feedback='ef14' or 'none'"
            )

    @property
    def wire(self) -> torch.dtype | None:
        """``wire_dtype`` with its default filled in; None: the gradient's dtype."""
        if self.wire_dtype is not None:
            return self.wire_dtype
        both_are_bytes = self.compressor == "low_rank" and self.sketch_dtype is not None
        on_bytes = self.compressor in TWO_COLLECTIVES and self.feedback == "ef14"
        return torch.uint8 if on_bytes and not both_are_bytes else None

    @property
    def sketch(self) -> torch.dtype | None:
        """``sketch_dtype`` with its default filled in; None: float32, or the gradient's float64."""
        if self.compressor == "arc_topk" and self.wire_dtype is None and self.wire == torch.uint8:
            return torch.bfloat16
        return self.sketch_dtype

    def ratio_of(self, name: str) -> float:
        """The ratio of the parameter of this name."""
        return next((r for p, r in self._patterns() if fnmatchcase(name, p)), self.ratio)

    def check_names(self, names: Sequence[str]) -> None:
        """Raises ValueError for a pattern of ``ratios`` that matches none of ``names``."""
        for pattern, _ in self._patterns():
            if not any(fnmatchcase(name, pattern) for name in names):
                some = ", ".join(f"'{name}'" for name in names[:_SOME])
                more = f" and {len(names) - _SOME} more" if len(names) > _SOME else ""
                raise ValueError(
                    f"ratios has the pattern '{pattern}', which matches no parameter; expected one "
                    f"that matches some of {some or 'none'}{more}: mend it, or leave it out"
                )

    def _patterns(self) -> tuple[tuple[str, float], ...]:
        return self.ratios if isinstance(self.ratios, tuple) else ()

    def _take(self, name: str, value: object) -> None:
        """NumPy's numbers are taken as Python's, which print and compare alike on every rank."""
        object.__setattr__(self, name, value)

    def native(self) -> _C.Config:
        """The same for the engine, defaults filled in."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["ratios"]  # told with the names: `_C.Exchange.bind`
        fields["eta"] = DEFAULT_ETA if self.eta is None else self.eta
        fields["wire_dtype"], fields["sketch_dtype"] = self.wire, self.sketch
        return _C.Config(**fields)


class Fields(TypedDict, total=False):
    """`Config`'s fields, as keywords of whatever takes them instead of a `Config`."""

    compressor: str
    feedback: str
    ratio: float
    ratios: Mapping[str, float] | tuple[tuple[str, float], ...] | None
    rank: int | None
    sketch_dim: int
    row_width: int | None
    eta: float | None
    start_step: int
    warmup_steps: int
    warmup: str
    wire_dtype: torch.dtype | None
    sketch_dtype: torch.dtype | None
    state_dtype: torch.dtype | None
    seed: int
    spike_limit: float | None
    check_every: int
    resync_every: int | None
    adaptive: bool


def config_from(config: Config | None, fields: Mapping[str, Any]) -> Config:
    """``config``, or one of ``fields``; not both."""
    if config is None:
        _check_names(fields)
        return Config(**fields)
    if fields:
        raise TypeError(f"give either config or its fields, not both; got {sorted(fields)} as well")
    if not isinstance(config, Config):
        raise TypeError(f"config is {config!r} ({type(config).__name__}); expected arc_topk.Config")
    return config


def _check_names(fields: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(Config)]
    for name in fields:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean '{similar[0]}'? " if similar else ""
            raise TypeError(f"there is no field '{name}': {meant}Config has {', '.join(known)}")


def _one_of(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} is {value!r}; expected one of {names}")


def _share(name: str, value: object) -> float:
    number = _number(name, value, "a number in (0, 1]")
    if not 0 < number <= 1:
        raise ValueError(f"{name} is {value!r}; expected a number in (0, 1]")
    return number


def _shares(name: str, value: object) -> tuple[tuple[str, float], ...] | None:
    """By pattern, in the order given; None where there are none."""
    expected = "a mapping from patterns of parameter names to ratios in (0, 1], or None"
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if pairs is None:
        return None
    if not isinstance(pairs, tuple) or not all(map(_is_named, pairs)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}")
    return tuple((p, _share(f"{name}[{p!r}]", share)) for p, share in pairs) or None


def _is_named(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)


def _factor(name: str, value: object) -> float:
    expected = "a finite number above 1, or None for no limit"
    number = _number(name, value, expected)
    if not 1 < number < math.inf:
        raise ValueError(f"{name} is {value!r}; expected {expected}")
    return number


def _number(name: str, value: object, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}")
    try:
        return float(value)
    except OverflowError:  # an integer that is larger than any
        return math.inf


def _integer(name: str, value: object, low: int, high: int) -> int:
    expected = f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}")
    if not low <= int(value) <= high:
        raise ValueError(f"{name} is {value!r}; expected {expected}")
    return int(value)
