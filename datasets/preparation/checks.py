"""What would spoil a result: cubes that are no twins, copied seeds, unfinished cubes, other units.

Twins are recognized by the correlation of their curvature, the sum of second differences along the axes:
values are ruled by a few long waves, curvature sees small scales too. Correlation in gevolution twins at
z = 1 and 10: 0.9999 (of values: 0.9999), shifted by one cell 0.4 to 0.7 (0.95), transposed or reversed up to
0.2 (0.36), of different seeds up to 0.15 (0.32), and in synthetic twins of any strength above 0.84.

Twins share the phases of their modes, so the ratio of their power scatters little even in a few planes.

Of a cube with several fields these checks examine the potentials; others may vanish under Newtonian gravity.
"""

import system
from system import UserError

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .. import kernels
from ..cube_file import GRAVITIES, CubeFile
from ..moments import Moments

Cube = NDArray[np.float32]
Floats = NDArray[np.float64]
Key = tuple[int, str]  # seed, gravity

POINTS = 8  # per axis, at which the curvature is compared
TRAINING_POINTS = 6  # ... by training, which should take no time
MIN_CORRELATION = 0.8  # of twins
LINES = 16  # per axis, that training examines for constant values
CHECKED_BYTES = 1 << 30  # cubes up to this size in total are read before a run starts
PLANES = 4  # per cube, whose power is compared
MIN_WAVENUMBER = 5  # theory predicts equal power from here on
MAX_EXCESS = 0.03  # of power
ROUNDING = 1e-15  # power relative to that of the strongest mode, below which a mode was removed
USUAL_STD = (0.5, 2.0)  # of standardized values
SAMPLE_SEEDS = 16  # that `data_warnings` reads
MAX_EXPLAINED = 3  # pairs that a survey compares in all orientations
WORKERS = 2  # one cube is read while another is examined


def check_seeds(cubes: CubeFile, *sets: range) -> None:
    """Raise UserError unless the cubes of these seeds are complete, finite and twins.

    If they have more than CHECKED_BYTES, only the first and last seed of each of the `sets` are read: more
    would delay the start of a run, which checks all pairs when it reads them.
    """
    seeds = list(itertools.chain(*sets))
    if 8 * cubes.num_fields * cubes.size**3 * len(seeds) > CHECKED_BYTES:
        seeds = [seed for part in sets if part for seed in (part[0], part[-1])]
    for seed in seeds:
        check_pair(cubes, seed, *read_pair(cubes, seed))


def read_pair(cubes: CubeFile, seed: int) -> NDArray[np.float32]:
    """The Newtonian and the GR cube of a seed (2, C, N, N, N). Raises UserError."""
    pair = np.empty((2, cubes.num_fields, *(cubes.size,) * 3), np.float32)
    for gravity, cube in zip(GRAVITIES, pair, strict=True):
        cubes.read(seed, gravity, cube)
    return pair


