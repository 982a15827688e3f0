"""PI-CAI: geometry, windows, both classes, every wrong input, and a reference implementation."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medbudget.data import picai
from medbudget.data.layouts import _grow, write_picai
from medbudget.data.picai import load_case, measure_shift, prepare_picai, read_marksheet
from medbudget.data.prepare import BrokenCase, load_manifest
from medbudget.data.resample import GRID, target_grid
from medbudget.images import load_images

sitk = pytest.importorskip("SimpleITK")
REAL = "10795_1000811"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("picai")
    write_picai(folder, n=8)
    return folder


@pytest.fixture
def copy(tree: Path, tmp_path: Path) -> Path:
    shutil.copytree(tree, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def real(real_data: Path) -> Path:
    if not (real_data / "picai").is_dir():
        pytest.skip(f"no PI-CAI case in {real_data}")
    return real_data / "picai"


def load(folder: Path, case: str, **options) -> picai.Case:
    return load_case(folder / "images", folder / "labels", case, **{"size": 96, **options})


def ball(centre: tuple[float, float, float], size, spacing, origin, direction=None):
    """A bright ball at a place in the patient, seen by a grid of its own."""
    image = sitk.Image(list(size), sitk.sitkFloat32)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    k, j, i = np.meshgrid(*[np.arange(n) for n in size[::-1]], indexing="ij")
    axes = np.reshape(image.GetDirection(), (3, 3)) * np.array(spacing)
    places = np.array(origin)[:, None] + axes @ np.stack([i, j, k]).reshape(3, -1)
    far = np.linalg.norm(places - np.array(centre)[:, None], axis=0).reshape(k.shape)
    made = sitk.GetImageFromArray((1000 * np.exp(-((far / 12) ** 2))).astype(np.uint16))
    made.CopyInformation(image)
    return made


def centroid(plane: torch.Tensor) -> np.ndarray:
    values = plane.double().numpy()
    return np.array([(np.indices(values.shape)[d] * values).sum() / values.sum() for d in (0, 1)])


@pytest.fixture
def balls(tmp_path: Path) -> Path:
    """One object seen by three grids, of other spacing, centre, tilt and direction."""
    centre, images, labels = (10.0, -20.0, 30.0), tmp_path / "images", tmp_path / "labels"
    tilt = np.deg2rad(8)
    tilted = (1, 0, 0, 0, np.cos(tilt), -np.sin(tilt), 0, np.sin(tilt), np.cos(tilt))
    t2w = ball(centre, (320, 320, 21), (0.5, 0.5, 3.0), (-70, -100, 0))
    adc = ball(centre, (80, 90, 25), (2.0, 2.0, 3.6), (-65, -110, -17), tilted)
    hbv = ball(centre, (100, 100, 25), (2, 2, 3), (110, -118, -6), (-1, 0, 0, 0, 1, 0, 0, 0, 1))
    place = images / "7"
    place.mkdir(parents=True)
    for name, volume in (("t2w", t2w), ("adc", adc), ("hbv", hbv)):
        sitk.WriteImage(volume, str(place / f"7_8_{name}.mha"))
    (labels / picai.GLAND).mkdir(parents=True)
    sitk.WriteImage(sitk.Cast(t2w > 500, sitk.sitkUInt8), str(labels / picai.GLAND / "7_8.nii.gz"))
    (labels / "clinical_information").mkdir()
    (labels / picai.MARKSHEET).write_text("patient_id,study_id,case_csPCa\n7,8,NO\n")
    return tmp_path


def test_physical_geometry_puts_all_sequences_at_one_place_and_the_papers_does_not(balls) -> None:
    case = load(balls, "7_8", size=300, window="volume")
    places = [centroid(plane) for plane in case.image]
    for other in places[1:]:
        assert np.abs(other - places[0]).max() < 0.5, "pixels of 0.5 mm"
    t2w = sitk.ReadImage(str(balls / "images" / "7" / "7_8_t2w.mha"))
    origin, _ = target_grid(t2w)
    expected = (np.array((-20.0, 10.0)) - np.array(origin[1::-1])) / 0.5
    assert np.abs(places[0] - expected).max() < 0.5
    assert case.slice_index == round((30.0 - origin[2]) / 3)
    assert np.abs(centroid(case.gland) - places[0]).max() < 0.5
    assert case.spacing == (0.5, 0.5)
    paper = [centroid(plane) for plane in load(balls, "7_8", size=300, geometry="paper").image]
    assert max(np.abs(other - paper[0]).max() for other in paper[1:]) > 5


def test_the_papers_shift_is_read_off_the_headers(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    for name, origin in (("t2w", (0, 0, 0)), ("adc", (2, -3, 6)), ("hbv", (0, 0, 0))):
        image = sitk.Image([320, 320, 20], sitk.sitkUInt8)
        image.SetSpacing((0.5, 0.5, 3))
        image.SetOrigin(origin)
        sitk.WriteImage(image, str(tmp_path / "1" / f"1_2_{name}.mha"))
    assert measure_shift(tmp_path, "1_2") == {"adc": (6.0, -3.0, 2.0), "hbv": (0.0, 0.0, 0.0)}
    with pytest.raises(BrokenCase, match="no 3_4"):
        measure_shift(tmp_path, "3_4")


def test_a_volume_stored_back_to_front_gives_the_same_picture(balls: Path, tree: Path) -> None:
    before = load(balls, "7_8")
    file = balls / "images" / "7" / "7_8_t2w.mha"
    flipped = sitk.Flip(sitk.ReadImage(str(file)), [True, False, True])
    assert flipped.GetDirection()[0] == -1 and flipped.GetDirection()[8] == -1
    sitk.WriteImage(flipped, str(file))
    assert (load(balls, "7_8").image.int() - before.image.int()).abs().max() <= 1


def test_t2w_is_not_blurred_where_its_spacing_is_the_targets(balls: Path) -> None:
    """Its own voxels, not values between them: the odd number of slices is the hard case."""
    case = load(balls, "7_8", size=300, window="volume")
    stack = sitk.GetArrayFromImage(sitk.ReadImage(str(balls / "images" / "7" / "7_8_t2w.mha")))
    padding = (30 - len(stack)) // 2
    plane = stack[case.slice_index - padding, 10:310, 10:310].astype(float)
    assert np.abs(case.image[0].numpy() - plane / stack.max() * 255).max() <= 0.51


def read_label(tree: Path, where: str, case: str) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(tree / "labels" / where / f"{case}.nii.gz")))


def test_slice_rules_and_size(tree: Path) -> None:
    """Negative: the gland's median slice. Positive: the largest tumour area, which is elsewhere."""
    mask = read_label(tree, picai.HUMAN, "10001_1000010")
    assert set(np.unique(mask)) == {0, 2}
    padding = (GRID[0] - len(mask)) // 2
    positive = load(tree, "10001_1000010")
    assert positive.slice_index == (mask >= 2).sum(axis=(1, 2)).argmax() + padding
    assert positive.label == 1 and positive.tumour.any() and positive.gland.any()
    gland = read_label(tree, picai.GLAND, "10000_1000000")
    middle = int(np.median(np.flatnonzero(gland.any(axis=(1, 2)))))
    negative = load(tree, "10000_1000000")
    assert negative.slice_index == middle + padding
    assert negative.label == 0 and negative.gland.any() and not negative.tumour.any()
    assert torch.equal(load(tree, "10001_1000010").image, positive.image), "the same each time"
    large = load(tree, "10001_1000010", size=192)
    assert large.image.shape == (3, 192, 192) and positive.spacing[0] == 2 * large.spacing[0]
    mean = torch.nn.functional.avg_pool2d(large.image.float(), 2)
    assert (mean - positive.image.float()).abs().mean() < 2
    areas = [case.tumour.float().mean().item() for case in (large, positive)]
    assert areas[0] == pytest.approx(areas[1], rel=0.1)


