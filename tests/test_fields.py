"""Cubes with several fields: each is read, sliced and standardized as if it were alone."""

from system import UserError

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from analysis import fields
from analysis.power_spectrum import Box, directions
from datasets import GRAVITIES, CubeFile, WholeCubeDataset, measure_normalization, measure_power
from datasets import __main__ as commands
from datasets.preparation.checks import read_pair
from datasets.preparation.filter import Filter
from datasets.sampler import EpochSampler
from models import TrainedNetwork, Whitening, isotropic_power

N = 64
CPU = torch.device("cpu")
FIELDS = 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A file of 3 seeds with three fields, then a file with each of the fields."""
    folder, random = tmp_path_factory.mktemp("fields"), np.random.default_rng(7)
    paths = [folder / f"{name}.h5" for name in ("all", *range(FIELDS))]
    for seed, common in enumerate(random.normal([[[[1.0]]], [[[-2.0]]], [[[0.0]]]], 2, (3, FIELDS, N, N, N))):
        for gravity in GRAVITIES:
            cube = (common + random.normal(0, 0.1, common.shape)).astype(np.float32)
            for path, values in zip(paths, (cube, *cube), strict=True):
                with h5py.File(path, "a") as file:
                    file[f"{gravity}_seed{seed:04d}"] = values
    return paths


@dataclass(frozen=True)
class Settings:
    """The data section of an experiment."""

    axes: tuple[int, ...] = (0, 1, 2)
    channels: int = 2
    newton_augmentation: float = 0.5
    symmetries: bool = True
    shifts: bool = True
    pairs: bool = True
    cache: str = "memory"


def dataset(path: Path, **options: Any) -> WholeCubeDataset:
    defaults: dict[str, Any] = {"batch_size": 24, "seed": 3, "device": CPU}
    return WholeCubeDataset(CubeFile(path), range(3), Settings(), **defaults, **options)


@pytest.mark.parametrize("cache", ["disk", "memory", "device"])
def test_images_have_the_slices_of_each_field(cache: str, files: list[Path]) -> None:
    mean, std = [1.0, -2.0, 0.0], [2.0, 4.0, 1.0]
    together = dataset(files[0], mean=mean, std=std, cache=cache)
    alone = [
        dataset(path, mean=m, std=s, cache=cache) for path, m, s in zip(files[1:], mean, std, strict=True)
    ]
    assert together.shape == (2 * FIELDS, N, N)
    for batches in ("train_batches", "evaluation_batches"):
        arguments = (1,) if batches == "train_batches" else ()
        of_each = zip(*(getattr(one, batches)(*arguments) for one in alone), strict=True)
        for batch, parts in zip(getattr(together, batches)(*arguments), of_each, strict=True):
            assert torch.equal(batch.images, torch.cat([part.images for part in parts], dim=1))
            assert torch.equal(batch.ids, parts[0].ids)


def test_fields_are_normalized_one_by_one(files: list[Path]) -> None:
    alone = [measure_normalization(CubeFile(path), range(2)) for path in files[1:]]
    assert measure_normalization(CubeFile(files[0]), range(2)) == tuple(map(list, zip(*alone, strict=True)))


def test_the_memory_of_the_order_counts_fields() -> None:
    windows = [EpochSampler(range(40), 128, (0,), 64, 1, fields=fields).window for fields in (1, 2, 4)]
    assert windows == [8, 4, 2]


def test_the_fields_of_a_file_have_names(tmp_path: Path) -> None:
    def names(count: int, **attributes: Any) -> list[str]:
        with h5py.File(tmp_path / "names.h5", "w") as file:
            for gravity in GRAVITIES:
                file[f"0/{gravity}"] = np.zeros((count, N, N, N), np.float32)
            file.attrs.update(attributes)
        return CubeFile(tmp_path / "names.h5").fields

    assert names(1, field="phi", redshift=10.0) == ["phi, z = 10"]
    assert names(2, fields=["phi", "chi"], redshifts=[10.0, 1.0]) == ["phi, z = 10", "chi, z = 1"]
    assert names(2, field="phi", redshifts=[10.0, 1.0]) == ["phi, z = 10", "phi, z = 1"]
    assert names(2) == ["field 0", "field 1"]
    assert names(2, fields=["phi", "chi", "B"]) == ["field 0", "field 1"]


@pytest.mark.parametrize(
    "shape", [(0, N, N, N), (2, N, N, 2 * N), (N, N, N, 2), (1, 2, N, N, N), (2, 32, 32, 32)]
)
def test_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        file["0/gr"] = file["0/newton"] = np.zeros(shape, np.float32)
    with pytest.raises(UserError, match="cube /0/gr has"):
        CubeFile(tmp_path / "bad.h5")


def test_fields_are_whitened_one_by_one(files: list[Path]) -> None:
    def power(path: Path) -> Any:
        cubes = CubeFile(path)
        return measure_power(cubes, range(1), Settings(), [1.0] * cubes.num_fields, 2.0, isotropic_power)

    together, alone = power(files[0]), [power(path) for path in files[1:]]
    assert together == [list(spectra) for spectra in zip(*alone, strict=True)]
    slices = torch.randn(2, 2 * FIELDS, N, N, generator=torch.Generator().manual_seed(0))
    expected = [Whitening(one)(part) for one, part in zip(alone, slices.split(2, dim=1), strict=True)]
    assert torch.equal(Whitening(together)(slices), torch.cat(expected, dim=1))


def test_a_trained_network_standardizes_its_fields_and_refuses_other_numbers_of_channels() -> None:
    settings = {"architecture": "racoon", "layer_param": 2, "channels": 4, "size": N}
    mean, std, fields = [1.0, -2.0], [2.0, 4.0], ["phi, z = 10", "phi, z = 1"]
    trained = TrainedNetwork(**settings, mean=mean, std=std, fields=fields).eval()
    slices = torch.randn(3, 4, N, N, generator=torch.Generator().manual_seed(0))
    scaled = slices * torch.tensor([2.0, 2.0, 4.0, 4.0])[:, None, None]
    shifted = scaled + torch.tensor([1.0, 1.0, -2.0, -2.0])[:, None, None]
    torch.testing.assert_close(trained(shifted), trained.network(slices), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"\(b, 4, 64, 64\), channels phi, z = 10; phi, z = 1"):
        trained(slices[:, :2])


def universe(path: Path, redshift: float, growth: dict[str, float], **changes: Any) -> Path:
    """A packed file of 2 seeds: one realization, times the growth of each gravity, and some noise."""
    attributes = {"field": "phi", "redshift": redshift, "mean": 0.0, "std": redshift + 1, "box_size": 5120.0}
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes | changes)
        for seed in range(2):
            cube = np.random.default_rng(seed).standard_normal((N, N, N))
            for gravity in GRAVITIES:
                noise = np.random.default_rng([seed, int(redshift)]).standard_normal(cube.shape)
                file[f"{gravity}_seed{seed:04d}"] = (cube * growth[gravity] + 1e-3 * noise).astype(np.float32)
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["datasets", *map(str, arguments)])
    return commands.main()


def test_files_of_the_same_simulations_are_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        universe(tmp_path / f"z{z:g}.h5", z, dict.fromkeys(GRAVITIES, growth))
        for z, growth in ((10.0, 1.0), (1.0, 0.95))
    ]
    assert command(monkeypatch, "repack", *files, tmp_path / "both.h5") == 0
    both, alone = CubeFile(tmp_path / "both.h5"), [CubeFile(path) for path in files]
    assert both.fields == ["phi, z = 10", "phi, z = 1"]
    assert both.field_attrs("std") == [11.0, 2.0]
    assert both.attributes["box_size"] == 5120
    cube, parts = np.empty((2, N, N, N), np.float32), np.empty((2, N, N, N), np.float32)
    both.read(1, "gr", cube)
    for file, part in zip(alone, parts, strict=True):
        file.read(1, "gr", part)
    np.testing.assert_array_equal(cube, parts)
    # A file of several fields is repacked and stacked as one of a single field.
    assert command(monkeypatch, "repack", tmp_path / "both.h5", tmp_path / "again.h5") == 0
    assert command(monkeypatch, "repack", tmp_path / "again.h5", files[0], tmp_path / "three.h5") == 0
    assert CubeFile(tmp_path / "three.h5").fields == ["phi, z = 10", "phi, z = 1", "phi, z = 10"]


def test_stacked_files_take_all_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [universe(tmp_path / f"z{z:g}.h5", z, dict.fromkeys(GRAVITIES, 1.0)) for z in (10.0, 1.0)]
    for path in files:
        with h5py.File(path, "a") as file:
            file.move("gr_seed0001", "gr_seed0007")
            file.move("newton_seed0001", "newton_seed0007")
    out, like = tmp_path / "out.h5", tmp_path / "like.h5"
    assert command(monkeypatch, "repack", *files, like) == 0
    with h5py.File(like, "a") as file:
        file.attrs["std"] = [22.0, 1.6]
    options = ("--max-wavenumber", 8, "--renumber", "--like", like)
    assert command(monkeypatch, "repack", *files, out, *options) == 0
    cubes = CubeFile(out)
    assert cubes.seeds == (0, 1)
    assert cubes.attributes["original_seeds"] == [0, 7]
    assert cubes.attributes["max_wavenumber"] == 8
    assert cubes.attributes["std"] == [22.0, 1.6]
    before = [read_pair(CubeFile(path), 7)[0, 0] for path in files]
    expected = [Filter(8)(field) * factor for field, factor in zip(before, (0.5, 1.25), strict=True)]
    np.testing.assert_allclose(read_pair(cubes, 1)[0], expected, atol=1e-6)
    assert command(monkeypatch, "repack", *files, out, "--remove-mean", "--force") == 0
    assert abs(read_pair(CubeFile(out), 7).mean((2, 3, 4))).max() < 1e-7
    assert command(monkeypatch, "repack", *files, out, "--like", files[0], "--force") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box_size": 100.0}, "box_size = 100"),
        ({"h": 0.7}, "h = 0.7, but None in"),
        ("no twin", "has no gr cube of seed 1"),
        ("other seeds", "correlates with that of"),
    ],
)
def test_fields_of_other_simulations_are_refused(
    change: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    growth = dict.fromkeys(GRAVITIES, 1.0)
    first = universe(tmp_path / "a.h5", 10.0, growth)
    other = universe(tmp_path / "b.h5", 1.0, growth, **(change if isinstance(change, dict) else {}))
    with h5py.File(other, "a") as file:
        if change == "no twin":
            del file["gr_seed0001"]
        if change == "other seeds":
            for gravity in GRAVITIES:
                file.move(f"{gravity}_seed0000", "moved")
                file.move(f"{gravity}_seed0001", f"{gravity}_seed0000")
                file.move("moved", f"{gravity}_seed0001")
    assert command(monkeypatch, "repack", first, other, tmp_path / "out.h5") == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_inspect_lists_the_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    files = [
        universe(tmp_path / "z10.h5", 10.0, {"newton": 1 / 11, "gr": 1 / 11}),
        universe(tmp_path / "z1.h5", 1.0, {"newton": 0.95 / 2, "gr": 0.94 / 2}),
    ]
    command(monkeypatch, "repack", *files, tmp_path / "both.h5")
    assert fields.growth_table(CubeFile(files[0])) == ""
    lines = fields.growth_table(CubeFile(tmp_path / "both.h5")).splitlines()
    assert "linear theory has 0.954" in lines[0]
    rows = [line.replace("(", " ").replace(")", " ").replace("+-", " ").split() for line in lines[2:]]
    assert [float(row[0]) for row in rows] == [1.0, 1.41, 1.73, 2.0, 3.0, 4.0]
    for row in rows:
        newton, scatter, gr, _, difference, _ = map(float, row[1:])
        # The noise of 1e-3 is that of the standardized fields; it is divided by their growth.
        np.testing.assert_allclose([newton, gr, difference], [0.95, 0.94, -0.01], atol=0.03)
        assert 0.0 < scatter < 0.05
    assert command(monkeypatch, "inspect", tmp_path / "both.h5") == 0
    assert lines[-1] in capsys.readouterr().out


def cross_spectra(seeds: range, box: Box, growth: tuple[float, float], noise: float) -> fields.CrossSpectra:
    """Of a Gaussian field and its growth, which differs between the gravities; the noise does not."""
    cubes, numbers, slices, ids = [], [], [], []
    for seed in seeds:
        early, rest = np.random.default_rng(seed).standard_normal((2, *(box.size,) * 3))
        for label in (0, 1):
            cube = torch.from_numpy(np.stack([early, growth[label] * early + noise * rest]))
            cubes.append(fields.cross_power(cube[None], directions(box, 3)))
            numbers.append(2 * seed + label)
            for axis in range(3):
                slices.append(fields.cross_power(cube.movedim(axis + 1, 0), directions(box, 2)))
                ids.append(((seed * 2 + label) * 3 + axis) * box.size + np.arange(box.size))
    return fields.CrossSpectra(
        np.concatenate(ids), np.concatenate(slices), np.array(numbers), np.concatenate(cubes)
    )


def test_two_redshifts_are_classified_as_their_ceiling_predicts() -> None:
    box, growth, noise = Box(16, None), (0.95, 0.951), 0.01
    train, test = (cross_spectra(seeds, box, growth, noise) for seeds in (range(40), range(40, 80)))
    rows = fields.joint_ceilings(box, ["early", "late"], train, test)
    assert [(row["fields"], row["max_wavenumber"]) for row in rows] == [
        (name, limit) for limit in (4, 8) for name in ("early", "late", "all")
    ]
    early, late, together = rows[:3]
    assert early["slices"]["auc"] == early["cubes"]["auc"] == early["slices"]["test_auc"] == 0.5
    assert late["cubes"]["auc"] < 0.52
    # The same eigenvalues for every mode, from the covariances as they are.
    newton, gr = (np.array([[1, t], [t, t**2 + noise**2]]) for t in growth)
    ratios = np.linalg.eigvals(np.linalg.solve(newton, gr))
    for part, dimensions in (("slices", 2), ("cubes", 3)):
        bins = directions(box, dimensions)
        modes = bins.modes[bins.n <= 4].sum()
        assert together[part]["d_prime"] == pytest.approx(
            np.sqrt(modes / 2 * (np.log(ratios) ** 2).sum()), rel=0.1
        )
        error = 2 * 0.5 / np.sqrt(len(test.numbers))  # of the cubes; more slices have a smaller one
        assert together[part]["test_auc"] == pytest.approx(together[part]["auc"], abs=error)
        assert together[part]["auc"] > 0.6