def check_pair(cubes: CubeFile, seed: int, newton: Cube, gr: Cube) -> None:
    """Raise UserError unless two cubes (C, N, N, N) are complete and twins, apart from factors on them.

    This takes 4 % of the time to read them at N = 64, 0.4 % at N = 256.
    """
    for i in cubes.potentials:
        correlation = kernels.twin_correlation(newton[i], gr[i], TRAINING_POINTS, cubes.size // LINES)
        if correlation >= MIN_CORRELATION:
            continue
        if np.isnan(correlation):
            of_gr = not has_constant_line(newton[i])
            problem = f"cube /{cubes.cubes[seed, GRAVITIES[of_gr]].name}: "
            problem += describe_constant((newton, gr)[of_gr][i])
        else:
            problem = (
                f"the cubes of seed {seed} are not twins (correlation {correlation:.2f}, of twins above "
                f"{MIN_CORRELATION}): {explain(newton[i], gr[i])}.\nPair the cubes of one realization."
            )
        raise UserError(
            f"{cubes.path}: {problem}\npython -m datasets inspect {cubes.path} lists all such cubes."
        )


def _correlate(a: Floats, b: Floats) -> float:
    """The lowest correlation of the curvatures (..., POINTS^3) of two cubes' fields."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.min((a * b).sum(-1) / np.maximum(norms, 1e-300)))


def has_constant_line(values: NDArray[np.floating]) -> bool:
    """Whether all values on a line along axis 1 or 2 of a cube, or of some of its planes, are equal.

    A constant plane along any axis has such a line, and so has a block that a killed process never wrote.
    """
    for lines in (values, values.swapaxes(1, 2)):
        candidates = lines[:, :, 0] == lines[:, :, 1]  # few: floating-point values are rarely equal
        if candidates.any() and (lines[candidates] == lines[candidates][:, :1]).all(axis=1).any():
            return True
    return False


def sample_curvature(cube: Cube) -> Floats:
    """The sum of the second differences of a cube along its axes, at POINTS^3 places: (POINTS^3,)."""
    places = np.arange(POINTS) * (len(cube) // POINTS) + len(cube) // POINTS // 2
    values = -6 * cube[np.ix_(places, places, places)].astype(np.float64)
    for axis, step in itertools.product(range(3), (-1, 1)):
        values += cube[np.ix_(*(places + step * (axis == other) for other in range(3)))]
    return values.ravel()


def describe_constant(cube: NDArray[np.floating]) -> str:
    """Where the values of a cube are equal, and why."""
    cause = "The simulation did not finish writing; rerun it."
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        planes = np.flatnonzero(cube.max(axis=others) == cube.min(axis=others))
        if len(planes) == len(cube):
            return f"all values are {cube.flat[0]:g}. {cause}"
        if len(planes):
            return f"planes {system.format_ranges(planes)} along axis {axis} are constant. {cause}"
    lines = sum(int((cube.max(axis=axis) == cube.min(axis=axis)).sum()) for axis in (1, 2))
    return f"{lines} lines are constant. {cause}"


def explain(newton: Cube, gr: Cube) -> str:
    """What distinguishes the GR cube from a twin: shift, orientation, or other initial conditions.

    All 48 orientations are compared at all shifts in cubes of 32^3 cells, the best one at full resolution.
    """
    block = len(newton) // 32
    small, other = (cube.reshape(32, block, 32, block, 32, block).mean((1, 3, 5)) for cube in (newton, gr))
    orientations = itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
    axes, steps = max(orientations, key=lambda way: _match(small, _orient(other, *way))[0])
    peak, shift = _match(newton, _orient(gr, axes, steps))
    if peak < MIN_CORRELATION:
        return "they have different initial conditions"
    differences = [f"its axes are in the order {axes}"] if axes != (0, 1, 2) else []
    differences += [f"axis {axis} is reversed" for axis, step in enumerate(steps) if step < 0]
    differences += [f"it is shifted by {shift} cells"] if any(shift) else []
    return "the GR cube has the same initial conditions, but " + ", ".join(differences)


def _orient(cube: Cube, axes: Sequence[int], steps: Sequence[int]) -> Cube:
    """The original of a cube whose axes were brought into another order, then reversed for steps of -1."""
    return cube[tuple(slice(None, None, step) for step in steps)].transpose(np.argsort(axes))


def _match(a: Cube, b: Cube) -> tuple[float, tuple[int, ...]]:
    """The highest cross-correlation of two periodic cubes' curvature, and the shift of `b` at which it is."""
    size = len(a)
    squares = 2 - 2 * np.cos(2 * np.pi * np.fft.fftfreq(size))
    weights = squares[:, None, None] + squares[:, None] + squares[: size // 2 + 1]
    modes = [np.fft.rfftn(cube) * weights for cube in (a, b)]
    norm = np.prod([np.fft.irfftn(abs(m) ** 2, a.shape, (0, 1, 2))[0, 0, 0] for m in modes]) ** 0.5
    products = np.fft.irfftn(modes[1] * modes[0].conj(), a.shape, (0, 1, 2))
    place = np.unravel_index(products.argmax(), a.shape)
    shift = tuple(int(i) if i <= size // 2 else int(i) - size for i in place)
    return float(products[place] / norm), shift


@dataclass
class Survey:
    """What one pass over the cubes of a file gives, by cube."""

    cubes: CubeFile
    moments: dict[Key, list[Moments]] = field(default_factory=dict)
    curvature: dict[Key, Floats] = field(default_factory=dict)
    """Of the potentials, at POINTS^3 places: (fields, POINTS^3); it serves as a hash as well."""
    power: dict[Key, Floats] = field(default_factory=dict)
    constant: dict[Key, str] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    def problems(self, name: Callable[[Key], str]) -> list[str]:
        """Why results from these cubes would be wrong; `name` gives the name of a cube."""
        problems = [f"{name(key)}: {text}" for key, text in self.constant.items()]
        complete = {key: values for key, values in self.curvature.items() if key not in self.constant}
        pairs = {seed: [complete.get((seed, gravity)) for gravity in GRAVITIES] for seed in self.cubes.seeds}
        correlations = {seed: _correlate(a, b) for seed, (a, b) in pairs.items() if a is not None is not b}
        mismatched = {seed: value for seed, value in correlations.items() if value < MIN_CORRELATION}
        if mismatched:
            problems.append(
                f"seeds {system.format_ranges(mismatched)}: the cubes are not twins: correlation "
                f"{min(mismatched.values()):.2f} to {max(mismatched.values()):.2f}, of twins above "
                f"{MIN_CORRELATION}. Pair the cubes of one realization."
            )
        alone = set()
        for keys in _find_realizations(complete):
            equal = defaultdict(list)
            for key in keys:
                equal[complete[key].tobytes()].append(key)
            for same in equal.values():
                # Synthetic twins may be equal by intention.
                if len({seed for seed, _ in same}) > 1 or (len(same) > 1 and not self.cubes.synthetic):
                    problems.append(f"equal cubes: {', '.join(map(name, same))}. Rerun all but one.")
            if len(equal) == len(keys) and len({seed for seed, _ in keys}) > 1:
                problems.append(f"one realization, but several seeds: {', '.join(map(name, keys))}")
            alone |= set(keys) if len(keys) == 1 else set()
        strangers = [seed for seed in mismatched if {(seed, "gr"), (seed, "newton")} <= alone]
        for seed in strangers[:MAX_EXPLAINED]:
            problems.append(
                f"seed {seed}: {explain(*read_pair(self.cubes, seed)[:, self.cubes.potentials[0]])}"
            )
        return problems

    def warnings(self) -> list[str]:
        """What is unlikely to be meant."""
        return _power_warnings(self.cubes, self.power)


def _find_realizations(curvature: dict[Key, Floats]) -> list[list[Key]]:
    """Cubes grouped by their initial conditions: each with the first cube to which it is correlated."""
    table = np.array(
        [values[0] / max(float(np.linalg.norm(values[0])), 1e-300) for values in curvature.values()]
    )
    groups = defaultdict(list)
    for key, row in zip(curvature, table, strict=True):
        groups[int(np.argmax(table @ row > MIN_CORRELATION))].append(key)
    return list(groups.values())


def survey(cubes: CubeFile, *, moments: bool = True) -> Survey:
    """Read every cube once; without `moments` for a file whose moments are known."""
    result = Survey(cubes)
    with ThreadPoolExecutor(WORKERS) as pool:
        bar = tqdm(cubes.cubes, desc="checking", unit="cube", disable=None)
        for key, summary in zip(bar, pool.map(partial(_summarize, cubes, moments), cubes.cubes), strict=True):
            if isinstance(summary, str):
                result.unreadable.append(summary)
            else:
                result.moments[key], curvature, power, constant = summary
                if len(curvature):
                    result.curvature[key], result.power[key] = curvature, power
                if constant:
                    result.constant[key] = constant
    return result


def _summarize(
    cubes: CubeFile, with_moments: bool, key: Key
) -> tuple[list[Moments], Floats, Floats, str] | str:
    """Moments, curvature, power, and what is constant in a cube; or why it cannot be read."""
    cube = np.empty((cubes.num_fields, *(cubes.size,) * 3), np.float32)
    try:
        cubes.read(*key, cube)
    except UserError as error:
        return str(error).removeprefix(f"{cubes.path}: ")
    moments = [Moments() for _ in cube]
    for values, of_field in zip(cube, moments, strict=True):
        for plane in values if with_moments else ():
            of_field.add(plane.astype(np.float64))
    examined = [cube[i] for i in cubes.potentials]
    constant = [describe_constant(values) for values in examined if has_constant_line(values)]
    curvature = np.array([sample_curvature(values) for values in examined])
    planes = np.array([values[:: cubes.size // PLANES] for values in examined])
    return moments, curvature, plane_power(planes) if examined else planes, " ".join(constant)


def plane_power(planes: NDArray[np.floating]) -> Floats:
    """Power of planes (C, p, N, N) in shells of wavenumber n = 0, ..., N/2 of width 1: (C, N/2 + 1)."""
    size = planes.shape[-1]
    whole, half = np.fft.fftfreq(size, 1 / size), np.fft.rfftfreq(size, 1 / size)
    shells = np.rint(np.hypot(whole[:, None], half)).astype(int).ravel()
    power = (abs(np.fft.rfft2(planes.astype(np.float64))) ** 2).sum(axis=1)
    return np.array([np.bincount(shells, values.ravel())[: size // 2 + 1] for values in power])


def _power_warnings(cubes: CubeFile, power: dict[Key, Floats]) -> list[str]:
    """A warning if one gravity has more power at all n > 4, where theory predicts none."""
    seeds = [seed for seed in cubes.seeds if {(seed, "newton"), (seed, "gr")} <= power.keys()]
    if cubes.synthetic or "difference_redshifts" in cubes.attributes or not seeds:
        return []  # the first two differ by intention
    # (seeds, fields, shells)
    newton, gr = (np.array([power[seed, gravity] for seed in seeds]) for gravity in GRAVITIES)
    strongest = newton.mean(0).max(axis=-1, keepdims=True)
    exists = newton.mean(0) > ROUNDING * strongest
    exists[:, :MIN_WAVENUMBER] = False
    warnings = []
    for i, keep in enumerate(exists):
        ratios = gr[:, i, keep] / np.maximum(newton[:, i, keep], 1e-300)
        outliers = (
            np.arange(len(seeds)) if _exceeds(ratios.mean(0)) else np.flatnonzero([*map(_exceeds, ratios)])
        )
        if len(outliers):
            mean = ratios[outliers].mean(axis=0)
            warnings.append(
                f"seeds {system.format_ranges(np.array(seeds)[outliers])}: P_GR/P_N is {mean.min():.3g} to "
                f"{mean.max():.3g} at all n > 4, where theory predicts 1. Do both gravities have the same "
                "redshift, unit and settings?"
            )
    return warnings


def _exceeds(ratio: Floats) -> bool:
    high, low = ratio > 1 + MAX_EXCESS, ratio < 1 / (1 + MAX_EXCESS)
    return bool(ratio.size and (high.all() or low.all()))


def data_warnings(
    cubes: CubeFile, seeds: range, *, standardize: str = "none", trained_on: CubeFile | None = None
) -> list[str]:
    """What a reader of results from these seeds must know first; from a few planes of some of them.

    `standardize` is data_params.standardize, `trained_on` the file that the network was trained on.
    """
    chosen = seeds[:: -(-len(seeds) // SAMPLE_SEEDS)]
    planes = {(s, gravity): cubes.read_planes(s, gravity, PLANES) for s in chosen for gravity in GRAVITIES}
    power = {key: plane_power(values[cubes.potentials]) for key, values in planes.items()}
    warnings = _power_warnings(cubes, power)
    if standardize == "none":
        for name, values in zip(cubes.fields, np.stack([*planes.values()], axis=1), strict=True):
            warnings += std_warnings(name, float(values.std(dtype=np.float64)))
    boxes = [file.attr_float("box_size") for file in (cubes, trained_on or cubes)]
    if None not in boxes and boxes[0] != boxes[1]:
        warnings.append(f"the box is {boxes[0]:g} Mpc/h, that of the training was {boxes[1]:g} Mpc/h")
    return warnings


def std_warnings(field: str, std: float) -> list[str]:
    """A warning if values with this standard deviation are not standardized, with the setting that fits."""
    if USUAL_STD[0] <= std <= USUAL_STD[1]:
        return []
    return [f"{field}: the standard deviation is {std:.2g}, not 1: set data_params.standardize to train"]


def check_copy(original: CubeFile, copy: CubeFile, seeds: range) -> None:
    """Raise UserError unless `copy` has the attributes and, as far as `identity` reads them, the cubes of
    `original`."""
    keys = original.attributes.keys() | copy.attributes.keys()
    different = [k for k in keys if repr(original.attributes.get(k)) != repr(copy.attributes.get(k))]
    if copy.identity(seeds)["fingerprint"] != original.identity(seeds)["fingerprint"]:
        different.append("cubes")
    if different:
        raise UserError(
            f"{copy.path}: data_params.local_copy is no copy of data_params.datafile {original.path}: other "
            f"{', '.join(sorted(different))}.\nCopy the file again, or remove local_copy."
        )