def move_lesion(copy: Path, case: str, *, to: str, slices: int) -> None:
    """Write the machine's lesion, of its largest slice alone, `slices` lower into another folder."""
    mask = sitk.ReadImage(str(copy / "labels" / picai.MACHINE / f"{case}.nii.gz"))
    values = sitk.GetArrayFromImage(mask)
    k = int(values.sum(axis=(1, 2)).argmax())
    moved = np.zeros_like(values)
    moved[k - slices] = values[k]
    image = sitk.GetImageFromArray(moved)
    image.CopyInformation(mask)
    (copy / "labels" / to).mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(copy / "labels" / to / f"{case}.nii.gz"))


def test_an_experts_mask_comes_before_a_machines(copy: Path) -> None:
    case = "10005_1000050"
    machine = load(copy, case)
    move_lesion(copy, case, to=picai.POOCH, slices=3)  # its values are 0 and 1
    expert = load(copy, case)
    assert expert.slice_index == machine.slice_index - 3
    assert expert.sources[-1] == f"csPCa_lesion_delineations/human_expert/Pooch25/{case}.nii.gz"
    assert not any("Bosma22a" in source for source in expert.sources)
    move_lesion(copy, case, to=picai.HUMAN, slices=1)  # 1 is ISUP 1 there: harmless
    assert load(copy, case).slice_index == expert.slice_index, "the expert mask that shows a tumour"
    file = copy / "labels" / picai.HUMAN / f"{case}.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(file)) * 3, str(file))
    both = load(copy, case)
    assert both.slice_index == machine.slice_index - 1 and "resampled" in both.sources[-1]
    assert machine.tumour.any() and "Bosma22a" in machine.sources[-1]
    file.unlink()
    file = copy / "labels" / picai.POOCH / f"{case}.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(file)) * 0, str(file))
    with pytest.raises(BrokenCase, match=r"Pooch25.* is empty"):  # no machine's in its place
        load(copy, case)
    file.write_bytes(b"")
    with pytest.raises(BrokenCase, match=case):
        load(copy, case)


def test_percentile_window_shows_dwi_that_a_bright_coil_would_hide(copy: Path) -> None:
    file = copy / "images" / "10000" / "10000_1000000_hbv.mha"
    volume = sitk.ReadImage(str(file))
    values = sitk.GetArrayFromImage(volume)
    values[:, :, -2:] = 20000
    spoilt = sitk.GetImageFromArray(values)
    spoilt.CopyInformation(volume)
    sitk.WriteImage(spoilt, str(file))
    inner = slice(24, 72)
    shown = load(copy, "10000_1000000").image[2, inner, inner].float()
    dark = load(copy, "10000_1000000", window="volume").image[2, inner, inner].float()
    assert shown.std() > 15 > 2 > dark.std()


def test_a_tumour_does_not_change_the_window_of_its_case(copy: Path) -> None:
    """Else dark surroundings give the label away."""
    case = "10001_1000010"
    file = copy / "images" / "10001" / f"{case}_hbv.mha"
    before = load(copy, case)
    darker = load(copy, case, window="percentile")
    volume = sitk.ReadImage(str(file))
    mask = sitk.ReadImage(str(copy / "labels" / picai.HUMAN / f"{case}.nii.gz"))
    inside = sitk.GetArrayFromImage(
        sitk.Resample(mask, volume, sitk.Transform(), sitk.sitkNearestNeighbor)
    )
    change(file, lambda v: np.where(inside > 0, 8 * values_of(v), values_of(v)))
    without = ~torch.nn.functional.max_pool2d(before.tumour[None].float(), 13, 1, 6)[0].bool()
    brighter = [load(copy, case, window=window) for window in ("gland", "percentile")]
    gaps = [
        (a.image.float() - b.image.float())[:, without].abs().mean(dim=1)
        for a, b in zip((before, darker), brighter)
    ]
    assert gaps[0].max() < 1 and before.image[2][before.tumour].float().mean() > 200
    assert (
        darker.image[2][without].float().mean() > 4 * brighter[1].image[2][without].float().mean()
    )
    assert gaps[1][:2].max() == 0, "T2W and ADC stay as they are"
    healthy = load(copy, "10002_1000020")
    levels = [one.image[2][one.gland & ~one.tumour].float().median() for one in (healthy, before)]
    assert levels[0] == pytest.approx(255 / 4, rel=0.1) == levels[1]


def test_the_layout_draws_the_slices_of_both_classes_alike() -> None:
    t2w, *_, tumour = (sitk.GetArrayFromImage(v) for v in _grow(1, True, 64, 9, 0))
    assert tumour[5].sum() > tumour[4].sum() > 0, "the slices of a positive and a negative case"
    assert np.array_equal(t2w[4], t2w[5]) and not np.array_equal(t2w[5], t2w[6])


def change(file: Path, edit) -> None:
    """Replace a volume by what `edit` makes of its values, or of the volume where it returns one."""
    volume = sitk.ReadImage(str(file))
    edited = edit(volume)
    if isinstance(edited, np.ndarray):
        values, edited = edited, sitk.GetImageFromArray(edited)
        if values.ndim == 3:
            edited.CopyInformation(volume)
    sitk.WriteImage(edited, str(file))


def values_of(volume) -> np.ndarray:
    return sitk.GetArrayFromImage(volume)


def with_value(value: float):
    def edit(volume):
        values = values_of(volume).astype(np.float32)
        values[0, 0, 0] = value
        return values

    return edit


def moved(volume, **settings):
    for name, value in settings.items():
        getattr(volume, f"Set{name}")(value)
    return volume


SAGITTAL = (0, 0, 1, 1, 0, 0, 0, 1, 0)
WRONG = [  # file, what becomes of it (None: it goes), what is said
    ("adc", None, "missing sequence adc"),
    ("gland", None, r"missing mask \(AI/Bosma22b\)"),
    ("gland", lambda v: sitk.Image([16, 16, 4], sitk.sitkUInt8) + 1, "another volume"),
    ("gland", lambda v: v * 0, "empty"),
    ("adc", lambda v: v * 0 + 7, "one value 7"),
    ("adc", with_value(np.nan), "adc.mha has 1 values that are infinite or not a number"),
    ("adc", with_value(np.inf), "adc.mha has 1 values that are infinite or not a number"),
    ("adc", lambda v: v[:, :, 0], "not a gray 3-D volume"),
    ("t2w", lambda v: moved(v, Direction=SAGITTAL), "not an axial volume"),
    ("adc", lambda v: moved(v, Origin=(900, 900, 900)), "outside T2W's field of view"),
]


def test_wrong_input_is_a_broken_case_with_a_reason(copy: Path) -> None:
    images = copy / "images" / "10000"
    files = {name: images / f"10000_1000000_{name}.mha" for name in ("t2w", "adc")}
    files["gland"] = copy / "labels" / picai.GLAND / "10000_1000000.nii.gz"
    for name, edit, reason in WRONG:
        keep = files[name].read_bytes()
        if edit is None:
            files[name].unlink()
        else:
            change(files[name], edit)
        for geometry in ("physical", "paper") if "field of view" not in reason else ("physical",):
            with pytest.raises(BrokenCase, match=reason):
                load(copy, "10000_1000000", geometry=geometry)
        files[name].write_bytes(keep)
    files["t2w"].write_bytes(files["t2w"].read_bytes()[:5000])
    with pytest.raises(BrokenCase, match="truncated"):
        load(copy, "10000_1000000")
    lesion = copy / "labels" / picai.HUMAN / "10001_1000010.nii.gz"
    change(lesion, lambda mask: sitk.Cast(mask > 0, sitk.sitkUInt8))  # 1: below ISUP 2
    with pytest.raises(BrokenCase, match="empty"):
        load(copy, "10001_1000010")
    lesion.unlink()
    with pytest.raises(BrokenCase, match=r"missing mask \(AI/Bosma22a\)"):
        load(copy, "10001_1000010")
    shutil.copytree(images, copy / "images" / "fold1" / "10000")
    for use in (lambda: load(copy, "10000_1000000"), lambda: prepare(copy, copy.parent / "out")):
        with pytest.raises(ValueError, match="10000_1000000 is there twice"):
            use()


def test_wrong_options_and_folders(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of physical, paper"):
        load(tree, "10000_1000000", geometry="voxel")
    with pytest.raises(ValueError, match="one of gland, percentile, volume"):
        load(tree, "10000_1000000", window="minmax")
    with pytest.raises(BrokenCase, match="no 1_2_t2w"):
        load(tree, "1_2")
    with pytest.raises(FileNotFoundError, match="picai_labels"):
        load_case(tree / "images", tmp_path, "10000_1000000")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_case(tmp_path / "none", tree / "labels", "10000_1000000")
    sheet = tmp_path / picai.MARKSHEET
    sheet.parent.mkdir()
    sheet.write_text("patient_id,study_id\n1,2\n")
    with pytest.raises(ValueError, match="case_csPCa"):
        read_marksheet(tmp_path)
    for rows, reason in (
        ("1,2,maybe", "row 2 .*'maybe'.*YES or NO"),
        ("1,2,YES\n3,4,NO\n1,2,YES", "row 4 .*each study once"),
        ("1,2,YES\n 1 ,2,NO", "row 3 .*each study once"),
        ("1,,YES", "row 2 .*patient_id and study_id"),
    ):
        sheet.write_text(f"patient_id,study_id,case_csPCa\n{rows}\n")
        with pytest.raises(ValueError, match=reason):
            read_marksheet(tmp_path)
    sheet.write_text("patient_id,study_id,case_csPCa\n 1,2 ,YES \n")
    assert read_marksheet(tmp_path)["1_2"].label == "positive"


def prepare(tree: Path, out: Path, **options):
    chosen = {"size": 32, "per_class": 1, **options}
    return prepare_picai(tree / "images", tree / "labels", out, **chosen)


def test_no_patient_stands_in_two_splits_whatever_the_folds(tree: Path, tmp_path: Path) -> None:
    report = prepare(tree, tmp_path / "out", reference=1)
    table = load_manifest(tmp_path / "out")
    assert table["patient"].is_unique and len(table) == 7
    assert report.counts["reference", "negative"] == 1 and set(report.counts.values()) == {1}
    truth = {s.patient: s.label for s in read_marksheet(tree / "labels").values()}
    assert all(truth[row.patient] == row.label for row in table.itertuples())
    assert any("another one: 10000_100000" in note for note in report.notes)
    assert table["sources"].str.contains("_t2w.mha").all()
    assert not table["sources"].str.contains(str(tree)).any()
    folds = tmp_path / "folds"
    shutil.copytree(tree / "labels", folds / "labels")
    for i, patient in enumerate(sorted((tree / "images").iterdir())):
        shutil.copytree(patient, folds / "images" / f"public_images_fold{i % 5}" / patient.name)
    prepare(folds, tmp_path / "five", workers=2, reference=1)
    files = list(table["file"])
    assert files == list(load_manifest(tmp_path / "five")["file"])
    sets = [load_images([tmp_path / name / f for f in files]) for name in ("out", "five")]
    assert torch.equal(*sets)  # the files' bytes differ by the sources that they record
    with pytest.raises(ValueError, match=r"negative: 300 patients wanted .* there are 4"):
        prepare(tree, tmp_path / "x", per_class=100)


def test_the_manifest_says_whose_mask_a_case_rests_on(copy: Path, tmp_path: Path) -> None:
    for patient in ("10001", "10003"):  # leaves 10005, with a machine's mask, and 10007
        shutil.rmtree(copy / "images" / patient)
    options = {"allow_fewer": True}
    report = prepare(copy, tmp_path / "before", **options)
    table = load_manifest(tmp_path / "before")
    machines = table[table["note"] == "lesion mask by a machine"]
    assert list(machines["patient"]) == ["10005"]
    assert machines["sources"].str.contains("AI/Bosma22a/").all()
    assert any("1 positive cases have no lesion mask by an expert" in n for n in report.notes)
    move_lesion(copy, "10005_1000050", to=picai.POOCH, slices=3)
    with pytest.raises(ValueError, match="cases are others"):  # not kept: they show another slice
        prepare(copy, tmp_path / "before", **options)
    prepare(copy, tmp_path / "after", **options)
    assert not any(load_manifest(tmp_path / "after")["note"])


def test_one_study_under_two_patients_stays_in_one_split(copy: Path, tmp_path: Path) -> None:
    before = prepare(copy, tmp_path / "before")
    table = load_manifest(tmp_path / "before")
    negatives = table[table["label"] == "negative"]
    one, other = (negatives[negatives["split"] == s]["sources"].iloc[0] for s in ("train", "test"))
    shutil.copy(*(copy / "images" / sources.split(" | ")[0] for sources in (one, other)))
    report = prepare(copy, tmp_path / "after")
    assert any("kept in train alone" in reason for _, reason in report.broken)
    assert report.counts == before.counts, "a spare patient takes its place"
    with pytest.raises(ValueError, match="lies inside the input"):
        prepare(copy, copy / "labels" / "out")


def reference_slice(folder: Path, case_id: str, label: int) -> np.ndarray:
    """The released conversion's steps on picai_prep's own functions, in other words."""
    prep = pytest.importorskip("picai_prep.preprocessing", reason="needs picai_prep")

    def volume(file: Path, mask: bool) -> np.ndarray:
        spaced = prep.resample_img(sitk.ReadImage(str(file)), (3, 0.5, 0.5), is_label=mask)
        values = sitk.GetArrayFromImage(spaced)
        if not mask:
            values = (values - values.min()) / (values.max() - values.min())
        return prep.crop_or_pad(values, (30, 300, 300))

    patient = case_id.split("_")[0]
    if label:
        tumour = volume(folder / "labels" / picai.HUMAN / f"{case_id}.nii.gz", True) >= 2
        index = int(tumour.sum(axis=(1, 2)).argmax())
    else:
        gland = volume(folder / "labels" / picai.GLAND / f"{case_id}.nii.gz", True)
        index = int(np.median(np.unique(np.nonzero(gland)[0])))
    planes = [
        volume(folder / "images" / patient / f"{case_id}_{name}.mha", False)[index]
        for name in ("t2w", "adc", "hbv")
    ]
    picture = Image.fromarray((np.stack(planes, axis=-1) * 255).astype(np.uint8))
    return np.asarray(picture.resize((512, 512), Image.Resampling.LANCZOS))


def assert_agrees(case: picai.Case, theirs: np.ndarray) -> None:
    gap = np.abs(case.image.permute(1, 2, 0).numpy().astype(int) - theirs)
    assert (gap <= 1).mean() >= 0.99
    assert theirs.std() > 5, "a black picture agrees with anything"


def test_papers_geometry_agrees_with_picai_prep(tree: Path) -> None:
    theirs = reference_slice(tree, "10001_1000010", 1)
    assert_agrees(load(tree, "10001_1000010", size=512, geometry="paper"), theirs)


@pytest.mark.slow
@pytest.mark.realdata
def test_papers_geometry_agrees_with_picai_prep_on_the_real_case(real: Path) -> None:
    assert_agrees(load(real, REAL, size=512, geometry="paper"), reference_slice(real, REAL, 0))


@pytest.mark.realdata
def test_real_case_in_physical_space(real: Path) -> None:
    case = load(real, REAL, size=300)
    assert case.label == 0 and not case.tumour.any()
    assert 0.02 < case.gland.float().mean() < 0.2
    rows, columns = np.nonzero(case.gland.numpy())
    assert np.abs([rows.mean() - 150, columns.mean() - 150]).max() < 60, "near the middle"
    assert all(plane[case.gland].float().std() > 5 for plane in case.image)
    # here the grids differ so that both geometries agree, although their centres lie 0.75 mm apart
    assert all(
        np.abs(shift).max() < 0.05 for shift in measure_shift(real / "images", REAL).values()
    )
    paper = load(real, REAL, size=300, geometry="paper")
    volume = load(real, REAL, size=300, window="volume")
    gaps = (paper.image.float() - volume.image.float()).abs().mean(dim=(1, 2))
    assert gaps.max() < 1
    # what the window changes: by minimum and maximum, DWI has few gray levels left for the gland
    assert case.image[2][case.gland].float().mean() > 8 * volume.image[2][case.gland].float().mean()
